//! What tensors take on a device, by the host's own arithmetic.

use std::collections::BTreeMap;

use crate::{Dtype, Error, Format, Nf4Format, StoredSize, Tensor};

/// Asks the host for sizes, once per element type, shape and format: a model of 100,000 tensors
/// has a handful of shapes.
#[derive(Debug, Default)]
pub struct Sizer {
    known: BTreeMap<(u64, Vec<u64>), StoredSize>,
    /// The last few answers: neighbors in a checkpoint mostly repeat each other's shapes.
    recent: Vec<(u64, Vec<u64>, StoredSize)>,
    oldest: usize,
}

const RECENT: usize = 8;

impl Sizer {
    /// Knows nothing yet.
    pub fn new() -> Sizer {
        Sizer::default()
    }

    /// Returns the bytes that a tensor takes when it is stored in this format.
    ///
    /// # Errors
    /// The host's: the format cannot hold such a tensor, or the size does not fit in 64 bits.
    pub fn size(&mut self, tensor: &Tensor, format: Format) -> Result<StoredSize, Error> {
        let (dtype, shape) = (tensor.dtype, tensor.shape.as_slice());
        let format = match (&tensor.quantized, format) {
            // As the checkpoint holds it, which is like this.
            (Some(quantized), Format::Stored) => Format::Nf4(Nf4Format {
                block_size: quantized.block_size,
                double_quantized: quantized.double_quantized,
            }),
            (_, format) => format,
        };
        let key = key(dtype, format);
        let hit = |(of, at, _): &&(u64, Vec<u64>, StoredSize)| *of == key && at == shape;
        if let Some((_, _, size)) = self.recent.iter().find(hit) {
            return Ok(*size);
        }
        let at = (key, shape.to_vec());
        let size = match self.known.get(&at) {
            Some(size) => *size,
            None => {
                let size = stored_bytes(dtype, shape, format)?;
                self.known.insert(at, size);
                size
            }
        };
        let answer = (key, shape.to_vec(), size);
        if self.recent.len() < RECENT {
            self.recent.push(answer);
        } else {
            self.recent[self.oldest] = answer;
            self.oldest = (self.oldest + 1) % RECENT;
        }
        Ok(size)
    }
}

/// Element type and format in one number.
fn key(dtype: Dtype, format: Format) -> u64 {
    let (kind, detail) = match format {
        Format::Stored => (0, 0),
        Format::Cast(to) => (1, to as u32),
        Format::Nf4(nf4) => (2 + u64::from(nf4.double_quantized), nf4.block_size),
    };
    (dtype as u64) << 48 | kind << 32 | u64::from(detail)
}

#[cfg(target_family = "wasm")]
use crate::bindings::tightfit::host::sizing::stored_bytes;
#[cfg(not(target_family = "wasm"))]
use native::stored_bytes;

/// The host's arithmetic, so that policies can be tested without a host.
#[cfg(not(target_family = "wasm"))]
mod native {
    use tightfit_common::{BlockSize, sizes};

    use super::bits;
    use crate::{Dtype, Error, ErrorCode, Format, StoredSize};

    pub(super) fn stored_bytes(
        dtype: Dtype,
        shape: &[u64],
        format: Format,
    ) -> Result<StoredSize, Error> {
        let is_float = |dtype| matches!(dtype, Dtype::Bf16 | Dtype::F16 | Dtype::F32);
        let parts = match format {
            Format::Stored => sizes::plain(shape, bits(dtype)).map(|bytes| [bytes, 0, 0]),
            Format::Cast(to) if is_float(dtype) && is_float(to) => {
                sizes::plain(shape, bits(to)).map(|bytes| [bytes, 0, 0])
            }
            Format::Nf4(nf4) if is_float(dtype) => {
                let block_size = BlockSize::try_from(nf4.block_size).map_err(illegal)?;
                sizes::nf4(shape, bits(dtype), block_size, nf4.double_quantized)
                    .map(|parts| [parts.codes, parts.absmax, parts.nested_absmax.unwrap_or(0)])
            }
            Format::Cast(_) | Format::Nf4(_) => {
                return Err(illegal(format_args!("{format:?} cannot hold {dtype:?}")));
            }
        };
        let parts = parts.ok_or_else(|| Error {
            code: ErrorCode::Overflow,
            message: "the size does not fit in 64 bits, or ends inside a byte".into(),
        })?;
        let padded = |bytes: u64| bytes.next_multiple_of(sizes::PART_ALIGNMENT);
        Ok(StoredSize {
            requested: parts.iter().sum(),
            padded: parts.into_iter().map(padded).sum(),
        })
    }

