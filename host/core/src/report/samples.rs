//! What the tests of several reports need.

use crate::checkpoint::TensorInfo;
use crate::device::DeviceInfo;
use crate::testing;
use crate::types::DType;

pub(super) fn tensor(name: &str, shape: &[u64]) -> TensorInfo {
    testing::tensor(name, DType::Bf16, shape)
}

pub(super) fn device(index: usize, capacity: u64) -> DeviceInfo {
    testing::device(&format!("sim:{index}"), capacity, 4096)
}
