//! Attacks by files and directories: none, too many, the wrong ones, and changing ones.

use std::fs::OpenOptions;
use std::io::Write;

use super::*;

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
    std::os::unix::fs::symlink("/dev/zero", &link).unwrap();
    assert_error!(
        Checkpoint::open(&link).unwrap_err(),
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
        file::read_text(&index, "an index (bytes)", 4, &CancelToken::new()).unwrap_err(),
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
