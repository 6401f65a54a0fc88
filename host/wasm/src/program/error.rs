//! Every way in which a program does not do its work.

use std::path::PathBuf;

use crate::sandbox::GuestFailure;
use tightfit::status::Status;
use tightfit::types::Bytes;

/// Why a program did not do its work. Whatever it had taken has been given back.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// Its file cannot be read.
    #[error("cannot read program {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It failed.
    #[error("program '{program}' failed: {failure}")]
    Failed {
        /// Its file, or how it was named.
        program: String,
        /// How.
        failure: GuestFailure,
    },
    /// It says that it could not do its work.
    #[error("program '{program}' gave up: {message}")]
    GaveUp {
        /// Its file, or how it was named.
        program: String,
        /// Its reason.
        message: String,
    },
    /// Its answer is too long.
    #[error("the answer of program '{program}' takes {}, at most {} are kept", Bytes(*have), Bytes(*limit))]
    LongAnswer {
        /// Its file, or how it was named.
        program: String,
        /// Bytes of the answer.
        have: u64,
        /// Bytes allowed.
        limit: u64,
    },
    /// It was asked to stop.
    #[error("cancelled")]
    Cancelled,
}

impl From<&ProgramError> for Status {
    fn from(error: &ProgramError) -> Status {
        match error {
            ProgramError::Unreadable { .. } => Status::Usage,
            ProgramError::Failed { failure, .. } => failure.into(),
            ProgramError::GaveUp { .. } | ProgramError::LongAnswer { .. } => Status::Policy,
            ProgramError::Cancelled => Status::Interrupted,
        }
    }
}
