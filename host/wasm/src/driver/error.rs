//! Every way in which a driver does not do its work.

use std::path::PathBuf;

use crate::sandbox::Failure;
use tightfit::status::Status;
use tightfit::types::Bytes;

/// Why a driver did not do its work. Whatever it had taken has been given back.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// Its file cannot be read.
    #[error("cannot read driver {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It failed.
    #[error("driver '{driver}' failed: {failure}")]
    Failed {
        /// Its file, or how it was named.
        driver: String,
        /// How.
        failure: Failure,
    },
    /// It says that it could not do its work.
    #[error("driver '{driver}' gave up: {message}")]
    GaveUp {
        /// Its file, or how it was named.
        driver: String,
        /// Its reason.
        message: String,
    },
    /// Its answer is too long.
    #[error("the answer of driver '{driver}' takes {}, at most {} are kept", Bytes(*have), Bytes(*limit))]
    LongAnswer {
        /// Its file, or how it was named.
        driver: String,
        /// Bytes of the answer.
        have: u64,
        /// Bytes allowed.
        limit: u64,
    },
    /// It was asked to stop.
    #[error("cancelled")]
    Cancelled,
}

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
