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
fn files_that_are_something_else_say_what_they_are() {
    let open = |path: &Path| Checkpoint::open(path).unwrap_err();
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d4d\nsize 12345\n";
    for (bytes, kind, words) in [
        (&pointer[..], "git-lfs-pointer", "of a file of 12345 bytes"),
        (
            b"<!doctype html>\n<html><title>Sign in</title>",
            "web-page",
            "download it again",
        ),
        (
            b"PK\x03\x04\0\0\0\0archive/data.pkl",
            "pickle",
            "can run code",
        ),
        (b"\x80\x02}q\0.", "pickle", "can run code"),
        (b"GGUF\x03\0\0\0\0\0", "gguf", "llama.cpp"),
        (
            b"PK\x03\x04\0\0\0\0model.safetensors",
            "archive",
            "unpack it",
        ),
        (b"\x1f\x8b\x08\0\0\0\0\0\0", "archive", "unpack it"),
    ] {
        // Whether it has the name of weights or not.
        for name in ["model.safetensors", "download"] {
            let dir = dir();
            let file = write(&dir, name, bytes);
            let error = open(&file);
            assert!(error.to_string().contains(words), "{error}");
            assert_error!(error, CheckpointError::WrongKind { path, kind: is }
                if *path == file && is.name() == kind);
            if name == "model.safetensors" {
                assert_error!(open(dir.path()), CheckpointError::WrongKind { .. });
            }
        }
    }
    // Small files of a repository that was cloned without Git LFS.
    for name in ["config.json", "model.safetensors.index.json"] {
        let dir = dir();
        write(&dir, name, pointer);
        write(&dir, "a.safetensors", &vectors(&[("a", 1)]));
        assert_error!(open(dir.path()), CheckpointError::WrongKind { path, .. }
            if path.ends_with(name));
    }
    // By their names alone.
    for (name, kind) in [
        ("q4.gguf", "gguf"),
        ("tf_model.h5", "other-framework"),
        ("m.tar.gz", "archive"),
    ] {
        let dir = dir();
        write(&dir, "config.json", b"{}");
        let file = write(&dir, name, b"");
        for path in [dir.path(), &file] {
            assert_error!(open(path), CheckpointError::WrongKind { path, kind: is }
                if path.ends_with(name) && is.name() == kind);
        }
    }
    let dir = dir();
    write(&dir, "training_args.bin", b"");
    assert_error!(open(dir.path()), CheckpointError::NotACheckpoint { .. });
    let pickle = write(&dir, "diffusion_pytorch_model.bin", b"");
    assert_error!(open(dir.path()), CheckpointError::OnlyPickles { .. });
    assert_error!(open(&pickle), CheckpointError::WrongKind { .. });
}

#[test]
fn an_adapter_names_the_model_that_it_is_for() {
    let open = |path: &Path| Checkpoint::open(path).unwrap_err();
    let dir = dir();
    let lora = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    let file = write(&dir, "adapter_model.safetensors", &vectors(&[(lora, 1)]));
    for path in [dir.path(), &file] {
        assert_error!(
            open(path),
            CheckpointError::Adapter {
                kind: None,
                base: None,
                ..
            }
        );
    }
    let config = r#"{"peft_type":"LORA","r":NaN,"base_model_name_or_path":"org/base\u001b[2J"}"#;
    write(&dir, "adapter_config.json", config.as_bytes());
    for path in [dir.path(), &file] {
        let error = open(path);
        let text = error.to_string();
        assert!(
            text.contains("a LORA adapter for 'org/base\\u{1b}[2J'"),
            "{text}"
        );
        assert_error!(error, CheckpointError::Adapter { .. });
    }
    // Other adapters, pickled ones, and what is no configuration of one.
    fs::remove_file(&file).unwrap();
    write(&dir, "adapter_model.bin", b"");
    write(
        &dir,
        "adapter_config.json",
        br#"{"base_model_name_or_path":1}"#,
    );
    assert_error!(
        open(dir.path()),
        CheckpointError::Adapter { base: None, .. }
    );
    // Beside a whole model it is not looked at.
    write(&dir, "model.safetensors", &vectors(&[("a", 1)]));
    assert_eq!(names(&Checkpoint::open(dir.path()).unwrap()), ["a"]);
}

