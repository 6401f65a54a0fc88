//! What a tensor takes on a device. Plans, policies and the loader all ask here.

use crate::BlockSize;

/// Every stored part starts at a multiple of this many bytes: what CUDA allocations guarantee and
/// vectorized kernels want.
pub const PART_ALIGNMENT: u64 = 256;

/// Number of scales that share one nested scale under double quantization: bitsandbytes' fixed choice.
pub const NESTED_BLOCK_SIZE: u64 = 256;

/// Most bytes of a part. Well below 2^64, so that no later sum or rounding can overflow.
pub const MAX_PART_BYTES: u64 = 1 << 60;

/// Returns the number of elements of a shape, or `None` where it does not fit in 64 bits. A shape with a
/// zero in it has none, whatever the others are.
pub fn elements(shape: &[u64]) -> Option<u64> {
    if shape.contains(&0) {
        return Some(0);
    }
    shape
        .iter()
        .try_fold(1u64, |product, &dimension| product.checked_mul(dimension))
}

/// Returns the bytes of a tensor of this shape with elements of this many bits, row-major and
/// without padding, or `None` where they do not fit in 64 bits or are no whole number.
pub fn tensor_bytes(shape: &[u64], bits: u64) -> Option<u64> {
    let bits = elements(shape)?.checked_mul(bits)?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// Returns the bytes of a part that holds a tensor as it is, with elements of this many bits, or
/// `None` beyond [`MAX_PART_BYTES`].
pub fn plain(shape: &[u64], bits: u64) -> Option<u64> {
    tensor_bytes(shape, bits).filter(|&bytes| bytes <= MAX_PART_BYTES)
}

/// Bytes of the parts of a tensor in NF4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nf4Parts {
    /// Two codes in a byte.
    pub codes: u64,
    /// A scale for each block: 4 bytes, or 1 under double quantization.
    pub absmax: u64,
    /// Under double quantization 4 bytes for each [`NESTED_BLOCK_SIZE`] scales.
    pub nested_absmax: Option<u64>,
}

/// Returns the parts of a tensor in NF4, made of elements of this many bits, or `None` where these take
/// more than [`MAX_PART_BYTES`].
pub fn nf4(
    shape: &[u64],
    bits: u64,
    block_size: BlockSize,
    double_quantized: bool,
) -> Option<Nf4Parts> {
    plain(shape, bits)?;
    let n = elements(shape)?;
    let blocks = n.div_ceil(u64::from(block_size));
    Some(match double_quantized {
        true => Nf4Parts {
            codes: n.div_ceil(2),
            absmax: blocks,
            nested_absmax: Some(4 * blocks.div_ceil(NESTED_BLOCK_SIZE)),
        },
        false => Nf4Parts {
            codes: n.div_ceil(2),
            absmax: 4 * blocks,
            nested_absmax: None,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nf4_takes_half_a_byte_an_element_and_a_scale_a_block() {
        let plain = nf4(&[5, 13], 16, BlockSize::DEFAULT, false).unwrap();
        assert_eq!(
            (plain.codes, plain.absmax, plain.nested_absmax),
            (33, 8, None)
        );
        let double = nf4(&[257, 64], 32, BlockSize::DEFAULT, true).unwrap();
        assert_eq!(
            (double.codes, double.absmax, double.nested_absmax),
            (257 * 32, 257, Some(8))
        );
    }

    #[test]
    fn parts_of_bytes_and_sizes_beyond_all_bounds_are_none() {
        assert_eq!(plain(&[3], 4), None);
        assert_eq!(plain(&[4], 6), Some(3));
        assert_eq!(plain(&[1 << 60], 8), Some(1 << 60));
        assert_eq!(plain(&[(1 << 60) + 1], 8), None);
        assert_eq!(plain(&[u64::MAX, 0], 64), Some(0));
        assert_eq!(nf4(&[1 << 60], 16, BlockSize::DEFAULT, false), None);
    }
}
