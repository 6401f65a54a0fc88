//! The few classes into which every error falls: the command's exit statuses, and what the C
//! interface returns.

use crate::checkpoint::CheckpointError;
use crate::device::DeviceError;
#[cfg(feature = "wasm-policies")]
use crate::driver::DriverError;
use crate::load::{LoadError, PlaceError};
use crate::plan::ProposeError;
use crate::policy::{PolicyError, RefusalReason};
use crate::sandbox::Failure;

/// What kind of outcome it is. As a number it is the command's exit status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Status {
    /// It was done.
    Done = 0,
    /// Something that none of the others says, also a fault of ours.
    Other = 1,
    /// The call is wrong: an argument, a setting, a name.
    Usage = 2,
    /// The checkpoint is invalid or unreadable.
    Checkpoint = 3,
    /// The model does not fit on the devices, or the policy refuses it.
    DoesNotFit = 4,
    /// The policy or the driver itself failed: a trap, a limit, a bad plan.
    Policy = 5,
    /// A device failed or has less memory than it said, or this machine cannot run a policy.
    Device = 6,
    /// It was asked to stop.
    Interrupted = 130,
}

impl From<&CheckpointError> for Status {
    fn from(error: &CheckpointError) -> Status {
        match error {
            CheckpointError::Cancelled => Status::Interrupted,
            _ => Status::Checkpoint,
        }
    }
}

impl From<&DeviceError> for Status {
    fn from(error: &DeviceError) -> Status {
        match error {
            DeviceError::NamedTwice { .. } => Status::Usage,
            _ => Status::Device,
        }
    }
}

impl From<&Failure> for Status {
    fn from(failure: &Failure) -> Status {
        match failure {
            // Not the guest's doing: this machine, or this process, cannot run it.
            Failure::Host { .. } => Status::Device,
            Failure::Cancelled => Status::Interrupted,
            _ => Status::Policy,
        }
    }
}

impl From<&PolicyError> for Status {
    fn from(error: &PolicyError) -> Status {
        match error {
            PolicyError::Refused { refusal, .. } => match refusal.reason {
                RefusalReason::BadSetting => Status::Usage,
                RefusalReason::DoesNotFit | RefusalReason::Unsupported => Status::DoesNotFit,
            },
            PolicyError::Failed { failure, .. } => failure.into(),
            PolicyError::UnknownSetting { .. }
            | PolicyError::RepeatedSetting { .. }
            | PolicyError::Unknown { .. }
            | PolicyError::Unreadable { .. } => Status::Usage,
        }
    }
}

impl From<&ProposeError> for Status {
    fn from(error: &ProposeError) -> Status {
        match error {
            ProposeError::Policy(error) => error.into(),
            ProposeError::FormatRule(_) => Status::Usage,
            ProposeError::BadPlan { .. } => Status::Policy,
            ProposeError::DoesNotFit { .. } => Status::DoesNotFit,
            ProposeError::Cancelled => Status::Interrupted,
        }
    }
}

impl From<&LoadError> for Status {
    fn from(error: &LoadError) -> Status {
        match error {
            LoadError::Checkpoint(_) | LoadError::NonFinite { .. } => Status::Checkpoint,
            LoadError::Device(_) | LoadError::NoTransfer { .. } => Status::Device,
            LoadError::Staging(_) => Status::Usage,
            LoadError::OtherPlan | LoadError::Kernel(_) => Status::Other,
            LoadError::Cancelled => Status::Interrupted,
        }
    }
}

impl From<&PlaceError> for Status {
    fn from(error: &PlaceError) -> Status {
        match error {
            PlaceError::Propose(error) => error.into(),
            PlaceError::Revised { source, .. } => source.as_ref().into(),
            PlaceError::Load(error) => error.into(),
        }
    }
}

#[cfg(feature = "wasm-policies")]
impl From<&DriverError> for Status {
    fn from(error: &DriverError) -> Status {
        match error {
            DriverError::Unreadable { .. } => Status::Usage,
            DriverError::Failed { failure, .. } => failure.into(),
            DriverError::GaveUp { .. } | DriverError::LongAnswer { .. } => Status::Policy,
            DriverError::Cancelled => Status::Interrupted,
        }
    }
}
