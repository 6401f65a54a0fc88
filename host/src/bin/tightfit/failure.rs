//! What ends the command early, and with which exit status.

use std::path::PathBuf;

use tightfit::check::CheckError;
use tightfit::checkpoint::CheckpointError;
use tightfit::device::DeviceError;
use tightfit::hub::HubError;
use tightfit::load::{LoadError, PlaceError};
use tightfit::plan::ProposeError;
use tightfit::policy::{PolicyError, RefusalReason};
use tightfit::save::SaveError;
use tightfit::synth::SynthError;
use tightfit_kernels::KernelError;

/// What ends the command early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error(transparent)]
    Propose(#[from] ProposeError),
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Synth(#[from] SynthError),
    #[error(transparent)]
    Save(#[from] SaveError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Check(#[from] CheckError),
    #[error("{failed} of {cases} cases did not go as expected")]
    Unexpected { failed: usize, cases: usize },
    #[error("cannot write report {path:?}: {source}")]
    Report {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("cannot make a temporary directory: {0}")]
    TemporaryDirectory(std::io::Error),
    #[error("cannot write the result: {0}")]
    Output(std::io::Error),
    #[error("cannot write {}: {source}", path.display())]
    Picture {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("setting '{name}' is one of neither '{a}' nor '{b}'")]
    NobodysSetting { name: String, a: String, b: String },
    #[error("A: {a}; B: {b}")]
    BothRefuse { a: Box<Failure>, b: Box<Failure> },
}

impl From<PolicyError> for Failure {
    fn from(error: PolicyError) -> Failure {
        Failure::Propose(ProposeError::Policy(error))
    }
}

const OTHER: u8 = 1;
const USAGE: u8 = 2;
const CHECKPOINT: u8 = 3;
const DOES_NOT_FIT: u8 = 4;
const POLICY: u8 = 5;
const DEVICE: u8 = 6;
const INTERRUPTED: u8 = 130;

impl Failure {
    /// Why there is no plan, if that is what happened.
    fn no_plan(&self) -> Option<&ProposeError> {
        match self {
            Failure::Propose(error) | Failure::Place(PlaceError::Propose(error)) => Some(error),
            Failure::Place(PlaceError::Revised { source, .. }) => Some(source),
            _ => None,
        }
    }

    /// Whether this is the policy's answer to the model and the devices, not a fault.
    pub(crate) fn is_refusal(&self) -> bool {
        self.no_plan()
            .is_some_and(|error| propose_status(error) == DOES_NOT_FIT)
    }

    /// The limit that a policy ran into, if that is what happened.
    pub(crate) fn policy_limit(&self) -> Option<&'static str> {
        match self.no_plan()? {
            ProposeError::Policy(PolicyError::Failed { failure, .. }) => failure.limit(),
            _ => None,
        }
    }

    /// The exit status, as `tightfit --help` lists them.
    pub(crate) fn status(&self) -> u8 {
        match self {
            Failure::Checkpoint(_) => CHECKPOINT,
            Failure::Hub(HubError::Cancelled) => INTERRUPTED,
            Failure::Hub(_) => CHECKPOINT,
            Failure::Propose(error) => propose_status(error),
            Failure::Place(error) => match error {
                PlaceError::Propose(error) => propose_status(error),
                PlaceError::Revised { source, .. } => propose_status(source),
                PlaceError::Load(error) => load_status(error),
            },
            Failure::Load(error) => load_status(error),
            Failure::Save(error) => match error {
                SaveError::Exists { .. }
                | SaveError::NotADirectoryName { .. }
                | SaveError::HeaderTooLarge { .. } => USAGE,
                SaveError::Io { .. } | SaveError::Checkpoint(_) | SaveError::SameName { .. } => {
                    CHECKPOINT
                }
                SaveError::Load(error) => load_status(error),
                SaveError::Plan(_)
                | SaveError::Size(_)
                | SaveError::Kernel(_)
                | SaveError::OtherPlan => OTHER,
                SaveError::Cancelled => INTERRUPTED,
            },
            Failure::Device(DeviceError::NamedTwice { .. }) => USAGE,
            Failure::Device(_) => DEVICE,
            Failure::Synth(error) => match error {
                SynthError::Cancelled => INTERRUPTED,
                SynthError::UnknownPreset { .. }
                | SynthError::NotEmpty { .. }
                | SynthError::NotADirectory { .. } => USAGE,
                SynthError::Io { .. } | SynthError::Unsupported { .. } => CHECKPOINT,
            },
            Failure::Kernel(_) => USAGE,
            Failure::NobodysSetting { .. } => USAGE,
            Failure::BothRefuse { .. } => DOES_NOT_FIT,
            Failure::Check(CheckError::Cancelled) => INTERRUPTED,
            Failure::Check(_) => USAGE,
            Failure::Unexpected { .. }
            | Failure::Report { .. }
            | Failure::TemporaryDirectory(_)
            | Failure::Output(_)
            | Failure::Picture { .. } => OTHER,
        }
    }
}

fn propose_status(error: &ProposeError) -> u8 {
    match error {
        ProposeError::Policy(error) => match error {
            PolicyError::Refused { refusal, .. } => match refusal.reason {
                RefusalReason::BadSetting => USAGE,
                RefusalReason::DoesNotFit | RefusalReason::Unsupported => DOES_NOT_FIT,
            },
            PolicyError::Failed { .. } => POLICY,
            PolicyError::UnknownSetting { .. }
            | PolicyError::RepeatedSetting { .. }
            | PolicyError::Unknown { .. }
            | PolicyError::Unreadable { .. } => USAGE,
        },
        ProposeError::FormatRule(_) => USAGE,
        ProposeError::BadPlan { .. } => POLICY,
        ProposeError::DoesNotFit { .. } => DOES_NOT_FIT,
    }
}

fn load_status(error: &LoadError) -> u8 {
    match error {
        LoadError::Checkpoint(_) | LoadError::NonFinite { .. } => CHECKPOINT,
        LoadError::Device(_) | LoadError::NoTransfer { .. } => DEVICE,
        LoadError::Staging(_) => USAGE,
        LoadError::OtherPlan | LoadError::Kernel(_) => OTHER,
        LoadError::Cancelled => INTERRUPTED,
    }
}
