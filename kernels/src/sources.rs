//! Weights that another method has stored with a scale for each tile: FP8, MXFP4 and int4, decoded as
//! sources of NF4.
//!
//! The rule is one sentence: a code's value times its tile's scale in f32, rounded once to the float
//! type that is asked for. Quantizing what comes out gives the bytes of "dequantize to bf16, then
//! bitsandbytes".

use crate::{FloatType, KernelError, error::check_length, float};

/// What the codes of a source mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SourceCodes {
    /// A byte each: 4 exponent and 3 mantissa bits, no infinities, NaN in the largest magnitude (OCP
    /// E4M3, `float8_e4m3fn`).
    F8E4M3,
    /// A byte each: 5 exponent and 2 mantissa bits, with infinities (OCP E5M2).
    F8E5M2,
    /// Two in a byte, the earlier one in the low half: sign, 2 exponent bits and a mantissa bit (OCP
    /// E2M1, as MXFP4 has them).
    F4E2M1,
    /// Two in a byte, the earlier one in the low half: the value plus 8 (compressed-tensors'
    /// `pack-quantized` of 4 bits).
    Int4,
}

impl SourceCodes {
    /// Returns the bits of a code.
    pub const fn bits(self) -> usize {
        match self {
            SourceCodes::F8E4M3 | SourceCodes::F8E5M2 => 8,
            SourceCodes::F4E2M1 | SourceCodes::Int4 => 4,
        }
    }

    /// Returns the bytes of this many codes; an odd last half has a byte of its own.
    pub const fn bytes(self, codes: usize) -> usize {
        match self.bits() {
            8 => codes,
            _ => codes.div_ceil(2),
        }
    }
}

/// How the scale of a tile is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SourceScale {
    /// A floating-point number.
    Float(FloatType),
    /// A byte `b` that stands for 2^(`b` - 127) (OCP E8M0); 255 is NaN.
    E8M0,
    /// The same, but 255 is infinity, as it is where a scale is computed with `exp2`.
    Exponent,
    /// The same, but it is added to the exponent of the value, as `ldexp` does: with 255, which is 2^128
    /// and no f32, 0.5 is still 2^127, and zero is zero. So has transformers MXFP4.
    Ldexp,
}

impl SourceScale {
    /// Returns the bytes of a scale.
    pub const fn bytes(self) -> usize {
        match self {
            SourceScale::Float(float) => float.bytes(),
            SourceScale::E8M0 | SourceScale::Exponent | SourceScale::Ldexp => 1,
        }
    }

    /// Returns the scale with these bytes, as many as it has: exactly. `None` for 255 of
    /// [`SourceScale::Ldexp`], which is no `f32`.
    pub fn to_f32(self, bytes: &[u8]) -> Option<f32> {
        match self {
            SourceScale::Float(float) => Some(float::read(float, bytes)),
            SourceScale::E8M0 if bytes[0] == 255 => Some(f32::NAN),
            SourceScale::Ldexp if bytes[0] == 255 => None,
            _ => Some(power_of_two(bytes[0])),
        }
    }

    fn read(self, bytes: &[u8], zero: f32) -> TileScale {
        let (factor, scale) = match self.to_f32(bytes) {
            Some(scale) => (1.0, scale),
            None => (2.0, power_of_two(254)),
        };
        TileScale {
            zero,
            factor,
            scale,
        }
    }
}

/// 2^(`exponent` - 127); infinity for 255.
const fn power_of_two(exponent: u8) -> f32 {
    match exponent {
        // Half of the smallest normal number.
        0 => f32::from_bits(1 << 22),
        _ => f32::from_bits((exponent as u32) << 23),
    }
}

