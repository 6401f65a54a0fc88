//! What there is to do: one chunk after the other, in the order of the files.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use tightfit_kernels::{BlockSize, FloatType, Kernels, blocks};

use super::LoadError;
use super::arena::{Place, Target};
use super::put::{BUFFER_GAP, Writers, put};
use crate::checkpoint::{Checkpoint, Extent, TensorInfo};
use crate::plan::{NESTED_BLOCK_SIZE, PartKind, Plan, PlannedTensor};
use crate::types::{DType, Format};

/// Bytes of a plain tensor that are read at once: it needs no staging, so that this only bounds
/// how long a cancelled load goes on and how evenly the workers share a large tensor.
const COPY_CHUNK: usize = 4 << 20;

/// A piece of one tensor.
pub(super) struct Chunk<'m> {
    /// Index of the tensor.
    pub(super) tensor: usize,
    /// The file that holds it.
    pub(super) shard: usize,
    /// Its first byte in the file.
    pub(super) offset: u64,
    /// Its length in bytes in the checkpoint.
    pub(super) bytes: usize,
    pub(super) task: Task<'m>,
}

/// What is to be done with a chunk, and where the result goes.
pub(super) enum Task<'m> {
    Copy {
        data: Target<'m>,
    },
    Cast {
        from: FloatType,
        to: FloatType,
        data: Target<'m>,
    },
    Quantize {
        float: FloatType,
        block_size: BlockSize,
        codes: Target<'m>,
        /// As f32.
        absmax: Target<'m>,
    },
    QuantizeDouble {
        float: FloatType,
        block_size: BlockSize,
        codes: Target<'m>,
        first_block: usize,
        state: Arc<DoubleState<'m>>,
    },
}

/// A tensor of which the scales are quantized once all of them are known.
pub(super) struct DoubleState<'m> {
    scratch: Mutex<Vec<f32>>,
    chunks_left: AtomicUsize,
    targets: Mutex<Option<(Target<'m>, Target<'m>)>>,
}

impl DoubleState<'_> {
    /// Takes the scales of one chunk. Whoever brings the last ones gets all of them.
    pub(super) fn finish_chunk(&self, first_block: usize, scales: &[f32]) -> Option<Vec<f32>> {
        let mut scratch = lock(&self.scratch);
        scratch[first_block..first_block + scales.len()].copy_from_slice(scales);
        // Under the lock, so that the last one sees what all others have written.
        let left = self.chunks_left.fetch_sub(1, Ordering::Relaxed) - 1;
        (left == 0).then(|| std::mem::take(&mut *scratch))
    }

    /// Quantizes all scales into their place. Gives their mean.
    pub(super) fn quantize_scales(
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
}

/// What is known of tensors only after they were read.
pub(super) struct Finished {
    /// The offset of every double-quantized tensor.
    pub(super) nested_offsets: Vec<f32>,
    /// Blocks with infinities or NaN, by tensor.
    pub(super) nonfinite: BTreeMap<usize, u64>,
}

impl Finished {
    pub(super) fn new(tensors: usize) -> Finished {
        Finished {
            nested_offsets: vec![0.0; tensors],
            nonfinite: BTreeMap::new(),
        }
    }
}

/// Hands out chunks.
pub(super) struct Queue<'m> {
    state: Mutex<State<'m>>,
    scratch_returned: Condvar,
    slot_bytes: usize,
}

struct State<'m> {
    /// Tensors of which no chunk has been handed out.
    waiting: VecDeque<Tensor<'m>>,
    current: Option<Cursor<'m>>,
    scratch_left: u64,
}

/// A tensor to be loaded, or a part of one that is quantized in the checkpoint.
struct Tensor<'m> {
    index: usize,
    shard: usize,
    offset: u64,
    bytes: usize,
    kind: Kind,
    place: Place<'m>,
    scratch: u64,
}

#[derive(Clone, Copy)]
enum Kind {
    Copy,
    Cast {
        from: FloatType,
        to: FloatType,
    },
    Nf4 {
        float: FloatType,
        block_size: BlockSize,
        double_quantized: bool,
    },
}

