//! The golden data of `tests/golden/quant`: what bitsandbytes gives.

use std::path::PathBuf;
use std::{env, fs};

use safetensors::SafeTensors;
use serde_json::Value;
use tightfit_kernels::{BlockSize, FloatType, QuantType};

use crate::calls::{self, Misaligned};
use crate::device::Device;
use crate::values::{assert_elements, assert_floats, floats};

fn read(file: &str) -> Vec<u8> {
    // Cargo says where the crate is when it runs the test; without it, where it was built.
    let directory =
        env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let path = PathBuf::from(directory)
        .join("../tests/golden/quant")
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
        self.bytes(name).map(floats)
    }

    /// The tensor that says what is right: the emulation of bitsandbytes' CUDA where there is one.
    fn truth(&self, name: &str) -> &[u8] {
        self.bytes(&format!("cudaref_{name}"))
            .or_else(|| self.bytes(name))
            .unwrap_or_else(|| panic!("{}: no {name}", self.name))
    }
}

/// Calls the function with every case; gives for how many it returned true.
fn count_cases(mut function: impl FnMut(&Case) -> bool) -> usize {
    let index: Value = serde_json::from_slice(&read("index.json")).expect("index.json");
    let cases = index["cases"].as_array().expect("cases");
    let size = |value: &Value| value.as_u64().expect("a size") as usize;
    cases
        .iter()
        .filter(|case| {
            let name = case["file"].as_str().expect("file");
            let file = read(name);
            function(&Case {
                name,
                quant_type: match case["quant_type"].as_str() {
                    Some("nf4") => QuantType::Nf4,
                    Some("fp4") => QuantType::Fp4,
                    other => panic!("quant_type {other:?}"),
                },
                float: FloatType::ALL
                    .into_iter()
                    .find(|float| case["dtype"] == float.to_string())
                    .expect("dtype"),
                block_size: BlockSize::new(size(&case["blocksize"])).expect("blocksize"),
                elements: case["shape"]
                    .as_array()
                    .expect("shape")
                    .iter()
                    .map(size)
                    .product(),
                tensors: SafeTensors::deserialize(&file).expect(name),
            })
        })
        .count()
}

pub(crate) fn quantizing(device: &mut dyn Device) {
    let cases = count_cases(|case| {
        if case.quant_type != QuantType::Nf4 {
            return false;
        }
        let input = case.bytes("input").expect("input");
        let misaligned = Misaligned::default();
        let have = calls::quantize(device, input, case.float, case.block_size, misaligned);
        assert!(have.packed == case.truth("packed"), "{}", case.name);
        let absmax = match case.floats("absmax_before_double_quant") {
            Some(absmax) => absmax,
            None => floats(case.truth("absmax")),
        };
        assert_floats(&floats(&have.absmax), &absmax, case.name);
        true
    });
    assert_eq!(cases, 83);
}

pub(crate) fn double_quantizing(device: &mut dyn Device) {
    let cases = count_cases(|case| {
        let Some(absmax) = case.floats("absmax_before_double_quant") else {
            return false;
        };
        let offset = case.floats("nested_offset").expect("nested_offset")[0];
        let mean = calls::absmax_mean(device, &absmax);
        let ulps = mean.to_bits().abs_diff(offset.to_bits());
        assert!(ulps <= 2, "{}: mean {mean}, offset {offset}", case.name);

        let (codes, nested) = calls::quantize_absmax(device, &absmax, offset);
        assert!(codes == case.truth("absmax"), "{}", case.name);
        assert_floats(&nested, &floats(case.truth("nested_absmax")), case.name);
        let out = calls::dequantize_absmax(device, &codes, &nested, offset);
        let need = floats(case.truth("absmax_dequantized"));
        assert_floats(&out, &need, case.name);
        true
    });
    assert_eq!(cases, 9);
}

pub(crate) fn dequantizing_all(device: &mut dyn Device) {
    let mut tensors = 0;
    let cases = count_cases(|case| {
        for prefix in ["", "cudaref_"] {
            let Some(packed) = case.bytes(&format!("{prefix}packed")) else {
                continue;
            };
            let absmax = match case.floats("absmax_dequantized") {
                Some(absmax) => absmax,
                None => case.floats(&format!("{prefix}absmax")).expect("absmax"),
            };
            for float in FloatType::ALL {
                let Some(truth) = case.bytes(&format!("{prefix}dequant_{float}")) else {
                    continue;
                };
                let out = calls::dequantize(
                    device,
                    case.quant_type,
                    packed,
                    &absmax,
                    case.block_size,
                    case.elements,
                    float,
                    Misaligned::default(),
                );
                assert_elements(&out, truth, float, case.name);
                tensors += 1;
            }
        }
        true
    });
    assert_eq!(cases, 88);
    assert!(tensors > 88, "{tensors} tensors");
}
