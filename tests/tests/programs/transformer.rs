//! What a decoder computes between products: lengths, places, ids and positions that lie, and work without end.

use std::time::Duration;

use tightfit_tests::programs::{Bench, HOSTILE, compile, hostile, run};
use tightfit_wasm::program::{ProgramError, default_limits};
use tightfit_wasm::sandbox::GuestFailure;
use tightfit_wasm::wit::program::output;

#[track_caller]
fn answers(arguments: &[&str], expected: &str) {
    assert_eq!(
        Bench::default().answer(hostile(), arguments),
        expected,
        "{arguments:?}"
    );
}

#[track_caller]
fn told(operation: &str, changes: &[&str], kind: &str, words: &str) {
    let arguments = [&["step", operation], changes].concat();
    let told = Bench::default().told(hostile(), &arguments);
    let expected = format!("Error::{kind}");
    assert!(
        told.starts_with(&expected) && told.contains(words),
        "{arguments:?}: {told}"
    );
}

#[track_caller]
fn invalid(operation: &str, changes: &[&str], words: &str) {
    told(operation, changes, "InvalidArgument", words);
}

const ALL: [&str; 10] = [
    "rms-norm", "add", "gate", "rotate", "attend", "top", "route", "combine", "gather", "dense",
];

/// The numbers of the places that an operation has.
fn places(operation: &str) -> &'static [u64] {
    match operation {
        "rms-norm" => &[0, 1, 2, 3],
        "add" | "gather" | "dense" => &[0, 1],
        "rotate" => &[0, 1, 2, 3, 4, 5, 6, 7],
        "attend" => &[0, 1, 3, 4, 6],
        _ => &[0, 1, 2],
    }
}

#[test]
fn calls_that_are_right_are_carried_out_in_their_order() {
    for operation in ALL {
        // `positions` and `ids` are zeros.
        answers(&["step", operation], "none");
        for float in ["float=1", "float=2"] {
            if !["gather", "dense"].contains(&operation) {
                Bench::default().answer(hostile(), &["step", operation, float]);
            }
        }
    }
    answers(&["decode-honestly"], "0 1");
}

#[test]
fn nothing_is_done_for_nothing() {
    for operation in [
        "rms-norm", "rotate", "attend", "top", "route", "combine", "gather", "dense",
    ] {
        Bench::default().answer(hostile(), &["step", operation, "rows=0"]);
    }
    for operation in ["add", "gate"] {
        Bench::default().answer(hostile(), &["step", operation, "elements=0"]);
    }
    Bench::default().answer(hostile(), &["step", "rotate", "dimensions=0"]);
    Bench::default().answer(hostile(), &["step", "rms-norm", "columns=0"]);
}

#[test]
fn places_outside_of_their_buffers_are_refused() {
    for operation in ALL {
        for place in places(operation) {
            // A multiple of every alignment, at which nothing is left.
            let beyond = format!("at{place}=8192");
            invalid(operation, &[&beyond], "outside of a buffer");
            let wraps = format!("at{place}={}", u64::MAX - 15);
            invalid(operation, &[&wraps], "outside of a buffer");
        }
    }
}

#[test]
fn places_between_elements_are_refused() {
    for operation in ALL {
        for place in places(operation) {
            invalid(
                operation,
                &[&format!("at{place}=1")],
                "not at a multiple of",
            );
        }
    }
    // Of heads and caches, what is not at a multiple of 16.
    for place in ["at0=4", "at1=8", "at3=4", "at4=12"] {
        invalid("attend", &[place], "not at a multiple of 16");
        invalid("rotate", &[place], "not at a multiple of 16");
    }
}

#[test]
fn places_on_another_device_are_refused() {
    for operation in ALL {
        for place in places(operation) {
            let elsewhere = format!("in{place}=99");
            invalid(operation, &[&elsewhere], "on device");
        }
    }
}

