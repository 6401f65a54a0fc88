//! Reading and writing vectors: the only code here that touches pointers.

use std::arch::aarch64::*;

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn load(bytes: &[u8; 16]) -> uint8x16_t {
    // SAFETY: 16 bytes can be read, at any alignment.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn load_u16(bytes: &[u8; 16]) -> uint16x8_t {
    vreinterpretq_u16_u8(load(bytes))
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn load_u32(bytes: &[u8; 16]) -> uint32x4_t {
    vreinterpretq_u32_u8(load(bytes))
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn load_f32(values: &[f32; 4]) -> float32x4_t {
    // SAFETY: 4 values of 4 bytes can be read.
    unsafe { vld1q_f32(values.as_ptr()) }
}

/// The low bytes of 16 numbers, and their high bytes.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn load_halves(numbers: &[u16; 16]) -> uint8x16x2_t {
    // SAFETY: 16 numbers of 2 bytes can be read.
    unsafe { vld2q_u8(numbers.as_ptr().cast()) }
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn store(out: &mut [u8; 16], value: uint8x16_t) {
    // SAFETY: 16 bytes can be written, at any alignment.
    unsafe { vst1q_u8(out.as_mut_ptr(), value) }
}

/// Writes the first byte of each vector, then the second of each, and so on.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn store_pairs(out: &mut [u8; 32], value: uint8x16x2_t) {
    // SAFETY: 32 bytes can be written, at any alignment.
    unsafe { vst2q_u8(out.as_mut_ptr(), value) }
}

/// The same of four vectors.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn store_fours(out: &mut [u8; 64], value: uint8x16x4_t) {
    // SAFETY: 64 bytes can be written, at any alignment.
    unsafe { vst4q_u8(out.as_mut_ptr(), value) }
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn load_numbers(numbers: &[u16; 8]) -> uint16x8_t {
    // SAFETY: 8 numbers of 2 bytes can be read.
    unsafe { vld1q_u16(numbers.as_ptr()) }
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn store_numbers(out: &mut [u16; 8], value: uint64x2_t) {
    // SAFETY: 8 numbers of 2 bytes can be written.
    unsafe { vst1q_u16(out.as_mut_ptr(), vreinterpretq_u16_u64(value)) }
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn store_f32(out: &mut [f32; 4], value: float32x4_t) {
    // SAFETY: 4 values of 4 bytes can be written.
    unsafe { vst1q_f32(out.as_mut_ptr(), value) }
}
