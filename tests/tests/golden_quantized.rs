//! Checkpoints that bitsandbytes has quantized: every byte of them is loaded as it is.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::Value;
use tempfile::TempDir;
use tightfit::load::LoadOptions;
use tightfit::model::Tensor;
use tightfit::plan::PartKind;
use tightfit::types::{DType, Format, QuantType};
use tightfit_kernels::{FloatType, Kernels};
use tightfit_tests::golden::{GoldenModel, MODELS};
use tightfit_tests::loading::{Planned, contents, load_with_auto, part, tensor};
use tightfit_tests::products::check_products;
use tightfit_tests::saving::{assert_same_tensors, save_with_auto, written};
use tightfit_tests::tensors::{FileTensor, FileTensors, floats};

const SIM: &[&str] = &["sim:1GiB"];

/// Checks a loaded weight against the tensors of its file; gives the bytes it has to take.
fn check_weight(loaded: Tensor<'_>, source: &FileTensors, context: &str) -> Vec<usize> {
    let name = loaded.name();
    let context = format!("{name}, {context}");
    assert_eq!(loaded.format(), Format::Stored, "{context}");
    assert_eq!(loaded.part(PartKind::Data), None, "{context}");

    let state = source.quant_state(name);
    let quantization = loaded.quantization().expect("it is quantized");
    let quant_type = match state["quant_type"].as_str() {
        Some("nf4") => QuantType::Nf4,
        Some("fp4") => QuantType::Fp4,
        other => panic!("{other:?}, {context}"),
    };
    let dtype = match state["dtype"].as_str() {
        Some("bfloat16") => DType::Bf16,
        Some("float16") => DType::F16,
        Some("float32") => DType::F32,
        other => panic!("{other:?}, {context}"),
    };
    assert_eq!(quantization.quant_type, quant_type, "{context}");
    assert_eq!(
        state["blocksize"],
        u32::from(quantization.block_size),
        "{context}"
    );
    assert_eq!(loaded.dtype(), dtype, "{context}");
    assert_eq!(state["shape"], Value::from(loaded.shape()), "{context}");
    let double = state.get("nested_blocksize").is_some();
    let offset = double.then(|| source.nested_offset(name).to_bits());
    let found = quantization.absmax_mean.map(f32::to_bits);
    assert_eq!(found, offset, "{context}");

    let mut parts = vec![(PartKind::Codes, ""), (PartKind::Absmax, ".absmax")];
    match double {
        true => parts.push((PartKind::NestedAbsmax, ".nested_absmax")),
        false => assert_eq!(loaded.part(PartKind::NestedAbsmax), None, "{context}"),
    }
    for (kind, suffix) in &parts {
        let expected = source.data(&format!("{name}{suffix}"));
        assert!(part(loaded, *kind) == expected, "{kind:?} of {context}");
    }
    let elements = loaded.shape().iter().product::<u64>() as usize;
    let blocks = elements.div_ceil(quantization.block_size.elements());
    match double {
        true => vec![elements.div_ceil(2), blocks, 4 * blocks.div_ceil(256)],
        false => vec![elements.div_ceil(2), 4 * blocks],
    }
}

#[test]
fn weights_that_are_quantized_already_keep_every_byte_and_the_plan_counts_them() {
    for name in MODELS {
        let golden = GoldenModel::unpack(name);
        let linear: BTreeSet<String> = golden.linear_weights().collect();
        for saved in ["nf4", "nf4_dq"] {
            let source = golden.tensors(saved);
            for devices in [SIM, &["cpu"], &["sim:1GiB", "sim:1GiB"]] {
                let context = format!("{name}/{saved} on {devices:?}");
                let settings = [("experts", "stored")];
                let planned = Planned::new(&golden.path(saved), devices, &settings);
                let model = planned.load(&LoadOptions::default());
                let mut requested = vec![0; devices.len()];
                let mut padded = vec![0; devices.len()];
                for loaded in model.tensors() {
                    let parts = match linear.contains(loaded.name()) {
                        true => check_weight(loaded, &source, &context),
                        false => {
                            let expected = source.data(loaded.name());
                            let same = part(loaded, PartKind::Data) == expected;
                            assert!(same, "{}, {context}", loaded.name());
                            vec![expected.len()]
                        }
                    };
                    for bytes in parts {
                        requested[loaded.device()] += bytes as u64;
                        padded[loaded.device()] += bytes.next_multiple_of(256) as u64;
                    }
                }
                let tensors = golden.tensors("bf16").0.len();
                assert_eq!(model.tensors().count(), tensors, "{context}");
                for (index, device) in planned.devices.iter().enumerate() {
                    let size = planned.plan.devices[index].size;
                    assert_eq!(size.requested, requested[index], "{context}");
                    assert_eq!(size.padded, padded[index], "{context}");
                    let reserved = padded[index].next_multiple_of(4096);
                    assert_eq!(size.reserved, reserved, "{context}");
                    assert_eq!(device.usage().reserved.peak, reserved, "{context}");
                }
            }
        }
    }
}

