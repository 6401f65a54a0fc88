//! Scales of a weight that bitsandbytes has quantized, where the file has them as they are not used.
//!
//! On a processor with bfloat16 instructions of AVX-512, bitsandbytes (0.50) packs weights again before the first product,
//! and their scales with them: rounded to bf16, transposed. When such a model is saved it packs codes back, but scales
//! only under double quantization. The file then has `absmax` in bf16, [columns / block size, rows], and
//! bitsandbytes itself reads it as if it were in the order of blocks. Here it is read as what it is, and
//! widened to f32, which is exact.
//!
//! Under double quantization it computes mean and codes anew from the rounded scales, and notes the model's type
//! beside them (`nested_dtype`). It then rounds to that type what a code stands for, and again when it adds the
//! mean. That is computed here as scales are read: such a weight has f32 scales in memory.

use tightfit_kernels::half::{bf16, f16};
use tightfit_kernels::{DYNAMIC_MAP, FloatType, NESTED_BLOCK_SIZE};

use super::{CheckpointError, Extent, Shard, TensorInfo, read_at};
use crate::types::elements;

/// Whole rows of a file are read at once up to this many scales a row: then that takes no longer than a call
/// for each piece.
const MERGED_SCALES: u64 = 2048;

/// How the scales of a quantized weight lie in the file.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub enum AbsmaxForm {
    /// As they are used: f32, or u8 under double quantization.
    #[default]
    AsUsed,
    /// bf16, in the order of the blocks.
    Bf16,
    /// bf16, [blocks of a row, rows].
    Bf16Transposed {
        /// Rows of the weight.
        rows: u64,
    },
    /// u8 of double quantization whose scales are rounded to 16 bits.
    RoundedDouble {
        /// One f32 for 256 scales.
        nested: Extent,
        /// What is added: bitsandbytes' `nested_offset`.
        absmax_mean: f32,
        /// To what they are rounded: bf16 or f16.
        float: FloatType,
    },
}

impl AbsmaxForm {
    /// How many scales these bytes are, which are not as they are used.
    pub(super) fn count(self, bytes: u64) -> u64 {
        match self {
            AbsmaxForm::AsUsed => bytes / 4,
            AbsmaxForm::Bf16 | AbsmaxForm::Bf16Transposed { .. } => bytes / 2,
            AbsmaxForm::RoundedDouble { .. } => bytes,
        }
    }

    /// Bytes that so many scales take in the file.
    pub(super) fn bytes_of(self, scales: u64) -> u64 {
        match self {
            AbsmaxForm::AsUsed => 4 * scales,
            AbsmaxForm::Bf16 | AbsmaxForm::Bf16Transposed { .. } => 2 * scales,
            AbsmaxForm::RoundedDouble { .. } => scales,
        }
    }

    /// Bytes in the file beside the scales.
    pub(super) fn extra_bytes(self) -> u64 {
        match self {
            AbsmaxForm::RoundedDouble { nested, .. } => nested.bytes,
            _ => 0,
        }
    }
    /// The form of bf16 scales that are stored with this shape, for a weight of this shape in blocks of
    /// `block_size`; `None` where they do not belong to it.
    pub(super) fn of_bf16(stored: &[u64], shape: &[u64], block_size: u64) -> Option<AbsmaxForm> {
        let blocks = elements(shape)?.div_ceil(block_size);
        match (stored, shape) {
            // bitsandbytes packs nothing whose rows are not whole blocks.
            (&[of_row, rows], &[weight_rows, columns])
                if rows == weight_rows && of_row.checked_mul(block_size) == Some(columns) =>
            {
                Some(AbsmaxForm::Bf16Transposed { rows })
            }
            (&[all], _) if all == blocks => Some(AbsmaxForm::Bf16),
            _ => None,
        }
    }
}

/// The scales of one weight of a checkpoint.
pub(super) struct Reading<'a> {
    /// The weight.
    pub(super) name: &'a str,
    pub(super) shards: &'a [Shard],
    pub(super) tensors: &'a [TensorInfo],
    pub(super) shard: usize,
    /// Where they begin in the file.
    pub(super) offset: u64,
    /// How many there are.
    pub(super) count: u64,
}

