//! Why a load did not finish.

use tightfit_kernels::KernelError;

use crate::cancel::Cancelled;
use crate::checkpoint::CheckpointError;
use crate::device::DeviceError;
use crate::memory::StagingError;
use crate::status::Status;

/// Why a load did not finish. Everything it had reserved has been given back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The checkpoint cannot be read (any more).
    #[error(transparent)]
    Checkpoint(CheckpointError),
    /// A device failed or had less memory than it said.
    #[error(transparent)]
    Device(DeviceError),
    /// A quantized tensor has infinities or NaN, and the load was to be strict.
    #[error(
        "tensor '{tensor}' has infinities or NaN (in at least {blocks} blocks), which NF4 cannot hold"
    )]
    NonFinite {
        /// The tensor.
        tensor: String,
        /// Blocks that have one, in the chunk where the first was found.
        blocks: u64,
    },
    /// Staging is too small for one worker.
    #[error(transparent)]
    Staging(#[from] StagingError),
    /// The plan was made for another checkpoint or other devices.
    #[error("the plan was made for another checkpoint or for other devices")]
    OtherPlan,
    /// A device whose memory the processor cannot write has no transfer path.
    #[error("device {device} has no way to be written to")]
    NoTransfer {
        /// The device's name.
        device: String,
    },
    /// A kernel was called with lengths that do not belong together: a fault of ours.
    #[error("internal error: {0}")]
    Kernel(#[from] KernelError),
    /// Something that cannot be: a fault of ours, please report it.
    #[error("internal error: {0}; please report it")]
    Internal(&'static str),
    /// The user asked to stop.
    #[error("cancelled")]
    Cancelled,
}

impl From<Cancelled> for LoadError {
    fn from(_: Cancelled) -> LoadError {
        LoadError::Cancelled
    }
}

impl From<&LoadError> for Status {
    fn from(error: &LoadError) -> Status {
        match error {
            LoadError::Checkpoint(error) => error.into(),
            LoadError::NonFinite { .. } => Status::Checkpoint,
            LoadError::Device(_) | LoadError::NoTransfer { .. } => Status::Device,
            LoadError::Staging(_) => Status::Usage,
            LoadError::OtherPlan => Status::Usage,
            LoadError::Kernel(_) | LoadError::Internal(_) => Status::Other,
            LoadError::Cancelled => Status::Interrupted,
        }
    }
}
