//! AVX-512 F, BW, DQ and VL.
//!
//! Quantizing works on chunks of 64 elements. Blocks that are not plain (see [`PLAIN_ABSMAX`]) and
//! the partial block at the end go to the portable code.

mod absmax;
mod convert;
pub(crate) mod linear;
mod memory;
mod sources;

use std::arch::x86_64::*;

use self::memory::*;
use crate::{
    FloatType,
    buckets::{Bf16Buckets, LinearBuckets},
    float,
    quantize::{self, GROUP_BLOCKS, PLAIN_ABSMAX, group_blocks},
};

pub(crate) use self::{
    absmax::{absmax_mean, dequantize_absmax, quantize_absmax},
    convert::{cast, dequantize},
    linear::{add_products_if_available, add_scaled_if_available},
    sources::decode,
};

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
pub(crate) fn quantize_nf4(
    source: &[u8],
    float: FloatType,
    block_size: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> u64 {
    match (float, block_size) {
        (FloatType::Bf16, 32) => bf16::half_chunks(source, packed, absmax),
        (FloatType::Bf16, 64) => bf16::chunks::<1>(source, block_size, packed, absmax),
        (FloatType::Bf16, _) => bf16::chunks::<0>(source, block_size, packed, absmax),
        (FloatType::F16, 32) => f16::half_chunks(source, packed, absmax),
        (FloatType::F16, 64) => f16::chunks::<1>(source, block_size, packed, absmax),
        (FloatType::F16, _) => f16::chunks::<0>(source, block_size, packed, absmax),
        (FloatType::F32, 32) => f32::half_chunks(source, packed, absmax),
        (FloatType::F32, 64) => f32::chunks::<1>(source, block_size, packed, absmax),
        (FloatType::F32, _) => f32::chunks::<0>(source, block_size, packed, absmax),
    }
}

/// How far ahead of where they are read bytes are asked for.
const AHEAD: usize = 8192;

/// Has the bytes that lie [`AHEAD`] bytes behind these read into the caches. The processor does that by
/// itself only within a page, and not while the codes of a group are computed.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
fn prefetch_ahead(bytes: &[u8]) {
    for at in (0..bytes.len()).step_by(64) {
        prefetch(bytes, AHEAD + at);
    }
}

/// The loops over blocks for one float type. They need, for that type,
/// - `HALF`, the bytes of 32 elements, and `FLOAT`;
/// - `max_bits(&[[u8; HALF]]) -> u32`: the largest magnitude, as `f32` bits;
/// - `Scale` and `scale(f32, f32) -> Scale`: what is needed of a plain absmax and its reciprocal;
/// - `encode(&[[u8; HALF]; 2], &Scale, &Scale) -> __m256i`: the packed codes of 64 elements, with a
///   scale per half.
macro_rules! block_loops {
    () => {
        /// Blocks of `N` chunks, or of any number of whole chunks if `N` is 0.
        #[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
        #[inline]
        pub(super) fn chunks<const N: usize>(
            source: &[u8],
            block_size: usize,
            packed: &mut [u8],
            absmax: &mut [f32],
        ) -> u64 {
            let per_block = if N == 0 { block_size / 64 } else { N };
            let chunks = source.as_chunks::<HALF>().0.as_chunks::<2>().0;
            let full = chunks.len() / per_block;
            let (packed, packed_rest) = packed.split_at_mut(full * block_size / 2);
            let (absmax, absmax_rest) = absmax.split_at_mut(full);
            let mut nonfinite = 0;
            let group = group_blocks(per_block * 2 * HALF);
            let mut reciprocals = [0.0; GROUP_BLOCKS];
            let groups = chunks[..full * per_block]
                .chunks(group * per_block)
                .zip(packed.as_chunks_mut::<32>().0.chunks_mut(group * per_block))
                .zip(absmax.chunks_mut(group));
            for ((blocks, outs), absmax) in groups {
                for (block, absmax) in blocks.chunks_exact(per_block).zip(&mut *absmax) {
                    prefetch_ahead(block.as_flattened().as_flattened());
                    *absmax = f32::from_bits(max_bits(block.as_flattened()));
                }
                for (reciprocal, absmax) in reciprocals.iter_mut().zip(&*absmax) {
                    *reciprocal = 1.0 / absmax;
                }
                let blocks = blocks
                    .chunks_exact(per_block)
                    .zip(outs.chunks_exact_mut(per_block));
                for (((block, out), absmax), reciprocal) in blocks.zip(absmax).zip(reciprocals) {
                    if PLAIN_ABSMAX.contains(&absmax.to_bits()) {
                        let scale = scale(*absmax, reciprocal);
                        for (chunk, out) in block.iter().zip(out) {
                            store256(out, encode(chunk, &scale, &scale));
                        }
                    } else if absmax.to_bits() == 0 {
                        out.as_flattened_mut().fill(quantize::ZEROS);
                    } else {
                        let source = block.as_flattened().as_flattened();
                        let out = out.as_flattened_mut();
                        let block = quantize::quantize_block(source, FLOAT, false, out);
                        *absmax = block.absmax;
                        nonfinite += u64::from(block.nonfinite);
                    }
                }
            }
            let rest = &source[full * per_block * 2 * HALF..];
            nonfinite + quantize::quantize_nf4(rest, FLOAT, block_size, packed_rest, absmax_rest)
        }

        /// Blocks of 32, two of them in a chunk.
        #[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
        #[inline]
        pub(super) fn half_chunks(source: &[u8], packed: &mut [u8], absmax: &mut [f32]) -> u64 {
            let (chunks, _) = source.as_chunks::<HALF>().0.as_chunks::<2>();
            let (packed, packed_rest) = packed.split_at_mut(chunks.len() * 32);
            let (absmax, absmax_rest) = absmax.split_at_mut(chunks.len() * 2);
            let mut nonfinite = 0;
            let group = group_blocks(HALF) / 2;
            let mut reciprocals = [0.0; GROUP_BLOCKS];
            let groups = chunks
                .chunks(group)
                .zip(packed.as_chunks_mut::<32>().0.chunks_mut(group))
                .zip(absmax.as_chunks_mut::<2>().0.chunks_mut(group));
            for ((chunks, outs), absmax) in groups {
                let halves = chunks.as_flattened().iter();
                for (half, absmax) in halves.zip(absmax.as_flattened_mut()) {
                    prefetch_ahead(half);
                    *absmax = f32::from_bits(max_bits(std::slice::from_ref(half)));
                }
                for (reciprocal, absmax) in reciprocals.iter_mut().zip(absmax.as_flattened()) {
                    *reciprocal = 1.0 / absmax;
                }
                let reciprocals = reciprocals.as_chunks::<2>().0;
                let chunks = chunks.iter().zip(outs).zip(absmax).zip(reciprocals);
                for (((chunk, out), absmax), reciprocals) in chunks {
                    if absmax
                        .iter()
                        .all(|absmax| PLAIN_ABSMAX.contains(&absmax.to_bits()))
                    {
                        let low = scale(absmax[0], reciprocals[0]);
                        let high = scale(absmax[1], reciprocals[1]);
                        store256(out, encode(chunk, &low, &high));
                    } else {
                        let source = chunk.as_flattened();
                        nonfinite += quantize::quantize_nf4(source, FLOAT, 32, out, absmax);
                    }
                }
            }
            let rest = &source[chunks.len() * 2 * HALF..];
            nonfinite + quantize::quantize_nf4(rest, FLOAT, 32, packed_rest, absmax_rest)
        }
    };
}

/// bfloat16: all in 16-bit integers, with [`Bf16Buckets`].
mod bf16 {
    use super::*;

    const FLOAT: FloatType = FloatType::Bf16;
    const HALF: usize = 64;

    struct Scale {
        /// The pattern at which positions begin, in every lane.
        begin: __m512i,
        entries: [__m512i; 2],
    }

    block_loops!();

    #[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
    #[inline]
    fn max_bits(block: &[[u8; HALF]]) -> u32 {
        u32::from(max_magnitude_u16(block)) << 16
    }

    #[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
    #[inline]
    fn scale(absmax: f32, _reciprocal: f32) -> Scale {
        let absmax = (absmax.to_bits() >> 16) as u16;
        let entries = Bf16Buckets::TABLE.of_absmax(absmax);
        Scale {
            begin: _mm512_set1_epi16((absmax - Bf16Buckets::REACH) as i16),
            entries: [load512_u16(&entries[..32]), load512_u16(&entries[32..])],
        }
    }

    #[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
    #[inline]
    fn encode(chunk: &[[u8; HALF]; 2], low: &Scale, high: &Scale) -> __m256i {
        let codes = _mm512_packus_epi16(codes(&chunk[0], low), codes(&chunk[1], high));
        // Packing works in lanes of 128 bits: of every lane the first half belongs to the first
        // vector.
        pack_nibbles(_mm512_permutexvar_epi64(
            _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7),
            codes,
        ))
    }

    /// 32 codes in 16-bit lanes.
    #[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
    #[inline]
    fn codes(half: &[u8; HALF], scale: &Scale) -> __m512i {
        const PLACE_BITS: u32 = Bf16Buckets::PLACE_BITS;
        const XOR_A_WITH_B_AND_C: i32 = 0xf0 ^ (0xcc & 0xaa);
        let x = load512(half);
        let above = _mm512_subs_epu16(_mm512_and_si512(x, _mm512_set1_epi16(0x7fff)), scale.begin);
        let negative = _mm512_srai_epi16::<15>(x);
        let complement = _mm512_set1_epi16(Bf16Buckets::NEGATIVE as i16);
        let position = _mm512_ternarylogic_epi64::<XOR_A_WITH_B_AND_C>(above, negative, complement);
        let bucket = _mm512_srli_epi16::<PLACE_BITS>(position);
        let entry = _mm512_permutex2var_epi16(scale.entries[0], bucket, scale.entries[1]);
        _mm512_srli_epi16::<PLACE_BITS>(_mm512_add_epi16(position, entry))
    }
}

