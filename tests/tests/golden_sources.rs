//! Weights that other methods have quantized, against what these methods' own programs make of them, and
//! bitsandbytes of that.

use std::collections::BTreeSet;

use safetensors::Dtype;
use tightfit::checkpoint::{Checkpoint, Dequantize};
use tightfit::device::{Device, open_devices};
use tightfit::load::LoadOptions;
use tightfit::model::Model;
use tightfit::plan::PartKind;
use tightfit::types::{BlockSize, DType, Format};
use tightfit_kernels::half::{bf16, f16};
use tightfit_kernels::{Isa, Kernels};
use tightfit_tests::loading::{part, tensor};
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
