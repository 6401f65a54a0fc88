//! Policies that want more than they are given: time, memory, stack, words.

use std::time::Duration;

use tightfit::plan::ProposeError;
use tightfit::policy::{Policy, PolicyError};
use tightfit_tests::failures::failure_of;
use tightfit_tests::guests::{self, Handwritten, compile, hostile, hostile_in_describe};
use tightfit_wasm::sandbox::{GuestFailure, Limits};

use super::Bench;

const MEMORY: u64 = 256 << 20;

/// Fuel that suffices for an honest policy and is soon burnt.
fn meager() -> Limits {
    Limits::default()
        .with_fuel(2_000_000)
        .with_fuel_per_tensor(0)
}

/// More fuel than can be burnt before the deadline.
fn impatient() -> Limits {
    Limits::default()
        .with_fuel(u64::MAX)
        .with_deadline(Duration::from_millis(200))
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
    assert_eq!(failure, GuestFailure::OutOfFuel { fuel });
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
    let Err(error) = policy.plan(&request) else {
        panic!("it came to an end");
    };
    let (_, failure) = failure_of(error);
    assert_eq!(failure, GuestFailure::Deadline { seconds: 0.2 });
    bench.is_unharmed();
}

#[test]
fn describe_is_limited_like_plan() {
    let bench = Bench::new();
    let failure = |behavior: &str, limits: Limits| {
        bench.failure(&compile(&hostile_in_describe(behavior), limits), "")
    };
    let fuel = meager().fuel;
    assert_eq!(failure("loop", meager()), GuestFailure::OutOfFuel { fuel });
    assert_eq!(
        failure("loop", impatient()),
        GuestFailure::Deadline { seconds: 0.2 }
    );
    assert_eq!(
        failure("recurse", Limits::default()),
        GuestFailure::StackOverflow
    );
    let eaten = failure("eat-memory", Limits::default());
    assert!(
        matches!(eaten, GuestFailure::Memory { need, limit: MEMORY } if need > MEMORY),
        "{eaten:?}"
    );
    let panic = failure("panic", Limits::default());
    assert!(
        matches!(&panic, GuestFailure::Panic { message } if message.contains("lost its head")),
        "{panic:?}"
    );
}

#[test]
fn memory_is_limited_by_need_and_not_by_luck() {
    let failure = Bench::new().failure(hostile(), "eat-memory");
    assert!(
        matches!(failure, GuestFailure::Memory { need, limit: MEMORY }
            if need > MEMORY && need < 2 * MEMORY),
        "{failure:?}"
    );
    let demanding = handwritten(|policy| {
        policy.plan = "(drop (memory.grow (i32.const 60000))) (i32.const 128)".to_owned();
    });
    assert_eq!(
        Bench::new().failure(&compile(&demanding, Limits::default()), ""),
        GuestFailure::Memory {
            need: 60_004 * 65_536,
            limit: MEMORY
        }
    );
}

#[test]
fn recursion_without_end_overflows_its_own_stack_only() {
    let failure = Bench::new().failure(hostile(), "recurse");
    assert_eq!(failure, GuestFailure::StackOverflow);
}

#[test]
fn a_panic_says_why() {
    let failure = Bench::new().failure(hostile(), "panic");
    let GuestFailure::Panic { message } = failure else {
        panic!("{failure:?}");
    };
    assert!(
        message.ends_with("the policy has lost its head"),
        "{message}"
    );
}

#[test]
fn more_than_a_call_may_carry_is_not_carried() {
    const CARRIED: GuestFailure = GuestFailure::HostCall { limit: 32 << 20 };
    let bench = Bench::new();
    for behavior in [
        "refuse-without-end",
        "log-a-giant",
        "ask-a-giant-shape",
        "millions-of-placements",
        "millions-of-headrooms",
    ] {
        assert_eq!(bench.failure(hostile(), behavior), CARRIED, "{behavior}");
    }
    let giant = compile(&hostile_in_describe("giant"), Limits::default());
    assert_eq!(bench.failure(&giant, ""), CARRIED);
    let more = Limits::default().with_host_call_bytes(64 << 20);
    let refused = bench.error(&compile(guests::HOSTILE, more), "refuse-without-end");
    assert!(
        matches!(refused, ProposeError::Policy(PolicyError::Refused { .. })),
        "{refused:?}"
    );
}

#[test]
fn a_description_has_so_many_settings_and_no_more() {
    let many = |limits| compile(&hostile_in_describe("many-settings"), limits);
    let bench = Bench::new();
    assert_eq!(
        bench.failure(&many(Limits::default()), ""),
        GuestFailure::TooMany {
            what: "settings",
            limit: 256
        }
    );
    let raised = Limits::default().with_settings(10_000);
    assert_eq!(many(raised).describe().unwrap().settings.len(), 10_000);
}

#[test]
fn a_setting_of_ten_megabytes_costs_the_guest_its_own_memory() {
    let bench = Bench::new();
    let setting = "x".repeat(10 << 20);
    let refused = bench.error(hostile(), &setting);
    assert!(
        matches!(refused, ProposeError::Policy(PolicyError::Refused { .. })),
        "{refused:?}"
    );
    let small = Limits::default().with_memory(4 << 20);
    let failure = bench.failure(&compile(guests::HOSTILE, small), &setting);
    assert!(
        matches!(failure, GuestFailure::Memory { need, limit: LIMIT } if need > LIMIT),
        "{failure:?}"
    );
    const LIMIT: u64 = 4 << 20;
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
    let policy = compile(&hostile_in_describe("long-help"), Limits::default());
    let setting = policy.describe().unwrap().settings.remove(0);
    assert!(setting.help.len() < 5000 && setting.default.len() < 5000);
    let brief = Limits::default().with_text_bytes(10);
    let policy = compile(&hostile_in_describe("long"), brief);
    assert_eq!(policy.describe().unwrap().name, "xxxxxxxxxx…");
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
fn fuel_is_a_limit_to_be_relied_on() {
    let bench = Bench::new();
    let devices = bench.infos();
    let request = bench.request(&devices);
    let needed = hostile().plan(&request).unwrap().fuel.unwrap();
    let with_fuel = |fuel| {
        let limits = Limits::default().with_fuel(fuel).with_fuel_per_tensor(0);
        compile(guests::HOSTILE, limits).plan(&request)
    };
    assert_eq!(with_fuel(needed).unwrap().fuel, Some(needed));
    let Err(error) = with_fuel(needed / 2) else {
        panic!("half the fuel sufficed");
    };
    let (_, failure) = failure_of(error);
    let fuel = needed / 2;
    assert_eq!(failure, GuestFailure::OutOfFuel { fuel });
}
