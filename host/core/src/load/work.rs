//! What there is to do: for every device what lies on it, part by part in the order of the files. What
//! lies where a device's kernels work is left for a second round, after they are done.
//!
//! Workers take large parts and cut chunks from them by themselves, so that they rarely meet here; parts
//! become smaller towards the end, so that all workers end at the same time. A worker stays with its
//! device as long as that has something left, so that all devices are loaded at once and none waits for
//! another's turn.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::arena::PartTargets;
use super::double::{Kept, Returned, ScalesPart};
use super::on_device::OnDevices;
use super::part::{Kind, Part, Tensor, add};
use super::scratch::HostScratch;
use crate::cancel::{self, CancelToken, Cancelled, Watch};
use crate::checkpoint::Checkpoint;
use crate::plan::Plan;

/// Bytes that a worker takes at once while there is much left.
const LARGEST_PART: u64 = 16 << 20;

/// Bytes that a worker takes at once at the end.
const SMALLEST_PART: u64 = 512 << 10;

/// Parts that every worker should still get of what is left.
const PARTS_LEFT: u64 = 4;

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
    /// Adds a tensor, and leaves for the second round what goes to bytes that are taken until then.
    fn add(&mut self, mut tensor: Tensor<'m>, taken: &Range<u64>) {
        let Some((_, start)) = tensor.target.data.on_device() else {
            return self.push(tensor, false);
        };
        let end = start + tensor.target.data.len() as u64;
        let (first, last) = (taken.start.max(start), taken.end.min(end));
        if first >= last {
            return self.push(tensor, false);
        }
        if tensor.origin.kind == Kind::Copy && !tensor.origin.is_indirect {
            // A copy has as many bytes as what it is a copy of. These fit: they lie in the tensor.
            let before = tensor.cut((first - start) as usize);
            self.push(before, false);
            let within = tensor.cut((last - first) as usize);
            self.push(tensor, false);
            tensor = within;
        }
        self.push(tensor, true);
    }

    fn push(&mut self, tensor: Tensor<'m>, is_later: bool) {
        if tensor.bytes == 0 {
        } else if is_later {
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
            if let Some(share) = shares.get_mut(device) {
                share.add(tensor, &on_devices.taken(device));
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
