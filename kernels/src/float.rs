//! Scalar conversions between the float types: exact upwards, round to nearest even downwards.
//!
//! NaN stays NaN: where a conversion changes the width through rounding hardware it also sets the
//! quiet bit, and keeps what fits of the payload. That is what F16C does, so all instruction sets
//! agree on NaN payloads too.

use half::{bf16, f16};

use crate::FloatType;

/// A floating-point number that weights are made of: `f32`, [`half::f16`] or [`half::bf16`].
///
/// It is sealed: kernels know these three.
pub trait Float: bytemuck::Pod + Send + Sync + sealed::Sealed {
    /// The type by which kernels know it.
    const TYPE: FloatType;
}

impl Float for f32 {
    const TYPE: FloatType = FloatType::F32;
}

impl Float for f16 {
    const TYPE: FloatType = FloatType::F16;
}

impl Float for bf16 {
    const TYPE: FloatType = FloatType::Bf16;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for super::f16 {}
    impl Sealed for super::bf16 {}
}

// Slices of numbers are the little-endian bytes that kernels read and write.
const _: () = assert!(
    cfg!(target_endian = "little"),
    "only little-endian machines"
);

/// bfloat16 to `f32`: exact, signalling NaN stays signalling, as it does where it is shifted on a GPU;
/// [`bf16::to_f32`] would quiet it.
pub(crate) const fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

/// `f32` to bfloat16.
pub(crate) const fn f32_to_bf16(value: f32) -> u16 {
    bf16::from_f32_const(value).to_bits()
}

/// binary16 to `f32`: exact, NaN is quieted.
pub(crate) const fn f16_to_f32(bits: u16) -> f32 {
    f16::from_bits(bits).to_f32_const()
}

/// `f32` to binary16: overflow goes to infinity, NaN is quieted.
pub(crate) const fn f32_to_f16(value: f32) -> u16 {
    f16::from_f32_const(value).to_bits()
}

/// Reads one element. `bytes` has the length of the type.
pub(crate) fn read(float: FloatType, bytes: &[u8]) -> f32 {
    match float {
        FloatType::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        FloatType::F16 => f16_to_f32(u16::from_le_bytes([bytes[0], bytes[1]])),
        FloatType::Bf16 => bf16_to_f32(u16::from_le_bytes([bytes[0], bytes[1]])),
    }
}

/// Rounds and writes one element. `bytes` has the length of the type.
pub(crate) fn write(float: FloatType, value: f32, bytes: &mut [u8]) {
    match float {
        FloatType::F32 => bytes.copy_from_slice(&value.to_le_bytes()),
        FloatType::F16 => bytes.copy_from_slice(&f32_to_f16(value).to_le_bytes()),
        FloatType::Bf16 => bytes.copy_from_slice(&f32_to_bf16(value).to_le_bytes()),
    }
}

/// Converts elements; the slices hold the same number of them, and the types differ.
pub(crate) fn cast(source: &[u8], from: FloatType, to: FloatType, out: &mut [u8]) {
    for (source, out) in source
        .chunks_exact(from.bytes())
        .zip(out.chunks_exact_mut(to.bytes()))
    {
        write(to, read(from, source), out);
    }
}
