//! Reads encoded weights and decodes them, in bounded memory: any range of elements, however rows and
//! tiles lie.

use std::ops::Range;

use tightfit_kernels::{FloatType, Kernels, SourceMatrix, SourceRows, SourceScale};

use super::{Encoded, ScaleForm};
use crate::checkpoint::{CheckpointError, Extent, Shard, TensorInfo, read_at};

/// Most bytes that a tile takes while it is being decoded, beside its codes: its scale, its zero point,
/// and the word that this is in.
const TILE_BYTES: usize = 4 + 1 + 4;
/// For scales to begin where numbers may.
pub(super) const ALIGNMENT: usize = 8;

/// One encoded weight of a checkpoint.
pub(in crate::checkpoint) struct Reading<'a> {
    pub(in crate::checkpoint) shards: &'a [Shard],
    pub(in crate::checkpoint) tensors: &'a [TensorInfo],
    pub(in crate::checkpoint) tensor: &'a TensorInfo,
    pub(in crate::checkpoint) encoded: &'a Encoded,
}

/// What is decoded at once: whole rows, or a part of one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Segment {
    /// Rows of the stack.
    rows: Range<u64>,
    columns: Range<u64>,
}

/// Whether the code of this column is the second of a byte.
fn begins_in_half(encoded: &Encoded, column: u64) -> bool {
    encoded.codes.bits() == 4 && !column.is_multiple_of(2)
}

