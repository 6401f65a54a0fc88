//! The words that every module speaks.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use tightfit_common::sizes;
use tightfit_kernels::FloatType;

/// Element type of a tensor, as safetensors names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "the names are the field's own")]
pub enum DType {
    Bool,
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
    F4,
    F6E2M3,
    F6E3M2,
    F8E4M3,
    F8E5M2,
    F8E8M0,
    F16,
    Bf16,
    F32,
    F64,
    C64,
    F8E4M3Fnuz,
    F8E5M2Fnuz,
}

impl DType {
    /// Every element type; those that the WIT enumeration has come first, in its order.
    pub const ALL: [DType; 22] = [
        DType::Bool,
        DType::U8,
        DType::I8,
        DType::U16,
        DType::I16,
        DType::U32,
        DType::I32,
        DType::U64,
        DType::I64,
        DType::F4,
        DType::F6E2M3,
        DType::F6E3M2,
        DType::F8E4M3,
        DType::F8E5M2,
        DType::F8E8M0,
        DType::F16,
        DType::Bf16,
        DType::F32,
        DType::F64,
        DType::C64,
        DType::F8E4M3Fnuz,
        DType::F8E5M2Fnuz,
    ];

    /// Returns the type by which kernels know it, if they can quantize and convert it.
    pub const fn float_type(self) -> Option<FloatType> {
        match self {
            DType::F32 => Some(FloatType::F32),
            DType::F16 => Some(FloatType::F16),
            DType::Bf16 => Some(FloatType::Bf16),
            _ => None,
        }
    }

    /// Returns the number of bits of one element.
    pub const fn bits(self) -> u64 {
        match self {
            DType::F4 => 4,
            DType::F6E2M3 | DType::F6E3M2 => 6,
            DType::Bool | DType::U8 | DType::I8 => 8,
            DType::F8E4M3 | DType::F8E5M2 | DType::F8E8M0 => 8,
            DType::F8E4M3Fnuz | DType::F8E5M2Fnuz => 8,
            DType::U16 | DType::I16 | DType::F16 | DType::Bf16 => 16,
            DType::U32 | DType::I32 | DType::F32 => 32,
            DType::U64 | DType::I64 | DType::F64 | DType::C64 => 64,
        }
    }

    /// Returns the name in a safetensors header, for example `BF16`.
    pub const fn safetensors_name(self) -> &'static str {
        match self {
            DType::Bool => "BOOL",
            DType::U8 => "U8",
            DType::I8 => "I8",
            DType::U16 => "U16",
            DType::I16 => "I16",
            DType::U32 => "U32",
            DType::I32 => "I32",
            DType::U64 => "U64",
            DType::I64 => "I64",
            DType::F4 => "F4",
            DType::F6E2M3 => "F6_E2M3",
            DType::F6E3M2 => "F6_E3M2",
            DType::F8E4M3 => "F8_E4M3",
            DType::F8E5M2 => "F8_E5M2",
            DType::F8E8M0 => "F8_E8M0",
            DType::F16 => "F16",
            DType::Bf16 => "BF16",
            DType::F32 => "F32",
            DType::F64 => "F64",
            DType::C64 => "C64",
            DType::F8E4M3Fnuz => "F8_E4M3FNUZ",
            DType::F8E5M2Fnuz => "F8_E5M2FNUZ",
        }
    }

    /// Returns the type with this name in a safetensors header.
    pub fn from_safetensors_name(name: &str) -> Option<DType> {
        DType::ALL
            .into_iter()
            .find(|dtype| dtype.safetensors_name() == name)
    }

    /// Returns whether the 4-bit formats can be made from this type: `BF16`, `F16`, `F32`.
    pub const fn is_quantizable(self) -> bool {
        matches!(self, DType::Bf16 | DType::F16 | DType::F32)
    }

    /// Returns the number of bytes of a tensor of this type and shape, as safetensors stores it:
    /// row-major, without padding. `None` when the size does not fit in 64 bits or is not a whole
    /// number of bytes.
    pub fn tensor_bytes(self, shape: &[u64]) -> Option<u64> {
        sizes::tensor_bytes(shape, self.bits())
    }
}

