//! NEON, which every 64-bit Arm processor has.
//!
//! Quantizing works on chunks of 32 elements. Blocks that are not plain (see [`PLAIN_ABSMAX`]) and
//! the partial block at the end go to the portable code.

mod absmax;
mod convert;
pub(crate) mod linear;
mod memory;
mod sources;

use std::arch::aarch64::*;

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
    linear::add_products,
    sources::decode,
};

#[target_feature(enable = "neon")]
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
/// - `Scale` and `scale(f32, f32) -> Scale`: what is needed of a plain absmax and its reciprocal;
/// - `codes(&[u8; CHUNK], &Scale) -> [uint8x16_t; 2]`: the codes of 32 elements.
macro_rules! block_loop {
    () => {
        /// Blocks of `N` chunks, or of any number of chunks if `N` is 0.
        #[target_feature(enable = "neon")]
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
                        let scale = scale(*absmax, reciprocal);
                        for (chunk, out) in block.iter().zip(out) {
                            store(out, pack(codes(chunk, &scale)));
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

/// bfloat16: all in 16-bit integers, with [`Bf16Buckets`].
mod bf16 {
    use super::*;

    const FLOAT: FloatType = FloatType::Bf16;
    const CHUNK: usize = 64;

    struct Scale {
        /// The pattern at which positions begin, in every lane.
        begin: uint16x8_t,
        /// The low bytes of the 64 entries, and their high bytes.
        low: uint8x16x4_t,
        high: uint8x16x4_t,
    }

    block_loop!();

    #[target_feature(enable = "neon")]
    #[inline]
    fn max_bits(block: &[[u8; CHUNK]]) -> u32 {
        u32::from(max_magnitude_u16(block)) << 16
    }

    #[target_feature(enable = "neon")]
    #[inline]
    fn scale(absmax: f32, _reciprocal: f32) -> Scale {
        let absmax = (absmax.to_bits() >> 16) as u16;
        let (quarters, _) = Bf16Buckets::TABLE.of_absmax(absmax).as_chunks::<16>();
        let [a, b, c, d] = std::array::from_fn(|i| load_halves(&quarters[i]));
        Scale {
            begin: vdupq_n_u16(absmax - Bf16Buckets::REACH),
            low: uint8x16x4_t(a.0, b.0, c.0, d.0),
            high: uint8x16x4_t(a.1, b.1, c.1, d.1),
        }
    }

    #[target_feature(enable = "neon")]
    #[inline]
    fn codes(chunk: &[u8; CHUNK], scale: &Scale) -> [uint8x16_t; 2] {
        const PLACE_BITS: i32 = Bf16Buckets::PLACE_BITS as i32;
        let position = |bytes| {
            let x = load_u16(bytes);
            let above = vqsubq_u16(vbicq_u16(x, vdupq_n_u16(0x8000)), scale.begin);
            let negative = vcltzq_s16(vreinterpretq_s16_u16(x));
            veorq_u16(
                above,
                vandq_u16(negative, vdupq_n_u16(Bf16Buckets::NEGATIVE)),
            )
        };
        let (pairs, _) = chunk.as_chunks::<16>().0.as_chunks::<2>();
        std::array::from_fn(|i| {
            let (a, b) = (position(&pairs[i][0]), position(&pairs[i][1]));
            let bucket = vshrn_high_n_u16::<PLACE_BITS>(vshrn_n_u16::<PLACE_BITS>(a), b);
            let low = vqtbl4q_u8(scale.low, bucket);
            let high = vqtbl4q_u8(scale.high, bucket);
            let a = vaddq_u16(a, vreinterpretq_u16_u8(vzip1q_u8(low, high)));
            let b = vaddq_u16(b, vreinterpretq_u16_u8(vzip2q_u8(low, high)));
            vshrn_high_n_u16::<PLACE_BITS>(vshrn_n_u16::<PLACE_BITS>(a), b)
        })
    }
}

/// binary16: the maximum in 16-bit integers, the rest in `f32`.
mod f16 {
    use super::{convert::widen_f16, *};

    const FLOAT: FloatType = FloatType::F16;
    const CHUNK: usize = 64;

    block_loop!();

    #[target_feature(enable = "neon")]
    #[inline]
    fn max_bits(block: &[[u8; CHUNK]]) -> u32 {
        float::f16_to_f32(max_magnitude_u16(block)).to_bits()
    }

    #[target_feature(enable = "neon")]
    #[inline]
    fn codes(chunk: &[u8; CHUNK], scale: &Scale) -> [uint8x16_t; 2] {
        let (pairs, _) = chunk.as_chunks::<16>().0.as_chunks::<2>();
        std::array::from_fn(|i| {
            let [a, b] = widen_f16(load_u16(&pairs[i][0]));
            let [c, d] = widen_f16(load_u16(&pairs[i][1]));
            codes_of_f32([a, b, c, d], scale)
        })
    }
}

/// binary32.
mod f32 {
    use super::*;

    const FLOAT: FloatType = FloatType::F32;
    const CHUNK: usize = 128;

    block_loop!();

    #[target_feature(enable = "neon")]
    #[inline]
    fn max_bits(block: &[[u8; CHUNK]]) -> u32 {
        let mut max = [vdupq_n_u32(0); 4];
        for four in block.as_flattened().as_chunks::<16>().0.as_chunks::<4>().0 {
            for (max, bytes) in max.iter_mut().zip(four) {
                let magnitude = vbicq_u32(load_u32(bytes), vdupq_n_u32(0x8000_0000));
                *max = vmaxq_u32(*max, magnitude);
            }
        }
        let [a, b, c, d] = max;
        vmaxvq_u32(vmaxq_u32(vmaxq_u32(a, b), vmaxq_u32(c, d)))
    }

    #[target_feature(enable = "neon")]
    #[inline]
    fn codes(chunk: &[u8; CHUNK], scale: &Scale) -> [uint8x16_t; 2] {
        let (fours, _) = chunk.as_chunks::<16>().0.as_chunks::<4>();
        std::array::from_fn(|i| {
            let x = fours[i].each_ref().map(|x| vreinterpretq_f32_u8(load(x)));
            codes_of_f32(x, scale)
        })
    }
}

/// What is needed of a plain absmax in `f32` arithmetic.
struct Scale {
    reciprocal: float32x4_t,
    /// The reciprocal times [`LinearBuckets::PER_ONE`].
    buckets: float32x4_t,
}

#[target_feature(enable = "neon")]
#[inline]
fn scale(_absmax: f32, reciprocal: f32) -> Scale {
    Scale {
        reciprocal: vdupq_n_f32(reciprocal),
        buckets: vdupq_n_f32(reciprocal * LinearBuckets::PER_ONE),
    }
}

/// The codes of 16 elements. Of each bucket's threshold, the four bytes are looked up in tables of
/// their own.
#[target_feature(enable = "neon")]
#[inline]
fn codes_of_f32(x: [float32x4_t; 4], scale: &Scale) -> uint8x16_t {
    static BASES: [u8; 32] = LinearBuckets::TABLE.bases_as_bytes();
    static THRESHOLDS: [[u8; 32]; 4] = LinearBuckets::TABLE.thresholds_by_byte();
    let table = |bytes: &[u8; 32]| {
        let (halves, _) = bytes.as_chunks::<16>();
        uint8x16x2_t(load(&halves[0]), load(&halves[1]))
    };
    let round = vdupq_n_f32(LinearBuckets::ROUND);
    let bucket = lowest_bytes(x.map(|x| vreinterpretq_u32_f32(vfmaq_f32(round, x, scale.buckets))));
    let [a, b, c, d] = THRESHOLDS
        .each_ref()
        .map(|bytes| vqtbl2q_u8(table(bytes), bucket));
    let (lower, upper) = (
        [vzip1q_u8(a, b), vzip2q_u8(a, b)],
        [vzip1q_u8(c, d), vzip2q_u8(c, d)],
    );
    let [lower, upper] = [lower, upper].map(|halves| halves.map(|x| vreinterpretq_u16_u8(x)));
    let thresholds = [
        vzip1q_u16(lower[0], upper[0]),
        vzip2q_u16(lower[0], upper[0]),
        vzip1q_u16(lower[1], upper[1]),
        vzip2q_u16(lower[1], upper[1]),
    ];
    let above = std::array::from_fn(|i| {
        let v = vmulq_f32(x[i], scale.reciprocal);
        vcgtq_f32(v, vreinterpretq_f32_u16(thresholds[i]))
    });
    // Where a threshold lies below all bits are set, which is -1.
    vsubq_u8(vqtbl2q_u8(table(&BASES), bucket), lowest_bytes(above))
}

/// The lowest bytes of 16 numbers.
#[target_feature(enable = "neon")]
#[inline]
fn lowest_bytes(numbers: [uint32x4_t; 4]) -> uint8x16_t {
    let [a, b, c, d] = numbers.map(|x| vreinterpretq_u16_u32(x));
    let (low, high) = (vuzp1q_u16(a, b), vuzp1q_u16(c, d));
    vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high))
}

/// 32 codes to 16 bytes, the first of each pair in the high half.
#[target_feature(enable = "neon")]
#[inline]
fn pack([a, b]: [uint8x16_t; 2]) -> uint8x16_t {
    vsliq_n_u8::<4>(vuzp2q_u8(a, b), vuzp1q_u8(a, b))
}

/// The largest magnitude of 16-bit floats, as bits. NaN and infinity are the largest.
#[target_feature(enable = "neon")]
#[inline]
fn max_magnitude_u16(block: &[[u8; 64]]) -> u16 {
    let mut max = [vdupq_n_u16(0); 4];
    for chunk in block {
        for (max, bytes) in max.iter_mut().zip(chunk.as_chunks::<16>().0) {
            *max = vmaxq_u16(*max, vbicq_u16(load_u16(bytes), vdupq_n_u16(0x8000)));
        }
    }
    let [a, b, c, d] = max;
    vmaxvq_u16(vmaxq_u16(vmaxq_u16(a, b), vmaxq_u16(c, d)))
}
