//! What a decoder computes between products, in a queue.

use tightfit_kernels::cuda::decoder::{self, Argument};

use super::super::kernels::Shape;
use super::super::stream::Stream;
use super::super::unavailable;
use super::CudaQueue;
use crate::device::{DeviceBytes, DeviceError, QueuedDecode};

impl CudaQueue {
    /// Operands have been checked and are kept, and the context is current.
    pub(super) fn decode(
        &self,
        stream: &Stream,
        given: &QueuedDecode,
        overlaps: bool,
    ) -> Result<(), DeviceError> {
        let name = self.context().name();
        let call = decoder::call(&given.operation, self.gpu()?);
        let call = call.map_err(|error| unavailable(name, error.to_string()))?;
        let Some(call) = call else {
            return Ok(());
        };
        let need = call.launch.workspace_bytes as u64;
        let have = given.workspace.as_ref().map_or(0, DeviceBytes::bytes);
        if have < need {
            return Err(self.operand(format!("the workspace has {have} bytes, need {need}")));
        }
        let at = |bytes: Option<&DeviceBytes>| bytes.map_or(0, |bytes| bytes.address().pointer);
        let arguments = call.arguments.iter().map(|argument| match argument {
            Argument::Operand(index) => at(given.operands.get(*index)),
            Argument::Faults => at(given.faults.as_ref()),
            Argument::Workspace if need == 0 => 0,
            Argument::Workspace => at(given.workspace.as_ref()),
            Argument::Number(number) => *number,
        });
        let mut arguments: Vec<u64> = arguments.collect();
        let shape = Shape {
            kernel: call.launch.kernel,
            grid: call.launch.grid,
            threads: call.launch.threads,
            shared_bytes: 0,
            overlaps,
        };
        // SAFETY: the arguments that the kernel has. Operands are as long and as aligned as the operation says,
        // the workspace as long as the launch does; all lie in this device's memory and are kept until the
        // stream is done. What ids and positions are the kernels look at themselves. That the counters are zero
        // cannot be looked at: with others results are not complete, and whatever they are, kernels write within
        // their operands.
        unsafe {
            self.decoder
                .launch_in(stream.raw, shape, &mut arguments, &[])
        }
    }
}
