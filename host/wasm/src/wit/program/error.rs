//! From the errors of everything below to what a program is told, or what ends it.

use tightfit_kernels::KernelError;
use wasmtime::component::ResourceTableError;

use super::bindings::tightfit::host::errors;
use crate::memory::MemoryError;
use crate::stop::Stopped;
use tightfit::checkpoint::CheckpointError;
use tightfit::device::DeviceError;
use tightfit::load::LoadError;
use tightfit::model::ModelError;
use tightfit::plan::PlanError;

/// Why a call of the host gives a program nothing.
#[derive(Debug)]
pub enum CallError {
    /// Something that it can react to.
    Guest(errors::Error),
    /// A trap, which ends it.
    Trap(wasmtime::Error),
}

impl CallError {
    pub(super) fn invalid(message: impl ToString) -> CallError {
        CallError::Guest(errors::Error::InvalidArgument(message.to_string()))
    }

    pub(super) fn unsupported(message: impl ToString) -> CallError {
        CallError::Guest(errors::Error::Unsupported(message.to_string()))
    }

    pub(super) fn not_found(message: impl ToString) -> CallError {
        CallError::Guest(errors::Error::NotFound(message.to_string()))
    }
}

impl From<Stopped> for CallError {
    fn from(stopped: Stopped) -> CallError {
        CallError::Trap(stopped.into())
    }
}

impl From<ResourceTableError> for CallError {
    fn from(error: ResourceTableError) -> CallError {
        CallError::Trap(error.into())
    }
}

impl From<MemoryError> for CallError {
    fn from(error: MemoryError) -> CallError {
        let message = error.to_string();
        match error {
            MemoryError::Quota { need, have } => {
                CallError::Guest(errors::Error::QuotaExceeded(errors::Shortage {
                    message,
                    need,
                    have,
                }))
            }
            MemoryError::Device(error) => error.into(),
            MemoryError::NoSuchDevice { .. } | MemoryError::OutOfBounds { .. } => {
                CallError::invalid(message)
            }
            MemoryError::Stopped(stopped) => stopped.into(),
        }
    }
}

impl From<DeviceError> for CallError {
    fn from(error: DeviceError) -> CallError {
        let message = error.to_string();
        CallError::Guest(match error {
            DeviceError::OutOfMemory { need, have, .. } => {
                errors::Error::NoSpace(errors::Shortage {
                    message,
                    need,
                    have,
                })
            }
            // Operands are checked before they are given to a device.
            DeviceError::Operand { .. } => return CallError::Trap(error.into()),
            _ => errors::Error::DeviceFailed(message),
        })
    }
}

impl From<CheckpointError> for CallError {
    /// A program does not learn where its checkpoints are, and most of these errors say so.
    fn from(error: CheckpointError) -> CallError {
        tracing::debug!("a program's checkpoint: {error}");
        let message = match &error {
            CheckpointError::OutsideTensor { .. } => return CallError::invalid(error),
            // Whoever knows why has said it already.
            CheckpointError::Cancelled => return Stopped::Cancelled.into(),
            CheckpointError::CutShort { tensor, .. } => {
                format!("the checkpoint has been cut short: a file ends before tensor '{tensor}'")
            }
            CheckpointError::LeadsOut { .. } => {
                "a file of the checkpoint is a link that leads out of it".to_owned()
            }
            CheckpointError::NotAFile { .. } => {
                "a file of the checkpoint is a directory, a pipe or a device".to_owned()
            }
            CheckpointError::Changed { .. } => {
                "the checkpoint has been changed since it was opened".to_owned()
            }
            CheckpointError::Io { action, source, .. } => {
                format!(
                    "cannot {action} a file of the checkpoint: {}",
                    source.kind()
                )
            }
            _ => "it is not a valid checkpoint".to_owned(),
        };
        CallError::Guest(errors::Error::BadCheckpoint(message))
    }
}

impl From<PlanError> for CallError {
    fn from(error: PlanError) -> CallError {
        match error {
            PlanError::Bad(bad) => CallError::invalid(bad),
            // Without the totals of all devices, which include what others have.
            PlanError::DoesNotFit {
                device,
                tensor,
                need,
                headroom,
                have,
                ..
            } => CallError::Guest(errors::Error::NoSpace(errors::Shortage {
                message: format!(
                    "{device} is too small; tensor '{tensor}' is the first that does not fit"
                ),
                need: need.saturating_add(headroom),
                have,
            })),
            PlanError::Cancelled => Stopped::Cancelled.into(),
            error => CallError::invalid(error),
        }
    }
}

impl From<LoadError> for CallError {
    fn from(error: LoadError) -> CallError {
        match error {
            LoadError::Checkpoint(error) => error.into(),
            LoadError::Device(error) => error.into(),
            LoadError::NoTransfer { .. } => {
                CallError::Guest(errors::Error::DeviceFailed(error.to_string()))
            }
            // Nobody else cancels it.
            LoadError::Cancelled => Stopped::Cancelled.into(),
            // None of the others is the program's doing.
            error => CallError::Trap(error.into()),
        }
    }
}

impl From<ModelError> for CallError {
    fn from(error: ModelError) -> CallError {
        match error {
            ModelError::Device(error) => error.into(),
            ModelError::NotFloat { .. } => CallError::unsupported(error),
            ModelError::NoPart { .. } | ModelError::OutsideTensor { .. } => {
                CallError::invalid(error)
            }
            error => CallError::Trap(error.into()),
        }
    }
}

impl From<KernelError> for CallError {
    /// Lengths are computed before kernels are called.
    fn from(error: KernelError) -> CallError {
        CallError::Trap(error.into())
    }
}
