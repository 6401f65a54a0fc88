//! What is written, read back; and what is left when writing does not come to an end.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Mutex;

use super::random::{self, Tables};
use super::write::CHUNK;
use super::*;
use crate::cancel::CancelToken;
use crate::checkpoint::{Checkpoint, Dequantize, OpenOptions};
use crate::progress::Progress;
use crate::types::DType;

fn model() -> Model {
    Model {
        tensors: vec![
            Tensor::new("model.embed_tokens.weight", &[1000, 33]),
            Tensor::new("odd.bias", &[7]),
            Tensor::new("empty", &[0, 4]),
            Tensor::new("model.norm.weight", &[33]),
            Tensor::new("stack", &[3, 5, 9]),
        ],
        config_json: r#"{"model_type":"test"}"#.into(),
    }
}

fn run(model: &Model, directory: &Path, options: &SynthOptions<'_>) -> Result<Written, SynthError> {
    write_model(model, directory, options)
}

fn values(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let checkpoint = open_as_stored(directory);
    let tensors = checkpoint.tensors().iter().enumerate();
    tensors
        .map(|(i, tensor)| {
            let mut bytes = vec![0; tensor.bytes as usize];
            checkpoint.read_tensor(i, 0, &mut bytes).unwrap();
            (tensor.name.clone(), bytes)
        })
        .collect()
}

fn entries(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn what_is_written_is_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("new").join("model");
    let model = model();
    let reports = Mutex::new(Vec::new());
    let report = |progress: Progress| {
        let mut reports = reports.lock().unwrap();
        reports.push((progress.bytes_done, progress.bytes_total));
    };
    let options = SynthOptions::default().with_progress(&report);
    let written = write_model(&model, &target, &options).unwrap();
    let reports = reports.into_inner().unwrap();
    assert_eq!(entries(&target), ["config.json", "model.safetensors"]);
    let bytes = fs::metadata(target.join("model.safetensors"))
        .unwrap()
        .len();
    assert_eq!((written.shards, written.tensors), (1, 5));
    assert_eq!(written.bytes, bytes);
    assert_eq!(reports.first(), Some(&(0, bytes)));
    assert_eq!(reports.last(), Some(&(bytes, bytes)));

    let checkpoint = Checkpoint::open(&target).unwrap();
    assert_eq!(checkpoint.metadata()["format"], "pt");
    for tensor in &model.tensors {
        let read = &checkpoint.tensors()[checkpoint.find(&tensor.name).unwrap()];
        assert_eq!((read.dtype, &read.shape), (tensor.dtype, &tensor.shape));
    }
    let bytes = fs::read(target.join("model.safetensors")).unwrap();
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(theirs.len(), 5);
    assert_eq!(checkpoint.tensors()[0].offset % 8, 0);
}

#[test]
fn shards_do_not_change_the_values_and_seeds_do() {
    let dir = tempfile::tempdir().unwrap();
    let model = model();
    let path = |name: &str| dir.path().join(name);
    let mut options = SynthOptions::default();
    run(&model, &path("whole"), &options).unwrap();
    let whole = values(&path("whole"));
    options.shard_bytes = 100;
    let written = run(&model, &path("shards"), &options).unwrap();
    assert_eq!(written.shards, 3);
    assert_eq!(
        entries(&path("shards")),
        [
            "config.json",
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
            "model.safetensors.index.json"
        ]
    );
    assert_eq!(values(&path("shards")), whole);
    let index = fs::read_to_string(path("shards").join("model.safetensors.index.json"));
    let index: serde_json::Value = serde_json::from_str(&index.unwrap()).unwrap();
    let parameters = 33_000 + 7 + 33 + 135;
    assert_eq!(index["metadata"]["total_parameters"], parameters);
    assert_eq!(index["metadata"]["total_size"], 2 * parameters);
    options.seed = 1;
    run(&model, &path("seed"), &options).unwrap();
    assert_ne!(values(&path("seed")), whole);
}

