//! Every way in which a guest can fail.

use super::Mismatch;
use tightfit::policy::PolicyError;
use tightfit::status::Status;
#[cfg(feature = "compile")]
use tightfit::text::truncate;
use tightfit::types::Bytes;

/// How a guest failed: its own fault, not the user's and not the model's.
///
/// A host function or a limiter that has to end a guest returns one of these as its error; it comes
/// out as it is.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GuestFailure {
    /// It is not WebAssembly, or damaged, or nothing that can be made a component.
    #[error("it is not a component: {reason}")]
    NotAComponent {
        /// What is wrong with it.
        reason: String,
    },
    /// It is made for another host: it imports what is not here, or lacks what is asked for.
    #[error("{0}")]
    WrongWorld(Mismatch),
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
    /// It has more of something than allowed.
    #[error("it has more than {limit} {what} (limit `{what}`)")]
    TooMany {
        /// Of what: `memories`, `tables`, `instances`, `modules`, `imports` or `settings`.
        what: &'static str,
        /// Number allowed.
        limit: usize,
    },
    /// Compiling it took too long.
    #[error("compiling it took longer than {seconds} s (limit `compile-time`)")]
    CompileTime {
        /// The limit in seconds.
        seconds: f64,
    },
    /// Compiling it took too much memory.
    #[error("compiling it took more than {} of memory (limit `compile-memory`)", Bytes(*limit))]
    CompileMemory {
        /// Bytes allowed.
        limit: u64,
    },
    /// What it is compiled to is larger than the host loads.
    #[error("compiled, it takes more than {} (limit `compiled`)", Bytes(*limit))]
    Compiled {
        /// Bytes allowed.
        limit: u64,
    },
    /// Compiling it was given up because the user asked to stop.
    #[error("compiling it was cancelled")]
    Cancelled,
    /// The compiler came to grief over it.
    #[error("the compiler failed: {message}")]
    Compiler {
        /// How the compiler ended.
        message: String,
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
    /// It handed over more in one call than allowed.
    #[error("it handed over more than {} in one call (limit `host-call-bytes`)", Bytes(*limit))]
    HostCall {
        /// Bytes allowed.
        limit: u64,
    },
    /// It held more handles than allowed.
    #[error("it held more than {limit} handles (limit `handles`)")]
    Handles {
        /// Number allowed.
        limit: usize,
    },
    /// It had the host keep more resources than allowed.
    #[error("it had the host keep more than {limit} resources (limit `resources`)")]
    Resources {
        /// Number allowed.
        limit: usize,
    },
    /// Its recursion was too deep.
    #[error("its stack overflowed")]
    StackOverflow,
    /// It called a function that an empty WASI does not have.
    #[error("it called {function}, and the WASI that it is given is empty")]
    EmptyWasi {
        /// The function.
        function: String,
    },
    /// It ended itself, as a program does with an exit status.
    #[error("it ended itself with exit status {status}")]
    Exit {
        /// The status.
        status: u8,
    },
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

impl GuestFailure {
    /// Returns how a policy in wasm failed, if that is what the error says.
    pub fn of(error: &PolicyError) -> Option<&GuestFailure> {
        match error {
            PolicyError::Failed { source, .. } => source.downcast_ref(),
            _ => None,
        }
    }

    /// Returns the kind of failure in a word, as scenario files and JSON name it: `trap`,
    /// `out-of-fuel`; `host` where it was not the guest.
    pub const fn kind(&self) -> &'static str {
        match self {
            GuestFailure::NotAComponent { .. } | GuestFailure::WrongWorld(_) => "not-a-policy",
            GuestFailure::TooLarge { .. } => "too-large",
            GuestFailure::TooMany { .. } => "too-many",
            GuestFailure::CompileTime { .. }
            | GuestFailure::CompileMemory { .. }
            | GuestFailure::Compiled { .. }
            | GuestFailure::Compiler { .. } => "compile",
            GuestFailure::OutOfFuel { .. } => "out-of-fuel",
            GuestFailure::Deadline { .. } => "deadline",
            GuestFailure::Memory { .. } => "memory",
            GuestFailure::Tables { .. } => "tables",
            GuestFailure::HostCall { .. } => "host-call",
            GuestFailure::Handles { .. } => "handles",
            GuestFailure::Resources { .. } => "resources",
            GuestFailure::StackOverflow => "stack-overflow",
            GuestFailure::EmptyWasi { .. } => "empty-wasi",
            GuestFailure::Exit { .. } => "exit",
            GuestFailure::Panic { .. } => "panic",
            GuestFailure::Trap { .. } => "trap",
            GuestFailure::Host { .. } | GuestFailure::Cancelled => "host",
        }
    }

    /// Returns the name of the limit that stood in the way, as [`Limits::set`](super::Limits::set)
    /// takes it; where it was none that can be set, none.
    pub fn limit(&self) -> Option<&'static str> {
        match self {
            GuestFailure::TooLarge { what, .. } => Some(limit_on_size(what)),
            GuestFailure::TooMany { what, .. } => Some(what),
            GuestFailure::CompileTime { .. } => Some("compile-time"),
            GuestFailure::CompileMemory { .. } => Some("compile-memory"),
            GuestFailure::Compiled { .. } => Some("compiled"),
            GuestFailure::OutOfFuel { .. } => Some("fuel"),
            GuestFailure::Deadline { .. } => Some("deadline"),
            GuestFailure::Memory { .. } => Some("memory"),
            GuestFailure::Tables { .. } => Some("table-elements"),
            GuestFailure::HostCall { .. } => Some("host-call-bytes"),
            GuestFailure::Handles { .. } => Some("handles"),
            GuestFailure::Resources { .. } => Some("resources"),
            GuestFailure::NotAComponent { .. }
            | GuestFailure::WrongWorld(_)
            | GuestFailure::Compiler { .. }
            | GuestFailure::Cancelled
            | GuestFailure::StackOverflow
            | GuestFailure::EmptyWasi { .. }
            | GuestFailure::Exit { .. }
            | GuestFailure::Panic { .. }
            | GuestFailure::Trap { .. }
            | GuestFailure::Host { .. } => None,
        }
    }

    /// Returns the same with at most `limit` bytes of each of the guest's texts. Every failure
    /// comes through here before anybody is told of it.
    #[cfg(feature = "compile")]
    pub(crate) fn shortened(mut self, limit: usize) -> GuestFailure {
        match &mut self {
            GuestFailure::NotAComponent { reason: text }
            | GuestFailure::Compiler { message: text }
            | GuestFailure::EmptyWasi { function: text }
            | GuestFailure::Panic { message: text }
            | GuestFailure::Trap { message: text }
            | GuestFailure::Host { message: text } => truncate(text, limit),
            GuestFailure::WrongWorld(mismatch) => {
                mismatch.texts().for_each(|text| truncate(text, limit));
            }
            GuestFailure::TooLarge { .. }
            | GuestFailure::TooMany { .. }
            | GuestFailure::CompileTime { .. }
            | GuestFailure::CompileMemory { .. }
            | GuestFailure::Compiled { .. }
            | GuestFailure::Cancelled
            | GuestFailure::OutOfFuel { .. }
            | GuestFailure::Deadline { .. }
            | GuestFailure::Memory { .. }
            | GuestFailure::Tables { .. }
            | GuestFailure::HostCall { .. }
            | GuestFailure::Handles { .. }
            | GuestFailure::Resources { .. }
            | GuestFailure::StackOverflow
            | GuestFailure::Exit { .. } => {}
        }
        self
    }

    /// Makes a failure of an error that is not about the guest.
    #[cfg(feature = "compile")]
    pub(crate) fn host(error: impl std::fmt::Display) -> GuestFailure {
        GuestFailure::Host {
            // With a wasmtime error's causes.
            message: format!("{error:#}"),
        }
    }
}

/// Returns the name of the limit that [`GuestFailure::TooLarge`] is about.
fn limit_on_size(what: &str) -> &'static str {
    match what {
        "file" => "component",
        _ => "function",
    }
}

impl From<&GuestFailure> for Status {
    fn from(failure: &GuestFailure) -> Status {
        match failure {
            // Not the guest's doing: this machine, or this process, cannot run it.
            GuestFailure::Host { .. } => Status::Device,
            GuestFailure::Cancelled => Status::Interrupted,
            _ => Status::Policy,
        }
    }
}
