//! AVX2 and F16C.
//!
//! Quantizing works on chunks of 32 elements. Blocks that are not plain (see [`PLAIN_ABSMAX`]) and
//! the partial block at the end go to the portable code. Dequantizing looks the results of a block
//! up: there are only 16.

use std::arch::x86_64::*;

use super::{GROUP_BLOCKS, group_blocks};
use crate::{
    FloatType, NF4_THRESHOLDS, double, float,
    quantize::{self, PLAIN_ABSMAX},
};

#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(crate) fn quantize_nf4(
    source: &[u8],
    float: FloatType,
    block_size: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> u64 {
    match (float, block_size) {
        (FloatType::Bf16, 64) => bf16::chunks::<2>(source, block_size, packed, absmax),
        (FloatType::Bf16, _) => bf16::chunks::<0>(source, block_size, packed, absmax),
        (FloatType::F16, 64) => f16::chunks::<2>(source, block_size, packed, absmax),
        (FloatType::F16, _) => f16::chunks::<0>(source, block_size, packed, absmax),
        (FloatType::F32, 64) => f32::chunks::<2>(source, block_size, packed, absmax),
        (FloatType::F32, _) => f32::chunks::<0>(source, block_size, packed, absmax),
    }
}

/// The loop over blocks for one float type. It needs, for that type,
/// - `CHUNK`, the bytes of 32 elements, and `FLOAT`;
/// - `max_bits(&[[u8; CHUNK]]) -> u32`: the largest magnitude, as `f32` bits;
/// - `encode(&[u8; CHUNK], __m256) -> __m128i`: the packed codes of 32 elements, given the
///   reciprocal.
macro_rules! block_loop {
    () => {
        /// Blocks of `N` chunks, or of any number of chunks if `N` is 0.
        #[target_feature(enable = "avx2,f16c")]
        #[inline]
        pub(super) fn chunks<const N: usize>(
            source: &[u8],
            block_size: usize,
            packed: &mut [u8],
            absmax: &mut [f32],
        ) -> u64 {
            let per_block = if N == 0 { block_size / 32 } else { N };
            let chunks = source.as_chunks::<CHUNK>().0;
            let full = chunks.len() / per_block;
            let (packed, packed_rest) = packed.split_at_mut(full * block_size / 2);
            let (absmax, absmax_rest) = absmax.split_at_mut(full);
            let mut nonfinite = 0;
            let group = group_blocks(per_block * CHUNK);
            let mut reciprocals = [0.0; GROUP_BLOCKS];
            let groups = chunks[..full * per_block]
                .chunks(group * per_block)
                .zip(packed.as_chunks_mut::<16>().0.chunks_mut(group * per_block))
                .zip(absmax.chunks_mut(group));
            for ((blocks, outs), absmax) in groups {
                for (block, absmax) in blocks.chunks_exact(per_block).zip(&mut *absmax) {
                    *absmax = f32::from_bits(max_bits(block));
                }
                for (reciprocal, absmax) in reciprocals.iter_mut().zip(&*absmax) {
                    *reciprocal = 1.0 / absmax;
                }
                let blocks = blocks
                    .chunks_exact(per_block)
                    .zip(outs.chunks_exact_mut(per_block));
                for (((block, out), absmax), reciprocal) in blocks.zip(absmax).zip(reciprocals) {
                    if PLAIN_ABSMAX.contains(&absmax.to_bits()) {
                        let reciprocal = _mm256_set1_ps(reciprocal);
                        for (chunk, out) in block.iter().zip(out) {
                            store128(out, encode(chunk, reciprocal));
                        }
                    } else {
                        let (source, out) = (block.as_flattened(), out.as_flattened_mut());
                        let block = quantize::quantize_block(source, FLOAT, false, out);
                        *absmax = block.absmax;
                        nonfinite += u64::from(block.nonfinite);
                    }
                }
            }
            let rest = &source[full * per_block * CHUNK..];
            nonfinite + quantize::quantize_nf4(rest, FLOAT, block_size, packed_rest, absmax_rest)
        }
    };
}

/// bfloat16: of every two elements the even one is the lower half of 32 bits, so that they are
/// split by shift and mask.
mod bf16 {
    use super::*;

