//! Streams of work for a device, and points in them.

use std::fmt;
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::sys;
use sys::{CUevent, CUevent_flags, CUstream, CUstream_flags};

use super::{Context, NOT_READY, twice};
use crate::device::DeviceError;

/// Does what it is given one after the other, and waits for no other stream unless it is told to.
pub(super) struct Stream {
    context: Arc<Context>,
    pub(super) raw: CUstream,
}

// SAFETY: a stream is a handle; the driver lets any thread use it.
unsafe impl Send for Stream {}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Stream").field(&self.context).finish()
    }
}

impl Stream {
    pub(super) fn new(context: &Arc<Context>) -> Result<Stream, DeviceError> {
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

    pub(super) fn synchronize(&self) -> Result<(), DeviceError> {
        let _current = self.context.enter()?;
        let _beside = self.context.beside_captures()?;
        // SAFETY: the stream is ours; its context is current.
        let code = unsafe { (self.context.api.cuStreamSynchronize)(self.raw) };
        self.context.check("cuStreamSynchronize", 0, code)
    }

    /// Has what it is given from now on wait for where the event was recorded last. The stream's
    /// context is current.
    pub(super) fn wait_for(&self, event: &Event) -> Result<(), DeviceError> {
        // SAFETY: both are ours and of one context; without flags.
        let code = unsafe { (self.context.api.cuStreamWaitEvent)(self.raw, event.raw, 0) };
        self.context.check("cuStreamWaitEvent", 0, code)
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

/// How long is slept between two questions about an event. A transfer of a buffer takes about as long.
const POLL_EVERY: Duration = Duration::from_micros(20);

/// A point in a stream that can be waited for.
pub(super) struct Event {
    context: Arc<Context>,
    raw: CUevent,
    is_polled: bool,
}

// SAFETY: an event is a handle; the driver lets any thread use it.
unsafe impl Send for Event {}
// SAFETY: as above. Recording and waiting are the driver's to put in order.
unsafe impl Sync for Event {}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Event").field(&self.context).finish()
    }
}

impl Event {
    /// One for waits that may be long: whoever waits sleeps until the device interrupts, because others
    /// need the core.
    pub(super) fn new(context: &Arc<Context>) -> Result<Event, DeviceError> {
        let flags = CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32;
        Event::with(context, flags, false)
    }

    /// One that is mostly past when it is waited for. It is asked for now and then: an interrupt for each
    /// costs more than what they are waited for.
    pub(super) fn polled(context: &Arc<Context>) -> Result<Event, DeviceError> {
        Event::with(context, 0, true)
    }

    fn with(context: &Arc<Context>, flags: u32, is_polled: bool) -> Result<Event, DeviceError> {
        let _current = context.enter()?;
        let mut raw = ptr::null_mut();
        let flags = flags | CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: `raw` outlives the call; the context is current.
        let code = unsafe { (context.api.cuEventCreate)(&raw mut raw, flags) };
        context.check("cuEventCreate", 0, code)?;
        Ok(Event {
            context: Arc::clone(context),
            raw,
            is_polled,
        })
    }

    /// Marks what the stream has been given so far. The stream's context is current.
    pub(super) fn record(&self, stream: &Stream) -> Result<(), DeviceError> {
        // SAFETY: both are ours and of one context.
        let code = unsafe { (self.context.api.cuEventRecord)(self.raw, stream.raw) };
        self.context.check("cuEventRecord", 0, code)
    }

    /// Asks until it is past. The event's context is current, and graphs are others' concern.
    fn poll(&self) -> Result<(), DeviceError> {
        loop {
            // SAFETY: the event is ours; its context is current.
            let code = unsafe { (self.context.api.cuEventQuery)(self.raw) };
            if code != NOT_READY {
                return self.context.check("cuEventQuery", 0, code);
            }
            std::thread::sleep(POLL_EVERY);
        }
    }

    pub(super) fn synchronize(&self) -> Result<(), DeviceError> {
        let _current = self.context.enter()?;
        let _beside = self.context.beside_captures()?;
        if self.is_polled {
            return self.poll();
        }
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