/// binary16: the maximum in 16-bit integers, the rest in `f32`.
mod f16 {
    use super::*;

    const FLOAT: FloatType = FloatType::F16;
    const HALF: usize = 64;

    block_loops!();

    #[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
    #[inline]
    fn max_bits(block: &[[u8; HALF]]) -> u32 {
        float::f16_to_f32(max_magnitude_u16(block)).to_bits()
    }

    #[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
    #[inline]
    fn encode(chunk: &[[u8; HALF]; 2], low: &Scale, high: &Scale) -> __m256i {
        let [a, b] = widen(&chunk[0]);
        let [c, d] = widen(&chunk[1]);
        pack_quarters(codes(a, low), codes(b, low), codes(c, high), codes(d, high))
    }

    #[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
    #[inline]
    fn widen(half: &[u8; HALF]) -> [__m512; 2] {
        let (quarters, _) = half.as_chunks::<32>();
        [
            _mm512_cvtph_ps(load256(&quarters[0])),
            _mm512_cvtph_ps(load256(&quarters[1])),
        ]
    }
}

/// binary32.
mod f32 {
    use super::*;

    const FLOAT: FloatType = FloatType::F32;
    const HALF: usize = 128;

    block_loops!();

    #[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
    #[inline]
    fn max_bits(block: &[[u8; HALF]]) -> u32 {
        let mut max = _mm512_setzero_si512();
        for quarter in block.as_flattened().as_chunks::<64>().0 {
            let magnitude = _mm512_and_si512(load512(quarter), _mm512_set1_epi32(0x7fff_ffff));
            max = _mm512_max_epu32(max, magnitude);
        }
        _mm512_reduce_max_epu32(max)
    }

