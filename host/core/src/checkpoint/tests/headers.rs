//! Attacks by the header of a file.

use super::*;

#[test]
fn header_missing() {
    assert_error!(refused(b""), CheckpointError::NoHeader { have: 0, .. });
    assert_error!(
        refused(b"1234567"),
        CheckpointError::NoHeader { have: 7, .. }
    );
}

#[test]
fn header_of_100_gb() {
    let mut bytes = 100_000_000_000u64.to_le_bytes().to_vec();
    bytes.extend_from_slice(b"{}");
    assert_error!(
        refused(&bytes),
        CheckpointError::TooLarge {
            have: 100_000_000_000,
            limit: MAX_HEADER_BYTES,
            ..
        }
    );
    bytes[..8].fill(0xff);
    assert_error!(
        refused(&bytes),
        CheckpointError::TooLarge { have: u64::MAX, .. }
    );
}

#[test]
fn header_longer_than_file() {
    let mut bytes = 99_999_999u64.to_le_bytes().to_vec();
    bytes.extend_from_slice(b"{}");
    assert_error!(
        refused(&bytes),
        CheckpointError::HeaderPastEnd {
            need: 100_000_007,
            have: 10,
            ..
        }
    );
}

#[test]
fn header_not_utf8() {
    let mut bytes = file(r#"{"a":1}"#, 0);
    bytes[10] = 0xff;
    assert_error!(refused(&bytes), CheckpointError::NotUtf8 { .. });
}

#[test]
fn header_not_an_object() {
    for header in ["", "[]", " {}", "null"] {
        assert_error!(
            refused(&file(header, 0)),
            CheckpointError::NotAnObject { .. }
        );
    }
}

#[test]
fn header_not_json_of_the_right_form() {
    for header in [
        "{",
        "{} {}",
        r#"{"a":1}"#,
        r#"{"a":{}}"#,
        r#"{"a":{"dtype":"U8","shape":[1]}}"#,
        r#"{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}"#,
        r#"{"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}"#,
        r#"{"a":{"dtype":"U8","shape":[99999999999999999999],"data_offsets":[0,1]}}"#,
        r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}}"#,
        r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,2]}}"#,
        r#"{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#,
        r#"{"a":{"dtype":["U8"],"shape":[1],"data_offsets":[0,1]}}"#,
        r#"{"__metadata__":{"a":1}}"#,
        r#"{"__metadata__":[]}"#,
        r#"{"__metadata__":"x"}"#,
        r#"{"__metadata__":{},"__metadata__":{}}"#,
    ] {
        assert_error!(refused(&file(header, 1)), CheckpointError::Json { .. });
    }
}

#[test]
fn header_with_a_flood_of_metadata() {
    let entries = |n: usize| {
        let entries: Vec<String> = (0..n).map(|i| format!("\"{i}\":\"\"")).collect();
        file(
            &format!("{{\"__metadata__\":{{{}}}}}", entries.join(",")),
            0,
        )
    };
    assert_error!(
        refused(&entries(MAX_METADATA + 1)),
        CheckpointError::TooLarge { limit, .. } if *limit == MAX_METADATA as u64
    );
    let dir = dir();
    write(&dir, "model.safetensors", &entries(MAX_METADATA));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.metadata().len(), MAX_METADATA);
    write(
        &dir,
        "model.safetensors",
        &file(r#"{"__metadata__":null}"#, 0),
    );
    assert!(Checkpoint::open(dir.path()).unwrap().metadata().is_empty());
}