impl Reading<'_> {
    /// Fills the buffer with elements from byte `start` of the decoded weight on, both whole ones.
    /// `scratch` bounds what is read at once.
    pub(in crate::checkpoint) fn read(
        &self,
        start: u64,
        out: &mut [u8],
        scratch: &mut [u8],
        kernels: Kernels,
    ) -> Result<(), CheckpointError> {
        let float = self.tensor.dtype.float_type().unwrap_or(FloatType::Bf16);
        let each = float.bytes();
        let mut next = start / each as u64;
        let mut rest = out;
        while !rest.is_empty() {
            let left = (rest.len() / each) as u64;
            let segment = self.segment(next, left, scratch.len());
            let elements = (segment.rows.end - segment.rows.start)
                * (segment.columns.end - segment.columns.start);
            let bytes = elements as usize * each;
            if elements == 0 || bytes > rest.len() {
                return Err(self.internal());
            }
            let (piece, others) = rest.split_at_mut(bytes);
            if begins_in_half(self.encoded, segment.columns.start) {
                let mut pair = [0; 8];
                let segment = Segment {
                    columns: segment.columns.start - 1..segment.columns.end,
                    ..segment
                };
                self.decode(&segment, float, &mut pair[..2 * each], scratch, kernels)?;
                piece.copy_from_slice(&pair[each..2 * each]);
            } else {
                self.decode(&segment, float, piece, scratch, kernels)?;
            }
            next += elements;
            rest = others;
        }
        Ok(())
    }

    /// The first part of `count` elements from `element` on for which there is room.
    fn segment(&self, element: u64, count: u64, scratch: usize) -> Segment {
        let encoded = self.encoded;
        let (row, column) = (element / encoded.columns, element % encoded.columns);
        let row_in_stack = encoded.first_row + row;
        let row_in_matrix = row_in_stack % encoded.rows;
        let scratch = (scratch.saturating_sub(2 * ALIGNMENT)) as u64;
        let row_scales = encoded.scale_columns() * TILE_BYTES as u64;
        let is_packed = encoded.row_bytes == self.code_bytes(encoded.columns);
        if column == 0 && count >= encoded.columns {
            // One row of scales serves the rows of a tile; those at both ends may be cut.
            let [tile_rows, _] = encoded.whole_tile();
            let fit = |rows: u64| {
                let tiles = (row_in_matrix + rows - 1) / tile_rows - row_in_matrix / tile_rows + 1;
                rows * encoded.row_bytes + tiles * row_scales <= scratch
            };
            let most = (count / encoded.columns)
                .min(encoded.rows - row_in_matrix)
                .min(if is_packed { u64::MAX } else { 1 });
            // Fewer fit the more scales there are.
            let mut rows = most.min(scratch / encoded.row_bytes.max(1));
            while rows > 0 && !fit(rows) {
                rows -= rows.div_ceil(16);
            }
            if rows > 0 {
                return Segment {
                    rows: row_in_stack..row_in_stack + rows,
                    columns: 0..encoded.columns,
                };
            }
        }
        if begins_in_half(encoded, column) {
            // The second of a byte.
            return Segment {
                rows: row_in_stack..row_in_stack + 1,
                columns: column..column + 1,
            };
        }
        // Whole tiles of a row, or a part of one.
        let [_, tile] = encoded.whole_tile();
        let in_tile = column % tile;
        let left = count.min(encoded.columns - column);
        // A byte or less for each element.
        let fitting = match in_tile {
            0 => scratch / (tile + TILE_BYTES as u64) * tile,
            _ => 0,
        };
        let columns = match fitting {
            0 => left
                .min(tile - in_tile)
                .min(scratch.saturating_sub(TILE_BYTES as u64) / 2 * 2),
            fitting => left.min(fitting),
        };
        Segment {
            rows: row_in_stack..row_in_stack + 1,
            columns: column..column + columns,
        }
    }

    fn decode(
        &self,
        segment: &Segment,
        float: FloatType,
        out: &mut [u8],
        scratch: &mut [u8],
        kernels: Kernels,
    ) -> Result<(), CheckpointError> {
        let encoded = self.encoded;
        let rows = segment.rows.end - segment.rows.start;
        let columns = segment.columns.end - segment.columns.start;
        // In its matrix.
        let row = segment.rows.start % encoded.rows;
        let [tile_rows, tile_columns] = encoded.whole_tile();
        let scale_rows = row / tile_rows..(row + rows - 1) / tile_rows + 1;
        let scale_columns =
            segment.columns.start / tile_columns..(segment.columns.end - 1) / tile_columns + 1;
        let width = (scale_columns.end - scale_columns.start) as usize;
        let tiles = width * (scale_rows.end - scale_rows.start) as usize;

        let code_bytes = self.code_bytes(columns) as usize * rows as usize;
        let (codes, rest) = scratch
            .split_at_mut_checked(code_bytes.next_multiple_of(ALIGNMENT))
            .ok_or_else(|| self.internal())?;
        let codes = codes.get_mut(..code_bytes).ok_or_else(|| self.internal())?;
        let offset = (segment.rows.start - encoded.first_row) * encoded.row_bytes
            + self.code_bytes(segment.columns.start);
        self.read_at(self.tensor.shard, self.tensor.offset + offset, codes)?;

        let (scales, rest) = rest
            .split_at_mut_checked(4 * tiles)
            .ok_or_else(|| self.internal())?;
        let first = encoded.scale_number(segment.rows.start, scale_columns.start);
        let scale = self.read_scales(first, tiles, scales)?;
        let scales = &scales[..tiles * scale.bytes()];
        let (zeros, rest) = rest
            .split_at_mut_checked(encoded.zeros.map_or(0, |_| tiles))
            .ok_or_else(|| self.internal())?;
        if let Some(extent) = encoded.zeros {
            let words = rest.get_mut(..4 * width).ok_or_else(|| self.internal())?;
            self.read_zeros(extent, &segment.rows, &scale_columns, words, zeros)?;
        }
        let kernel_matrix = SourceMatrix {
            codes: encoded.codes,
            columns: columns as usize,
            // A part of a row is all of its tile, or begins with one.
            tile: [tile_rows as usize, tile_columns.min(columns) as usize],
            scale,
        };
        let rows = SourceRows {
            first: row as usize,
            codes,
            scales,
            zeros: bytemuck::cast_slice(zeros),
        };
        let decoded = kernels.decode(&kernel_matrix, &rows, float, out);
        decoded.map_err(|_| self.internal())
    }

    /// Reads `count` scales from number `first` on, as far as they lie one behind the other.
    pub(super) fn read_scales(
        &self,
        first: u64,
        count: usize,
        out: &mut [u8],
    ) -> Result<SourceScale, CheckpointError> {
        let extent = self.encoded.scales;
        let each = self.encoded.scale.bytes();
        let offset = extent.offset + first * each;
        match self.encoded.scale {
            ScaleForm::Plain(scale) => {
                let bytes = count * scale.bytes();
                self.read_at(extent.shard, offset, &mut out[..bytes])?;
                Ok(scale)
            }
            ScaleForm::Nested { global, divides } => {
                let mut factor = [0; 4];
                self.read_at(global.shard, global.offset, &mut factor)?;
                let factor = f32::from_le_bytes(factor);
                // The last quarter, so that none is overwritten before it is read.
                let (_, codes) = out.split_at_mut(3 * count);
                self.read_at(extent.shard, offset, codes)?;
                for number in 0..count {
                    let value = tightfit_kernels::e4m3_to_f32(out[3 * count + number]);
                    let scale = match divides {
                        true => value / factor,
                        false => value * factor,
                    };
                    out[4 * number..][..4].copy_from_slice(&scale.to_le_bytes());
                }
                Ok(SourceScale::Float(FloatType::F32))
            }
        }
    }

    /// Reads the zero points of some columns of tiles, a row of them for each row. `words` has room for
    /// those that a row is in: each has eight rows.
    fn read_zeros(
        &self,
        extent: Extent,
        rows: &Range<u64>,
        columns: &Range<u64>,
        words: &mut [u8],
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let mut read = None;
        for (row, out) in rows.clone().zip(out.chunks_exact_mut(words.len() / 4)) {
            if read != Some(row / 8) {
                let first = row / 8 * self.encoded.scale_columns() + columns.start;
                self.read_at(extent.shard, extent.offset + 4 * first, words)?;
                read = Some(row / 8);
            }
            let (words, _) = words.as_chunks::<4>();
            for (out, word) in out.iter_mut().zip(words) {
                let nibble = u32::from_le_bytes(*word) >> (4 * (row % 8)) & 0xf;
                *out = (nibble as i8 - 8) as u8;
            }
        }
        Ok(())
    }

    fn code_bytes(&self, columns: u64) -> u64 {
        match self.encoded.codes.bits() {
            8 => columns,
            _ => columns.div_ceil(2),
        }
    }

    pub(super) fn read_at(
        &self,
        shard: usize,
        offset: u64,
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        read_at(self.shards, self.tensors, shard, offset, out)
    }

    pub(super) fn internal(&self) -> CheckpointError {
        CheckpointError::Internal {
            tensor: self.tensor.name.clone(),
            problem: "its codes and scales do not lie as they were found",
        }
    }
}
