//! One test per attack, and what well-formed checkpoints look like once they are open.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;

use super::*;

fn dir() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// A file with this header text and this many bytes of data, `0, 1, 2, ..`.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend((0..data).map(|i| i as u8));
    bytes
}

/// A well-formed file of bf16 vectors with these names and lengths in elements.
fn vectors(tensors: &[(&str, usize)]) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut end = 0;
    for (name, elements) in tensors {
        let begin = end;
        end += 2 * elements;
        let entry = json!({"dtype": "BF16", "shape": [elements], "data_offsets": [begin, end]});
        entries.push(format!("{}:{entry}", json!(name)));
    }
    file(&format!("{{{}}}", entries.join(",")), end)
}

fn write(dir: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join(name);
    fs::write(&path, bytes).unwrap();
    path
}

/// The error of opening a single file with these bytes.
fn refused(bytes: &[u8]) -> CheckpointError {
    let dir = dir();
    let path = write(&dir, "model.safetensors", bytes);
    let error = Checkpoint::open(&path).unwrap_err();
    // Every message names the file.
    assert!(error.to_string().contains("model.safetensors"), "{error}");
    error
}

fn names(checkpoint: &Checkpoint) -> Vec<&str> {
    let tensors = checkpoint.tensors().iter();
    tensors.map(|tensor| tensor.name.as_str()).collect()
}

macro_rules! assert_error {
    ($error:expr, $pattern:pat $(if $guard:expr)?) => {
        let error = $error;
        assert!(matches!(&error, $pattern $(if $guard)?), "{error:?}");
    };
}

// Well-formed checkpoints

#[test]
fn a_single_file_is_read_in_order_of_offset() {
    let dir = dir();
    let header = r#"{"__metadata__":{"format":"pt"},
        "b":{"dtype":"F32","shape":[],"data_offsets":[6,10]},
        "a":{"data_offsets":[0,6],"shape":[3,1],"dtype":"BF16","new":[{"x":1}]},
        "empty":{"dtype":"F32","shape":[0,9],"data_offsets":[6,6]}}  "#;
    let path = write(&dir, "x.safetensors", &file(header, 10));
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(names(&checkpoint), ["a", "empty", "b"]);
    assert_eq!(checkpoint.metadata()["format"], "pt");
    assert_eq!(checkpoint.source_bytes(), 10);
    assert_eq!(checkpoint.find("b"), Some(2));
    assert_eq!(checkpoint.find("c"), None);
    let a = &checkpoint.tensors()[0];
    assert_eq!((a.dtype, a.shape.as_slice()), (DType::Bf16, &[3, 1][..]));
    assert_eq!((a.bytes, a.offset), (6, 8 + header.len() as u64));
    let mut bytes = [0; 4];
    checkpoint.read_tensor(2, 0, &mut bytes).unwrap();
    assert_eq!(bytes, [6, 7, 8, 9]);
    checkpoint.read_tensor(0, 2, &mut bytes).unwrap();
    assert_eq!(bytes, [2, 3, 4, 5]);
    assert_error!(
        checkpoint.read_tensor(0, 3, &mut bytes).unwrap_err(),
        CheckpointError::OutsideTensor {
            end: 7,
            have: 6,
            ..
        }
    );
    assert_error!(
        checkpoint.read_tensor(0, u64::MAX, &mut bytes).unwrap_err(),
        CheckpointError::OutsideTensor { .. }
    );
}

