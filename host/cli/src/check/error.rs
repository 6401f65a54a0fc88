//! Scenario files that make no sense, and scenarios that cannot be run.

use std::path::PathBuf;

use tightfit::checkpoint::CheckpointError;
use tightfit::device::DeviceError;
use tightfit::plan::FormatRuleError;
use tightfit::policy::PolicyError;
use tightfit::synth::SynthError;

/// Why a scenario file is not run.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// It cannot be read.
    #[error("cannot read scenario file {path:?}: {source}")]
    #[allow(missing_docs, reason = "the file, and why")]
    Unreadable {
        path: PathBuf,
        source: std::io::Error,
    },
    /// It is a directory, a pipe or a device.
    #[error("{path:?} is not a regular file")]
    #[allow(missing_docs, reason = "the file")]
    NotAFile { path: PathBuf },
    /// It is too long.
    #[error("scenario file {path:?} is longer than {limit} bytes")]
    #[allow(missing_docs, reason = "the file, and what is read")]
    TooLarge { path: PathBuf, limit: u64 },
    /// It is not there.
    #[error("there is no scenario file {path:?}")]
    #[allow(missing_docs, reason = "the file")]
    Missing { path: PathBuf },
    /// It is not TOML, or says what a scenario cannot say.
    #[error("{}:{line}:{column}: {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// What is wrong there.
        problem: String,
    },
    /// The caller asked to stop.
    #[error("checking was cancelled")]
    Cancelled,
}

/// Why a scenario could not be run: neither a plan nor a refusal nor a failure of the policy.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Its model cannot be opened.
    #[error("its model: {0}")]
    Checkpoint(#[from] CheckpointError),
    /// Its model cannot be written.
    #[error("its model: {0}")]
    Synth(#[from] SynthError),
    /// There is no place to write its model to.
    #[error("its model: cannot make a temporary directory: {0}")]
    TemporaryDirectory(std::io::Error),
    /// A device of it is not there.
    #[error("its devices: {0}")]
    Device(#[from] DeviceError),
    /// A format that it fixes cannot be.
    #[error("its settings: {0}")]
    FormatRule(FormatRuleError),
    /// Its policy is not there, or has no such setting.
    #[error("its policy: {0}")]
    Policy(PolicyError),
}
