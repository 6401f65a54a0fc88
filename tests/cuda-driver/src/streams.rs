//! Streams of copies, and events that mark points in them. A copy is carried out when its stream or
//! an event after it is waited for, and not before.

use std::collections::VecDeque;
use std::ffi::c_void;

use crate::books::{Books, Kind, call};

/// Copies that have not been carried out.
#[derive(Debug)]
pub(crate) struct Stream {
    device: usize,
    waiting: VecDeque<Copy>,
    /// Copies that were ever given to it.
    given: u64,
}

#[derive(Debug)]
struct Copy {
    to: u64,
    from: usize,
    /// What was there when the copy was asked for.
    bytes: Vec<u8>,
    number: u64,
}

/// A point in a stream.
#[derive(Debug)]
pub(crate) struct Event {
    device: usize,
    /// The stream, and the number of its last copy before the point.
    recorded: Option<(u64, u64)>,
}

impl Books {
    /// Whether copies from these host addresses are waiting.
    pub(crate) fn is_read(&self, start: usize, end: usize) -> bool {
        self.copies()
            .any(|copy| copy.from < end && copy.from + copy.bytes.len() > start)
    }

    /// Whether copies to these device addresses are waiting.
    pub(crate) fn is_written(&self, start: u64, end: u64) -> bool {
        self.copies()
            .any(|copy| copy.to < end && copy.to + copy.bytes.len() as u64 > start)
    }

    fn copies(&self) -> impl Iterator<Item = &Copy> {
        self.streams.values().flat_map(|stream| &stream.waiting)
    }

    /// Carries out a stream's copies up to one.
    fn carry_out(&mut self, stream: u64, until: u64) {
        loop {
            let Some(stream) = self.streams.get_mut(&stream) else {
                return;
            };
            let Some(copy) = stream.waiting.pop_front_if(|copy| copy.number <= until) else {
                return;
            };
            if !self.is_locked(copy.from, copy.bytes.len()) {
                self.fault("host memory was freed before it was copied".to_owned());
                continue;
            }
            let source = std::ptr::with_exposed_provenance::<u8>(copy.from);
            // SAFETY: in the books as ours and not freed.
            let source = unsafe { std::slice::from_raw_parts(source, copy.bytes.len()) };
            if source != copy.bytes {
                self.fault("host memory was changed before it was copied".to_owned());
            }
            if let Ok((pages, position)) = self.find("a copy", copy.to, copy.bytes.len())
                && let Some(pages) = self.pages.get_mut(&pages)
            {
                pages.bytes[position..position + copy.bytes.len()].copy_from_slice(&copy.bytes);
            }
        }
    }
}

/// `cuStreamCreate`.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(out: *mut u64, _: u32) -> u32 {
    call("cuStreamCreate", Kind::Takes, |books| {
        let device = books.current("cuStreamCreate")?;
        let handle = books.handle();
        let stream = Stream {
            device,
            waiting: VecDeque::new(),
            given: 0,
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
                books.fault("cuStreamDestroy while it copies".to_owned());
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
                Ok(())
            }
            _ => Err(books.fault("cuEventRecord of what does not belong together".to_owned())),
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
        let (pages, _) = books.find("cuMemcpyHtoDAsync", to, len)?;
        if books.pages[&pages].device != device {
            return Err(books.fault("cuMemcpyHtoDAsync under another context".to_owned()));
        }
        if !books.is_locked(from.addr(), len) {
            return Err(books.fault("cuMemcpyHtoDAsync of memory not page-locked".to_owned()));
        }
        if books.is_written(to, to + len as u64) {
            books.fault("two copies to the same place at a time".to_owned());
        }
        // SAFETY: in the books as ours and not freed.
        let bytes = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), len) }.to_vec();
        let from = from.expose_provenance();
        let stream = books.streams.get_mut(&stream);
        let Some(stream) = stream.filter(|stream| stream.device == device) else {
            return Err(books.fault("cuMemcpyHtoDAsync in what is no stream".to_owned()));
        };
        stream.given += 1;
        stream.waiting.push_back(Copy {
            to,
            from,
            bytes,
            number: stream.given,
        });
        Ok(())
    })
}