/// The tensor that chunks are being cut from.
struct Cursor<'m> {
    tensor: Tensor<'m>,
    start: usize,
    state: Option<Arc<DoubleState<'m>>>,
}

impl<'m> Queue<'m> {
    pub(super) fn new(
        checkpoint: &Checkpoint,
        plan: &Plan,
        places: Vec<Place<'m>>,
        slot_bytes: usize,
        scratch: u64,
    ) -> Queue<'m> {
        let mut waiting: Vec<Tensor<'m>> = Vec::with_capacity(places.len());
        for (index, place) in places.into_iter().enumerate() {
            let (info, planned) = (&checkpoint.tensors()[index], &plan.tensors[index]);
            if planned.placement.device.is_some() {
                add(&mut waiting, index, info, planned, place);
            }
        }
        waiting.retain(|tensor| tensor.bytes > 0);
        // In the order of the files, which for the parts of quantized weights is not that of tensors.
        waiting.sort_by_key(|tensor| (tensor.shard, tensor.offset));
        Queue {
            state: Mutex::new(State {
                waiting: waiting.into(),
                current: None,
                scratch_left: scratch,
            }),
            scratch_returned: Condvar::new(),
            slot_bytes,
        }
    }

    /// The next chunk. Waits while the next tensor needs more scratch than is left; gives `None`
    /// when nothing is left to do, or `stop` is set.
    pub(super) fn next(&self, stop: &AtomicBool) -> Option<Chunk<'m>> {
        let mut state = lock(&self.state);
        loop {
            if let Some(cursor) = &mut state.current {
                if let Some(chunk) = cursor.next(self.slot_bytes) {
                    return Some(chunk);
                }
                state.current = None;
            }
            let scratch = state.waiting.front()?.scratch;
            if scratch > state.scratch_left {
                if stop.load(Ordering::Relaxed) {
                    return None;
                }
                state = self
                    .scratch_returned
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.scratch_left -= scratch;
            state.current = state
                .waiting
                .pop_front()
                .map(|tensor| Cursor::new(tensor, self.slot_bytes));
        }
    }

    /// Gives back scratch of a tensor that is done.
    pub(super) fn return_scratch(&self, bytes: u64) {
        lock(&self.state).scratch_left += bytes;
        self.wake();
    }

    /// Wakes whoever waits for scratch.
    pub(super) fn wake(&self) {
        // Taking the lock first: a worker between its check of `stop` and its wait must not miss it.
        drop(lock(&self.state));
        self.scratch_returned.notify_all();
    }
}

/// Adds what there is to be read of one tensor.
fn add<'m>(
    waiting: &mut Vec<Tensor<'m>>,
    index: usize,
    info: &TensorInfo,
    planned: &PlannedTensor,
    place: Place<'m>,
) {
    let Some(quantized) = &info.quantized else {
        let Some(kind) = kind(info.dtype, planned) else {
            return;
        };
        waiting.push(Tensor {
            index,
            shard: info.shard,
            offset: info.offset,
            // Parts of a tensor that is placed fit in memory, and this is at most 8 times as much.
            bytes: info.bytes as usize,
            kind,
            place,
            scratch: planned.scratch_bytes(),
        });
        return;
    };
    let codes = Extent {
        shard: info.shard,
        offset: info.offset,
        bytes: info.bytes,
    };
    let nested = quantized.nested.map(|nested| nested.absmax);
    let parts = [
        (Some(codes), place.codes),
        (Some(quantized.absmax), place.absmax),
        (nested, place.nested_absmax),
    ];
    for (extent, data) in parts {
        let Some(extent) = extent else { continue };
        waiting.push(Tensor {
            index,
            shard: extent.shard,
            offset: extent.offset,
            bytes: extent.bytes as usize,
            kind: Kind::Copy,
            place: Place {
                data,
                ..Place::default()
            },
            scratch: 0,
        });
    }
}

