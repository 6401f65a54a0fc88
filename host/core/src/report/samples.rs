//! What the tests of several reports need.

use crate::checkpoint::TensorInfo;
use crate::device::{DeviceInfo, DeviceKind};
use crate::types::DType;

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
