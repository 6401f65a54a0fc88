//! Reads codes and scales of encoded weights as they are, for devices whose kernels decode.

use tightfit_kernels::cuda::SourceRun;
use tightfit_kernels::{FloatType, SourceScale};

use super::read::{ALIGNMENT, Reading};
use crate::checkpoint::CheckpointError;

/// How codes and scales lie that have been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReadCodes {
    /// How codes lie, from the first byte on.
    pub(crate) run: SourceRun,
    /// The byte at which scales begin, as f32.
    pub(crate) scales: usize,
}

impl Reading<'_> {
    /// Fills the beginning of the buffer with the codes of `count` elements from number `first` on, and
    /// with their scales. `None` for what has more than codes and f32 scales, and where there is no room.
    pub(in crate::checkpoint) fn read_codes(
        &self,
        first: u64,
        count: usize,
        buffer: &mut [u8],
    ) -> Result<Option<ReadCodes>, CheckpointError> {
        let encoded = self.encoded;
        let Some(run) = self.run(first, count) else {
            return Ok(None);
        };
        let (code_bytes, tiles) = (run.code_bytes(count), run.scales(count));
        let scales = code_bytes.next_multiple_of(ALIGNMENT);
        let Some((codes, rest)) = buffer.split_at_mut_checked(scales) else {
            return Ok(None);
        };
        let Some(scale_bytes) = rest.get_mut(..tiles.saturating_mul(4)) else {
            return Ok(None);
        };
        let row = first / encoded.columns;
        let first_scale = encoded.scale_number(encoded.first_row + row, 0);
        let scale = self.read_scales(first_scale, tiles, scale_bytes)?;
        if !widen(scale, scale_bytes) {
            return Ok(None);
        }
        let codes = codes.get_mut(..code_bytes).ok_or_else(|| self.internal())?;
        let column = u64::from(run.first_column) * encoded.codes.bits() as u64 / 8;
        let offset = self.tensor.offset + row * encoded.row_bytes + column;
        self.read_at(self.tensor.shard, offset, codes)?;
        Ok(Some(ReadCodes { run, scales }))
    }

    /// The elements as kernels take them, if they do.
    fn run(&self, first: u64, count: usize) -> Option<SourceRun> {
        let encoded = self.encoded;
        let tile = encoded.whole_tile();
        let row = encoded.first_row + first / encoded.columns;
        let last = first + (count as u64).checked_sub(1)?;
        let last_row = encoded.first_row + last / encoded.columns;
        // Where a matrix ends with a part of a tile, that is not the beginning of the next one's.
        let goes_on =
            row / encoded.rows == last_row / encoded.rows || encoded.rows.is_multiple_of(tile[0]);
        if encoded.zeros.is_some() || !goes_on {
            return None;
        }
        let short = |length| u32::try_from(length).ok();
        let run = SourceRun {
            codes: encoded.codes,
            row_bytes: encoded.row_bytes,
            columns: short(encoded.columns)?,
            tile: [short(tile[0])?, short(tile[1])?],
            first_row: short(row % encoded.rows % tile[0])?,
            first_column: short(first % encoded.columns)?,
        };
        run.check().is_ok().then_some(run)
    }
}

/// Makes f32 of scales that begin where the bytes do. Whether all of them are.
fn widen(scale: SourceScale, bytes: &mut [u8]) -> bool {
    if scale == SourceScale::Float(FloatType::F32) {
        return true;
    }
    let each = scale.bytes();
    // The last one first: none is overwritten before it is read.
    for number in (0..bytes.len() / 4).rev() {
        let Some(value) = scale.to_f32(&bytes[number * each..][..each]) else {
            return false;
        };
        bytes[4 * number..][..4].copy_from_slice(&value.to_le_bytes());
    }
    true
}