impl Reading<'_> {
    /// Fills the buffer with f32 scales in the order of blocks, from number `first` on. `scratch` bounds what
    /// is read at once; it has some kilobytes.
    pub(super) fn read(
        &self,
        form: AbsmaxForm,
        first: u64,
        out: &mut [u8],
        scratch: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let (out, _) = out.as_chunks_mut::<4>();
        match form {
            AbsmaxForm::AsUsed => {
                let bytes = out.as_flattened_mut();
                read_at(
                    self.shards,
                    self.tensors,
                    self.shard,
                    self.offset + 4 * first,
                    bytes,
                )
            }
            AbsmaxForm::RoundedDouble {
                nested,
                absmax_mean,
                float,
            } => self.read_double(nested, (absmax_mean, float), first, out, scratch),
            AbsmaxForm::Bf16 => self.read_in_order(first, out, scratch),
            AbsmaxForm::Bf16Transposed { rows } => {
                let of_row = self.count / rows.max(1);
                self.read_transposed([of_row, rows], first, out, scratch)
            }
        }
    }

    fn read_in_order(
        &self,
        first: u64,
        out: &mut [[u8; 4]],
        scratch: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let step = scratch.len() / 2;
        let mut next = first;
        for piece in out.chunks_mut(step.max(1)) {
            let stored = self.stored(next, piece.len(), scratch)?;
            for (scale, stored) in piece.iter_mut().zip(stored) {
                *scale = widened(*stored);
            }
            next += piece.len() as u64;
        }
        Ok(())
    }

    fn read_transposed(
        &self,
        [of_row, rows]: [u64; 2],
        first: u64,
        out: &mut [[u8; 4]],
        scratch: &mut [u8],
    ) -> Result<(), CheckpointError> {
        if of_row == 0 || out.is_empty() {
            return Ok(());
        }
        let last = first + out.len() as u64 - 1;
        let needed = first / of_row..last / of_row + 1;
        let fits = (scratch.len() / 2) as u64;
        let needed_rows = needed.end - needed.start;
        let mut put = |row: u64, of: u64, stored: [u8; 2]| {
            let place = (row * of_row + of).checked_sub(first);
            // The first and the last row may be cut.
            if let Some(scale) = place.and_then(|place| out.get_mut(place as usize)) {
                *scale = widened(stored);
            }
        };
        if rows <= fits && (needed_rows == rows || rows <= MERGED_SCALES) {
            let step = fits / rows;
            let mut of = 0;
            while of < of_row {
                let count = step.min(of_row - of);
                let stored = self.stored(of * rows, (count * rows) as usize, scratch)?;
                for (of, stored) in (of..).zip(stored.chunks(rows as usize)) {
                    for row in needed.clone() {
                        put(row, of, stored[row as usize]);
                    }
                }
                of += count;
            }
            return Ok(());
        }
        for of in 0..of_row {
            let mut row = needed.start;
            while row < needed.end {
                let count = fits.clamp(1, needed.end - row);
                let stored = self.stored(of * rows + row, count as usize, scratch)?;
                for (row, stored) in (row..).zip(stored) {
                    put(row, of, *stored);
                }
                row += count;
            }
        }
        Ok(())
    }

    fn read_double(
        &self,
        nested: Extent,
        (mean, float): (f32, FloatType),
        first: u64,
        out: &mut [[u8; 4]],
        scratch: &mut [u8],
    ) -> Result<(), CheckpointError> {
        const EACH: u64 = NESTED_BLOCK_SIZE as u64;
        let rounded = |value: f32| match float {
            FloatType::F16 => f16::from_f32(value).to_f32(),
            FloatType::Bf16 => bf16::from_f32(value).to_f32(),
            FloatType::F32 => value,
        };
        // Of a nested scale at each end some codes may not be needed.
        let step = scratch.len().saturating_sub(8) / 65 * 64;
        let mut next = first;
        for piece in out.chunks_mut(step.max(1)) {
            let first_nested = next / EACH;
            let count = ((next + piece.len() as u64 - 1) / EACH + 1 - first_nested) as usize;
            let (codes, rest) = scratch
                .split_at_mut_checked(piece.len())
                .ok_or_else(|| self.no_room())?;
            let scales = rest.get_mut(..4 * count).ok_or_else(|| self.no_room())?;
            read_at(
                self.shards,
                self.tensors,
                self.shard,
                self.offset + next,
                codes,
            )?;
            let offset = nested.offset + 4 * first_nested;
            read_at(self.shards, self.tensors, nested.shard, offset, scales)?;
            let (scales, _) = scales.as_chunks::<4>();
            for ((index, scale), code) in (next..).zip(piece.iter_mut()).zip(&*codes) {
                let nested = f32::from_le_bytes(scales[(index / EACH - first_nested) as usize]);
                let value = rounded(DYNAMIC_MAP[usize::from(*code)] * nested);
                *scale = rounded(value + mean).to_le_bytes();
            }
            next += piece.len() as u64;
        }
        Ok(())
    }

    fn no_room(&self) -> CheckpointError {
        CheckpointError::Internal {
            tensor: self.name.to_owned(),
            problem: "there is no room for its scales to be read",
        }
    }

    /// Some of them as they are in the file.
    fn stored<'s>(
        &self,
        first: u64,
        count: usize,
        scratch: &'s mut [u8],
    ) -> Result<&'s [[u8; 2]], CheckpointError> {
        let bytes = scratch.get_mut(..2 * count).ok_or_else(|| self.no_room())?;
        let offset = self.offset + 2 * first;
        read_at(self.shards, self.tensors, self.shard, offset, bytes)?;
        let (stored, _) = bytes.as_chunks();
        Ok(stored)
    }
}

/// As little-endian f32 with the same value.
fn widened([low, high]: [u8; 2]) -> [u8; 4] {
    [0, 0, low, high]
}
