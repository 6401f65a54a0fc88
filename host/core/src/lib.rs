//! Tightfit loads Hugging Face checkpoints into 4-bit NF4 in exactly the memory the weights need.
//!
//! Data flows one way: [`checkpoint`] -> [`policy`] -> [`plan`] -> [`load`] -> [`model`] ->
//! [`report`].
// Denied and not forbidden: a GPU's driver is a C library that `device::cuda::driver` calls, and
// `dlpack::abi` is called back by C. No other module may.
#![deny(unsafe_code)]

pub mod cancel;
pub mod checkpoint;
pub mod device;
pub mod dlpack;
#[cfg(feature = "hub")]
pub mod hub;
pub mod load;
pub mod memory;
pub mod model;
mod options;
pub mod plan;
pub mod policy;
mod progress;
pub mod report;
pub mod save;
pub mod status;
pub mod synth;
#[cfg(any(test, feature = "testing"))]
#[doc(hidden)]
pub mod testing;
pub mod text;
pub mod types;

pub use cancel::CancelToken;
pub use checkpoint::Checkpoint;
pub use device::{Device, HostDevice, open_devices};
pub use load::{LoadOptions, load, load_reserved, reserve};
pub use model::{Model, Tensor};
pub use plan::{Plan, PlanOptions, propose};
pub use policy::Policy;
pub use progress::{Progress, ReportProgress};
pub use types::{DType, Format, Placement};

/// The arithmetic, of which [`LoadOptions::kernels`] and [`Tensor::to_float`] speak: `FloatType`,
/// `Kernels`, `KernelError`.
pub use tightfit_kernels as kernels;
