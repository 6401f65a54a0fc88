//! Programs that want more than they are given: time, memory, stack, words.

use std::time::Duration;

use tightfit_tests::programs::{Bench, HOSTILE, compile, hostile};
use tightfit_wasm::program::{ProgramError, default_limits};
use tightfit_wasm::sandbox::{GuestFailure, Limits};

const MIB: u64 = 1 << 20;

/// Fuel that suffices for an honest program and is soon burnt.
fn meager() -> Limits {
    default_limits().with_fuel(20_000_000)
}

/// More fuel than can be burnt before the deadline.
fn impatient() -> Limits {
    default_limits()
        .with_fuel(u64::MAX)
        .with_deadline(Duration::from_millis(300))
}

#[test]
fn a_loop_runs_out_of_fuel_and_what_it_had_is_given_back() {
    let program = compile(HOSTILE, meager());
    let bench = Bench::default();
    assert!(bench.run(&program, &["honest"]).is_ok());
    for behavior in ["loop", "loop-with-memory"] {
        let failure = bench.failure(&program, &[behavior]);
        assert_eq!(
            failure,
            GuestFailure::OutOfFuel { fuel: 20_000_000 },
            "{behavior}"
        );
    }
}

#[test]
fn time_ends_loops_in_the_program_and_in_what_it_calls() {
    let program = compile(HOSTILE, impatient());
    let bench = Bench::default();
    for behavior in [
        "loop",
        "loop-with-memory",
        "call-without-end",
        "load-without-end",
    ] {
        let failure = bench.failure(&program, &[behavior]);
        assert_eq!(
            failure,
            GuestFailure::Deadline { seconds: 0.3 },
            "{behavior}"
        );
    }
}

#[test]
fn memory_and_stack_are_the_sandboxs() {
    let bench = Bench::default();
    let failure = bench.failure(hostile(), &["eat-memory"]);
    assert!(
        matches!(failure, GuestFailure::Memory { need, limit } if limit == 256 * MIB && need > limit),
        "{failure:?}"
    );
    assert_eq!(
        bench.failure(hostile(), &["recurse"]),
        GuestFailure::StackOverflow
    );
}

#[test]
fn a_panic_says_why_and_gives_everything_back() {
    for behavior in ["panic", "panic-with-memory", "panic-with-model"] {
        let failure = Bench::default().failure(hostile(), &[behavior]);
        assert!(
            matches!(&failure, GuestFailure::Panic { message } if message.ends_with("lost its head")),
            "{behavior}: {failure:?}"
        );
    }
}

#[test]
fn an_answer_is_as_long_as_it_may_be() {
    let bench = Bench::default();
    assert_eq!(
        bench.answer(hostile(), &["answer", "1048576"]).len(),
        1 << 20
    );
    let error = bench.error(hostile(), &["answer", "1048577"]);
    assert!(
        matches!(error, ProgramError::LongAnswer { have, limit, .. } if have == MIB + 1 && limit == MIB),
        "{error:?}"
    );
    // More than a call may carry at all.
    let failure = bench.failure(hostile(), &["answer", "41943040"]);
    assert_eq!(failure, GuestFailure::HostCall { limit: 32 * MIB });
}

#[test]
fn a_reason_is_cut_to_what_people_read() {
    let told = Bench::default().told(hostile(), &["give-up", "1048576"]);
    assert!(
        told.len() < 5000 && told.starts_with("xxx"),
        "{}",
        told.len()
    );
    let failure = Bench::default().failure(hostile(), &["give-up", "41943040"]);
    assert_eq!(failure, GuestFailure::HostCall { limit: 32 * MIB });
}

#[test]
fn what_a_program_hands_over_in_one_call_is_bounded() {
    let failure = Bench::new(64 * MIB).failure(hostile(), &["write-much", "41943040"]);
    assert_eq!(failure, GuestFailure::HostCall { limit: 32 * MIB });
}

#[test]
fn arguments_are_what_the_user_gives_if_they_fit() {
    let bench = Bench::default();
    let long = "x".repeat(1 << 20);
    let mut arguments = vec!["count-arguments"];
    arguments.resize(17, &long);
    assert_eq!(bench.answer(hostile(), &arguments), "16 of 16777216 bytes");
    let mut many = vec!["count-arguments"];
    many.resize(100_001, "");
    assert_eq!(bench.answer(hostile(), &many), "100000 of 0 bytes");
    arguments.resize(300, &long);
    let failure = bench.failure(hostile(), &arguments);
    assert!(
        matches!(failure, GuestFailure::Memory { .. }),
        "{failure:?}"
    );
    assert_eq!(
        bench.told(hostile(), &["dance"]),
        "no behavior is called `dance`"
    );
    assert_eq!(bench.told(hostile(), &[]), "what shall I do?");
}

#[test]
fn a_flood_of_messages_harms_nobody() {
    assert_eq!(
        Bench::default().answer(hostile(), &["flood-the-log"]),
        "flooded"
    );
}

#[test]
fn the_same_work_takes_the_same_fuel() {
    let bench = Bench::default();
    let again = compile(HOSTILE, default_limits());
    let ran = [hostile(), hostile(), &again].map(|program| bench.run(program, &["load"]).unwrap());
    assert_eq!(ran[0], ran[1]);
    assert_eq!(ran[0], ran[2]);
    assert!(ran[0].fuel > 0);
}
