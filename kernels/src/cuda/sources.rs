//! Quantizing weights of other methods straight from their codes: [`quantize_source`].

use super::{Launch, QUANTIZED_ELEMENTS};
use crate::{FloatType, KernelError, SourceCodes};

/// Consecutive elements of a weight that another method has stored, from anywhere in a row to anywhere
/// in that row or a later one, and where their codes and scales lie.
///
/// Rows are followed by rows. The scales are those of [`crate::Kernels::decode`] as `f32`, and of nothing
/// that is no `f32`: see [`crate::SourceScale::to_f32`]. There are no zero points.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SourceRun {
    /// What the codes mean.
    pub codes: SourceCodes,
    /// Bytes from the codes of a row to those of the next one.
    pub row_bytes: u64,
    /// Number of elements of a row.
    pub columns: u32,
    /// Rows and columns of a tile.
    pub tile: [u32; 2],
    /// The row of its tile that the first element is in.
    pub first_row: u32,
    /// The column that the first element is in.
    pub first_column: u32,
}

impl SourceRun {
    /// Returns the bytes from that of the first code to that of the last one, both included. As in
    /// [`SourceRun::scales`], of a run that is refused it says nothing.
    pub fn code_bytes(&self, elements: usize) -> usize {
        let Some((row, column)) = self.last(elements) else {
            return 0;
        };
        let before = |column: u64| column * self.codes.bits() as u64 / 8;
        let end = self.row_bytes.saturating_mul(row);
        let end = end.saturating_add(before(column) + 1);
        let begin = before(self.first_column.into());
        usize::try_from(end.saturating_sub(begin)).unwrap_or(usize::MAX)
    }

    /// Returns the number of scales: of all tiles of a row, from the first element's row of tiles to
    /// that of the last one, row-major.
    pub fn scales(&self, elements: usize) -> usize {
        let Some((row, _)) = self.last(elements) else {
            return 0;
        };
        let [tile_rows, tile_columns] = self.tile.map(|length| u64::from(length.max(1)));
        let rows = (u64::from(self.first_row) + row) / tile_rows + 1;
        let scales = rows.saturating_mul(u64::from(self.columns).div_ceil(tile_columns));
        usize::try_from(scales).unwrap_or(usize::MAX)
    }

    /// The last element's row, counted from the first one's, and its column.
    fn last(&self, elements: usize) -> Option<(u64, u64)> {
        let last = u64::from(self.first_column).saturating_add((elements as u64).checked_sub(1)?);
        let columns = u64::from(self.columns.max(1));
        Some((last / columns, last % columns))
    }

    /// Returns the kernel's arguments that are here, in their order.
    pub fn arguments(&self) -> [u64; 7] {
        [
            codes_argument(self.codes).into(),
            self.row_bytes,
            self.columns.into(),
            self.tile[0].into(),
            self.tile[1].into(),
            self.first_row.into(),
            self.first_column.into(),
        ]
    }

    /// Checks whether there are such rows, tiles and a first element.
    ///
    /// # Errors
    /// [`KernelError::SourceRun`] if not.
    pub fn check(&self) -> Result<(), KernelError> {
        let problem = |problem| Err(KernelError::SourceRun { problem });
        let is_length = |length: u32| (1..=i32::MAX as u32).contains(&length);
        if ![self.columns, self.tile[0], self.tile[1]]
            .into_iter()
            .all(is_length)
        {
            return problem("rows and tiles have lengths from 1 to 2^31 - 1");
        }
        if self.first_column >= self.columns || self.first_row >= self.tile[0] {
            return problem("the first element is in a row, and its row in a tile");
        }
        let bytes = self.codes.bytes(self.columns as usize);
        match self.row_bytes < bytes as u64 {
            true => problem("rows do not overlap"),
            false => Ok(()),
        }
    }
}

