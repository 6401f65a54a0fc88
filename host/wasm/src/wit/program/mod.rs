//! The interfaces that a program imports: devices, buffers, NF4, checkpoints, models and products, beside
//! those of policies.
//!
//! 1. Keep a [`ProgramCtx`] and a [`ResourceTable`] in the data of your store, beside the
//!    [`TightfitCtx`](super::TightfitCtx). Limit the table with [`ResourceTable::set_max_capacity`].
//! 2. Implement [`ProgramView`] for that data.
//! 3. Call [`add_program_to_linker`], which adds what [`add_to_linker`](super::add_to_linker) does
//!    too, or add single interfaces with [`HasProgram`].
//! 4. Instantiate a program and call it through [`Run`].
//!
//! A program's memory is bounded by its quota, and given back by `Drop` of what is in the table: when
//! a guest has trapped, drop its store and nothing of it is left.
//!
//! The functions compute and read files before they return, so that an asynchronous host does well
//! to run programs on threads that may block. Fuel and epochs do not interrupt them. They ask instead
//! for the context's deadline and [`CancelToken`]: at the start of every call but those that free
//! something, and in longer ones after every few milliseconds of work, be it opening,
//! planning, loading, copying or computing. Then they trap with [`Stopped`] as the cause.
//!
//! What a GPU does for a program is queued, and so little of it at a time that a call which queues more waits
//! for what was queued before: the time that a program buys of a GPU is its own time, which the deadline ends
//! (see [`tightfit::device::Queue`]). When a program ends, what it has queued is waited for.

pub mod bindings;
mod buffers;
mod checkpoints;
mod devices;
mod error;
mod linear;
mod models;
mod nf4;
mod output;
mod run;
mod sliced;
#[cfg(test)]
mod tests;
mod transformer;
mod view;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use tightfit_kernels::Kernels;
use wasmtime::component::{HasData, Linker, ResourceTable};

pub use crate::memory::Buffer;
pub use crate::stop::Stopped;
pub use checkpoints::OpenCheckpoint;
pub use error::CallError;
pub use linear::Weight;
pub use models::LoadedModel;
pub use output::{Output, output};
pub use run::Run;

use super::TightfitView;
use crate::memory::Memory;
use crate::stop::Stop;
use bindings::tightfit::host::{
    buffers as wit_buffers, checkpoints as wit_checkpoints, devices as wit_devices, errors,
    linear as wit_linear, models as wit_models, nf4 as wit_nf4, output as wit_output,
    sliced_models as wit_sliced_models, transformer as wit_transformer,
};
use checkpoints::Grants;
use tightfit::cancel::CancelToken;
use tightfit::device::{Device, DeviceInfo};
use tightfit::memory::{DEFAULT_STAGING, Gauge, Usage};

/// What one program has and may do.
#[derive(Debug)]
pub struct ProgramCtx {
    devices: Arc<[Box<dyn Device>]>,
    /// What the devices said of themselves when the program was given them.
    offered: Vec<DeviceInfo>,
    /// What products work in, by device. Given back before the pools that it is of.
    scratch: BTreeMap<usize, Buffer>,
    /// What ids and positions were wrong, by device.
    faults: BTreeMap<usize, transformer::DeviceFaults>,
    memory: Memory,
    grants: Grants,
    models: models::Loader,
    kernels: Kernels,
    output: Option<Output>,
    stop: Stop,
}

impl ProgramCtx {
    /// Returns a program that may use these devices, and reserve at most `quota` bytes on all of
    /// them together. Other programs may share the devices; each sees its own usage only.
    ///
    /// What is free on the devices is asked for here, and never again: what others take or free later
    /// is nothing that a program is told.
    pub fn new(devices: Arc<[Box<dyn Device>]>, quota: u64) -> ProgramCtx {
        ProgramCtx {
            scratch: BTreeMap::new(),
            faults: BTreeMap::new(),
            memory: Memory::new(&devices, quota),
            offered: devices.iter().map(|device| device.info()).collect(),
            devices,
            grants: Grants::default(),
            models: models::Loader::new(),
            kernels: Kernels::detect(),
            output: None,
            stop: Stop::default(),
        }
    }

    /// Lets the program open the checkpoint at `path` under `name`. It does not learn the path.
    pub fn grant(mut self, name: impl Into<String>, path: impl Into<PathBuf>) -> ProgramCtx {
        self.grants.add(name.into(), path.into());
        self
    }

