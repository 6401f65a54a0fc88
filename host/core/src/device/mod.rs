//! Where tensors can be put: the trait that every device implements, and the devices there are.

#[cfg(feature = "cuda")]
mod cuda;
// Without GPUs only plans count with it.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) mod experts;
mod host;
mod host_memory;
// Declares what is called with pointers that nobody can check; calls nothing.
#[allow(unsafe_code)]
mod multiplier;
mod quantizer;
mod queue;
mod ranked;
mod spec;
mod writer;

use std::fmt;
use std::sync::Arc;

#[cfg(feature = "cuda")]
pub use cuda::CudaDevice;
pub use host::HostDevice;
pub use multiplier::{
    DeviceBytes, DeviceExpertsOperands, DeviceOperands, ExpertsProduct, ExpertsWeights,
    HostExpertsOperands, HostOperands, MatrixOfStack, Multiplier, NestedScales, Product,
    ProductWeights,
};
pub use quantizer::{
    QuantizeJob, Quantizer, QuantizingWriter, ScalePlace, ScalesJob, Staged, Workspace,
};
pub use queue::{
    AbsmaxMean, AbsmaxQuantization, AbsmaxRecovery, Dequantization, MOST_WORK, MatrixShape,
    Operation, Quantization, Queue, QueuedDecode, QueuedProduct, QueuedScales, QueuedWeights,
};
pub use ranked::{LocalSpec, RankedDevice, RankedSpec, RankedSpecError, WorldDevices};
pub use spec::{DeviceSpec, SpecError, open_devices, planned_devices};
pub use writer::{Attached, PageLocked, Piece, WRITER_BUFFERS, Writer};

use crate::memory::{ReservationSize, Usage};
use crate::status::Status;
use crate::types::Bytes;

/// What kind of memory a device has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// An NVIDIA GPU.
    Cuda,
    /// An accelerator that policies see as one, backed by host memory when loaded.
    Sim,
    /// Host memory.
    Cpu,
}

impl DeviceKind {
    /// Returns whether policies treat it as an accelerator, to be filled before host memory.
    pub const fn is_accelerator(self) -> bool {
        matches!(self, DeviceKind::Cuda | DeviceKind::Sim)
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DeviceKind::Cuda => "cuda",
            DeviceKind::Sim => "sim",
            DeviceKind::Cpu => "cpu",
        })
    }
}

/// What a plan has to know of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// For example `cuda:0`, `sim:1`, `cpu`.
    pub name: String,
    /// What kind of memory it has.
    pub kind: DeviceKind,
    /// Bytes that may be used in all.
    pub capacity: u64,
    /// Bytes that are free now.
    pub available: u64,
    /// A reservation is a multiple of this many bytes.
    pub granularity: u64,
}

/// What can hold tensors.
///
/// Applications may have their own: what the processor can write needs no more than the methods
/// without a default, and [`DeviceKind`] says how policies are to see it.
///
/// Implementations keep a ledger: [`Device::usage`] says at any time what is reserved and what
/// was at most, and after the last reservation is dropped nothing is.
pub trait Device: Send + Sync + fmt::Debug {
    /// The device as it is now.
    fn info(&self) -> DeviceInfo;

    /// Takes memory in one piece. It is returned when the reservation is dropped.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] when there is too little, with nothing taken.
    fn reserve(&self, size: ReservationSize) -> Result<Box<dyn Reservation>, DeviceError>;

    /// What is in use now, and what was at most.
    fn usage(&self) -> Usage;

    /// An order of work of its own, for what is done in the memory that it has. `None` where the processor
    /// can do that itself.
    ///
    /// # Errors
    /// When the driver refuses.
    fn queue(&self) -> Result<Option<Arc<dyn Queue>>, DeviceError> {
        Ok(None)
    }
}

/// Memory taken from a device in one piece; returned when dropped.
pub trait Reservation: Send + Sync + fmt::Debug {
    /// Its length in bytes.
    fn len(&self) -> u64;

    /// Whether nothing is reserved.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The memory itself where the processor can write it, so that kernels put their results
    /// straight into their final place.
    fn host_memory_mut(&mut self) -> Option<&mut [u8]>;

    /// The memory itself where the processor can read it.
    fn host_memory(&self) -> Option<&[u8]>;

