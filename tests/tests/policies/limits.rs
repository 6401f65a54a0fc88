//! Policies that want more than they are given: time, memory, stack, words.

use std::time::Duration;

use tightfit::policy::{Failure, Limits, Policy, PolicyError, Request};
use tightfit_tests::guests::{self, Handwritten, compile, hostile, hostile_in_describe};
use tightfit_tests::loading::auto;

use super::Bench;

const MEMORY: u64 = 256 << 20;

/// Fuel that suffices for an honest policy and is soon burnt.
fn meager() -> Limits {
    Limits {
        fuel: 2_000_000,
        fuel_per_tensor: 0,
        ..Limits::default()
    }
}

/// More fuel than can be burnt before the deadline.
fn impatient() -> Limits {
    Limits {
        fuel: u64::MAX,
        deadline: Duration::from_millis(200),
        ..Limits::default()
    }
}

fn handwritten(edit: impl FnOnce(&mut Handwritten)) -> Vec<u8> {
    let mut policy = Handwritten::default();
    edit(&mut policy);
    policy.module()
}

#[test]
fn a_loop_runs_out_of_fuel() {
    let failure = Bench::new().failure(hostile(), "loop");
    let Limits {
        fuel,
        fuel_per_tensor,
        ..
    } = Limits::default();
    let fuel = fuel + 4 * fuel_per_tensor;
    assert_eq!(failure, Failure::OutOfFuel { fuel });
}

#[test]
fn a_loop_with_fuel_left_is_ended_by_the_clock() {
    let bench = Bench::new();
    let policy = compile(guests::HOSTILE, impatient());
    let settings = [("behavior".to_owned(), "loop".to_owned())];
    let devices = bench.infos();
    let mut request = bench.request(&devices);
    request.settings = &settings;
    // Without `describe`, which a busy machine could keep from its own deadline.
    let Err(PolicyError::Failed { failure, .. }) = policy.plan(&request) else {
        panic!("it came to an end");
    };
    assert_eq!(failure, Failure::Deadline { seconds: 0.2 });
    bench.is_unharmed();
}

#[test]
fn describe_is_limited_like_plan() {
    let bench = Bench::new();
    let failure = |behavior: &str, limits: Limits| {
        bench.failure(&compile(&hostile_in_describe(behavior), limits), "")
    };
    let fuel = meager().fuel;
    assert_eq!(failure("loop", meager()), Failure::OutOfFuel { fuel });
    assert_eq!(
        failure("loop", impatient()),
        Failure::Deadline { seconds: 0.2 }
    );
    assert_eq!(
        failure("recurse", Limits::default()),
        Failure::StackOverflow
    );
    let eaten = failure("eat-memory", Limits::default());
    assert!(
        matches!(eaten, Failure::Memory { need, limit: MEMORY } if need > MEMORY),
        "{eaten:?}"
    );
    let panic = failure("panic", Limits::default());
    assert!(
        matches!(&panic, Failure::Panic { message } if message.contains("lost its head")),
        "{panic:?}"
    );
}

#[test]
fn a_loop_in_the_start_function_or_the_allocator_runs_out_of_fuel() {
    let bench = Bench::new();
    let spin = "(loop (br 0)) (unreachable)";
    let start = handwritten(|policy| policy.extra = format!("(func $spin {spin}) (start $spin)"));
    let fuel = meager().fuel;
    assert_eq!(
        bench.failure(&compile(&start, meager()), ""),
        Failure::OutOfFuel { fuel }
    );
    assert_eq!(
        bench.failure(&compile(&start, impatient()), ""),
        Failure::Deadline { seconds: 0.2 }
    );
    let allocator = handwritten(|policy| policy.realloc = spin.to_owned());
    assert_eq!(
        bench.failure(&compile(&allocator, meager()), ""),
        Failure::OutOfFuel { fuel }
    );
}

#[test]
fn memory_is_limited_by_need_and_not_by_luck() {
    let failure = Bench::new().failure(hostile(), "eat-memory");
    assert!(
        matches!(failure, Failure::Memory { need, limit: MEMORY }
            if need > MEMORY && need < 2 * MEMORY),
        "{failure:?}"
    );
    let demanding = handwritten(|policy| {
        policy.plan = "(drop (memory.grow (i32.const 60000))) (i32.const 128)".to_owned();
    });
    assert_eq!(
        Bench::new().failure(&compile(&demanding, Limits::default()), ""),
        Failure::Memory {
            need: 60_004 * 65_536,
            limit: MEMORY
        }
    );
}