    /// Ends the program's calls of the host when this token is used.
    pub fn cancelled_by(mut self, token: CancelToken) -> ProgramCtx {
        self.stop.cancel = token;
        self
    }

    /// How models are loaded: worker threads (by default one per core), and bytes of host memory for
    /// staging in all.
    pub fn load_with(mut self, threads: Option<usize>, staging: Option<u64>) -> ProgramCtx {
        if let Some(threads) = threads {
            self.models.threads = threads;
        }
        self.models.staging_bytes = staging.unwrap_or(DEFAULT_STAGING);
        self
    }

    /// Gives what the program says while it runs to this output; by default it is dropped.
    pub fn with_output(mut self, output: Output) -> ProgramCtx {
        self.output = Some(output);
        self
    }

    /// Ends the program's calls of the host at this time. By default they take as long as they take.
    pub fn set_deadline(&mut self, deadline: Instant) {
        self.stop.deadline = Some(deadline);
    }

    /// Returns what the program has of the device with this index; `None` where there is none.
    pub fn usage(&self, device: usize) -> Option<Usage> {
        self.memory.usage(u32::try_from(device).ok()?).ok()
    }

    /// Returns the devices as they were offered, less what the program has taken of each since.
    fn device_infos(&self) -> Vec<DeviceInfo> {
        let offered = self.offered.iter().enumerate();
        let infos = offered.map(|(index, offered)| {
            let taken = self.usage(index).map_or(0, |usage| usage.reserved.now);
            DeviceInfo {
                available: offered.available.saturating_sub(taken),
                ..offered.clone()
            }
        });
        infos.collect()
    }

    /// Returns what the program has reserved on all devices together, in bytes.
    pub fn reserved(&self) -> Gauge {
        self.memory.reserved().reserved
    }
}

/// The context and the table of resources inside a store's data.
#[derive(Debug)]
pub struct ProgramCtxView<'a> {
    /// What the program has and may do.
    pub context: &'a mut ProgramCtx,
    /// Its buffers, checkpoints and models, and those of other interfaces.
    pub table: &'a mut ResourceTable,
}

/// Gives access to the program's context inside a store's data.
pub trait ProgramView: TightfitView {
    /// Returns the context and the table.
    fn tightfit_program(&mut self) -> ProgramCtxView<'_>;
}

/// Adds everything that a program imports to a linker, including what policies import (`types`,
/// `sizing`, `log`, `slices`).
///
/// # Errors
/// When the linker has one of the interfaces already.
pub fn add_program_to_linker<T: ProgramView + 'static>(
    linker: &mut Linker<T>,
) -> wasmtime::Result<()> {
    super::add_to_linker(linker)?;
    errors::add_to_linker::<T, HasProgram>(linker, T::tightfit_program)?;
    wit_devices::add_to_linker::<T, HasProgram>(linker, T::tightfit_program)?;
    wit_buffers::add_to_linker::<T, HasProgram>(linker, T::tightfit_program)?;
    wit_nf4::add_to_linker::<T, HasProgram>(linker, T::tightfit_program)?;
    wit_checkpoints::add_to_linker::<T, HasProgram>(linker, T::tightfit_program)?;
    wit_models::add_to_linker::<T, HasProgram>(linker, T::tightfit_program)?;
    wit_sliced_models::add_to_linker::<T, HasProgram>(linker, T::tightfit_program)?;
    wit_linear::add_to_linker::<T, HasProgram>(linker, T::tightfit_program)?;
    wit_transformer::add_to_linker::<T, HasProgram>(linker, T::tightfit_program)?;
    wit_output::add_to_linker::<T, HasProgram>(linker, T::tightfit_program)
}

/// How a single interface is told where in a store's data the program's context and table are, as
/// [`HasTightfit`](super::HasTightfit) for those of policies.
#[derive(Debug)]
pub struct HasProgram;

impl HasData for HasProgram {
    type Data<'a> = ProgramCtxView<'a>;
}

impl errors::Host for ProgramCtxView<'_> {
    fn convert_error(&mut self, error: CallError) -> wasmtime::Result<errors::Error> {
        match error {
            CallError::Guest(error) => Ok(error),
            CallError::Trap(trap) => Err(trap),
        }
    }
}