    #[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
    #[inline]
    fn encode(chunk: &[[u8; HALF]; 2], low: &Scale, high: &Scale) -> __m256i {
        let [a, b] = split(&chunk[0]);
        let [c, d] = split(&chunk[1]);
        pack_quarters(codes(a, low), codes(b, low), codes(c, high), codes(d, high))
    }

    #[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
    #[inline]
    fn split(half: &[u8; HALF]) -> [__m512; 2] {
        let (quarters, _) = half.as_chunks::<64>();
        [
            _mm512_castsi512_ps(load512(&quarters[0])),
            _mm512_castsi512_ps(load512(&quarters[1])),
        ]
    }
}

/// What is needed of a plain absmax in `f32` arithmetic.
struct Scale {
    reciprocal: __m512,
    /// The reciprocal times [`LinearBuckets::PER_ONE`].
    buckets: __m512,
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
fn scale(_absmax: f32, reciprocal: f32) -> Scale {
    Scale {
        reciprocal: _mm512_set1_ps(reciprocal),
        buckets: _mm512_set1_ps(reciprocal * LinearBuckets::PER_ONE),
    }
}

/// 16 codes in 32-bit lanes.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
fn codes(x: __m512, scale: &Scale) -> __m512i {
    let (thresholds, bases) = (
        LinearBuckets::TABLE.thresholds.as_chunks::<16>().0,
        LinearBuckets::TABLE.bases.as_chunks::<16>().0,
    );
    let bucket = _mm512_castps_si512(_mm512_fmadd_ps(
        x,
        scale.buckets,
        _mm512_set1_ps(LinearBuckets::ROUND),
    ));
    let threshold = _mm512_permutex2var_ps(
        load512_f32(&thresholds[0]),
        bucket,
        load512_f32(&thresholds[1]),
    );
    let base = _mm512_permutex2var_epi32(load512_i32(&bases[0]), bucket, load512_i32(&bases[1]));
    // The sign of the difference says which is larger: it is exact enough never to round to zero.
    let difference = _mm512_sub_ps(threshold, _mm512_mul_ps(x, scale.reciprocal));
    _mm512_add_epi32(
        base,
        _mm512_srli_epi32::<31>(_mm512_castps_si512(difference)),
    )
}

/// 64 codes in 32-bit lanes to 32 bytes.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
fn pack_quarters(a: __m512i, b: __m512i, c: __m512i, d: __m512i) -> __m256i {
    let codes = _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
    // Every lane of 128 bits now holds four codes of each vector.
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    pack_nibbles(_mm512_permutexvar_epi32(order, codes))
}

/// 64 codes in bytes to 32 bytes, the first of each pair in the high half.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
fn pack_nibbles(codes: __m512i) -> __m256i {
    _mm512_cvtepi16_epi8(_mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x0110)))
}

/// The largest magnitude of 16-bit floats, as bits. NaN and infinity are the largest.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
fn max_magnitude_u16(block: &[[u8; 64]]) -> u16 {
    let mut max = _mm512_setzero_si512();
    for half in block {
        max = _mm512_max_epu16(
            max,
            _mm512_and_si512(load512(half), _mm512_set1_epi16(0x7fff)),
        );
    }
    let max = _mm256_max_epu16(
        _mm512_castsi512_si256(max),
        _mm512_extracti64x4_epi64::<1>(max),
    );
    let max = _mm_max_epu16(
        _mm256_castsi256_si128(max),
        _mm256_extracti128_si256::<1>(max),
    );
    // There is an instruction for the smallest of eight only.
    !(_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(max, _mm_set1_epi16(-1)))) as u16)
}
