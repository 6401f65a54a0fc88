//! Weights that other methods have quantized, against what these methods' own programs make of them, and
//! bitsandbytes of that.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use safetensors::Dtype;
use tempfile::TempDir;
use tightfit::checkpoint::{Checkpoint, Dequantize, OpenOptions, TensorInfo};
use tightfit::device::{Device, open_devices};
use tightfit::load::LoadOptions;
use tightfit::model::Model;
use tightfit::plan::PartKind;
use tightfit::save::{SaveError, SaveOptions, save};
use tightfit::types::{BlockSize, DType, Format, Placement};
use tightfit_kernels::half::{bf16, f16};
use tightfit_kernels::{Isa, Kernels};
use tightfit_tests::loading::{part, tensor};
use tightfit_tests::saving::files;
use tightfit_tests::sources::{self, GoldenSource};
use tightfit_tests::tensors::FileTensors;

/// The bits of 16-bit floats, but one for all NaN: programs give different ones.
fn bits(bytes: &[u8], dtype: DType) -> Vec<u16> {
    let (elements, _) = bytes.as_chunks::<2>();
    elements
        .iter()
        .map(|&bytes| {
            let is_nan = match dtype {
                DType::F16 => f16::from_le_bytes(bytes).is_nan(),
                _ => bf16::from_le_bytes(bytes).is_nan(),
            };
            if is_nan {
                u16::MAX
            } else {
                u16::from_le_bytes(bytes)
            }
        })
        .collect()
}

/// Loads these weights in this format, and all else as stored.
fn load_as(
    checkpoint: &Checkpoint,
    weights: &BTreeSet<&str>,
    format: Format,
    options: &LoadOptions<'_>,
) -> Model {
    let devices: Vec<Box<dyn Device>> = open_devices(&["sim:1GiB".parse().unwrap()]).unwrap();
    sources::load_as(checkpoint, &devices, weights, format, options)
}

/// A directory with the checkpoint `m`, which says of its method in an object of its configuration, and
/// the same, dequantized before, `plain`.
fn directories(case: &GoldenSource) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let settings = std::fs::read_to_string(case.path.join("config.json")).unwrap();
    let settings: serde_json::Value = serde_json::from_str(&settings).unwrap();
    let config = |is_quantized: bool| {
        let method = match is_quantized {
            true => format!(
                r#","quantization_config":{}"#,
                settings["quantization_config"]
            ),
            false => String::new(),
        };
        format!(
            "{{\n  \"architectures\": [\"LlamaForCausalLM\"],\n  \"text_config\": {{\"a\":NaN{method}}},\n  \"hidden_size\": 64\n}}\n"
        )
    };
    for (model, is_quantized) in [("m", true), ("plain", false)] {
        let model = directory.path().join(model);
        std::fs::create_dir(&model).unwrap();
        std::fs::write(model.join("config.json"), config(is_quantized)).unwrap();
        std::fs::write(model.join("tokenizer.json"), "{}").unwrap();
    }
    std::fs::write(directory.path().join("m/hf_quant_config.json"), "{}").unwrap();
    let mut weights = FileTensors::read(&case.path.join("model.safetensors"));
    let ours = directory.path().join("m/model.safetensors");
    std::fs::copy(case.path.join("model.safetensors"), &ours).unwrap();
    let raw = case.open(Dequantize::None);
    let decoded = case.open(Dequantize::All);
    for tensor in raw.tensors() {
        let is_part = decoded
            .find(&tensor.name)
            .is_none_or(|found| decoded.tensors()[found].encoded.is_some());
        if is_part {
            weights.0.remove(&tensor.name);
        }
    }
    for weight in case.weights() {
        let tensor = case.expected.0[weight].clone();
        weights.0.insert(weight.to_owned(), tensor);
    }
    weights.write(&directory.path().join("plain/model.safetensors"));
    directory
}

/// The text of a configuration, without spaces: an object that is changed is written in lines.
fn compact(mut files: BTreeMap<String, Vec<u8>>) -> BTreeMap<String, Vec<u8>> {
    let config = files.get_mut("config.json").unwrap();
    config.retain(|byte| !byte.is_ascii_whitespace());
    files
}