    const FLOAT: FloatType = FloatType::Bf16;
    const CHUNK: usize = 64;

    block_loop!();

    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    fn max_bits(block: &[[u8; CHUNK]]) -> u32 {
        u32::from(max_magnitude_u16(block)) << 16
    }

    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    fn encode(chunk: &[u8; CHUNK], reciprocal: __m256) -> __m128i {
        let (halves, _) = chunk.as_chunks::<32>();
        let words =
            _mm256_packus_epi32(pairs(&halves[0], reciprocal), pairs(&halves[1], reciprocal));
        // Packing works in lanes of 128 bits: of every lane the first half belongs to the first
        // vector.
        pack_words(_mm256_permute4x64_epi64::<0b11_01_10_00>(words))
    }

    /// 8 bytes of two codes each, in 32-bit lanes.
    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    fn pairs(half: &[u8; 32], reciprocal: __m256) -> __m256i {
        let x = load256(half);
        let even = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x));
        let odd = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(-0x1_0000)));
        let (even, odd) = (
            negative_codes(even, reciprocal),
            negative_codes(odd, reciprocal),
        );
        let negative = _mm256_add_epi32(_mm256_slli_epi32::<4>(even), odd);
        _mm256_sub_epi32(_mm256_setzero_si256(), negative)
    }
}

/// binary16.
mod f16 {
    use super::*;

    const FLOAT: FloatType = FloatType::F16;
    const CHUNK: usize = 64;

    block_loop!();

    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    fn max_bits(block: &[[u8; CHUNK]]) -> u32 {
        float::f16_to_f32(max_magnitude_u16(block)).to_bits()
    }

    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    fn encode(chunk: &[u8; CHUNK], reciprocal: __m256) -> __m128i {
        let (quarters, _) = chunk.as_chunks::<16>();
        let codes = |i: usize| negative_codes(_mm256_cvtph_ps(load128(&quarters[i])), reciprocal);
        pack_quarters(codes(0), codes(1), codes(2), codes(3))
    }
}

/// binary32.
mod f32 {
    use super::*;

    const FLOAT: FloatType = FloatType::F32;
    const CHUNK: usize = 128;

    block_loop!();

    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    fn max_bits(block: &[[u8; CHUNK]]) -> u32 {
        let mut max = _mm256_setzero_si256();
        for quarter in block.as_flattened().as_chunks::<32>().0 {
            let magnitude = _mm256_and_si256(load256(quarter), _mm256_set1_epi32(0x7fff_ffff));
            max = _mm256_max_epu32(max, magnitude);
        }
        let max = _mm_max_epu32(
            _mm256_castsi256_si128(max),
            _mm256_extracti128_si256::<1>(max),
        );
        let max = _mm_max_epu32(max, _mm_shuffle_epi32::<0b01_00_11_10>(max));
        let max = _mm_max_epu32(max, _mm_shuffle_epi32::<0b10_11_00_01>(max));
        _mm_cvtsi128_si32(max) as u32
    }

    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    fn encode(chunk: &[u8; CHUNK], reciprocal: __m256) -> __m128i {
        let (quarters, _) = chunk.as_chunks::<32>();
        let codes =
            |i: usize| negative_codes(_mm256_castsi256_ps(load256(&quarters[i])), reciprocal);
        pack_quarters(codes(0), codes(1), codes(2), codes(3))
    }
}

/// The thresholds as a tree, searched with comparisons that give -1. After each level the index is
/// minus the number of thresholds known to lie below, in units of that level; of it the lowest
/// three bits select.
const LEVEL_1: [f32; 8] = {
    let mut level = [0.0; 8];
    let mut i = 0;
    while i < 4 {
        level[(8 - i) % 8] = NF4_THRESHOLDS[4 * i + 1];
        i += 1;
    }
    level
};
const LEVEL_0: [f32; 8] = {
    let mut level = [0.0; 8];
    let mut i = 0;
    while i < 8 {
        level[(8 - i) % 8] = NF4_THRESHOLDS[2 * i];
        i += 1;
    }
    level
};