#[test]
fn what_is_written_overlaps_nothing() {
    for (operation, written) in [
        ("rms-norm", &[0, 3][..]),
        ("add", &[0]),
        ("gate", &[2]),
        ("rotate", &[0, 3, 4]),
        ("attend", &[1]),
        ("top", &[1, 2]),
        ("route", &[1, 2]),
        ("combine", &[2]),
        ("gather", &[1]),
        ("dense", &[1]),
    ] {
        for written in written {
            for other in places(operation).iter().filter(|other| *other != written) {
                // In one buffer, at the same place.
                let same = format!("in{written}={other}");
                invalid(operation, &[&same], "overlap");
            }
        }
    }
}

#[test]
fn what_is_only_read_may_be_the_same() {
    for (operation, same) in [
        ("gate", "in0=1"),
        ("rotate", "in1=2"),
        ("attend", "in3=4"),
        ("rms-norm", "in1=2"),
    ] {
        Bench::default().answer(hostile(), &["step", operation, same]);
    }
}

#[test]
fn lengths_that_lie_are_refused() {
    for (operation, change) in [
        ("rms-norm", "rows=4294967295"),
        ("rms-norm", "columns=1048576"),
        ("add", "elements=18446744073709551615"),
        ("add", "elements=2049"),
        ("gate", "elements=4611686018427387904"),
        ("rotate", "rows=4294967295"),
        ("rotate", "capacity=4294967295"),
        ("rotate", "query-heads=4096"),
        ("attend", "rows=4294967295"),
        ("attend", "capacity=65"),
        ("top", "rows=4294967295"),
        ("top", "columns=16777216"),
        ("route", "rows=4294967295"),
        ("combine", "rows=4294967295"),
        ("gather", "rows=4294967295"),
        ("dense", "rows=4294967295"),
    ] {
        invalid(operation, &[change], "outside of a buffer");
    }
    for (operation, change, words) in [
        ("rms-norm", "columns=4294967295", "at most 2^20"),
        ("rotate", "head-size=0", "a multiple of 8"),
        ("rotate", "head-size=12", "a multiple of 8"),
        ("attend", "head-size=264", "a multiple of 8"),
        ("attend", "head-size=4294967295", "a multiple of 8"),
        ("attend", "kv-heads=0", "a head of queries"),
        ("attend", "query-heads=0", "a head of queries"),
        ("attend", "kv-heads=3", "a multiple of those of keys"),
        ("attend", "query-heads=4294967294", "at most 4096"),
        ("rotate", "dimensions=15", "an even number"),
        ("rotate", "dimensions=18", "an even number"),
        ("rotate", "dimensions=4294967294", "an even number"),
        ("rotate", "capacity=0", "a cache has a row"),
        ("attend", "capacity=0", "a cache has a row"),
        ("top", "k=0", "from 1 to 256"),
        ("top", "k=257", "from 1 to 256"),
        ("top", "k=65", "as many as are asked for"),
        ("top", "columns=4294967295", "at most 2^24"),
        ("route", "k=0", "from 1 to 64"),
        ("route", "k=65", "from 1 to 64"),
        ("route", "columns=3", "as many experts"),
        ("route", "columns=4097", "at most 4096"),
        ("combine", "k=4294967295", "at most 2^20"),
    ] {
        invalid(operation, &[change], words);
    }
}

#[test]
fn what_is_seen_is_something_and_is_there() {
    for (changes, words) in [
        (["visible=1", "window=0"], "sees something"),
        (["visible=2", "first=0"], "sees something"),
        (["visible=2", "first=9"], "no more is seen"),
        (["visible=2", "first=4294967295"], "no more is seen"),
    ] {
        invalid("attend", &changes, words);
    }
    for changes in [["visible=1", "window=4294967295"], ["visible=2", "first=8"]] {
        Bench::default().answer(hostile(), &["step", "attend", changes[0], changes[1]]);
    }
    // It only says how work is dealt out.
    for most in ["most=0", "most=4294967295"] {
        Bench::default().answer(hostile(), &["step", "attend", most]);
    }
}

#[test]
fn numbers_are_of_types_that_are_computed_with() {
    for operation in [
        "rms-norm", "add", "gate", "rotate", "attend", "top", "route", "combine",
    ] {
        for float in ["float=3", "float=4"] {
            told(operation, &[float], "Unsupported", "only bf16, f16 and f32");
        }
    }
}