#[test]
fn what_is_saved_is_what_is_of_a_checkpoint_that_was_dequantized_before() {
    for case in GoldenSource::all() {
        // NaN has many forms.
        if case.name().ends_with("nan") {
            continue;
        }
        let directory = directories(&case);
        let is_stack = case.name().starts_with("mxfp4_stack");
        for format in [
            Format::NF4,
            Format::NF4_DOUBLE,
            Format::Stored,
            Format::Cast(DType::F32),
        ] {
            let save_as = |model: &str, target: &str| {
                let options = OpenOptions::default().with_dequantize(Dequantize::All);
                let path = directory.path().join(model);
                let checkpoint = Checkpoint::open_with(path, &options).unwrap();
                let place = |tensor: &TensorInfo| Placement {
                    device: Some(0),
                    format: match case.weights().contains(&*tensor.name) {
                        true => format,
                        false => Format::Stored,
                    },
                };
                let placements: Vec<Placement> = checkpoint.tensors().iter().map(place).collect();
                let target = directory.path().join(target);
                let options = SaveOptions::default().with_force(true);
                save(&checkpoint, &placements, target, &options)
            };
            let saved = save_as("m", "ours");
            if is_stack {
                assert!(
                    matches!(saved, Err(SaveError::NoReader { .. })),
                    "{saved:?}"
                );
                continue;
            }
            let saved = saved.unwrap();
            assert_eq!(saved, save_as("plain", "theirs").unwrap());
            let [ours, theirs] =
                ["ours", "theirs"].map(|saved| compact(files(&directory.path().join(saved))));
            assert_eq!(
                ours.keys().collect::<Vec<_>>(),
                theirs.keys().collect::<Vec<_>>()
            );
            for (file, bytes) in ours {
                assert!(
                    bytes == theirs[&file],
                    "{file} of {} in {format}",
                    case.name()
                );
            }
        }
    }
}

#[test]
fn what_no_single_method_would_describe_is_not_saved() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("m");
    std::fs::create_dir(&path).unwrap();
    // One in FP8, and one in 4 bits, as DeepSeek-V4 has them.
    let mut both = FileTensors::default();
    for case in ["fp8_scale_names", "mxfp4_expert_i8"] {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/sources");
        let weights = FileTensors::read(&sources.join(case).join("model.safetensors"));
        let named = |(name, tensor)| (format!("{case}.{name}"), tensor);
        both.0.extend(weights.0.into_iter().map(named));
    }
    both.write(&path.join("model.safetensors"));
    let save_with = |dequantize, format| {
        let options = OpenOptions::default().with_dequantize(dequantize);
        let checkpoint = Checkpoint::open_with(&path, &options).unwrap();
        let place = |tensor: &TensorInfo| Placement {
            device: Some(0),
            format: if tensor.encoded.is_some() {
                format
            } else {
                Format::Stored
            },
        };
        let placements: Vec<Placement> = checkpoint.tensors().iter().map(place).collect();
        let target = directory.path().join("out");
        save(
            &checkpoint,
            &placements,
            &target,
            &SaveOptions::default().with_force(true),
        )
    };
    for format in [Format::NF4, Format::Stored] {
        let error = save_with(Dequantize::Auto, format).unwrap_err();
        assert!(
            matches!(error, SaveError::MixedMethods { weights: 1.., .. }),
            "{error}"
        );
        assert!(!directory.path().join("out").exists());
    }
    save_with(Dequantize::All, Format::NF4).unwrap();
    save_with(Dequantize::None, Format::NF4).unwrap();
}

