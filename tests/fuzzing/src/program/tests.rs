//! Sequences that make sense, and any.

use proptest::prelude::*;

use super::*;

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 2000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_sequence_of_calls_leaves_the_books_right(
        data in prop::collection::vec(any::<u8>(), 0..2000)
    ) {
        calls_that_went_well(&data);
    }
}

/// They reach what chance seldom does.
#[test]
fn seeds_do_what_they_are_for() {
    let seeds = program_seeds();
    let did = seeds
        .iter()
        .map(|(name, bytes, _)| (*name, calls_that_went_well(bytes)));
    let should = seeds.iter().map(|(name, _, well)| (*name, *well));
    assert_eq!(did.collect::<Vec<_>>(), should.collect::<Vec<_>>());
}
