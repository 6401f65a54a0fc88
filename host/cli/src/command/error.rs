//! What ends the command early, and with which exit status.

use std::path::PathBuf;

use crate::check::CheckError;
use crate::draw::Comparison;
use crate::error_report::ErrorReport;
use tightfit::checkpoint::CheckpointError;
use tightfit::device::{DeviceError, RankedSpecError};
use tightfit::hub::HubError;
use tightfit::load::{LoadError, ReserveError};
use tightfit::plan::ProposeError;
use tightfit::policy::PolicyError;
use tightfit::ranks::{RankError, WorldError};
use tightfit::save::SaveError;
use tightfit::status::Status;
use tightfit::synth::SynthError;
use tightfit_kernels::KernelError;
use tightfit_wasm::program::ProgramError;
use tightfit_wasm::sandbox;

/// What ends the command early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CommandError {
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error(transparent)]
    Propose(#[from] ProposeError),
    #[error(transparent)]
    Place(#[from] ReserveError),
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
    Program(#[from] ProgramError),
    #[error(transparent)]
    Check(#[from] CheckError),
    #[error("{failed} of {cases} case{} did not go as expected", if *.cases == 1 { "" } else { "s" })]
    Unexpected { failed: usize, cases: usize },
    #[error("cannot make a temporary directory: {0}")]
    TemporaryDirectory(std::io::Error),
    #[error("cannot write the result: {0}")]
    Output(std::io::Error),
    #[error("cannot write {}: {source}", path.display())]
    Write {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{option} and --json cannot both go to standard output: name a file for one of them")]
    BothToStdout { option: &'static str },
    #[error("setting '{name}' is one of neither '{a}' nor '{b}'")]
    NobodysSetting { name: String, a: String, b: String },
    #[error("cannot tell which program this is, to compile policies with it: {0}")]
    NoCompiler(std::io::Error),
    #[error("cannot compile for another process: {0}")]
    CompilePolicy(std::io::Error),
    #[error(transparent)]
    World(#[from] WorldError),
    #[error(transparent)]
    RankedSpec(#[from] RankedSpecError),
    #[error(transparent)]
    Ranks(#[from] RankError),
    #[error("rank {rank}: {source}")]
    OfRank {
        rank: u32,
        source: Box<CommandError>,
    },
    #[error("--save writes the whole checkpoint, which one process has to load: give --world 1")]
    SaveOfShare,
    #[error("A: {}; B: {}", sentence(&.0.a.refusal), sentence(&.0.b.refusal))]
    BothRefuse(Box<Comparison>),
}

fn sentence(refusal: &Option<String>) -> &str {
    refusal.as_deref().unwrap_or_default()
}

impl From<PolicyError> for CommandError {
    fn from(error: PolicyError) -> CommandError {
        CommandError::Propose(ProposeError::Policy(error))
    }
}

impl CommandError {
    /// Why there is no plan, if that is what happened.
    fn no_plan(&self) -> Option<&ProposeError> {
        match self {
            CommandError::Propose(error) | CommandError::Place(ReserveError::Propose(error)) => {
                Some(error)
            }
            CommandError::Place(ReserveError::Revised { source, .. }) => Some(source),
            CommandError::OfRank { source, .. } => source.no_plan(),
            _ => None,
        }
    }

    /// Whether this is the policy's answer to the model and the devices, not a fault.
    pub(crate) fn is_refusal(&self) -> bool {
        self.no_plan()
            .is_some_and(|error| Status::from(error) == Status::DoesNotFit)
    }

    /// The limit that a policy or a program ran into, if that is what happened, and the option that
    /// changes it.
    pub(crate) fn limit(&self) -> Option<(&'static str, &'static str)> {
        if let CommandError::Program(ProgramError::Failed { failure, .. }) = self {
            return Some(("--limit", failure.limit()?));
        }
        match self.no_plan()? {
            ProposeError::Policy(error) => {
                Some(("--policy-limit", sandbox::GuestFailure::of(error)?.limit()?))
            }
            _ => None,
        }
    }

    /// The exit status, as `tightfit --help` lists them.
    pub(crate) fn status(&self) -> Status {
        match self {
            CommandError::Checkpoint(error) => error.into(),
            CommandError::Hub(error) => error.into(),
            CommandError::Propose(error) => error.into(),
            CommandError::Place(error) => error.into(),
            CommandError::Load(error) => error.into(),
            CommandError::Save(error) => error.into(),
            CommandError::Device(error) => error.into(),
            CommandError::Synth(error) => error.into(),
            CommandError::Program(error) => error.into(),
            CommandError::World(error) => error.into(),
            CommandError::RankedSpec(error) => error.into(),
            CommandError::Ranks(error) => error.into(),
            CommandError::OfRank { source, .. } => source.status(),
            CommandError::Kernel(_) | CommandError::SaveOfShare => Status::Usage,
            CommandError::NobodysSetting { .. } | CommandError::BothToStdout { .. } => {
                Status::Usage
            }
            CommandError::BothRefuse(_) => Status::DoesNotFit,
            CommandError::Check(CheckError::Cancelled) => Status::Interrupted,
            CommandError::Check(_) => Status::Usage,
            CommandError::Unexpected { .. }
            | CommandError::TemporaryDirectory(_)
            | CommandError::NoCompiler(_)
            | CommandError::CompilePolicy(_)
            | CommandError::Output(_)
            | CommandError::Write { .. } => Status::Other,
        }
    }

    /// The same for programs.
    pub(crate) fn report(&self) -> ErrorReport {
        let report = |kind| ErrorReport::new(self.status(), kind, self);
        match self {
            CommandError::Checkpoint(error) => error.into(),
            CommandError::Propose(error) => error.into(),
            CommandError::Place(error) => error.into(),
            CommandError::Load(error) => error.into(),
            CommandError::Device(error) => error.into(),
            CommandError::Hub(error) => error.into(),
            CommandError::Synth(error) => match error {
                SynthError::Cancelled => report("interrupted"),
                SynthError::Io { path, .. } => report("output").at(path),
                SynthError::NotEmpty { path } => report("exists").at(path),
                SynthError::NotADirectory { path } => report("usage").at(path),
                SynthError::UnknownPreset { .. } | SynthError::Layers { .. } => report("usage"),
                _ => report("checkpoint"),
            },
            CommandError::Save(error) => error.into(),
            CommandError::Program(error) => match error {
                ProgramError::Unreadable { path, .. } => report("no-program").at(path),
                ProgramError::Failed { program, failure } => {
                    report("program").of_guest(program, failure)
                }
                ProgramError::GaveUp { program, .. } => ErrorReport {
                    guest: Some(program.clone()),
                    ..report("gave-up")
                },
                ProgramError::LongAnswer { program, .. } => ErrorReport {
                    guest: Some(program.clone()),
                    ..report("too-large")
                },
                ProgramError::Cancelled => report("interrupted"),
            },
            CommandError::Check(error) => match error {
                CheckError::Cancelled => report("interrupted"),
                CheckError::Missing { path }
                | CheckError::Unreadable { path, .. }
                | CheckError::NotAFile { path }
                | CheckError::TooLarge { path, .. }
                | CheckError::Invalid { path, .. } => report("scenario").at(path),
            },
            CommandError::NobodysSetting { name, .. } => ErrorReport {
                setting: Some(name.clone()),
                ..report("bad-setting")
            },
            CommandError::OfRank { source, .. } => ErrorReport {
                message: self.to_string(),
                ..source.report()
            },
            CommandError::Ranks(RankError::Cancelled) => report("interrupted"),
            CommandError::Ranks(_) => report("rank"),
            CommandError::BothRefuse(comparison) => {
                let first = comparison.a.error.clone();
                ErrorReport {
                    message: self.to_string(),
                    status: self.status() as u8,
                    ..first.unwrap_or_else(|| report("does-not-fit"))
                }
            }
            CommandError::Write { path, .. } => report("output").at(path),
            CommandError::Output(_) | CommandError::TemporaryDirectory(_) => report("output"),
            CommandError::Unexpected { .. } => report("unexpected"),
            CommandError::Kernel(_)
            | CommandError::BothToStdout { .. }
            | CommandError::World(_)
            | CommandError::RankedSpec(_)
            | CommandError::SaveOfShare => report("usage"),
            CommandError::NoCompiler(_) | CommandError::CompilePolicy(_) => report("internal"),
        }
    }
}
