//! Whether a call writes what it says, and nothing else.

use tightfit_wasm::wit::program::bindings::tightfit::host::buffers::{HostBuffer as _, Place};
use wasmtime::component::Resource;

use super::Program;

/// Bytes of a buffer, by its handle.
#[derive(Clone, Copy)]
pub(super) struct Range {
    buffer: u32,
    start: u64,
    end: u64,
}

impl Range {
    /// All that `elements` of `each` bytes have. Where that has no size the call is refused, and nothing of it is
    /// written.
    pub(super) fn new(place: &Place, lengths: &[u64], each: u64) -> Range {
        let bytes = lengths
            .iter()
            .fold(each, |bytes, &length| bytes.saturating_mul(length));
        Range {
            buffer: place.buffer.rep(),
            start: place.offset,
            end: place.offset.saturating_add(bytes),
        }
    }
}

/// What all buffers hold.
pub(super) struct Held(Vec<(u32, Vec<u8>)>);

impl Program<'_> {
    /// Notes what buffers hold, if that is to be looked at.
    pub(super) fn before(&mut self) -> Option<Held> {
        self.watches.then(|| self.held())
    }

    fn held(&mut self) -> Held {
        let buffers = self.buffers.clone();
        Held(
            buffers
                .into_iter()
                .map(|buffer| (buffer, self.bytes_of(buffer)))
                .collect(),
        )
    }

    /// Everything in a buffer.
    fn bytes_of(&mut self, buffer: u32) -> Vec<u8> {
        let handle = || Resource::new_borrow(buffer);
        let length = self.view().length(handle()).unwrap();
        // No buffer has more than a list may.
        self.view().read(handle(), 0, length).unwrap()
    }

    /// Nothing has changed but these ranges, which may have.
    pub(super) fn check_written(&mut self, before: Option<Held>, written: &[Range]) {
        let Some(Held(before)) = before else {
            return;
        };
        for (buffer, before) in before {
            let now = self.bytes_of(buffer);
            assert_eq!(now.len(), before.len());
            let written = || written.iter().filter(|range| range.buffer == buffer);
            for (at, (was, is)) in before.iter().zip(&now).enumerate() {
                let at = at as u64;
                assert!(
                    was == is || written().any(|range| range.start <= at && at < range.end),
                    "byte {at} of buffer {buffer} was {was} and is {is}"
                );
            }
        }
    }
}
