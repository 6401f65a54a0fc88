//! The parameters of bitsandbytes' 4-bit formats.

use std::error::Error;
use std::fmt;

/// The table of a 4-bit format: what each of its 16 codes means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QuantType {
    /// 4-bit NormalFloat: quantiles of the normal distribution.
    Nf4,
    /// 4-bit float as bitsandbytes defines it: one sign, two exponent and one mantissa bit. Only
    /// read, never written.
    Fp4,
}

impl QuantType {
    /// Returns the name that bitsandbytes writes: `nf4`, `fp4`.
    pub const fn name(self) -> &'static str {
        match self {
            QuantType::Nf4 => "nf4",
            QuantType::Fp4 => "fp4",
        }
    }
}

/// Number of elements that share a scale (absmax): a power of two from 32 to 4096, which is what
/// bitsandbytes' kernels have.
///
/// ```
/// use tightfit_common::BlockSize;
///
/// assert_eq!(BlockSize::new(128)?.elements(), 128);
/// assert_eq!(BlockSize::default().elements(), 64);
/// assert!(BlockSize::new(48).is_err());
/// # Ok::<(), tightfit_common::IllegalBlockSize>(())
/// ```
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

    /// Returns a block of this many elements.
    ///
    /// # Errors
    /// [`IllegalBlockSize`] if it is not a power of two from 32 to 4096.
    pub const fn new(elements: usize) -> Result<BlockSize, IllegalBlockSize> {
        if elements.is_power_of_two() && elements >= 32 && elements <= 4096 {
            Ok(BlockSize(elements as u16))
        } else {
            Err(IllegalBlockSize { have: elements })
        }
    }

    /// Returns the number of elements of a block.
    pub const fn elements(self) -> usize {
        self.0 as usize
    }
}

impl Default for BlockSize {
    fn default() -> BlockSize {
        BlockSize::DEFAULT
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl From<BlockSize> for u32 {
    fn from(size: BlockSize) -> u32 {
        size.0.into()
    }
}

impl From<BlockSize> for u64 {
    fn from(size: BlockSize) -> u64 {
        size.0.into()
    }
}

impl TryFrom<u32> for BlockSize {
    type Error = IllegalBlockSize;

    fn try_from(elements: u32) -> Result<BlockSize, IllegalBlockSize> {
        BlockSize::new(elements as usize)
    }
}

/// A number of elements that is no block size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IllegalBlockSize {
    /// The number.
    pub have: usize,
}

impl fmt::Display for IllegalBlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "block size {} is not a power of two from 32 to 4096",
            self.have
        )
    }
}

impl Error for IllegalBlockSize {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes_are_the_powers_of_two_from_32_to_4096() {
        let legal: Vec<BlockSize> = (0..=10_000u32)
            .filter_map(|elements| elements.try_into().ok())
            .collect();
        assert_eq!(legal, BlockSize::ALL);
        for bad in [0, 16, 48, 8192, usize::MAX] {
            assert_eq!(BlockSize::new(bad), Err(IllegalBlockSize { have: bad }));
        }
    }
}
