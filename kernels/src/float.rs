//! Scalar conversions between the float types: exact upwards, round to nearest even downwards.
//!
//! NaN stays NaN: where a conversion changes the width through rounding hardware it also sets the
//! quiet bit, and keeps what fits of the payload. That is what F16C does, so all instruction sets
//! agree on NaN payloads too.

use crate::FloatType;

/// bfloat16 to `f32`: exact, signalling NaN stays signalling.
pub(crate) const fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

/// `f32` to bfloat16.
pub(crate) const fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return (bits >> 16) as u16 | 0x0040;
    }
    // Half of the last kept bit, less one if that bit is even, carries into it exactly when
    // rounding goes up.
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// binary16 to `f32`: exact, NaN is quieted.
pub(crate) const fn f16_to_f32(bits: u16) -> f32 {
    let sign = (bits as u32 & 0x8000) << 16;
    let magnitude = bits as u32 & 0x7fff;
    let bits = if magnitude > 0x7c00 {
        0x7fc0_0000 | magnitude << 13
    } else if magnitude == 0x7c00 {
        0x7f80_0000
    } else if magnitude >= 0x0400 {
        (magnitude << 13) + ((127 - 15) << 23)
    } else {
        // A subnormal is this many times 2^-24; both factors and the product are exact.
        (magnitude as f32 * f32::from_bits((127 - 24) << 23)).to_bits()
    };
    f32::from_bits(sign | bits)
}

/// `f32` to binary16: overflow goes to infinity, NaN is quieted.
pub(crate) const fn f32_to_f16(value: f32) -> u16 {
    let sign = (value.to_bits() >> 16) as u16 & 0x8000;
    let magnitude = value.to_bits() & 0x7fff_ffff;
    let rounded = if magnitude > 0x7f80_0000 {
        0x7e00 | (magnitude >> 13) as u16 & 0x03ff
    } else if magnitude >= 0x4780_0000 {
        0x7c00
    } else if magnitude >= 0x3880_0000 {
        // Normal; a carry out of the significand, even to infinity, is the right result.
        let rebased = magnitude - ((127 - 15) << 23);
        ((rebased + 0x0fff + ((rebased >> 13) & 1)) >> 13) as u16
    } else {
        // Subnormal: adding 0.5 makes the hardware round at 2^-24, to nearest even.
        ((f32::from_bits(magnitude) + 0.5).to_bits() - 0.5f32.to_bits()) as u16
    };
    sign | rounded
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
