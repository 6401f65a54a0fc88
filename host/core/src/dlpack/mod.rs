//! Loaded tensors for PyTorch, NumPy, JAX and others, without a copy: the DLPack interface.
//!
//! A plain tensor is exported with its shape and type; a 4-bit weight part by part, as bitsandbytes
//! holds them: codes `u8 [bytes, 1]`, scales `f32 [blocks]` (or `u8` under double quantization),
//! nested scales `f32`. What is exported keeps its device's memory until the consumer frees it,
//! whatever becomes of the model. Weights are shared by everyone who looks them up: consumers must
//! not write to them, and the versioned form says so.
//!
//! All transfers have ended when a load returns, so that consumers need not wait for a stream.

#[allow(unsafe_code)] // C calls back to free what it was given; see there.
mod abi;
#[cfg(test)]
mod tests;

use std::any::Any;

pub use abi::{
    DLDataType, DLDevice, DLManagedTensor, DLManagedTensorVersioned, DLPACK_FLAG_BITMASK_READ_ONLY,
    DLPACK_VERSION, DLPackVersion, DLTensor,
};

use crate::device::DeviceAddress;
use crate::model::{SharedPart, Stacked, TailAllocation, Tensor};
use crate::plan::PartKind;
use crate::types::{Bytes, DType, Format};

/// `kDLCPU`.
const CPU: i32 = 1;
/// `kDLCUDA`.
const CUDA: i32 = 2;

/// Why a tensor cannot be exported.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DlpackError {
    /// The tensor's format has no such part.
    #[error("tensor '{tensor}' is stored as {format} and has no part of kind {kind:?}")]
    NoSuchPart {
        /// The tensor.
        tensor: String,
        /// How it is stored.
        format: Format,
        /// The part asked for.
        kind: PartKind,
    },
    /// DLPack has no such element type, or none that consumers read.
    #[error("{what}: {dtype} elements have no type in DLPack that others read")]
    NoType {
        /// The tensor or memory.
        what: String,
        /// Its element type.
        dtype: DType,
    },
    /// DLPack counts in 63 bits.
    #[error("{what}: a dimension of {dimension} is more than DLPack can say")]
    Dimension {
        /// The tensor or memory.
        what: String,
        /// The dimension.
        dimension: u64,
    },
    /// The memory is too small for a tensor of this shape.
    #[error("{what}: a {dtype} tensor of shape {shape:?} needs more than its {}", Bytes(*have))]
    TooSmall {
        /// The memory.
        what: String,
        /// The element type asked for.
        dtype: DType,
        /// The shape asked for.
        shape: Vec<u64>,
        /// Bytes that there are.
        have: u64,
    },
    /// The device gives no address of its memory.
    #[error("{what} lies in memory whose address its device does not give")]
    NoAddress {
        /// The tensor or memory.
        what: String,
    },
}

/// A tensor ready to be given to another library. It keeps its memory; dropping it lets go.
pub struct Exported(abi::Owned);

impl std::fmt::Debug for Exported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Exported")
            .field("device", &self.0.device)
            .field("dtype", &self.0.dtype)
            .field("shape", &self.0.shape)
            .finish_non_exhaustive()
    }
}

impl Exported {
    /// Returns where it is.
    pub fn device(&self) -> DLDevice {
        self.0.device
    }

    /// Returns the address of its first byte in that memory; 0 if it has none.
    pub fn address(&self) -> u64 {
        self.0.data
    }

    /// Returns the form since DLPack 1.0 (`dltensor_versioned` in Python). It is freed by its
    /// `deleter` alone, which can be called from any thread, once.
    pub fn into_versioned(self) -> *mut DLManagedTensorVersioned {
        abi::versioned(self.0)
    }

    /// Returns the form before DLPack 1.0 (`dltensor` in Python), which cannot say that a tensor
    /// must not be written to. Freed as the other.
    pub fn into_unversioned(self) -> *mut DLManagedTensor {
        abi::unversioned(self.0)
    }
}

impl Tensor<'_> {
    /// One part for another library, in place and read-only.
    ///
    /// # Errors
    /// [`DlpackError`].
    pub fn to_dlpack(&self, kind: PartKind) -> Result<Exported, DlpackError> {
        export(self, self.shape(), kind, self.shared_part(kind))
    }
}

impl Stacked<'_> {
    /// One part of all of them for another library, in place and read-only: data [tensors, ..], codes
    /// [bytes, 1], scales \[blocks\].
    ///
    /// # Errors
    /// [`DlpackError`].
    pub fn to_dlpack(&self, kind: PartKind) -> Result<Exported, DlpackError> {
        export(&self.first(), &self.shape(), kind, self.shared_part(kind))
    }
}

