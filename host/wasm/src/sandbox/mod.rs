//! Runs wasm that nobody vouches for, within [`Limits`]: policies, and whatever else becomes a
//! guest. Nothing here knows what a guest is asked.
//!
//! What happens to a guest, in this order; every way in which it ends early is a [`GuestFailure`]:
//!
//! 1. One pass over its bytes checks sizes, counts, and that it imports and exports what this host
//!    has and asks for.
//! 2. Its code comes out of a [`Cache`] or is compiled, here or in a process that can be killed
//!    ([`Compiler`]).
//! 3. What it imports is linked; nothing else is there.
//! 4. Each call gets a store of its own, with fuel, a deadline and a limiter, and takes everything
//!    along when it ends.

mod failure;
mod mismatch;

#[cfg(feature = "compile")]
mod alarm;
#[cfg(feature = "compile")]
mod cache;
#[cfg(feature = "compile")]
mod child;
#[cfg(feature = "compile")]
mod code;
#[cfg(feature = "compile")]
mod file;
#[cfg(feature = "compile")]
mod guest;
#[cfg(feature = "compile")]
mod instances;
#[cfg(all(windows, feature = "compile"))]
mod job;
#[cfg(feature = "compile")]
mod limiter;
#[cfg(feature = "compile")]
mod limits;
#[cfg(feature = "compile")]
mod options;
#[cfg(feature = "compile")]
mod parts;
#[cfg(feature = "compile")]
mod precheck;
#[cfg(feature = "compile")]
mod private;
#[cfg(feature = "compile")]
mod run;
#[cfg(feature = "compile")]
mod space;
#[cfg(feature = "compile")]
mod wasi;
#[cfg(feature = "compile")]
mod wasi_types;

pub use failure::GuestFailure;
pub use mismatch::Mismatch;

#[cfg(feature = "compile")]
pub use cache::{Cache, CacheError};
#[cfg(feature = "compile")]
pub use child::compile_for_parent;
#[cfg(feature = "compile")]
use file::read_component;
#[cfg(feature = "compile")]
pub(crate) use guest::{Guest, Linked};
#[cfg(feature = "compile")]
pub use limits::{BadLimit, Limits};
#[cfg(feature = "compile")]
pub use options::{Compiler, CompilerProgram, SandboxOptions, Wasi};
#[cfg(feature = "compile")]
use run::Sandbox;
#[cfg(feature = "compile")]
pub(crate) use run::{State, checked_component};
