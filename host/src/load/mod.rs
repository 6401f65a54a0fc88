//! Carries out a plan: reserves the devices' memory, reads the checkpoint in chunks, and puts
//! every tensor into its final place, quantized on the way.
//!
//! Memory beyond the devices' own is the staging ring and, under double quantization, the f32
//! scales of the tensors in flight; both are fixed before the first byte is read, whatever the
//! model's size. The stored bytes depend on the checkpoint and the plan alone, not on the number of
//! threads, the size of staging or the instruction set.

mod arena;
mod error;
mod put;
mod reserve;
mod work;

pub(crate) use work::float_type;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

pub use error::LoadError;
pub use reserve::{MAX_REVISIONS, PlaceError, Placed, Reserved, Revision, place, place_with_tail};

use tightfit_kernels::Kernels;

use crate::checkpoint::Checkpoint;
use crate::device::Device;
use crate::memory::{DEFAULT_STAGING, StagingRing};
use crate::model::Model;
use crate::plan::Plan;
use crate::types::Format;
use put::{Writers, put};
use work::{Chunk, Finished, Queue, Task, as_f32};

/// Asks a load to stop. Clones ask for the same.
#[derive(Debug, Clone, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// A token that has not been used.
    pub fn new() -> CancelToken {
        CancelToken::default()
    }

    /// Asks whatever was given this token to stop at the next chunk.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it has been asked to.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// The flag itself, for what polls it.
    pub fn flag(&self) -> &AtomicBool {
        &self.0
    }
}

/// How far a load has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the checkpoint that are in their place, or on their way there.
    pub bytes_read: u64,
    /// Bytes of all tensors that the plan places.
    pub bytes_total: u64,
}

/// How to load.
pub struct LoadOptions<'a> {
    /// Worker threads; each reads and quantizes. At least one, and no more than staging has slots.
    pub threads: usize,
    /// Upper bound of host staging in bytes, page-locked buffers included.
    pub staging_bytes: u64,
    /// Blocks with infinities or NaN are an error instead of a number in the report.
    pub strict: bool,
    /// The kernels to quantize with.
    pub kernels: Kernels,
    /// Called from the workers after every chunk.
    pub progress: &'a (dyn Fn(Progress) + Sync),
    /// Checked before every chunk.
    pub cancel: CancelToken,
}

impl Default for LoadOptions<'_> {
    fn default() -> Self {
        LoadOptions {
            threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
            staging_bytes: DEFAULT_STAGING,
            strict: false,
            kernels: Kernels::detect(),
            progress: &|_| {},
            cancel: CancelToken::new(),
        }
    }
}

/// What a load did.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LoadStats {
    /// Time of the reservations, and from there to the last byte.
    pub elapsed: Duration,
    /// Bytes read from the checkpoint.
    pub bytes_read: u64,
    /// Tensors that were quantized.
    pub quantized: u64,
    /// Tensors that were stored as they are or cast.
    pub stored: u64,
    /// Quantized tensors with infinities or NaN: index and number of blocks that have one.
    pub nonfinite: Vec<(usize, u64)>,
    /// Bytes of the staging ring and of the page-locked buffers.
    pub staging_bytes: u64,
    /// Bytes allowed for the f32 scales of double-quantized tensors in flight.
    pub scratch_bytes: u64,
}

impl LoadStats {
    /// Blocks with infinities or NaN in all tensors.
    pub fn nonfinite_blocks(&self) -> u64 {
        self.nonfinite.iter().map(|(_, blocks)| blocks).sum()
    }
}

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
    let Reserved {
        plan,
        mut memory,
        elapsed,
    } = reserved;
    let plan = &plan;
    if plan.tensors.len() != checkpoint.tensors().len() {
        return Err(LoadError::OtherPlan);
    }
    let buffers = put::buffers(&memory);
    let mut ring = StagingRing::new(options.staging_bytes, options.threads, buffers)?;
    let staging_bytes = ring.bytes();
    let slot_bytes = ring.slot_bytes();
    let scratch_bytes = plan.scratch_budget();
    let total = placed_bytes(checkpoint, plan);
    let mut writers = Vec::with_capacity(ring.workers());
    for _ in 0..ring.workers() {
        writers.push(Writers::new(plan, &memory, slot_bytes)?);
    }

    let places = arena::split(plan, &mut memory)?;
    let run = Run {
        checkpoint,
        options,
        queue: Queue::new(checkpoint, plan, places, slot_bytes, scratch_bytes),
        stop: AtomicBool::new(false),
        error: Mutex::new(None),
        bytes_read: AtomicU64::new(0),
        bytes_total: total,
        finished: Mutex::new(Finished::new(checkpoint.tensors().len())),
    };
    std::thread::scope(|scope| {
        let mut slots = ring.slots().zip(writers);
        let mine = slots.next();
        for (slot, writers) in slots {
            // With fewer threads than asked for, the load is slower but the same.
            let spawned = std::thread::Builder::new()
                .name("tightfit-load".to_owned())
                .spawn_scoped(scope, || run.work(slot, writers));
            if let Err(error) = spawned {
                tracing::warn!("cannot start another thread: {error}");
                break;
            }
        }
        if let Some((slot, writers)) = mine {
            run.work(slot, writers);
        }
    });
    let Run {
        error,
        finished,
        bytes_read,
        ..
    } = run;
    if let Some(error) = error.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    let finished = finished
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    let count = |quantized: bool| {
        plan.tensors
            .iter()
            .filter(|tensor| tensor.placement.device.is_some())
            .filter(|tensor| matches!(tensor.placement.format, Format::Nf4 { .. }) == quantized)
            .count() as u64
    };
    let stats = LoadStats {
        elapsed: elapsed + start.elapsed(),
        bytes_read: bytes_read.into_inner(),
        quantized: count(true),
        stored: count(false),
        nonfinite: finished.nonfinite.into_iter().collect(),
        staging_bytes,
        scratch_bytes,
    };
    Ok(Model::new(
        checkpoint,
        plan.clone(),
        memory,
        finished.nested_offsets,
        stats,
    ))
}