    /// Copies `out.len()` bytes from `offset`.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`] when the range is not inside the reservation.
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), DeviceError>;

    /// Takes `bytes` bytes of page-locked host memory for the buffers of writers, also for those of
    /// other devices: those of one load that the processor cannot write have the same driver. `None`
    /// where the processor can write, and for nothing.
    ///
    /// # Errors
    /// When the driver refuses.
    fn page_lock(&self, bytes: usize) -> Result<Option<Box<dyn PageLocked>>, DeviceError> {
        let _ = bytes;
        Ok(None)
    }

    /// Binds this thread to the device until the result is dropped, which makes what it does with the device
    /// cheaper. Other code on the thread finds the device's context current meanwhile. Of several
    /// results the last is dropped first. `None` where there is nothing to be made cheaper.
    ///
    /// # Errors
    /// When the driver refuses.
    fn attach(&self) -> Result<Option<Box<dyn Attached + '_>>, DeviceError> {
        Ok(None)
    }

    /// What carries bytes there where the processor cannot write the memory, with
    /// [`WRITER_BUFFERS`] buffers that are equal parts of `buffers`. It keeps the memory from being
    /// given back. `None` where the processor can write, and for nothing.
    ///
    /// # Errors
    /// When the driver refuses, and for buffers of another one.
    fn writer(&self, buffers: Box<dyn PageLocked>) -> Result<Option<Box<dyn Writer>>, DeviceError> {
        let _ = buffers;
        Ok(None)
    }

    /// The device's own kernels for results in this memory. `None` where it has none that would be
    /// faster than the processor's.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] where the workspace is memory of its own and there is too
    /// little, [`DeviceError::OutOfBounds`] where it does not lie within, and when the driver
    /// refuses.
    fn quantizer(&self, workspace: Workspace) -> Result<Option<Arc<dyn Quantizer>>, DeviceError> {
        let _ = workspace;
        Ok(None)
    }

    /// The device's own kernels for products with weights in this memory, made ready: what they need
    /// to be compiled or loaded is. `constants` are put where `place` says, for double-quantized weights;
    /// none are needed without any. `None` where the processor can read the weights, or the device has no
    /// such kernels.
    ///
    /// # Errors
    /// As [`Reservation::quantizer`].
    fn multiplier(
        &self,
        constants: &[u8],
        place: Workspace,
    ) -> Result<Option<Arc<dyn Multiplier>>, DeviceError> {
        let _ = (constants, place);
        Ok(None)
    }

    /// Memory of the device for kernels to work in, all of it zero. `None` for memory of the host, and
    /// for nothing.
    ///
    /// # Errors
    /// As [`Reservation::quantizer`].
    fn cleared(&self, place: Workspace) -> Result<Option<DeviceBytes>, DeviceError> {
        let _ = place;
        Ok(None)
    }

    /// Some of the memory, for a [`Queue`] of its device. It keeps all of it. `None` for memory of the host,
    /// and where nothing is reserved.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`].
    fn range(&self, offset: u64, len: u64) -> Result<Option<DeviceBytes>, DeviceError> {
        let _ = (offset, len);
        Ok(None)
    }

    /// Where the memory is for those who run kernels of their own on it. `None` for memory of the
    /// host.
    fn address(&self) -> Option<DeviceAddress> {
        None
    }
}

/// A place in a GPU's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceAddress {
    /// The driver's number of the device.
    pub ordinal: u32,
    /// The pointer, valid in the device's primary context.
    pub pointer: u64,
}

/// Why a device could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// Less memory than needed.
    #[error("{device} has too little memory: need {}, have {}", Bytes(*need), Bytes(*have))]
    OutOfMemory {
        /// The device's name.
        device: String,
        /// Bytes asked for.
        need: u64,
        /// Bytes that were free.
        have: u64,
    },
    /// The operating system or driver refused.
    #[error("{device}: {call} of {} failed: {source}", Bytes(*bytes))]
    Refused {
        /// The device's name.
        device: String,
        /// What was called.
        call: &'static str,
        /// Bytes that the call was about.
        bytes: u64,
        /// What it answered.
        source: std::io::Error,
    },
    /// The driver of a device refused.
    #[error("{device}: {call}{} failed: {error}", OfBytes(*bytes))]
    Driver {
        /// The device's name.
        device: String,
        /// The driver's function.
        call: &'static str,
        /// Bytes that the call was about; zero where it is about none.
        bytes: u64,
        /// The driver's name for the error.
        error: String,
        /// Whether the error is that memory is short.
        out_of_memory: bool,
    },
    /// A range outside a reservation.
    #[error("{device}: bytes {offset}..{end} lie outside a reservation of {len} bytes")]
    OutOfBounds {
        /// The device's name.
        device: String,
        /// First byte asked for.
        offset: u64,
        /// End of the range asked for.
        end: u64,
        /// Length of the reservation.
        len: u64,
    },
    /// Operands that an operation of a [`Queue`] cannot have.
    #[error("{device}: {reason}")]
    Operand {
        /// The device's name.
        device: String,
        /// What is wrong with them.
        reason: String,
    },
    /// A device that is asked for more than once.
    #[error("device {device} is named twice")]
    NamedTwice {
        /// The device's name.
        device: String,
    },
    /// A kind of device that is not there.
    #[error("{device}: {reason}")]
    Unavailable {
        /// The device's name.
        device: String,
        /// Why.
        reason: String,
    },
}

impl DeviceError {
    /// Returns the device's name.
    pub fn device(&self) -> &str {
        match self {
            DeviceError::OutOfMemory { device, .. }
            | DeviceError::Refused { device, .. }
            | DeviceError::Driver { device, .. }
            | DeviceError::OutOfBounds { device, .. }
            | DeviceError::Operand { device, .. }
            | DeviceError::NamedTwice { device }
            | DeviceError::Unavailable { device, .. } => device,
        }
    }
}

impl From<&DeviceError> for Status {
    fn from(error: &DeviceError) -> Status {
        match error {
            DeviceError::NamedTwice { .. } | DeviceError::Operand { .. } => Status::Usage,
            _ => Status::Device,
        }
    }
}

struct OfBytes(u64);

impl fmt::Display for OfBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            bytes => write!(f, " of {}", Bytes(bytes)),
        }
    }
}
