//! Dequantizing in portable Rust.

use crate::{FloatType, float};

/// Writes `out.len() / float.bytes()` elements, at most `block_size` of them for each absmax.
/// Lengths have been checked.
pub(crate) fn dequantize(
    values: &[f32; 16],
    packed: &[u8],
    absmax: &[f32],
    block_size: usize,
    float: FloatType,
    out: &mut [u8],
) {
    match float {
        FloatType::F32 => dequantize_as::<4>(values, packed, absmax, block_size, float, out),
        FloatType::F16 | FloatType::Bf16 => {
            dequantize_as::<2>(values, packed, absmax, block_size, float, out)
        }
    }
}

fn dequantize_as<const BYTES: usize>(
    values: &[f32; 16],
    packed: &[u8],
    absmax: &[f32],
    block_size: usize,
    float: FloatType,
    out: &mut [u8],
) {
    for ((packed, out), &absmax) in packed
        .chunks(block_size / 2)
        .zip(out.chunks_mut(block_size * BYTES))
        .zip(absmax)
    {
        // A block has only 16 different results: multiply and round once for each.
        let results = values.map(|value| {
            let mut bytes = [0; BYTES];
            float::write(float, value * absmax, &mut bytes);
            bytes
        });
        for (pair, byte) in out.chunks_mut(2 * BYTES).zip(packed) {
            pair[..BYTES].copy_from_slice(&results[usize::from(byte >> 4)]);
            if pair.len() == 2 * BYTES {
                pair[BYTES..].copy_from_slice(&results[usize::from(byte & 15)]);
            }
        }
    }
}
