//! Descriptions of matrices for the copy engine of a GPU.

use std::ffi::{c_uint, c_void};

use cudarc::driver::sys::CUdeviceptr;
use tightfit_kernels::cuda::linear::TileMap;

use super::{Api, Context, unavailable};
use crate::device::DeviceError;

/// A `CUtensorMap`: what it holds is the driver's own.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct TensorMap([u64; 16]);

/// `cuTensorMapEncodeTiled`, its enumerations as the integers that they are in C.
pub(super) type EncodeTiled = unsafe extern "C" fn(
    *mut TensorMap,
    c_uint,
    c_uint,
    *mut c_void,
    *const u64,
    *const u64,
    *const c_uint,
    *const c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
) -> c_uint;

/// As libraries are asked for it.
pub(super) const NAME: &[u8] = b"cuTensorMapEncodeTiled\0";
/// `CU_TENSOR_MAP_L2_PROMOTION_L2_128B`.
const TO_128_BYTES: c_uint = 2;

impl TensorMap {
    /// Of the matrix at an address of the context's device. Nothing is read or written there.
    ///
    /// # Errors
    /// Where the driver is older than CUDA 12, and where it refuses.
    pub(super) fn new(
        context: &Context,
        address: CUdeviceptr,
        of: &TileMap,
    ) -> Result<TensorMap, DeviceError> {
        let api: &Api = context.api;
        let encode = api.encode_tiled.ok_or_else(|| {
            let reason =
                "the NVIDIA driver has no cuTensorMapEncodeTiled: it is older than CUDA 12"
                    .to_owned();
            unavailable(context.name(), reason)
        })?;
        let mut map = TensorMap([0; 16]);
        // SAFETY: two extents, one stride and two element strides for two dimensions; all outlive the call,
        // which writes `map` and keeps none of them. The address is not followed.
        let code = unsafe {
            encode(
                &raw mut map,
                // Unsigned integers of 8 and of 16 bits are 0 and 1.
                of.element_bytes.saturating_sub(1),
                2,
                address as *mut c_void,
                [of.columns, of.rows].as_ptr(),
                &raw const of.row_bytes,
                of.tile.as_ptr(),
                [1, 1].as_ptr(),
                0,
                // 32, 64 and 128 bytes are 1, 2 and 3.
                (of.swizzle / 16).max(1).ilog2(),
                TO_128_BYTES,
                0,
            )
        };
        context.check("cuTensorMapEncodeTiled", 0, code)?;
        Ok(map)
    }
}
