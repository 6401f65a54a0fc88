//! What products with 4-bit weights need beside them on an accelerator: a workspace, and constants.

use tightfit_kernels::FloatType;
use tightfit_kernels::cuda::linear::Linear;

use super::{PART_ALIGNMENT, round_up};
use crate::cancel::{Cancelled, Watch};
use crate::checkpoint::TensorInfo;
use crate::device::DeviceInfo;
use crate::types::{BlockSize, Format};

/// Bytes of the values of double quantization's codes, and of one weight's mean with what aligns it.
const MAP_BYTES: u64 = 256 * 4;
/// Kernels want every pointer at a multiple of this many bytes.
pub(crate) const MEAN_BYTES: u64 = 16;

/// Bytes of what a device has to have beside this many double-quantized weights.
pub(crate) const fn constants_bytes(double_quantized: u64) -> u64 {
    match double_quantized {
        0 => 0,
        weights => MAP_BYTES + MEAN_BYTES * weights,
    }
}

/// Whether products are of weights with such a shape: matrices, and stacks of matrices.
pub(crate) fn is_multiplied(shape: &[u64]) -> bool {
    matches!(shape.len(), 2 | 3)
}

/// What products of up to some number of rows need on one device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct ProductBytes {
    /// Of the weight that needs most of it: all share one.
    workspace: u64,
    double_quantized: u64,
}

impl ProductBytes {
    /// Adds a weight in a format, if that has 4 bits.
    pub(super) fn add(&mut self, tensor: &TensorInfo, format: Format, rows: u64) {
        match (format, &tensor.quantized) {
            (
                Format::Nf4 {
                    block_size,
                    double_quantized,
                },
                _,
            ) => self.add_weight(&tensor.shape, block_size, double_quantized, rows),
            (Format::Stored, Some(quantized)) => {
                let double_quantized = quantized.nested.is_some();
                self.add_weight(&tensor.shape, quantized.block_size, double_quantized, rows);
            }
            _ => {}
        }
    }

    /// Adds a weight that may be placed in 4 bits.
    pub(super) fn add_possible(&mut self, tensor: &TensorInfo, rows: u64) {
        if tensor.quantized.is_some() || tensor.dtype.is_quantizable() {
            self.add_weight(&tensor.shape, BlockSize::DEFAULT, true, rows);
        }
    }

    fn add_weight(&mut self, shape: &[u64], block_size: BlockSize, double: bool, rows: u64) {
        if !is_multiplied(shape) {
            return;
        }
        self.double_quantized += u64::from(double);
        let length = |length: u64| usize::try_from(length).unwrap_or(usize::MAX);
        let [.., outputs, inputs] = *shape else {
            return;
        };
        for by_row in [false, true] {
            let linear = Linear {
                float: FloatType::Bf16,
                rows: length(rows),
                outputs: length(outputs),
                inputs: length(inputs),
                block_size,
                aligned: true,
                by_row,
            };
            let bytes = linear.most_workspace_bytes(None) as u64;
            self.workspace = self.workspace.max(bytes);
        }
    }

    /// All bytes, of which every allocation begins at a multiple of the alignment.
    pub(super) fn bytes(self) -> u64 {
        let constants = constants_bytes(self.double_quantized);
        round_up(self.workspace, PART_ALIGNMENT) + round_up(constants, PART_ALIGNMENT)
    }
}

/// What a policy is not offered of each device, because products will need it there.
///
/// # Errors
/// [`Cancelled`].
pub(super) fn most_bytes(
    tensors: &[TensorInfo],
    rows: u64,
    watch: &mut Watch<'_>,
) -> Result<u64, Cancelled> {
    let mut most = ProductBytes::default();
    for tensor in tensors {
        watch.item(0)?;
        most.add_possible(tensor, rows);
    }
    Ok(most.bytes())
}

/// Whether products on a device need something beside the weights. A simulated one stands for one that
/// does.
pub(super) fn are_computed_on(device: &DeviceInfo) -> bool {
    device.kind.is_accelerator()
}
