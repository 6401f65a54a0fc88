//! Attacks on whoever saves: by what lies beside the weights, and by shapes of stacks.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::checkpoint::{CheckpointError, MAX_NAME_BYTES, MAX_TENSORS};
use crate::types::DType;

const NF4: Format = Format::NF4_DOUBLE;

/// A directory with a checkpoint `m` of these BF16 tensors; what has elements is one row of a
/// sparse file.
fn checkpoint(tensors: &[(&str, &[u64])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in tensors {
        let begin = end;
        end += DType::Bf16.tensor_bytes(shape).unwrap();
        header.insert(
            (*name).to_owned(),
            json!({"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}),
        );
    }
    let header = serde_json::Value::from(header).to_string();
    fs::create_dir(dir.path().join("m")).unwrap();
    let path = dir.path().join("m/model.safetensors");
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    fs::write(&path, &bytes).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(bytes.len() as u64 + end).unwrap();
    fs::write(
        dir.path().join("m/config.json"),
        r#"{"architectures":["Qwen3MoeForCausalLM"],"hidden_size":8}"#,
    )
    .unwrap();
    dir
}

fn plain() -> TempDir {
    checkpoint(&[("a.weight", &[64, 64])])
}

fn write(dir: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join("m").join(name);
    fs::write(&path, bytes).unwrap();
    path
}

/// Names of everything in a directory.
fn names(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Saves `m` as `out`, everything in this format. Where it fails, nothing is left.
fn save_as(dir: &TempDir, format: Format) -> Result<Saved, SaveError> {
    let checkpoint = Checkpoint::open(dir.path().join("m")).unwrap();
    let placement = Placement {
        device: Some(0),
        format,
    };
    let placements = vec![placement; checkpoint.tensors().len()];
    let before = names(dir.path());
    let target = dir.path().join("out");
    let result = save(&checkpoint, &placements, &target, &SaveOptions::default());
    if result.is_err() {
        assert_eq!(names(dir.path()), before);
    }
    result
}

fn saved(dir: &TempDir) -> Saved {
    save_as(dir, NF4).unwrap_or_else(|error| panic!("{error}"))
}

// The configuration

#[test]
fn what_only_python_calls_json_stays_as_it_was_written() {
    let dir = plain();
    let line = "\"time_step_limit\": [0.0, Infinity]";
    let text = format!(
        "\u{feff}{{\"z\": \"\\ud800\", {line},\n \"a\": [NaN, -Infinity, 1e999], \"\\udc00\": {{\"b\":NaN}}}}"
    );
    write(&dir, "config.json", text.as_bytes());
    saved(&dir);
    let have = fs::read_to_string(dir.path().join("out/config.json")).unwrap();
    assert!(
        have.starts_with(&format!(
            "{{\n  \"z\": \"\\ud800\",\n  {line},\n  \"a\": [NaN, -Infinity, 1e999],\n"
        )),
        "{have}"
    );
    assert!(
        have.contains("{\"b\":NaN},\n  \"quantization_config\": {\n"),
        "{have}"
    );
    // Of what is not quantized, all stays; transformers refuses the mark.
    fs::remove_dir_all(dir.path().join("out")).unwrap();
    save_as(&dir, Format::Stored).unwrap();
    let have = fs::read_to_string(dir.path().join("out/config.json")).unwrap();
    assert_eq!(have, text[3..]);
}

// Checkpoints that are quantized already

/// `m` with one matrix that another method left in float, and with this configuration.
fn quantized_by(settings: serde_json::Value) -> TempDir {
    let dir = plain();
    let config = json!({"hidden_size": 8, "quantization_config": settings});
    write(&dir, "config.json", config.to_string().as_bytes());
    dir
}

#[test]
fn what_another_method_has_quantized_is_copied_or_refused() {
    for method in ["fp8", "mxfp4", "gptq", "new"] {
        let dir = quantized_by(json!({"quant_method": method}));
        let error = save_as(&dir, NF4).unwrap_err();
        assert!(
            matches!(&error, SaveError::OtherMethod { method: is, tensor, .. } if is == method && tensor == "a.weight"),
            "{error}"
        );
        let saved = save_as(&dir, Format::Stored).unwrap();
        assert_eq!(saved.quantized, 0);
        let config = |path: &str| fs::read(dir.path().join(path).join("config.json")).unwrap();
        assert_eq!(config("m"), config("out"));
    }
}

// Files beside the weights

#[cfg(unix)]
#[test]
fn copies_have_our_own_mode() {
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};

    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    let dir = plain();
    for (name, mode) in [
        ("vocab.model", 0o6755),
        ("merges.txt", 0o1777),
        ("tokenizer.json", 0o400),
        ("config.json", 0o6777),
        ("model.safetensors", 0o4755),
    ] {
        let path = dir.path().join("m").join(name);
        if !path.exists() {
            fs::write(&path, "text").unwrap();
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }
    saved(&dir);
    // As any new file of this process.
    let new = dir.path().join("new");
    let mut options = File::options();
    options.write(true).create(true).mode(0o644);
    options.open(&new).unwrap();
    let out = dir.path().join("out");
    assert_eq!(names(&out).len(), 5);
    for name in names(&out) {
        assert_eq!(mode(&out.join(&name)), mode(&new), "{name}");
    }
}

#[cfg(unix)]
#[test]
fn what_a_link_out_leads_to_is_not_copied() {
    use std::os::unix::fs::symlink;

    let secret = "root:x:0:0";
    for target in [
        "../secret",
        "/etc/passwd",
        "/proc/self/environ",
        "../nothing",
    ] {
        let dir = plain();
        fs::write(dir.path().join("secret"), secret).unwrap();
        symlink(target, dir.path().join("m/notes.txt")).unwrap();
        let error = save_as(&dir, NF4).unwrap_err();
        assert!(
            matches!(
                &error,
                SaveError::Checkpoint(CheckpointError::LeadsOut { path, .. })
                    if path.ends_with("m/notes.txt")
            ),
            "{target}: {error:?}"
        );
    }
    // A second name of a file of its own is a file of its own; of a hidden one it is not.
    let dir = plain();
    write(&dir, "vocab.txt", b"words");
    symlink("vocab.txt", dir.path().join("m/words.txt")).unwrap();
    saved(&dir);
    assert_eq!(
        fs::read(dir.path().join("out/words.txt")).unwrap(),
        b"words"
    );
    assert!(!dir.path().join("out/words.txt").is_symlink());
    let dir = plain();
    write(&dir, ".netrc", secret.as_bytes());
    symlink(".netrc", dir.path().join("m/notes.txt")).unwrap();
    assert!(matches!(
        save_as(&dir, NF4),
        Err(SaveError::Checkpoint(CheckpointError::LeadsOut { .. }))
    ));
}

#[cfg(unix)]
#[test]
fn a_snapshot_of_the_cache_is_saved_with_what_lies_in_its_blobs() {
    use std::os::unix::fs::symlink;

    let dir = plain();
    let entry = dir.path().join("models--org--name");
    fs::create_dir_all(entry.join("snapshots/abc")).unwrap();
    fs::create_dir(entry.join("blobs")).unwrap();
    write(&dir, "tokenizer.json", b"{}");
    for name in names(&dir.path().join("m")) {
        fs::rename(
            dir.path().join("m").join(&name),
            entry.join("blobs").join(&name),
        )
        .unwrap();
        let blob = Path::new("../../blobs").join(&name);
        symlink(blob, entry.join("snapshots/abc").join(&name)).unwrap();
    }
    fs::remove_dir(dir.path().join("m")).unwrap();
    symlink("models--org--name/snapshots/abc", dir.path().join("m")).unwrap();
    assert_eq!(saved(&dir).left_out, []);
    let written = ["config.json", "model.safetensors", "tokenizer.json"];
    assert_eq!(names(&dir.path().join("out")), written);
}

#[test]
fn what_is_too_large_or_no_file_is_left_out_and_told() {
    let dir = plain();
    let sparse = |name: &str, length: u64| {
        let file = File::create(dir.path().join("m").join(name)).unwrap();
        file.set_len(length).unwrap();
    };
    sparse("a.txt", MAX_COMPANION_BYTES + 1);
    sparse("b.txt", 3 << 30);
    fs::create_dir(dir.path().join("m/c.json")).unwrap();
    sparse("d.txt", 1000);
    write(&dir, "weights.bin", b"of no kind that belongs to a model");
    write(&dir, ".hidden.json", b"{}");
    let left_out = |file: &str, reason| LeftOut {
        file: file.to_owned(),
        reason,
    };
    let have = MAX_COMPANION_BYTES + 1;
    let saved = saved(&dir);
    assert_eq!(
        saved.left_out,
        [
            left_out("a.txt", LeftOutReason::TooLarge { have }),
            left_out("b.txt", LeftOutReason::TooLarge { have: 3 << 30 }),
            left_out("c.json", LeftOutReason::NotAFile),
        ]
    );
    assert_eq!(
        saved.left_out[1].to_string(),
        "\"b.txt\" was not copied: it has 3221225472 bytes, and a file beside the weights at most \
         67108864"
    );
    let written = ["config.json", "d.txt", "model.safetensors"];
    assert_eq!(names(&dir.path().join("out")), written);
}

#[test]
fn folders_that_belong_to_the_model_are_copied() {
    let dir = plain();
    let folder = |name: &str| fs::create_dir_all(dir.path().join("m").join(name)).unwrap();
    for name in [
        "1_Pooling",
        "2_Dense",
        "3_Pickled/inner",
        "processor",
        "a/b/c/d",
        "onnx",
        "figures",
        ".git",
        "checkpoint-500",
    ] {
        folder(name);
    }
    let modules = json!([
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense/"}, {"idx": 3, "path": "3_Pickled"},
        {"idx": 4, "path": "../../etc"}, {"idx": 5, "path": "/etc"}, {"idx": 6, "path": "gone"},
    ]);
    write(&dir, "modules.json", modules.to_string().as_bytes());
    for name in [
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "3_Pickled/config.json",
        "3_Pickled/pytorch_model.bin",
        "3_Pickled/inner/x.txt",
        "processor/preprocessor_config.json",
        "processor/.hidden.json",
        "a/b/x.json",
        "a/b/c/x.json",
        "onnx/model.onnx",
        "onnx/config.json",
        "figures/plot.png",
        ".git/x.json",
        "checkpoint-500/model.safetensors.index.json",
        "checkpoint-500/trainer_state.json",
    ] {
        write(&dir, name, b"{}");
    }
    #[cfg(unix)]
    std::os::unix::fs::symlink(".git", dir.path().join("m/linked")).unwrap();
    let saved = saved(&dir);
    let told: Vec<(&str, &LeftOutReason)> = saved
        .left_out
        .iter()
        .map(|left| (&*left.file, &left.reason))
        .collect();
    assert_eq!(
        told,
        [
            ("3_Pickled/pytorch_model.bin", &LeftOutReason::Kind),
            ("checkpoint-500", &LeftOutReason::OtherWeights),
        ]
    );
    let out = dir.path().join("out");
    assert_eq!(
        names(&out),
        [
            "1_Pooling",
            "2_Dense",
            "3_Pickled",
            "a",
            "config.json",
            "model.safetensors",
            "modules.json",
            "processor",
        ]
    );
    assert_eq!(
        names(&out.join("2_Dense")),
        ["config.json", "model.safetensors"]
    );
    assert_eq!(names(&out.join("3_Pickled")), ["config.json", "inner"]);
    assert_eq!(names(&out.join("3_Pickled/inner")), ["x.txt"]);
    assert_eq!(names(&out.join("processor")), ["preprocessor_config.json"]);
    assert_eq!(names(&out.join("a/b")), ["x.json"]);
    // Of a single file only what modules.json names.
    let checkpoint = Checkpoint::open(dir.path().join("m/model.safetensors")).unwrap();
    let placement = Placement {
        device: Some(0),
        format: NF4,
    };
    let single = dir.path().join("single");
    save(&checkpoint, &[placement], &single, &SaveOptions::default()).unwrap();
    assert!(single.join("1_Pooling/config.json").exists());
    assert!(!single.join("processor").exists() && !single.join("a").exists());
}

#[test]
fn folders_with_very_many_files_are_left_out_and_told() {
    let dir = plain();
    for folder in ["few", "many"] {
        fs::create_dir(dir.path().join("m").join(folder)).unwrap();
    }
    write(&dir, "few/x.json", b"{}");
    for file in 0..MAX_COMPANIONS {
        write(&dir, &format!("many/{file}.txt"), b"");
    }
    let saved = saved(&dir);
    let told: Vec<(&str, &LeftOutReason)> = saved
        .left_out
        .iter()
        .map(|left| (&*left.file, &left.reason))
        .collect();
    assert_eq!(told, [("many", &LeftOutReason::TooMany)]);
    assert!(dir.path().join("out/few/x.json").exists());
}

#[cfg(unix)]
#[test]
fn folders_behind_links_and_links_out_of_folders_are_not_copied() {
    let dir = plain();
    fs::create_dir_all(dir.path().join("secret")).unwrap();
    fs::write(dir.path().join("secret/x.json"), "of mine").unwrap();
    let link = |target: &str, name: &str| {
        std::os::unix::fs::symlink(dir.path().join(target), dir.path().join("m").join(name))
            .unwrap();
    };
    link("secret", "1_Pooling");
    link("secret", "processor");
    write(&dir, "modules.json", br#"[{"path": "1_Pooling"}]"#);
    let saved_once = saved(&dir);
    let told: Vec<&str> = saved_once.left_out.iter().map(|left| &*left.file).collect();
    assert_eq!(told, ["1_Pooling"]);
    fs::create_dir(dir.path().join("m/folder")).unwrap();
    link("secret/x.json", "folder/x.json");
    fs::remove_dir_all(dir.path().join("out")).unwrap();
    assert!(matches!(
        save_as(&dir, NF4),
        Err(SaveError::Checkpoint(CheckpointError::LeadsOut { .. }))
    ));
}

#[test]
fn many_files_together_have_a_limit_too() {
    let dir = plain();
    let half = MAX_COMPANIONS_BYTES / MAX_COMPANION_BYTES * 2;
    for number in 0..half + 2 {
        let path = dir.path().join(format!("m/{number:02}.txt"));
        let file = File::create(path).unwrap();
        file.set_len(MAX_COMPANION_BYTES / 2).unwrap();
    }
    // The rest is known before anything is copied, so that this test need not copy it.
    let directory = Checkpoint::open(dir.path().join("m")).unwrap();
    let found = Companions::find(directory.directory(), false, false, &CancelToken::new()).unwrap();
    let left: Vec<&str> = found
        .left_out
        .iter()
        .map(|left| left.file.as_str())
        .collect();
    assert_eq!(left, ["08.txt", "09.txt"]);

    let dir = plain();
    for number in 0..MAX_COMPANIONS {
        write(&dir, &format!("{number}.txt"), b"");
    }
    write(&dir, "more.bin", b"");
    assert_eq!(saved(&dir).left_out, []);
    fs::remove_dir_all(dir.path().join("out")).unwrap();
    write(&dir, "more.txt", b"");
    let error = save_as(&dir, NF4).unwrap_err();
    assert!(
        matches!(
            error,
            SaveError::Checkpoint(CheckpointError::TooLarge {
                have: 1001,
                limit: 1000,
                ..
            })
        ),
        "{error:?}"
    );
}

#[cfg(unix)]
#[test]
fn pipes_do_not_block_and_odd_names_are_left_out() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::symlink;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    let dir = plain();
    let path = |name: &str| dir.path().join("m").join(name);
    mknodat(CWD, path("pipe.txt"), FileType::Fifo, Mode::from(0o600), 0).unwrap();
    symlink("nothing", path("gone.txt")).unwrap();
    symlink(".", path("here.txt")).unwrap();
    write(&dir, "line\nbreak.txt", b"");
    fs::write(
        dir.path().join("m").join(OsStr::from_bytes(b"\xff.txt")),
        "",
    )
    .unwrap();
    let saved = saved(&dir);
    let reasons: Vec<&LeftOutReason> = saved.left_out.iter().map(|left| &left.reason).collect();
    assert_eq!(
        reasons,
        [
            &LeftOutReason::Missing,
            &LeftOutReason::NotAFile,
            &LeftOutReason::Name,
            &LeftOutReason::NotAFile,
            &LeftOutReason::Name,
        ]
    );
    for left in &saved.left_out {
        assert!(!left.to_string().contains(char::is_control), "{left}");
    }
    let written = ["config.json", "model.safetensors"];
    assert_eq!(names(&dir.path().join("out")), written);
}

#[test]
fn copying_ends_when_it_is_cancelled_and_when_a_file_changes() {
    let dir = plain();
    let path = write(&dir, "vocab.txt", b"words");
    let checkpoint = Checkpoint::open(dir.path().join("m")).unwrap();
    let cancel = CancelToken::new();
    let find = || Companions::find(checkpoint.directory(), false, false, &cancel);
    let found = find().unwrap();
    let target = Target::create(&dir.path().join("out"), false).unwrap();
    // Longer, shorter, and as long as before.
    for text in ["other words", "word", "sword"] {
        fs::remove_file(&path).unwrap();
        fs::write(&path, text).unwrap();
        let error = found.copy(&target, &cancel).unwrap_err();
        assert!(
            matches!(
                &error,
                SaveError::Checkpoint(CheckpointError::Changed { .. })
            ),
            "{text}: {error:?}"
        );
        drop(fs::remove_file(target.path_of("vocab.txt")));
    }
    cancel.cancel();
    assert!(matches!(find(), Err(SaveError::Cancelled)));
    assert!(matches!(
        found.copy(&target, &cancel),
        Err(SaveError::Cancelled)
    ));
    drop(target);
    assert_eq!(names(dir.path()), ["m"]);
}

// Stacks of experts

const GATES: &str = "model.layers.0.mlp.experts.gate_up_proj";
const DOWNS: &str = "model.layers.0.mlp.experts.down_proj";

#[test]
fn stacks_without_elements_stay_stacks() {
    for (name, shape) in [
        (GATES, [1 << 40, 0, 8]),
        (GATES, [1 << 62, 0, 8]),
        (GATES, [1 << 63, 0, 8]),
        (GATES, [u64::MAX, 0, 8]),
        (GATES, [3_000_000, 0, 8]),
        (GATES, [2, 0, 8]),
        (GATES, [0, 6, 8]),
        (GATES, [0, u64::MAX - 1, 8]),
        (DOWNS, [1 << 63, 8, 0]),
        (DOWNS, [0, 8, 4]),
        (DOWNS, [0, 8, u64::MAX]),
    ] {
        let dir = checkpoint(&[(name, &shape), ("a.weight", &[8, 8])]);
        let saved = saved(&dir);
        assert_eq!(saved.quantized, 2, "{shape:?}");
        // Nothing is lost: what is written has both, with their shapes.
        let written = Checkpoint::open(dir.path().join("out")).unwrap();
        let stack = &written.tensors()[written.find(name).unwrap()];
        assert_eq!((stack.shape.as_slice(), stack.bytes), (&shape[..], 0));
        assert_eq!(written.tensors().len(), 2);
    }
}

#[test]
fn experts_are_counted_before_they_are_made() {
    // Of two elements for each of two projections: 8 bytes for an expert.
    let experts = MAX_TENSORS as u64 / 12 + 1;
    for experts in [experts, 3_000_000, 1 << 32] {
        let dir = checkpoint(&[(GATES, &[experts, 2, 8])]);
        let error = save_as(&dir, NF4).unwrap_err();
        assert!(
            matches!(
                &error,
                SaveError::TooLarge { tensor, need, limit: 1_000_000, .. }
                    if tensor == GATES && *need == 12 * experts
            ),
            "{error:?}"
        );
        assert!(error.to_string().contains(GATES), "{error}");
    }
    // All stacks together.
    let share: &[u64] = &[MAX_TENSORS as u64 / 12, 2, 8];
    let dir = checkpoint(&[
        (GATES, share),
        ("model.layers.1.mlp.experts.gate_up_proj", share),
    ]);
    assert!(matches!(
        save_as(&dir, NF4),
        Err(SaveError::TooLarge { .. })
    ));
    // Stored, it is one tensor whatever its shape.
    let dir = checkpoint(&[(GATES, &[3_000_000, 2, 1]), ("a.weight", &[8, 8])]);
    assert_eq!(save_as(&dir, Format::Stored).unwrap().quantized, 0);
}

#[test]
fn long_names_are_not_multiplied() {
    let prefix = "x".repeat(MAX_NAME_BYTES - ".experts.gate_up_proj".len());
    let name = format!("{prefix}.experts.gate_up_proj");
    let dir = checkpoint(&[(&name, &[80_000, 2, 8])]);
    let error = save_as(&dir, NF4).unwrap_err();
    assert!(
        matches!(&error, SaveError::TooLarge { what, .. } if what.contains("names")),
        "{error:?}"
    );
    assert!(error.to_string().len() < 1000, "{error}");
    // A name that only its parts make too long to be opened again.
    let dir = checkpoint(&[(&name, &[2, 2, 8])]);
    let error = save_as(&dir, NF4).unwrap_err();
    assert!(
        matches!(&error, SaveError::TooLarge { limit, .. } if *limit == MAX_NAME_BYTES as u64),
        "{error:?}"
    );
}

#[test]
fn the_number_of_tensors_of_a_weight_is_what_is_written() {
    let single = Format::NF4;
    for (format, tensors) in [
        (NF4, 6),
        (single, 4),
        (Format::Stored, 1),
        (Format::Cast(DType::F32), 1),
    ] {
        let dir = plain();
        save_as(&dir, format).unwrap();
        let bytes = fs::read(dir.path().join("out/model.safetensors")).unwrap();
        let written = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(written.len(), tensors, "{format}");
        let checkpoint = Checkpoint::open(dir.path().join("m")).unwrap();
        let counted = layout::tensors_of(&checkpoint.tensors()[0], format);
        assert_eq!(counted, tensors, "{format}");
        // And when it is quantized already.
        let written = Checkpoint::open(dir.path().join("out")).unwrap();
        let counted = layout::tensors_of(&written.tensors()[0], Format::Stored);
        assert_eq!(counted, tensors, "{format}");
    }
}

#[test]
fn sums_of_sizes_that_need_more_than_64_bits_are_errors() {
    let tensor = |index: usize, dtype: DType, shape: &[u64]| TensorInfo {
        name: format!("t{index}"),
        dtype,
        shape: shape.to_vec(),
        bytes: dtype.tensor_bytes(shape).unwrap(),
        shard: 0,
        offset: 0,
        quantized: None,
        encoded: None,
        piece: None,
    };
    let all = |dtype: DType, format: Format, elements: u64| {
        let weights: Vec<(TensorInfo, Format)> = (0..32)
            .map(|index| (tensor(index, dtype, &[elements]), format))
            .collect();
        Layout::new(&weights, u64::MAX)
    };
    assert!(all(DType::F32, NF4, 1 << 57).is_ok());
    for format in [Format::Cast(DType::F32), Format::Stored] {
        let result = all(DType::Bf16, format, 1 << 58);
        assert!(
            matches!(&result, Err(SaveError::TooLarge { .. })),
            "{format}: {result:?}"
        );
    }
}
