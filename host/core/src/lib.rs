//! Loads Hugging Face checkpoints into 4-bit NF4, in exactly the memory that the weights need.
//!
//! A [`Policy`] decides where every tensor goes and in which format; the [`Plan`] that is made of it
//! is exact to the byte before any weight is read; the load reserves each device's memory in one
//! piece, reads, quantizes and copies at the same time through a fixed amount of staging, and never
//! takes more. The bytes are those of bitsandbytes' CUDA kernels.
//!
//! # Loading a model
//!
//! ```
//! use tightfit::policy::{Answer, Description, PolicyError, Proposal, Request};
//! use tightfit::{
//!     Checkpoint, Device, Format, HostDevice, LoadOptions, Placement, Policy, load_reserved, reserve,
//! };
//!
//! /// All matrices in NF4, on the first device.
//! struct MatricesInNf4;
//!
//! impl Policy for MatricesInNf4 {
//!     fn describe(&self) -> Result<Description, PolicyError> {
//!         Ok(Description {
//!             name: "matrices-in-nf4".into(),
//!             version: "1".into(),
//!             settings: vec![],
//!         })
//!     }
//!
//!     fn plan(&self, request: &Request<'_>) -> Result<Answer, PolicyError> {
//!         let placements = request.tensors.iter().map(|tensor| Placement {
//!             device: Some(0),
//!             format: match tensor.dtype.is_quantizable() && tensor.shape.len() == 2 {
//!                 true => Format::NF4,
//!                 false => Format::Stored,
//!             },
//!         });
//!         Ok(Answer {
//!             proposal: Proposal {
//!                 placements: placements.collect(),
//!                 headroom: vec![0; request.devices.len()],
//!                 slices: Vec::new(),
//!             },
//!             fuel: None,
//!         })
//!     }
//! }
//!
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("model");
//! # tightfit::synth::write(tightfit::synth::Preset::Demo, &path, &Default::default())?;
//! let checkpoint = Checkpoint::open(&path)?;
//! let devices: Vec<Box<dyn Device>> = vec![Box::new(HostDevice::cpu(None))];
//! // Planned, checked, and its memory taken; nothing has been read.
//! let reserved = reserve(&checkpoint, &MatricesInNf4, &devices, &[])?.reserved;
//! let need = reserved.plan().devices[0].reserved();
//! let model = load_reserved(&checkpoint, reserved, &LoadOptions::default())?;
//! assert_eq!(devices[0].usage().reserved.peak, need);
//!
//! let weight = model.tensor("model.layers.0.mlp.up_proj.weight").ok_or("no such tensor")?;
//! assert_eq!(weight.format(), Format::NF4);
//! let values: Vec<f32> = weight.to_floats()?;
//! # assert!(!values.is_empty());
//!
//! // y = x * transpose(W), with the weight as it lies.
//! let up = model.linear("model.layers.0.mlp.up_proj.weight")?;
//! let mut y = vec![0.0; up.outputs()];
//! up.forward(&vec![1.0; up.inputs()], 1, None, &mut y)?;
//! # let sum: f32 = values[..up.inputs()].iter().sum();
//! # assert!((y[0] - sum).abs() < 1e-3);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The crate `tightfit-wasm` has the policies that the command uses (`auto`, `packed`,
//! `huggingface`, `map`), and runs those of users in a sandbox.
//!
//! # Modules
//!
//! Data flows one way: [`checkpoint`] -> [`policy`] -> [`plan`] -> [`load`](mod@load) -> [`model`] ->
//! [`report`]. What a program usually needs is at the root. [`hub`] downloads models by their id,
//! [`ranks`] has several processes load one model together, [`save`] writes checkpoints in 4 bits, [`dlpack`] lends tensors to other libraries, [`products`] computes with
//! them, and [`synth`] writes checkpoints of real models' shapes for tests.
//!
//! # Conventions
//!
//! Functions whose names end in `_with` take options, or a [`CancelToken`], beside what the plain ones
//! take. Paths are anything that is one; devices are borrowed as `&[Box<dyn Device>]`, and what keeps
//! them takes an `Arc<[Box<dyn Device>]>`. Every error says what, where, what is needed and what there
//! is, and has a [`Status`](status::Status), its class. Nothing is printed, and nothing exits.
//!
//! # Features
//!
//! | feature | what it adds | |
//! |---|---|---|
//! | `cuda` | NVIDIA GPUs, through their driver, which is loaded when a GPU is asked for: neither to build nor to run is anything of CUDA needed | default |
//! | `hub` | [`hub`] | |
// Denied and not forbidden: a GPU's driver is a C library that `device::cuda::driver` calls, `dlpack::abi`
// is called back by C, and `products::on_device` (of experts too) takes a caller's pointers, for which `device::multiplier`
// declares what calls the driver; `checkpoint::mapped::linux` shows a file's mapping, and `windows` asks the
// system about an open file. No other module may.
#![deny(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod cancel;
pub mod checkpoint;
pub mod device;
pub mod dlpack;
#[cfg(feature = "hub")]
pub mod hub;
pub mod load;
pub mod memory;
pub mod model;
pub mod plan;
pub mod policy;
pub mod products;
mod progress;
pub mod ranks;
pub mod report;
pub mod save;
pub mod status;
pub mod synth;
#[cfg(any(test, feature = "testing"))]
#[doc(hidden)]
pub mod testing;
pub mod text;
pub mod types;
#[cfg(windows)]
mod windows;

pub use cancel::CancelToken;
pub use checkpoint::Checkpoint;
pub use device::{Device, HostDevice, open_devices};
pub use load::{LoadOptions, load, load_reserved, reserve};
pub use model::{Model, Tensor};
pub use plan::{Plan, PlanOptions, propose};
pub use policy::Policy;
pub use products::Linear;
pub use progress::{Progress, ReportProgress};
pub use types::{DType, Format, Placement, Slice};

/// The arithmetic, of which [`LoadOptions::kernels`] and [`Tensor::to_floats`] speak: `Float`, `Kernels`,
/// `KernelError`, and the crate `half`.
pub use tightfit_kernels as kernels;
