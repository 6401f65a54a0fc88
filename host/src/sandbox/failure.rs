//! Every way in which a guest can fail.

use crate::types::Bytes;

/// How a guest failed: its own fault, not the user's and not the model's.
///
/// A host function or a limiter that has to end a guest returns one of these as its error; it comes
/// out as it is.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// It is not WebAssembly, or damaged, or nothing that can be made a component.
    #[error("it is not a component: {reason}")]
    NotAComponent {
        /// What is wrong with it.
        reason: String,
    },
    /// It is made for another host: it imports what is not here, or lacks what is asked for.
    #[error("it is made for another host: {reason}")]
    WrongWorld {
        /// What does not fit.
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
    /// Not the guest but the host could not go on.
    #[error("it could not be run: {message}")]
    Host {
        /// Why not.
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
            Failure::NotAComponent { .. }
            | Failure::WrongWorld { .. }
            | Failure::StackOverflow
            | Failure::Panic { .. }
            | Failure::Trap { .. }
            | Failure::Host { .. } => None,
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
