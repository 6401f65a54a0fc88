//! Every way in which a policy does not give a plan.

use std::path::PathBuf;

use super::Refusal;
use crate::types::Bytes;

/// How a policy failed: its own fault, not the user's and not the model's.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Failure {
    /// It is not a policy at all, or one for another host.
    #[error("it is not a policy this host can run: {reason}")]
    NotAPolicy {
        /// What is wrong with it.
        reason: String,
    },
    /// Its file, or a function in it, is larger than the host compiles.
    #[error("its {what} takes {}, at most {} are compiled (limit `{}`)", Bytes(*have), Bytes(*limit), limit_on_size(what))]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// Bytes it takes.
        have: u64,
        /// Bytes allowed.
        limit: u64,
    },
    /// It used up its budget of instructions.
    #[error(
        "it ran out of fuel: {fuel} units are what limits `fuel` and `fuel-per-tensor` give for this model"
    )]
    OutOfFuel {
        /// The budget.
        fuel: u64,
    },
    /// It took too long.
    #[error("it took longer than {seconds} s (limit `deadline`)")]
    Deadline {
        /// The limit in seconds.
        seconds: f64,
    },
    /// It wanted more memory than allowed.
    #[error("it wanted {} of memory, at most {} are allowed (limit `memory`)", Bytes(*need), Bytes(*limit))]
    Memory {
        /// Bytes it wanted in all.
        need: u64,
        /// Bytes allowed.
        limit: u64,
    },
    /// It wanted larger tables than allowed.
    #[error(
        "it wanted tables of {need} elements, at most {limit} are allowed (limit `table-elements`)"
    )]
    Tables {
        /// Elements it wanted in all.
        need: u64,
        /// Elements allowed.
        limit: u64,
    },
    /// Its recursion was too deep.
    #[error("its stack overflowed")]
    StackOverflow,
    /// It panicked.
    #[error("it panicked: {message}")]
    Panic {
        /// What it logged last.
        message: String,
    },
    /// Any other trap.
    #[error("it trapped: {message}")]
    Trap {
        /// What the runtime says.
        message: String,
    },
}

impl Failure {
    /// The name of the limit that stood in the way, as [`Limits::set`](super::Limits::set) takes
    /// it; where it was none that can be set, none.
    pub fn limit(&self) -> Option<&'static str> {
        match self {
            Failure::TooLarge { what, .. } => Some(limit_on_size(what)),
            Failure::OutOfFuel { .. } => Some("fuel"),
            Failure::Deadline { .. } => Some("deadline"),
            Failure::Memory { .. } => Some("memory"),
            Failure::Tables { .. } => Some("table-elements"),
            Failure::NotAPolicy { .. }
            | Failure::StackOverflow
            | Failure::Panic { .. }
            | Failure::Trap { .. } => None,
        }
    }
}

/// The name of the limit that [`Failure::TooLarge`] is about.
fn limit_on_size(what: &str) -> &'static str {
    match what {
        "file" => "component",
        _ => "function",
    }
}

/// Why a policy gave no proposal.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// It looked at the model and the devices and said no.
    #[error("policy '{policy}' refuses: {}", refusal.message)]
    Refused {
        /// The policy's name.
        policy: String,
        /// Its reason.
        refusal: Refusal,
    },
    /// It failed.
    #[error("policy '{policy}' failed: {failure}")]
    Failed {
        /// The policy's name, or its file where it did not get to say it.
        policy: String,
        /// How.
        failure: Failure,
    },
    /// A setting it does not have.
    #[error("policy '{policy}' has no setting '{name}' (it has: {})", known.join(", "))]
    UnknownSetting {
        /// The policy's name.
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
