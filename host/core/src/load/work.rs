//! What there is to do: for every device what lies on it, part by part in the order of the files. What
//! lies where a device's kernels work is left for a second round, after they are done.
//!
//! Workers take large parts and cut chunks from them by themselves, so that they rarely meet here; parts
//! become smaller towards the end, so that all workers end at the same time. A worker stays with its
//! device as long as that has something left, so that all devices are loaded at once and none waits for
//! another's turn.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use tightfit_kernels::{BlockSize, FloatType, blocks, packed_bytes};

use super::arena::{PartTargets, Target};
use super::double::{DoubleState, Kept, Returned, ScalesPart};
use super::on_device::OnDevices;
use super::put::BUFFER_GAP;
use crate::cancel::{self, CancelToken, Cancelled, Watch};
use crate::checkpoint::{AbsmaxForm, Checkpoint, Extent, TensorInfo};
use crate::plan::{Plan, PlannedTensor};
use crate::types::{DType, Format};

/// Bytes of a plain tensor that are read at once: it needs no staging, so that this only bounds
/// how long a cancelled load goes on. Of what is quantized no more is done at once either.
const LARGEST_CHUNK: usize = 4 << 20;

/// Bytes that a worker takes at once while there is much left.
const LARGEST_PART: u64 = 16 << 20;

/// Bytes that a worker takes at once at the end.
const SMALLEST_PART: u64 = 512 << 10;

/// Parts that every worker should still get of what is left.
const PARTS_LEFT: u64 = 4;

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

impl<'m> ToQuantize<'m> {
    /// Cuts off the first elements: at most so many, whole blocks.
    pub(super) fn take(&mut self, elements: usize) -> ToQuantize<'m> {
        let block = self.block_size.elements();
        let elements = (elements / block * block).max(block).min(self.elements);
        let count = blocks(elements, self.block_size);
        self.elements -= elements;
        ToQuantize {
            elements,
            codes: self.codes.take(packed_bytes(elements)),
            scales: self.scales.take(count),
            ..*self
        }
    }
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

impl<'m> Scales<'m> {
    fn take(&mut self, count: usize) -> Scales<'m> {
        match self {
            Scales::Stored(absmax) => Scales::Stored(absmax.take(4 * count)),
            Scales::Quantized { first, state } => {
                let taken = Scales::Quantized {
                    first: *first,
                    state: Arc::clone(state),
                };
                *first += count;
                taken
            }
        }
    }
}

/// Hands out parts.
pub(super) struct Queue<'m> {
    state: Mutex<State<'m>>,
    /// Notified when scratch has been returned, and when devices are done.
    changed: Condvar,
    /// The most bytes that are sent to a device at once.
    buffer_bytes: usize,
    workers: usize,
    on_devices: &'m OnDevices,
}

struct State<'m> {
    /// One for each device of the plan.
    shares: Vec<Share<'m>>,
    /// Of tensors of which all scales are known.
    scales: VecDeque<ScalesPart<'m>>,
    scratch: HostScratch,
    /// Workers that have to finish before the second round.
    busy: usize,
    /// Whether the second round has to wait: from the first quantized part on until all workers
    /// have finished and one of them has seen to the results.
    is_unsettled: bool,
}

impl State<'_> {
    fn make_busy(&mut self, post: &mut Post) {
        if !post.is_busy {
            post.is_busy = true;
            self.busy += 1;
            self.is_unsettled = true;
        }
    }
}

/// Host memory for f32 scales of tensors that are double-quantized. What a tensor has had the next ones
/// have: fresh memory costs the system more than these cost us.
struct HostScratch {
    limit: u64,
    /// Bytes in use.
    used: u64,
    unused: Vec<Vec<f32>>,
}

impl HostScratch {
    fn new(limit: u64) -> HostScratch {
        HostScratch {
            limit,
            used: 0,
            unused: Vec::new(),
        }
    }

    fn is_unused(&self) -> bool {
        self.used == 0
    }