#[test]
fn tensors_that_are_no_matrices_of_floats_are_refused() {
    for operation in ["gather", "dense"] {
        // Not loaded, not there; quantized; integers.
        for tensor in ["tensor=1", "tensor=9", "tensor=4294967295"] {
            invalid(operation, &[tensor], "is not there");
        }
        told(operation, &["tensor=2"], "Unsupported", "in 4 bits");
        told(
            operation,
            &["tensor=3"],
            "Unsupported",
            "not bf16, f16 or f32",
        );
    }
}

#[test]
fn ids_of_nothing_are_zeros_and_a_fault() {
    // The table is of zeros, and what was there is not.
    answers(
        &["ids", "64,0,4294967295,63"],
        "id [true, true, true, true]",
    );
    answers(&["ids", "0,63"], "none [true, true]");
    answers(&["faults-are-taken-once"], "[false, true, true]");
}

#[test]
fn positions_behind_a_cache_write_nothing_and_are_a_fault() {
    let right = "none [true, false, false, true, false, false] none true";
    answers(&["positions", "0,3"], right);
    for (positions, written) in [
        ("4", "[false, false, false, false, false, false]"),
        ("4294967295", "[false, false, false, false, false, false]"),
        ("1073741824,2", "[false, false, true, false, false, false]"),
    ] {
        answers(
            &["positions", positions],
            &format!("position {written} position true"),
        );
    }
}

#[test]
fn a_cache_that_was_never_written_is_of_zeros() {
    answers(&["cache-reads-as-zeros"], "true");
}

#[test]
fn faults_are_of_devices_that_are_there() {
    let told = Bench::default().told(hostile(), &["faults-of", "2"]);
    assert!(told.contains("there is no device 2"), "{told}");
    answers(&["faults-of", "1"], "none");
}

#[test]
fn the_deadline_holds_in_the_middle_of_a_call() {
    let limits = default_limits()
        .with_fuel(u64::MAX)
        .with_deadline(Duration::from_millis(300));
    let program = compile(HOSTILE, limits);
    for behavior in [
        "attend-without-end",
        "attend-long",
        "dense-long",
        "norm-long",
    ] {
        let bench = Bench::with_devices(Bench::new(0).devices, 64 << 20);
        let failure = bench.failure(&program, &[behavior]);
        assert_eq!(
            failure,
            GuestFailure::Deadline { seconds: 0.3 },
            "{behavior}"
        );
    }
}

#[test]
fn what_a_program_says_comes_out_while_it_runs_and_in_its_order() {
    let bench = Bench::default();
    let (to, texts) = output();
    let context = bench.context().with_output(to);
    let listener =
        std::thread::spawn(move || texts.into_iter().map(|text| text.len()).collect::<Vec<_>>());
    let outcome = run(hostile(), context, &["say", "200", "65536"]).unwrap();
    assert_eq!(outcome.answer, "said");
    assert_eq!(listener.join().unwrap(), [65536; 200]);
    // Nobody listens.
    assert_eq!(bench.answer(hostile(), &["say", "200", "65536"]), "said");
    let (to, texts) = output();
    drop(texts);
    let context = bench.context().with_output(to);
    assert_eq!(
        run(hostile(), context, &["say", "200", "1"])
            .unwrap()
            .answer,
        "said"
    );
    let told = bench.told(hostile(), &["say", "1", "65537"]);
    assert!(told.contains("at most 65536"), "{told}");
}

#[test]
fn nobody_who_listens_slowly_holds_a_program_past_its_deadline() {
    let limits = default_limits()
        .with_fuel(u64::MAX)
        .with_deadline(Duration::from_millis(300));
    let program = compile(HOSTILE, limits);
    let bench = Bench::default();
    // Nothing is ever taken.
    let (to, texts) = output();
    let error = run(
        &program,
        bench.context().with_output(to),
        &["say-without-end"],
    )
    .unwrap_err();
    let is_deadline = matches!(
        &error,
        ProgramError::Failed {
            failure: GuestFailure::Deadline { .. },
            ..
        }
    );
    assert!(is_deadline, "{error:?}");
    assert_eq!(texts.into_iter().count(), 64);
    bench.is_unharmed();
}
