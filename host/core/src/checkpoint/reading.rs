//! What is read of an opened checkpoint: bytes of its files, and elements, codes and scales of its tensors.

use tightfit_kernels::Kernels;

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
        if info.encoded.is_none() {
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
    /// what may be used meanwhile: some kilobytes at least.
    pub(crate) fn read_elements(
        &self,
        tensor: &TensorInfo,
        start: u64,
        buffer: &mut [u8],
        scratch: &mut [u8],
        kernels: Kernels,
    ) -> Result<(), CheckpointError> {
        match &tensor.encoded {
            None => self.read_at(tensor.shard, tensor.offset + start, buffer),
            Some(encoded) => self
                .reading(tensor, encoded)
                .read(start, buffer, scratch, kernels),
        }
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
    ) -> Result<(), CheckpointError> {
        let reading = scales::Reading {
            name: &tensor.name,
            shards: &self.shards,
            tensors: &self.tensors,
            shard: quantized.absmax.shard,
            offset: quantized.absmax.offset,
            count: quantized.scales(),
        };
        reading.read(quantized.absmax_form, first, buffer, scratch)
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

/// Fills the buffer with the bytes of a file from `offset` on. `tensors` serve to name what lies
/// there in an error.
pub(super) fn read_at(
    shards: &[Shard],
    tensors: &[TensorInfo],
    shard: usize,
    offset: u64,
    buffer: &mut [u8],
) -> Result<(), CheckpointError> {
    let file = &shards[shard];
    match file.read_at(offset, buffer) {
        Ok(()) => Ok(()),
        Err(ReadFailure::Other(error)) => Err(error),
        Err(ReadFailure::CutShort(have)) => {
            let holds = |tensor: &&TensorInfo| tensor.shard == shard && tensor.range().end > offset;
            // The scales of quantized weights lie wherever they lie: no order to search by.
            let tensor = tensors
                .iter()
                .filter(holds)
                .min_by_key(|tensor| tensor.offset);
            Err(CheckpointError::CutShort {
                path: file.path().into(),
                tensor: tensor.map_or_else(|| "header".into(), |tensor| tensor.name.clone()),
                start: offset,
                end: offset.saturating_add(buffer.len() as u64),
                have,
            })
        }
    }
}