#[test]
fn a_download_that_was_not_ended_says_so() {
    let dir = dir();
    let snapshot = dir.path().join("models--org--part/snapshots/abc");
    let blobs = dir.path().join("models--org--part/blobs");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(&blobs).unwrap();
    fs::write(snapshot.join("config.json"), "{}").unwrap();
    let open = |path: &Path| Checkpoint::open(path).unwrap_err();
    assert_error!(open(&snapshot), CheckpointError::NotACheckpoint { .. });
    fs::write(blobs.join("d4.incomplete"), [0; 100]).unwrap();
    assert_error!(
        open(&snapshot),
        CheckpointError::DownloadNotEnded {
            files: 1,
            bytes: 100,
            ..
        }
    );
    fs::write(blobs.join("d5.part"), [0; 11]).unwrap();
    let index = r#"{"weight_map":{"a":"m-1.safetensors"}}"#;
    fs::write(snapshot.join("model.safetensors.index.json"), index).unwrap();
    assert_error!(
        open(&snapshot),
        CheckpointError::DownloadNotEnded {
            files: 2,
            bytes: 111,
            ..
        }
    );
    fs::write(snapshot.join("m-1.safetensors"), vectors(&[("a", 1)])).unwrap();
    assert_eq!(names(&Checkpoint::open(&snapshot).unwrap()), ["a"]);
    // Into a directory of its own.
    let local = dir.path().join("local");
    fs::create_dir_all(local.join(".cache/huggingface/download")).unwrap();
    fs::write(local.join(".cache/huggingface/download/x.incomplete"), "x").unwrap();
    assert_error!(
        open(&local),
        CheckpointError::DownloadNotEnded {
            files: 1,
            bytes: 1,
            ..
        }
    );
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
fn index_overlay_replaces_what_other_shards_hold() {
    let dir = dir();
    write(
        &dir,
        "base.safetensors",
        &vectors(&[("a", 3), ("b", 2), ("z", 1)]),
    );
    write(&dir, "overlay.safetensors", &vectors(&[("b", 5), ("y", 1)]));
    let index = |b: &str| {
        json!({"weight_map": {"a": "base.safetensors", "b": b, "y": "overlay.safetensors"}})
            .to_string()
    };
    for (shard, length) in [("overlay.safetensors", 5), ("base.safetensors", 2)] {
        write(
            &dir,
            "model.safetensors.index.json",
            index(shard).as_bytes(),
        );
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let found = &checkpoint.tensors()[checkpoint.find("b").unwrap()];
        assert_eq!(found.shape, [length]);
        assert!(checkpoint.shards()[found.shard].path().ends_with(shard));
        assert_eq!(checkpoint.tensors().len(), 4);
        let bytes: u64 = checkpoint
            .tensors()
            .iter()
            .map(TensorInfo::source_bytes)
            .sum();
        assert_eq!(checkpoint.source_bytes(), bytes);
    }
    // Of what the index does not list nobody knows which counts.
    write(
        &dir,
        "overlay.safetensors",
        &vectors(&[("b", 5), ("y", 1), ("z", 1)]),
    );
    assert_error!(
        Checkpoint::open(dir.path()).unwrap_err(),
        CheckpointError::DuplicateTensor { tensor, .. } if tensor == "z"
    );
    // The copy that does not count is still checked.
    let mut cut = vectors(&[("a", 3), ("b", 2)]);
    cut.pop();
    write(&dir, "base.safetensors", &cut);
    assert_error!(
        Checkpoint::open(dir.path()).unwrap_err(),
        CheckpointError::Truncated { .. }
    );
}

#[test]
fn index_beside_a_whole_file_is_not_looked_at() {
    let dir = dir();
    write(&dir, "model.safetensors", &vectors(&[("a", 1), ("c", 1)]));
    for (index, gone) in [
        (
            r#"{"weight_map":{"a":"model-00001-of-00002.safetensors"}}"#,
            Some("model-00001-of-00002.safetensors"),
        ),
        ("no index at all", None),
    ] {
        write(&dir, "model.safetensors.index.json", index.as_bytes());
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(names(&checkpoint), ["a", "c"]);
        let [Remark::IndexIgnored { missing, .. }] = checkpoint.remarks() else {
            panic!("{:?}", checkpoint.remarks());
        };
        assert_eq!(missing.as_deref(), gone);
    }
    // Unless it is one of those that the index names.
    write(&dir, "more.safetensors", &vectors(&[("b", 1)]));
    let index = r#"{"weight_map":{"a":"model.safetensors","b":"more.safetensors"}}"#;
    write(&dir, "model.safetensors.index.json", index.as_bytes());
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(names(&checkpoint), ["a", "c", "b"]);
    assert_eq!(checkpoint.remarks(), []);
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
    // The open file is still the one that was checked, or the system has taken it for the other.
    match checkpoint.read_tensor(0, 0, &mut bytes) {
        Err(CheckpointError::Changed { .. }) if cfg!(windows) => {}
        read => {
            read.unwrap();
            assert_eq!(bytes, [0, 1, 2, 3]);
        }
    }
}