#[test]
fn an_index_leads_to_shards_and_to_what_it_does_not_list() {
    let dir = dir();
    write(&dir, "s1.safetensors", &vectors(&[("b", 2), ("c", 1)]));
    write(
        &dir,
        "s2.safetensors",
        &vectors(&[("a", 3), ("unlisted", 1)]),
    );
    write(&dir, "stray.safetensors", &vectors(&[("stray", 3)]));
    let index = r#"{"metadata":{"total_size":14},
        "weight_map":{"a":"s2.safetensors","b":"s1.safetensors","c":"s1.safetensors"}}"#;
    let index = write(&dir, "model.safetensors.index.json", index.as_bytes());
    for path in [dir.path(), &index] {
        let checkpoint = Checkpoint::open(path).unwrap();
        assert_eq!(names(&checkpoint), ["b", "c", "a", "unlisted"]);
        assert_eq!(checkpoint.shards().len(), 2);
        assert_eq!(checkpoint.tensors()[2].shard, 1);
        assert!(checkpoint.config().is_none());
    }
}

#[test]
fn a_directory_without_an_index_is_a_file_or_a_complete_set() {
    let dir = dir();
    write(&dir, "other.safetensors", &vectors(&[("only", 1)]));
    assert_eq!(names(&Checkpoint::open(dir.path()).unwrap()), ["only"]);
    for (i, name) in ["x", "y"].into_iter().enumerate() {
        let file = format!("m-{:05}-of-00002.safetensors", i + 1);
        write(&dir, &file, &vectors(&[(name, 1)]));
    }
    assert_eq!(names(&Checkpoint::open(dir.path()).unwrap()), ["x", "y"]);
    write(&dir, "model.safetensors", &vectors(&[("m", 1)]));
    assert_eq!(names(&Checkpoint::open(dir.path()).unwrap()), ["m"]);
}

#[test]
fn ties_are_found_with_the_head_stored_and_without() {
    let dir = dir();
    let matrix = |name: &str, at: usize| {
        let entry = json!({"dtype": "BF16", "shape": [2, 2], "data_offsets": [at, at + 8]});
        format!("\"{name}\":{entry}")
    };
    let embedding = matrix("model.embed_tokens.weight", 0);
    let head = matrix("lm_head.weight", 8);
    let open = |header: &str, data, config: &str| {
        write(&dir, "model.safetensors", &file(header, data));
        write(&dir, "config.json", config.as_bytes());
        Checkpoint::open(dir.path()).unwrap().ties().to_vec()
    };
    let tied = r#"{"architectures":["Qwen2ForCausalLM"],"tie_word_embeddings":true}"#;
    let both = format!("{{{embedding},{head}}}");
    let mut tie = Tie {
        tensor: 0,
        alias: "lm_head.weight".into(),
        alias_tensor: None,
    };
    let alone = format!("{{{embedding}}}");
    assert_eq!(open(&alone, 8, tied), [tie.clone()]);
    tie.alias_tensor = Some(1);
    assert_eq!(open(&both, 16, tied), [tie]);
    assert_eq!(open(&both, 16, &tied.replace("true", "false")), []);
}

