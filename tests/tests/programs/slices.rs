//! Programs that load parts of tensors.

use tightfit_tests::programs::{Bench, hostile};
use tightfit_wasm::sandbox::GuestFailure;

const UP: &str = "model.layers.0.mlp.up_proj.weight";

#[test]
fn parts_are_tensors_of_their_own_and_say_what_they_are_of() {
    let bench = Bench::default();
    let outcome = bench.run(hostile(), &["slice"]).unwrap();
    let piece = |rows: &str, device| {
        format!("{UP}[{rows}] [32, 32] on {device} of {UP} [64, 32], dimension 0, {rows}")
    };
    let (upper, lower) = (piece("0:32", 0), piece("32:64", 1));
    let expected = format!("model.embed_tokens.weight [64, 32] on 1; {upper}; {lower}");
    assert_eq!(outcome.answer, expected);
    assert!(outcome.peak_reserved > 0);
    bench.is_unharmed();
    let small = Bench::new(4096);
    let told = small.told(hostile(), &["slice"]);
    assert!(told.starts_with("Error::QuotaExceeded"), "{told}");
}

#[test]
fn slices_have_the_elements_of_the_whole() {
    let answer = Bench::default().answer(hostile(), &["slice-same-elements"]);
    assert_eq!(answer, "4096 of 4096");
}

#[test]
fn slices_that_there_cannot_be_are_told_and_nothing_is_taken() {
    for (fault, says) in [
        ("no-ranges", "has 0 ranges, there can be 1 to 4096"),
        ("too-long", "has 32..65 of dimension 0"),
        ("no-such-tensor", "of tensor number 1000, there are 4"),
        ("no-such-dimension", "which has 2 (from 0)"),
        ("no-such-device", "on device number 2"),
        ("twice", "placed twice on device number 1"),
        ("whole-too", "is placed as a whole and in slices"),
        ("too-few", "placed 3 tensors, the checkpoint has 4"),
        ("cast-i8", "casts are between"),
    ] {
        let told = Bench::default().told(hostile(), &["slice-badly", fault]);
        assert!(
            told.starts_with("Error::InvalidArgument"),
            "{fault}: {told}"
        );
        assert!(told.contains(says), "{fault}: {told}");
    }
}

#[test]
fn floods_of_slices_and_ranges_are_bounded() {
    let bench = Bench::default();
    let told = bench.told(hostile(), &["slice-into", "100000"]);
    assert!(told.contains("placed twice"), "{told}");
    let told = bench.told(hostile(), &["slice-into-ranges", "5000"]);
    assert!(told.contains("has 5000 ranges"), "{told}");
    let told = bench.told(hostile(), &["slice-into-ranges", "300000"]);
    assert!(told.contains("299999 ranges beyond one for each"), "{told}");
    for (flood, times) in [("slice-into", "800000"), ("slice-into-ranges", "3000000")] {
        let failure = bench.failure(hostile(), &[flood, times]);
        assert!(
            matches!(failure, GuestFailure::HostCall { .. }),
            "{failure:?}"
        );
    }
}