/// Decodes this many elements and quantizes them to NF4: [`crate::Kernels::decode`] to `float`, which is
/// of 16 bits, and [`crate::Kernels::quantize_nf4`] of that.
///
/// # Errors
/// As [`SourceRun::check`], also for `f32`;
/// [`KernelError::Launch`] if there are too many elements for one launch.
pub fn quantize_source(
    float: FloatType,
    run: &SourceRun,
    elements: usize,
) -> Result<Launch, KernelError> {
    run.check()?;
    let kernel = match float {
        FloatType::F16 => "tightfit_quantize_source_f16",
        FloatType::Bf16 => "tightfit_quantize_source_bf16",
        FloatType::F32 => {
            let problem = "elements are rounded to 16 bits";
            return Err(KernelError::SourceRun { problem });
        }
    };
    Launch::new(kernel, elements, QUANTIZED_ELEMENTS)
}

/// What the kernels take for the meaning of codes.
const fn codes_argument(codes: SourceCodes) -> u32 {
    match codes {
        SourceCodes::F8E4M3 => 0,
        SourceCodes::F8E5M2 => 1,
        SourceCodes::F4E2M1 => 2,
        SourceCodes::Int4 => 3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: SourceRun = SourceRun {
        codes: SourceCodes::F8E4M3,
        row_bytes: 12,
        columns: 10,
        tile: [4, 3],
        first_row: 2,
        first_column: 7,
    };

    #[test]
    fn lengths_are_those_of_what_is_touched() {
        let four = SourceRun {
            codes: SourceCodes::Int4,
            row_bytes: 5,
            ..RUN
        };
        for (elements, codes, four_codes, scales) in [
            (0, 0, 0, 0),
            (1, 1, 1, 4),
            (3, 3, 2, 4),
            (4, 12 - 7 + 1, 5 - 3 + 1, 4),
            (13, 12 - 7 + 10, 5 - 3 + 5, 4),
            (14, 24 - 7 + 1, 10 - 3 + 1, 8),
        ] {
            assert_eq!(RUN.code_bytes(elements), codes, "{elements}");
            assert_eq!(four.code_bytes(elements), four_codes, "{elements}");
            assert_eq!(RUN.scales(elements), scales, "{elements}");
        }
        let huge = SourceRun {
            row_bytes: u64::MAX,
            columns: 1,
            first_column: 0,
            tile: [1, 1],
            first_row: 0,
            ..RUN
        };
        assert_eq!(huge.code_bytes(usize::MAX), usize::MAX);
        assert_eq!(huge.scales(usize::MAX), usize::MAX);
    }

    #[test]
    fn runs_that_there_are_not_are_refused() {
        let launch = |run: SourceRun, float| quantize_source(float, &run, 8193);
        let grid = launch(RUN, FloatType::Bf16).map(|launch| launch.grid);
        assert_eq!(grid, Ok(2));
        assert!(launch(RUN, FloatType::F32).is_err());
        for bad in [
            SourceRun { columns: 0, ..RUN },
            SourceRun {
                columns: 1 << 31,
                row_bytes: 1 << 31,
                ..RUN
            },
            SourceRun {
                tile: [0, 3],
                first_row: 0,
                ..RUN
            },
            SourceRun {
                tile: [4, 0],
                ..RUN
            },
            SourceRun {
                tile: [1 << 31, 3],
                ..RUN
            },
            SourceRun {
                tile: [4, u32::MAX],
                ..RUN
            },
            SourceRun {
                first_column: 10,
                ..RUN
            },
            SourceRun {
                first_row: 4,
                ..RUN
            },
            SourceRun {
                row_bytes: 9,
                ..RUN
            },
        ] {
            let _ = (bad.code_bytes(100), bad.scales(100));
            let result = launch(bad, FloatType::F16);
            assert!(
                matches!(result, Err(KernelError::SourceRun { .. })),
                "{bad:?}"
            );
        }
        let padded = SourceRun {
            codes: SourceCodes::Int4,
            row_bytes: 5,
            ..RUN
        };
        assert!(launch(padded, FloatType::F16).is_ok());
    }
}
