//! One load while it goes on: what its workers do.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tightfit_kernels::{blocks, packed_bytes};

use super::arena::Target;
use super::balance::Side;
use super::double::{DoubleState, Kept, Returned};
use super::part::{Chunk, Part, Scales, Task, ToQuantize};
use super::put::{Transfers, Writers, as_f32, put, put_to_quantize};
use super::reading::{Way, Ways};
use super::source::Source;
use super::work::{Next, Queue};
use super::{LoadError, LoadOptions};
use crate::checkpoint::{Checkpoint, Mappings};
use crate::device::{PageLocked, QuantizeJob, ScalePlace, Staged};
use crate::plan::Plan;
use crate::progress::Progress;

/// What is known of tensors only after they were read.
pub(super) struct Finished {
    /// The offset of every double-quantized tensor.
    pub(super) absmax_means: Vec<f32>,
    /// Blocks with infinities or NaN, by tensor.
    pub(super) nonfinite: BTreeMap<usize, u64>,
}

/// One load while it goes on; shared by its workers.
pub(super) struct Run<'a, 'm> {
    checkpoint: &'a Checkpoint,
    plan: &'a Plan,
    options: &'a LoadOptions<'a>,
    queue: Queue<'m>,
    transfers: Transfers<'m>,
    mappings: Mappings,
    ways: Ways,
    /// The same for slices that do not lie together.
    gathering: Ways,
    stop: AtomicBool,
    error: Mutex<Option<LoadError>>,
    /// When the load began.
    start: Instant,
    bytes_read: AtomicU64,
    /// Bytes that were read with others, and are of no use.
    read_beside: AtomicU64,
    bytes_total: u64,
    finished: Mutex<Finished>,
}

/// Ends the load when a worker panics, because the caller's callback does: the others may be waiting
/// for it.
struct StopOnPanic<'r, 'a, 'm>(&'r Run<'a, 'm>);

impl Drop for StopOnPanic<'_, '_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop();
        }
    }
}

/// In bytes, where memory of the host is touched: no page is smaller.
const PAGE: usize = 4096;

/// What one worker has for itself.
struct Worker<'w, 'm> {
    number: usize,
    /// What the processor quantizes and casts is read into it.
    slot: &'w mut [u8],
    scales: Vec<f32>,
    writers: Writers<'w, 'm>,
}

impl<'a, 'm> Run<'a, 'm> {
    pub(super) fn new(
        checkpoint: &'a Checkpoint,
        plan: &'a Plan,
        options: &'a LoadOptions<'a>,
        queue: Queue<'m>,
        transfers: Transfers<'m>,
        start: Instant,
    ) -> Run<'a, 'm> {
        let tensors = checkpoint.tensors();
        let placed = tensors
            .iter()
            .zip(&plan.tensors)
            .filter(|(_, planned)| planned.placement.device.is_some());
        Run {
            checkpoint,
            plan,
            options,
            queue,
            transfers,
            mappings: checkpoint.map(),
            ways: Ways::new(options.threads),
            gathering: Ways::new(options.threads),
            stop: AtomicBool::new(false),
            error: Mutex::new(None),
            start,
            bytes_read: AtomicU64::new(0),
            read_beside: AtomicU64::new(0),
            bytes_total: placed.map(|(tensor, _)| tensor.source_bytes()).sum(),
            finished: Mutex::new(Finished {
                absmax_means: vec![0.0; tensors.len()],
                nonfinite: BTreeMap::new(),
            }),
        }
    }

    /// What came of it, and the bytes that were read.
    ///
    /// # Errors
    /// The first of any worker.
    pub(super) fn finish(self) -> Result<(Finished, u64), LoadError> {
        let error = self.error.into_inner();
        if let Some(error) = error.unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let finished = self.finished.into_inner();
        let finished = finished.unwrap_or_else(PoisonError::into_inner);
        let bytes_read = self.bytes_read.into_inner() + self.read_beside.into_inner();
        Ok((finished, bytes_read))
    }

    /// Works until nothing is left, something fails, or the user cancels. Workers have numbers,
    /// from 0.
    pub(super) fn work(
        &self,
        number: usize,
        slot: &mut [u8],
        buffers: Option<Box<dyn PageLocked>>,
    ) {
        let _guard = StopOnPanic(self);
        tracing::trace!("worker {number} begins after {:.1?}", self.start.elapsed());
        let mut worker = Worker {
            number,
            slot,
            scales: Vec::new(),
            writers: self.transfers.writers(self.plan, number, buffers),
        };
        if let Err(error) = self.work_with(&mut worker) {
            self.fail(error);
        }
        // Also after an error elsewhere: what is under way ends before memory is given back.
        if let Err(error) = worker.writers.finish() {
            self.fail(error);
        }
        tracing::trace!("worker {number} ends after {:.1?}", self.start.elapsed());
    }