#[test]
fn a_second_memory_does_not_get_around_the_limit() {
    let module = handwritten(|policy| policy.extra = "(memory 1)".to_owned());
    let failure = Bench::new().failure(&compile(&module, Limits::default()), "");
    assert!(
        matches!(&failure, Failure::Trap { message } if message.contains("memory")),
        "{failure:?}"
    );
}

#[test]
fn tables_are_limited() {
    let module = handwritten(|policy| policy.extra = "(table 200000 funcref)".to_owned());
    assert_eq!(
        Bench::new().failure(&compile(&module, Limits::default()), ""),
        Failure::Tables {
            need: 200_000,
            limit: 100_000
        }
    );
}

#[test]
fn recursion_without_end_overflows_its_own_stack_only() {
    let failure = Bench::new().failure(hostile(), "recurse");
    assert_eq!(failure, Failure::StackOverflow);
}

#[test]
fn a_panic_says_why() {
    let failure = Bench::new().failure(hostile(), "panic");
    let Failure::Panic { message } = failure else {
        panic!("{failure:?}");
    };
    assert!(
        message.ends_with("the policy has lost its head"),
        "{message}"
    );
}

#[test]
fn a_trap_without_words_is_named_by_its_kind() {
    let silent = handwritten(|policy| policy.plan = "(unreachable)".to_owned());
    let divided = handwritten(|policy| {
        policy.plan = "(i32.div_u (i32.const 1) (i32.const 0))".to_owned();
    });
    for (module, word) in [(silent, "unreachable"), (divided, "divide by zero")] {
        let failure = Bench::new().failure(&compile(&module, Limits::default()), "");
        assert!(
            matches!(&failure, Failure::Trap { message } if message.contains(word)),
            "{failure:?}"
        );
    }
}

#[test]
fn more_text_than_a_call_may_carry_is_a_trap() {
    let giant = compile(&hostile_in_describe("giant"), Limits::default());
    for failure in [
        Bench::new().failure(hostile(), "refuse-without-end"),
        Bench::new().failure(&giant, ""),
    ] {
        assert!(matches!(&failure, Failure::Trap { .. }), "{failure:?}");
    }
}

#[test]
fn long_texts_are_cut_to_what_people_read() {
    let refusal = Bench::new().refusal("refuse-at-length");
    assert!(refusal.message.len() < 5000, "{}", refusal.message.len());
    assert!(refusal.message.starts_with("xxx"));
    let policy = compile(&hostile_in_describe("long"), Limits::default());
    let description = policy.describe().unwrap();
    assert!(description.name.len() < 5000, "{}", description.name.len());
    assert_eq!(description.version, "1.0.0");
}

#[test]
fn a_flood_of_messages_and_absurd_questions_harm_nobody() {
    let bench = Bench::new();
    for behavior in ["flood-the-log", "ask-absurd-sizes"] {
        let proposed = bench.propose(hostile(), behavior).unwrap();
        assert_eq!(proposed.plan.devices[0].tensors, 3, "{behavior}");
        bench.is_unharmed();
    }
}

#[test]
fn the_same_request_takes_the_same_fuel_and_gives_the_same_proposal() {
    let bench = Bench::new();
    let devices = bench.infos();
    let request = bench.request(&devices);
    let again = compile(guests::HOSTILE, Limits::default());
    for policies in [[hostile(), &again], [auto(), auto()]] {
        let answers = policies.map(|policy| policy.plan(&request).unwrap());
        assert_eq!(answers[0], answers[1]);
        assert!(answers[0].fuel.is_some_and(|fuel| fuel > 0), "{answers:?}");
    }
    let fewer = Request {
        tensors: &request.tensors[..3],
        ..request
    };
    let [some, more] = [fewer, request].map(|request| auto().plan(&request).unwrap().fuel);
    assert_ne!(some, more, "a larger request takes more");
}

#[test]
fn fuel_is_a_limit_to_be_relied_on() {
    let bench = Bench::new();
    let devices = bench.infos();
    let request = bench.request(&devices);
    let needed = hostile().plan(&request).unwrap().fuel.unwrap();
    let with_fuel = |fuel| {
        let limits = Limits {
            fuel,
            fuel_per_tensor: 0,
            ..Limits::default()
        };
        compile(guests::HOSTILE, limits).plan(&request)
    };
    assert_eq!(with_fuel(needed).unwrap().fuel, Some(needed));
    let Err(PolicyError::Failed { failure, .. }) = with_fuel(needed / 2) else {
        panic!("half the fuel sufficed");
    };
    let fuel = needed / 2;
    assert_eq!(failure, Failure::OutOfFuel { fuel });
}
