//! The closed sets: float types, 4-bit formats, block sizes, and the sizes that follow from them.

use std::fmt;

use crate::KernelError;

/// Blocks of the second quantization: 256 absmax values share one nested absmax (bitsandbytes'
/// fixed choice).
pub const NESTED_BLOCK_SIZE: usize = 256;

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

    /// Bytes per element.
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

/// A 4-bit format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QuantType {
    /// 4-bit NormalFloat: [`crate::NF4`].
    Nf4,
    /// 4-bit float as bitsandbytes defines it: [`crate::FP4`]. Only read, never written.
    Fp4,
}

impl QuantType {
    /// The value of each of the 16 codes, to be multiplied with the absmax of the block.
    pub const fn code_values(self) -> &'static [f32; 16] {
        match self {
            QuantType::Nf4 => &crate::NF4,
            QuantType::Fp4 => &crate::FP4,
        }
    }
}

/// Elements that share one absmax: a power of two from 32 to 4096.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockSize(u16);

impl BlockSize {
    /// 64 elements, the default of bitsandbytes and the only block size that transformers writes.
    pub const DEFAULT: BlockSize = BlockSize(64);

    /// Every block size: 32, 64, ..., 4096.
    pub const ALL: [BlockSize; 8] = [
        BlockSize(32),
        BlockSize(64),
        BlockSize(128),
        BlockSize(256),
        BlockSize(512),
        BlockSize(1024),
        BlockSize(2048),
        BlockSize(4096),
    ];

    /// A block of so many elements.
    ///
    /// # Errors
    /// [`KernelError::BlockSize`] if it is not a power of two from 32 to 4096.
    pub const fn new(elements: usize) -> Result<BlockSize, KernelError> {
        if elements.is_power_of_two() && elements >= 32 && elements <= 4096 {
            Ok(BlockSize(elements as u16))
        } else {
            Err(KernelError::BlockSize { have: elements })
        }
    }

    /// Elements per block.
    pub const fn elements(self) -> usize {
        self.0 as usize
    }
}

impl Default for BlockSize {
    fn default() -> Self {
        BlockSize::DEFAULT
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Bytes of packed codes for so many elements: two codes per byte, an odd last one in a byte of its
/// own.
pub const fn packed_bytes(elements: usize) -> usize {
    elements.div_ceil(2)
}

/// Blocks, and so absmax values, for so many elements; the last block may be partial.
pub const fn blocks(elements: usize, block_size: BlockSize) -> usize {
    elements.div_ceil(block_size.elements())
}
