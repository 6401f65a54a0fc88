//! Carries out a plan: reserves the devices' memory, reads the checkpoint in chunks, and puts
//! every tensor into its final place, quantized on the way.
//!
//! Memory beyond the devices' own is the staging ring and, under double quantization, the f32
//! scales of the tensors in flight; both are fixed before the first byte is read, whatever the
//! model's size. The stored bytes depend on the checkpoint and the plan alone, not on the number of
//! threads, the size of staging, the instruction set, or who quantizes.

mod arena;
mod balance;
mod double;
mod error;
mod on_device;
mod part;
mod put;
mod reading;
mod reserve;
mod run;
mod scratch;
mod source;
mod work;

use std::time::Instant;

pub use balance::QuantizeOn;
pub use error::LoadError;
pub use reserve::{
    MAX_REVISIONS, ReserveError, Reserved, ReservedPlan, Revision, reserve, reserve_with,
};

use tightfit_kernels::Kernels;

use crate::cancel::CancelToken;
use crate::checkpoint::Checkpoint;
use crate::device::Device;
use crate::memory::{DEFAULT_STAGING, StagingRing};
use crate::model::{LoadStats, Model};
use crate::plan::Plan;
use crate::progress::ReportProgress;
use crate::types::Format;
use arena::Split;
use on_device::OnDevices;
use put::Transfers;
use run::Run;
use work::Queue;

/// The least that it is worth to have a GPU's kernels compiled for, unless the user says otherwise:
/// with less the load would be over first.
pub const DEFAULT_COMPILE_FROM: u64 = 4 << 30;

/// How to load.
///
/// ```
/// use tightfit::LoadOptions;
///
/// let options = LoadOptions::default()
///     .with_threads(4)
///     .with_progress(&|progress| println!("{} of {}", progress.bytes_done, progress.bytes_total));
/// ```
#[non_exhaustive]
pub struct LoadOptions<'a> {
    /// Worker threads; each reads and quantizes. At least one, and no more than staging has slots.
    pub threads: usize,
    /// Upper bound of host staging in bytes, page-locked buffers included.
    pub staging_bytes: u64,
    /// Blocks with infinities or NaN are an error instead of a number in the report.
    /// Those that a GPU finds are known when it has quantized everything: the error comes then.
    pub strict: bool,
    /// Where weights for a GPU are quantized.
    pub quantize_on: QuantizeOn,
    /// Bytes of the checkpoint that have to be quantized for a GPU before [`QuantizeOn::Auto`] has the
    /// driver compile its kernels, which takes it about a tenth of a second once on every machine.
    /// Kernels that are there already are used for less.
    pub compile_from: u64,
    /// The processor's kernels.
    pub kernels: Kernels,
    /// Called from the workers after every chunk.
    pub progress: ReportProgress<'a>,
    /// Looked at before every chunk, and every few milliseconds before the first and after the last.
    pub cancel: CancelToken,
}

impl Default for LoadOptions<'_> {
    fn default() -> Self {
        LoadOptions {
            threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
            staging_bytes: DEFAULT_STAGING,
            strict: false,
            quantize_on: QuantizeOn::default(),
            compile_from: DEFAULT_COMPILE_FROM,
            kernels: Kernels::detect(),
            progress: &|_| {},
            cancel: CancelToken::new(),
        }
    }
}