#[test]
fn decoded_weights_are_those_of_the_methods_programs() {
    for case in GoldenSource::all() {
        let checkpoint = case.open(Dequantize::All);
        let float = FileTensors::read(&case.path.join("model.safetensors"));
        let float = |name: &str| matches!(float.0.get(name), Some(t) if t.dtype == Dtype::BF16);
        for weight in case.weights() {
            let tensor = &checkpoint.tensors()[checkpoint.find(weight).unwrap()];
            let is_encoded = tensor.encoded.is_some();
            assert_eq!(is_encoded, !float(weight), "{weight}");
        }
        let counts = checkpoint.encoded();
        assert_eq!((counts.left, counts.unknown), (0, 0), "{}", case.name());
        let weights = case.weights();
        let model = load_as(
            &checkpoint,
            &weights,
            Format::Stored,
            &LoadOptions::default(),
        );
        for weight in case.weights() {
            let expected = &case.expected.0[weight];
            let loaded = tensor(&model, weight);
            assert_eq!(Dtype::from(loaded.dtype()), expected.dtype);
            let shape: Vec<u64> = expected.shape.iter().map(|&d| d as u64).collect();
            assert_eq!(loaded.shape(), shape, "{weight}");
            let have = bits(part(loaded, PartKind::Data), loaded.dtype());
            let want = bits(&expected.data, loaded.dtype());
            let differ = have.iter().zip(&want).position(|(have, want)| have != want);
            assert_eq!(differ, None, "element of {weight} in {}", case.name());
        }
    }
}

#[test]
fn nf4_is_what_bitsandbytes_makes_of_decoded_weights() {
    for case in GoldenSource::all() {
        let checkpoint = case.open(Dequantize::All);
        let mut first = None;
        for isa in Isa::available() {
            for (threads, staging) in [(1, 64 << 10), (3, 1 << 20), (2, 64 << 20)] {
                let options = LoadOptions::default()
                    .with_kernels(Kernels::new(isa).unwrap())
                    .with_threads(threads)
                    .with_staging_bytes(staging);
                let model = load_as(&checkpoint, &case.weights(), Format::NF4, &options);
                for weight in case.weights() {
                    let loaded = tensor(&model, weight);
                    let context = format!("{weight} in {} by {isa}", case.name());
                    let codes = part(loaded, PartKind::Codes);
                    assert!(codes == case.nf4(weight, "codes"), "codes of {context}");
                    let absmax = part(loaded, PartKind::Absmax);
                    assert!(absmax == case.nf4(weight, "absmax"), "scales of {context}");
                }
                let nonfinite = model.stats().nonfinite_blocks();
                assert_eq!(*first.get_or_insert(nonfinite), nonfinite);
            }
        }
    }
}

#[test]
fn other_formats_are_those_of_a_checkpoint_that_was_dequantized_before() {
    let double = Format::NF4_DOUBLE;
    let large = Format::Nf4 {
        block_size: BlockSize::new(4096).unwrap(),
        double_quantized: false,
    };
    for case in GoldenSource::all() {
        let checkpoint = case.open(Dequantize::All);
        let directory = tempfile::tempdir().unwrap();
        let mut plain = FileTensors::default();
        for weight in case.weights() {
            let tensor = case.expected.0[weight].clone();
            plain.0.insert(weight.to_owned(), tensor);
        }
        plain.write(&directory.path().join("model.safetensors"));
        let before = Checkpoint::open(directory.path()).unwrap();
        for format in [
            double,
            large,
            Format::Cast(DType::F32),
            Format::Cast(DType::F16),
        ] {
            let options = LoadOptions::default().with_staging_bytes(64 << 10);
            let (have, want) = (
                load_as(&checkpoint, &case.weights(), format, &options),
                load_as(&before, &case.weights(), format, &options),
            );
            for weight in case.weights() {
                let (have, want) = (tensor(&have, weight), tensor(&want, weight));
                assert_eq!(
                    have.absmax_mean().map(f32::to_bits),
                    want.absmax_mean().map(f32::to_bits)
                );
                for kind in [
                    PartKind::Data,
                    PartKind::Codes,
                    PartKind::Absmax,
                    PartKind::NestedAbsmax,
                ] {
                    // NaN has many forms.
                    let is_nan = kind == PartKind::Data && case.name().ends_with("nan");
                    if !is_nan {
                        assert!(
                            have.part(kind) == want.part(kind),
                            "{format} of {weight} in {}",
                            case.name()
                        );
                    }
                }
            }
        }
    }
}
