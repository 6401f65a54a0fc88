//! Runs Tightfit's placement policies and programs in sandboxed WebAssembly, and has the WIT
//! interfaces that they import.
// Denied and not forbidden: `sandbox` trusts code that it has compiled. No other module may.
#![deny(unsafe_code)]

#[cfg(feature = "component")]
mod component;
mod memory;
#[cfg(feature = "compile")]
pub mod policy;
#[cfg(feature = "compile")]
pub mod program;
pub mod sandbox;
mod stop;
pub mod wit;
#[cfg(feature = "component")]
mod world;

#[cfg(feature = "component")]
pub use component::component_from_module;

/// The Rust code of README.md, compiled.
#[cfg(all(doctest, feature = "compile"))]
#[doc = include_str!("../../../README.md")]
struct Readme;
