//! Scales that are quantized themselves, once all of a tensor are known.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tightfit_kernels::Kernels;

use super::LoadError;
use super::arena::Target;
use super::on_device::OnDevices;
use super::put::{BUFFER_GAP, Writers, as_f32, put};
use crate::memory::Allocation;
use crate::plan::NESTED_BLOCK_SIZE;

/// A tensor of which the scales are quantized once all of them are known.
#[derive(Debug)]
pub(super) struct DoubleState<'m> {
    scales: usize,
    kept: Kept,
    scales_left: AtomicUsize,
    /// Of codes and nested scales.
    targets: Mutex<Option<(Target<'m>, Target<'m>)>>,
}

/// Scales that a worker quantizes at once: few enough that several share those of a large tensor.
const SCALES_AT_ONCE: usize = 128 << 10;

/// All f32 scales of a tensor.
struct AllScales {
    mean: f32,
    scales: Vec<f32>,
}

/// Some scales of a tensor, to be quantized.
pub(super) struct ScalesPart<'m> {
    all: Arc<AllScales>,
    first: usize,
    codes: Target<'m>,
    nested: Target<'m>,
}

impl ScalesPart<'_> {
    /// Quantizes them into their place. Gives the memory of all scales of the tensor to whoever is the last
    /// to be done with them.
    pub(super) fn quantize(
        self,
        kernels: Kernels,
        writers: &mut Writers<'_, '_>,
    ) -> Result<Option<Vec<f32>>, LoadError> {
        let scales = &self.all.scales[self.first..][..self.codes.len()];
        put(writers, [self.codes, self.nested], |[codes, nested]| {
            Ok(kernels.quantize_absmax(scales, self.all.mean, codes, as_f32(nested))?)
        })?;
        Ok(Arc::into_inner(self.all).map(|all| all.scales))
    }
}

/// Where f32 scales are until then.
#[derive(Debug)]
pub(super) enum Kept {
    /// In host memory: the processor quantizes all of the tensor.
    OnHost(Mutex<Vec<f32>>),
    /// In scratch of the device, which quantizes them, and whoever is chosen each chunk.
    OnDevice(DeviceScratch),
}

impl Kept {
    /// In `memory`, which there may be of an earlier tensor.
    pub(super) fn on_host(scales: usize, mut memory: Vec<f32>) -> Kept {
        match memory.is_empty() {
            // Which the system has as zeros already.
            true => memory = vec![0.0; scales],
            false => memory.resize(scales, 0.0),
        }
        Kept::OnHost(Mutex::new(memory))
    }
}

/// Gives back scratch that a tensor no longer needs.
#[derive(Debug)]
pub(super) enum Returned {
    OnHost(Vec<f32>),
    OnDevice { device: usize, scratch: Allocation },
}

/// Scratch in a device's workspace.
#[derive(Debug)]
pub(super) struct DeviceScratch {
    /// Its first byte in the workspace.
    pub(super) start: u64,
    /// Taken when it is given back.
    allocation: Mutex<Option<Allocation>>,
}

impl DeviceScratch {
    pub(super) fn new(start: u64, allocation: Allocation) -> DeviceScratch {
        DeviceScratch {
            start,
            allocation: Mutex::new(Some(allocation)),
        }
    }

    pub(super) fn take(&self) -> Option<Allocation> {
        lock(&self.allocation).take()
    }
}

impl<'m> DoubleState<'m> {
    pub(super) fn new(
        scales: usize,
        kept: Kept,
        codes: Target<'m>,
        nested: Target<'m>,
    ) -> DoubleState<'m> {
        DoubleState {
            scales,
            kept,
            scales_left: AtomicUsize::new(scales),
            targets: Mutex::new(Some((codes, nested))),
        }
    }

    /// Where f32 scales are until they are complete.
    pub(super) fn kept(&self) -> &Kept {
        &self.kept
    }

    /// Takes the scales of one chunk. Whoever brings the last ones gets all of them.
    pub(super) fn finish_on_host(&self, first_block: usize, scales: &[f32]) -> Option<Vec<f32>> {
        let Kept::OnHost(kept) = &self.kept else {
            return None;
        };
        let mut kept = lock(kept);
        kept[first_block..first_block + scales.len()].copy_from_slice(scales);
        // Under the lock, so that the last one sees what all others have written.
        self.is_last(scales.len())
            .then(|| std::mem::take(&mut *kept))
    }

    /// Notes that this many scales of one chunk are on their way. Whether they were the last.
    pub(super) fn finish_on_device(&self, scales: usize) -> bool {
        self.is_last(scales)
    }

    fn is_last(&self, scales: usize) -> bool {
        self.scales_left.fetch_sub(scales, Ordering::AcqRel) == scales
    }

    /// What is to be done once all scales and their mean are known, in parts for several workers.
    /// Of what is sent to a device, a part is at most a buffer.
    pub(super) fn parts(
        &self,
        scales: Vec<f32>,
        mean: f32,
        buffer_bytes: usize,
    ) -> Vec<ScalesPart<'m>> {
        let Some((mut codes, mut nested)) = lock(&self.targets).take() else {
            return Vec::new();
        };
        let block = NESTED_BLOCK_SIZE as usize;
        let most = match codes.on_device() {
            None => SCALES_AT_ONCE,
            // A byte for each scale, and an f32 for each block of them.
            Some(_) => buffer_bytes.saturating_sub(BUFFER_GAP) / (block + 4) * block,
        };
        let most = most.clamp(block, SCALES_AT_ONCE);
        let count = scales.len();
        let all = Arc::new(AllScales { mean, scales });
        let part = |first: usize| {
            let count = most.min(count - first);
            ScalesPart {
                all: Arc::clone(&all),
                first,
                codes: codes.take(count),
                nested: nested.take(4 * count.div_ceil(block)),
            }
        };
        (0..count).step_by(most).map(part).collect()
    }

    /// Has the device quantize all scales into their place. Gives its number, and their mean.
    pub(super) fn quantize_on_device(
        &self,
        tensor: usize,
        scratch: u64,
        on_devices: &OnDevices,
        writers: &mut Writers<'_, '_>,
    ) -> Result<(usize, f32), LoadError> {
        let targets = lock(&self.targets).take();
        let job = targets.and_then(|(codes, nested)| {
            let ((number, codes), (_, nested)) = codes.on_device().zip(nested.on_device())?;
            let device = on_devices.get(number)?;
            let job = device.scales_job(tensor, scratch, self.scales, codes, nested)?;
            Some((number, device, job))
        });
        let (number, device, job) = job.ok_or(LoadError::Internal(
            "scales are not where they were planned",
        ))?;
        let (writer, _) = writers.quantizing(number)?;
        writer.quantize_scales(&job).map_err(LoadError::Device)?;
        let mean = device.mean(&job).map_err(LoadError::Device)?;
        Ok((number, mean))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
