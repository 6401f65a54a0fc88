//! AVX2 and F16C.
//!
//! Quantizing works on chunks of 32 elements. Blocks that are not plain (see [`PLAIN_ABSMAX`]) and
//! the partial block at the end go to the portable code.

mod absmax;
mod convert;
mod linear;
mod memory;
mod sources;

use std::arch::x86_64::*;

use self::memory::*;
use crate::{
    FloatType, NF4_THRESHOLDS, float,
    quantize::{self, GROUP_BLOCKS, PLAIN_ABSMAX, group_blocks},
};

pub(crate) use self::{
    absmax::{absmax_mean, dequantize_absmax, quantize_absmax},
    convert::{cast, dequantize},
    linear::{add_products_if_available, add_scaled_if_available},
    sources::{decode, tile_of_4_bits},
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
                    } else if absmax.to_bits() == 0 {
                        out.as_flattened_mut().fill(quantize::ZEROS);
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
