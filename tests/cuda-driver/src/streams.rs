//! Streams of work, and events that mark points in them. Work is carried out when its stream or an
//! event after it is waited for, and not before.

use std::collections::{HashMap, VecDeque};
use std::ffi::c_void;
use std::thread::{self, ThreadId};

use crate::books::{Answer, Books, Kind, NOT_READY, call};
use crate::kernels::{Access, Passed, Shape, run};

/// Work that has not been carried out.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) device: usize,
    /// Whether it waits for the default stream, and that one for it.
    waits_for_default: bool,
    waiting: VecDeque<Step>,
    /// How much was ever given to it.
    given: u64,
    captured: Option<Capture>,
}

/// What a stream is given while it is captured.
#[derive(Debug)]
struct Capture {
    by: ThreadId,
    works: Vec<Work>,
}

impl Stream {
    /// The thread that captures it.
    pub(crate) fn captured_by(&self) -> Option<ThreadId> {
        self.captured.as_ref().map(|capture| capture.by)
    }

    /// Whether use of the default stream would end its capture.
    pub(crate) fn bars_default(&self) -> bool {
        self.captured.is_some() && self.waits_for_default
    }

    /// Says whether it can be captured from here on.
    pub(crate) fn begin_capture(&mut self, device: usize) -> bool {
        if self.captured.is_some() || self.device != device {
            return false;
        }
        self.captured = Some(Capture {
            by: thread::current().id(),
            works: Vec::new(),
        });
        true
    }

    /// What it was given since.
    pub(crate) fn end_capture(&mut self) -> Option<Vec<Work>> {
        self.captured.take().map(|capture| capture.works)
    }
}

#[derive(Debug)]
struct Step {
    number: u64,
    work: Work,
}

/// What a stream is given.
#[derive(Debug, Clone)]
pub(crate) enum Work {
    Copy {
        to: u64,
        from: usize,
        /// What was there when the copy was asked for.
        bytes: Vec<u8>,
    },
    /// To host memory.
    Fetch {
        to: usize,
        from: u64,
        len: usize,
    },
    Set {
        at: u64,
        value: u8,
        len: usize,
    },
    /// Words of 32 bits.
    Fill {
        at: u64,
        value: u32,
        count: usize,
    },
    /// Within a device's memory.
    Move {
        to: u64,
        from: u64,
        len: usize,
    },
    Launch {
        module: u64,
        kernel: &'static str,
        shape: Shape,
        passed: Vec<Passed>,
    },
    /// Until this step of that stream has been carried out.
    Wait {
        stream: u64,
        number: u64,
    },
}

/// A point in a stream.
#[derive(Debug)]
pub(crate) struct Event {
    device: usize,
    /// The stream, and the number of its last step before the point.
    recorded: Option<(u64, u64)>,
    /// Whether it was asked for since: then it is past the next time.
    is_asked: bool,
}

impl Work {
    /// What it does with memory of the device: first and last address, and how.
    fn accesses(&self) -> Vec<(u64, u64, Access)> {
        let write = |start: u64, len: usize| vec![(start, start + len as u64, Access::Write)];
        match self {
            Work::Copy { to, bytes, .. } => write(*to, bytes.len()),
            Work::Fetch { from, len, .. } => {
                vec![(*from, *from + *len as u64, Access::Read)]
            }
            Work::Set { at, len, .. } => write(*at, *len),
            Work::Fill { at, count, .. } => write(*at, 4 * count),
            Work::Move { to, from, len } => {
                let mut both = write(*to, *len);
                both.push((*from, *from + *len as u64, Access::Read));
                both
            }
            Work::Wait { .. } => Vec::new(),
            Work::Launch { passed, .. } => passed
                .iter()
                .filter_map(|argument| match *argument {
                    Passed::Number(_) | Passed::Map { .. } => None,
                    Passed::Memory {
                        address,
                        len,
                        access,
                    } => Some((address, address + len as u64, access)),
                })
                .collect(),
        }
    }

