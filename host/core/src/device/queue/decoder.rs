//! What a decoder computes between products, in a queue.

use tightfit_kernels::decoder;

use super::operation::Operand;
use crate::device::DeviceBytes;

/// An operation of [`tightfit_kernels::decoder`], on ranges of a device's memory.
#[derive(Debug, Clone)]
pub struct QueuedDecode {
    /// What is computed.
    pub operation: decoder::Operation,
    /// In the order of [`decoder::Operation::operands`].
    pub operands: Vec<DeviceBytes>,
    /// A u32 in which bits are set, [`decoder::Faults`]. `None` where none can be found.
    pub faults: Option<DeviceBytes>,
    /// To work in: [`super::Queue::decode_workspace_bytes`], at a multiple of 256. Its first 16 KiB are zero
    /// before its first operation, and again after each. `None` where none is needed.
    pub workspace: Option<DeviceBytes>,
}

impl QueuedDecode {
    /// Looks whether there can be such an operation, and whether it has its operands.
    pub(super) fn check(&self) -> Result<(), String> {
        self.operation.check().map_err(|error| error.to_string())?;
        let (need, have) = (self.operation.operands().len(), self.operands.len());
        if have != need {
            return Err(format!("{have} operands, need {need}"));
        }
        match self.operation.may_find_faults() && self.faults.is_none() {
            true => Err("there is no place for faults".to_owned()),
            false => Ok(()),
        }
    }

    pub(super) fn operands(&self) -> Vec<Operand<'_>> {
        let shapes = self.operation.operands().into_iter();
        let operands = shapes.zip(&self.operands).map(|(shape, bytes)| Operand {
            name: shape.name,
            bytes,
            need: shape.bytes() as u64,
            align: shape.align as u64,
            is_written: shape.is_written,
            is_weight: false,
        });
        let faults = self.faults.as_ref();
        let faults = faults.map(|bytes| Operand::written("the word of faults", bytes, 1, 4));
        let workspace = self.workspace.as_ref().map(|bytes| Operand {
            name: "the workspace",
            bytes,
            need: bytes.bytes(),
            align: 256,
            is_written: true,
            is_weight: false,
        });
        operands.chain(faults).chain(workspace).collect()
    }
}
