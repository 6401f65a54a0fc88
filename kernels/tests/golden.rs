//! Every golden case, on every instruction set of this machine.

use std::{fs, path::PathBuf};

use safetensors::SafeTensors;
use serde_json::Value;
use tightfit_kernels::{
    BlockSize, DYNAMIC_MAP, FP4, FloatType, Isa, Kernels, NESTED_BLOCK_SIZE, NF4, NF4_THRESHOLDS,
    QuantType, blocks, packed_bytes,
};

fn read(file: &str) -> Vec<u8> {
    let path = PathBuf::from(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../tests/golden/quant"
    ))
    .join(file);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

struct Case<'a> {
    name: &'a str,
    quant_type: QuantType,
    float: FloatType,
    block_size: BlockSize,
    elements: usize,
    tensors: SafeTensors<'a>,
}

impl Case<'_> {
    fn bytes(&self, name: &str) -> Option<&[u8]> {
        self.tensors.tensor(name).ok().map(|tensor| tensor.data())
    }

    fn floats(&self, name: &str) -> Option<Vec<f32>> {
        Some(floats(self.bytes(name)?))
    }

    /// The tensor that says what is right: the emulation of CUDA where there is one.
    fn truth(&self, name: &str) -> &[u8] {
        self.bytes(&format!("cudaref_{name}"))
            .or_else(|| self.bytes(name))
            .unwrap_or_else(|| panic!("no {name}"))
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect()
}

fn kernels() -> impl Iterator<Item = Kernels> {
    Isa::available().map(|isa| Kernels::new(isa).expect("available"))
}

/// Calls the function with every case; returns for how many it returned true.
fn for_each_case(mut function: impl FnMut(&Case) -> bool) -> usize {
    let index: Value = serde_json::from_slice(&read("index.json")).expect("index.json");
    let cases = index["cases"].as_array().expect("cases");
    assert_eq!(cases.len(), 88);
    let mut count = 0;
    for case in cases {
        let name = case["file"].as_str().expect("file");
        let file = read(name);
        count += usize::from(function(&Case {
            name,
            quant_type: match case["quant_type"].as_str() {
                Some("nf4") => QuantType::Nf4,
                Some("fp4") => QuantType::Fp4,
                other => panic!("quant_type {other:?}"),
            },
            float: match case["dtype"].as_str() {
                Some("bf16") => FloatType::Bf16,
                Some("f16") => FloatType::F16,
                Some("f32") => FloatType::F32,
                other => panic!("dtype {other:?}"),
            },
            block_size: BlockSize::new(case["blocksize"].as_u64().expect("blocksize") as usize)
                .expect("blocksize"),
            elements: case["shape"]
                .as_array()
                .expect("shape")
                .iter()
                .map(|n| n.as_u64().expect("size") as usize)
                .product(),
            tensors: SafeTensors::deserialize(&file).expect(name),
        }));
    }
    count
}

/// Equal bits, or both NaN.
fn assert_floats(have: &[f32], need: &[f32], what: &str) {
    assert_eq!(have.len(), need.len(), "{what}");
    for (i, (have, need)) in have.iter().zip(need).enumerate() {
        let same = have.to_bits() == need.to_bits() || have.is_nan() && need.is_nan();
        assert!(same, "{what}: element {i} is {have:e}, should be {need:e}");
    }
}

/// Bytes of floats as `f32`, for comparing.
fn widen(bytes: &[u8], float: FloatType) -> Vec<f32> {
    let mut wide = vec![0; bytes.len() / float.bytes() * 4];
    Kernels::new(Isa::Portable)
        .expect("portable")
        .cast(bytes, float, FloatType::F32, &mut wide)
        .expect("lengths");
    floats(&wide)
}

#[test]
fn tables() {
    let file = read("tables.safetensors");
    let tables = SafeTensors::deserialize(&file).expect("tables");
    let bits = |name: &str| {
        floats(tables.tensor(name).expect(name).data())
            .iter()
            .map(|x| x.to_bits())
            .collect::<Vec<_>>()
    };
    assert_eq!(bits("nf4"), NF4.map(f32::to_bits));
    assert_eq!(bits("fp4"), FP4.map(f32::to_bits));
    assert_eq!(bits("dynamic_map"), DYNAMIC_MAP.map(f32::to_bits));
    assert_eq!(
        bits("nf4_cuda_thresholds"),
        NF4_THRESHOLDS.map(f32::to_bits)
    );
}

