//! Handles that are forged, stale, of another kind, or too many.

use tightfit_tests::programs::{Bench, HOSTILE, compile, hostile};
use tightfit_wasm::program::default_limits;
use tightfit_wasm::sandbox::GuestFailure;

#[track_caller]
fn traps(behavior: &str, word: &str) {
    let failure = Bench::default().failure(hostile(), &[behavior]);
    let GuestFailure::Trap { message } = &failure else {
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
        let failure = Bench::default().failure(hostile(), &[behavior]);
        assert_eq!(
            failure,
            GuestFailure::Resources { limit: 10_000 },
            "{behavior}"
        );
        let limits = default_limits().with_handles(50);
        let failure = Bench::default().failure(&compile(HOSTILE, limits), &[behavior]);
        assert_eq!(failure, GuestFailure::Handles { limit: 50 }, "{behavior}");
    }
}
