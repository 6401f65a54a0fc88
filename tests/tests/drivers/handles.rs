//! Handles that are forged, stale, of another kind, or too many.

use tightfit::policy::Failure;
use tightfit_tests::drivers::{Bench, hostile};

#[track_caller]
fn traps(behavior: &str, word: &str) {
    let failure = Bench::default().failure(hostile(), &[behavior]);
    let Failure::Trap { message } = &failure else {
        panic!("{failure:?}");
    };
    assert!(message.contains(word), "{message}");
}

#[test]
fn a_handle_that_was_never_given_is_a_trap() {
    traps("forge", "unknown handle index 12345");
}

#[test]
fn a_handle_that_was_given_back_is_a_trap() {
    traps("free-twice", "unknown handle index");
    traps("use-after-free", "unknown handle index");
    traps("use-closed-checkpoint", "unknown handle index");
}

#[test]
fn a_handle_of_another_kind_is_a_trap() {
    traps("checkpoint-as-buffer", "handle index");
    traps("buffer-as-checkpoint", "handle index");
}

#[test]
fn handles_run_out() {
    for behavior in ["exhaust-handles", "exhaust-handles-with-checkpoints"] {
        traps(behavior, "at most 10000 are allowed");
    }
}
