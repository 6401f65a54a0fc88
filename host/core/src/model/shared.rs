//! Parts of tensors for those who outlive the model.

use std::sync::Arc;

use crate::device::{DeviceAddress, DeviceError, Reservation};

/// A part of a tensor. Its device's memory is not given back while this lives, whatever becomes of
/// the model. Nothing writes to it any more: every transfer had ended when the load returned, so
/// that any stream may read.
#[derive(Debug, Clone)]
pub struct SharedPart {
    /// `None` for a part of no bytes on a device that holds nothing else.
    memory: Option<Arc<dyn Reservation>>,
    offset: u64,
    bytes: u64,
}

impl SharedPart {
    pub(super) fn new(memory: Option<Arc<dyn Reservation>>, offset: u64, bytes: u64) -> SharedPart {
        SharedPart {
            memory,
            offset,
            bytes,
        }
    }

    /// Returns its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns the part in place, where the processor can read the device's memory.
    pub fn host(&self) -> Option<&[u8]> {
        match &self.memory {
            Some(memory) => host_bytes(&**memory, self.offset, self.bytes),
            None => Some(&[]),
        }
    }

    /// Returns where it lies in a GPU's memory, a multiple of 256; `None` for host memory.
    pub fn address(&self) -> Option<DeviceAddress> {
        address(&**self.memory.as_ref()?, self.offset)
    }

    /// Copies the part, whose length `out` has, wherever it is.
    ///
    /// # Errors
    /// When the device cannot be read, or `out` is longer than what is left of the reservation.
    pub fn read(&self, out: &mut [u8]) -> Result<(), DeviceError> {
        match &self.memory {
            Some(memory) => memory.read(self.offset, out),
            None => Ok(()),
        }
    }
}

/// Some bytes of a reservation in place, where the processor can read them.
pub(super) fn host_bytes(memory: &dyn Reservation, offset: u64, bytes: u64) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    let end = start.checked_add(usize::try_from(bytes).ok()?)?;
    memory.host_memory()?.get(start..end)
}

/// The address of a reservation's byte in a GPU's memory.
pub(super) fn address(memory: &dyn Reservation, offset: u64) -> Option<DeviceAddress> {
    let start = memory.address()?;
    Some(DeviceAddress {
        pointer: start.pointer + offset,
        ..start
    })
}
