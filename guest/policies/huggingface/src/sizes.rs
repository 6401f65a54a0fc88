//! Bytes as accelerate and transformers count them: no scales, no padding, no staging.
//!
//! In f64, as they do in Python, where half a byte makes a float of every sum: so that the same
//! sums are compared with the same bounds. They are exact up to 2^52 bytes.

use tightfit_guest::names::TensorKind::{self, OutputHead};
use tightfit_guest::tree::ModuleId;
use tightfit_guest::{Dtype, Format, Request, Tensor};

use crate::model::Model;
use crate::options::{Library, Options};

/// Bytes of everything.
#[derive(Debug)]
pub(crate) struct Sizes {
    /// By tensor. Nothing for those that are not in the tree.
    pub(crate) tensors: Vec<f64>,
    /// By module, with all below it.
    pub(crate) modules: Vec<f64>,
    /// Whether there is a 4-bit weight at all. Without any there is no quantizer, which makes a
    /// difference to more than sizes.
    pub(crate) quantized: bool,
}

impl Sizes {
    pub(crate) fn new(
        request: &Request,
        model: &Model<'_>,
        kinds: &[TensorKind],
        formats: &[Format],
        options: &Options,
    ) -> Sizes {
        let is_4_bit = |t: usize| {
            request.tensors[t].quantized.is_some() || matches!(formats[t], Format::Nf4(_))
        };
        let quantized = (0..formats.len()).any(is_4_bit);
        let mut tensors = vec![0.0; request.tensors.len()];
        let mut buffers = vec![0.0; model.tree.len()];
        for &(module, elements) in &model.buffers {
            buffers[module.index()] += elements as f64
                * match options.library {
                    Library::Accelerate if quantized => 0.5,
                    _ => 4.0,
                };
        }
        for module in model.tree.modules() {
            let own = model.tree.tensors(module);
            // bitsandbytes makes its own linear layers, and transformers leaves their biases in
            // torch's default type until they are loaded.
            let in_4_bits = options.library == Library::Transformers
                && own
                    .iter()
                    .any(|&t| is_4_bit(t as usize) && kinds[t as usize] == TensorKind::Linear);
            for &t in own {
                let t = t as usize;
                let tensor = &request.tensors[t];
                let dtype = match formats[t] {
                    Format::Cast(to) => to,
                    _ => tensor.dtype,
                };
                let per_element = match options.library {
                    _ if !quantized => bytes_of(dtype),
                    Library::Accelerate => {
                        let kept = kinds[t] == OutputHead
                            || options.formats.skip.matches(&tensor.name)
                            || !is_float(dtype);
                        if kept && tensor.quantized.is_none() {
                            bytes_of(dtype)
                        } else {
                            bytes_of(dtype).min(0.5)
                        }
                    }
                    Library::Transformers if is_4_bit(t) => 0.5,
                    Library::Transformers if in_4_bits && kinds[t] == TensorKind::Bias => 4.0,
                    Library::Transformers => bytes_of(dtype),
                };
                tensors[t] = elements(tensor) * per_element;
            }
        }
        let own = |module: ModuleId| {
            let own = model.tree.tensors(module).iter();
            own.map(|&t| tensors[t as usize]).sum::<f64>() + buffers[module.index()]
        };
        let modules = model.tree.sums(own);
        Sizes {
            tensors,
            modules,
            quantized,
        }
    }

    /// Of a module with all below it.
    pub(crate) fn of(&self, module: ModuleId) -> f64 {
        self.modules[module.index()]
    }
}

fn elements(tensor: &Tensor) -> f64 {
    tensor.shape.iter().map(|&length| length as f64).product()
}

fn bytes_of(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F4 => 0.5,
        Dtype::F6E2m3 | Dtype::F6E3m2 => 0.75,
        Dtype::Bool | Dtype::U8 | Dtype::I8 => 1.0,
        Dtype::F8E4m3 | Dtype::F8E5m2 | Dtype::F8E8m0 => 1.0,
        Dtype::U16 | Dtype::I16 | Dtype::F16 | Dtype::Bf16 => 2.0,
        Dtype::U32 | Dtype::I32 | Dtype::F32 => 4.0,
        Dtype::U64 | Dtype::I64 | Dtype::F64 | Dtype::C64 => 8.0,
    }
}

fn is_float(dtype: Dtype) -> bool {
    matches!(
        dtype,
        Dtype::F16 | Dtype::Bf16 | Dtype::F32 | Dtype::F64 | Dtype::F8E4m3 | Dtype::F8E5m2
    )
}