/// As bitsandbytes leaves them on a processor that computes with bf16: rounded, [columns / 64, rows].
fn packed_by_a_processor(tensor: &FileTensor, rows: usize) -> FileTensor {
    let scales = floats(&tensor.data);
    let of_row = scales.len() / rows;
    let in_file = (0..scales.len()).map(|place| scales[place % rows * of_row + place / rows]);
    let in_file: Vec<u8> = in_file.flat_map(f32::to_le_bytes).collect();
    FileTensor {
        dtype: Dtype::BF16,
        shape: vec![of_row, rows],
        data: cast(&in_file, FloatType::F32, FloatType::Bf16),
    }
}

fn cast(bytes: &[u8], from: FloatType, to: FloatType) -> Vec<u8> {
    let mut cast = vec![0; bytes.len() / from.bytes() * to.bytes()];
    Kernels::detect().cast(bytes, from, to, &mut cast).unwrap();
    cast
}

#[test]
fn scales_that_bitsandbytes_has_rounded_and_transposed_are_loaded_in_order() {
    for name in ["llama", "qwen2_tied"] {
        let golden = GoldenModel::unpack(name);
        let directory = TempDir::new().unwrap();
        let mut source = golden.tensors("nf4");
        let mut exact = golden.tensors("nf4");
        for weight in golden.linear_weights() {
            let rows = source.quant_state(&weight)["shape"][0].as_u64().unwrap() as usize;
            let key = format!("{weight}.absmax");
            let scales = exact.0.get_mut(&key).unwrap();
            let packed = packed_by_a_processor(scales, rows);
            let rounded = cast(&scales.data, FloatType::F32, FloatType::Bf16);
            scales.data = cast(&rounded, FloatType::Bf16, FloatType::F32);
            assert_ne!(packed.data, vec![0; packed.data.len()]);
            source.0.insert(key, packed);
        }
        source.write(&directory.path().join("model.safetensors"));
        fs::copy(
            golden.path("nf4").join("config.json"),
            directory.path().join("config.json"),
        )
        .unwrap();
        for devices in [SIM, &["cpu"], &["sim:1GiB", "sim:1GiB"]] {
            let planned = Planned::new(directory.path(), devices, &[]);
            let model = planned.load(&LoadOptions::default());
            let mut checked = 0;
            for weight in golden.linear_weights() {
                let context = format!("{name} on {devices:?}");
                check_weight(tensor(&model, &weight), &exact, &context);
                checked += 1;
            }
            assert!(checked > 10);
            // To the byte what it is with scales in f32.
            let usual = Planned::new(&golden.path("nf4"), devices, &[]);
            for (found, usual) in planned.plan.devices.iter().zip(&usual.plan.devices) {
                assert_eq!(found.size, usual.size);
            }
            assert_eq!(planned.checkpoint.remarks().len(), 1);
        }
        // What is saved is as bitsandbytes reads it.
        let target = directory.path().join("saved");
        save_with_auto(directory.path(), &target, &[]);
        let saved = written(&target);
        for weight in golden.linear_weights() {
            for part in ["", ".absmax"] {
                let key = format!("{weight}{part}");
                assert_eq!(saved.data(&key), exact.data(&key), "{key}, {name}");
            }
        }
    }
}

#[test]
fn experts_beside_weights_that_are_quantized_already_are_quantized_as_ever() {
    for name in MODELS {
        let golden = GoldenModel::unpack(name);
        let slices = golden.expert_slices().into_iter();
        let experts: BTreeSet<String> = slices.map(|slice| slice.name).collect();
        let from_bf16 = contents(&load_with_auto(&golden.path("bf16"), SIM, &[]));
        for saved in ["nf4", "nf4_dq"] {
            let model = load_with_auto(&golden.path(saved), SIM, &[]);
            assert_eq!(
                model.stats().quantized,
                experts.len() as u64,
                "{name}/{saved}"
            );
            for (tensor, stored) in contents(&model) {
                let quantized = matches!(stored.format, Format::Nf4 { .. });
                assert_eq!(
                    quantized,
                    experts.contains(&tensor),
                    "{tensor}, {name}/{saved}"
                );
                if quantized {
                    assert!(stored == from_bf16[&tensor], "{tensor}, {name}/{saved}");
                }
            }
        }
    }
}

