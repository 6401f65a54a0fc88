//! What is read of an opened checkpoint: bytes of its files, and elements, codes and scales of its tensors.

use std::mem;
use std::ops::Range;

use tightfit_kernels::Kernels;

use super::gather::Gather;
use super::{
    Checkpoint, CheckpointError, Encoded, Quantized, ReadCodes, ReadFailure, Shard, TensorInfo,
    encoded, scales,
};

impl Checkpoint {
    /// Fills the buffer with the bytes of a file from `offset` on.
    ///
    /// # Errors
    /// [`CheckpointError::CutShort`] when the file ends before, [`CheckpointError::Changed`] when
    /// it is not the file that was opened any more, [`CheckpointError::Io`] when reading fails.
    ///
    /// # Panics
    /// When there is no such shard.
    pub fn read_at(
        &self,
        shard: usize,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), CheckpointError> {
        read_at(&self.shards, &self.tensors, shard, offset, buffer)
    }

    /// Fills the buffer with the bytes of a tensor from its byte `start` on: its codes if bitsandbytes has
    /// quantized it, its elements as they are decoded if it is encoded.
    ///
    /// # Errors
    /// [`CheckpointError::OutsideTensor`] when the tensor ends before, and those of
    /// [`Checkpoint::read_at`].
    ///
    /// # Panics
    /// When there is no such tensor.
    pub fn read_tensor(
        &self,
        tensor: usize,
        start: u64,
        buffer: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let info = &self.tensors[tensor];
        let have = info.decoded_bytes();
        match start.checked_add(buffer.len() as u64) {
            Some(end) if end <= have => {}
            end => {
                return Err(CheckpointError::OutsideTensor {
                    tensor: info.name.clone(),
                    start,
                    end: end.unwrap_or(u64::MAX),
                    have,
                });
            }
        }
        if !info.is_indirect() {
            return self.read_at(info.shard, info.offset + start, buffer);
        }
        // Elements of 16 bits are decoded as a whole: the range that has these.
        let kernels = Kernels::detect();
        let mut scratch = vec![0; SCRATCH_BYTES];
        let mut decoded = Vec::new();
        let mut rest = buffer;
        let mut start = start;
        while !rest.is_empty() {
            let first = start / 2 * 2;
            let length = rest.len().min(SCRATCH_BYTES);
            let end = (start + length as u64).next_multiple_of(2).min(have);
            decoded.resize((end - first) as usize, 0);
            self.read_elements(info, first, &mut decoded, &mut scratch, kernels)?;
            let (piece, others) = rest.split_at_mut(length);
            piece.copy_from_slice(&decoded[(start - first) as usize..][..length]);
            start += length as u64;
            rest = others;
        }
        Ok(())
    }

    /// Fills the buffer with elements of a tensor of this checkpoint, or of rows of one, from its byte
    /// `start` on, as they are decoded if it is encoded; then both are whole elements, and `scratch` is
    /// what may be used meanwhile: some kilobytes at least. What does not lie together in the file is
    /// gathered. Gives how many bytes were read beside what was asked for.
    pub(crate) fn read_elements(
        &self,
        tensor: &TensorInfo,
        start: u64,
        buffer: &mut [u8],
        scratch: &mut [u8],
        kernels: Kernels,
    ) -> Result<u64, CheckpointError> {
        match (&tensor.encoded, tensor.gather()) {
            (None, None) => {
                self.read_at(tensor.shard, tensor.offset + start, buffer)?;
                Ok(0)
            }
            (None, Some(gather)) => self.read_gathered(tensor, gather, start, buffer, scratch),
            (Some(encoded), None) => {
                self.reading(tensor, encoded)
                    .read(start, buffer, scratch, kernels)?;
                Ok(0)
            }
            (Some(encoded), Some(gather)) => {
                let reading = self.reading(tensor, encoded);
                let each = tensor.dtype.bits() / 8;
                let (first, count) = (start / each, buffer.len() as u64 / each);
                let mut rest = buffer;
                for segment in gather.segments(first, first + count) {
                    let bytes = (each * (segment.end - segment.start)) as usize;
                    let (piece, others) = rest.split_at_mut(bytes);
                    reading.read(each * segment.start, piece, scratch, kernels)?;
                    rest = others;
                }
                Ok(0)
            }
        }
    }

    /// Fills the buffer with bytes of a tensor that do not lie together. Where they lie in many short runs,
    /// what is between is read with them: that takes less time than a call for each.
    fn read_gathered(
        &self,
        tensor: &TensorInfo,
        gather: &Gather,
        start: u64,
        buffer: &mut [u8],
        scratch: &mut [u8],
    ) -> Result<u64, CheckpointError> {
        let end = start + buffer.len() as u64;
        let mut rest = buffer;
        let strides = scratch.len() as u64 / gather.stride().max(1);
        let is_apart = gather.shortest_run() >= SHORT_RUN && gather.longest_gap() > SHORT_GAP;
        if strides == 0 || is_apart {
            let pieces = gather.segments(start, end).map(|segment| {
                let length = (segment.end - segment.start) as usize;
                let (piece, others) = mem::take(&mut rest).split_at_mut(length);
                rest = others;
                (tensor.offset + segment.start, piece)
            });
            read_pieces(&self.shards, &self.tensors, tensor.shard, pieces)?;
            return Ok(0);
        }
        let (mut next, mut beside) = (start, 0);
        while next < end {
            let until = end.min((next / gather.of_stride() + strides) * gather.of_stride());
            let span = gather.span(next, until);
            let spanned = &mut scratch[..(span.end - span.start) as usize];
            self.read_at(tensor.shard, tensor.offset + span.start, spanned)?;
            let (piece, others) = rest.split_at_mut((until - next) as usize);
            gather.copy(next..until, 1, (span.start, spanned), piece);
            rest = others;
            beside += (span.end - span.start) - (until - next);
            next = until;
        }
        Ok(beside)
    }

