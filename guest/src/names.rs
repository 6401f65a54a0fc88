//! What a tensor's name says: its module, its layer, what it is for.

use crate::{DType, Tensor};

pub use tightfit_common::names::{TensorKind, kind_of_module, layer_of, module_of, side_branch_of};

/// What a tensor is for, by its name, type and number of dimensions.
pub fn kind_of(tensor: &Tensor) -> TensorKind {
    tightfit_common::names::kind_of(&tensor.name, tensor.shape.len(), is_float(tensor.dtype))
}

fn is_float(dtype: DType) -> bool {
    match dtype {
        DType::F16 | DType::Bf16 | DType::F32 | DType::F64 => true,
        DType::F8E4m3 | DType::F8E5m2 => true,
        DType::Bool | DType::U8 | DType::I8 | DType::U16 | DType::I16 | DType::U32 => false,
        DType::I32 | DType::U64 | DType::I64 | DType::C64 => false,
        // Elements of block formats, and their scales.
        DType::F4 | DType::F6E2m3 | DType::F6E3m2 | DType::F8E8m0 => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_is_of_floats() {
        for (dtype, kind) in [
            (DType::Bf16, TensorKind::Linear),
            (DType::F8E4m3, TensorKind::Linear),
            (DType::U8, TensorKind::Other),
            (DType::F8E8m0, TensorKind::Other),
        ] {
            let tensor = Tensor {
                name: "model.layers.0.mlp.up_proj.weight".into(),
                dtype,
                shape: vec![8, 8],
                bytes: 64,
                quantized: None,
            };
            assert_eq!(kind_of(&tensor), kind, "{dtype:?}");
        }
    }
}
