//! Weights of other methods, decoded to 16-bit floats.

use std::arch::x86_64::*;

use super::convert::{narrow_to_bf16, narrow_to_f16};
use super::memory::*;
use crate::sources::{E4M3_BIAS, TileScale, for_each_tile, tile, values_of_4_bits};
use crate::{FloatType, SourceCodes, SourceMatrix, SourceRows};

#[target_feature(enable = "avx2,f16c")]
pub(crate) fn decode(matrix: &SourceMatrix, rows: &SourceRows<'_>, to: FloatType, out: &mut [u8]) {
    for_each_tile(matrix, rows, to, out, |codes, scale, out| {
        match (matrix.codes, to) {
            (SourceCodes::F8E4M3, FloatType::Bf16 | FloatType::F16) => {
                e4m3_tile(codes, scale, to, out);
            }
            (SourceCodes::F4E2M1 | SourceCodes::Int4, FloatType::Bf16 | FloatType::F16) => {
                tile_of_4_bits(matrix.codes, codes, scale, to, out);
            }
            _ => tile(matrix.codes, codes, scale, to, out),
        }
    });
}

/// Rounds to a float type of 16 bits.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn narrow(x: __m256, to: FloatType) -> __m128i {
    match to {
        FloatType::F16 => narrow_to_f16(x),
        _ => narrow_to_bf16(x),
    }
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn e4m3_tile(codes: &[u8], scale: TileScale, to: FloatType, out: &mut [u8]) {
    let scales = _mm256_set1_ps(scale.scale);
    let bias = _mm256_set1_ps(E4M3_BIAS * scale.factor);
    let (chunks, rest) = codes.as_chunks::<8>();
    let (out, out_rest) = out.split_at_mut(16 * chunks.len());
    for (codes, out) in chunks.iter().zip(out.as_chunks_mut::<16>().0) {
        // As `sources::e4m3_to_f32` does it.
        let codes = _mm_cvtepu8_epi16(_mm_cvtsi64_si128(i64::from_le_bytes(*codes)));
        let magnitude = _mm_and_si128(codes, _mm_set1_epi16(0x7f));
        let sign = _mm_slli_epi16::<8>(_mm_xor_si128(codes, magnitude));
        let nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f));
        let nan = _mm_and_si128(nan, _mm_set1_epi16(0x7e00));
        let half = _mm_or_si128(_mm_slli_epi16::<7>(magnitude), _mm_or_si128(sign, nan));
        let value = _mm256_mul_ps(_mm256_cvtph_ps(half), bias);
        store128(out, narrow(_mm256_mul_ps(value, scales), to));
    }
    if !rest.is_empty() {
        tile(SourceCodes::F8E4M3, rest, scale, to, out_rest);
    }
}

/// Looks 16-bit results up in two tables of 16 bytes each.
#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(crate) fn tile_of_4_bits(
    kind: SourceCodes,
    codes: &[u8],
    scale: TileScale,
    to: FloatType,
    out: &mut [u8],
) {
    let scales = _mm256_set1_ps(scale.scale);
    let values = values_of_4_bits(kind).map(|value| (value - scale.zero) * scale.factor);
    let (values, _) = values.as_chunks::<8>();
    let first = narrow(_mm256_mul_ps(load256_f32(&values[0]), scales), to);
    let last = narrow(_mm256_mul_ps(load256_f32(&values[1]), scales), to);
    let low_bytes = _mm_set1_epi16(0x00ff);
    let low = _mm_packus_epi16(
        _mm_and_si128(first, low_bytes),
        _mm_and_si128(last, low_bytes),
    );
    let high = _mm_packus_epi16(_mm_srli_epi16::<8>(first), _mm_srli_epi16::<8>(last));
    // An odd number of elements does not fill its last byte.
    let (chunks, rest) = codes.split_at(out.len() / 64 * 16);
    let (chunks, _) = chunks.as_chunks::<16>();
    let (out, out_rest) = out.split_at_mut(64 * chunks.len());
    for (codes, out) in chunks.iter().zip(out.as_chunks_mut::<64>().0) {
        let codes = load128(codes);
        let nibble = _mm_set1_epi8(0x0f);
        let earlier = _mm_and_si128(codes, nibble);
        let later = _mm_and_si128(_mm_srli_epi16::<4>(codes), nibble);
        // In the order of elements, 16 at a time.
        let first_half = _mm_unpacklo_epi8(earlier, later);
        let last_half = _mm_unpackhi_epi8(earlier, later);
        let (out, _) = out.as_chunks_mut::<16>();
        for (codes, out) in [first_half, last_half]
            .into_iter()
            .zip(out.chunks_exact_mut(2))
        {
            let (low, high) = (_mm_shuffle_epi8(low, codes), _mm_shuffle_epi8(high, codes));
            store128(&mut out[0], _mm_unpacklo_epi8(low, high));
            store128(&mut out[1], _mm_unpackhi_epi8(low, high));
        }
    }
    if !rest.is_empty() {
        tile(kind, rest, scale, to, out_rest);
    }
}
