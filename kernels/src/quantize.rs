//! Quantizing to NF4 in portable Rust: the definition that the other instruction sets must equal.
//!
//! The meaning is that of bitsandbytes' CUDA kernel, which is compiled to flush subnormals. Rust
//! code must not change the floating-point environment, so every flush is written out. The vector
//! kernels skip them for blocks where they provably make no difference, and send the others here.

use std::ops::RangeInclusive;

use crate::{FloatType, NF4_THRESHOLDS, float};

/// Bits of the absmax of blocks for which plain IEEE arithmetic gives the same codes, if the block
/// is also finite.
///
/// - 2^-100 and more: a subnormal element (below 2^-126) is under 2^-26 of the absmax, so it has
///   code 7 whether flushed or not, and so has every element whose product is subnormal.
/// - 2^126 and less: the reciprocal is a normal number.
pub(crate) const PLAIN_ABSMAX: RangeInclusive<u32> = 0x0d80_0000..=0x7e80_0000;

/// By vector kernels blocks are taken in groups: first the absmax of each, then the reciprocals together, then the
/// codes. One block after the other, the codes would wait for the long way from its elements to its
/// reciprocal, and fill the processor's queues with waiting instructions, so that the next block
/// could not be started either.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) const GROUP_BLOCKS: usize = 16;

/// How many blocks of this many bytes to take together: the second pass shall find them in the
/// first-level cache.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) const fn group_blocks(block_bytes: usize) -> usize {
    match 4096 / block_bytes {
        0 => 1,
        1..GROUP_BLOCKS => 4096 / block_bytes,
        _ => GROUP_BLOCKS,
    }
}

/// Zero, with its sign, for a subnormal; anything else as it is.
pub(crate) const fn flush(x: f32) -> f32 {
    if x.is_subnormal() {
        f32::from_bits(x.to_bits() & 0x8000_0000)
    } else {
        x
    }
}

/// The largest magnitude, as the CUDA kernels find it: NaN does not count, and neither does the
/// sign.
///
/// In a partial block the absent elements count as zeros. This shows only where all present ones
/// are NaN: absmax is then 0.0, and -`f32::MAX` for a full block.
pub(crate) fn absmax(block: impl Iterator<Item = f32>, partial: bool) -> f32 {
    block.fold(if partial { 0.0 } else { f32::MIN }, |max, x| {
        // `f32::max` gives NaN for a signalling one on some processors.
        let magnitude = flush(x).abs();
        if magnitude > max { magnitude } else { max }
    })
}

/// What the elements are multiplied with.
pub(crate) const fn reciprocal(absmax: f32) -> f32 {
    flush(1.0 / flush(absmax))
}

/// The code of an element that has been divided by the absmax: how many thresholds lie strictly
/// below it.
#[cfg(any(test, target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) const fn code(v: f32) -> u8 {
    // The number of thresholds below `v` is found in four steps; NaN is above none of them.
    let mut code = 0;
    let mut step = 8;
    while step > 0 {
        if v > NF4_THRESHOLDS[code + step - 1] {
            code += step;
        }
        step /= 2;
    }
    code as u8
}

/// One block, full or partial.
pub(crate) struct Block {
    pub(crate) absmax: f32,
    /// Whether it holds an infinity or a NaN.
    pub(crate) nonfinite: bool,
}

/// Two codes of a block of zeros: zero times the reciprocal of zero is NaN, which is above no threshold.
pub(crate) const ZEROS: u8 = 0;

/// Quantizes one block. `packed` has one byte for every two elements, rounded up.
pub(crate) fn quantize_block(
    source: &[u8],
    float: FloatType,
    partial: bool,
    packed: &mut [u8],
) -> Block {
    // One loop for each type, so that the conversion is chosen outside of it.
    match float {
        FloatType::F32 => {
            quantize_elements::<4>(source, |b| f32::from_le_bytes(*b), partial, packed)
        }
        FloatType::F16 => quantize_elements::<2>(
            source,
            |b| float::f16_to_f32(u16::from_le_bytes(*b)),
            partial,
            packed,
        ),
        FloatType::Bf16 => quantize_elements::<2>(
            source,
            |b| float::bf16_to_f32(u16::from_le_bytes(*b)),
            partial,
            packed,
        ),
    }
}

