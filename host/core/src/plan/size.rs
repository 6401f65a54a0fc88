//! What a tensor takes on a device, to the byte: the arithmetic of [`tightfit_common::sizes`], in the
//! words of plans.

use tightfit_common::sizes;

use crate::checkpoint::TensorInfo;
use crate::types::{DType, Format};

pub use tightfit_common::sizes::{NESTED_BLOCK_SIZE, PART_ALIGNMENT};

/// What a part of a stored tensor holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PartKind {
    /// The elements themselves, row-major.
    Data,
    /// Two 4-bit codes in a byte, the earlier element in the high half.
    Codes,
    /// One scale per block: f32, or u8 codes under double quantization.
    Absmax,
    /// One f32 per 256 scales; double quantization only.
    NestedAbsmax,
}

/// The parts of one stored tensor with their sizes in bytes: at most three.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartSizes {
    parts: [(PartKind, u64); 3],
    count: usize,
}

impl PartSizes {
    fn new<const N: usize>(given: [(PartKind, u64); N]) -> PartSizes {
        let mut parts = [(PartKind::Data, 0); 3];
        parts[..N].copy_from_slice(&given);
        PartSizes { parts, count: N }
    }

    /// Returns the parts in the order in which they are stored.
    pub fn iter(&self) -> impl Iterator<Item = (PartKind, u64)> + '_ {
        self.parts[..self.count].iter().copied()
    }

    /// Returns the number of bytes of all parts.
    pub fn requested(&self) -> u64 {
        self.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Returns the number of bytes of all parts, each rounded up to [`PART_ALIGNMENT`].
    pub fn padded(&self) -> u64 {
        self.iter()
            .map(|(_, bytes)| bytes.next_multiple_of(PART_ALIGNMENT))
            .sum()
    }
}

/// Why a tensor cannot be stored in a format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SizeError {
    /// The format cannot hold this element type, or its own parameters are wrong.
    #[error("format {format} cannot hold {dtype} elements: {reason}")]
    IllegalFormat {
        /// The format asked for.
        format: Format,
        /// The tensor's element type.
        dtype: DType,
        /// What would be legal.
        reason: String,
    },
    /// A weight that is quantized in the checkpoint is not quantized or cast again.
    #[error("it is quantized already and can only be stored, not made {format}")]
    AlreadyQuantized {
        /// The format asked for.
        format: Format,
    },
    /// The size does not fit in 64 bits, or ends inside a byte.
    #[error("a {dtype} tensor of shape {shape:?} has no size in 64 bits")]
    Overflow {
        /// The tensor's element type.
        dtype: DType,
        /// The tensor's shape.
        shape: Vec<u64>,
    },
}

/// Returns the parts of a tensor of this type and shape stored in `format`.
///
/// NF4 takes `ceil(n / 2)` bytes of codes and `ceil(n / block)` scales of 4 bytes; with double
/// quantization one byte a scale and 4 bytes per 256 scales. The code tables and the offset of
/// double quantization are constants of the model and not counted.
///
/// # Errors
/// [`SizeError`] when the format cannot hold the type, or the size does not fit in 64 bits.
pub fn part_sizes(dtype: DType, shape: &[u64], format: Format) -> Result<PartSizes, SizeError> {
    let illegal = |reason: &str| SizeError::IllegalFormat {
        format,
        dtype,
        reason: reason.to_owned(),
    };
    let overflow = || SizeError::Overflow {
        dtype,
        shape: shape.to_vec(),
    };
    match format {
        Format::Stored => {
            let bytes = sizes::plain(shape, dtype.bits()).ok_or_else(overflow)?;
            Ok(PartSizes::new([(PartKind::Data, bytes)]))
        }
        Format::Cast(target) => {
            if !dtype.is_quantizable() || !target.is_quantizable() {
                return Err(illegal("casts are between bf16, f16 and f32"));
            }
            let bytes = sizes::plain(shape, target.bits()).ok_or_else(overflow)?;
            Ok(PartSizes::new([(PartKind::Data, bytes)]))
        }
        Format::Nf4 {
            block_size,
            double_quantized,
        } => {
            if !dtype.is_quantizable() {
                return Err(illegal("NF4 is made from bf16, f16 or f32"));
            }
            let parts = sizes::nf4(shape, dtype.bits(), block_size, double_quantized)
                .ok_or_else(overflow)?;
            let codes = (PartKind::Codes, parts.codes);
            let absmax = (PartKind::Absmax, parts.absmax);
            Ok(match parts.nested_absmax {
                Some(nested) => PartSizes::new([codes, absmax, (PartKind::NestedAbsmax, nested)]),
                None => PartSizes::new([codes, absmax]),
            })
        }
    }
}

/// Returns the parts of this tensor stored in `format`. A weight that is quantized in the
/// checkpoint can only be stored, and then has the parts of its own quantization.
///
/// # Errors
/// As [`part_sizes`], and [`SizeError::AlreadyQuantized`].
pub fn tensor_part_sizes(tensor: &TensorInfo, format: Format) -> Result<PartSizes, SizeError> {
    let format = match (&tensor.quantized, format) {
        (None, format) => format,
        (Some(quantized), Format::Stored) => Format::Nf4 {
            block_size: quantized.block_size,
            double_quantized: quantized.nested.is_some(),
        },
        (Some(_), format) => return Err(SizeError::AlreadyQuantized { format }),
    };
    part_sizes(tensor.dtype, &tensor.shape, format)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nf4_takes_half_a_byte_an_element_and_four_bytes_a_block() {
        let sizes = part_sizes(DType::Bf16, &[5, 13], Format::NF4).unwrap();
        assert_eq!(
            sizes.iter().collect::<Vec<_>>(),
            [(PartKind::Codes, 33), (PartKind::Absmax, 8)]
        );
        assert_eq!((sizes.requested(), sizes.padded()), (41, 512));
    }

    #[test]
    fn double_quantization_takes_one_byte_a_block_and_four_per_256_blocks() {
        let sizes = part_sizes(DType::F32, &[257, 64], Format::NF4_DOUBLE).unwrap();
        assert_eq!(
            sizes.iter().collect::<Vec<_>>(),
            [
                (PartKind::Codes, 257 * 32),
                (PartKind::Absmax, 257),
                (PartKind::NestedAbsmax, 8)
            ]
        );
    }

    #[test]
    fn formats_that_cannot_hold_the_elements_are_refused() {
        for (dtype, format) in [
            (DType::U8, Format::NF4),
            (DType::F8E4M3, Format::NF4_DOUBLE),
            (DType::Bf16, Format::Cast(DType::I8)),
            (DType::I64, Format::Cast(DType::F32)),
        ] {
            assert!(
                matches!(
                    part_sizes(dtype, &[64], format),
                    Err(SizeError::IllegalFormat { .. })
                ),
                "{dtype} as {format}"
            );
        }
    }

    #[test]
    fn sizes_beyond_64_bits_are_refused() {
        for shape in [&[u64::MAX, 2][..], &[1 << 61], &[u64::MAX]] {
            assert!(matches!(
                part_sizes(DType::Bf16, shape, Format::NF4),
                Err(SizeError::Overflow { .. })
            ));
        }
    }

    #[test]
    fn an_empty_tensor_takes_nothing() {
        let sizes = part_sizes(DType::Bf16, &[0, 128], Format::NF4_DOUBLE).unwrap();
        assert_eq!((sizes.requested(), sizes.padded()), (0, 0));
    }
}
