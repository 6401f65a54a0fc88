//! What the functions of several interfaces have in common.

use wasmtime::component::{Resource, ResourceTable};

use super::bindings::tightfit::host::buffers::Place;
use super::error::CallError;
use super::{ProgramCtx, ProgramCtxView};
use crate::memory::Buffer;
use crate::stop::Stopped;

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

impl ProgramCtxView<'_> {
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
