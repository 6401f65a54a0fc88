//! What ends the command early, and with which exit status.

use std::path::PathBuf;

use tightfit::check::CheckError;
use tightfit::checkpoint::CheckpointError;
use tightfit::device::DeviceError;
use tightfit::driver::DriverError;
use tightfit::hub::HubError;
use tightfit::load::{LoadError, PlaceError};
use tightfit::plan::ProposeError;
use tightfit::policy::PolicyError;
use tightfit::save::SaveError;
use tightfit::status::Status;
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
    Driver(#[from] DriverError),
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
    #[error("cannot tell which program this is, to compile policies with it: {0}")]
    NoCompiler(std::io::Error),
    #[error("cannot compile for another process: {0}")]
    CompilePolicy(std::io::Error),
    #[error("A: {a}; B: {b}")]
    BothRefuse { a: Box<Failure>, b: Box<Failure> },
}

impl From<PolicyError> for Failure {
    fn from(error: PolicyError) -> Failure {
        Failure::Propose(ProposeError::Policy(error))
    }
}

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
            .is_some_and(|error| Status::from(error) == Status::DoesNotFit)
    }

    /// The limit that a policy or a driver ran into, if that is what happened, and the option that
    /// changes it.
    pub(crate) fn limit(&self) -> Option<(&'static str, &'static str)> {
        if let Failure::Driver(DriverError::Failed { failure, .. }) = self {
            return Some(("--limit", failure.limit()?));
        }
        match self.no_plan()? {
            ProposeError::Policy(PolicyError::Failed { failure, .. }) => {
                Some(("--policy-limit", failure.limit()?))
            }
            _ => None,
        }
    }

    /// The exit status, as `tightfit --help` lists them.
    pub(crate) fn status(&self) -> Status {
        match self {
            Failure::Checkpoint(error) => error.into(),
            Failure::Hub(HubError::Cancelled) => Status::Interrupted,
            Failure::Hub(_) => Status::Checkpoint,
            Failure::Propose(error) => error.into(),
            Failure::Place(error) => error.into(),
            Failure::Load(error) => error.into(),
            Failure::Save(error) => match error {
                SaveError::Exists { .. }
                | SaveError::NotADirectoryName { .. }
                | SaveError::HeaderTooLarge { .. } => Status::Usage,
                SaveError::Io { .. }
                | SaveError::Checkpoint(_)
                | SaveError::SameName { .. }
                | SaveError::TooLarge { .. } => Status::Checkpoint,
                SaveError::Load(error) => error.into(),
                SaveError::Plan(_)
                | SaveError::Size(_)
                | SaveError::Kernel(_)
                | SaveError::OtherPlan => Status::Other,
                SaveError::Cancelled => Status::Interrupted,
            },
            Failure::Device(error) => error.into(),
            Failure::Synth(error) => match error {
                SynthError::Cancelled => Status::Interrupted,
                SynthError::UnknownPreset { .. }
                | SynthError::NotEmpty { .. }
                | SynthError::NotADirectory { .. } => Status::Usage,
                SynthError::Io { .. } | SynthError::Unsupported { .. } => Status::Checkpoint,
            },
            Failure::Driver(error) => error.into(),
            Failure::Kernel(_) => Status::Usage,
            Failure::NobodysSetting { .. } => Status::Usage,
            Failure::BothRefuse { .. } => Status::DoesNotFit,
            Failure::Check(CheckError::Cancelled) => Status::Interrupted,
            Failure::Check(_) => Status::Usage,
            Failure::Unexpected { .. }
            | Failure::Report { .. }
            | Failure::TemporaryDirectory(_)
            | Failure::NoCompiler(_)
            | Failure::CompilePolicy(_)
            | Failure::Output(_)
            | Failure::Picture { .. } => Status::Other,
        }
    }
}