tightfit_common::setters!([<'a>] LoadOptions<'a>:
    with_threads: threads, usize;
    with_staging_bytes: staging_bytes, u64;
    with_strict: strict, bool;
    with_quantize_on: quantize_on, QuantizeOn;
    with_compile_from: compile_from, u64;
    with_kernels: kernels, Kernels;
    with_progress: progress, ReportProgress<'a>;
    with_cancel: cancel, CancelToken;
);

/// Loads a checkpoint as `plan` says.
///
/// `devices` are those that the plan was made for, in its order. When this returns an error,
/// everything that was reserved has been given back.
///
/// # Errors
/// [`LoadError`]; of several errors the first.
pub fn load(
    checkpoint: &Checkpoint,
    plan: &Plan,
    devices: &[Box<dyn Device>],
    options: &LoadOptions<'_>,
) -> Result<Model, LoadError> {
    load_reserved(checkpoint, Reserved::take(plan.clone(), devices)?, options)
}

/// Loads a checkpoint into memory that has been reserved for it. When this returns an error, all of
/// it has been given back.
///
/// # Errors
/// [`LoadError`]; of several errors the first.
pub fn load_reserved(
    checkpoint: &Checkpoint,
    reserved: Reserved,
    options: &LoadOptions<'_>,
) -> Result<Model, LoadError> {
    let start = Instant::now();
    let cancel = &options.cancel;
    cancel.check()?;
    let Reserved {
        plan,
        mut memory,
        elapsed,
    } = reserved;
    let plan = &plan;
    let cut = plan.cut(checkpoint).map_err(|_| LoadError::OtherPlan)?;
    let checkpoint = cut.as_ref().unwrap_or(checkpoint);
    if !plan.is_for(checkpoint.tensors()) {
        return Err(LoadError::OtherPlan);
    }
    let buffers = put::buffers(&memory);
    let mut ring = StagingRing::new(options.staging_bytes, options.threads, buffers)?;
    let staging_bytes = ring.bytes();
    let buffer_bytes = ring.buffer_bytes();
    let scratch_bytes = plan.scratch_budget();
    // Before the first worker: whatever fails, nothing of theirs has been started.
    let on_devices = OnDevices::open(
        checkpoint,
        plan,
        &memory,
        options,
        ring.workers(),
        buffer_bytes,
    )?;
    tracing::debug!("who quantizes is settled after {:.1?}", start.elapsed());
    let Split { targets, remote } = arena::split(plan, &mut memory, cancel)?;
    let transfers = Transfers {
        remote,
        on_devices: &on_devices,
        buffer_bytes,
    };
    let buffers = transfers.page_lock(ring.workers())?;
    let queue = Queue::new(
        checkpoint,
        plan,
        targets,
        buffer_bytes,
        ring.workers(),
        scratch_bytes,
        &on_devices,
        cancel,
    )?;
    tracing::debug!("workers are started after {:.1?}", start.elapsed());
    let run = Run::new(checkpoint, plan, options, queue, transfers, start);
    std::thread::scope(|scope| {
        for device in on_devices.to_compile() {
            spawn(scope, "tightfit-kernels", || device.compile());
        }
        let run = &run;
        let mut workers = ring.slots().zip(buffers).enumerate();
        let mine = workers.next();
        for (number, (slot, buffers)) in workers {
            // With fewer threads than asked for, the load is slower but the same.
            let work = move || run.work(number, slot, buffers);
            if !spawn(scope, "tightfit-load", work) {
                break;
            }
        }
        if let Some((number, (slot, buffers))) = mine {
            run.work(number, slot, buffers);
        }
    });
    tracing::debug!("all workers have ended after {:.1?}", start.elapsed());
    let (finished, bytes_read) = run.finish()?;
    let quantized_on = on_devices.counts();
    // What its kernels worked in, where that was not part of the plan.
    drop(on_devices);
    let count = |quantized: bool| {
        plan.tensors
            .iter()
            .filter(|tensor| tensor.placement.device.is_some())
            .filter(|tensor| matches!(tensor.placement.format, Format::Nf4 { .. }) == quantized)
            .count() as u64
    };
    let stats = LoadStats {
        elapsed: elapsed + start.elapsed(),
        bytes_read,
        quantized: count(true),
        stored: count(false),
        nonfinite: finished.nonfinite.into_iter().collect(),
        quantized_on,
        staging_bytes,
        scratch_bytes,
    };
    Ok(Model::new(
        checkpoint,
        plan,
        memory,
        finished.absmax_means,
        stats,
        cancel,
    )?)
}

/// Starts a thread, if the system has one.
fn spawn<'scope, F: FnOnce() + Send + 'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    name: &str,
    work: F,
) -> bool {
    let builder = std::thread::Builder::new().name(name.to_owned());
    match builder.spawn_scoped(scope, work) {
        Ok(_) => true,
        Err(error) => {
            tracing::warn!("cannot start another thread: {error}");
            false
        }
    }
}

#[cfg(test)]
mod slices_tests;
#[cfg(test)]
pub(crate) mod tests;
