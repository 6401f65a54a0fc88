//! What the functions of several interfaces have in common.

use std::sync::Arc;

use wasmtime::component::{Resource, ResourceTable};

use super::bindings::tightfit::host::buffers::Place;
use super::error::CallError;
use super::{ProgramCtx, ProgramCtxView};
use crate::memory::Buffer;
use crate::stop::Stopped;
use tightfit::device::{DeviceBytes, Queue};

/// Bytes of a list that a program gives or gets in one call.
pub(super) const MOST_BYTES: usize = 4 << 20;

/// Bytes that are copied, converted or cleared at once: a host call holds a few of these, and asks
/// after each whether it is to go on.
pub(super) const PIECE: usize = 1 << 20;

/// Returns the bytes of a list that is to be given to a program.
///
/// # Errors
/// When they are more than one call gives.
pub(super) fn list_bytes(bytes: u64) -> Result<usize, CallError> {
    match usize::try_from(bytes) {
        Ok(bytes) if bytes <= MOST_BYTES => Ok(bytes),
        _ => Err(CallError::invalid(format_args!(
            "{bytes} bytes are too many for one call: at most {MOST_BYTES}"
        ))),
    }
}

/// Returns the bytes of `count` elements of `each` bytes.
///
/// # Errors
/// When they have no size in 64 bits.
pub(super) fn element_bytes(count: u64, each: usize) -> Result<u64, CallError> {
    count
        .checked_mul(each as u64)
        .ok_or_else(|| CallError::invalid(format_args!("{count} elements have no size in 64 bits")))
}

/// A range that an operation uses.
#[derive(Debug, Clone, Copy)]
pub(super) struct Used<'a> {
    pub(super) place: &'a Place,
    pub(super) bytes: u64,
    /// Bytes of an element.
    pub(super) each: usize,
    pub(super) is_written: bool,
}

