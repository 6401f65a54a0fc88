//! Launches that may begin before the one before them in their stream has ended: NVIDIA's programmatic dependent
//! launch. Kernels that know it wait themselves, once they have begun and read what nobody writes.

use std::ffi::{c_int, c_uint, c_void};
use std::ptr;

use cudarc::driver::sys::{CUfunction, CUstream};

use super::kernels::Shape;
use super::{Api, Context};
use crate::device::DeviceError;

/// `cuLaunchKernelEx`.
pub(super) type LaunchEx = unsafe extern "C" fn(
    *const LaunchConfig,
    CUfunction,
    *mut *mut c_void,
    *mut *mut c_void,
) -> c_uint;

/// As libraries are asked for it.
pub(super) const NAME: &[u8] = b"cuLaunchKernelEx\0";

/// `CUlaunchConfig`.
#[repr(C)]
pub(super) struct LaunchConfig {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared_bytes: c_uint,
    stream: CUstream,
    attributes: *const LaunchAttribute,
    count: c_uint,
}

/// `CUlaunchAttribute`, whose value is a union of 64 bytes.
#[repr(C)]
struct LaunchAttribute {
    id: c_uint,
    pad: [u8; 4],
    value: [u64; 8],
}

/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`, allowed.
static OVERLAPPING: LaunchAttribute = LaunchAttribute {
    id: 6,
    pad: [0; 4],
    value: [1, 0, 0, 0, 0, 0, 0, 0],
};

/// CUDA 12.3, from which on such launches can be captured in graphs.
const CAPTURED_FROM: c_int = 12_030;

/// Whether the driver has such launches, and kernels for this compute capability wait themselves.
///
/// # Errors
/// The driver's.
pub(super) fn is_possible(
    context: &Context,
    compute_capability: (u32, u32),
) -> Result<bool, DeviceError> {
    let api: &Api = context.api;
    if api.launch_ex.is_none()
        || !tightfit_kernels::cuda::linear::waits_for_earlier_launches(compute_capability)
    {
        return Ok(false);
    }
    let mut version = 0;
    // SAFETY: `version` outlives the call.
    let code = unsafe { (api.cuDriverGetVersion)(&raw mut version) };
    context.check("cuDriverGetVersion", 0, code)?;
    Ok(version >= CAPTURED_FROM)
}

/// Launches so; `None` where the driver cannot.
///
/// # Safety
/// As `cuLaunchKernel`, of a kernel that waits itself before it reads what earlier launches of the stream may
/// write, and before it writes.
pub(super) unsafe fn launch(
    api: &Api,
    function: CUfunction,
    shape: Shape,
    stream: CUstream,
    arguments: *mut *mut c_void,
) -> Option<c_uint> {
    let launch = api.launch_ex?;
    let config = LaunchConfig {
        grid: [shape.grid, 1, 1],
        block: [shape.threads, 1, 1],
        shared_bytes: shape.shared_bytes,
        stream,
        attributes: &raw const OVERLAPPING,
        count: 1,
    };
    // SAFETY: the configuration outlives the call, which copies it; the rest is the caller's promise.
    Some(unsafe { launch(&raw const config, function, arguments, ptr::null_mut()) })
}
