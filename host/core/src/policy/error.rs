//! Every way in which a policy does not give a plan.

use std::error::Error;
use std::path::PathBuf;

use super::{Refusal, RefusalReason};
use crate::status::Status;
use crate::text::joined;

/// Bytes that are shown of the names of a policy's settings, all together.
const MOST_KNOWN: usize = 4 << 10;

/// Why a policy gave no proposal.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// It looked at the model and the devices and said no.
    #[error("policy '{policy}' refuses: {refusal}")]
    Refused {
        /// The policy, as it was asked for.
        policy: String,
        /// Its reason.
        refusal: Refusal,
    },
    /// It failed.
    #[error("policy '{policy}' failed: {source}")]
    Failed {
        /// The policy, as it was asked for.
        policy: String,
        /// The class of the failure: nearly always [`Status::Policy`].
        status: Status,
        /// How. For a policy in wasm it is a `tightfit_wasm::sandbox::Failure`.
        source: Box<dyn Error + Send + Sync>,
    },
    /// It answered with what no placement of this tensor can be.
    #[error("policy '{policy}' gave a bad plan: tensor '{tensor}': {problem}")]
    BadAnswer {
        /// The policy, as it was asked for.
        policy: String,
        /// The tensor.
        tensor: String,
        /// What is wrong with its placement.
        problem: String,
    },
    /// A setting it does not have.
    #[error(
        "policy '{policy}' has no setting '{name}' (it has: {})",
        joined(known, MOST_KNOWN)
    )]
    UnknownSetting {
        /// The policy, as it was asked for.
        policy: String,
        /// The setting.
        name: String,
        /// The settings that it has.
        known: Vec<String>,
    },
    /// A setting given twice.
    #[error("setting '{name}' is given twice")]
    RepeatedSetting {
        /// The setting.
        name: String,
    },
    /// No built-in policy and no file has this name.
    #[error("there is no policy '{name}': neither a file nor one of the built-in policies ({})", builtin.join(", "))]
    Unknown {
        /// The name asked for.
        name: String,
        /// The built-in ones.
        builtin: Vec<&'static str>,
    },
    /// Its file cannot be read.
    #[error("cannot read policy {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl From<&PolicyError> for Status {
    fn from(error: &PolicyError) -> Status {
        match error {
            PolicyError::Refused { refusal, .. } => match refusal.reason {
                RefusalReason::BadSetting => Status::Usage,
                RefusalReason::DoesNotFit | RefusalReason::Unsupported => Status::DoesNotFit,
            },
            PolicyError::Failed { status, .. } => *status,
            PolicyError::BadAnswer { .. } => Status::Policy,
            PolicyError::UnknownSetting { .. }
            | PolicyError::RepeatedSetting { .. }
            | PolicyError::Unknown { .. }
            | PolicyError::Unreadable { .. } => Status::Usage,
        }
    }
}
