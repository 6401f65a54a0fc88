//! The closed sets: float types, 4-bit formats, block sizes, and the sizes that follow from them.

use std::fmt;

use tightfit_common::{BlockSize, QuantType, sizes};

/// Number of absmax values that share one nested absmax under double quantization: bitsandbytes'
/// fixed choice.
pub const NESTED_BLOCK_SIZE: usize = sizes::NESTED_BLOCK_SIZE as usize;

/// Returns the value of each of the 16 codes, to be multiplied with the absmax of the block.
pub const fn code_values(quant_type: QuantType) -> &'static [f32; 16] {
    match quant_type {
        QuantType::Nf4 => &crate::NF4,
        QuantType::Fp4 => &crate::FP4,
    }
}

/// A floating-point type of weights, stored little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FloatType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16: the upper half of an IEEE binary32.
    Bf16,
}

impl FloatType {
    /// Every float type.
    pub const ALL: [FloatType; 3] = [FloatType::F32, FloatType::F16, FloatType::Bf16];

    /// Returns the number of bytes per element.
    pub const fn bytes(self) -> usize {
        match self {
            FloatType::F32 => 4,
            FloatType::F16 | FloatType::Bf16 => 2,
        }
    }
}

impl fmt::Display for FloatType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FloatType::F32 => "f32",
            FloatType::F16 => "f16",
            FloatType::Bf16 => "bf16",
        })
    }
}

/// Returns the number of bytes of packed codes for this many elements: two codes per byte, an odd
/// last one in a byte of its own.
pub const fn packed_bytes(elements: usize) -> usize {
    elements.div_ceil(2)
}

/// Blocks, and so absmax values, for this many elements; the last block may be partial.
pub const fn blocks(elements: usize, block_size: BlockSize) -> usize {
    elements.div_ceil(block_size.elements())
}
