//! Devices that quantize by themselves: the memory that their kernels work in, and what they found.
//!
//! What the kernels need beside the results lies where plain tensors go, of which what goes there is read
//! last, so that nothing is reserved for it. From the first byte on:
//! - a record for each tensor: blocks with infinities or NaN as u64, the mean of scales as f32;
//! - a piece of source for each worker, as large as its buffers;
//! - for double quantization the f32 scales of tensors under way, as much as the two largest have, and
//!   sums of these.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tightfit_kernels::Isa;

use super::balance::{Balance, QuantizeOn, Side};
use super::double::DeviceScratch;
use super::put::is_remote;
use super::{LoadError, LoadOptions};
use crate::checkpoint::Checkpoint;
use crate::device::{DeviceError, Quantizer, Reservation, ScalesJob, Workspace};
use crate::memory::{Allocation, Pool};
use crate::model::QuantizedBytes;
use crate::plan::{PART_ALIGNMENT, Plan, PlannedTensor};
use crate::types::Format;

/// Bytes of a record.
const RECORD: u64 = 16;
/// Where the mean of scales is in it.
const MEAN: u64 = 8;

/// With so many the processor's vectors quantize floats faster than the bus brings them, by all that was
/// measured: then `auto` leaves a device's kernels alone.
const ENOUGH_WORKERS: usize = 8;

/// The devices of a load, in the order of the plan.
#[derive(Debug)]
pub(super) struct OnDevices {
    by_device: Vec<Option<OnDevice>>,
    quantized: Vec<Quantized>,
}

/// Bytes of the checkpoint that have been quantized for one device.
#[derive(Debug, Default)]
struct Quantized {
    by_host: AtomicU64,
    by_device: AtomicU64,
}

/// One that can quantize.
#[derive(Debug)]
pub(super) struct OnDevice {
    name: String,
    pub(super) quantizer: Arc<dyn Quantizer>,
    layout: Layout,
    /// Tensors with a record, in the order of the records.
    tensors: Vec<usize>,
    /// None where it is to quantize everything.
    balance: Option<Balance>,
    /// Where the workspace is in the reservation: where plain tensors go. Empty if it is elsewhere.
    taken: Range<u64>,
    /// Whether `auto` should have its kernels compiled.
    is_worth_compiling: bool,
    /// Who has what of the scratch.
    scratch: Mutex<Pool>,
}

/// What lies where in a workspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Layout {
    records: u64,
    source_bytes: u64,
    sources: u64,
    /// For the scales of tensors that are under way.
    scratch_bytes: u64,
}

impl Layout {
    /// For this many tensors and workers, of which the double-quantized tensors have this many scales.
    fn new(tensors: usize, workers: usize, buffer_bytes: usize, scales: &[u64]) -> Layout {
        let largest = scales.iter().copied().map(Layout::scratch_of).max();
        let largest = largest.unwrap_or(0);
        Layout {
            records: aligned(tensors as u64 * RECORD),
            source_bytes: aligned(buffer_bytes as u64),
            sources: workers as u64,
            // As much as the two largest at a time.
            scratch_bytes: aligned(largest) * scales.len().min(2) as u64,
        }
    }

    /// Bytes of scratch for a tensor with this many scales: these, and sums of them.
    fn scratch_of(scales: u64) -> u64 {
        Layout::sums(scales) + ScalesJob::sums_bytes(scales)
    }

    /// Where the sums begin in scratch: behind this many scales.
    fn sums(scales: u64) -> u64 {
        aligned(4 * scales)
    }

    fn source(&self, worker: usize) -> u64 {
        self.records + worker as u64 * self.source_bytes
    }

    /// Where scratch begins.
    fn scratch(&self) -> u64 {
        self.records + self.sources * self.source_bytes
    }

    fn total(&self) -> u64 {
        self.scratch() + self.scratch_bytes
    }
}

fn aligned(bytes: u64) -> u64 {
    bytes.next_multiple_of(PART_ALIGNMENT)
}

impl OnDevices {
    /// The devices that can quantize, as the options allow it.
    ///
    /// # Errors
    /// [`LoadError::Device`] where a device has to quantize and cannot.
    pub(super) fn open(
        checkpoint: &Checkpoint,
        plan: &Plan,
        memory: &[Option<Box<dyn Reservation>>],
        options: &LoadOptions<'_>,
        workers: usize,
        buffer_bytes: usize,
    ) -> Result<OnDevices, LoadError> {
        let mut by_device = Vec::with_capacity(memory.len());
        for (index, memory) in memory.iter().enumerate() {
            let memory = memory.as_deref().filter(|memory| is_remote(*memory));
            let opened = match (memory, options.quantize_on) {
                (None, _) | (_, QuantizeOn::Cpu) => Ok(None),
                (Some(memory), _) => OnDevice::open(
                    checkpoint,
                    plan,
                    index,
                    memory,
                    options,
                    workers,
                    buffer_bytes,
                ),
            };
            by_device.push(match (opened, options.quantize_on) {
                (Ok(opened), _) => opened,
                (Err(error), QuantizeOn::Gpu) => return Err(LoadError::Device(error)),
                (Err(error), _) => {
                    tracing::warn!("{error}; quantizing on the processor");
                    None
                }
            });
        }
        Ok(OnDevices {
            quantized: memory.iter().map(|_| Quantized::default()).collect(),
            by_device,
        })
    }

