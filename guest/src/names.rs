//! What a tensor's name says: its module, its layer, what it is for.

use crate::{Dtype, Tensor};

pub use tightfit_common::names::{TensorKind, kind_of_module, layer_of, module_of, side_branch_of};

/// Returns what a tensor is for, by its name, type and number of dimensions.
pub fn kind_of(tensor: &Tensor) -> TensorKind {
    tightfit_common::names::kind_of(&tensor.name, tensor.shape.len(), is_float(tensor.dtype))
}

fn is_float(dtype: Dtype) -> bool {
    match dtype {
        Dtype::F16 | Dtype::Bf16 | Dtype::F32 | Dtype::F64 => true,
        Dtype::F8E4m3 | Dtype::F8E5m2 => true,
        Dtype::Bool | Dtype::U8 | Dtype::I8 | Dtype::U16 | Dtype::I16 | Dtype::U32 => false,
        Dtype::I32 | Dtype::U64 | Dtype::I64 | Dtype::C64 => false,
        // Elements of block formats, and their scales.
        Dtype::F4 | Dtype::F6E2m3 | Dtype::F6E3m2 | Dtype::F8E8m0 => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_is_of_floats() {
        for (dtype, kind) in [
            (Dtype::Bf16, TensorKind::Linear),
            (Dtype::F8E4m3, TensorKind::Linear),
            (Dtype::U8, TensorKind::Other),
            (Dtype::F8E8m0, TensorKind::Other),
        ] {
            let tensor = Tensor::new("model.layers.0.mlp.up_proj.weight", dtype, &[8, 8]);
            assert_eq!(kind_of(&tensor), kind, "{dtype:?}");
        }
    }
}