    /// Fills the buffer with f32 scales of a quantized tensor of this checkpoint, in the order of its blocks
    /// from number `first` on, whatever form they have in the file. `scratch` is as for `read_elements`.
    pub(crate) fn read_absmax(
        &self,
        tensor: &TensorInfo,
        quantized: &Quantized,
        first: u64,
        buffer: &mut [u8],
        scratch: &mut [u8],
    ) -> Result<u64, CheckpointError> {
        let cut = tensor
            .piece
            .as_ref()
            .and_then(|piece| piece.scales.as_ref());
        let form = quantized.absmax_form;
        let reading = scales::Reading {
            name: &tensor.name,
            shards: &self.shards,
            tensors: &self.tensors,
            shard: quantized.absmax.shard,
            offset: quantized.absmax.offset,
            count: cut.map_or_else(|| quantized.scales(), |(_, all)| *all),
        };
        let Some((gather, _)) = cut else {
            reading.read(form, first, buffer, scratch)?;
            return Ok(0);
        };
        // What is between the scales that are wanted is read, too: they are few.
        let (spanned, scratch) = scratch.split_at_mut(scratch.len() / 8 * 4);
        let strides = spanned.len() as u64 / (4 * gather.stride()).max(1);
        let end = first + buffer.len() as u64 / 4;
        let (mut next, mut beside, mut rest) = (first, 0, buffer);
        while next < end {
            let until = match strides {
                // A part of one run.
                0 => gather
                    .segments(next, end.min(next + spanned.len() as u64 / 4))
                    .next()
                    .map_or(end, |segment| next + (segment.end - segment.start)),
                strides => end.min((next / gather.of_stride() + strides) * gather.of_stride()),
            };
            let span = gather.span(next, until);
            let spanned = &mut spanned[..4 * (span.end - span.start) as usize];
            reading.read(form, span.start, spanned, scratch)?;
            let (piece, others) = rest.split_at_mut(4 * (until - next) as usize);
            gather.copy(next..until, 4, (span.start, spanned), piece);
            rest = others;
            beside += form.bytes_of((span.end - span.start) - (until - next));
            next = until;
        }
        Ok(beside)
    }

    /// Fills the beginning of the buffer with codes and scales of an encoded tensor of this checkpoint,
    /// for `count` elements from number `first` on. `None` where kernels cannot decode these, or where
    /// there is no room.
    pub(crate) fn read_codes(
        &self,
        tensor: &TensorInfo,
        first: u64,
        count: usize,
        buffer: &mut [u8],
    ) -> Result<Option<ReadCodes>, CheckpointError> {
        match &tensor.encoded {
            None => Ok(None),
            Some(_) if tensor.gather().is_some() => Ok(None),
            Some(encoded) => self
                .reading(tensor, encoded)
                .read_codes(first, count, buffer),
        }
    }

    fn reading<'a>(&'a self, tensor: &'a TensorInfo, encoded: &'a Encoded) -> encoded::Reading<'a> {
        encoded::Reading {
            shards: &self.shards,
            tensors: &self.tensors,
            tensor,
            encoded,
        }
    }
}

/// Bytes of codes and of elements that are held while an encoded tensor is read without a loader.
const SCRATCH_BYTES: usize = 64 << 10;

/// Runs of fewer bytes are read with what is between them.
const SHORT_RUN: u64 = 512;
/// And all that have no more between them: of a file in pages of 4 KiB at least a part of that is read anyway, and a call takes
/// longer than to copy it.
const SHORT_GAP: u64 = 4 << 10;

/// Fills the buffer with the bytes of a file from `offset` on. `tensors` serve to name what lies
/// there in an error.
pub(super) fn read_at(
    shards: &[Shard],
    tensors: &[TensorInfo],
    shard: usize,
    offset: u64,
    buffer: &mut [u8],
) -> Result<(), CheckpointError> {
    let end = offset.saturating_add(buffer.len() as u64);
    let read = shards[shard].read_at(offset, buffer);
    read.map_err(|failure| failed(shards, tensors, shard, offset..end, failure))
}

/// The same for several buffers, each with its offset.
fn read_pieces<'b>(
    shards: &[Shard],
    tensors: &[TensorInfo],
    shard: usize,
    pieces: impl Iterator<Item = (u64, &'b mut [u8])>,
) -> Result<(), CheckpointError> {
    let mut last = 0..0;
    let pieces = pieces.inspect(|(offset, buffer)| {
        last = *offset..offset.saturating_add(buffer.len() as u64);
    });
    let read = shards[shard].read_pieces(pieces);
    read.map_err(|failure| failed(shards, tensors, shard, last, failure))
}

fn failed(
    shards: &[Shard],
    tensors: &[TensorInfo],
    shard: usize,
    range: Range<u64>,
    failure: ReadFailure,
) -> CheckpointError {
    let have = match failure {
        ReadFailure::Other(error) => return error,
        ReadFailure::CutShort(have) => have,
    };
    let holds = |tensor: &&TensorInfo| tensor.shard == shard && tensor.range().end > range.start;
    // The scales of quantized weights lie wherever they lie: no order to search by.
    let tensor = tensors
        .iter()
        .filter(holds)
        .min_by_key(|tensor| tensor.offset);
    CheckpointError::CutShort {
        path: shards[shard].path().into(),
        tensor: tensor.map_or_else(|| "header".into(), |tensor| tensor.name.clone()),
        start: range.start,
        end: range.end,
        have,
    }
}
