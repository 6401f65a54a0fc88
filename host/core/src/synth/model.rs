//! What is to be written: tensors, what they are drawn from, and a configuration.

use crate::types::{DType, elements};

/// What a tensor's elements are drawn from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Values {
    /// Normal, mean 0, standard deviation 0.02: weights and biases, `BF16` or `F32`.
    AroundZero,
    /// Normal, mean 1, standard deviation 0.02: the weights of norms, `BF16` or `F32`.
    AroundOne,
    /// Normal, mean 0, standard deviation 112: weights in `F8_E4M3`, not yet scaled.
    Fp8Codes,
    /// Normal around 0.02 / 112: what makes of [`Values::Fp8Codes`] weights like those around zero,
    /// `F32`.
    Fp8Scales,
    /// Any bytes, two weights of MXFP4 in each: `U8`.
    Mxfp4Codes,
    /// 118 to 121, powers of two that make of [`Values::Mxfp4Codes`] weights about as large as those
    /// around zero: `U8`.
    Mxfp4Scales,
}

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Its key in the checkpoint.
    pub name: String,
    /// Its type; weights are written in those that [`Values`] names, headers of any type.
    pub dtype: DType,
    /// Row-major.
    pub shape: Vec<u64>,
    /// What its elements are drawn from.
    pub values: Values,
}

impl Tensor {
    /// Returns a bf16 tensor, drawn around one where the name is that of a norm's weight.
    pub fn new(name: impl Into<String>, shape: &[u64]) -> Tensor {
        let name = name.into();
        let module = name.strip_suffix(".weight").unwrap_or("");
        let leaf = module.rsplit('.').next().unwrap_or("");
        let values = if leaf
            .trim_end_matches(|c: char| c.is_ascii_digit())
            .ends_with("norm")
        {
            Values::AroundOne
        } else {
            Values::AroundZero
        };
        Tensor {
            name,
            dtype: DType::Bf16,
            shape: shape.to_vec(),
            values,
        }
    }

    /// Returns its elements, or `None` when they do not fit in 64 bits.
    pub fn elements(&self) -> Option<u64> {
        elements(&self.shape)
    }

    /// Returns how many of the model's parameters it holds: two in a byte of MXFP4, none in scales.
    /// `None` when they do not fit in 64 bits.
    pub fn parameters(&self) -> Option<u64> {
        let per_element = match self.values {
            Values::Fp8Scales | Values::Mxfp4Scales => 0,
            Values::Mxfp4Codes => 2,
            Values::AroundZero | Values::AroundOne | Values::Fp8Codes => 1,
        };
        self.elements()?.checked_mul(per_element)
    }
}

/// Any model, for shapes that no preset has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    /// Its tensors, in the order in which they are stored.
    pub tensors: Vec<Tensor>,
    /// The text of `config.json`.
    pub config_json: String,
}