    /// Whether the result depends on which of both is carried out first.
    fn conflicts(&self, other: &Work) -> bool {
        let others = other.accesses();
        self.accesses().iter().any(|&(start, end, access)| {
            others
                .iter()
                .any(|&(other_start, other_end, other_access)| {
                    let harmless = access == other_access && access != Access::Write;
                    !harmless && start < other_end && other_start < end
                })
        })
    }
}

impl Books {
    /// Whether copies from these host addresses are waiting.
    pub(crate) fn is_read(&self, start: usize, end: usize) -> bool {
        self.works().any(|work| match work {
            Work::Copy { from, bytes, .. } => *from < end && from + bytes.len() > start,
            _ => false,
        })
    }

    /// Whether something is waiting that uses these device addresses.
    pub(crate) fn is_used(&self, start: u64, end: u64) -> bool {
        self.works()
            .flat_map(Work::accesses)
            .any(|(used, used_end, _)| used < end && start < used_end)
    }

    /// Whether kernels of this module are waiting.
    pub(crate) fn runs(&self, module: u64) -> bool {
        self.works()
            .any(|work| matches!(work, Work::Launch { module: of, .. } if *of == module))
    }

    fn works(&self) -> impl Iterator<Item = &Work> {
        let steps = self.streams.values().flat_map(|stream| &stream.waiting);
        steps.map(|step| &step.work)
    }

    /// Gives work to a stream. Work of others that is not waited for must not get in its way.
    pub(crate) fn give(&mut self, call: &str, device: usize, stream: u64, work: Work) -> Answer {
        if self
            .streams
            .get(&stream)
            .is_none_or(|stream| stream.device != device)
        {
            return Err(self.fault(format!("{call} in what is no stream of the context")));
        }
        let captured = self.streams.get_mut(&stream);
        if let Some(captured) = captured.and_then(|stream| stream.captured.as_mut()) {
            captured.works.push(work);
            return Ok(());
        }
        let mut waited = HashMap::new();
        self.waited_for(stream, u64::MAX, &mut waited);
        let race = self.streams.iter().any(|(other, steps)| {
            let until = waited.get(other).copied().unwrap_or(0);
            *other != stream
                && steps
                    .waiting
                    .iter()
                    .any(|step| step.number > until && step.work.conflicts(&work))
        });
        if race {
            self.fault(format!("{call} races with another stream"));
        }
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.given += 1;
            let number = stream.given;
            stream.waiting.push_back(Step { number, work });
        }
        Ok(())
    }

    /// The steps of all streams that come before step `until` of one.
    fn waited_for(&self, stream: u64, until: u64, waited: &mut HashMap<u64, u64>) {
        if waited.get(&stream).is_some_and(|&known| known >= until) {
            return;
        }
        waited.insert(stream, until);
        let steps = self.streams.get(&stream).map(|stream| &stream.waiting);
        for step in steps.into_iter().flatten() {
            if let Work::Wait { stream, number } = step.work
                && step.number <= until
            {
                self.waited_for(stream, number, waited);
            }
        }
    }

    /// Carries out a stream's work up to one step.
    fn carry_out(&mut self, stream: u64, until: u64) {
        loop {
            let Some(steps) = self.streams.get_mut(&stream) else {
                return;
            };
            let Some(step) = steps.waiting.pop_front_if(|step| step.number <= until) else {
                return;
            };
            match step.work {
                Work::Copy { to, from, bytes } => self.copy(to, from, &bytes),
                Work::Fetch { to, from, len } => self.fetch(to, from, len),
                Work::Set { at, value, len } => {
                    if let Some(memory) = self.memory_mut("a memset", at, len) {
                        memory.fill(value);
                    }
                }
                Work::Fill { at, value, count } => {
                    if let Some(memory) = self.memory_mut("a memset", at, 4 * count) {
                        let (words, _) = memory.as_chunks_mut::<4>();
                        words.fill(value.to_le_bytes());
                    }
                }
                Work::Move { to, from, len } => {
                    let bytes = self
                        .memory_mut("a copy", from, len)
                        .map(|from| from.to_vec());
                    if let Some((to, bytes)) = self.memory_mut("a copy", to, len).zip(bytes) {
                        to.copy_from_slice(&bytes);
                    }
                }
                Work::Wait { stream, number } => self.carry_out(stream, number),
                Work::Launch {
                    kernel,
                    shape,
                    passed,
                    ..
                } => self.launch(kernel, shape, &passed),
            }
        }
    }

    fn copy(&mut self, to: u64, from: usize, bytes: &[u8]) {
        if !self.is_locked(from, bytes.len()) {
            self.fault("host memory was freed before it was copied".to_owned());
            return;
        }
        let source = std::ptr::with_exposed_provenance::<u8>(from);
        // SAFETY: in the books as ours and not freed.
        let source = unsafe { std::slice::from_raw_parts(source, bytes.len()) };
        if source != bytes {
            self.fault("host memory was changed before it was copied".to_owned());
        }
        if let Some(memory) = self.memory_mut("a copy", to, bytes.len()) {
            memory.copy_from_slice(bytes);
        }
    }

    fn fetch(&mut self, to: usize, from: u64, len: usize) {
        if let Some(memory) = self.memory_mut("a copy", from, len) {
            let to = std::ptr::with_exposed_provenance_mut::<u8>(to);
            // SAFETY: the caller's memory, which it keeps until the stream is done; ours lies elsewhere.
            unsafe { to.copy_from(memory.as_ptr(), len) };
        }
    }

    fn launch(&mut self, kernel: &str, shape: Shape, passed: &[Passed]) {
        let places: Vec<(u64, usize)> = passed.iter().filter_map(Passed::memory).collect();
        let mut memory = Vec::with_capacity(places.len());
        for &(address, len) in &places {
            match self.memory_mut(kernel, address, len) {
                Some(bytes) => memory.push(bytes.to_vec()),
                None => return,
            }
        }
        if let Err(problem) = run(kernel, shape, passed, &mut memory) {
            self.fault(problem);
        }
        for (&(address, len), result) in places.iter().zip(&memory) {
            if let Some(bytes) = self.memory_mut(kernel, address, len) {
                bytes.copy_from_slice(result);
            }
        }
    }

    /// Memory of a device. What is not there is a fault.
    fn memory_mut(&mut self, call: &str, address: u64, len: usize) -> Option<&mut [u8]> {
        let (pages, position) = self.find(call, address, len).ok()?;
        let pages = self.pages.get_mut(&pages)?;
        pages.bytes.get_mut(position..position + len)
    }
}