    fn work_with(&self, worker: &mut Worker<'_, 'm>) -> Result<(), LoadError> {
        let mut post = self.queue.post(worker.number);
        while !self.stop.load(Ordering::Relaxed) {
            self.options.cancel.check()?;
            match self.queue.next(&self.stop, &mut post) {
                Next::Nothing => break,
                Next::Finish => {
                    worker.writers.finish()?;
                    if self.queue.finished(&mut post) {
                        self.settle()?;
                    }
                }
                Next::Part(part) => self.carry_out_part(part, worker)?,
                Next::Scales(part) => {
                    let kernels = self.options.kernels;
                    if let Some(memory) = part.quantize(kernels, &mut worker.writers)? {
                        self.queue.return_scratch(Returned::OnHost(memory));
                    }
                }
            }
        }
        Ok(())
    }

    fn carry_out_part(
        &self,
        mut part: Part<'m>,
        worker: &mut Worker<'_, 'm>,
    ) -> Result<(), LoadError> {
        while !self.stop.load(Ordering::Relaxed)
            && let Some(chunk) = part.next_chunk(self.queue.buffer_bytes())
        {
            self.options.cancel.check()?;
            let device = self.plan.tensors[chunk.tensor].placement.device;
            let written = chunk.stored_bytes();
            let bytes = self.carry_out(chunk, worker)?;
            let bytes_read = self.bytes_read.fetch_add(bytes, Ordering::Relaxed);
            if bytes_read == 0 {
                tracing::debug!("first chunk is sent after {:.1?}", self.start.elapsed());
            }
            let bytes_done = bytes_read + bytes;
            let progress = Progress::new(bytes_done, self.bytes_total);
            (self.options.progress)(progress.with_written(device, written));
        }
        Ok(())
    }

    /// Sees to what devices have found while they quantized, before plain tensors take its place.
    fn settle(&self) -> Result<(), LoadError> {
        let found = self
            .transfers
            .on_devices
            .nonfinite()
            .map_err(LoadError::Device)?;
        for (tensor, blocks) in found {
            self.count_nonfinite(tensor, blocks)?;
        }
        tracing::debug!("everything is quantized after {:.1?}", self.start.elapsed());
        self.queue.settled();
        Ok(())
    }

    /// The first error wins, and wakes whoever waits.
    fn fail(&self, error: LoadError) {
        let mut first = self.error.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(error);
        drop(first);
        self.stop();
    }

    fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.queue.wake();
    }

    fn finished(&self) -> MutexGuard<'_, Finished> {
        self.finished.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the bytes of the checkpoint that were read.
    fn carry_out(&self, chunk: Chunk<'m>, worker: &mut Worker<'_, 'm>) -> Result<u64, LoadError> {
        let tensor = &self.checkpoint.tensors()[chunk.tensor];
        let source = Source {
            checkpoint: self.checkpoint,
            tensor: chunk.tensor,
            indirect: chunk.is_indirect.then_some(tensor),
            shard: chunk.shard,
            offset: chunk.offset,
            bytes: chunk.bytes,
            kernels: self.options.kernels,
            mappings: &self.mappings,
            beside: &self.read_beside,
        };
        match chunk.task {
            // No staging of ours: what the processor cannot write is read into what is copied.
            Task::Copy { data } => put(&mut worker.writers, [data], |[data]| {
                source.read(0, data, worker.slot)
            })?,
            Task::WidenScales { data } => {
                let quantized = tensor.quantized.as_ref().ok_or(LoadError::Internal(
                    "scales are not those of a quantized weight",
                ))?;
                put(&mut worker.writers, [data], |[data]| {
                    let first = chunk.offset / 4;
                    let read =
                        self.checkpoint
                            .read_absmax(tensor, quantized, first, data, worker.slot);
                    let beside = read.map_err(LoadError::Checkpoint)?;
                    self.read_beside.fetch_add(beside, Ordering::Relaxed);
                    Ok(())
                })?;
                let until = |end| quantized.stored_bytes_until(end);
                return Ok(until(chunk.offset + chunk.bytes as u64) - until(chunk.offset));
            }
            Task::Cast { from, to, data } => {
                let (slot, scratch) = source.cut(worker.slot);
                put(&mut worker.writers, [data], |[data]| {
                    let step = slot.len();
                    for start in (0..source.bytes).step_by(step) {
                        let piece = &mut slot[..step.min(source.bytes - start)];
                        source.read(start, piece, scratch)?;
                        let data = &mut data[start / from.bytes() * to.bytes()..];
                        let data = &mut data[..piece.len() / from.bytes() * to.bytes()];
                        self.options.kernels.cast(piece, from, to, data)?;
                    }
                    Ok(())
                })?;
            }
            Task::Quantize(piece) => self.quantize(&source, piece, worker)?,
        }
        Ok(source.source_bytes())
    }

    fn quantize(
        &self,
        source: &Source<'_>,
        piece: ToQuantize<'m>,
        worker: &mut Worker<'_, 'm>,
    ) -> Result<(), LoadError> {
        let state = match &piece.scales {
            Scales::Stored(_) => None,
            Scales::Quantized { first, state } => Some((*first, Arc::clone(state))),
        };
        // A tensor that was begun before the kernels were there is the processor's to its end.
        let is_free = match &state {
            None => true,
            Some((_, state)) => matches!(state.kept(), Kept::OnDevice(_)),
        };
        let device = piece.codes.on_device().filter(|_| is_free);
        let ready = device.and_then(|(device, _)| self.transfers.on_devices.ready(device));
        let side = ready.map_or(Side::Host, |ready| ready.choose(source.bytes));
        let count = blocks(piece.elements, piece.block_size);
        match side {
            Side::Host => self.quantize_on_host(source, piece, worker)?,
            Side::Device => self.quantize_on_device(source, piece, worker)?,
        }
        if let Some(ready) = ready {
            ready.record(source.bytes, self.start.elapsed());
        }
        let device = self.plan.tensors[source.tensor].placement.device;
        self.transfers.on_devices.count(device, side, source.bytes);
        match state {
            None => Ok(()),
            Some((first, state)) => {
                self.quantize_scales(source.tensor, first, count, &state, worker)
            }
        }
    }

    /// Quantizes from where the page cache has the bytes, or reads as much at a time as stays in the
    /// processor's cache. Scales that the processor is to quantize are left in the worker's.
    fn quantize_on_host(
        &self,
        source: &Source<'_>,
        piece: ToQuantize<'_>,
        worker: &mut Worker<'_, 'm>,
    ) -> Result<(), LoadError> {
        let Worker {
            slot,
            scales,
            writers,
            ..
        } = worker;
        let (float, block_size) = (piece.float, piece.block_size);
        let kernels = self.options.kernels;
        let (slot, scratch) = source.cut(slot);
        let block_bytes = block_size.elements() * float.bytes();
        let step = slot.len() / block_bytes * block_bytes;
        let is_fresh = piece.codes.on_device().is_none();
        let mut produce = |codes: &mut [u8], absmax: &mut [f32]| {
            if is_fresh {
                // The system finds and zeroes pages here, however the chunk is read: that is not measured.
                codes.iter_mut().step_by(PAGE).for_each(|byte| *byte = 0);
                let step = PAGE / size_of::<f32>();
                absmax
                    .iter_mut()
                    .step_by(step)
                    .for_each(|scale| *scale = 0.0);
            }
            let begun = Instant::now();
            let ways = match source.gather() {
                None => &self.ways,
                Some(_) => &self.gathering,
            };
            let window = match ways.choose() {
                Way::Look => source.window(),
                Way::Read => None,
            };
            let mut nonfinite_blocks = 0;
            for start in (0..source.bytes).step_by(step) {
                self.options.cancel.check()?;
                let length = step.min(source.bytes - start);
                let piece = match &window {
                    Some(window) => source.look(window, start, &mut slot[..length]),
                    None => {
                        source.read(start, &mut slot[..length], scratch)?;
                        &slot[..length]
                    }
                };
                let (first, elements) = (start / float.bytes(), length / float.bytes());
                let codes = &mut codes[packed_bytes(first)..][..packed_bytes(elements)];
                let absmax =
                    &mut absmax[blocks(first, block_size)..][..blocks(elements, block_size)];
                let stats = kernels.quantize_nf4(piece, float, block_size, codes, absmax)?;
                nonfinite_blocks += stats.nonfinite_blocks;
            }
            let way = match window {
                None => Way::Read,
                Some(window) => {
                    window.finish().map_err(LoadError::Checkpoint)?;
                    Way::Look
                }
            };
            ways.record(way, source.bytes, begun.elapsed());
            Ok(nonfinite_blocks)
        };
        let count = blocks(piece.elements, block_size);
        let nonfinite_blocks = match self.scale_target(&piece.codes, piece.scales, count) {
            Some(absmax) => put(writers, [piece.codes, absmax], |[codes, absmax]| {
                produce(codes, as_f32(absmax))
            }),
            None => {
                scales.clear();
                scales.resize(count, 0.0);
                put(writers, [piece.codes], |[codes]| produce(codes, scales))
            }
        }?;
        self.count_nonfinite(source.tensor, nonfinite_blocks)
    }

    /// Reads as much at a time as a buffer holds, and has the device quantize it.
    fn quantize_on_device(
        &self,
        source: &Source<'_>,
        mut piece: ToQuantize<'_>,
        worker: &mut Worker<'_, 'm>,
    ) -> Result<(), LoadError> {
        let on_devices = self.transfers.on_devices;
        let device = piece.codes.on_device();
        let device = device.and_then(|(number, _)| Some((number, on_devices.get(number)?)));
        let (number, device) = device.ok_or(LoadError::Internal(
            "a device that does not quantize was asked to",
        ))?;
        let nonfinite = device
            .nonfinite_of(source.tensor)
            .ok_or(LoadError::Internal("a device has no counters"))?;
        let float = piece.float;
        let step = self.queue.buffer_bytes() / float.bytes();
        let mut start = 0;
        while piece.elements > 0 {
            let ToQuantize {
                block_size,
                elements,
                codes,
                scales,
                ..
            } = piece.take(step);
            let count = blocks(elements, block_size);
            let (
                Some((_, codes)),
                Some(Target::Device {
                    offset,
                    in_workspace,
                    ..
                }),
            ) = (codes.on_device(), self.scale_target(&codes, scales, count))
            else {
                return Err(LoadError::Internal(
                    "codes are not on a device that quantizes",
                ));
            };
            let job = QuantizeJob {
                staged: Staged::Floats(float),
                block_size,
                elements,
                source: 0,
                codes,
                absmax: match in_workspace {
                    true => ScalePlace::Workspace(offset),
                    false => ScalePlace::Reservation(offset),
                },
                nonfinite,
            };
            let bytes = elements * float.bytes();
            let source = source.part(start, bytes);
            let slot = &mut *worker.slot;
            put_to_quantize(&mut worker.writers, number, job, |buffer| {
                source.stage(float, buffer, slot)
            })?;
            start += bytes;
        }
        Ok(())
    }

    /// Where this many f32 scales go that belong to these codes; none where the worker has them.
    fn scale_target<'t>(
        &self,
        codes: &Target<'_>,
        scales: Scales<'t>,
        count: usize,
    ) -> Option<Target<'t>> {
        match scales {
            Scales::Stored(absmax) => Some(absmax),
            Scales::Quantized { first, state } => match state.kept() {
                Kept::OnHost(_) => None,
                Kept::OnDevice(scratch) => {
                    let (device, _) = codes.on_device()?;
                    Some(Target::Device {
                        device,
                        offset: scratch.start + 4 * first as u64,
                        len: 4 * count,
                        in_workspace: true,
                    })
                }
            },
        }
    }

    /// Quantizes the scales of a tensor, if those of this chunk, `count` many, are the last.
    fn quantize_scales(
        &self,
        tensor: usize,
        first: usize,
        count: usize,
        state: &DoubleState<'m>,
        worker: &mut Worker<'_, 'm>,
    ) -> Result<(), LoadError> {
        let writers = &mut worker.writers;
        let (mean, device, scratch) = match state.kept() {
            Kept::OnHost(_) => {
                let Some(scales) = state.finish_on_host(first, &worker.scales) else {
                    return Ok(());
                };
                let mean = self.options.kernels.absmax_mean(&scales);
                self.finished().absmax_means[tensor] = mean;
                let parts = state.parts(scales, mean, self.queue.buffer_bytes());
                self.queue.add_scales(parts);
                return Ok(());
            }
            Kept::OnDevice(scratch) => {
                if !state.finish_on_device(count) {
                    return Ok(());
                }
                let (device, mean) = state.quantize_on_device(
                    tensor,
                    scratch.start,
                    self.transfers.on_devices,
                    writers,
                )?;
                (mean, device, scratch.take())
            }
        };
        self.finished().absmax_means[tensor] = mean;
        let scratch = scratch.ok_or(LoadError::Internal("scratch is given back twice"))?;
        self.queue
            .return_scratch(Returned::OnDevice { device, scratch });
        Ok(())
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
        *self.finished().nonfinite.entry(tensor).or_default() += blocks;
        Ok(())
    }
}