/// A matrix of codes in row-major order, with a scale for each tile. Tiles at the ends of rows and
/// columns may be smaller; whether they are or not, an element's tile is its row and column divided by
/// the tile's, rounded down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourceMatrix {
    /// What the codes mean.
    pub codes: SourceCodes,
    /// Number of elements of a row. Every row begins with a byte of its own.
    pub columns: usize,
    /// Rows and columns of a tile, none of them zero: `[128, 128]` for DeepSeek's FP8, `[1, 32]` for
    /// MXFP4, `[1, usize::MAX]` for a scale a row, twice `usize::MAX` for one scale in all.
    pub tile: [usize; 2],
    /// How scales are stored, row-major.
    pub scale: SourceScale,
}

impl SourceMatrix {
    /// Returns the number of scales for a row of tiles.
    pub const fn scale_columns(&self) -> usize {
        self.columns.div_ceil(self.tile[1])
    }
}

/// Whole rows of a [`SourceMatrix`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourceRows<'a> {
    /// The row of the matrix that `codes` begin with.
    pub first: usize,
    /// The codes.
    pub codes: &'a [u8],
    /// The scales of all tiles that the rows lie in, row-major, from the tile of `first` on.
    pub scales: &'a [u8],
    /// The value that stands for zero in each of these tiles: it is subtracted, exactly, before
    /// multiplying. Empty where it is 0 in all of them, as it is in formats of floating point.
    pub zeros: &'a [i8],
}

/// What is done to the codes of one tile, in this order.
#[derive(Clone, Copy)]
pub(crate) struct TileScale {
    /// Is subtracted.
    pub(crate) zero: f32,
    /// 1, or 2 where the scale cannot be twice as large. Multiplying with it is exact.
    pub(crate) factor: f32,
    pub(crate) scale: f32,
}

/// Decodes some rows.
pub(crate) fn decode(matrix: &SourceMatrix, rows: &SourceRows<'_>, to: FloatType, out: &mut [u8]) {
    for_each_tile(matrix, rows, to, out, |codes, scale, out| {
        tile(matrix.codes, codes, scale, to, out);
    });
}

/// Calls `tile` with the part of each row that one scale is for: codes, the scale, and where elements
/// of type `to` go.
#[inline(always)]
pub(crate) fn for_each_tile(
    matrix: &SourceMatrix,
    given: &SourceRows<'_>,
    to: FloatType,
    out: &mut [u8],
    mut tile: impl FnMut(&[u8], TileScale, &mut [u8]),
) {
    let (first_row, codes) = (given.first, given.codes);
    let row_bytes = matrix.codes.bytes(matrix.columns);
    let first_tile = first_row / matrix.tile[0];
    let each = matrix.scale.bytes();
    let tile_columns = matrix.tile[1].min(matrix.columns);
    let tile_bytes = matrix.codes.bytes(tile_columns);
    let rows = codes
        .chunks_exact(row_bytes)
        .zip(out.chunks_exact_mut(matrix.columns * to.bytes()));
    for (row, (codes, out)) in rows.enumerate() {
        let number = (first_row + row) / matrix.tile[0] - first_tile;
        let first = number * matrix.scale_columns();
        let scales = &given.scales[first * each..];
        let zeros = given.zeros.get(first..).unwrap_or_default();
        let tiles = codes
            .chunks(tile_bytes)
            .zip(out.chunks_mut(tile_columns * to.bytes()))
            .zip(scales.chunks_exact(each));
        for (number, ((codes, out), scale)) in tiles.enumerate() {
            let zero = zeros.get(number).map_or(0.0, |&zero| f32::from(zero));
            tile(codes, matrix.scale.read(scale, zero), out);
        }
    }
}

/// Decodes what one scale is for.
pub(crate) fn tile(
    codes: SourceCodes,
    bytes: &[u8],
    scale: TileScale,
    to: FloatType,
    out: &mut [u8],
) {
    match to {
        FloatType::F32 => tile_of::<4>(codes, bytes, scale, out, f32::to_le_bytes),
        FloatType::F16 => tile_of::<2>(codes, bytes, scale, out, |value| {
            float::f32_to_f16(value).to_le_bytes()
        }),
        FloatType::Bf16 => tile_of::<2>(codes, bytes, scale, out, |value| {
            float::f32_to_bf16(value).to_le_bytes()
        }),
    }
}