#[test]
fn header_nested_deeply() {
    let n = 1_000_000;
    let deep = format!("{}{}", "[".repeat(n), "]".repeat(n));
    for header in [
        format!(r#"{{"a":{deep}}}"#),
        format!(r#"{{"__metadata__":{deep}}}"#),
        format!(r#"{{"a":{{"shape":{deep}}}}}"#),
        format!(r#"{{"a":{{"other":{deep}}}}}"#),
    ] {
        assert_error!(refused(&file(&header, 0)), CheckpointError::Json { .. });
    }
}

/// A header of one tensor `a`.
fn one(dtype: &str, shape: &str, begin: u64, end: u64) -> String {
    format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}}}"#)
}

#[test]
fn tensor_of_unknown_type() {
    assert_error!(
        refused(&file(&one("F8_E9M9", "[1]", 0, 1), 1)),
        CheckpointError::UnknownDType { tensor, dtype, .. } if tensor == "a" && dtype == "F8_E9M9"
    );
    assert_error!(
        refused(&file(&one(&"x".repeat(100_000), "[1]", 0, 1), 1)),
        CheckpointError::UnknownDType { dtype, .. } if dtype.len() == 200
    );
}

#[test]
fn tensor_whose_size_overflows() {
    for (dtype, shape) in [
        ("F32", "[4294967296,4294967296]"),
        ("F64", "[4611686018427387904]"),
        ("F4", "[3]"),
    ] {
        assert_error!(
            refused(&file(&one(dtype, shape, 0, 4), 4)),
            CheckpointError::ShapeOverflow { .. }
        );
    }
}

#[test]
fn tensor_whose_size_is_not_that_of_its_offsets() {
    assert_error!(
        refused(&file(&one("F32", "[2,2]", 0, 8), 8)),
        CheckpointError::SizeMismatch {
            need: 16,
            have: 8,
            ..
        }
    );
}

#[test]
fn tensor_that_ends_before_it_begins() {
    assert_error!(
        refused(&file(&one("U8", "[1]", 2, 1), 2)),
        CheckpointError::ReversedOffsets {
            begin: 2,
            end: 1,
            ..
        }
    );
}

#[test]
fn tensor_at_the_end_of_the_address_space() {
    let end = u64::MAX;
    assert_error!(
        refused(&file(&one("U8", "[1]", end - 1, end), 1)),
        CheckpointError::Gap { .. }
    );
    assert_error!(
        refused(&file(&one("U8", &format!("[{end}]"), 0, end), 1)),
        CheckpointError::ShapeOverflow { .. }
    );
    let end = 1u64 << 60;
    assert_error!(
        refused(&file(&one("U8", &format!("[{end}]"), 0, end), 1)),
        CheckpointError::Truncated { need, .. } if *need > end
    );
}

#[test]
fn tensor_with_too_many_dimensions() {
    let shape = format!("[{}]", vec!["0"; 1_000_000].join(","));
    assert_error!(
        refused(&file(&one("U8", &shape, 0, 0), 0)),
        CheckpointError::TooManyDimensions {
            limit: MAX_DIMENSIONS,
            ..
        }
    );
}

#[test]
fn tensor_names_that_are_none() {
    let long = "x".repeat(MAX_NAME_BYTES + 1);
    for name in ["", "a\\u001b[2J", "a\\nb", &long] {
        let header = one("U8", "[1]", 0, 1).replace("\"a\"", &format!("\"{name}\""));
        assert_error!(
            refused(&file(&header, 1)),
            CheckpointError::BadTensorName { tensor, .. } if tensor.len() <= 200
        );
    }
}

/// A header of U8 tensors `t0`, `t1`, .. with these offsets.
pub(super) fn bytes_at(offsets: &[(u64, u64)]) -> String {
    let entries: Vec<String> = offsets
        .iter()
        .enumerate()
        .map(|(i, (begin, end))| {
            let shape = end - begin;
            format!(r#""t{i}":{{"dtype":"U8","shape":[{shape}],"data_offsets":[{begin},{end}]}}"#)
        })
        .collect();
    format!("{{{}}}", entries.join(","))
}

#[test]
fn tensors_that_overlap() {
    for offsets in [
        &[(0, 4), (2, 6)][..],
        &[(0, 4), (0, 4), (4, 6)],
        &[(0, 6), (2, 4)],
        &[(2, 6), (0, 3)],
        &[(0, 6), (3, 3)],
    ] {
        let bytes = file(&bytes_at(offsets), 6);
        assert_error!(refused(&bytes), CheckpointError::Overlap { .. });
        assert!(safetensors::SafeTensors::deserialize(&bytes).is_err());
    }
}

#[test]
fn tensors_with_gaps() {
    for offsets in [&[(1, 6)][..], &[(0, 2), (3, 6)]] {
        let bytes = file(&bytes_at(offsets), 6);
        assert_error!(refused(&bytes), CheckpointError::Gap { bytes: 1, .. });
        assert!(safetensors::SafeTensors::deserialize(&bytes).is_err());
    }
}

#[test]
fn file_cut_short() {
    let bytes = vectors(&[("a", 4), ("b", 4)]);
    let length = bytes.len() as u64;
    assert_error!(
        refused(&bytes[..bytes.len() - 9]),
        CheckpointError::Truncated { tensor, need, have, .. }
            if tensor == "a" && *need == length && *have == length - 9
    );
    assert_error!(
        refused(&bytes[..bytes.len() - 1]),
        CheckpointError::Truncated { tensor, .. } if tensor == "b"
    );
    assert_error!(refused(&bytes[..20]), CheckpointError::HeaderPastEnd { .. });
}

#[test]
fn file_with_trailing_bytes() {
    let mut bytes = vectors(&[("a", 4)]);
    let length = bytes.len() as u64;
    bytes.push(0);
    assert_error!(
        refused(&bytes),
        CheckpointError::TrailingBytes { need, have, .. } if *need == length && *have == length + 1
    );
}

#[test]
fn tensor_named_twice_in_one_file() {
    // The safetensors crate keeps the last one and accepts the file. The names may also be
    // spelled differently.
    let header = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
        "\u0061":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#;
    assert!(safetensors::SafeTensors::deserialize(&file(header, 2)).is_ok());
    assert_error!(
        refused(&file(header, 2)),
        CheckpointError::DuplicateTensor { tensor, first, second }
            if tensor == "a" && first == second
    );
}

#[test]
fn tensor_named_twice_in_two_files() {
    let dir = dir();
    write(&dir, "m-00001-of-00002.safetensors", &vectors(&[("a", 1)]));
    write(
        &dir,
        "m-00002-of-00002.safetensors",
        &vectors(&[("b", 1), ("a", 1)]),
    );
    assert_error!(
        Checkpoint::open(dir.path()).unwrap_err(),
        CheckpointError::DuplicateTensor { tensor, first, second }
            if tensor == "a" && first != second
    );
}