impl<'m> Cursor<'m> {
    fn new(mut tensor: Tensor<'m>, slot_bytes: usize) -> Cursor<'m> {
        let state = match tensor.kind {
            Kind::Nf4 {
                double_quantized: true,
                ..
            } => {
                let scales = (tensor.scratch / 4) as usize;
                let codes = std::mem::take(&mut tensor.place.absmax);
                let nested = std::mem::take(&mut tensor.place.nested_absmax);
                let chunk = chunk_bytes(tensor.kind, &tensor.place, slot_bytes);
                Some(Arc::new(DoubleState {
                    scratch: Mutex::new(vec![0.0; scales]),
                    chunks_left: AtomicUsize::new(tensor.bytes.div_ceil(chunk)),
                    targets: Mutex::new(Some((codes, nested))),
                }))
            }
            _ => None,
        };
        Cursor {
            tensor,
            start: 0,
            state,
        }
    }

    fn next(&mut self, slot_bytes: usize) -> Option<Chunk<'m>> {
        let left = self.tensor.bytes - self.start;
        if left == 0 {
            return None;
        }
        let bytes = left.min(chunk_bytes(
            self.tensor.kind,
            &self.tensor.place,
            slot_bytes,
        ));
        let place = &mut self.tensor.place;
        let task = match self.tensor.kind {
            Kind::Copy => Task::Copy {
                data: place.data.take(bytes),
            },
            Kind::Cast { from, to } => Task::Cast {
                from,
                to,
                data: place.data.take(bytes / from.bytes() * to.bytes()),
            },
            Kind::Nf4 {
                float, block_size, ..
            } => {
                let elements = bytes / float.bytes();
                let codes = place.codes.take(tightfit_kernels::packed_bytes(elements));
                match &self.state {
                    None => Task::Quantize {
                        float,
                        block_size,
                        codes,
                        absmax: place.absmax.take(4 * blocks(elements, block_size)),
                    },
                    Some(state) => Task::QuantizeDouble {
                        float,
                        block_size,
                        codes,
                        first_block: blocks(self.start / float.bytes(), block_size),
                        state: Arc::clone(state),
                    },
                }
            }
        };
        let offset = self.tensor.offset + self.start as u64;
        self.start += bytes;
        Some(Chunk {
            tensor: self.tensor.index,
            shard: self.tensor.shard,
            offset,
            bytes,
            task,
        })
    }
}

/// Bytes of the checkpoint in one chunk. Quantized tensors are cut at block boundaries (a slot
/// holds several of the largest blocks), so that a cut changes no scale.
fn chunk_bytes(kind: Kind, place: &Place<'_>, slot_bytes: usize) -> usize {
    match (kind, &place.data) {
        (Kind::Copy, Target::Host(_)) => COPY_CHUNK,
        // A buffer has the size of a slot.
        (Kind::Copy, Target::Device { .. }) => slot_bytes,
        (Kind::Cast { from, to }, _) => slot_bytes / from.bytes().max(to.bytes()) * from.bytes(),
        (
            Kind::Nf4 {
                float, block_size, ..
            },
            _,
        ) => {
            let block = block_size.elements() * float.bytes();
            slot_bytes / block * block
        }
    }
}

/// How a tensor is stored; `None` for what plans do not contain.
fn kind(dtype: DType, planned: &PlannedTensor) -> Option<Kind> {
    Some(match planned.placement.format {
        Format::Stored => Kind::Copy,
        Format::Cast(target) => Kind::Cast {
            from: float_type(dtype)?,
            to: float_type(target)?,
        },
        Format::Nf4 {
            block_size,
            double_quantized,
        } => Kind::Nf4 {
            float: float_type(dtype)?,
            block_size: BlockSize::new(block_size as usize).ok()?,
            double_quantized: double_quantized && planned.part(PartKind::NestedAbsmax).is_some(),
        },
    })
}

/// The kernels' name of an element type that can be quantized.
pub(crate) fn float_type(dtype: DType) -> Option<FloatType> {
    match dtype {
        DType::F32 => Some(FloatType::F32),
        DType::F16 => Some(FloatType::F16),
        DType::Bf16 => Some(FloatType::Bf16),
        _ => None,
    }
}

/// Scales where they are stored or staged: parts are aligned to 256 bytes, pieces of buffers too,
/// and scales are cut at whole ones.
pub(super) fn as_f32(bytes: &mut [u8]) -> &mut [f32] {
    bytemuck::cast_slice_mut(bytes)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