    /// Memory for so many bytes of scales; empty where there is none of an earlier tensor that fits.
    /// `None` while others have too much.
    fn take(&mut self, bytes: u64) -> Option<Vec<f32>> {
        let left = self.limit.saturating_sub(self.used);
        if bytes > left {
            return None;
        }
        let fits = |memory: &Vec<f32>| (bytes..=left).contains(&held(memory));
        let unused = self.unused.iter().enumerate();
        let best = unused
            .filter(|(_, memory)| fits(memory))
            .min_by_key(|(_, memory)| memory.capacity());
        let best = best.map(|(index, _)| index);
        let memory = best.map_or_else(Vec::new, |index| self.unused.swap_remove(index));
        self.used += held(&memory).max(bytes);
        // All that is held stays within the limit.
        while self.used + self.unused.iter().map(held).sum::<u64>() > self.limit {
            self.unused.pop();
        }
        Some(memory)
    }

    fn give_back(&mut self, memory: Vec<f32>) {
        self.used = self.used.saturating_sub(held(&memory));
        self.unused.push(memory);
    }
}

/// Bytes that a vector takes.
fn held(memory: &Vec<f32>) -> u64 {
    4 * memory.capacity() as u64
}

/// What one device is to hold and has not been handed out yet.
#[derive(Default)]
struct Share<'m> {
    /// Tensors of which nothing has been handed out.
    waiting: VecDeque<Tensor<'m>>,
    /// Those of the second round.
    later: VecDeque<Tensor<'m>>,
    current: Option<Part<'m>>,
    /// Bytes of this round, as they are read.
    bytes_left: u64,
}

impl<'m> Share<'m> {
    fn push(&mut self, tensor: Tensor<'m>, is_later: bool) {
        if is_later {
            self.later.push_back(tensor);
        } else {
            self.bytes_left += tensor.bytes as u64;
            self.waiting.push_back(tensor);
        }
    }

    fn begin_second_round(&mut self) {
        for tensor in std::mem::take(&mut self.later) {
            self.push(tensor, false);
        }
    }
}

/// Where one worker is.
pub(super) struct Post {
    /// The device whose share it works on.
    share: usize,
    /// Whether it has to finish before the second round.
    is_busy: bool,
}

/// What a worker is to do next.
pub(super) enum Next<'m> {
    /// This.
    Part(Part<'m>),
    /// Scales of a tensor, to be quantized.
    Scales(ScalesPart<'m>),
    /// To finish what it has started, and to say so by [`Queue::finished`].
    Finish,
    /// Nothing more.
    Nothing,
}

/// A tensor to be loaded, or a part of one that is quantized in the checkpoint.
struct Tensor<'m> {
    origin: Origin,
    /// Its length in bytes, as it is read.
    bytes: usize,
    target: PartTargets<'m>,
    scratch: u64,
}

/// Where a tensor comes from and what is done with it.
#[derive(Clone, Copy)]
struct Origin {
    index: usize,
    shard: usize,
    /// Where it begins in the file.
    offset: u64,
    /// Whether it is decoded as it is read.
    is_encoded: bool,
    kind: Kind,
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

/// Bytes of one tensor that follow each other, with the places that they go to.
pub(super) struct Part<'m> {
    origin: Origin,
    start: usize,
    end: usize,
    target: PartTargets<'m>,
    state: Option<Arc<DoubleState<'m>>>,
}