impl From<DType> for safetensors::Dtype {
    fn from(dtype: DType) -> safetensors::Dtype {
        match dtype {
            DType::Bool => safetensors::Dtype::BOOL,
            DType::U8 => safetensors::Dtype::U8,
            DType::I8 => safetensors::Dtype::I8,
            DType::U16 => safetensors::Dtype::U16,
            DType::I16 => safetensors::Dtype::I16,
            DType::U32 => safetensors::Dtype::U32,
            DType::I32 => safetensors::Dtype::I32,
            DType::U64 => safetensors::Dtype::U64,
            DType::I64 => safetensors::Dtype::I64,
            DType::F4 => safetensors::Dtype::F4,
            DType::F6E2M3 => safetensors::Dtype::F6_E2M3,
            DType::F6E3M2 => safetensors::Dtype::F6_E3M2,
            DType::F8E4M3 => safetensors::Dtype::F8_E4M3,
            DType::F8E5M2 => safetensors::Dtype::F8_E5M2,
            DType::F8E8M0 => safetensors::Dtype::F8_E8M0,
            DType::F16 => safetensors::Dtype::F16,
            DType::Bf16 => safetensors::Dtype::BF16,
            DType::F32 => safetensors::Dtype::F32,
            DType::F64 => safetensors::Dtype::F64,
            DType::C64 => safetensors::Dtype::C64,
            DType::F8E4M3Fnuz => safetensors::Dtype::F8_E4M3FNUZ,
            DType::F8E5M2Fnuz => safetensors::Dtype::F8_E5M2FNUZ,
        }
    }
}

impl TryFrom<safetensors::Dtype> for DType {
    type Error = UnknownDType;

    /// # Errors
    /// [`UnknownDType`] for a type that a later release of the crate has.
    fn try_from(dtype: safetensors::Dtype) -> Result<DType, UnknownDType> {
        let known = |own: &DType| safetensors::Dtype::from(*own) == dtype;
        DType::ALL
            .into_iter()
            .find(known)
            .ok_or_else(|| UnknownDType {
                name: dtype.to_string(),
            })
    }
}

/// An element type that is not known here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the element type {name} is not known")]
pub struct UnknownDType {
    /// Its name in safetensors.
    pub name: String,
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.safetensors_name().chars() {
            write!(f, "{}", c.to_ascii_lowercase())?;
        }
        Ok(())
    }
}

pub use tightfit_common::sizes::elements;

/// How a tensor is stored on its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// Exactly as the checkpoint holds it.
    Stored,
    /// Converted to another floating-point type.
    Cast(DType),
    /// Quantized to NF4.
    Nf4 {
        /// Number of elements that share a scale.
        block_size: BlockSize,
        /// Scales stored in 8 bits instead of f32.
        double_quantized: bool,
    },
}

impl Format {
    /// NF4 in blocks of 64 elements, as transformers has it.
    pub const NF4: Format = Format::Nf4 {
        block_size: BlockSize::DEFAULT,
        double_quantized: false,
    };

    /// The same with scales in 8 bits.
    pub const NF4_DOUBLE: Format = Format::Nf4 {
        block_size: BlockSize::DEFAULT,
        double_quantized: true,
    };
}

impl fmt::Display for Format {
    /// As reports name it: `stored`, `cast:bf16`, `nf4`, `nf4+double`; a block size other than
    /// 64 is added as in `nf4/128`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Format::Stored => f.write_str("stored"),
            Format::Cast(dtype) => write!(f, "cast:{dtype}"),
            Format::Nf4 {
                block_size,
                double_quantized,
            } => {
                f.write_str(if double_quantized {
                    "nf4+double"
                } else {
                    "nf4"
                })?;
                if block_size != BlockSize::DEFAULT {
                    write!(f, "/{block_size}")?;
                }
                Ok(())
            }
        }
    }
}

impl FromStr for Format {
    type Err = ParseFormatError;

    /// Reads what [`Display`](fmt::Display) writes; the type of a cast may stand alone (`bf16`).
    fn from_str(text: &str) -> Result<Format, ParseFormatError> {
        let error = || ParseFormatError {
            text: text.to_owned(),
        };
        let (name, block_size) = match text.split_once('/') {
            None => (text, None),
            Some((name, digits)) => {
                let size: u32 = digits.parse().map_err(|_| error())?;
                (name, Some(size.try_into().map_err(|_| error())?))
            }
        };
        let nf4 = |double_quantized| Format::Nf4 {
            block_size: block_size.unwrap_or_default(),
            double_quantized,
        };
        match (name.strip_prefix("cast:").unwrap_or(name), block_size) {
            ("nf4", _) if name == "nf4" => Ok(nf4(false)),
            ("nf4+double", _) if name == "nf4+double" => Ok(nf4(true)),
            ("stored", None) if name == "stored" => Ok(Format::Stored),
            ("bf16", None) => Ok(Format::Cast(DType::Bf16)),
            ("f16", None) => Ok(Format::Cast(DType::F16)),
            ("f32", None) => Ok(Format::Cast(DType::F32)),
            _ => Err(error()),
        }
    }
}

/// A text that names no format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{text}' is not a format: it must be stored, nf4, nf4+double (with a block size as in \
     nf4/128, a power of two from 32 to 4096), bf16, f16 or f32"
)]
pub struct ParseFormatError {
    /// The text.
    pub text: String,
}

