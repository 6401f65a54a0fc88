//! Dequantizing and casting. Dequantizing looks the results of a block up: there are only 16.

use std::arch::aarch64::*;

use super::memory::*;
use crate::{FloatType, float};

#[target_feature(enable = "neon")]
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
    let vectors = as_vectors(values);
    // 16 bytes are 32 codes.
    let chunks = block_size / 32;
    let blocks = packed.as_chunks::<16>().0.chunks_exact(chunks).zip(absmax);
    match float {
        FloatType::F32 => {
            let outs = out.as_chunks_mut::<64>().0.chunks_exact_mut(2 * chunks);
            for ((packed, absmax), out) in blocks.zip(outs) {
                let results = vectors
                    .map(|values| vreinterpretq_u8_f32(vmulq_f32(values, vdupq_n_f32(*absmax))));
                let table = bytes_of_32(results);
                for (packed, out) in packed.iter().zip(out.as_chunks_mut::<2>().0) {
                    for (codes, out) in unpack(load(packed)).into_iter().zip(out) {
                        let [a, b, c, d] = table.map(|bytes| vqtbl1q_u8(bytes, codes));
                        store_fours(out, uint8x16x4_t(a, b, c, d));
                    }
                }
            }
        }
        FloatType::F16 | FloatType::Bf16 => {
            let outs = out.as_chunks_mut::<32>().0.chunks_exact_mut(2 * chunks);
            for ((packed, absmax), out) in blocks.zip(outs) {
                let results = vectors.map(|values| vmulq_f32(values, vdupq_n_f32(*absmax)));
                let [low, high] = bytes_of_16([
                    narrow_to([results[0], results[1]], float),
                    narrow_to([results[2], results[3]], float),
                ]);
                for (packed, out) in packed.iter().zip(out.as_chunks_mut::<2>().0) {
                    for (codes, out) in unpack(load(packed)).into_iter().zip(out) {
                        let (low, high) = (vqtbl1q_u8(low, codes), vqtbl1q_u8(high, codes));
                        store_pairs(out, uint8x16x2_t(low, high));
                    }
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

/// The codes of 16 bytes, one in a byte, in the order of elements.
#[target_feature(enable = "neon")]
#[inline]
fn unpack(bytes: uint8x16_t) -> [uint8x16_t; 2] {
    let (first, second) = (vshrq_n_u8::<4>(bytes), vandq_u8(bytes, vdupq_n_u8(0x0f)));
    [vzip1q_u8(first, second), vzip2q_u8(first, second)]
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn as_vectors(values: &[f32; 16]) -> [float32x4_t; 4] {
    let (quarters, _) = values.as_chunks::<4>();
    std::array::from_fn(|i| load_f32(&quarters[i]))
}

/// The first bytes of 16 numbers of 32 bits, their second, third and last bytes.
#[target_feature(enable = "neon")]
#[inline]
fn bytes_of_32([a, b, c, d]: [uint8x16_t; 4]) -> [uint8x16_t; 4] {
    let (even, odd) = (
        [vuzp1q_u8(a, b), vuzp1q_u8(c, d)],
        [vuzp2q_u8(a, b), vuzp2q_u8(c, d)],
    );
    [
        vuzp1q_u8(even[0], even[1]),
        vuzp1q_u8(odd[0], odd[1]),
        vuzp2q_u8(even[0], even[1]),
        vuzp2q_u8(odd[0], odd[1]),
    ]
}

/// The low bytes of 16 numbers of 16 bits, and their high bytes.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn bytes_of_16(numbers: [uint16x8_t; 2]) -> [uint8x16_t; 2] {
    let [a, b] = numbers.map(|x| vreinterpretq_u8_u16(x));
    [vuzp1q_u8(a, b), vuzp2q_u8(a, b)]
}

#[target_feature(enable = "neon")]
#[inline]
pub(crate) fn cast(source: &[u8], from: FloatType, to: FloatType, out: &mut [u8]) {
    // 8 elements at a time, through `f32`.
    macro_rules! convert {
        ($from:literal, $to:literal, |$x:ident| $convert:expr) => {{
            let (chunks, rest) = source.as_chunks::<{ 8 * $from }>();
            let (out, out_rest) = out.split_at_mut(chunks.len() * 8 * $to);
            for ($x, out) in chunks.iter().zip(out.as_chunks_mut::<{ 8 * $to }>().0) {
                write(out.as_chunks_mut::<16>().0, $convert);
            }
            float::cast(rest, from, to, out_rest);
        }};
    }
    match (from, to) {
        (FloatType::F32, FloatType::F16) => {
            convert!(4, 2, |x| [narrow_to_f16(read_f32(x))])
        }
        (FloatType::F32, FloatType::Bf16) => {
            convert!(4, 2, |x| [narrow_to_bf16(read_f32(x))])
        }
        (FloatType::F16, FloatType::F32) => {
            convert!(2, 4, |x| widen_f16(load_u16(x))
                .map(|x| vreinterpretq_u16_f32(x)))
        }
        (FloatType::F16, FloatType::Bf16) => {
            convert!(2, 2, |x| [narrow_to_bf16(widen_f16(load_u16(x)))])
        }
        (FloatType::Bf16, FloatType::F32) => {
            convert!(2, 4, |x| widen_bf16(load_u16(x))
                .map(|x| vreinterpretq_u16_f32(x)))
        }
        (FloatType::Bf16, FloatType::F16) => {
            convert!(2, 2, |x| [narrow_to_f16(widen_bf16(load_u16(x)))])
        }
        (FloatType::F32, FloatType::F32)
        | (FloatType::F16, FloatType::F16)
        | (FloatType::Bf16, FloatType::Bf16) => out.copy_from_slice(source),
    }
}

#[target_feature(enable = "neon")]
#[inline]
fn write<const N: usize>(out: &mut [[u8; 16]], vectors: [uint16x8_t; N]) {
    for (out, vector) in out.iter_mut().zip(vectors) {
        store(out, vreinterpretq_u8_u16(vector));
    }
}

#[target_feature(enable = "neon")]
#[inline]
fn read_f32(bytes: &[u8; 32]) -> [float32x4_t; 2] {
    let (halves, _) = bytes.as_chunks::<16>();
    std::array::from_fn(|i| vreinterpretq_f32_u8(load(&halves[i])))
}

/// As [`float::f16_to_f32`].
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn widen_f16(x: uint16x8_t) -> [float32x4_t; 2] {
    let x = vreinterpretq_f16_u16(x);
    [vcvt_f32_f16(vget_low_f16(x)), vcvt_high_f32_f16(x)]
}

/// As [`float::bf16_to_f32`].
#[target_feature(enable = "neon")]
#[inline]
fn widen_bf16(x: uint16x8_t) -> [float32x4_t; 2] {
    [
        vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(x))),
        vreinterpretq_f32_u32(vshll_high_n_u16::<16>(x)),
    ]
}

/// Rounds to a float type of 16 bits.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn narrow_to(x: [float32x4_t; 2], to: FloatType) -> uint16x8_t {
    match to {
        FloatType::F16 => narrow_to_f16(x),
        _ => narrow_to_bf16(x),
    }
}

/// As [`float::f32_to_f16`].
#[target_feature(enable = "neon")]
#[inline]
fn narrow_to_f16([low, high]: [float32x4_t; 2]) -> uint16x8_t {
    vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(low), high))
}

/// As [`float::f32_to_bf16`].
#[target_feature(enable = "neon")]
#[inline]
fn narrow_to_bf16(x: [float32x4_t; 2]) -> uint16x8_t {
    let [low, high] = x.map(|x| {
        let bits = vreinterpretq_u32_f32(x);
        let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
        let rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
        let quiet = vorrq_u32(bits, vdupq_n_u32(0x0040_0000));
        vreinterpretq_u16_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet))
    });
    // The upper halves.
    vuzp2q_u16(low, high)
}