#[inline(always)]
fn quantize_elements<const BYTES: usize>(
    source: &[u8],
    read: impl Fn(&[u8; BYTES]) -> f32,
    partial: bool,
    packed: &mut [u8],
) -> Block {
    let (elements, _) = source.as_chunks::<BYTES>();
    let values = || elements.iter().map(&read);
    // Infinities and NaN have the largest magnitudes as integers, so one maximum finds them too.
    let bits = values().fold(0, |max: i32, x| max.max((x.to_bits() & 0x7fff_ffff) as i32)) as u32;
    if bits == 0 {
        packed.fill(ZEROS);
        return Block {
            absmax: 0.0,
            nonfinite: false,
        };
    }
    let plain = PLAIN_ABSMAX.contains(&bits);
    let nonfinite = bits >= f32::INFINITY.to_bits();
    let absmax = if plain {
        f32::from_bits(bits)
    } else {
        absmax(values(), partial)
    };
    let reciprocal = reciprocal(absmax);

    let (groups, rest) = elements.as_chunks::<GROUP>();
    let (outs, outs_rest) = packed.split_at_mut(groups.len() * GROUP / 2);
    for (group, out) in groups.iter().zip(outs.as_chunks_mut::<{ GROUP / 2 }>().0) {
        *out = if plain {
            encode(group.each_ref().map(|x| read(x) * reciprocal))
        } else {
            encode(group.each_ref().map(|x| flush(read(x)) * reciprocal))
        };
    }
    // The spare half of an odd last byte is what CUDA's padding gives: the code of zero times the
    // reciprocal.
    let mut padded = [0.0 * reciprocal; GROUP];
    for (v, x) in padded.iter_mut().zip(rest) {
        *v = flush(read(x)) * reciprocal;
    }
    outs_rest.copy_from_slice(&encode(padded)[..outs_rest.len()]);
    Block { absmax, nonfinite }
}

/// How many elements [`encode`] takes: enough for any compiler to find vectors in them.
const GROUP: usize = 32;

/// The packed codes of elements that have been divided by the absmax, as [`code`] gives them.
#[inline(always)]
fn encode(group: [f32; GROUP]) -> [u8; GROUP / 2] {
    let mut codes = [0; GROUP];
    for threshold in NF4_THRESHOLDS {
        for (code, v) in codes.iter_mut().zip(group) {
            *code += i32::from(v > threshold);
        }
    }
    std::array::from_fn(|i| (codes[2 * i] << 4 | codes[2 * i + 1]) as u8)
}

/// Quantizes block by block; returns how many blocks hold an infinity or a NaN. Lengths have been
/// checked.
pub(crate) fn quantize_nf4(
    source: &[u8],
    float: FloatType,
    block_size: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> u64 {
    let block_bytes = block_size * float.bytes();
    let mut nonfinite_blocks = 0;
    for ((source, packed), absmax) in source
        .chunks(block_bytes)
        .zip(packed.chunks_mut(block_size / 2))
        .zip(absmax)
    {
        let block = quantize_block(source, float, source.len() < block_bytes, packed);
        *absmax = block.absmax;
        nonfinite_blocks += u64::from(block.nonfinite);
    }
    nonfinite_blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_counts_the_thresholds_below() {
        let around = NF4_THRESHOLDS
            .iter()
            .flat_map(|t| [t.next_down(), *t, t.next_up()]);
        for v in around.chain([
            0.0,
            -0.0,
            1.0,
            -1.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            1e-40,
        ]) {
            let count = NF4_THRESHOLDS.iter().filter(|t| v > **t).count();
            assert_eq!(usize::from(code(v)), count, "{v}");
            assert_eq!(
                encode([v; GROUP]),
                [code(v) << 4 | code(v); GROUP / 2],
                "{v}"
            );
        }
    }

    #[test]
    fn a_block_of_zeros_has_the_codes_of_zero_by_its_reciprocal() {
        let zeros = [0.0, -0.0].map(|zero: f32| code(zero * (1.0 / 0.0_f32)));
        assert_eq!(zeros, [ZEROS; 2]);
        for length in [1_usize, 2, 64, 65] {
            let elements = (0..length).map(|n| if n % 3 == 1 { -0.0 } else { 0.0_f32 });
            let source: Vec<u8> = elements.flat_map(f32::to_le_bytes).collect();
            let mut packed = vec![0xff; length.div_ceil(2)];
            let block = quantize_block(&source, FloatType::F32, length < 64, &mut packed);
            assert_eq!((block.absmax.to_bits(), block.nonfinite), (0, false));
            assert_eq!(packed, vec![ZEROS; length.div_ceil(2)]);
        }
    }

    #[test]
    fn odd_lengths_pad_with_the_code_of_zero() {
        let quantize = |x: f32| {
            let mut packed = [0];
            let block = quantize_block(&x.to_le_bytes(), FloatType::F32, true, &mut packed);
            (packed[0], block.absmax, block.nonfinite)
        };
        assert_eq!(quantize(-2.0), (0x07, 2.0, false));
        assert_eq!(quantize(0.0), (0x00, 0.0, false));
        assert_eq!(quantize(f32::INFINITY), (0x07, f32::INFINITY, true));
        assert_eq!(quantize(f32::NAN), (0x00, 0.0, true));
    }
}