pub use tightfit_common::{BlockSize, IllegalBlockSize, QuantType};

/// What becomes of one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Placement {
    /// Index of the device, or `None`: the tensor is not loaded.
    pub device: Option<u32>,
    /// How it is stored there.
    pub format: Format,
}

/// A part of a tensor that is placed like one: on several devices, each can have its own, or a copy.
///
/// What becomes of it says [`Checkpoint::cut`](crate::Checkpoint::cut).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Slice {
    /// Index of the tensor.
    pub tensor: u32,
    /// The dimension along which it is cut: 0 are the rows of a matrix, or the experts of a stack.
    pub dimension: u32,
    /// What it has along that dimension, in ascending order; `0..length` for a whole copy.
    pub ranges: Vec<Range<u64>>,
    /// Its device and format.
    pub placement: Placement,
}

/// A number of bytes that prints as people read it: `5.45 GiB`, `64.0 MiB`, `512 B`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u64); 4] = [
            ("TiB", 1 << 40),
            ("GiB", 1 << 30),
            ("MiB", 1 << 20),
            ("KiB", 1 << 10),
        ];
        let text = match UNITS.iter().find(|&&(_, unit)| self.0 >= unit) {
            None => format!("{} B", self.0),
            Some(&(name, unit)) => {
                let value = self.0 as f64 / unit as f64;
                let decimals = if value < 10.0 {
                    3
                } else if value < 100.0 {
                    2
                } else {
                    1
                };
                format!("{value:.decimals$} {name}")
            }
        };
        f.pad(&text)
    }
}

/// Parses a size as users write it: `1234`, `64MiB`, `1.5GiB`, `24GB` (decimal), `512K` (binary).
///
/// # Errors
/// A sentence naming the text when it is not a number with such a unit or does not fit in 64 bits.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    tightfit_common::bytes::parse_bytes(text).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn element_types_are_those_of_the_safetensors_crate() {
        for dtype in DType::ALL {
            let theirs = safetensors::Dtype::from(dtype);
            assert_eq!(theirs.to_string(), dtype.safetensors_name());
            assert_eq!(theirs.bitsize() as u64, dtype.bits());
            assert_eq!(DType::try_from(theirs), Ok(dtype));
            assert_eq!(
                DType::from_safetensors_name(dtype.safetensors_name()),
                Some(dtype)
            );
        }
    }

    #[test]
    fn sizes_are_read_as_users_write_them() {
        assert_eq!(parse_bytes("24GiB"), Ok(24 << 30));
        assert_eq!(parse_bytes("1.5 GiB"), Ok(3 << 29));
        assert_eq!(parse_bytes("24GB"), Ok(24_000_000_000));
        assert_eq!(parse_bytes("4096"), Ok(4096));
        for bad in [
            "",
            "GiB",
            "1.2.3",
            "12 parsecs",
            "-1",
            "99999999999999999999",
            "1e400TiB",
        ] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn formats_are_read_as_they_are_written() {
        let nf4 = |block_size, double_quantized| Format::Nf4 {
            block_size: BlockSize::new(block_size).unwrap(),
            double_quantized,
        };
        for format in [
            Format::Stored,
            Format::Cast(DType::Bf16),
            Format::Cast(DType::F16),
            Format::Cast(DType::F32),
            nf4(64, false),
            nf4(64, true),
            nf4(32, false),
            nf4(4096, true),
        ] {
            assert_eq!(format.to_string().parse(), Ok(format));
        }
        assert_eq!("bf16".parse(), Ok(Format::Cast(DType::Bf16)));
        for bad in [
            "",
            "int8",
            "NF4",
            "nf4/",
            "nf4/48",
            "nf4/16",
            "nf4/8192",
            "nf4+double/x",
            "stored/64",
            "cast:nf4",
            "cast:stored",
            "cast:u8",
            "bf16/64",
            "cast:cast:f16",
            "nf4/64/64",
        ] {
            assert!(bad.parse::<Format>().is_err(), "{bad}");
        }
    }

    #[test]
    fn tensor_bytes_refuses_what_overflows_and_what_ends_inside_a_byte() {
        assert_eq!(DType::Bf16.tensor_bytes(&[3, 5]), Some(30));
        assert_eq!(DType::F32.tensor_bytes(&[]), Some(4));
        assert_eq!(DType::F32.tensor_bytes(&[0, u64::MAX, 2]), Some(0));
        assert_eq!(DType::Bf16.tensor_bytes(&[1 << 32, 1 << 32]), None);
        assert_eq!(DType::F64.tensor_bytes(&[1 << 62]), None);
        assert_eq!(DType::F4.tensor_bytes(&[3]), None);
    }
}