/// `cuStreamCreate`.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(out: *mut u64, flags: u32) -> u32 {
    call("cuStreamCreate", Kind::Takes, |books| {
        let device = books.current("cuStreamCreate")?;
        let handle = books.handle();
        let stream = Stream {
            device,
            waits_for_default: flags == 0,
            waiting: VecDeque::new(),
            given: 0,
            captured: None,
        };
        books.streams.insert(handle, stream);
        // SAFETY: the caller's pointer to the result.
        unsafe { out.write(handle) };
        Ok(())
    })
}

/// `cuStreamDestroy_v2`.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(stream: u64) -> u32 {
    call("cuStreamDestroy", Kind::GivesBack, |books| {
        let device = books.current("cuStreamDestroy")?;
        match books.streams.remove(&stream) {
            None => return Err(books.fault("cuStreamDestroy of what is not there".to_owned())),
            Some(stream) if stream.device != device => {
                books.fault("cuStreamDestroy under another context".to_owned());
            }
            Some(stream) if !stream.waiting.is_empty() => {
                books.fault("cuStreamDestroy while it works".to_owned());
            }
            Some(_) => {}
        }
        Ok(())
    })
}

/// `cuStreamSynchronize`.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(stream: u64) -> u32 {
    call("cuStreamSynchronize", Kind::Takes, |books| {
        let device = books.current("cuStreamSynchronize")?;
        if books
            .streams
            .get(&stream)
            .is_none_or(|stream| stream.device != device)
        {
            return Err(books.fault("cuStreamSynchronize of what is not there".to_owned()));
        }
        books.carry_out(stream, u64::MAX);
        Ok(())
    })
}

