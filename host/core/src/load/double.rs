//! Scales that are quantized themselves, once all of a tensor are known.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tightfit_kernels::Kernels;

use super::LoadError;
use super::arena::Target;
use super::on_device::OnDevices;
use super::put::{BUFFER_GAP, Writers, as_f32, put};
use crate::plan::NESTED_BLOCK_SIZE;

/// A tensor of which the scales are quantized once all of them are known.
#[derive(Debug)]
pub(super) struct DoubleState<'m> {
    scales: usize,
    kept: Kept,
    chunks_left: AtomicUsize,
    /// Of codes and nested scales.
    targets: Mutex<Option<(Target<'m>, Target<'m>)>>,
}

/// Where f32 scales are until then.
#[derive(Debug)]
pub(super) enum Kept {
    /// In host memory: the processor quantizes all of the tensor.
    OnHost(Mutex<Vec<f32>>),
    /// In scratch of this number: the device quantizes them, and whoever is chosen each chunk.
    OnDevice(u64),
}

impl Kept {
    pub(super) fn on_host(scales: usize) -> Kept {
        Kept::OnHost(Mutex::new(vec![0.0; scales]))
    }
}

/// Gives back scratch that a tensor no longer needs.
#[derive(Debug, PartialEq)]
pub(super) enum Returned {
    OnHost { bytes: u64 },
    OnDevice { device: usize, scratch: u64 },
}

impl<'m> DoubleState<'m> {
    pub(super) fn new(
        scales: usize,
        kept: Kept,
        chunks: usize,
        codes: Target<'m>,
        nested: Target<'m>,
    ) -> DoubleState<'m> {
        DoubleState {
            scales,
            kept,
            chunks_left: AtomicUsize::new(chunks),
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
        self.is_last().then(|| std::mem::take(&mut *kept))
    }

    /// Notes that the scales of one chunk are on their way. Whether they were the last.
    pub(super) fn finish_on_device(&self) -> bool {
        self.is_last()
    }

    fn is_last(&self) -> bool {
        self.chunks_left.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// Quantizes all scales into their place. Gives their mean.
    pub(super) fn quantize_on_host(
        &self,
        kernels: Kernels,
        scales: &[f32],
        writers: &mut Writers,
    ) -> Result<f32, LoadError> {
        let offset = kernels.absmax_mean(scales);
        let Some((mut codes, mut nested)) = lock(&self.targets).take() else {
            return Ok(offset);
        };
        let block = NESTED_BLOCK_SIZE as usize;
        // What fits into a buffer: a byte for each scale, and an f32 for each block of them.
        let most = match writers.buffer_bytes(&codes) {
            None => scales.len().max(1),
            Some(bytes) => bytes.saturating_sub(BUFFER_GAP) / (block + 4) * block,
        };
        for scales in scales.chunks(most.max(block)) {
            let codes = codes.take(scales.len());
            let nested = nested.take(4 * scales.len().div_ceil(block));
            put(writers, [codes, nested], |[codes, nested]| {
                Ok(kernels.quantize_absmax(scales, offset, codes, as_f32(nested))?)
            })?;
        }
        Ok(offset)
    }

    /// Has the device quantize all scales into their place. Gives its number, and their mean.
    pub(super) fn quantize_on_device(
        &self,
        tensor: usize,
        scratch: u64,
        on_devices: &OnDevices,
        writers: &mut Writers,
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
        let writer = writers.quantizing(number)?;
        writer.quantize_scales(&job).map_err(LoadError::Device)?;
        let mean = device.mean(&job).map_err(LoadError::Device)?;
        Ok((number, mean))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