    /// The device of this number, where it can quantize.
    pub(super) fn get(&self, device: usize) -> Option<&OnDevice> {
        self.by_device.get(device)?.as_ref()
    }

    /// Those whose kernels `auto` wants and that are not compiled yet.
    pub(super) fn to_compile(&self) -> impl Iterator<Item = &OnDevice> {
        self.by_device.iter().flatten().filter(|device| {
            device.balance.is_some() && device.is_worth_compiling && !device.quantizer.is_prepared()
        })
    }

    /// The same once its kernels are there.
    pub(super) fn ready(&self, device: usize) -> Option<&OnDevice> {
        self.get(device)
            .filter(|device| device.quantizer.is_prepared())
    }

    /// Bytes of the device's reservation that its kernels work in until everything is quantized; none
    /// where they work elsewhere.
    pub(super) fn taken(&self, device: usize) -> Range<u64> {
        let device = self.get(device);
        device.map_or(0..0, |device| device.taken.clone())
    }

    /// Counts bytes that have been quantized.
    pub(super) fn count(&self, device: Option<u32>, side: Side, bytes: usize) {
        let quantized = device.and_then(|device| self.quantized.get(device as usize));
        if let Some(quantized) = quantized {
            let counter = match side {
                Side::Host => &quantized.by_host,
                Side::Device => &quantized.by_device,
            };
            counter.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }

    /// The bytes of each device, by the processor and by the device.
    pub(super) fn counts(&self) -> Vec<QuantizedBytes> {
        let counts = |quantized: &Quantized| QuantizedBytes {
            by_host: quantized.by_host.load(Ordering::Relaxed),
            by_device: quantized.by_device.load(Ordering::Relaxed),
        };
        self.quantized.iter().map(counts).collect()
    }

    /// Blocks with infinities or NaN that the devices have found: tensors with their number. All
    /// workers have finished.
    pub(super) fn nonfinite(&self) -> Result<Vec<(usize, u64)>, DeviceError> {
        let mut found = Vec::new();
        for (device, quantized) in self.by_device.iter().zip(&self.quantized) {
            let Some(device) = device else { continue };
            if quantized.by_device.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut records = vec![0; device.tensors.len() * RECORD as usize];
            device.quantizer.read(0, &mut records)?;
            let (records, _) = records.as_chunks::<{ RECORD as usize }>();
            for (&tensor, record) in device.tensors.iter().zip(records) {
                let (blocks, _) = record.split_at(MEAN as usize);
                let blocks = blocks
                    .iter()
                    .rev()
                    .fold(0, |n, byte| n << 8 | u64::from(*byte));
                if blocks > 0 {
                    found.push((tensor, blocks));
                }
            }
        }
        Ok(found)
    }
}

impl OnDevice {
    fn open(
        checkpoint: &Checkpoint,
        plan: &Plan,
        index: usize,
        memory: &dyn Reservation,
        options: &LoadOptions<'_>,
        workers: usize,
        buffer_bytes: usize,
    ) -> Result<Option<OnDevice>, DeviceError> {
        let is_quantized = |tensor: &PlannedTensor| {
            tensor.placement.device == Some(index as u32)
                && matches!(tensor.placement.format, Format::Nf4 { .. })
                && tensor.requested() > 0
        };
        let tensors = plan.tensors.iter().enumerate();
        let (tensors, planned): (Vec<usize>, Vec<&PlannedTensor>) =
            tensors.filter(|(_, tensor)| is_quantized(tensor)).unzip();
        if tensors.is_empty() {
            return Ok(None);
        }
        // What another method has stored takes the processor longer to decode than to send.
        let is_encoded = |tensor: &&usize| checkpoint.tensors()[**tensor].encoded.is_some();
        let decodes = 2 * tensors.iter().filter(is_encoded).count() > tensors.len();
        let is_slow = decodes || options.kernels.isa() == Isa::Portable;
        if options.quantize_on == QuantizeOn::Auto && !is_slow && workers >= ENOUGH_WORKERS {
            return Ok(None);
        }
        let scales: Vec<u64> = planned
            .iter()
            .map(|tensor| tensor.scratch_bytes() / 4)
            .filter(|&scales| scales > 0)
            .collect();
        let layout = Layout::new(tensors.len(), workers, buffer_bytes, &scales);
        let parts = planned.iter().flat_map(|tensor| &tensor.parts);
        let end = parts
            .map(|part| part.offset.saturating_add(part.bytes))
            .max();
        // Nothing that is quantized lies behind it.
        let offset = end
            .unwrap_or(0)
            .min(memory.len())
            .next_multiple_of(PART_ALIGNMENT);
        let is_within = memory.len().saturating_sub(offset) >= layout.total();
        let name = plan.devices[index].device.name.clone();
        let workspace = match (is_within, options.quantize_on) {
            (true, _) => Workspace::Within {
                offset,
                len: layout.total(),
            },
            (false, QuantizeOn::Gpu) => Workspace::Beside {
                len: layout.total(),
            },
            // The plan is a ceiling.
            (false, _) => {
                tracing::info!("{name} has no room for kernels to work in");
                return Ok(None);
            }
        };
        let Some(quantizer) = memory.quantizer(workspace)? else {
            return Ok(None);
        };
        quantizer.clear(0, layout.records)?;
        let balance = match options.quantize_on {
            QuantizeOn::Auto => Some(Balance::new(workers, if is_slow { 0.5 } else { 0.0 })),
            _ => {
                quantizer.prepare()?;
                None
            }
        };
        let stored: u64 = planned.iter().map(|tensor| tensor.requested()).sum();
        Ok(Some(OnDevice {
            name,
            quantizer,
            layout,
            tensors,
            balance,
            taken: match workspace {
                Workspace::Within { offset, len } => offset..offset + len,
                Workspace::Beside { .. } => 0..0,
            },
            // In the checkpoint it is at least three times as much.
            is_worth_compiling: stored.saturating_mul(3) >= options.compile_from,
            scratch: Mutex::new(Pool::new(layout.scratch_bytes, PART_ALIGNMENT)),
        }))
    }

