//! What loading a model took.

use std::time::Duration;

/// What a load did.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LoadStats {
    /// Time of the reservations, and from there to the last byte.
    pub elapsed: Duration,
    /// Bytes read from the checkpoint.
    pub bytes_read: u64,
    /// Tensors that were quantized.
    pub quantized: u64,
    /// Tensors that were stored as they are or cast.
    pub stored: u64,
    /// Quantized tensors with infinities or NaN: index and number of blocks that have one.
    pub nonfinite: Vec<(usize, u64)>,
    /// Who quantized for each device, in the order of the plan.
    pub quantized_on: Vec<QuantizedBytes>,
    /// Bytes of the staging ring and of the page-locked buffers.
    pub staging_bytes: u64,
    /// Bytes allowed for the f32 scales of double-quantized tensors in flight.
    pub scratch_bytes: u64,
}

/// Bytes of the checkpoint that were quantized for one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QuantizedBytes {
    /// By the processor.
    pub by_host: u64,
    /// By the device itself.
    pub by_device: u64,
}

impl LoadStats {
    /// Blocks with infinities or NaN in all tensors.
    pub fn nonfinite_blocks(&self) -> u64 {
        self.nonfinite.iter().map(|(_, blocks)| blocks).sum()
    }
}
