//! Copies to a device that go on while the processor does something else.

use std::mem::ManuallyDrop;
use std::sync::Arc;

use super::stream::{Event, Stream};
use super::{CudaPageLocked, DeviceMemory, twice};
use crate::device::{DeviceError, PageLocked, Piece, WRITER_BUFFERS, Writer};

/// Buffers that are filled in turn and copied to a device, in a stream of their own.
#[derive(Debug)]
pub(in crate::device::cuda) struct Staging {
    memory: Arc<DeviceMemory>,
    /// Given back by hand: not while the device may be reading them.
    buffers: ManuallyDrop<[Buffer; WRITER_BUFFERS]>,
    pub(super) stream: Stream,
    /// Whether the stream has been given anything since it was last waited for.
    pub(super) is_busy: bool,
    /// What the stream may be using: kept until it is done.
    used: Vec<Arc<DeviceMemory>>,
    /// The buffer to be filled next.
    next: usize,
}

#[derive(Debug)]
struct Buffer {
    bytes: CudaPageLocked,
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
    /// For copies to `memory`. Buffers are equal parts of `buffers`.
    pub(in crate::device::cuda) fn new(
        memory: &Arc<DeviceMemory>,
        buffers: Box<dyn PageLocked>,
    ) -> Result<Staging, DeviceError> {
        let context = memory.context();
        let mut buffers = CudaPageLocked::of(buffers, context.name())?;
        let bytes = buffers.len() / WRITER_BUFFERS;
        let mut buffer = || {
            Ok::<_, DeviceError>(Buffer {
                bytes: buffers.cut(bytes),
                copied: Event::polled(context)?,
                state: State::Free,
            })
        };
        Ok(Staging {
            stream: Stream::new(context)?,
            buffers: ManuallyDrop::new([buffer()?, buffer()?]),
            memory: Arc::clone(memory),
            is_busy: false,
            used: vec![Arc::clone(memory)],
            next: 0,
        })
    }

    /// Keeps memory as long as the stream may be using it.
    pub(super) fn keep(&mut self, memory: &Arc<DeviceMemory>) {
        if !self.used.iter().any(|used| Arc::ptr_eq(used, memory)) {
            self.used.push(Arc::clone(memory));
        }
    }

    /// Waits until the stream has nothing left to do.
    fn drain(&mut self) -> Result<(), DeviceError> {
        self.stream.synchronize()?;
        self.is_busy = false;
        for buffer in self.buffers.iter_mut() {
            buffer.state = State::Free;
        }
        Ok(())
    }

    /// Starts to copy pieces of the buffer that was staged last, each to its place in a memory.
    pub(super) fn copy(
        &mut self,
        pieces: &[(&Arc<DeviceMemory>, Piece)],
    ) -> Result<(), DeviceError> {
        // Free already, unless something is written that has not been staged.
        self.stage()?;
        for (memory, _) in pieces {
            self.keep(memory);
        }
        let buffer = &mut self.buffers[self.next];
        let context = self.memory.context();
        let _current = context.enter()?;
        for (memory, piece) in pieces.iter().filter(|(_, piece)| piece.len > 0) {
            let target = memory.at(piece.offset, piece.len)?;
            let end = piece.start.saturating_add(piece.len);
            if end > buffer.bytes.len() {
                return Err(DeviceError::OutOfBounds {
                    device: context.name().to_owned(),
                    offset: piece.start as u64,
                    end: end as u64,
                    len: buffer.bytes.len() as u64,
                });
            }
            buffer.state = State::Unknown;
            self.is_busy = true;
            // SAFETY: the bytes lie inside the buffer, which nobody can write or free before the
            // stream or the event has been waited for, and go to bytes inside of the device's
            // memory, which is kept as long. Stream and memories are of the same context, which is
            // current.
            let code = unsafe {
                let source = buffer.bytes.as_ptr().add(piece.start).cast();
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
        Ok(buffer.bytes.bytes())
    }

    fn write(&mut self, pieces: &[Piece]) -> Result<(), DeviceError> {
        let memory = Arc::clone(&self.memory);
        let pieces: Vec<_> = pieces.iter().map(|&piece| (&memory, piece)).collect();
        self.copy(&pieces)
    }

    fn finish(&mut self) -> Result<(), DeviceError> {
        self.drain()
    }

    fn release(mut self: Box<Self>) -> Result<Box<dyn PageLocked>, DeviceError> {
        self.drain()?;
        let [first, second] = self.buffers.each_mut().map(|buffer| buffer.bytes.cut_all());
        Ok(Box::new(first.join(second)))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.is_busy
            && let Err(error) = twice(|| self.stream.synchronize())
        {
            // The device may go on reading them: rather lost than given to somebody else, with all
            // that was locked together. The same holds for what it may be writing to.
            tracing::warn!("{error}, buffers are not given back");
            std::mem::forget(std::mem::take(&mut self.used));
            return;
        }
        // SAFETY: dropped here and nowhere else, and not used afterwards.
        unsafe { ManuallyDrop::drop(&mut self.buffers) };
    }
}