/// `cuEventCreate`.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(out: *mut u64, _: u32) -> u32 {
    call("cuEventCreate", Kind::Takes, |books| {
        let device = books.current("cuEventCreate")?;
        let handle = books.handle();
        let event = Event {
            device,
            recorded: None,
            is_asked: false,
        };
        books.events.insert(handle, event);
        // SAFETY: the caller's pointer to the result.
        unsafe { out.write(handle) };
        Ok(())
    })
}

/// `cuEventDestroy_v2`.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventDestroy_v2(event: u64) -> u32 {
    call("cuEventDestroy", Kind::GivesBack, |books| {
        books.current("cuEventDestroy")?;
        if books.events.remove(&event).is_none() {
            return Err(books.fault("cuEventDestroy of what is not there".to_owned()));
        }
        Ok(())
    })
}

/// `cuEventRecord`.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecord(event: u64, stream: u64) -> u32 {
    call("cuEventRecord", Kind::Takes, |books| {
        let device = books.current("cuEventRecord")?;
        let given = books
            .streams
            .get(&stream)
            .filter(|stream| stream.device == device)
            .map(|stream| stream.given);
        match (books.events.get_mut(&event), given) {
            (Some(event), Some(given)) if event.device == device => {
                event.recorded = Some((stream, given));
                event.is_asked = false;
                Ok(())
            }
            _ => Err(books.fault("cuEventRecord of what does not belong together".to_owned())),
        }
    })
}

/// `cuEventQuery`.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(event: u64) -> u32 {
    call("cuEventQuery", Kind::Takes, |books| {
        let device = books.current("cuEventQuery")?;
        match books.events.get_mut(&event) {
            Some(event) if event.device == device => {
                if let Some((stream, number)) = event.recorded {
                    if !std::mem::replace(&mut event.is_asked, true) {
                        return Err(NOT_READY);
                    }
                    books.carry_out(stream, number);
                }
                Ok(())
            }
            _ => Err(books.fault("cuEventQuery of what is not there".to_owned())),
        }
    })
}

/// `cuEventSynchronize`.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventSynchronize(event: u64) -> u32 {
    call("cuEventSynchronize", Kind::Takes, |books| {
        let device = books.current("cuEventSynchronize")?;
        match books.events.get(&event) {
            Some(event) if event.device == device => {
                // One that was never recorded is past already.
                if let Some((stream, number)) = event.recorded {
                    books.carry_out(stream, number);
                }
                Ok(())
            }
            _ => Err(books.fault("cuEventSynchronize of what is not there".to_owned())),
        }
    })
}

/// `cuStreamWaitEvent`.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(stream: u64, event: u64, _: u32) -> u32 {
    call("cuStreamWaitEvent", Kind::Takes, |books| {
        let device = books.current("cuStreamWaitEvent")?;
        match books.events.get(&event) {
            Some(event) if event.device == device => match event.recorded {
                // One that was never recorded is past already.
                None => Ok(()),
                Some((of, number)) => {
                    let work = Work::Wait { stream: of, number };
                    books.give("cuStreamWaitEvent", device, stream, work)
                }
            },
            _ => Err(books.fault("cuStreamWaitEvent for what is not there".to_owned())),
        }
    })
}

/// `cuMemcpyHtoDAsync_v2`.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    to: u64,
    from: *const c_void,
    len: usize,
    stream: u64,
) -> u32 {
    call("cuMemcpyHtoDAsync", Kind::Takes, |books| {
        let device = books.current("cuMemcpyHtoDAsync")?;
        books.find_on("cuMemcpyHtoDAsync", device, to, len)?;
        if !books.is_locked(from.addr(), len) {
            return Err(books.fault("cuMemcpyHtoDAsync of memory not page-locked".to_owned()));
        }
        // SAFETY: in the books as ours and not freed.
        let bytes = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), len) }.to_vec();
        let from = from.expose_provenance();
        let work = Work::Copy { to, from, bytes };
        books.give("cuMemcpyHtoDAsync", device, stream, work)
    })
}