    /// Who is to quantize the next this many bytes.
    pub(super) fn choose(&self, bytes: usize) -> Side {
        match &self.balance {
            None => Side::Device,
            Some(balance) => balance.choose(bytes),
        }
    }

    /// Notes that this many bytes have been quantized or sent, at a time since some beginning.
    pub(super) fn record(&self, bytes: usize, at: Duration) {
        if let Some(balance) = &self.balance {
            balance.record(bytes, at);
        }
    }

    /// Has the kernels compiled. Without them the processor goes on quantizing.
    pub(super) fn compile(&self) {
        if let Err(error) = self.quantizer.prepare() {
            tracing::warn!("{error}; quantizing for {} on the processor", self.name);
        }
    }

    /// Where a worker's source goes.
    pub(super) fn source(&self, worker: usize) -> u64 {
        self.layout.source(worker)
    }

    /// Where blocks with infinities or NaN of a tensor are counted.
    pub(super) fn nonfinite_of(&self, tensor: usize) -> Option<u64> {
        Some(self.tensors.binary_search(&tensor).ok()? as u64 * RECORD)
    }

    /// Takes scratch for this many scales of a tensor, if there is enough left.
    pub(super) fn take_scratch(&self, scales: usize) -> Option<DeviceScratch> {
        let allocation = self.lock().allocate(Layout::scratch_of(scales as u64))?;
        let start = self.layout.scratch() + allocation.offset();
        Some(DeviceScratch::new(start, allocation))
    }

    /// Gives it back.
    pub(super) fn return_scratch(&self, scratch: Allocation) {
        if let Err(error) = self.lock().free(scratch) {
            tracing::error!("scratch of {} is lost: {error}", self.name);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Pool> {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How this many scales, which begin at `scratch`, are quantized when they are complete.
    pub(super) fn scales_job(
        &self,
        tensor: usize,
        scratch: u64,
        scales: usize,
        codes: u64,
        nested: u64,
    ) -> Option<ScalesJob> {
        Some(ScalesJob {
            scales,
            absmax: scratch,
            sums: scratch + Layout::sums(scales as u64),
            mean: self.nonfinite_of(tensor)? + MEAN,
            codes,
            nested,
        })
    }

    /// The mean that the device has found for a tensor.
    pub(super) fn mean(&self, job: &ScalesJob) -> Result<f32, DeviceError> {
        let mut mean = [0; 4];
        self.quantizer.read(job.mean, &mut mean)?;
        Ok(f32::from_le_bytes(mean))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_in_a_workspace_is_aligned_and_disjoint() {
        for tensors in [1, 17, 1000] {
            for workers in [1, 16] {
                for scales in [&[][..], &[5], &[5, 70_000, 257], &[1 << 24, 3]] {
                    let layout = Layout::new(tensors, workers, 65_536, scales);
                    let mut ends = vec![0, tensors as u64 * RECORD];
                    for worker in 0..workers {
                        let source = layout.source(worker);
                        ends.extend([source, source + 65_536]);
                    }
                    let largest = scales.iter().copied().max().unwrap_or(0);
                    let most = Layout::scratch_of(largest) * scales.len().min(2) as u64;
                    ends.extend([layout.scratch(), layout.scratch() + most]);
                    ends.push(layout.total());
                    assert!(ends.is_sorted(), "{layout:?}: {ends:?}");
                    assert!(layout.source(0).is_multiple_of(PART_ALIGNMENT));
                    assert!(layout.scratch().is_multiple_of(PART_ALIGNMENT));
                }
            }
        }
    }
}
