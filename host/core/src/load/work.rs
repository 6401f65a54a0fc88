//! What there is to do: one chunk after the other, in the order of the files. What lies where a
//! device's kernels work is left for a second round, after they are done.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use tightfit_kernels::{BlockSize, FloatType, blocks};

use super::arena::{PartTargets, Target};
use super::double::{DoubleState, Kept, Returned};
use super::on_device::OnDevices;
use crate::cancel::{self, CancelToken, Cancelled, Watch};
use crate::checkpoint::{AbsmaxForm, Checkpoint, Extent, TensorInfo};
use crate::plan::{Plan, PlannedTensor};
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
    /// Its first byte in the file; in the tensor or the scales, where these are decoded as they are read.
    pub(super) offset: u64,
    /// Its length in bytes, as it is read.
    pub(super) bytes: usize,
    pub(super) task: Task<'m>,
}

/// What is to be done with a chunk, and where the result goes.
pub(super) enum Task<'m> {
    Copy {
        data: Target<'m>,
    },
    /// Scales of a quantized weight that are not f32 in the file.
    WidenScales {
        data: Target<'m>,
    },
    Cast {
        from: FloatType,
        to: FloatType,
        data: Target<'m>,
    },
    Quantize(ToQuantize<'m>),
}

/// Elements to be quantized: whole blocks, but for the last of a tensor.
pub(super) struct ToQuantize<'m> {
    pub(super) float: FloatType,
    pub(super) block_size: BlockSize,
    pub(super) elements: usize,
    pub(super) codes: Target<'m>,
    pub(super) scales: Scales<'m>,
}

/// What becomes of scales.
pub(super) enum Scales<'m> {
    /// They are stored as f32.
    Stored(Target<'m>),
    /// They are quantized with all others of their tensor.
    Quantized {
        /// How many lie before them.
        first: usize,
        state: Arc<DoubleState<'m>>,
    },
}

/// Hands out chunks.
pub(super) struct Queue<'m> {
    state: Mutex<State<'m>>,
    /// Notified when scratch has been returned, and when devices are done.
    changed: Condvar,
    sizes: ChunkSizes,
    on_devices: &'m OnDevices,
}

/// The most bytes of a chunk that is not merely copied in host memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct ChunkSizes {
    /// What the processor's kernels read at once.
    pub(super) slot: usize,
    /// What is sent to a device at once.
    pub(super) buffer: usize,
}

struct State<'m> {
    /// Tensors of which no chunk has been handed out.
    waiting: VecDeque<Tensor<'m>>,
    /// Those of the second round.
    later: VecDeque<Tensor<'m>>,
    current: Option<Cursor<'m>>,
    scratch_left: u64,
    /// Workers that have to finish before the second round.
    busy: usize,
    /// Whether the second round has to wait: from the first quantized chunk on until all workers
    /// have finished and one of them has seen to the results.
    is_unsettled: bool,
}

/// What a worker is to do next.
pub(super) enum Next<'m> {
    /// This.
    Chunk(Chunk<'m>),
    /// To finish what it has started, and to say so by [`Queue::finished`].
    Finish,
    /// Nothing more.
    Nothing,
}

/// A tensor to be loaded, or a part of one that is quantized in the checkpoint.
struct Tensor<'m> {
    index: usize,
    shard: usize,
    /// Where it begins in the file.
    offset: u64,
    /// Whether it is decoded as it is read.
    is_encoded: bool,
    /// Its length in bytes, as it is read.
    bytes: usize,
    kind: Kind,
    target: PartTargets<'m>,
    scratch: u64,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Copy,
    WidenScales,
    Cast {
        from: FloatType,
        to: FloatType,
    },
    Nf4 {
        float: FloatType,
        block_size: BlockSize,
    },
}

/// The tensor that chunks are being cut from.
struct Cursor<'m> {
    tensor: Tensor<'m>,
    start: usize,
    state: Option<Arc<DoubleState<'m>>>,
}

