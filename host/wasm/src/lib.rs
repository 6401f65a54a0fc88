//! Runs [Tightfit](https://github.com/tightfit/tightfit)'s placement policies and programs in
//! sandboxed WebAssembly, and has the WIT interfaces that they import.
//!
//! # A policy
//!
//! A [`WasmPolicy`] is a built-in one or a user's file, and a [`tightfit::Policy`] like any other: it
//! says where every tensor goes and in which format, within [`Limits`] on fuel, time, memory and all
//! else, and what it says is checked.
//!
//! ```
//! # #[cfg(feature = "compile")] {
//! use tightfit::{Checkpoint, Device, HostDevice, LoadOptions, load_reserved, reserve};
//! use tightfit_wasm::{Limits, WasmPolicy};
//!
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("model");
//! # tightfit::synth::write(tightfit::synth::Preset::Demo, &path, &Default::default())?;
//! let checkpoint = Checkpoint::open(&path)?;
//! let devices: Vec<Box<dyn Device>> = vec![Box::new(HostDevice::sim(0, 1 << 30))];
//! let policy = WasmPolicy::open("auto", Limits::default())?;
//! let settings = [("double-quant".to_owned(), "true".to_owned())];
//! let reserved = reserve(&checkpoint, &policy, &devices, &settings)?.reserved;
//! let model = load_reserved(&checkpoint, reserved, &LoadOptions::default())?;
//! assert!(model.stats().quantized > 0);
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # A program
//!
//! A [`WasmProgram`] opens the checkpoints that it is granted, loads models by its own plan, and works
//! with devices' memory and the NF4 kernels, within a quota: [`program`].
//!
//! # A host with a wasmtime of its own
//!
//! [`wit`] adds the interfaces to its linker and calls its policies; nothing is compiled or limited
//! here then, and `default-features = false` does without the compiler.
//!
//! # Features
//!
//! | feature | what it adds | |
//! |---|---|---|
//! | `compile` | [`sandbox`], [`policy`], [`program`]: guests are compiled and run here | default |
//! | `component` | [`component_from_module`]; part of `compile` | default |
//! | `async` | calls of policies and programs in asynchronous stores | |
// Denied and not forbidden: `sandbox` trusts code that it has compiled. No other module may.
#![deny(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

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
#[cfg(feature = "compile")]
pub use policy::WasmPolicy;
#[cfg(feature = "compile")]
pub use program::WasmProgram;
#[cfg(feature = "compile")]
pub use sandbox::{Limits, SandboxOptions};

/// The Rust code of README.md, compiled.
#[cfg(all(doctest, feature = "compile"))]
#[doc = include_str!("../../../README.md")]
struct Readme;