#[test]
fn quantize() {
    let cases = for_each_case(|case| {
        if case.quant_type != QuantType::Nf4 {
            return false;
        }
        for kernels in kernels() {
            let what = format!("{} {}", case.name, kernels.isa());
            let mut packed = vec![0xee; packed_bytes(case.elements)];
            let mut absmax = vec![f32::NAN; blocks(case.elements, case.block_size)];
            let input = case.bytes("input").expect("input");
            let stats = kernels
                .quantize_nf4(input, case.float, case.block_size, &mut packed, &mut absmax)
                .expect("lengths");
            assert!(packed == case.truth("packed"), "{what}: packed");
            let truth = match case.floats("absmax_before_double_quant") {
                Some(absmax) => absmax,
                None => floats(case.truth("absmax")),
            };
            assert_floats(&absmax, &truth, &what);
            let block_bytes = case.block_size.elements() * case.float.bytes();
            let nonfinite = input
                .chunks(block_bytes)
                .filter(|block| widen(block, case.float).iter().any(|x| !x.is_finite()));
            assert_eq!(stats.nonfinite_blocks, nonfinite.count() as u64, "{what}");
        }
        true
    });
    assert_eq!(cases, 83);
}

#[test]
fn double_quantize() {
    let cases = for_each_case(|case| {
        let Some(absmax) = case.floats("absmax_before_double_quant") else {
            return false;
        };
        let offset = case.floats("nested_offset").expect("nested_offset")[0];
        for kernels in kernels() {
            let what = format!("{} {}", case.name, kernels.isa());
            let mean = kernels.absmax_mean(&absmax);
            let ulps = mean.to_bits().abs_diff(offset.to_bits());
            assert!(ulps <= 2, "{what}: mean {mean}, offset {offset}");

            let mut codes = vec![0xee; absmax.len()];
            let mut nested = vec![f32::NAN; absmax.len().div_ceil(NESTED_BLOCK_SIZE)];
            kernels
                .quantize_absmax(&absmax, offset, &mut codes, &mut nested)
                .expect("lengths");
            assert!(codes == case.truth("absmax"), "{what}: codes");
            assert_floats(&nested, &floats(case.truth("nested_absmax")), &what);

            for prefix in ["cudaref_", ""] {
                let tensor = |name: &str| case.bytes(&format!("{prefix}{name}")).expect(name);
                let mut dequantized = vec![f32::NAN; absmax.len()];
                let nested = floats(tensor("nested_absmax"));
                kernels
                    .dequantize_absmax(tensor("absmax"), &nested, offset, &mut dequantized)
                    .expect("lengths");
                assert_floats(&dequantized, &floats(tensor("absmax_dequantized")), &what);
            }
        }
        true
    });
    assert_eq!(cases, 9);
}

#[test]
fn dequantize() {
    let mut tensors = 0;
    let cases = for_each_case(|case| {
        for (packed, absmax, prefix) in [
            ("packed", "absmax", ""),
            ("cudaref_packed", "cudaref_absmax", "cudaref_"),
        ] {
            let Some(packed) = case.bytes(packed) else {
                continue;
            };
            let absmax = match case.floats("absmax_dequantized") {
                Some(absmax) => absmax,
                None => case.floats(absmax).expect("absmax"),
            };
            for (name, float) in [
                ("dequant_bf16", FloatType::Bf16),
                ("dequant_f16", FloatType::F16),
                ("dequant_f32", FloatType::F32),
            ] {
                let Some(truth) = case.bytes(&format!("{prefix}{name}")) else {
                    continue;
                };
                for kernels in kernels() {
                    let what = format!("{} {prefix}{name} {}", case.name, kernels.isa());
                    let mut out = vec![0xee; case.elements * float.bytes()];
                    kernels
                        .dequantize(
                            case.quant_type,
                            packed,
                            &absmax,
                            case.block_size,
                            case.elements,
                            float,
                            &mut out,
                        )
                        .expect("lengths");
                    assert_floats(&widen(&out, float), &widen(truth, float), &what);
                }
                tensors += 1;
            }
        }
        true
    });
    assert_eq!(cases, 88);
    assert!(tensors > 88, "{tensors} tensors");
}
