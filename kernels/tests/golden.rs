//! Every golden case, on every instruction set of this machine.

// The modules of the test on devices; not all of what they hold is needed here.
#[allow(dead_code)]
mod cases;
#[allow(dead_code)]
#[path = "cuda/values.rs"]
mod values;

use safetensors::SafeTensors;
use tightfit_kernels::{
    DYNAMIC_MAP, FP4, FloatType, Isa, Kernels, NESTED_BLOCK_SIZE, NF4, NF4_THRESHOLDS, QuantType,
    blocks, packed_bytes,
};

use crate::cases::{count_cases, read};
use crate::values::{assert_elements, assert_floats, cast, floats};

fn kernels() -> impl Iterator<Item = Kernels> {
    Isa::available().map(|isa| Kernels::new(isa).expect("available"))
}

/// Elements of a type as `f32`.
fn widen(bytes: &[u8], float: FloatType) -> Vec<f32> {
    floats(&cast(bytes, float, FloatType::F32))
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
    let cases = count_cases(|case| {
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
            assert_floats(&absmax, &case.absmax(), &what);
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
    let cases = count_cases(|case| {
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
    let cases = count_cases(|case| {
        for (prefix, packed, absmax) in case.to_dequantize() {
            for float in FloatType::ALL {
                let name = format!("{prefix}dequant_{float}");
                let Some(truth) = case.bytes(&name) else {
                    continue;
                };
                for kernels in kernels() {
                    let what = format!("{} {name} {}", case.name, kernels.isa());
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
                    assert_elements(&out, truth, float, &what);
                }
                tensors += 1;
            }
        }
        true
    });
    assert_eq!(cases, 88);
    assert!(tensors > 88, "{tensors} tensors");
}
