//! Memory: too much of it, outside of it, on the wrong device, never given back.

use tightfit_tests::programs::{Bench, hostile};

const MIB: u64 = 1 << 20;

#[track_caller]
fn told(arguments: &[&str], expected: &str) {
    assert_eq!(Bench::default().told(hostile(), arguments), expected);
}

#[track_caller]
fn answers(arguments: &[&str], expected: &str) {
    assert_eq!(Bench::default().answer(hostile(), arguments), expected);
}

/// What the host says of a quota that is exceeded.
fn over_quota(need: u64, need_text: &str, have: u64, have_text: &str) -> String {
    format!(
        "Error::QuotaExceeded(Shortage {{ message: \"the quota is exceeded: need {need_text}, \
         have {have_text}\", need: {need}, have: {have} }})"
    )
}

#[test]
fn what_is_never_freed_is_given_back() {
    answers(&["never-free"], "1000000");
}

#[test]
fn the_quota_can_be_used_to_the_last_byte() {
    answers(&["allocate", "4194304"], "4194304");
    answers(&["scribble", "7"], "[7]");
    answers(&["allocate-twice", "3145728", "1048576"], "both");
}

#[test]
fn one_byte_more_than_the_quota_is_refused() {
    let need = 4 * MIB + 4096;
    let expected = over_quota(need, "4.004 MiB", 4 * MIB, "4.000 MiB");
    told(&["allocate", "4194305"], &expected);
    let expected = over_quota(4096, "4.000 KiB", 0, "0 B");
    told(&["allocate-twice", "4194304", "1"], &expected);
    told(
        &["exhaust-memory-in-pieces"],
        &over_quota(8192, "8.000 KiB", 0, "0 B"),
    );
}

#[test]
fn without_a_quota_of_its_own_the_device_is_the_limit() {
    let bench = Bench::new(u64::MAX);
    assert_eq!(
        bench.answer(hostile(), &["allocate", "67108864"]),
        "67108864"
    );
    let told = bench.told(hostile(), &["allocate", "67108865"]);
    let expected = "Error::NoSpace(Shortage { message: \"sim:0 has too little memory: need 64.00 MiB, \
                    have 64.00 MiB\", need: 67112960, have: 67108864 })";
    assert_eq!(told, expected);
}

#[test]
fn an_absurd_amount_is_refused() {
    for bytes in [u64::MAX, u64::MAX - 255, u64::MAX - 4095] {
        let told = Bench::default().told(hostile(), &["allocate", &bytes.to_string()]);
        assert!(told.starts_with("Error::QuotaExceeded"), "{told}");
    }
    let told = Bench::new(u64::MAX).told(hostile(), &["allocate", &(1u64 << 63).to_string()]);
    assert!(told.starts_with("Error::NoSpace"), "{told}");
}

#[test]
fn ranges_outside_of_a_buffer_are_refused() {
    let outside = |bytes: &str, offset: &str| {
        format!(
            "Error::InvalidArgument(\"{bytes} bytes from {offset} on lie outside of a buffer of 100\")"
        )
    };
    const MAX: &str = "18446744073709551615";
    for (offset, bytes) in [
        ("0", "101"),
        ("100", "1"),
        ("1", MAX),
        (MAX, "1"),
        (MAX, MAX),
    ] {
        told(&["read", offset, bytes], &outside(bytes, offset));
        told(&["copy", "0", offset, bytes], &outside(bytes, offset));
    }
    for (offset, bytes) in [("0", "101"), ("100", "1"), (MAX, "1"), (MAX, "0")] {
        told(&["write", offset, bytes], &outside(bytes, offset));
    }
    told(&["copy", MAX, "0", "1"], &outside("1", MAX));
    told(
        &["copy", "1", "0", "99"],
        "Error::InvalidArgument(\"the ranges overlap\")",
    );
}

#[test]
fn nothing_is_a_length_too() {
    answers(&["allocate", "0"], "0");
    answers(&["read", "100", "0"], "0 bytes");
    answers(&["write", "100", "0"], "written");
    answers(&["copy", "100", "100", "0"], "copied");
}

#[test]
fn pieces_are_bounded() {
    let bench = Bench::new(16 * MIB);
    assert_eq!(
        bench.answer(hostile(), &["write-much", "4194304"]),
        "written"
    );
    assert_eq!(
        bench.answer(hostile(), &["read-much", "4194304"]),
        "4194304 bytes"
    );
    let expected =
        "Error::InvalidArgument(\"4194305 bytes are too many for one call: at most 4194304\")";
    for behavior in ["write-much", "read-much"] {
        assert_eq!(bench.told(hostile(), &[behavior, "4194305"]), expected);
    }
}

#[test]
fn devices_are_not_mixed() {
    let expected = |first, second| {
        format!(
            "Error::InvalidArgument(\"the buffers are on devices {first} and {second}, not on one\")"
        )
    };
    told(&["copy-between-devices"], &expected(1, 0));
    told(&["quantize-between-devices"], &expected(0, 1));
    let nowhere = "Error::InvalidArgument(\"there is no device 2: there are 2 (from 0)\")";
    told(&["allocate-on", "2"], nowhere);
    told(&["ask-usage-of", "2"], nowhere);
    let nowhere = "Error::InvalidArgument(\"there is no device 4294967295: there are 2 (from 0)\")";
    told(&["allocate-on", "4294967295"], nowhere);
}

#[test]
fn sizes_of_numbers_do_not_overflow() {
    answers(&["dequantize", "64"], "dequantized");
    for elements in [
        "65",
        "9223372036854775808",
        "18446744073709551615",
        "4611686018427387904",
    ] {
        let told = Bench::default().told(hostile(), &["dequantize", elements]);
        assert!(told.starts_with("Error::InvalidArgument"), "{told}");
    }
}

#[test]
fn fragments_are_used_again() {
    // 64 pieces of a 64th, half of them freed: no half in one piece, but all of them again.
    answers(&["fragment"], "64 buffers, true, 4194304");
}

#[test]
fn many_small_buffers_share_chunks() {
    // Each takes 256 bytes: a little more than 2 MiB in chunks of 1, 1 and 2 MiB.
    answers(&["many-small", "8200"], "4194304");
}