#[test]
fn tensors_larger_than_a_chunk_are_the_same_as_made_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let elements = CHUNK as u64 / 2 + 4097;
    let bytes = |name: &str, count: u64| Tensor {
        dtype: DType::U8,
        values: Values::Mxfp4Codes,
        ..Tensor::new(name, &[count])
    };
    // The second chunk would begin within an element of the last.
    let odd = CHUNK as u64 - 4097 * 2 - 6 - 3;
    let wide = Tensor {
        dtype: DType::F32,
        ..Tensor::new("wide", &[CHUNK as u64 / 4 + 5])
    };
    let tensors = vec![
        Tensor::new("small", &[3]),
        Tensor::new("large", &[elements]),
        bytes("odd", odd),
        wide,
    ];
    let model = Model {
        tensors,
        config_json: "{}".into(),
    };
    run(&model, &dir.path().join("m"), &SynthOptions::default()).unwrap();
    let written = values(&dir.path().join("m"));
    let tables = Tables::new();
    for tensor in &model.tensors {
        let bytes = tensor.dtype.tensor_bytes(&tensor.shape).unwrap();
        let mut expected = vec![0; bytes as usize];
        let source = tables.source(tensor.dtype, tensor.values).unwrap();
        source.fill(random::key(0, &tensor.name), 0, &mut expected);
        assert!(written[&tensor.name] == expected, "{}", tensor.name);
    }
}

#[test]
fn quantized_layouts_are_written_and_read() {
    for (mut tensors, config_json) in [
        cut_small(Preset::DeepseekV3, "layers.3."),
        cut_small(Preset::GptOss20b, "layers.0."),
    ] {
        tensors.truncate(40);
        let model = Model {
            tensors,
            config_json,
        };
        let dir = tempfile::tempdir().unwrap();
        run(&model, dir.path(), &SynthOptions::default()).unwrap();
        let checkpoint = open_as_stored(dir.path());
        let written = values(dir.path());
        for tensor in &model.tensors {
            let read = &checkpoint.tensors()[checkpoint.find(&tensor.name).unwrap()];
            assert_eq!((read.dtype, &read.shape), (tensor.dtype, &tensor.shape));
            let zeros = written[&tensor.name].iter().filter(|&&byte| byte == 0);
            let all = written[&tensor.name].len();
            assert!(zeros.count() < all / 4 + 4, "{}", tensor.name);
        }
    }
}

/// With codes and scales as the tensors that they are.
fn open_as_stored(path: &Path) -> Checkpoint {
    let options = OpenOptions::default().with_dequantize(Dequantize::None);
    Checkpoint::open_with(path, &options).unwrap()
}

/// The tensors with this in their names, of the first rows and experts only.
fn cut_small(preset: Preset, layer: &str) -> (Vec<Tensor>, String) {
    let mut tensors = preset.tensors();
    tensors.retain(|tensor| tensor.name.contains(layer));
    for tensor in &mut tensors {
        // Two rows of a matrix have one row of scales.
        let rows = if tensor.name.ends_with("_scale_inv") {
            1
        } else {
            2
        };
        tensor.shape[0] = tensor.shape[0].min(rows);
    }
    (tensors, preset.config_json())
}

#[test]
fn big_models_of_every_layout_open_without_weights() {
    for (preset, layers, tensors) in [
        (Preset::DeepseekV3, 61, 90_427),
        (Preset::DeepseekV3, 4, 1_621),
        (Preset::GptOss120b, 36, 687),
        (Preset::GptOss120b, 2, 41),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let options = SynthOptions::default().with_headers_only(true);
        let model = preset.first_layers(layers).unwrap();
        let written = write_model(&model, dir.path(), &options).unwrap();
        assert_eq!(written.tensors, tensors, "{preset}");
        let checkpoint = open_as_stored(dir.path());
        assert_eq!(checkpoint.tensors().len(), tensors);
        // Every weight is understood.
        let counts = checkpoint.encoded();
        assert!(
            counts.left > 0 && counts.unknown == 0,
            "{preset}: {counts:?}"
        );
        let config = checkpoint.config().unwrap();
        assert_eq!(config.num_hidden_layers, Some(layers as u32));
    }
}

#[test]
fn headers_only_costs_no_disk() {
    let dir = tempfile::tempdir().unwrap();
    let options = SynthOptions::default().with_headers_only(true);
    let written = write(Preset::Qwen3_30bA3b, dir.path(), &options).unwrap();
    assert_eq!(written.shards, 13);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(
        checkpoint.source_bytes(),
        2 * Preset::Qwen3_30bA3b.parameters()
    );
    assert_eq!(checkpoint.tensors().len(), written.tensors);
    assert!(checkpoint.ties().is_empty());
    let mut bytes = [1; 16];
    checkpoint.read_tensor(17_000, 8, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 16]);
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::fs::MetadataExt;
        let blocks: u64 = checkpoint
            .shards()
            .iter()
            .map(|shard| fs::metadata(shard.path()).unwrap().blocks())
            .sum();
        assert!(blocks * 512 < 16 << 20, "{blocks}");
    }
}

