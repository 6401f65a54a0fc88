//! What the tests of several reports need.

use tightfit::checkpoint::TensorInfo;
use tightfit::device::DeviceInfo;
use tightfit::testing;
use tightfit::types::DType;

pub(super) fn tensor(name: &str, shape: &[u64]) -> TensorInfo {
    testing::tensor(name, DType::Bf16, shape)
}

pub(super) fn device(index: usize, capacity: u64) -> DeviceInfo {
    testing::device(&format!("sim:{index}"), capacity, 4096)
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
