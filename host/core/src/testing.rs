//! What several tests need, those of crates that build on this one too.

use std::path::Path;

use tightfit_kernels::{FloatType, Kernels};

use crate::checkpoint::TensorInfo;
use crate::device::{DeviceInfo, DeviceKind};
use crate::types::DType;

/// Returns a tensor of a checkpoint that is not quantized, at the beginning of the first shard.
pub fn tensor(name: &str, dtype: DType, shape: &[u64]) -> TensorInfo {
    TensorInfo {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
        bytes: dtype.tensor_bytes(shape).unwrap(),
        shard: 0,
        offset: 0,
        quantized: None,
        encoded: None,
        piece: None,
    }
}

/// Returns a simulated device, all of which is free.
pub fn device(name: &str, capacity: u64, granularity: u64) -> DeviceInfo {
    DeviceInfo {
        name: name.to_owned(),
        kind: DeviceKind::Sim,
        capacity,
        available: capacity,
        granularity,
    }
}

/// A tensor of a test checkpoint: pseudo-random weights, the same on every run.
#[derive(Debug)]
pub struct Source {
    /// Its key.
    pub name: &'static str,
    /// Type of its elements.
    pub dtype: DType,
    /// Row-major.
    pub shape: Vec<u64>,
    /// Its elements, little-endian.
    pub bytes: Vec<u8>,
}

/// Returns a tensor whose weights follow from its name.
pub fn source(name: &'static str, dtype: DType, shape: &[u64]) -> Source {
    let elements: u64 = shape.iter().product();
    let mut state = name
        .bytes()
        .fold(7u64, |h, b| h.wrapping_mul(31) + u64::from(b));
    let values: Vec<u8> = (0..elements)
        .flat_map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
            (((state >> 33) as f32) / (1u64 << 30) as f32 - 1.0).to_le_bytes()
        })
        .collect();
    let bytes = match dtype.float_type() {
        Some(float) => {
            let mut bytes = vec![0; elements as usize * float.bytes()];
            Kernels::detect()
                .cast(&values, FloatType::F32, float, &mut bytes)
                .unwrap();
            bytes
        }
        None => {
            let length = dtype.tensor_bytes(shape).unwrap() as usize;
            values.into_iter().cycle().take(length).collect()
        }
    };
    Source {
        name,
        dtype,
        shape: shape.to_vec(),
        bytes,
    }
}

/// Writes these tensors, in this order, into the only file of a checkpoint.
pub fn write_checkpoint(directory: &Path, sources: &[Source]) {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for source in sources {
        let start = data.len();
        data.extend_from_slice(&source.bytes);
        header.insert(
            source.name.to_owned(),
            serde_json::json!({
                "dtype": source.dtype.safetensors_name(),
                "shape": source.shape,
                "data_offsets": [start, data.len()],
            }),
        );
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    std::fs::write(directory.join("model.safetensors"), file).unwrap();
}