#[test]
fn a_tied_preset_is_read_as_tied() {
    let dir = tempfile::tempdir().unwrap();
    let options = SynthOptions::default().with_headers_only(true);
    let model = Preset::Qwen25_0_5b.into();
    run(&model, dir.path(), &options).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let [tie] = checkpoint.ties() else {
        panic!("{:?}", checkpoint.ties());
    };
    assert_eq!(
        checkpoint.tensors()[tie.tensor].name,
        "model.embed_tokens.weight"
    );
    assert_eq!(
        (tie.alias.as_str(), tie.alias_tensor),
        ("lm_head.weight", None)
    );
}

#[test]
fn a_directory_with_something_in_it_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("precious");
    fs::write(&file, "x").unwrap();
    let error = run(&model(), dir.path(), &SynthOptions::default()).unwrap_err();
    assert!(matches!(error, SynthError::NotEmpty { .. }), "{error:?}");
    let error = run(&model(), &file, &SynthOptions::default()).unwrap_err();
    assert!(
        matches!(error, SynthError::NotADirectory { .. }),
        "{error:?}"
    );
    assert_eq!(entries(dir.path()), ["precious"]);
}

#[test]
fn what_is_cancelled_leaves_nothing_behind() {
    for headers_only in [false, true] {
        for after in [0, 1, 100_000] {
            let dir = tempfile::tempdir().unwrap();
            let target = dir.path().join("a").join("b");
            let cancel = CancelToken::new();
            let stop = |progress: Progress| {
                if progress.bytes_done >= after {
                    cancel.cancel();
                }
            };
            let options = SynthOptions::default()
                .with_headers_only(headers_only)
                .with_shard_bytes(1 << 20)
                .with_progress(&stop)
                .with_cancel(cancel.clone());
            let mut model = model();
            for i in 0..4 {
                let name = format!("more.{i}");
                model.tensors.push(Tensor::new(name, &[1000, 1000]));
            }
            let error = write_model(&model, &target, &options).unwrap_err();
            assert!(matches!(error, SynthError::Cancelled), "{error:?}");
            assert!(entries(dir.path()).is_empty(), "{:?}", entries(dir.path()));
        }
    }
}

#[test]
fn what_fails_leaves_the_files_of_others() {
    let dir = tempfile::tempdir().unwrap();
    let obstacle = dir.path().join("model-00003-of-00003.safetensors");
    // Somebody else writes into the directory meanwhile.
    let interfere = |_: Progress| fs::write(&obstacle, "theirs").unwrap();
    let options = SynthOptions::default()
        .with_shard_bytes(100)
        .with_progress(&interfere);
    let error = write_model(&model(), dir.path(), &options).unwrap_err();
    assert!(matches!(error, SynthError::Io { .. }), "{error:?}");
    assert_eq!(entries(dir.path()), ["model-00003-of-00003.safetensors"]);
    assert_eq!(fs::read(&obstacle).unwrap(), b"theirs");
}

#[test]
fn shapes_that_cannot_be_written_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = model();
    model.tensors[0].shape = vec![1 << 40, 1 << 40];
    let error = run(&model, dir.path(), &SynthOptions::default()).unwrap_err();
    assert!(matches!(error, SynthError::Unsupported { .. }), "{error:?}");
    model.tensors[0].shape = vec![2];
    for dtype in [DType::F16, DType::F8E4M3, DType::U8] {
        model.tensors[0].dtype = dtype;
        let error = run(&model, dir.path(), &SynthOptions::default()).unwrap_err();
        assert!(matches!(error, SynthError::Unsupported { .. }), "{error:?}");
    }
    assert!(entries(dir.path()).is_empty());
    // Without weights there is nothing to be made in the type.
    let options = SynthOptions::default().with_headers_only(true);
    run(&model, dir.path(), &options).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.tensors()[0].dtype, DType::U8);
}