impl<'m> Queue<'m> {
    /// All that the plan has to be read, for so many workers.
    ///
    /// # Errors
    /// [`Cancelled`].
    #[expect(clippy::too_many_arguments, reason = "all of a load")]
    pub(super) fn new(
        checkpoint: &Checkpoint,
        plan: &Plan,
        targets: Vec<PartTargets<'m>>,
        buffer_bytes: usize,
        workers: usize,
        scratch: u64,
        on_devices: &'m OnDevices,
        cancel: &CancelToken,
    ) -> Result<Queue<'m>, Cancelled> {
        let mut watch = Watch::new(cancel);
        let mut all: Vec<(usize, Tensor<'m>)> = Vec::with_capacity(targets.len());
        for (index, target) in targets.into_iter().enumerate() {
            watch.item(0)?;
            let (info, planned) = (&checkpoint.tensors()[index], &plan.tensors[index]);
            if let Some(device) = planned.placement.device {
                add(index, info, planned, target, &mut |tensor| {
                    all.push((device as usize, tensor));
                });
            }
        }
        // In the order of the files, which for the parts of quantized weights is not that of tensors.
        let key = |(_, tensor): &(usize, Tensor<'_>)| (tensor.origin.shard, tensor.origin.offset);
        let all = cancel::sort_by(all, cancel, |a, b| key(a).cmp(&key(b)))?;
        let mut shares: Vec<Share<'m>> = plan.devices.iter().map(|_| Share::default()).collect();
        for (device, tensor) in all {
            watch.item(0)?;
            if tensor.bytes == 0 {
                continue;
            }
            let is_later = tensor
                .target
                .data
                .on_device()
                .is_some_and(|(device, _)| on_devices.is_in_the_way(device));
            if let Some(share) = shares.get_mut(device) {
                share.push(tensor, is_later);
            }
        }
        Ok(Queue {
            state: Mutex::new(State {
                shares,
                scales: VecDeque::new(),
                scratch: HostScratch::new(scratch),
                busy: 0,
                is_unsettled: false,
            }),
            changed: Condvar::new(),
            buffer_bytes,
            workers,
            on_devices,
        })
    }

    /// The most bytes that are sent to a device at once.
    pub(super) fn buffer_bytes(&self) -> usize {
        self.buffer_bytes
    }

    /// Where a worker begins, by its number: devices have workers by what they are to hold.
    pub(super) fn post(&self, worker: usize) -> Post {
        let state = lock(&self.state);
        let workers = self.workers.max(1) as u128;
        let all: u128 = state
            .shares
            .iter()
            .map(|share| u128::from(share.bytes_left))
            .sum();
        let mine = all * (2 * worker as u128 + 1) / (2 * workers);
        let mut until = 0;
        let mut shares = state.shares.iter();
        let share = shares.position(|share| {
            until += u128::from(share.bytes_left);
            mine < until
        });
        Post {
            share: share.unwrap_or(0),
            is_busy: false,
        }
    }

    /// What a worker is to do next.
    ///
    /// Waits while the next tensors need more scratch than is left, and for the second round.
    /// Gives [`Next::Nothing`] also when it would have to wait and `stop` is set.
    pub(super) fn next(&self, stop: &AtomicBool, post: &mut Post) -> Next<'m> {
        let mut state = lock(&self.state);
        loop {
            if let Some(part) = state.scales.pop_front() {
                state.make_busy(post);
                return Next::Scales(part);
            }
            if let Some(part) = self.take_part(&mut state, post) {
                if matches!(part.origin.kind, Kind::Nf4 { .. }) {
                    state.make_busy(post);
                }
                return Next::Part(part);
            }
            // Otherwise there is not enough scratch, or scales are still to come.
            let is_empty = state.shares.iter().all(|share| share.waiting.is_empty());
            if is_empty && state.scratch.is_unused() {
                if post.is_busy {
                    return Next::Finish;
                } else if state.shares.iter().all(|share| share.later.is_empty()) {
                    return Next::Nothing;
                } else if !state.is_unsettled {
                    state.shares.iter_mut().for_each(Share::begin_second_round);
                    continue;
                }
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

    /// A part of the worker's own share, else of one with much left, which is its own from then on.
    fn take_part(&self, state: &mut State<'m>, post: &mut Post) -> Option<Part<'m>> {
        if let Some(part) = self.take_from(state, post.share) {
            return Some(part);
        }
        let left = |share: &Share<'_>| share.bytes_left;
        let others = (0..state.shares.len()).filter(|&share| left(&state.shares[share]) > 0);
        let mut others: Vec<usize> = others.collect();
        others.sort_by_key(|&share| std::cmp::Reverse(left(&state.shares[share])));
        others.into_iter().find_map(|share| {
            let part = self.take_from(state, share)?;
            post.share = share;
            Some(part)
        })
    }

    fn take_from(&self, state: &mut State<'m>, share: usize) -> Option<Part<'m>> {
        let left: u64 = state.shares.iter().map(|share| share.bytes_left).sum();
        let most =
            (left / (PARTS_LEFT * self.workers.max(1) as u64)).clamp(SMALLEST_PART, LARGEST_PART);
        if state.shares.get(share)?.current.is_none() {
            let next = self.start_tensor(state, share)?;
            state.shares[share].current = Some(next);
        }
        let share = &mut state.shares[share];
        let current = share.current.as_mut()?;
        // Both fit: parts are far smaller than memory.
        let part = current.take(current.part_bytes(self.buffer_bytes, most as usize));
        if current.start == current.end {
            share.current = None;
        }
        share.bytes_left -= (part.end - part.start) as u64;
        Some(part)
    }

    /// Starts the next tensor of a share, if there is enough scratch for it.
    fn start_tensor(&self, state: &mut State<'m>, share: usize) -> Option<Part<'m>> {
        let tensor = state.shares[share].waiting.front()?;
        let device = tensor.target.codes.on_device();
        let device = device.and_then(|(device, _)| self.on_devices.ready(device));
        let kept = match (tensor.scratch, device) {
            (0, _) => None,
            (_, Some(device)) => Some(Kept::OnDevice(
                device.take_scratch((tensor.scratch / 4) as usize)?,
            )),
            (needed, None) => {
                let memory = state.scratch.take(needed)?;
                Some(Kept::on_host((needed / 4) as usize, memory))
            }
        };
        let tensor = state.shares[share].waiting.pop_front()?;
        Some(Part::new(tensor, kept))
    }

    /// Adds scales that are to be quantized.
    pub(super) fn add_scales(&self, parts: Vec<ScalesPart<'m>>) {
        lock(&self.state).scales.extend(parts);
        self.changed.notify_all();
    }

    /// Notes that a worker has finished what it had started. Whether all have: then it has to see to
    /// the results, and say so by [`Queue::settled`].
    pub(super) fn finished(&self, post: &mut Post) -> bool {
        if !std::mem::take(&mut post.is_busy) {
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
            Returned::OnHost(memory) => lock(&self.state).scratch.give_back(memory),
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

/// Gives what there is to be read of one tensor.
fn add<'m>(
    index: usize,
    info: &TensorInfo,
    planned: &PlannedTensor,
    target: PartTargets<'m>,
    found: &mut dyn FnMut(Tensor<'m>),
) {
    let Some(quantized) = &info.quantized else {
        let Some(kind) = kind(info.dtype, planned) else {
            return;
        };
        found(Tensor {
            origin: Origin {
                index,
                shard: info.shard,
                offset: info.offset,
                is_encoded: info.encoded.is_some(),
                kind,
            },
            // Parts of a tensor that is placed fit in memory, and this is at most 8 times as much.
            bytes: info.decoded_bytes() as usize,
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
        found(Tensor {
            origin: Origin {
                index,
                shard: extent.shard,
                offset: extent.offset,
                is_encoded: kind == Kind::WidenScales,
                kind,
            },
            bytes,
            target: PartTargets {
                data,
                ..PartTargets::default()
            },
            scratch: 0,
        });
    }
}

impl<'m> Part<'m> {
    /// All of a tensor. `kept` where scales are quantized, too.
    fn new(mut tensor: Tensor<'m>, kept: Option<Kept>) -> Part<'m> {
        let state = kept.map(|kept| {
            let scales = (tensor.scratch / 4) as usize;
            let codes = std::mem::take(&mut tensor.target.absmax);
            let nested = std::mem::take(&mut tensor.target.nested_absmax);
            Arc::new(DoubleState::new(scales, kept, codes, nested))
        });
        Part {
            origin: tensor.origin,
            start: 0,
            end: tensor.bytes,
            target: tensor.target,
            state,
        }
    }

    /// Cuts off the first bytes: at most so many, which are whole elements and blocks.
    fn take(&mut self, bytes: usize) -> Part<'m> {
        let bytes = bytes.min(self.end - self.start);
        let target = &mut self.target;
        let mut taken = PartTargets::default();
        match self.origin.kind {
            Kind::Copy | Kind::WidenScales => taken.data = target.data.take(bytes),
            Kind::Cast { from, to } => {
                taken.data = target.data.take(bytes / from.bytes() * to.bytes());
            }
            Kind::Nf4 { float, block_size } => {
                let elements = bytes / float.bytes();
                taken.codes = target.codes.take(packed_bytes(elements));
                if self.state.is_none() {
                    taken.absmax = target.absmax.take(4 * blocks(elements, block_size));
                }
            }
        }
        let start = self.start;
        self.start += bytes;
        Part {
            origin: self.origin,
            start,
            end: self.start,
            target: taken,
            state: self.state.clone(),
        }
    }

    /// Cuts off what is to be done next.
    pub(super) fn next_chunk(&mut self, buffer_bytes: usize) -> Option<Chunk<'m>> {
        if self.start == self.end {
            return None;
        }
        let Part {
            origin,
            start,
            end,
            target,
            state,
        } = self.take(self.chunk_bytes(buffer_bytes));
        let (bytes, data) = (end - start, target.data);
        let task = match origin.kind {
            Kind::Copy => Task::Copy { data },
            Kind::WidenScales => Task::WidenScales { data },
            Kind::Cast { from, to } => Task::Cast { from, to, data },
            Kind::Nf4 { float, block_size } => Task::Quantize(ToQuantize {
                float,
                block_size,
                elements: bytes / float.bytes(),
                codes: target.codes,
                scales: match state {
                    None => Scales::Stored(target.absmax),
                    Some(state) => Scales::Quantized {
                        first: blocks(start / float.bytes(), block_size),
                        state,
                    },
                },
            }),
        };
        let first = match origin.is_encoded {
            true => 0,
            false => origin.offset,
        };
        Some(Chunk {
            tensor: origin.index,
            shard: origin.shard,
            offset: first + start as u64,
            bytes,
            task,
        })
    }

    /// Bytes that are done at once, as they are read. Quantized tensors are cut at block boundaries (a slot
    /// holds several of the largest blocks), so that a cut changes no scale. A buffer holds the results.
    fn chunk_bytes(&self, buffer_bytes: usize) -> usize {
        let is_remote = [&self.target.data, &self.target.codes]
            .iter()
            .any(|target| target.on_device().is_some());
        let most = match self.origin.kind {
            _ if !is_remote => LARGEST_CHUNK,
            Kind::Copy | Kind::WidenScales => buffer_bytes,
            Kind::Cast { from, to } => buffer_bytes / to.bytes() * from.bytes(),
            Kind::Nf4 { float, block_size } => {
                let block = packed_bytes(block_size.elements()) + size_of::<f32>();
                let fit = buffer_bytes.saturating_sub(BUFFER_GAP) / block;
                fit * block_size.elements() * float.bytes()
            }
        };
        self.whole_units(most.min(LARGEST_CHUNK))
    }

    /// Bytes that a worker takes at once, as they are read: about `most`, as far as they are whole chunks.
    /// Of what holds scratch until its last part is done only one: others wait for that.
    fn part_bytes(&self, buffer_bytes: usize, most: usize) -> usize {
        let chunk = self.chunk_bytes(buffer_bytes);
        match most / chunk {
            1.. if self.state.is_some() => chunk,
            0 => self.whole_units(most),
            chunks => chunks * chunk,
        }
    }

    /// The most bytes up to `most` that a tensor may be cut after; at least what it may be cut after first.
    fn whole_units(&self, most: usize) -> usize {
        let unit = match self.origin.kind {
            Kind::Copy => 1,
            Kind::WidenScales => size_of::<f32>(),
            Kind::Cast { from, .. } => from.bytes(),
            Kind::Nf4 { float, block_size } => block_size.elements() * float.bytes(),
        };
        (most / unit).max(1) * unit
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
