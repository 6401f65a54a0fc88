//! Dequantizing and casting. Dequantizing looks the results of a block up: there are only 16.

use std::arch::x86_64::*;

use super::memory::*;
use crate::{FloatType, float};

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
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
    let values_vector = load512_f32(values);
    match float {
        FloatType::F32 => {
            let blocks = packed.as_chunks::<8>().0.chunks_exact(block_size / 16);
            let outs = out
                .as_chunks_mut::<64>()
                .0
                .chunks_exact_mut(block_size / 16);
            for ((packed, out), absmax) in blocks.zip(outs).zip(absmax) {
                let results = _mm512_mul_ps(values_vector, _mm512_set1_ps(*absmax));
                for (packed, out) in packed.iter().zip(out) {
                    // One byte in every 64 bits; of the index only the lowest four bits count.
                    let bytes =
                        _mm512_cvtepu8_epi64(_mm_set_epi64x(0, i64::from_le_bytes(*packed)));
                    let codes = _mm512_or_si512(
                        _mm512_srli_epi64::<4>(bytes),
                        _mm512_slli_epi64::<32>(bytes),
                    );
                    store512(
                        out,
                        _mm512_castps_si512(_mm512_permutexvar_ps(codes, results)),
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
                let results = _mm512_mul_ps(values_vector, _mm512_set1_ps(*absmax));
                let results = if float == FloatType::F16 {
                    narrow_to_f16(results)
                } else {
                    narrow_to_bf16(results)
                };
                // Twice, because five bits of the index count: four of the code and one of whatever
                // is above it.
                let results = _mm512_broadcast_i64x4(results);
                for (packed, out) in packed.iter().zip(out) {
                    let bytes = _mm512_cvtepu8_epi32(load128(packed));
                    let codes = _mm512_or_si512(
                        _mm512_srli_epi32::<4>(bytes),
                        _mm512_slli_epi32::<16>(bytes),
                    );
                    store512(out, _mm512_permutexvar_epi16(codes, results));
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

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
pub(crate) fn cast(source: &[u8], from: FloatType, to: FloatType, out: &mut [u8]) {
    // 16 elements at a time, through `f32`.
    macro_rules! convert {
        ($from:literal, $to:literal, |$x:ident| $convert:expr) => {{
            let (chunks, rest) = source.as_chunks::<{ 16 * $from }>();
            let (out, out_rest) = out.split_at_mut(chunks.len() * 16 * $to);
            for ($x, out) in chunks.iter().zip(out.as_chunks_mut::<{ 16 * $to }>().0) {
                *out = $convert;
            }
            float::cast(rest, from, to, out_rest);
        }};
    }
    match (from, to) {
        (FloatType::F32, FloatType::F16) => {
            convert!(4, 2, |x| bytes256(narrow_to_f16(read_f32(x))))
        }
        (FloatType::F32, FloatType::Bf16) => {
            convert!(4, 2, |x| bytes256(narrow_to_bf16(read_f32(x))))
        }
        (FloatType::F16, FloatType::F32) => convert!(2, 4, |x| bytes512(read_f16(x))),
        (FloatType::F16, FloatType::Bf16) => {
            convert!(2, 2, |x| bytes256(narrow_to_bf16(read_f16(x))))
        }
        (FloatType::Bf16, FloatType::F32) => convert!(2, 4, |x| bytes512(read_bf16(x))),
        (FloatType::Bf16, FloatType::F16) => {
            convert!(2, 2, |x| bytes256(narrow_to_f16(read_bf16(x))))
        }
        (FloatType::F32, FloatType::F32)
        | (FloatType::F16, FloatType::F16)
        | (FloatType::Bf16, FloatType::Bf16) => out.copy_from_slice(source),
    }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
fn read_f32(bytes: &[u8; 64]) -> __m512 {
    _mm512_castsi512_ps(load512(bytes))
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
fn read_f16(bytes: &[u8; 32]) -> __m512 {
    _mm512_cvtph_ps(load256(bytes))
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
fn read_bf16(bytes: &[u8; 32]) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(load256(
        bytes,
    ))))
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
pub(super) fn narrow_to_f16(x: __m512) -> __m256i {
    _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x)
}

/// As [`float::f32_to_bf16`]. The conversion instruction of AVX512_BF16 would flush subnormals.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
pub(super) fn narrow_to_bf16(x: __m512) -> __m256i {
    let bits = _mm512_castps_si512(x);
    let upper = _mm512_srli_epi32::<16>(bits);
    let odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    let rounding = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, rounding));
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
    _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(
        rounded,
        nan,
        upper,
        _mm512_set1_epi32(0x0040),
    ))
}
