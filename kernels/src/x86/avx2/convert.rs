//! Dequantizing and casting. Dequantizing looks the results of a block up: there are only 16.

use std::arch::x86_64::*;

use super::memory::*;
use crate::{FloatType, float};

#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(crate) fn dequantize(
    values: &[f32; 16],
    packed: &[u8],
    absmax: &[f32],
    block_size: usize,
    float: FloatType,
    out: &mut [u8],
) {
    let full = out.len() / (block_size * float.bytes());
    let (packed, packed_rest) = packed.split_at(full * block_size / 2);
    let (absmax, absmax_rest) = absmax.split_at(full);
    let (out, out_rest) = out.split_at_mut(full * block_size * float.bytes());
    let (halves, _) = values.as_chunks::<8>();
    let (low, high) = (load256_f32(&halves[0]), load256_f32(&halves[1]));
    match float {
        FloatType::F32 => {
            let blocks = packed.as_chunks::<4>().0.chunks_exact(block_size / 8);
            let outs = out.as_chunks_mut::<32>().0.chunks_exact_mut(block_size / 8);
            for ((packed, out), absmax) in blocks.zip(outs).zip(absmax) {
                let absmax = _mm256_set1_ps(*absmax);
                let (low, high) = (_mm256_mul_ps(low, absmax), _mm256_mul_ps(high, absmax));
                for (packed, out) in packed.iter().zip(out) {
                    let bytes = _mm256_set1_epi32(i32::from_le_bytes(*packed));
                    // Of the codes three bits select; the fourth, moved to the sign, blends.
                    let codes =
                        _mm256_srlv_epi32(bytes, _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
                    let upper_half = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
                    let low = _mm256_permutevar8x32_ps(low, codes);
                    let high = _mm256_permutevar8x32_ps(high, codes);
                    store256(
                        out,
                        _mm256_castps_si256(_mm256_blendv_ps(low, high, upper_half)),
                    );
                }
            }
        }
        FloatType::F16 | FloatType::Bf16 => {
            let blocks = packed.as_chunks::<16>().0.chunks_exact(block_size / 32);
            let outs = out
                .as_chunks_mut::<64>()
                .0
                .chunks_exact_mut(block_size / 32);
            for ((packed, out), absmax) in blocks.zip(outs).zip(absmax) {
                let absmax = _mm256_set1_ps(*absmax);
                let (low, high) = (_mm256_mul_ps(low, absmax), _mm256_mul_ps(high, absmax));
                let (low, high) = if float == FloatType::F16 {
                    (narrow_to_f16(low), narrow_to_f16(high))
                } else {
                    (narrow_to_bf16(low), narrow_to_bf16(high))
                };
                // A table of the low bytes of the 16 results, and one of the high bytes, in both
                // lanes.
                let low_byte = _mm_set1_epi16(0x00ff);
                let low_bytes =
                    _mm_packus_epi16(_mm_and_si128(low, low_byte), _mm_and_si128(high, low_byte));
                let high_bytes =
                    _mm_packus_epi16(_mm_srli_epi16::<8>(low), _mm_srli_epi16::<8>(high));
                let low_bytes = _mm256_broadcastsi128_si256(low_bytes);
                let high_bytes = _mm256_broadcastsi128_si256(high_bytes);
                for (packed, out) in packed.iter().zip(out) {
                    let bytes = _mm256_cvtepu8_epi16(load128(packed));
                    let codes = _mm256_or_si256(
                        _mm256_srli_epi16::<4>(bytes),
                        _mm256_slli_epi16::<8>(bytes),
                    );
                    let codes = _mm256_and_si256(codes, _mm256_set1_epi8(15));
                    // The codes to be unpacked first go to the low halves of the lanes.
                    let codes = _mm256_permute4x64_epi64::<0b11_01_10_00>(codes);
                    let low = _mm256_shuffle_epi8(low_bytes, codes);
                    let high = _mm256_shuffle_epi8(high_bytes, codes);
                    let (outs, _) = out.as_chunks_mut::<32>();
                    store256(&mut outs[0], _mm256_unpacklo_epi8(low, high));
                    store256(&mut outs[1], _mm256_unpackhi_epi8(low, high));
                }
            }
        }
    }
    crate::dequantize::dequantize(
        values,
        packed_rest,
        absmax_rest,
        block_size,
        float,
        out_rest,
    );
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(crate) fn cast(source: &[u8], from: FloatType, to: FloatType, out: &mut [u8]) {
    // 8 elements at a time, through `f32`.
    macro_rules! convert {
        ($from:literal, $to:literal, |$x:ident| $convert:expr) => {{
            let (chunks, rest) = source.as_chunks::<{ 8 * $from }>();
            let (out, out_rest) = out.split_at_mut(chunks.len() * 8 * $to);
            for ($x, out) in chunks.iter().zip(out.as_chunks_mut::<{ 8 * $to }>().0) {
                *out = $convert;
            }
            float::cast(rest, from, to, out_rest);
        }};
    }
    match (from, to) {
        (FloatType::F32, FloatType::F16) => {
            convert!(4, 2, |x| bytes128(narrow_to_f16(read_f32(x))))
        }
        (FloatType::F32, FloatType::Bf16) => {
            convert!(4, 2, |x| bytes128(narrow_to_bf16(read_f32(x))))
        }
        (FloatType::F16, FloatType::F32) => convert!(2, 4, |x| bytes256(read_f16(x))),
        (FloatType::F16, FloatType::Bf16) => {
            convert!(2, 2, |x| bytes128(narrow_to_bf16(read_f16(x))))
        }
        (FloatType::Bf16, FloatType::F32) => convert!(2, 4, |x| bytes256(read_bf16(x))),
        (FloatType::Bf16, FloatType::F16) => {
            convert!(2, 2, |x| bytes128(narrow_to_f16(read_bf16(x))))
        }
        (FloatType::F32, FloatType::F32)
        | (FloatType::F16, FloatType::F16)
        | (FloatType::Bf16, FloatType::Bf16) => out.copy_from_slice(source),
    }
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn read_f32(bytes: &[u8; 32]) -> __m256 {
    _mm256_castsi256_ps(load256(bytes))
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn read_f16(bytes: &[u8; 16]) -> __m256 {
    _mm256_cvtph_ps(load128(bytes))
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn read_bf16(bytes: &[u8; 16]) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(load128(
        bytes,
    ))))
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(super) fn narrow_to_f16(x: __m256) -> __m128i {
    _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)
}

/// As [`float::f32_to_bf16`].
#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(super) fn narrow_to_bf16(x: __m256) -> __m128i {
    let bits = _mm256_castps_si256(x);
    let upper = _mm256_srli_epi32::<16>(bits);
    let odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    let rounding = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, rounding));
    let quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x0040));
    let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
    let words = _mm256_blendv_epi8(rounded, quiet, nan);
    _mm_packus_epi32(
        _mm256_castsi256_si128(words),
        _mm256_extracti128_si256::<1>(words),
    )
}
