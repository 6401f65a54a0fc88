//! Runs wasm that nobody vouches for, within [`Limits`]: policies, and whatever else becomes a
//! guest. Nothing here knows what a guest is asked.
//!
//! What happens to a guest, in this order; every way in which it ends early is a [`Failure`]:
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

#[cfg(feature = "wasm-policies")]
mod alarm;
#[cfg(feature = "wasm-policies")]
mod cache;
#[cfg(feature = "wasm-policies")]
mod child;
#[cfg(feature = "wasm-policies")]
mod code;
#[cfg(feature = "wasm-policies")]
mod file;
#[cfg(feature = "wasm-policies")]
mod instances;
#[cfg(feature = "wasm-policies")]
mod limiter;
#[cfg(feature = "wasm-policies")]
mod limits;
#[cfg(feature = "wasm-policies")]
mod module;
#[cfg(feature = "wasm-policies")]
mod options;
#[cfg(feature = "wasm-policies")]
mod parts;
#[cfg(feature = "wasm-policies")]
mod precheck;
#[cfg(feature = "wasm-policies")]
#[cfg_attr(not(unix), path = "private_nowhere.rs")]
mod private;
#[cfg(feature = "wasm-policies")]
mod run;
#[cfg(feature = "wasm-policies")]
mod space;
#[cfg(feature = "wasm-policies")]
mod wasi;
#[cfg(feature = "wasm-policies")]
mod wasi_types;
#[cfg(feature = "wasm-policies")]
mod world;

pub use failure::Failure;
pub use mismatch::Mismatch;

#[cfg(feature = "wasm-policies")]
pub use cache::{Cache, CacheError};
#[cfg(feature = "wasm-policies")]
pub use child::compile_for_parent;
#[cfg(feature = "wasm-policies")]
pub(crate) use file::read_component;
#[cfg(feature = "wasm-policies")]
pub use limits::{BadLimit, Limits};
#[cfg(feature = "wasm-policies")]
pub use options::{Compiler, CompilerProgram, Options, Wasi};
#[cfg(feature = "wasm-policies")]
pub(crate) use run::{Sandbox, State, checked_component};
#[cfg(feature = "wasm-policies")]
pub(crate) use world::World;
