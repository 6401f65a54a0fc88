//! The command `tightfit` as a library: scenario files that test policies, and plans and reports as
//! text and pictures.
//!
//! [`main`] is the command; `tightfit help` describes it. [`draw`] shows plans as it does:
//!
//! ```
//! use tightfit::device::planned_devices;
//! use tightfit::report::fills;
//! use tightfit::{Checkpoint, propose};
//! use tightfit_cli::draw::{self, BarStyle, Heading};
//! use tightfit_wasm::{Limits, WasmPolicy};
//!
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("model");
//! # tightfit::synth::write(tightfit::synth::Preset::Demo, &path, &Default::default())?;
//! let checkpoint = Checkpoint::open(&path)?;
//! // Devices that need not be there.
//! let devices = planned_devices(&["sim:64MiB".parse()?, "sim:64MiB".parse()?])?;
//! let policy = WasmPolicy::open("auto", Limits::default())?;
//! let plan = propose(&checkpoint, &policy, &devices, &[])?.plan;
//!
//! println!("{}", draw::map(checkpoint.tensors(), &plan));
//! for (device, fill) in plan.devices.iter().zip(fills(checkpoint.tensors(), &plan)) {
//!     println!("{}", draw::bar(device.name(), device.device.capacity, &fill, BarStyle::default()));
//! }
//! let heading = Heading { model: "demo", policy: "auto" };
//! let picture = draw::svg(heading, checkpoint.tensors(), &plan);
//! assert!(picture.starts_with("<svg"));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

pub mod check;
mod command;
pub mod draw;
mod error_report;

pub use command::{main, main_with};
pub use error_report::ErrorReport;
