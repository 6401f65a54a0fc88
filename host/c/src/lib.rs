//! The C interface of Tightfit. The header `include/tightfit.h` is made from this crate and says
//! everything that a caller has to know.
//!
//! `unsafe` is here and nowhere else in the host: pointers cross in `boundary`, the rest is the
//! library's safe interface.
#![deny(unsafe_op_in_unsafe_fn)]

mod boundary;
mod experts;
mod linear;
mod load;
mod model;
mod open;
mod share;

use std::ffi::c_char;

use tightfit::status::Status;

pub use experts::*;
pub use linear::*;
pub use load::*;
pub use model::*;
pub use open::*;
pub use share::*;

/// How a call ended. The values are those of the command's exit statuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub enum TightfitStatus {
    /// It was done.
    Done = 0,
    /// Something that none of the others says, also a fault of the library's.
    Other = 1,
    /// The call is wrong: a NULL, a text that is not UTF-8, an index, a setting, a name.
    Usage = 2,
    /// The checkpoint is invalid or unreadable.
    Checkpoint = 3,
    /// The model does not fit on the devices, or the policy refuses it.
    DoesNotFit = 4,
    /// The policy itself failed: a trap, a limit, a bad plan.
    Policy = 5,
    /// A device failed or has less memory than it said, or this machine cannot run a policy.
    Device = 6,
    /// It was cancelled.
    Interrupted = 130,
}

impl From<Status> for TightfitStatus {
    fn from(status: Status) -> TightfitStatus {
        match status {
            Status::Done => TightfitStatus::Done,
            Status::Other => TightfitStatus::Other,
            Status::Usage => TightfitStatus::Usage,
            Status::Checkpoint => TightfitStatus::Checkpoint,
            Status::DoesNotFit => TightfitStatus::DoesNotFit,
            Status::Policy => TightfitStatus::Policy,
            Status::Device => TightfitStatus::Device,
            Status::Interrupted => TightfitStatus::Interrupted,
        }
    }
}

/// The library's version, for example "0.1.0". Static: never freed. From any thread.
#[unsafe(no_mangle)]
pub extern "C" fn tightfit_version() -> *const c_char {
    const { concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast() }
}

/// One sentence about the last call that failed in this thread; empty if none has. Calls that
/// succeed leave it. Owned by the library, valid until the next call in this thread that fails.
#[unsafe(no_mangle)]
pub extern "C" fn tightfit_last_error() -> *const c_char {
    boundary::last_error()
}
