//! Weights of other methods, decoded to 16-bit floats.

use std::arch::x86_64::*;

use super::convert::{narrow_to_bf16, narrow_to_f16};
use super::memory::*;
use crate::sources::{E4M3_BIAS, TileScale, for_each_tile, tile};
use crate::x86::avx2;
use crate::{FloatType, SourceCodes, SourceMatrix, SourceRows};

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
pub(crate) fn decode(matrix: &SourceMatrix, rows: &SourceRows<'_>, to: FloatType, out: &mut [u8]) {
    for_each_tile(matrix, rows, to, out, |codes, scale, out| {
        match (matrix.codes, to) {
            (SourceCodes::F8E4M3, FloatType::Bf16 | FloatType::F16) => {
                e4m3_tile(codes, scale, to, out);
            }
            // Tiles of 32 codes are 16 bytes: wider registers would be half empty.
            (SourceCodes::F4E2M1 | SourceCodes::Int4, FloatType::Bf16 | FloatType::F16) => {
                avx2::tile_of_4_bits(matrix.codes, codes, scale, to, out);
            }
            _ => tile(matrix.codes, codes, scale, to, out),
        }
    });
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
fn e4m3_tile(codes: &[u8], scale: TileScale, to: FloatType, out: &mut [u8]) {
    let scales = _mm512_set1_ps(scale.scale);
    let bias = _mm512_set1_ps(E4M3_BIAS * scale.factor);
    let (chunks, rest) = codes.as_chunks::<16>();
    let (out, out_rest) = out.split_at_mut(32 * chunks.len());
    for (codes, out) in chunks.iter().zip(out.as_chunks_mut::<32>().0) {
        // As `sources::e4m3_to_f32` does it.
        let codes = _mm256_cvtepu8_epi16(load128(codes));
        let magnitude = _mm256_and_si256(codes, _mm256_set1_epi16(0x7f));
        let sign = _mm256_slli_epi16::<8>(_mm256_xor_si256(codes, magnitude));
        let nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7f));
        let half = _mm256_or_si256(_mm256_slli_epi16::<7>(magnitude), sign);
        let half = _mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7e00));
        let value = _mm512_mul_ps(_mm512_cvtph_ps(half), bias);
        let value = _mm512_mul_ps(value, scales);
        let narrowed = match to {
            FloatType::F16 => narrow_to_f16(value),
            _ => narrow_to_bf16(value),
        };
        store256(out, narrowed);
    }
    if !rest.is_empty() {
        tile(SourceCodes::F8E4M3, rest, scale, to, out_rest);
    }
}
