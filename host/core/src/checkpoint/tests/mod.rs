//! What well-formed checkpoints look like once they are open; and what the tests of attacks share.

use std::fs;
use std::path::PathBuf;

use serde_json::json;
use tempfile::TempDir;

use super::*;

macro_rules! assert_error {
    ($error:expr, $pattern:pat $(if $guard:expr)?) => {
        let error = $error;
        assert!(matches!(&error, $pattern $(if $guard)?), "{error:?}");
    };
}

mod chance;
mod chosen;
mod encoded;
mod files;
mod headers;
#[cfg(unix)]
mod links;
mod quantized;
mod stops;

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
fn every_type_that_the_format_has_is_read() {
    let dir = dir();
    for dtype in DType::ALL {
        let name = dtype.safetensors_name();
        let header = format!(
            r#"{{"a":{{"dtype":"{name}","shape":[8],"data_offsets":[0,{}]}}}}"#,
            dtype.bits()
        );
        let bytes = file(&header, dtype.bits() as usize);
        // The format's own reader has it too.
        safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let path = write(&dir, "x.safetensors", &bytes);
        assert_eq!(Checkpoint::open(&path).unwrap().tensors()[0].dtype, dtype);
    }
    for name in ["F8_E4M3FNUZ", "F8_E5M2FNUZ"] {
        let dtype = DType::from_safetensors_name(name).unwrap();
        assert!(!dtype.is_quantizable());
    }
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
        let mut bytes = file(header, 0);
        bytes.extend((0..data).map(|i: u8| i % 8));
        write(&dir, "model.safetensors", &bytes);
        write(&dir, "config.json", config.as_bytes());
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.untied(), []);
        checkpoint.ties().to_vec()
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

/// A table of this many rows of 512 bytes and a head, tied by config.json; the head is the table but for
/// one byte.
fn tied(rows: u64, other: Option<u64>) -> TempDir {
    let dir = dir();
    let table = 512 * rows;
    let entry = |begin: u64, end: u64| json!({"dtype": "BF16", "shape": [rows, 256], "data_offsets": [begin, end]});
    let header = json!({
        "model.embed_tokens.weight": entry(0, table),
        "lm_head.weight": entry(table, 2 * table),
    });
    let mut bytes = file(&header.to_string(), 0);
    let values = (0..2 * table).map(|i| ((i % table) * 7 / 3) as u8);
    let data = bytes.len();
    bytes.extend(values);
    if let Some(other) = other {
        bytes[data + (table + other) as usize] ^= 1;
    }
    write(&dir, "model.safetensors", &bytes);
    let config = r#"{"architectures":["Qwen2ForCausalLM"],"tie_word_embeddings":true}"#;
    write(&dir, "config.json", config.as_bytes());
    dir
}

#[test]
fn a_head_with_other_values_than_the_table_is_not_tied() {
    for rows in [1, 100, 5000] {
        let dir = tied(rows, None);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!((checkpoint.ties().len(), checkpoint.untied().len()), (1, 0));
        // One byte anywhere tells, also where pieces end.
        let bytes = 512 * rows;
        for other in [0, bytes / 2, (1 << 20) - 1, 1 << 20, bytes - 1] {
            let dir = tied(rows, Some(other.min(bytes - 1)));
            let checkpoint = Checkpoint::open(dir.path()).unwrap();
            assert!(checkpoint.ties().is_empty(), "{rows} {other}");
            assert_eq!(checkpoint.untied()[0].alias, "lm_head.weight");
        }
    }
}

#[test]
fn comparing_a_head_with_the_table_can_be_stopped() {
    let few = stops::stops_everywhere(tied(100, None).path());
    let many = stops::stops_everywhere(tied(6000, None).path());
    // Three mebibytes in pieces of one.
    assert!(many >= few + 3, "{few} {many}");
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

#[test]
fn a_checkpoint_is_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Checkpoint>();
    shared::<CheckpointError>();
}