/// Bytes of the checkpoint that belong to tensors that are loaded.
fn placed_bytes(checkpoint: &Checkpoint, plan: &Plan) -> u64 {
    checkpoint
        .tensors()
        .iter()
        .zip(&plan.tensors)
        .filter(|(_, planned)| planned.placement.device.is_some())
        .map(|(tensor, _)| tensor.source_bytes())
        .sum()
}

/// One load while it goes on; shared by its workers.
struct Run<'a, 'm> {
    checkpoint: &'a Checkpoint,
    options: &'a LoadOptions<'a>,
    queue: Queue<'m>,
    stop: AtomicBool,
    error: Mutex<Option<LoadError>>,
    bytes_read: AtomicU64,
    bytes_total: u64,
    finished: Mutex<Finished>,
}

impl Run<'_, '_> {
    /// Works until nothing is left, something fails, or the user cancels.
    fn work(&self, slot: &mut [u8], mut writers: Writers) {
        self.work_with(slot, &mut writers);
        // Also after an error elsewhere: what is under way ends before memory is given back.
        if let Err(error) = writers.finish() {
            self.fail(error);
        }
    }

    fn work_with(&self, slot: &mut [u8], writers: &mut Writers) {
        let mut scales = Vec::new();
        while !self.stop.load(Ordering::Relaxed) {
            if self.options.cancel.is_cancelled() {
                return self.fail(LoadError::Cancelled);
            }
            let Some(chunk) = self.queue.next(&self.stop) else {
                return;
            };
            let bytes = chunk.bytes;
            if let Err(error) = self.carry_out(chunk, slot, &mut scales, writers) {
                return self.fail(error);
            }
            let bytes_read = self.bytes_read.fetch_add(bytes as u64, Ordering::Relaxed);
            (self.options.progress)(Progress {
                bytes_read: bytes_read + bytes as u64,
                bytes_total: self.bytes_total,
            });
        }
    }

    /// The first error wins, and wakes whoever waits for scratch.
    fn fail(&self, error: LoadError) {
        let mut first = self.error.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(error);
        drop(first);
        self.stop.store(true, Ordering::Relaxed);
        self.queue.wake();
    }

    fn carry_out(
        &self,
        chunk: Chunk<'_>,
        slot: &mut [u8],
        scales: &mut Vec<f32>,
        writers: &mut Writers,
    ) -> Result<(), LoadError> {
        let kernels = self.options.kernels;
        let read = |buffer: &mut [u8]| {
            self.checkpoint
                .read_at(chunk.shard, chunk.offset, buffer)
                .map_err(LoadError::Checkpoint)
        };
        match chunk.task {
            // No staging of ours: what the processor cannot write is read into what is copied.
            Task::Copy { data } => put(writers, [data], |[data]| read(data)),
            Task::Cast { from, to, data } => {
                let source = &mut slot[..chunk.bytes];
                read(source)?;
                put(writers, [data], |[data]| {
                    Ok(kernels.cast(source, from, to, data)?)
                })
            }
            Task::Quantize {
                float,
                block_size,
                codes,
                absmax,
            } => {
                let source = &mut slot[..chunk.bytes];
                read(source)?;
                let stats = put(writers, [codes, absmax], |[codes, absmax]| {
                    let absmax = as_f32(absmax);
                    Ok(kernels.quantize_nf4(source, float, block_size, codes, absmax)?)
                })?;
                self.count_nonfinite(chunk.tensor, stats.nonfinite_blocks)
            }
            Task::QuantizeDouble {
                float,
                block_size,
                codes,
                first_block,
                state,
            } => {
                let source = &mut slot[..chunk.bytes];
                read(source)?;
                let elements = chunk.bytes / float.bytes();
                scales.clear();
                scales.resize(tightfit_kernels::blocks(elements, block_size), 0.0);
                let stats = put(writers, [codes], |[codes]| {
                    Ok(kernels.quantize_nf4(source, float, block_size, codes, scales)?)
                })?;
                if let Some(scratch) = state.finish_chunk(first_block, scales) {
                    let offset = state.quantize_scales(kernels, &scratch, writers)?;
                    let mut finished = self.finished.lock().unwrap_or_else(PoisonError::into_inner);
                    finished.nested_offsets[chunk.tensor] = offset;
                    drop(finished);
                    self.queue.return_scratch(4 * scratch.len() as u64);
                }
                self.count_nonfinite(chunk.tensor, stats.nonfinite_blocks)
            }
        }
    }

    fn count_nonfinite(&self, tensor: usize, blocks: u64) -> Result<(), LoadError> {
        if blocks == 0 {
            return Ok(());
        }
        if self.options.strict {
            return Err(LoadError::NonFinite {
                tensor: self.checkpoint.tensors()[tensor].name.clone(),
                blocks,
            });
        }
        let mut finished = self.finished.lock().unwrap_or_else(PoisonError::into_inner);
        *finished.nonfinite.entry(tensor).or_default() += blocks;
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests;
