//! Products of bf16 rows, with the instructions for bf16.
//!
//! A lane of a vector is an output: nothing is summed across lanes, and 16 sums are multiplied with
//! their scales at once. The codes of 16 outputs are transposed in groups of eight, which fill a
//! 32-bit lane; shifted by a code at a time, such a lane holds in each half the index of a value.
//! The products of a unit of 32 inputs are summed, multiplied with the scale, and added to the sum
//! of the units before, whatever the number of rows.

mod matrix;
mod slab;

use std::{arch::x86_64::*, ops::Range};

use self::{
    matrix::Matrix,
    slab::{Kept, decode_and_multiply},
};
use super::super::memory::*;
use crate::LinearWeights;

/// Outputs of a vector.
const LANES: usize = 16;

/// Inputs that are summed before they are multiplied with their scale: the smallest block.
pub(crate) const UNIT: usize = 32;

/// Rows that are multiplied with codes as they are decoded; weights are kept for more.
const FEW: usize = 8;

/// Rows of a tile, and its outputs in vectors: 16 sums, which stay in registers.
const TILE_ROWS: usize = 4;
const TILE: usize = 4;

/// Units that are taken together: their weights, kept, stay in the first-level cache.
const SLAB: usize = 8;

/// Rows that weights are kept for: their sums stay in the second-level cache.
const MOST_ROWS: usize = 240;

/// A unit of x as [`pairs`] orders it.
pub(crate) type Unit = [u32; UNIT / 2];

/// Orders x, little-endian bf16, as weights are decoded: of eight inputs the pairs 1 and 5, 0 and 4, 3
/// and 7, 2 and 6. All rows' first slabs come first, as they are read. Returns nothing where the processor
/// or the weights need other code.
pub(crate) fn pairs_if_possible(
    weights: &LinearWeights<'_>,
    rows: usize,
    x: &[u8],
) -> Option<Vec<Unit>> {
    let possible = crate::Isa::Avx512.is_available()
        && is_x86_feature_detected!("avx512bf16")
        && weights.inputs.is_multiple_of(UNIT)
        && weights.inputs > 0;
    // SAFETY: the processor has the instructions.
    possible.then(|| unsafe { pairs(weights.inputs / UNIT, rows, x) })
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
fn pairs(units: usize, rows: usize, x: &[u8]) -> Vec<Unit> {
    const ORDER: [u16; 32] = {
        let (mut order, of_eight) = ([0; 32], [1, 5, 0, 4, 3, 7, 2, 6]);
        let mut i = 0;
        while i < 32 {
            order[i] = (i / 8 * 8) as u16 + of_eight[i % 8];
            i += 1;
        }
        order
    };
    let order = load512_u16(&ORDER);
    let x = x.as_chunks::<64>().0;
    let mut ordered = vec![[0; UNIT / 2]; x.len()];
    for (row, x) in x.chunks_exact(units).enumerate() {
        for (i, x) in x.chunks(SLAB).enumerate() {
            let ordered = &mut ordered[i * SLAB * rows + row * x.len()..][..x.len()];
            for (x, ordered) in x.iter().zip(ordered) {
                let x = _mm512_permutexvar_epi16(order, load512(x));
                store512(bytemuck::cast_mut(ordered), x);
            }
        }
    }
    ordered
}

/// Evaluates an expression with the number of rows as a constant.
macro_rules! with_rows {
    ($count:expr, [$($less:literal)*] or $most:ident, $rows:ident => $result:expr) => {
        match $count {
            $($less => {
                const $rows: usize = $less;
                $result
            })*
            _ => {
                const $rows: usize = $most;
                $result
            }
        }
    };
}

/// The sums of some outputs, for each row those of all of these outputs.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(crate) fn sums_of_pairs(
    weights: &LinearWeights<'_>,
    rows: usize,
    x: &[Unit],
    outputs: Range<usize>,
    sums: &mut [f32],
) {
    let mut padded = vec![];
    let matrix = Matrix::new(weights, &mut padded);
    let begins: Vec<usize> = outputs.clone().step_by(LANES).collect();
    if rows <= FEW {
        for begin in begins {
            few(&matrix, rows, x, begin, &outputs, sums);
        }
        return;
    }
    let (tiles, rest) = begins.as_chunks::<TILE>();
    for tile in tiles {
        many(&matrix, rows, x, tile, &outputs, sums);
    }
    let (pairs, rest) = rest.as_chunks::<2>();
    for pair in pairs {
        many(&matrix, rows, x, pair, &outputs, sums);
    }
    for begin in rest {
        many(&matrix, rows, x, &[*begin], &outputs, sums);
    }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512bf16")]
fn few(
    matrix: &Matrix<'_>,
    rows: usize,
    x: &[Unit],
    output: usize,
    outputs: &Range<usize>,
    sums: &mut [f32],
) {
    let begin = matrix.begin(output);
    let mut results = [[0.0; LANES]; FEW];
    with_rows!(rows, [1 2 3 4 5 6 7] or FEW, ROWS => {
        let sums = decode_and_multiply::<ROWS>(matrix, begin, x);
        results[..ROWS].copy_from_slice(&sums);
    });
    for (results, sums) in results.iter().zip(sums.chunks_exact_mut(outputs.len())) {
        matrix.write(output, results, outputs, sums);
    }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512bf16")]
fn many<const VECTORS: usize>(
    matrix: &Matrix<'_>,
    rows: usize,
    x: &[Unit],
    tile: &[usize; VECTORS],
    outputs: &Range<usize>,
    sums: &mut [f32],
) {
    let units = matrix.units();
    let begins = tile.map(|output| matrix.begin(output));
    let zero = Kept {
        weights: [[_mm512_setzero_si512(); VECTORS]; UNIT / 2],
        scales: [_mm512_setzero_ps(); VECTORS],
    };
    let mut kept = vec![zero; units.min(SLAB)];
    let mut products = vec![[[0.0; LANES]; VECTORS]; rows.min(MOST_ROWS)];
    for first in (0..rows).step_by(MOST_ROWS) {
        let end = rows.min(first + MOST_ROWS);
        products.fill([[0.0; LANES]; VECTORS]);
        for unit in (0..units).step_by(SLAB) {
            let range = unit..units.min(unit + SLAB);
            let kept = &mut kept[..range.len()];
            let mut row = first;
            while row < end {
                // Tiles of about the same size.
                let count = (end - row).div_ceil((end - row).div_ceil(TILE_ROWS));
                let at = range.start * rows + row * range.len();
                let row_of = |i: usize| &x[at + i * range.len()..][..range.len()];
                let products = &mut products[row - first..][..count];
                with_rows!(count, [1 2 3] or TILE_ROWS, ROWS => {
                    let rows: [_; ROWS] = std::array::from_fn(row_of);
                    if row == first {
                        let range = range.clone();
                        Kept::decode_and_multiply(matrix, &begins, range, kept, rows, products);
                    } else {
                        Kept::multiply(kept, rows, products);
                    }
                });
                row += count;
            }
        }
        for (row, products) in (first..end).zip(&products) {
            let sums = &mut sums[row * outputs.len()..][..outputs.len()];
            for (output, results) in tile.iter().zip(products) {
                matrix.write(*output, results, outputs, sums);
            }
        }
    }
}
