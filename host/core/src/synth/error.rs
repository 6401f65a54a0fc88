//! What can go wrong while writing a checkpoint.

use std::io;
use std::path::{Path, PathBuf};

use super::preset::Preset;
use crate::cancel::Cancelled;
use crate::status::Status;

/// Why no checkpoint was written. Whatever had been created by then has been removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SynthError {
    /// There is no preset of this name.
    #[error("there is no preset '{}'; there are {known}", name.escape_debug())]
    UnknownPreset {
        /// The name as it was given.
        name: String,
        /// All names, separated by commas.
        known: String,
    },

    /// A preset cannot be cut to so many layers.
    #[error("{preset} cannot be cut to {need} layers: it has {have}, and at least one is needed")]
    Layers {
        /// Which one.
        preset: Preset,
        /// How many were asked for.
        need: u64,
        /// How many it has.
        have: u64,
    },

    /// The directory has files in it, which are left alone.
    #[error("{path:?} is not empty; give a directory that is empty or does not exist yet")]
    #[allow(missing_docs, reason = "the directory")]
    NotEmpty { path: PathBuf },

    /// The path is a file.
    #[error("{path:?} is not a directory")]
    #[allow(missing_docs, reason = "the path")]
    NotADirectory { path: PathBuf },

    /// The model's tensors are too many, too large, or not of a type that can be made.
    #[error("a model of this shape cannot be written: {problem}")]
    Unsupported {
        /// What stands in the way.
        problem: String,
    },

    /// The operating system refused; a full disk ends here too.
    #[error("cannot {action} {path:?}: {source}")]
    Io {
        /// What was tried, for example `write`.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },

    /// The caller asked to stop.
    #[error("writing the checkpoint was cancelled")]
    Cancelled,
}

impl From<Cancelled> for SynthError {
    fn from(_: Cancelled) -> SynthError {
        SynthError::Cancelled
    }
}

impl From<&SynthError> for Status {
    fn from(error: &SynthError) -> Status {
        match error {
            SynthError::Cancelled => Status::Interrupted,
            SynthError::UnknownPreset { .. }
            | SynthError::Layers { .. }
            | SynthError::NotEmpty { .. }
            | SynthError::NotADirectory { .. } => Status::Usage,
            SynthError::Unsupported { .. } => Status::Checkpoint,
            SynthError::Io { .. } => Status::Other,
        }
    }
}

/// Turns a system error into ours, for `map_err`.
pub(super) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SynthError {
    move |source| SynthError::Io {
        action,
        path: path.into(),
        source,
    }
}