/// A tensor that bitsandbytes quantized and dequantized again.
struct Case {
    file: String,
    tensors: FileTensors,
}

impl Case {
    fn all() -> Vec<Case> {
        let directory: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/quant");
        let index = fs::read(directory.join("index.json")).expect("there is an index");
        let index: Value = serde_json::from_slice(&index).expect("the index is JSON");
        let cases = index["cases"].as_array().expect("it lists cases").iter();
        cases
            .map(|case| {
                let file = case["file"].as_str().expect("a case is a file").to_owned();
                Case {
                    tensors: FileTensors::read(&directory.join(&file)),
                    file,
                }
            })
            .collect()
    }

    /// The case as a checkpoint of one weight, as transformers would have written it.
    fn write(&self, weight: &str, directory: &Path) -> FileTensors {
        let mut file = FileTensors::default();
        let mut add = |suffix: &str, tensor: &str| {
            if let Some(tensor) = self.tensors.0.get(tensor) {
                file.0.insert(format!("{weight}{suffix}"), tensor.clone());
            }
        };
        add("", "packed");
        for part in ["absmax", "quant_map", "nested_absmax", "nested_quant_map"] {
            add(&format!(".{part}"), part);
        }
        let state: Value = serde_json::from_slice(self.tensors.data("quant_state")).unwrap();
        let kind = state["quant_type"].as_str().expect("it has a type");
        add(&format!(".quant_state.bitsandbytes__{kind}"), "quant_state");
        file.write(&directory.join("model.safetensors"));
        file
    }
}

/// Equal numbers; those that are none count as equal.
fn same_numbers(found: &[u8], expected: &FileTensor) -> bool {
    let is_nan = |bytes: &[u8]| match expected.dtype {
        Dtype::BF16 => f32::from_bits(u32::from(u16_at(bytes)) << 16).is_nan(),
        Dtype::F16 => u16_at(bytes) & 0x7fff > 0x7c00,
        Dtype::F32 => f32::from_le_bytes(bytes.try_into().unwrap()).is_nan(),
        other => panic!("{other} is not dequantized to"),
    };
    let size = expected.dtype.bitsize() / 8;
    found.len() == expected.data.len()
        && found
            .chunks(size)
            .zip(expected.data.chunks(size))
            .all(|(a, b)| a == b || is_nan(a) && is_nan(b))
}

fn u16_at(bytes: &[u8]) -> u16 {
    u16::from_le_bytes([bytes[0], bytes[1]])
}

#[test]
fn every_kind_of_quantized_weight_is_loaded_as_it_is_and_has_the_values_of_bitsandbytes() {
    const WEIGHT: &str = "model.layers.0.mlp.up_proj.weight";
    let mut kinds = BTreeSet::new();
    let mut multiplied = 0;
    for case in Case::all() {
        let directory = TempDir::new().unwrap();
        let source = case.write(WEIGHT, directory.path());
        let model = load_with_auto(directory.path(), SIM, &[]);
        let loaded = tensor(&model, WEIGHT);
        check_weight(loaded, &source, &case.file);
        let is_multiplied = matches!(loaded.shape().len(), 2 | 3);
        multiplied += match is_multiplied {
            true => check_products(&model, loaded),
            false => 0,
        };
        for (name, to) in [
            ("dequant_bf16", FloatType::Bf16),
            ("dequant_f16", FloatType::F16),
            ("dequant_f32", FloatType::F32),
        ] {
            if let Some(expected) = case.tensors.0.get(name) {
                let found = loaded
                    .to_float(to)
                    .unwrap_or_else(|error| panic!("{error}"));
                assert!(same_numbers(&found, expected), "{name} of {}", case.file);
            }
        }

        // Written again, codes are bytes, whatever type they were stored as.
        let target = directory.path().join("saved");
        save_with_auto(directory.path(), &target, &[]);
        let mut expected = source.clone();
        let codes = expected.0.get_mut(WEIGHT).unwrap();
        let storage = std::mem::replace(&mut codes.dtype, Dtype::U8);
        codes.shape = vec![codes.data.len(), 1];
        assert_same_tensors(&written(&target), &expected, &case.file);

        let state = source.quant_state(WEIGHT);
        let double = state.get("nested_blocksize").is_some();
        kinds.insert(format!(
            "{} {double} {storage}",
            state["quant_type"].as_str().unwrap()
        ));
    }
    assert!(multiplied > kinds.len(), "{multiplied}");
    for kind in [
        "nf4 false U8",
        "nf4 true U8",
        "fp4 false U8",
        "fp4 true U8",
        "nf4 false BF16",
        "nf4 false F16",
        "nf4 false F32",
    ] {
        assert!(kinds.contains(kind), "{kind} is not among {kinds:?}");
    }
}
