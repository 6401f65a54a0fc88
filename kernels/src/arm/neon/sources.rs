//! Weights of other methods, decoded to 16-bit floats.

use std::arch::aarch64::*;

use super::convert::{as_vectors, bytes_of_16, narrow_to, widen_f16};
use super::memory::*;
use crate::sources::{E4M3_BIAS, TileScale, for_each_tile, tile, values_of_4_bits};
use crate::{FloatType, SourceCodes, SourceMatrix, SourceRows};

#[target_feature(enable = "neon")]
pub(crate) fn decode(matrix: &SourceMatrix, rows: &SourceRows<'_>, to: FloatType, out: &mut [u8]) {
    for_each_tile(matrix, rows, to, out, |codes, scale, out| {
        match (matrix.codes, to) {
            (_, FloatType::F32) => tile(matrix.codes, codes, scale, to, out),
            (SourceCodes::F8E4M3, _) => {
                tile_of_8_bits(matrix.codes, E4M3_BIAS, |x| e4m3(x), codes, scale, to, out);
            }
            (SourceCodes::F8E5M2, _) => {
                // A binary16 without its last eight bits.
                let half = |codes| vshll_n_u8::<8>(codes);
                tile_of_8_bits(matrix.codes, 1.0, half, codes, scale, to, out);
            }
            (SourceCodes::F4E2M1 | SourceCodes::Int4, _) => {
                tile_of_4_bits(matrix.codes, codes, scale, to, out);
            }
        }
    });
}

/// E4M3 codes to binary16, as `sources::e4m3_to_f32` does it.
#[target_feature(enable = "neon")]
#[inline]
fn e4m3(codes: uint8x8_t) -> uint16x8_t {
    let magnitude = vand_u8(codes, vdup_n_u8(0x7f));
    let nan = vceq_u8(magnitude, vdup_n_u8(0x7f));
    let sign = vshll_n_u8::<8>(veor_u8(codes, magnitude));
    // What makes NaN of the largest magnitude is in the upper byte.
    let nan = vshll_n_u8::<8>(vand_u8(nan, vdup_n_u8(0x7e)));
    vorrq_u16(vorrq_u16(vshll_n_u8::<7>(magnitude), sign), nan)
}

/// `half` gives codes as binary16, whose values times `bias` are theirs.
#[target_feature(enable = "neon")]
#[inline]
fn tile_of_8_bits(
    kind: SourceCodes,
    bias: f32,
    half: impl Fn(uint8x8_t) -> uint16x8_t,
    codes: &[u8],
    scale: TileScale,
    to: FloatType,
    out: &mut [u8],
) {
    let scales = vdupq_n_f32(scale.scale);
    let bias = vdupq_n_f32(bias * scale.factor);
    let (chunks, rest) = codes.as_chunks::<16>();
    let (out, out_rest) = out.split_at_mut(32 * chunks.len());
    for (codes, out) in chunks.iter().zip(out.as_chunks_mut::<32>().0) {
        let codes = load(codes);
        let (out, _) = out.as_chunks_mut::<16>();
        for (codes, out) in [vget_low_u8(codes), vget_high_u8(codes)]
            .into_iter()
            .zip(out)
        {
            let values = widen_f16(half(codes));
            let scaled = values.map(|value| vmulq_f32(vmulq_f32(value, bias), scales));
            store(out, vreinterpretq_u8_u16(narrow_to(scaled, to)));
        }
    }
    if !rest.is_empty() {
        tile(kind, rest, scale, to, out_rest);
    }
}

/// Looks 16-bit results up in two tables of 16 bytes each.
#[target_feature(enable = "neon")]
#[inline]
fn tile_of_4_bits(
    kind: SourceCodes,
    codes: &[u8],
    scale: TileScale,
    to: FloatType,
    out: &mut [u8],
) {
    let values = values_of_4_bits(kind).map(|value| (value - scale.zero) * scale.factor);
    let [a, b, c, d] =
        as_vectors(&values).map(|values| vmulq_f32(values, vdupq_n_f32(scale.scale)));
    let [low, high] = bytes_of_16([narrow_to([a, b], to), narrow_to([c, d], to)]);
    // An odd number of elements does not fill its last byte.
    let (chunks, rest) = codes.split_at(out.len() / 64 * 16);
    let (chunks, _) = chunks.as_chunks::<16>();
    let (out, out_rest) = out.split_at_mut(64 * chunks.len());
    for (codes, out) in chunks.iter().zip(out.as_chunks_mut::<64>().0) {
        let codes = load(codes);
        let earlier = vandq_u8(codes, vdupq_n_u8(0x0f));
        let later = vshrq_n_u8::<4>(codes);
        // In the order of elements, 16 at a time.
        let halves = [vzip1q_u8(earlier, later), vzip2q_u8(earlier, later)];
        for (codes, out) in halves.into_iter().zip(out.as_chunks_mut::<32>().0) {
            let (low, high) = (vqtbl1q_u8(low, codes), vqtbl1q_u8(high, codes));
            store_pairs(out, uint8x16x2_t(low, high));
        }
    }
    if !rest.is_empty() {
        tile(kind, rest, scale, to, out_rest);
    }
}
