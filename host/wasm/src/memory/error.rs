//! Why a program's memory cannot be had or used.

use crate::stop::Stopped;
use tightfit::device::DeviceError;
use tightfit::types::Bytes;

/// Why a program's memory cannot be had or used.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A device that is not there.
    #[error("there is no device {device}: there are {devices} (from 0)")]
    NoSuchDevice {
        /// The index given.
        device: u32,
        /// Number of devices there are.
        devices: usize,
    },
    /// More than the program may take.
    #[error("the quota is exceeded: need {}, have {}", Bytes(*need), Bytes(*have))]
    Quota {
        /// Bytes that would be reserved.
        need: u64,
        /// Bytes of the quota that are left.
        have: u64,
    },
    /// The device has too little memory, or failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A range outside of a buffer.
    #[error("{bytes} bytes from {offset} on lie outside of a buffer of {len}")]
    OutOfBounds {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        bytes: u64,
        /// Length of the buffer.
        len: u64,
    },
    /// The program is to end.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

impl MemoryError {
    /// Returns whether less memory might have been had.
    pub(crate) fn is_short(&self) -> bool {
        use DeviceError::{Driver, OutOfMemory};
        match self {
            MemoryError::Quota { .. } | MemoryError::Device(OutOfMemory { .. }) => true,
            MemoryError::Device(Driver { out_of_memory, .. }) => *out_of_memory,
            _ => false,
        }
    }
}
