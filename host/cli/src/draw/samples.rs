//! What the tests of several reports need.

use tightfit::checkpoint::TensorInfo;
use tightfit::device::{DeviceInfo, DeviceKind};
use tightfit::types::DType;

pub(super) fn tensor(name: &str, shape: &[u64]) -> TensorInfo {
    TensorInfo {
        name: name.to_owned(),
        dtype: DType::Bf16,
        shape: shape.to_vec(),
        bytes: DType::Bf16.tensor_bytes(shape).unwrap(),
        shard: 0,
        offset: 0,
        quantized: None,
    }
}

pub(super) fn device(index: usize, capacity: u64) -> DeviceInfo {
    DeviceInfo {
        name: format!("sim:{index}"),
        kind: DeviceKind::Sim,
        capacity,
        available: capacity,
        granularity: 4096,
    }
}

/// Tensors of a decoder with `layers` layers of a matrix and a norm.
pub(super) fn decoder(layers: u32) -> Vec<TensorInfo> {
    let mut tensors = vec![tensor("model.embed_tokens.weight", &[100, 64])];
    for layer in 0..layers {
        tensors.push(tensor(
            &format!("model.layers.{layer}.mlp.up_proj.weight"),
            &[64, 64],
        ));
        tensors.push(tensor(
            &format!("model.layers.{layer}.input_layernorm.weight"),
            &[64],
        ));
    }
    tensors.push(tensor("model.norm.weight", &[64]));
    tensors.push(tensor("lm_head.weight", &[100, 64]));
    tensors
}