    fn illegal(problem: impl ToString) -> Error {
        Error {
            code: ErrorCode::IllegalFormat,
            message: problem.to_string(),
        }
    }
}

/// Returns the bits of an element.
pub fn bits(dtype: Dtype) -> u64 {
    match dtype {
        Dtype::F4 => 4,
        Dtype::F6E2m3 | Dtype::F6E3m2 => 6,
        Dtype::Bool | Dtype::U8 | Dtype::I8 => 8,
        Dtype::F8E4m3 | Dtype::F8E5m2 | Dtype::F8E8m0 => 8,
        Dtype::U16 | Dtype::I16 | Dtype::F16 | Dtype::Bf16 => 16,
        Dtype::U32 | Dtype::I32 | Dtype::F32 => 32,
        Dtype::U64 | Dtype::I64 | Dtype::F64 | Dtype::C64 => 64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ErrorCode, Nf4Format};

    fn size(dtype: Dtype, shape: &[u64], format: Format) -> Result<(u64, u64), ErrorCode> {
        let tensor = Tensor {
            shape: shape.into(),
            ..Tensor::new("x", dtype, &[])
        };
        let size = Sizer::new().size(&tensor, format);
        size.map(|size| (size.requested, size.padded))
            .map_err(|error| error.code)
    }

    fn nf4(block_size: u32, double_quantized: bool) -> Format {
        Format::Nf4(Nf4Format {
            block_size,
            double_quantized,
        })
    }

    #[test]
    fn every_part_is_padded_by_itself() {
        let q_proj = &[3584, 3584];
        assert_eq!(
            size(Dtype::Bf16, q_proj, nf4(64, false)),
            Ok((6_422_528 + 802_816, 6_422_528 + 802_816))
        );
        assert_eq!(
            size(Dtype::Bf16, q_proj, nf4(64, true)),
            Ok((6_422_528 + 200_704 + 3136, 6_422_528 + 200_704 + 3328))
        );
        // 65 elements: 33 bytes of codes, two scales.
        assert_eq!(size(Dtype::F32, &[65], nf4(64, false)), Ok((33 + 8, 512)));
        assert_eq!(size(Dtype::F16, &[3], Format::Stored), Ok((6, 256)));
        assert_eq!(
            size(Dtype::F32, &[128], Format::Cast(Dtype::Bf16)),
            Ok((256, 256))
        );
        assert_eq!(size(Dtype::Bf16, &[], Format::Stored), Ok((2, 256)));
        assert_eq!(size(Dtype::Bf16, &[7, 0], nf4(64, true)), Ok((0, 0)));
    }

    #[test]
    fn what_no_format_can_hold_is_an_error() {
        assert_eq!(
            size(Dtype::U8, &[64], nf4(64, false)),
            Err(ErrorCode::IllegalFormat)
        );
        assert_eq!(
            size(Dtype::F32, &[64], nf4(48, false)),
            Err(ErrorCode::IllegalFormat)
        );
        assert_eq!(
            size(Dtype::F32, &[64], Format::Cast(Dtype::U8)),
            Err(ErrorCode::IllegalFormat)
        );
        assert_eq!(
            size(Dtype::F32, &[1 << 40, 1 << 40], Format::Stored),
            Err(ErrorCode::Overflow)
        );
        assert_eq!(
            size(Dtype::F32, &[1 << 62], Format::Stored),
            Err(ErrorCode::Overflow)
        );
    }

    #[test]
    fn a_shape_is_asked_for_once() {
        let mut sizer = Sizer::new();
        let tensor = |shape: &[u64]| Tensor::new("x", Dtype::Bf16, shape);
        for _ in 0..3 {
            sizer.size(&tensor(&[2, 3]), nf4(64, false)).unwrap();
            sizer.size(&tensor(&[2, 3]), Format::Stored).unwrap();
            sizer.size(&tensor(&[3, 2]), Format::Stored).unwrap();
        }
        assert_eq!(sizer.known.len(), 3);
    }
}