fn tile_of<const N: usize>(
    kind: SourceCodes,
    codes: &[u8],
    TileScale {
        zero,
        factor,
        scale,
    }: TileScale,
    out: &mut [u8],
    round: impl Fn(f32) -> [u8; N],
) {
    let (out, _) = out.as_chunks_mut::<N>();
    match kind {
        SourceCodes::F8E4M3 => {
            for (out, &code) in out.iter_mut().zip(codes) {
                *out = round(e4m3_to_f32(code) * factor * scale);
            }
        }
        SourceCodes::F8E5M2 => {
            for (out, &code) in out.iter_mut().zip(codes) {
                // A binary16 without its last eight bits.
                let value = float::f16_to_f32(u16::from(code) << 8);
                *out = round(value * factor * scale);
            }
        }
        SourceCodes::F4E2M1 | SourceCodes::Int4 => {
            let values = values_of_4_bits(kind).map(|value| round((value - zero) * factor * scale));
            for (out, &code) in out.chunks_mut(2).zip(codes) {
                for (half, out) in out.iter_mut().enumerate() {
                    *out = values[usize::from(code >> (4 * half) & 0xf)];
                }
            }
        }
    }
}

/// Returns the value of each 4-bit code. Of other kinds there is none.
pub(crate) const fn values_of_4_bits(kind: SourceCodes) -> [f32; 16] {
    match kind {
        SourceCodes::Int4 => INT4,
        _ => E2M1,
    }
}

const INT4: [f32; 16] = [
    -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0,
];

/// The values of MXFP4's codes.
const E2M1: [f32; 16] = [
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
];

/// Returns the value of an E4M3 code: exactly, NaN for 0x7f and 0xff.
pub fn e4m3_to_f32(code: u8) -> f32 {
    let (sign, magnitude) = (u16::from(code & 0x80) << 8, u16::from(code & 0x7f));
    match magnitude {
        0x7f => f32::NAN,
        // As the exponent and mantissa of a binary16 it is the value times 2^-8, subnormal or not. As
        // those of an f32 it would be subnormal too, which processors multiply slowly.
        _ => float::f16_to_f32(magnitude << 7 | sign) * E4M3_BIAS,
    }
}

/// What [`e4m3_to_f32`] multiplies with: exactly.
pub(crate) const E4M3_BIAS: f32 = 256.0;

/// Checks the lengths of a call, and whether tiles are cut where bytes are.
pub(crate) fn check(
    matrix: &SourceMatrix,
    given: &SourceRows<'_>,
    to: FloatType,
    out: &[u8],
) -> Result<(), KernelError> {
    let (first_row, codes) = (given.first, given.codes);
    let [tile_rows, tile_columns] = matrix.tile;
    let ends_in_a_byte = matrix.codes.bits() == 4
        && tile_columns < matrix.columns
        && !tile_columns.is_multiple_of(2);
    if matrix.columns == 0 || tile_rows == 0 || tile_columns == 0 || ends_in_a_byte {
        return Err(KernelError::SourceTile {
            columns: matrix.columns,
            tile: matrix.tile,
        });
    }
    let row_bytes = matrix.codes.bytes(matrix.columns);
    let rows = codes.len() / row_bytes;
    check_length("codes", rows * row_bytes, codes.len())?;
    let elements = rows.saturating_mul(matrix.columns);
    check_length("out", elements.saturating_mul(to.bytes()), out.len())?;
    let tiles = match rows {
        0 => 0,
        // Inclusive of the tile that the last row lies in.
        _ => (first_row.saturating_add(rows - 1)) / tile_rows - first_row / tile_rows + 1,
    };
    let tiles = tiles.saturating_mul(matrix.scale_columns());
    let zeros = match matrix.codes {
        SourceCodes::Int4 if !given.zeros.is_empty() => tiles,
        _ => 0,
    };
    check_length("zeros", zeros, given.zeros.len())?;
    let scales = tiles.saturating_mul(matrix.scale.bytes());
    check_length("scales", scales, given.scales.len())
}
