//! Copies to a device that go on while the processor does something else.

use std::fmt;
use std::mem::ManuallyDrop;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys;
use sys::{CUevent, CUevent_flags, CUstream, CUstream_flags};

use super::memory::Pinned;
use super::{Context, DeviceMemory, twice};
use crate::device::{DeviceError, Piece, WRITER_BUFFERS, Writer};

/// Buffers that are filled in turn and copied to a device, in a stream of their own.
#[derive(Debug)]
pub(in crate::device::cuda) struct Staging {
    memory: Arc<DeviceMemory>,
    /// Given back by hand: not while the device may be reading them.
    buffers: ManuallyDrop<[Buffer; WRITER_BUFFERS]>,
    stream: Stream,
    /// The buffer to be filled next.
    next: usize,
}

#[derive(Debug)]
struct Buffer {
    pinned: Pinned,
    /// Recorded after its last copy.
    copied: Event,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The processor's.
    Free,
    /// Being read by the device until its event.
    Copying,
    /// May be being read by the device; the event says nothing, because something failed.
    Unknown,
}

impl Staging {
    /// Buffers of `bytes` bytes each for copies to `memory`.
    pub(in crate::device::cuda) fn new(
        memory: &Arc<DeviceMemory>,
        bytes: usize,
    ) -> Result<Staging, DeviceError> {
        let context = memory.context();
        let buffer = || {
            Ok::<_, DeviceError>(Buffer {
                pinned: Pinned::new(context, bytes.max(1))?,
                copied: Event::new(context)?,
                state: State::Free,
            })
        };
        Ok(Staging {
            stream: Stream::new(context)?,
            buffers: ManuallyDrop::new([buffer()?, buffer()?]),
            memory: Arc::clone(memory),
            next: 0,
        })
    }

    /// Waits until nothing is being copied.
    fn drain(&mut self) -> Result<(), DeviceError> {
        self.stream.synchronize()?;
        for buffer in self.buffers.iter_mut() {
            buffer.state = State::Free;
        }
        Ok(())
    }
}

impl Writer for Staging {
    fn stage(&mut self) -> Result<&mut [u8], DeviceError> {
        match self.buffers[self.next].state {
            State::Free => {}
            State::Copying => self.buffers[self.next].copied.synchronize()?,
            State::Unknown => self.drain()?,
        }
        let buffer = &mut self.buffers[self.next];
        buffer.state = State::Free;
        Ok(buffer.pinned.bytes())
    }

    fn write(&mut self, pieces: &[Piece]) -> Result<(), DeviceError> {
        // Free already, unless something is written that has not been staged.
        self.stage()?;
        let buffer = &mut self.buffers[self.next];
        let context = self.memory.context();
        let _current = context.enter()?;
        for piece in pieces.iter().filter(|piece| piece.len > 0) {
            let target = self.memory.at(piece.offset, piece.len)?;
            let end = piece.start.saturating_add(piece.len);
            if end > buffer.pinned.len() {
                return Err(DeviceError::OutOfBounds {
                    device: context.name().to_owned(),
                    offset: piece.start as u64,
                    end: end as u64,
                    len: buffer.pinned.len() as u64,
                });
            }
            buffer.state = State::Unknown;
            // SAFETY: the bytes lie inside the buffer, which nobody can write or free before the
            // stream or the event has been waited for, and go to bytes inside of the device's
            // memory, which `self` holds. The stream is of the same context, which is current.
            let code = unsafe {
                let source = buffer.pinned.as_ptr().add(piece.start).cast();
                (context.api.cuMemcpyHtoDAsync_v2)(target, source, piece.len, self.stream.raw)
            };
            context.check("cuMemcpyHtoDAsync", piece.len as u64, code)?;
        }
        if buffer.state == State::Unknown {
            buffer.copied.record(&self.stream)?;
            buffer.state = State::Copying;
        }
        self.next = (self.next + 1) % self.buffers.len();
        Ok(())
    }

    fn finish(&mut self) -> Result<(), DeviceError> {
        self.drain()
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self
            .buffers
            .iter()
            .any(|buffer| buffer.state != State::Free)
            && let Err(error) = twice(|| self.stream.synchronize())
        {
            // The device may go on reading them: rather lost than given to somebody else. The same
            // holds for what it may be writing to.
            tracing::warn!("{error}, buffers are not given back");
            std::mem::forget(Arc::clone(&self.memory));
            return;
        }
        // SAFETY: dropped here and nowhere else, and not used afterwards.
        unsafe { ManuallyDrop::drop(&mut self.buffers) };
    }
}

/// Does its copies one after the other, and waits for no other stream.
struct Stream {
    context: Arc<Context>,
    raw: CUstream,
}

// SAFETY: a stream is a handle; the driver lets any thread use it.
unsafe impl Send for Stream {}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Stream").field(&self.context).finish()
    }
}

impl Stream {
    fn new(context: &Arc<Context>) -> Result<Stream, DeviceError> {
        let _current = context.enter()?;
        let mut raw = ptr::null_mut();
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: `raw` outlives the call; the context is current.
        let code = unsafe { (context.api.cuStreamCreate)(&raw mut raw, flags) };
        context.check("cuStreamCreate", 0, code)?;
        Ok(Stream {
            context: Arc::clone(context),
            raw,
        })
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        let _current = self.context.enter()?;
        // SAFETY: the stream is ours; its context is current.
        let code = unsafe { (self.context.api.cuStreamSynchronize)(self.raw) };
        self.context.check("cuStreamSynchronize", 0, code)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _current = twice(|| self.context.enter());
        // SAFETY: created by us and destroyed once.
        let code = unsafe { (self.context.api.cuStreamDestroy_v2)(self.raw) };
        self.context.check_release("cuStreamDestroy", code);
    }
}

/// A point in a stream that can be waited for.
struct Event {
    context: Arc<Context>,
    raw: CUevent,
}

// SAFETY: an event is a handle; the driver lets any thread use it.
unsafe impl Send for Event {}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Event").field(&self.context).finish()
    }
}

impl Event {
    fn new(context: &Arc<Context>) -> Result<Event, DeviceError> {
        let _current = context.enter()?;
        let mut raw = ptr::null_mut();
        // Whoever waits sleeps: other workers need the core.
        let flags = CUevent_flags::CU_EVENT_DISABLE_TIMING as u32
            | CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32;
        // SAFETY: `raw` outlives the call; the context is current.
        let code = unsafe { (context.api.cuEventCreate)(&raw mut raw, flags) };
        context.check("cuEventCreate", 0, code)?;
        Ok(Event {
            context: Arc::clone(context),
            raw,
        })
    }

    /// Marks what the stream has been given so far. The stream's context is current.
    fn record(&self, stream: &Stream) -> Result<(), DeviceError> {
        // SAFETY: both are ours and of one context.
        let code = unsafe { (self.context.api.cuEventRecord)(self.raw, stream.raw) };
        self.context.check("cuEventRecord", 0, code)
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        let _current = self.context.enter()?;
        // SAFETY: the event is ours; its context is current.
        let code = unsafe { (self.context.api.cuEventSynchronize)(self.raw) };
        self.context.check("cuEventSynchronize", 0, code)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _current = twice(|| self.context.enter());
        // SAFETY: created by us and destroyed once.
        let code = unsafe { (self.context.api.cuEventDestroy_v2)(self.raw) };
        self.context.check_release("cuEventDestroy", code);
    }
}