#[cfg(unix)]
#[test]
fn a_snapshot_of_the_cache_is_links_to_blobs() {
    use std::os::unix::fs::symlink;
    let cache = dir();
    let entry = cache.path().join("models--org--name");
    let snapshot = entry.join("snapshots").join("abc");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(entry.join("blobs")).unwrap();
    fs::create_dir_all(entry.join("refs")).unwrap();
    fs::write(entry.join("refs").join("main"), "abc").unwrap();
    fs::write(entry.join("blobs").join("1"), vectors(&[("a", 1)])).unwrap();
    fs::write(entry.join("blobs").join("2"), r#"{"model_type":"qwen2"}"#).unwrap();
    symlink("../../blobs/1", snapshot.join("model.safetensors")).unwrap();
    symlink("../../blobs/2", snapshot.join("config.json")).unwrap();
    let environment = CacheEnvironment {
        hf_hub_cache: Some(cache.path().into()),
        ..CacheEnvironment::default()
    };
    let path = resolve_with("org/name", &environment).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(names(&checkpoint), ["a"]);
    let config = checkpoint.config().unwrap();
    assert_eq!(config.model_type.as_deref(), Some("qwen2"));
    // A blob that was deleted to save space.
    fs::remove_file(entry.join("blobs").join("1")).unwrap();
    assert!(Checkpoint::open(&path).is_err());
}

#[test]
fn hundreds_of_shards_do_not_use_up_descriptors() {
    let dir = dir();
    let count = MAX_OPEN_SHARDS + 3;
    for i in 1..=count {
        let file = format!("m-{i:05}-of-{count:05}.safetensors");
        write(&dir, &file, &vectors(&[(&format!("t{i}"), 2)]));
    }
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let mut bytes = [9; 4];
    for tensor in 0..count {
        checkpoint.read_tensor(tensor, 0, &mut bytes).unwrap();
        assert_eq!(bytes, [0, 1, 2, 3]);
    }
    // A file that was not kept open is checked when it is opened again.
    let path = checkpoint.shards()[count - 1].path().to_path_buf();
    fs::remove_file(&path).unwrap();
    assert_error!(
        checkpoint
            .read_tensor(count - 1, 0, &mut bytes)
            .unwrap_err(),
        CheckpointError::Io { .. }
    );
    fs::write(&path, vectors(&[("other", 3)])).unwrap();
    assert_error!(
        checkpoint
            .read_tensor(count - 1, 0, &mut bytes)
            .unwrap_err(),
        CheckpointError::Changed { .. }
    );
}

// Directories that are none

#[test]
fn what_is_no_checkpoint_says_why() {
    let open = |path: &Path| Checkpoint::open(path).unwrap_err();
    let dir = dir();
    assert_error!(
        open(&dir.path().join("nothing")),
        CheckpointError::NotFound { .. }
    );
    assert_error!(open(dir.path()), CheckpointError::EmptyDirectory { .. });
    let text = write(&dir, "notes.txt", b"hello");
    assert_error!(open(dir.path()), CheckpointError::NotACheckpoint { .. });
    assert_error!(open(&text), CheckpointError::NotACheckpoint { .. });
    write(&dir, "pytorch_model-00001-of-00002.bin", b"");
    assert_error!(open(dir.path()), CheckpointError::OnlyPickles { .. });
    write(&dir, "a.safetensors", &vectors(&[("a", 1)]));
    write(&dir, "b.safetensors", &vectors(&[("b", 1)]));
    assert_error!(open(dir.path()), CheckpointError::Ambiguous { .. });
    fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    assert_error!(open(dir.path()), CheckpointError::NotAFile { .. });
}

#[test]
fn sets_without_an_index_must_be_complete_and_alone() {
    let dir = dir();
    write(&dir, "m-00003-of-00003.safetensors", &vectors(&[("c", 1)]));
    write(&dir, "m-00001-of-00003.safetensors", &vectors(&[("a", 1)]));
    assert_error!(
        Checkpoint::open(dir.path()).unwrap_err(),
        CheckpointError::IncompleteSet { missing, need: 3, have: 2, .. }
            if missing == "m-00002-of-00003.safetensors"
    );
    write(&dir, "m-00002-of-00003.safetensors", &vectors(&[("b", 1)]));
    assert_eq!(
        names(&Checkpoint::open(dir.path()).unwrap()),
        ["a", "b", "c"]
    );
    write(&dir, "m-2-of-00003.safetensors", &vectors(&[("b", 1)]));
    assert_error!(
        Checkpoint::open(dir.path()).unwrap_err(),
        CheckpointError::Ambiguous { .. }
    );
    fs::remove_file(dir.path().join("m-2-of-00003.safetensors")).unwrap();
    write(&dir, "n-00001-of-00001.safetensors", &vectors(&[("n", 1)]));
    assert_error!(
        Checkpoint::open(dir.path()).unwrap_err(),
        CheckpointError::Ambiguous { .. }
    );
}

#[cfg(unix)]
#[test]
fn a_device_is_no_file_to_read_from() {
    let dir = dir();
    let link = dir.path().join("model.safetensors");
    std::os::unix::fs::symlink("/dev/zero", link).unwrap();
    assert_error!(
        Checkpoint::open(dir.path()).unwrap_err(),
        CheckpointError::NotAFile { .. }
    );
}

// Indexes

fn with_index(index: &str) -> CheckpointError {
    let dir = dir();
    write(&dir, "x.safetensors", &vectors(&[("a", 1)]));
    write(&dir, "y.safetensors", &vectors(&[("b", 1)]));
    write(&dir, "model.safetensors.index.json", index.as_bytes());
    Checkpoint::open(dir.path()).unwrap_err()
}

#[test]
fn index_missing_shard() {
    assert_error!(
        with_index(r#"{"weight_map":{"a":"x.safetensors","z":"gone.safetensors"}}"#),
        CheckpointError::MissingShard { tensor, path }
            if tensor == "z" && path.ends_with("gone.safetensors")
    );
}

#[test]
fn index_path_traversal() {
    assert_error!(
        with_index(r#"{"weight_map":{"a":"../../etc/passwd"}}"#),
        CheckpointError::UnsafeShardName { tensor, shard, .. }
            if tensor == "a" && shard == "../../etc/passwd"
    );
}

#[test]
fn index_absolute_path() {
    assert_error!(
        with_index(r#"{"weight_map":{"a":"/etc/passwd"}}"#),
        CheckpointError::UnsafeShardName { .. }
    );
}

#[test]
fn index_tensor_in_another_shard_or_in_none() {
    for name in ["b", "none"] {
        let index = json!({"weight_map": {"a": "x.safetensors", "y": "y.safetensors"}});
        let index = index.to_string().replace("\"y\"", &format!("\"{name}\""));
        let index = index.replace("y.safetensors", "x.safetensors");
        assert_error!(
            with_index(&index),
            CheckpointError::NotInShard { tensor, .. } if tensor == name
        );
    }
}

#[test]
fn index_not_utf8_or_too_large() {
    let dir = dir();
    write(&dir, "x.safetensors", &vectors(&[("a", 1)]));
    let index = write(&dir, "model.safetensors.index.json", b"{\"\xff\":1}");
    assert_error!(
        Checkpoint::open(dir.path()).unwrap_err(),
        CheckpointError::NotUtf8 { .. }
    );
    // The limit itself is met through the reader, so that the test needs no 256 MB.
    assert_error!(
        file::read_text(&index, "an index (bytes)", 4).unwrap_err(),
        CheckpointError::TooLarge {
            have: 7,
            limit: 4,
            ..
        }
    );
}

// config.json

#[test]
fn broken_configuration() {
    let dir = dir();
    write(&dir, "model.safetensors", &vectors(&[("a", 1)]));
    write(&dir, "config.json", b"{\"model_type\": ");
    assert_error!(
        Checkpoint::open(dir.path()).unwrap_err(),
        CheckpointError::Json { path, .. } if path.ends_with("config.json")
    );
    write(&dir, "config.json", b"[1]");
    assert_error!(
        Checkpoint::open(dir.path()).unwrap_err(),
        CheckpointError::NotAnObject { .. }
    );
    write(
        &dir,
        "config.json",
        &vec![b' '; MAX_CONFIG_BYTES as usize + 1],
    );
    assert_error!(
        Checkpoint::open(dir.path()).unwrap_err(),
        CheckpointError::TooLarge { .. }
    );
}

// Headers

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
        r#"{"__metadata__":{},"__metadata__":{}}"#,
    ] {
        assert_error!(refused(&file(header, 1)), CheckpointError::Json { .. });
    }
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
fn bytes_at(offsets: &[(u64, u64)]) -> String {
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

// Files that change after they were opened

#[test]
fn file_cut_short_after_it_was_opened() {
    let dir = dir();
    let path = write(&dir, "model.safetensors", &vectors(&[("a", 4), ("b", 4)]));
    let checkpoint = Checkpoint::open(&path).unwrap();
    let b = checkpoint.tensors()[1].clone();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(b.offset + 2).unwrap();
    let mut bytes = [0; 6];
    assert_error!(
        checkpoint.read_tensor(1, 1, &mut bytes).unwrap_err(),
        CheckpointError::CutShort { tensor, start, end, have, .. }
            if tensor == "b" && *start == b.offset + 1 && *end == b.offset + 7
                && *have == b.offset + 2
    );
    // What is still there may not be what was there.
    assert_error!(
        checkpoint.read_tensor(0, 0, &mut bytes).unwrap_err(),
        CheckpointError::Changed { .. }
    );
}

#[test]
fn file_written_to_after_it_was_opened() {
    let dir = dir();
    let path = write(&dir, "model.safetensors", &vectors(&[("a", 4)]));
    let checkpoint = Checkpoint::open(&path).unwrap();
    // The clock of the file system may be coarse.
    let before = fs::metadata(&path).unwrap().modified().unwrap();
    loop {
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"x").unwrap();
        file.set_len(checkpoint.shards()[0].length()).unwrap();
        if file.metadata().unwrap().modified().unwrap() != before {
            break;
        }
    }
    assert_error!(
        checkpoint.read_tensor(0, 0, &mut [0; 8]).unwrap_err(),
        CheckpointError::Changed { .. }
    );
}

#[test]
fn file_replaced_after_it_was_opened() {
    let dir = dir();
    let path = write(&dir, "model.safetensors", &vectors(&[("a", 2)]));
    let checkpoint = Checkpoint::open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let mut other = vectors(&[("a", 2)]);
    let length = other.len();
    other[length - 4..].fill(0xff);
    fs::write(&path, other).unwrap();
    let mut bytes = [9; 4];
    // The open file is still the one that was checked.
    checkpoint.read_tensor(0, 0, &mut bytes).unwrap();
    assert_eq!(bytes, [0, 1, 2, 3]);
}

// Size and speed

#[test]
fn two_hundred_thousand_tensors() {
    let names: Vec<String> = (0..200_000)
        .map(|i| {
            format!(
                "model.layers.{}.mlp.experts.{}.up_proj.weight",
                i / 512,
                i % 512
            )
        })
        .collect();
    let tensors: Vec<(&str, usize)> = names.iter().map(|name| (name.as_str(), 1)).collect();
    let dir = dir();
    let path = write(&dir, "model.safetensors", &vectors(&tensors));
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.tensors().len(), 200_000);
    assert_eq!(checkpoint.find(&names[123_456]), Some(123_456));
}

// Against the safetensors crate, and against chance

/// The invariant that the rest of the library builds on.
fn assert_sound(checkpoint: &Checkpoint) {
    let mut end = 0;
    let mut shard = usize::MAX;
    for (i, tensor) in checkpoint.tensors().iter().enumerate() {
        assert_eq!(tensor.dtype.tensor_bytes(&tensor.shape), Some(tensor.bytes));
        if tensor.shard != shard {
            (shard, end) = (tensor.shard, 0);
        }
        assert!(tensor.offset >= end);
        end = tensor.range().end;
        assert!(end <= checkpoint.shards()[shard].length());
        assert_eq!(checkpoint.find(&tensor.name), Some(i));
        let mut bytes = vec![0; tensor.bytes as usize];
        checkpoint.read_tensor(i, 0, &mut bytes).unwrap();
    }
    let bytes: u64 = checkpoint.tensors().iter().map(|tensor| tensor.bytes).sum();
    assert_eq!(bytes, checkpoint.source_bytes());
}

fn open_bytes(bytes: &[u8]) -> Result<Checkpoint, CheckpointError> {
    let dir = dir();
    // On Windows the open file keeps the directory from being removed, which is ignored there.
    Checkpoint::open(&write(&dir, "model.safetensors", bytes))
}

#[derive(Debug, Clone)]
struct Tensor {
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

fn tensor() -> impl Strategy<Value = Tensor> {
    use safetensors::Dtype as D;
    let dtypes = [
        D::BOOL,
        D::F4,
        D::U8,
        D::I16,
        D::F16,
        D::BF16,
        D::F32,
        D::C64,
        D::F8_E4M3,
        D::I64,
    ];
    let shape = prop::collection::vec(0usize..5, 0..4);
    (prop::sample::select(dtypes.to_vec()), shape).prop_map(|(dtype, mut shape)| {
        shape.push(2); // so that 4-bit elements fill bytes
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        let data = (0..bytes).map(|i| (i * 7) as u8).collect();
        Tensor { dtype, shape, data }
    })
}

fn serialized() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::btree_map("[a-z.\"é]{1,12}", tensor(), 0..8).prop_map(|tensors| {
        let views = tensors.iter().map(|(name, t)| {
            let view = safetensors::tensor::TensorView::new(t.dtype, t.shape.clone(), &t.data);
            (name, view.unwrap())
        });
        safetensors::serialize(views, None).unwrap()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn files_of_the_safetensors_crate_are_read_equal(bytes in serialized()) {
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let ours = open_bytes(&bytes).unwrap();
        assert_sound(&ours);
        prop_assert_eq!(ours.tensors().len(), theirs.len());
        for (i, info) in ours.tensors().iter().enumerate() {
            let view = theirs.tensor(&info.name).unwrap();
            let shape: Vec<u64> = view.shape().iter().map(|&n| n as u64).collect();
            prop_assert_eq!(&info.shape, &shape);
            prop_assert_eq!(info.dtype.safetensors_name(), view.dtype().to_string());
            let mut data = vec![0; info.bytes as usize];
            ours.read_tensor(i, 0, &mut data).unwrap();
            prop_assert_eq!(&data[..], view.data());
        }
    }

    #[test]
    fn damaged_files_never_panic_and_what_is_accepted_is_sound(
        mut bytes in serialized(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..3), 1..6),
    ) {
        for (index, byte, kind) in damage {
            let at = index.index(bytes.len());
            match kind {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                _ => { bytes.remove(at); }
            }
        }
        if let Ok(checkpoint) = open_bytes(&bytes) {
            assert_sound(&checkpoint);
            // We accept nothing that the reference implementation refuses.
            prop_assert!(safetensors::SafeTensors::deserialize(&bytes).is_ok());
        }
    }

    #[test]
    fn headers_with_other_digits_never_panic_and_what_is_accepted_is_sound(
        bytes in serialized(),
        digits in prop::collection::vec((any::<prop::sample::Index>(), b'0'..=b'9'), 1..4),
    ) {
        let mut bytes = bytes;
        let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let at: Vec<usize> = (8..end).filter(|&i| bytes[i].is_ascii_digit()).collect();
        for (index, digit) in digits {
            if !at.is_empty() {
                bytes[at[index.index(at.len())]] = digit;
            }
        }
        if let Ok(checkpoint) = open_bytes(&bytes) {
            assert_sound(&checkpoint);
            prop_assert!(safetensors::SafeTensors::deserialize(&bytes).is_ok());
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), json in ".*") {
        let _ = open_bytes(&bytes);
        let _ = open_bytes(&file(&format!("{{{json}}}"), 0));
        let _ = index::parse(Path::new("i"), &json);
        let _ = Config::parse(Path::new("c"), json);
    }

    #[test]
    fn random_offsets_are_accepted_exactly_when_they_tile(
        offsets in prop::collection::vec((0u64..6, 0u64..4), 0..4),
        data in 0usize..8,
    ) {
        let offsets: Vec<(u64, u64)> = offsets.iter().map(|(b, n)| (*b, b + n)).collect();
        let bytes = file(&bytes_at(&offsets), data);
        let theirs = safetensors::SafeTensors::deserialize(&bytes);
        prop_assert_eq!(open_bytes(&bytes).is_ok(), theirs.is_ok());
    }
}
