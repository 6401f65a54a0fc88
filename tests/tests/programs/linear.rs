//! Products: shapes that lie, operands that overlap or are elsewhere, weights whose memory is gone, and work
//! without end.

use std::time::Duration;

use tightfit::cancel::CancelToken;
use tightfit::device::{Device, HostDevice};
use tightfit_tests::programs::{Bench, HOSTILE, compile, hostile, run};
use tightfit_wasm::program::{ProgramError, default_limits};
use tightfit_wasm::sandbox::GuestFailure;

const MIB: u64 = 1 << 20;

#[track_caller]
fn answers(arguments: &[&str], expected: &str) {
    assert_eq!(Bench::default().answer(hostile(), arguments), expected);
}

#[track_caller]
fn told(arguments: &[&str], kind: &str, words: &str) {
    let told = Bench::default().told(hostile(), arguments);
    let expected = format!("Error::{kind}");
    assert!(
        told.starts_with(&expected) && told.contains(words),
        "{arguments:?}: {told}"
    );
}

#[track_caller]
fn invalid(arguments: &[&str], words: &str) {
    told(arguments, "InvalidArgument", words);
}

#[test]
fn products_are_what_a_program_computes_by_itself() {
    for seed in ["0", "1"] {
        answers(&["multiply", seed], "true true 0");
    }
    answers(&["finish-nothing"], "finished");
    answers(&["rows", "5"], "multiplied");
    answers(&["rows", "0"], "multiplied");
    answers(&["list", "3000"], "3000");
    answers(&["list", "0"], "0");
}

#[test]
fn shapes_that_lie_are_refused() {
    let fits = |shape| ["weight", shape, "64", "0", "0"];
    answers(&fits("8,64"), "[8, 64]");
    answers(&fits("4,32,128"), "[4, 32, 128]");
    answers(&fits("1,3"), "[1, 3]");
    for shape in ["", "64", "1,2,3,4"] {
        invalid(&fits(shape), "[out, in] or [experts, out, in]");
    }
    for shape in ["0,64", "64,0", "0,64,64", "4,0,64"] {
        invalid(&fits(shape), "no length of 0");
    }
    for shape in [
        "18446744073709551615,18446744073709551615",
        "4294967296,4294967296",
        "4294967296,1",
        "1,4294967296",
        "4097,1,64",
        "4096,1048576,1",
    ] {
        told(&fits(shape), "Unsupported", "too much for one weight");
    }
    // 8192 bytes of codes are of 16384 elements.
    answers(&fits("128,128"), "[128, 128]");
    for shape in [
        "128,129",
        "129,128",
        "2,128,65",
        "2147483647,1",
        "1,2147483647",
    ] {
        invalid(&fits(shape), "lie outside of a buffer of 8192");
    }
}

#[test]
fn blocks_and_places_of_weights_are_checked() {
    for block in ["0", "1", "33", "8192", "4294967295"] {
        invalid(&["weight", "8,64", block, "0", "0"], "not a power of two");
    }
    answers(&["weight", "8,64", "64", "3", "4"], "[8, 64]");
    for offset in ["1", "2", "3"] {
        invalid(&["weight", "8,64", "64", "0", offset], "multiple of 4");
    }
    const MAX: &str = "18446744073709551615";
    for (codes, absmax) in [("7937", "0"), ("0", "8164"), (MAX, "0"), ("0", MAX)] {
        invalid(&["weight", "8,64", "64", codes, absmax], "lie outside");
    }
    invalid(
        &["weight-between-devices"],
        "on devices 0 and 1, not on one",
    );
}

#[test]
fn operands_outside_of_their_buffers_are_refused() {
    for (operand, offset) in [
        ("input", "4"),
        ("output", "4"),
        ("bias", "4"),
        ("experts", "1536"),
        ("input", "18446744073709551612"),
        ("output", "18446744073709551612"),
        ("bias", "18446744073709551612"),
        ("experts", "18446744073709551612"),
    ] {
        invalid(&["operand", operand, offset], "lie outside of a buffer");
    }
    for rows in ["6", "4294967295"] {
        invalid(&["rows", rows], "lie outside of a buffer");
    }
}

#[test]
fn operands_between_elements_are_refused() {
    for operand in ["input", "output", "bias", "experts"] {
        for offset in ["1", "2"] {
            let told = Bench::default().told(hostile(), &["operand", operand, offset]);
            // What is too long by that is told first.
            let expected = ["not at a multiple of 4", "lie outside"];
            assert!(expected.iter().any(|words| told.contains(words)), "{told}");
        }
    }
    let expected = "experts begins at byte 2, not at a multiple of 4";
    invalid(&["operand", "experts", "2"], expected);
}

