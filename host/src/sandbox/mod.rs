//! Runs wasm that nobody vouches for, within [`Limits`]: policies, and whatever else becomes a
//! guest. Nothing here knows what a guest is asked.
//!
//! A [`Sandbox`] checks and compiles components, links them, and runs calls on fresh stores. Every
//! way in which any of that ends early is a [`Failure`].

#[cfg(feature = "wasm-policies")]
mod alarm;
mod failure;
#[cfg(feature = "wasm-policies")]
mod file;
#[cfg(feature = "wasm-policies")]
mod limiter;
#[cfg(feature = "wasm-policies")]
mod limits;
#[cfg(feature = "wasm-policies")]
mod precheck;
#[cfg(feature = "wasm-policies")]
mod run;

pub use failure::Failure;
#[cfg(feature = "wasm-policies")]
pub(crate) use file::read_component;
#[cfg(feature = "wasm-policies")]
pub use limits::{BadLimit, Limits};
#[cfg(feature = "wasm-policies")]
pub(crate) use run::{Sandbox, State, wrong_world};