impl<'m> Queue<'m> {
    /// All that the plan has to be read.
    ///
    /// # Errors
    /// [`Cancelled`].
    pub(super) fn new(
        checkpoint: &Checkpoint,
        plan: &Plan,
        targets: Vec<PartTargets<'m>>,
        sizes: ChunkSizes,
        scratch: u64,
        on_devices: &'m OnDevices,
        cancel: &CancelToken,
    ) -> Result<Queue<'m>, Cancelled> {
        let mut watch = Watch::new(cancel);
        let mut waiting: Vec<Tensor<'m>> = Vec::with_capacity(targets.len());
        for (index, target) in targets.into_iter().enumerate() {
            watch.item(0)?;
            let (info, planned) = (&checkpoint.tensors()[index], &plan.tensors[index]);
            if planned.placement.device.is_some() {
                add(&mut waiting, index, info, planned, target);
            }
        }
        // In the order of the files, which for the parts of quantized weights is not that of tensors.
        let key = |tensor: &Tensor<'_>| (tensor.shard, tensor.offset);
        let all = cancel::sort_by(waiting, cancel, |a, b| key(a).cmp(&key(b)))?;
        let (mut waiting, mut later) = (VecDeque::with_capacity(all.len()), VecDeque::new());
        for tensor in all {
            watch.item(0)?;
            let device = tensor.target.data.on_device();
            match device.is_some_and(|(device, _)| on_devices.is_in_the_way(device)) {
                _ if tensor.bytes == 0 => {}
                true => later.push_back(tensor),
                false => waiting.push_back(tensor),
            }
        }
        Ok(Queue {
            state: Mutex::new(State {
                waiting,
                later,
                current: None,
                scratch_left: scratch,
                busy: 0,
                is_unsettled: false,
            }),
            changed: Condvar::new(),
            sizes,
            on_devices,
        })
    }

    /// What a worker is to do next. `is_busy` is its own, and says whether it has to finish.
    ///
    /// Waits while the next tensor needs more scratch than is left, and for the second round.
    /// Gives [`Next::Nothing`] also when it would have to wait and `stop` is set.
    pub(super) fn next(&self, stop: &AtomicBool, is_busy: &mut bool) -> Next<'m> {
        let mut state = lock(&self.state);
        loop {
            if let Some(chunk) = state
                .current
                .as_mut()
                .and_then(|cursor| cursor.next(self.sizes))
            {
                if matches!(chunk.task, Task::Quantize(_)) && !*is_busy {
                    *is_busy = true;
                    state.busy += 1;
                    state.is_unsettled = true;
                }
                return Next::Chunk(chunk);
            }
            state.current = None;
            if !state.waiting.is_empty() {
                if let Some(cursor) = self.start_tensor(&mut state) {
                    state.current = Some(cursor);
                    continue;
                }
            } else if *is_busy {
                return Next::Finish;
            } else if state.later.is_empty() {
                return Next::Nothing;
            } else if !state.is_unsettled {
                state.waiting = std::mem::take(&mut state.later);
                continue;
            }
            if stop.load(Ordering::Relaxed) {
                return Next::Nothing;
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Starts the next tensor, if there is enough scratch for it.
    fn start_tensor(&self, state: &mut State<'m>) -> Option<Cursor<'m>> {
        let tensor = state.waiting.front()?;
        let device = tensor.target.codes.on_device();
        let device = device.and_then(|(device, _)| self.on_devices.ready(device));
        let kept = match (tensor.scratch, device) {
            (0, _) => None,
            (_, Some(device)) => Some(Kept::OnDevice(device.take_scratch()?)),
            (needed, None) if needed > state.scratch_left => return None,
            (needed, None) => {
                state.scratch_left -= needed;
                Some(Kept::on_host((needed / 4) as usize))
            }
        };
        let tensor = state.waiting.pop_front()?;
        Some(Cursor::new(tensor, kept, self.sizes))
    }

    /// Notes that a worker has finished what it had started. Whether all have: then it has to see to
    /// the results, and say so by [`Queue::settled`].
    pub(super) fn finished(&self, is_busy: &mut bool) -> bool {
        if !std::mem::take(is_busy) {
            return false;
        }
        let mut state = lock(&self.state);
        state.busy -= 1;
        state.busy == 0
    }

    /// Begins the second round.
    pub(super) fn settled(&self) {
        lock(&self.state).is_unsettled = false;
        self.changed.notify_all();
    }

    /// Gives back scratch of a tensor that is done.
    pub(super) fn return_scratch(&self, returned: Returned) {
        match returned {
            Returned::OnHost { bytes } => lock(&self.state).scratch_left += bytes,
            Returned::OnDevice { device, scratch } => {
                if let Some(device) = self.on_devices.get(device) {
                    device.return_scratch(scratch);
                }
            }
        }
        self.wake();
    }

    /// Wakes whoever waits.
    pub(super) fn wake(&self) {
        // Taking the lock first: a worker between its check of `stop` and its wait must not miss it.
        drop(lock(&self.state));
        self.changed.notify_all();
    }
}

/// Adds what there is to be read of one tensor.
fn add<'m>(
    waiting: &mut Vec<Tensor<'m>>,
    index: usize,
    info: &TensorInfo,
    planned: &PlannedTensor,
    target: PartTargets<'m>,
) {
    let Some(quantized) = &info.quantized else {
        let Some(kind) = kind(info.dtype, planned) else {
            return;
        };
        waiting.push(Tensor {
            index,
            shard: info.shard,
            offset: info.offset,
            is_encoded: info.encoded.is_some(),
            // Parts of a tensor that is placed fit in memory, and this is at most 8 times as much.
            bytes: info.decoded_bytes() as usize,
            kind,
            target,
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
    let scales = match quantized.absmax_form {
        AbsmaxForm::AsUsed => Kind::Copy,
        _ => Kind::WidenScales,
    };
    let parts = [
        (Some(codes), target.codes, Kind::Copy),
        (Some(quantized.absmax), target.absmax, scales),
        (nested, target.nested_absmax, Kind::Copy),
    ];
    for (extent, data, kind) in parts {
        let Some(extent) = extent else { continue };
        let bytes = match kind {
            // What is placed fits in memory.
            Kind::WidenScales => 4 * quantized.scales() as usize,
            _ => extent.bytes as usize,
        };
        waiting.push(Tensor {
            index,
            shard: extent.shard,
            offset: extent.offset,
            is_encoded: kind == Kind::WidenScales,
            bytes,
            kind,
            target: PartTargets {
                data,
                ..PartTargets::default()
            },
            scratch: 0,
        });
    }
}

impl<'m> Cursor<'m> {
    /// `kept` where scales are quantized, too.
    fn new(mut tensor: Tensor<'m>, kept: Option<Kept>, sizes: ChunkSizes) -> Cursor<'m> {
        let state = kept.map(|kept| {
            let scales = (tensor.scratch / 4) as usize;
            let codes = std::mem::take(&mut tensor.target.absmax);
            let nested = std::mem::take(&mut tensor.target.nested_absmax);
            let chunk = chunk_bytes(tensor.kind, &tensor.target, sizes);
            let chunks = tensor.bytes.div_ceil(chunk);
            Arc::new(DoubleState::new(scales, kept, chunks, codes, nested))
        });
        Cursor {
            tensor,
            start: 0,
            state,
        }
    }

    fn next(&mut self, sizes: ChunkSizes) -> Option<Chunk<'m>> {
        let left = self.tensor.bytes - self.start;
        if left == 0 {
            return None;
        }
        let bytes = left.min(chunk_bytes(self.tensor.kind, &self.tensor.target, sizes));
        let target = &mut self.tensor.target;
        let task = match self.tensor.kind {
            Kind::Copy => Task::Copy {
                data: target.data.take(bytes),
            },
            Kind::WidenScales => Task::WidenScales {
                data: target.data.take(bytes),
            },
            Kind::Cast { from, to } => Task::Cast {
                from,
                to,
                data: target.data.take(bytes / from.bytes() * to.bytes()),
            },
            Kind::Nf4 { float, block_size } => {
                let elements = bytes / float.bytes();
                let codes = target.codes.take(tightfit_kernels::packed_bytes(elements));
                let scales = match &self.state {
                    None => Scales::Stored(target.absmax.take(4 * blocks(elements, block_size))),
                    Some(state) => Scales::Quantized {
                        first: blocks(self.start / float.bytes(), block_size),
                        state: Arc::clone(state),
                    },
                };
                Task::Quantize(ToQuantize {
                    float,
                    block_size,
                    elements,
                    codes,
                    scales,
                })
            }
        };
        let first = match self.tensor.is_encoded {
            true => 0,
            false => self.tensor.offset,
        };
        let offset = first + self.start as u64;
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

/// Bytes in one chunk, as it is read. Quantized tensors are cut at block boundaries (a slot
/// holds several of the largest blocks), so that a cut changes no scale. A buffer holds a chunk as
/// it is read, and even more so when it is quantized.
fn chunk_bytes(kind: Kind, target: &PartTargets<'_>, sizes: ChunkSizes) -> usize {
    match (kind, &target.data) {
        (Kind::Copy | Kind::WidenScales, Target::Host(_)) => COPY_CHUNK,
        (Kind::Copy, Target::Device { .. }) => sizes.buffer,
        (Kind::WidenScales, Target::Device { .. }) => sizes.buffer / 4 * 4,
        (Kind::Cast { from, to }, _) => sizes.slot / from.bytes().max(to.bytes()) * from.bytes(),
        (Kind::Nf4 { float, block_size }, _) => {
            let block = block_size.elements() * float.bytes();
            let most = match target.codes {
                Target::Host(_) => sizes.slot,
                Target::Device { .. } => sizes.buffer,
            };
            most / block * block
        }
    }
}

/// How a tensor is stored; `None` for what plans do not contain.
fn kind(dtype: DType, planned: &PlannedTensor) -> Option<Kind> {
    Some(match planned.placement.format {
        Format::Stored => Kind::Copy,
        Format::Cast(target) => Kind::Cast {
            from: dtype.float_type()?,
            to: target.float_type()?,
        },
        Format::Nf4 { block_size, .. } => Kind::Nf4 {
            float: dtype.float_type()?,
            block_size,
        },
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
