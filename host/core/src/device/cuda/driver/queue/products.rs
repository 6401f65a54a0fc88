//! Products in a queue.

use tightfit_kernels::BlockSize;
use tightfit_kernels::cuda::linear::Linear;

use super::super::multiply::{self, Found};
use super::super::stream::Stream;
use super::CudaQueue;
use crate::device::{
    DeviceBytes, DeviceError, DeviceOperands, Product, QueuedProduct, QueuedScales,
};

/// A product whose pointers are aligned.
pub(super) fn linear(
    product: &Product,
    outputs: usize,
    inputs: usize,
    block_size: BlockSize,
) -> Linear {
    Linear {
        float: product.float,
        rows: product.rows,
        outputs,
        inputs,
        block_size,
        aligned: true,
        by_row: product.by_row,
    }
}

fn at(bytes: &DeviceBytes) -> u64 {
    bytes.address().pointer
}

impl CudaQueue {
    /// Operands have been checked and are kept, and the context is current.
    pub(super) fn multiply(
        &self,
        stream: &Stream,
        given: &QueuedProduct,
    ) -> Result<(), DeviceError> {
        let weights = &given.weights;
        if given.product.rows == 0 || weights.outputs == 0 {
            return Ok(());
        }
        let (outputs, inputs) = (weights.outputs, weights.inputs);
        let linear = linear(&given.product, outputs, inputs, weights.block_size);
        let found = match &weights.scales {
            QueuedScales::Absmax(absmax) => Found {
                codes: at(&weights.codes),
                absmax: at(absmax),
                nested: [0; 3],
            },
            QueuedScales::Double {
                codes,
                nested,
                mean,
                map,
            } => Found {
                codes: at(&weights.codes),
                absmax: at(codes),
                nested: [at(nested), at(mean), at(map)],
            },
        };
        let mut operands = DeviceOperands::new(at(&given.x), at(&given.y), stream.raw.cast());
        if let Some(bias) = &given.bias {
            operands = operands.with_bias(at(bias));
        }
        if let Some(workspace) = &given.workspace {
            operands = operands.with_workspace(at(workspace), workspace.bytes());
        }
        let (gpu, quant_type) = (self.gpu()?, weights.quant_type);
        // SAFETY: all of it has been checked, lies in this device's memory and is kept until the stream is
        // done. That the counters are zero cannot be looked at: with others sums are not complete, and
        // whatever they are, kernels write within y and the workspace.
        unsafe { multiply::launch(&self.products, gpu, linear, quant_type, &found, &operands) }
    }
}
