//! What a chunk is read from: the file's bytes, those of a slice, or what another method's codes are decoded to.

use std::sync::atomic::{AtomicU64, Ordering};

use tightfit_kernels::{FloatType, Kernels};

use super::LoadError;
use crate::checkpoint::{Checkpoint, Gather, Mappings, ReadCodes, TensorInfo, Window};
use crate::device::Staged;

/// Most bytes of a file that are looked at for one chunk: a narrow slice lies all over its tensor, and what is
/// looked at is locked in memory meanwhile.
const MOST_SPANNED: u64 = 64 << 20;

/// Where a chunk is read from.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) tensor: usize,
    /// The tensor, if it is decoded or gathered as it is read: then the offset is that of its bytes.
    pub(super) indirect: Option<&'a TensorInfo>,
    pub(super) shard: usize,
    pub(super) offset: u64,
    pub(super) bytes: usize,
    pub(super) kernels: Kernels,
    pub(super) mappings: &'a Mappings,
    /// Counts bytes that are read beside those of the chunk.
    pub(super) beside: &'a AtomicU64,
}

impl Source<'_> {
    /// So many bytes of the chunk from byte `start` on.
    pub(super) fn part(&self, start: usize, bytes: usize) -> Self {
        Source {
            offset: self.offset + start as u64,
            bytes,
            ..*self
        }
    }

    /// Where the chunk's bytes lie, if it is of a slice whose bytes do not lie together in the file.
    pub(super) fn gather(&self) -> Option<&Gather> {
        let tensor = self.indirect.filter(|tensor| tensor.encoded.is_none());
        tensor.and_then(TensorInfo::gather)
    }

    /// Where the system's page cache has the chunk, and of a slice what is between its runs. `None` where
    /// it has to be read.
    pub(super) fn window(&self) -> Option<Window<'_>> {
        let (offset, bytes) = match (self.indirect, self.gather()) {
            (None, _) => (self.offset, self.bytes),
            (Some(_), None) => return None,
            (Some(tensor), Some(gather)) => {
                let span = gather.span(self.offset, self.offset + self.bytes as u64);
                if span.end - span.start > MOST_SPANNED {
                    return None;
                }
                (tensor.offset + span.start, (span.end - span.start) as usize)
            }
        };
        self.mappings.window(self.shard, offset, bytes)
    }

    /// So many bytes from byte `start` of the chunk on, as its window has them; those of a slice are gathered
    /// in `buffer`, which has as many.
    pub(super) fn look<'b>(
        &self,
        window: &'b Window<'_>,
        start: usize,
        buffer: &'b mut [u8],
    ) -> &'b [u8] {
        let Some(gather) = self.gather() else {
            return &window[start..][..buffer.len()];
        };
        let begin = gather.span(self.offset, self.offset + 1).start;
        let first = self.offset + start as u64;
        let end = first + buffer.len() as u64;
        gather.copy(first..end, 1, (begin, window), buffer);
        buffer
    }

    /// Reads from `start` bytes behind the chunk's first on. What is decoded is read through `scratch`.
    pub(super) fn read(
        &self,
        start: usize,
        buffer: &mut [u8],
        scratch: &mut [u8],
    ) -> Result<(), LoadError> {
        let offset = self.offset + start as u64;
        let read = match self.indirect {
            None => self.checkpoint.read_at(self.shard, offset, buffer),
            Some(tensor) => {
                let kernels = self.kernels;
                let read = self
                    .checkpoint
                    .read_elements(tensor, offset, buffer, scratch, kernels);
                read.map(|beside| {
                    self.beside.fetch_add(beside, Ordering::Relaxed);
                })
            }
        };
        read.map_err(LoadError::Checkpoint)
    }

    /// Fills the beginning of a buffer with the chunk for a device that quantizes it: codes and scales
    /// of what is encoded, where the device's kernels can decode them, else elements of type `float`.
    pub(super) fn stage(
        &self,
        float: FloatType,
        buffer: &mut [u8],
        scratch: &mut [u8],
    ) -> Result<Staged, LoadError> {
        if let Some(tensor) = self.indirect {
            let each = float.bytes();
            let (first, count) = (self.offset / each as u64, self.bytes / each);
            let read = self.checkpoint.read_codes(tensor, first, count, buffer);
            if let Some(ReadCodes { run, scales }) = read.map_err(LoadError::Checkpoint)? {
                return Ok(Staged::Codes { float, run, scales });
            }
        }
        let elements = buffer
            .get_mut(..self.bytes)
            .ok_or(LoadError::Internal("a chunk is larger than its buffer"))?;
        self.read(0, elements, scratch)?;
        Ok(Staged::Floats(float))
    }

    /// Cuts a worker's slot into what is read at once and what it is decoded or gathered from, if it is.
    pub(super) fn cut<'s>(&self, slot: &'s mut [u8]) -> (&'s mut [u8], &'s mut [u8]) {
        match self.indirect {
            None => (slot, &mut []),
            // Elements of 16 bits, of codes of 8 and scales; or what lies between short runs.
            Some(_) => slot.split_at_mut(slot.len() / 2),
        }
    }

    /// The part of the tensor's bytes in the checkpoint that is in the chunk: in sum all of them.
    pub(super) fn source_bytes(&self) -> u64 {
        let Some(tensor) = self.indirect.filter(|tensor| tensor.encoded.is_some()) else {
            return self.bytes as u64;
        };
        let (stored, decoded) = (tensor.source_bytes(), tensor.decoded_bytes());
        let until = |end: u64| {
            let share = u128::from(stored) * u128::from(end) / u128::from(decoded.max(1));
            // Not more than all.
            share as u64
        };
        until(self.offset + self.bytes as u64) - until(self.offset)
    }
}