impl<'a> Used<'a> {
    pub(super) fn read(place: &'a Place, bytes: u64, each: usize) -> Used<'a> {
        Used {
            place,
            bytes,
            each,
            is_written: false,
        }
    }

    pub(super) fn written(place: &'a Place, bytes: u64, each: usize) -> Used<'a> {
        Used {
            is_written: true,
            ..Used::read(place, bytes, each)
        }
    }

    /// Whether it begins at a multiple of its elements: buffers do.
    pub(super) fn is_aligned(&self) -> bool {
        self.place.offset.is_multiple_of(self.each.max(1) as u64)
    }

    /// Whether both have a byte in common and one of them is written. They have been checked, so that they
    /// end within 64 bits.
    pub(super) fn conflicts(&self, other: &Used<'_>) -> bool {
        (self.is_written || other.is_written)
            && self.place.buffer.rep() == other.place.buffer.rep()
            && self.bytes > 0
            && other.bytes > 0
            && self.place.offset < other.place.offset + other.bytes
            && other.place.offset < self.place.offset + self.bytes
    }
}

/// Returns the first two of these ranges, by their numbers, of which one overwrites the other.
pub(super) fn conflict(used: &[Used<'_>]) -> Option<(usize, usize)> {
    let pairs = (0..used.len()).flat_map(|one| (one + 1..used.len()).map(move |two| (one, two)));
    let mut pairs = pairs.filter(|&(one, two)| used[one].conflicts(&used[two]));
    pairs.next()
}

impl ProgramCtxView<'_> {
    /// Checks these ranges as [`ProgramCtxView::check`], and gives the queue of their device if its kernels
    /// can do what is asked. Where they cannot, because a range begins between elements or overlaps what is
    /// written, the processor does it piece by piece: every device gives the same.
    ///
    /// # Errors
    /// When a range does not lie inside of its buffer or they are not on one device, and when the driver
    /// refuses.
    pub(super) fn queue_for(&self, used: &[Used<'_>]) -> Result<Option<Arc<dyn Queue>>, CallError> {
        let ranges: Vec<(&Place, u64)> = used.iter().map(|used| (used.place, used.bytes)).collect();
        self.check(&ranges)?;
        let can = used.iter().all(|used| used.bytes > 0 && used.is_aligned());
        let Some(first) = used.first().filter(|_| can && conflict(used).is_none()) else {
            return Ok(None);
        };
        let buffer = self.table.get(&first.place.buffer)?;
        Ok(buffer.queue()?.cloned())
    }

    /// Returns bytes from `start` bytes behind a place on, to be read by a device in turn. What was never
    /// written is cleared before. The range has been checked and is not empty.
    pub(super) fn source(
        &mut self,
        place: &Place,
        start: u64,
        bytes: u64,
    ) -> Result<DeviceBytes, CallError> {
        let start = place.offset + start;
        let buffer = self.table.get_mut(&place.buffer)?;
        buffer.clear_until(start + bytes, &self.context.stop)?;
        buffer.range(start, bytes)?.ok_or_else(not_there)
    }

    /// The same for bytes that a device is to write; all of them. [`ProgramCtxView::wrote`] is called when
    /// that has been given to it.
    pub(super) fn target(
        &mut self,
        place: &Place,
        start: u64,
        bytes: u64,
    ) -> Result<DeviceBytes, CallError> {
        let start = place.offset + start;
        let buffer = self.table.get_mut(&place.buffer)?;
        buffer.clear_until(start, &self.context.stop)?;
        buffer.range(start, bytes)?.ok_or_else(not_there)
    }

    /// Notes that bytes up to `end` bytes behind a place are written in turn.
    pub(super) fn wrote(&mut self, place: &Place, end: u64) -> Result<(), CallError> {
        let buffer = self.table.get_mut(&place.buffer)?;
        buffer.wrote(place.offset + end);
        Ok(())
    }

    /// Takes memory for the time of a call, on the device of a place and in the quota. Nothing where there
    /// is too little: what needs it can be done otherwise.
    pub(super) fn borrow_memory(
        &self,
        place: &Place,
        bytes: u64,
    ) -> Result<Option<Buffer>, CallError> {
        let device = u32::try_from(self.table.get(&place.buffer)?.device());
        let device = device.unwrap_or(u32::MAX);
        match self.context.memory.allocate(device, bytes) {
            Ok(buffer) => Ok(Some(buffer)),
            Err(error) if error.is_short() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Begins a call, unless the program is to end: gives the context and the table. Every function
    /// comes here first but those that free something, which is never refused.
    ///
    /// # Errors
    /// Why the program is to end.
    pub(super) fn begin(&mut self) -> Result<(&mut ProgramCtx, &mut ResourceTable), Stopped> {
        self.context.stop.check()?;
        Ok((self.context, self.table))
    }

    /// Checks that these ranges lie inside of their buffers, and on one device.
    ///
    /// # Errors
    /// When one does not.
    pub(super) fn check(&self, ranges: &[(&Place, u64)]) -> Result<(), CallError> {
        let mut device = None;
        for (place, bytes) in ranges {
            let buffer = self.table.get(&place.buffer)?;
            buffer.check(place.offset, *bytes)?;
            let first = *device.get_or_insert(buffer.device());
            if buffer.device() != first {
                return Err(CallError::invalid(format_args!(
                    "the buffers are on devices {first} and {}, not on one",
                    buffer.device()
                )));
            }
        }
        Ok(())
    }

    /// Copies bytes from `start` bytes behind a place on. The range has been checked.
    pub(super) fn fetch(&self, place: &Place, start: u64, out: &mut [u8]) -> Result<(), CallError> {
        let buffer = self.table.get(&place.buffer)?;
        Ok(buffer.read(place.offset + start, out)?)
    }

    /// Writes bytes from `start` bytes behind a place on. The range has been checked.
    pub(super) fn store(
        &mut self,
        place: &Place,
        start: u64,
        bytes: &[u8],
    ) -> Result<(), CallError> {
        let buffer = self.table.get_mut(&place.buffer)?;
        Ok(buffer.write(place.offset + start, bytes, &self.context.stop)?)
    }

    /// Goes through `count` elements in pieces of `each`: `step` is given the first of a piece and
    /// their number. Before each it is asked whether the program may go on.
    ///
    /// # Errors
    /// Why the program is to end, or as `step`.
    pub(super) fn in_pieces(
        &mut self,
        count: u64,
        each: u64,
        mut step: impl FnMut(&mut Self, u64, usize) -> Result<(), CallError>,
    ) -> Result<(), CallError> {
        let mut first = 0;
        while first < count {
            self.context.stop.check()?;
            // A piece is far below 2^32.
            let elements = (count - first).min(each);
            step(self, first, elements as usize)?;
            first += elements;
        }
        Ok(())
    }

    /// Fills a range of a buffer with `bytes` bytes, which `source` gives piece by piece: from the
    /// start that it is told on, as many as there is room for.
    ///
    /// # Errors
    /// When the range does not lie inside of the buffer, and as [`ProgramCtxView::in_pieces`].
    pub(super) fn fill(
        &mut self,
        target: &Place,
        bytes: u64,
        mut source: impl FnMut(&Self, u64, &mut [u8]) -> Result<(), CallError>,
    ) -> Result<(), CallError> {
        self.check(&[(target, bytes)])?;
        let mut piece = vec![0; bytes.min(PIECE as u64) as usize];
        self.in_pieces(bytes, PIECE as u64, |view, start, length| {
            let piece = &mut piece[..length];
            source(view, start, piece)?;
            view.store(target, start, piece)
        })
    }
}

/// Returns the place in a buffer at this offset.
pub(super) fn place(buffer: Resource<Buffer>, offset: u64) -> Place {
    Place { buffer, offset }
}

/// A device that has a queue and no memory for it: a fault of its own.
pub(super) fn not_there() -> CallError {
    CallError::Trap(wasmtime::format_err!(
        "internal error: a device has an order of work, and no memory for it"
    ))
}
