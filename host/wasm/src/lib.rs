//! Runs Tightfit's placement policies and programs in sandboxed WebAssembly, and has the WIT
//! interfaces that they import.
// Denied and not forbidden: `sandbox` trusts code that it has compiled. No other module may.
#![deny(unsafe_code)]

#[cfg(feature = "compile")]
pub mod policy;
#[cfg(feature = "compile")]
pub mod program;
pub mod sandbox;
pub mod wit;

/// The Rust code of README.md, compiled.
#[cfg(all(doctest, feature = "compile"))]
#[doc = include_str!("../../../README.md")]
struct Readme;
