//! Tightfit loads Hugging Face checkpoints into 4-bit NF4 in exactly the memory the weights need.
//!
//! Data flows one way: [`checkpoint`] -> [`policy`] -> [`plan`] -> [`load`] -> [`model`] ->
//! [`report`].
// Denied and not forbidden: a GPU's driver is a C library that `device::cuda::driver` calls,
// `dlpack::abi` is called back by C, and `sandbox` trusts code that it has compiled. No other module
// may.
#![deny(unsafe_code)]

#[cfg(feature = "check")]
pub mod check;
pub mod checkpoint;
pub mod device;
pub mod dlpack;
#[cfg(feature = "wasm-policies")]
pub mod driver;
#[cfg(feature = "hub")]
pub mod hub;
pub mod load;
pub mod memory;
pub mod model;
pub mod plan;
pub mod policy;
pub mod report;
pub mod sandbox;
pub mod save;
pub mod status;
pub mod synth;
mod text;
pub mod types;
#[cfg(feature = "wit")]
pub mod wit;