/// A part of a tensor, or of several like it that have this shape together.
fn export(
    tensor: &Tensor<'_>,
    shape: &[u64],
    kind: PartKind,
    part: Option<SharedPart>,
) -> Result<Exported, DlpackError> {
    let what = || format!("tensor '{}'", tensor.name());
    let part = part.ok_or_else(|| DlpackError::NoSuchPart {
        tensor: tensor.name().to_owned(),
        format: tensor.format(),
        kind,
    })?;
    let bytes = part.bytes();
    let (dtype, shape) = match kind {
        PartKind::Data => {
            let dtype = match tensor.format() {
                Format::Cast(target) => target,
                Format::Stored | Format::Nf4 { .. } => tensor.dtype(),
            };
            (dtype, shape.to_vec())
        }
        PartKind::Codes => (DType::U8, vec![bytes, 1]),
        PartKind::Absmax if tensor.absmax_mean().is_some() => (DType::U8, vec![bytes]),
        PartKind::Absmax | PartKind::NestedAbsmax => (DType::F32, vec![bytes / 4]),
    };
    let host = part.host().map(|bytes| bytes.as_ptr().expose_provenance());
    let location = locate(&what, bytes, host, part.address())?;
    let described = describe(&what, dtype, &shape)?;
    Ok(Exported(abi::Owned {
        flags: DLPACK_FLAG_BITMASK_READ_ONLY,
        ..owned(location, described, Box::new(part))
    }))
}

impl TailAllocation {
    /// This memory as a tensor of `dtype` and `shape` for another library, which may write to it. It
    /// is given back to the tail when the consumer frees it.
    ///
    /// # Errors
    /// [`DlpackError`].
    pub fn into_dlpack(mut self, dtype: DType, shape: &[u64]) -> Result<Exported, DlpackError> {
        let device = self.device().to_owned();
        let what = || format!("memory of {device}");
        let need = dtype.tensor_bytes(shape);
        let have = self.bytes();
        let Some(need) = need.filter(|&need| need <= have) else {
            return Err(DlpackError::TooSmall {
                what: what(),
                dtype,
                shape: shape.to_vec(),
                have,
            });
        };
        let host = self.host_mut();
        let host = host.map(|bytes| bytes.as_mut_ptr().expose_provenance());
        let location = locate(&what, need, host, self.address())?;
        let described = describe(&what, dtype, shape)?;
        Ok(Exported(owned(location, described, Box::new(self))))
    }
}

/// Device, and address of the first byte; 0 where there are no bytes.
fn locate(
    what: &dyn Fn() -> String,
    bytes: u64,
    host: Option<usize>,
    address: Option<DeviceAddress>,
) -> Result<(DLDevice, u64), DlpackError> {
    let (device_type, device_id, pointer) = match (address, host) {
        (Some(address), _) => (CUDA, address.ordinal as i32, address.pointer),
        (None, Some(pointer)) => (CPU, 0, pointer as u64),
        (None, None) => return Err(DlpackError::NoAddress { what: what() }),
    };
    let device = DLDevice {
        device_type,
        device_id,
    };
    Ok((device, if bytes == 0 { 0 } else { pointer }))
}

/// Type and row-major shape, as DLPack has them.
fn describe(
    what: &dyn Fn() -> String,
    dtype: DType,
    shape: &[u64],
) -> Result<(DLDataType, Vec<i64>), DlpackError> {
    let code = code(dtype).ok_or_else(|| DlpackError::NoType {
        what: what(),
        dtype,
    })?;
    let data_type = DLDataType {
        code,
        bits: dtype.bits() as u8,
        lanes: 1,
    };
    let signed = |&dimension: &u64| {
        i64::try_from(dimension).map_err(|_| DlpackError::Dimension {
            what: what(),
            dimension,
        })
    };
    Ok((
        data_type,
        shape.iter().map(signed).collect::<Result<_, _>>()?,
    ))
}

fn owned(
    (device, data): (DLDevice, u64),
    (dtype, shape): (DLDataType, Vec<i64>),
    owner: Box<dyn Any + Send>,
) -> abi::Owned {
    let mut strides = vec![1i64; shape.len()];
    for axis in (1..shape.len()).rev() {
        // Of a tensor without elements no stride matters, and the product may be too large.
        strides[axis - 1] = strides[axis].saturating_mul(shape[axis].max(1));
    }
    abi::Owned {
        data,
        device,
        dtype,
        shape,
        strides,
        flags: 0,
        _owner: owner,
    }
}

/// `DLDataTypeCode`; `None` for types of less than a byte, whose packing consumers do not agree on.
const fn code(dtype: DType) -> Option<u8> {
    Some(match dtype {
        DType::I8 | DType::I16 | DType::I32 | DType::I64 => 0,
        DType::U8 | DType::U16 | DType::U32 | DType::U64 => 1,
        DType::F16 | DType::F32 | DType::F64 => 2,
        DType::Bf16 => 4,
        DType::C64 => 5,
        DType::Bool => 6,
        DType::F8E4M3 => 10,
        DType::F8E4M3Fnuz => 11,
        DType::F8E5M2 => 12,
        DType::F8E5M2Fnuz => 13,
        DType::F8E8M0 => 14,
        DType::F4 | DType::F6E2M3 | DType::F6E3M2 => return None,
    })
}