/// Minus the codes of 8 elements, in 32-bit lanes.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn negative_codes(x: __m256, reciprocal: __m256) -> __m256i {
    let v = _mm256_mul_ps(x, reciprocal);
    let above = |threshold| _mm256_cmp_ps::<_CMP_GT_OQ>(v, threshold);
    let descend =
        |index, above| _mm256_add_epi32(_mm256_add_epi32(index, index), _mm256_castps_si256(above));

    let upper_half = above(_mm256_set1_ps(NF4_THRESHOLDS[7]));
    let (lower, upper) = (
        _mm256_set1_ps(NF4_THRESHOLDS[3]),
        _mm256_set1_ps(NF4_THRESHOLDS[11]),
    );
    let index = _mm256_castps_si256(upper_half);
    let index = descend(index, above(_mm256_blendv_ps(lower, upper, upper_half)));
    let index = descend(
        index,
        above(_mm256_permutevar8x32_ps(load256_f32(&LEVEL_1), index)),
    );
    descend(
        index,
        above(_mm256_permutevar8x32_ps(load256_f32(&LEVEL_0), index)),
    )
}

/// Minus 32 codes in 32-bit lanes to 16 bytes.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn pack_quarters(a: __m256i, b: __m256i, c: __m256i, d: __m256i) -> __m128i {
    let codes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    // Every lane of 128 bits now holds four codes of each vector.
    let codes = _mm256_permutevar8x32_epi32(codes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    // The codes are the signed factor of this multiplication.
    let negative = _mm256_maddubs_epi16(_mm256_set1_epi16(0x0110), codes);
    pack_words(_mm256_sub_epi16(_mm256_setzero_si256(), negative))
}

/// 16 words below 256 to bytes.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn pack_words(words: __m256i) -> __m128i {
    _mm_packus_epi16(
        _mm256_castsi256_si128(words),
        _mm256_extracti128_si256::<1>(words),
    )
}

/// The largest magnitude of 16-bit floats, as bits. NaN and infinity are the largest.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn max_magnitude_u16(block: &[[u8; 64]]) -> u16 {
    let mut max = _mm256_setzero_si256();
    for half in block.as_flattened().as_chunks::<32>().0 {
        max = _mm256_max_epu16(
            max,
            _mm256_and_si256(load256(half), _mm256_set1_epi16(0x7fff)),
        );
    }
    let max = _mm_max_epu16(
        _mm256_castsi256_si128(max),
        _mm256_extracti128_si256::<1>(max),
    );
    // There is an instruction for the smallest of eight only.
    !(_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(max, _mm_set1_epi16(-1)))) as u16)
}

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
pub(crate) fn absmax_mean(absmax: &[f32]) -> f32 {
    double::mean(absmax, double::group_sum)
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(crate) fn quantize_absmax(
    absmax: &[f32],
    offset: f32,
    codes: &mut [u8],
    nested_absmax: &mut [f32],
) {
    double::quantize(absmax, offset, codes, nested_absmax, double::plain_codes);
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(crate) fn dequantize_absmax(codes: &[u8], nested_absmax: &[f32], offset: f32, out: &mut [f32]) {
    double::dequantize(codes, nested_absmax, offset, out);
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
fn narrow_to_f16(x: __m256) -> __m128i {
    _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)
}

/// As [`float::f32_to_bf16`].
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn narrow_to_bf16(x: __m256) -> __m128i {
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

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn load256(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: 32 bytes can be read, at any alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn load256_f32(values: &[f32; 8]) -> __m256 {
    // SAFETY: 8 values of 4 bytes can be read.
    unsafe { _mm256_loadu_ps(values.as_ptr()) }
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn load128(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: 16 bytes can be read, at any alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn store256(out: &mut [u8; 32], value: __m256i) {
    // SAFETY: 32 bytes can be written, at any alignment.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), value) }
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn store128(out: &mut [u8; 16], value: __m128i) {
    // SAFETY: 16 bytes can be written, at any alignment.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), value) }
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn bytes256(x: __m256) -> [u8; 32] {
    let mut bytes = [0; 32];
    store256(&mut bytes, _mm256_castps_si256(x));
    bytes
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn bytes128(x: __m128i) -> [u8; 16] {
    let mut bytes = [0; 16];
    store128(&mut bytes, x);
    bytes
}
