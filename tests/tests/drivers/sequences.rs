//! Calls in any order and with any arguments.

use proptest::prelude::*;
use tightfit_tests::driver_calls::exercise;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_sequence_of_calls_leaves_the_books_right(
        input in prop::collection::vec(any::<u8>(), 0..2000)
    ) {
        exercise(&input);
    }
}

/// A sequence that reaches what chance seldom does: a model that is loaded, looked at and read.
#[test]
fn a_sequence_that_makes_sense_works() {
    let nf4_on_first = [60, 5, 1];
    let stored_on_first = [60, 1];
    let mut input = vec![255, 14, 0];
    input.extend([19, 0, 0]);
    input.extend(nf4_on_first.repeat(3));
    input.extend(stored_on_first);
    input.extend([0, 0]);
    input.extend([
        22, 0, 0, 0, 23, 0, 0, 1, 0, 100, 25, 0, 0, 0, 100, 2, 21, 0, 16, 0,
    ]);
    // Opened, loaded, looked up twice, read twice, unloaded, closed.
    assert_eq!(exercise(&input), 8);
}