#[test]
fn operands_on_another_device_are_refused() {
    for operand in ["input", "output", "bias", "experts"] {
        let expected = format!("{operand} is on device 1, and the weight on 0");
        invalid(&["operand-elsewhere", operand], &expected);
    }
}

#[test]
fn an_output_that_overlaps_what_is_read_is_refused() {
    for (operand, words) in [
        ("bias", "output and bias overlap"),
        ("experts", "output and experts overlap"),
        ("codes", "output and the weight overlap"),
        ("absmax", "output and the weight overlap"),
    ] {
        invalid(&["overlap", operand], words);
    }
    // 128 numbers of the input: those of an output of 96 end within its buffer, and begin with its last one.
    invalid(&["overlap", "input"], "output and input overlap");
}

#[test]
fn numbers_are_of_types_that_are_multiplied() {
    for float in ["f16", "bf16"] {
        answers(&["float", float], "multiplied");
    }
    for float in ["i64", "bool"] {
        told(&["float", float], "Unsupported", "only bf16, f16 and f32");
    }
}

#[test]
fn experts_are_named_where_there_are_some_and_nowhere_else() {
    invalid(&["experts-missing"], "needs to know that of each row");
    invalid(&["experts-unasked"], "the weight has no experts");
    let expected = "[true, false, true, true, true] [63, 63, 63, 63, 63, 63, 63, 63]";
    answers(&["experts-of-nobody"], expected);
}

#[test]
fn nothing_of_a_list_is_done_where_one_product_is_refused() {
    answers(&["one-of-many-is-bad"], "true");
}

#[test]
fn a_weight_keeps_its_memory_as_long_as_it_lives_and_no_longer() {
    answers(&["free-and-multiply"], "true true true");
    answers(&["unload-and-multiply"], "true true");
}

#[test]
fn products_see_what_was_written_before_and_not_what_is_written_later() {
    answers(&["overwrite-after-multiply"], "true false");
}

#[test]
fn tensors_that_are_no_weights_in_4_bits_are_refused() {
    answers(&["weight-of-model", "2"], "[64, 32]");
    told(
        &["weight-of-model", "3"],
        "Unsupported",
        "stored: products are of weights in 4 bits",
    );
    for tensor in ["4", "4294967295"] {
        invalid(
            &["weight-of-model", tensor],
            "is not there, or was not loaded",
        );
    }
}

#[test]
fn weights_run_out() {
    answers(&["hoard-weights", "9000"], "9000");
    let failure = Bench::default().failure(hostile(), &["hoard-weights", "20000"]);
    assert_eq!(failure, GuestFailure::Handles { limit: 10_000 });
}

#[test]
fn lists_are_as_long_as_there_are_handles() {
    // Each product has a weight and two buffers.
    let failure = Bench::default().failure(hostile(), &["list", "4000"]);
    assert_eq!(failure, GuestFailure::Handles { limit: 10_000 });
}

#[test]
fn memory_that_was_never_written_is_zeros_beside_what_is() {
    answers(&["read-what-was-not-written"], "zeros");
}

#[test]
fn a_panic_with_weights_gives_everything_back() {
    let failure = Bench::default().failure(hostile(), &["panic-while-queued"]);
    assert!(matches!(failure, GuestFailure::Panic { .. }), "{failure:?}");
}

/// A bench with room for large operands.
fn roomy() -> Bench {
    let device = |index| Box::new(HostDevice::sim(index, 512 * MIB)) as Box<dyn Device>;
    Bench::with_devices((0..2).map(device).collect(), 512 * MIB)
}

#[test]
fn time_ends_products_one_after_the_other_in_one_list_and_in_one_product() {
    let program = compile(
        HOSTILE,
        default_limits()
            .with_fuel(u64::MAX)
            .with_deadline(Duration::from_millis(300)),
    );
    for behavior in ["multiply-without-end", "list-without-end", "multiply-long"] {
        let failure = roomy().failure(&program, &[behavior]);
        assert_eq!(
            failure,
            GuestFailure::Deadline { seconds: 0.3 },
            "{behavior}"
        );
    }
}

#[test]
fn products_are_cancelled_in_the_middle() {
    let program = compile(HOSTILE, default_limits().with_fuel(u64::MAX));
    let bench = roomy();
    let token = CancelToken::new();
    let asked = token.clone();
    let user = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        asked.cancel();
    });
    let context = bench.context().cancelled_by(token);
    let error = run(&program, context, &["multiply-long"]).unwrap_err();
    assert!(matches!(error, ProgramError::Cancelled), "{error:?}");
    user.join().unwrap();
    bench.is_unharmed();
}

#[test]
fn the_processor_needs_nothing_beside_the_operands() {
    answers(&["scratch", "0"], "false false true");
}
