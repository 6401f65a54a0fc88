//! The golden data of `tests/golden/quant`: what bitsandbytes gives.

use std::path::PathBuf;
use std::{env, fs};

use safetensors::SafeTensors;
use serde_json::Value;
use tightfit_kernels::{BlockSize, FloatType, QuantType};

use crate::values::floats;

/// A file of the golden data.
pub(crate) fn read(file: &str) -> Vec<u8> {
    // Cargo says where the crate is when it runs the test; without it, where it was built.
    let directory =
        env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let path = PathBuf::from(directory)
        .join("../tests/golden/quant")
        .join(file);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// One tensor that bitsandbytes has quantized.
pub(crate) struct Case<'a> {
    pub(crate) name: &'a str,
    pub(crate) quant_type: QuantType,
    pub(crate) float: FloatType,
    pub(crate) block_size: BlockSize,
    pub(crate) elements: usize,
    tensors: SafeTensors<'a>,
}

impl Case<'_> {
    pub(crate) fn bytes(&self, name: &str) -> Option<&[u8]> {
        self.tensors.tensor(name).ok().map(|tensor| tensor.data())
    }

    pub(crate) fn floats(&self, name: &str) -> Option<Vec<f32>> {
        self.bytes(name).map(floats)
    }

    /// The tensor that says what is right: the emulation of bitsandbytes' CUDA where there is one.
    pub(crate) fn truth(&self, name: &str) -> &[u8] {
        self.bytes(&format!("cudaref_{name}"))
            .or_else(|| self.bytes(name))
            .unwrap_or_else(|| panic!("{}: no {name}", self.name))
    }

    /// What quantizing gives before scales are quantized, too.
    pub(crate) fn absmax(&self) -> Vec<f32> {
        self.floats("absmax_before_double_quant")
            .unwrap_or_else(|| floats(self.truth("absmax")))
    }

    /// Codes and scales to be dequantized, with the prefix of what they give: bitsandbytes' own and,
    /// where there are any, those of the emulation of its CUDA.
    pub(crate) fn to_dequantize(&self) -> impl Iterator<Item = (&'static str, &[u8], Vec<f32>)> {
        ["", "cudaref_"].into_iter().filter_map(|prefix| {
            let packed = self.bytes(&format!("{prefix}packed"))?;
            let absmax = self
                .floats("absmax_dequantized")
                .or_else(|| self.floats(&format!("{prefix}absmax")))
                .expect("absmax");
            Some((prefix, packed, absmax))
        })
    }
}

/// Calls the function with every case; gives for how many it returned true.
pub(crate) fn count_cases(mut function: impl FnMut(&Case) -> bool) -> usize {
    let index: Value = serde_json::from_slice(&read("index.json")).expect("index.json");
    let cases = index["cases"].as_array().expect("cases");
    assert_eq!(cases.len(), 88);
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
