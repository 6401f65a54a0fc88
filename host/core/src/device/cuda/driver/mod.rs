//! The part of NVIDIA's driver interface that we call, behind functions that are safe to use.
//!
//! The only place in this crate with `unsafe`: a driver is a C library. Whatever is taken from it is
//! owned by a type that gives it back when dropped, and whatever the driver may still be reading
//! cannot be reached until it is done.

mod context;
mod experts;
mod kernels;
mod launch;
mod memory;
mod multiply;
mod overlap;
mod page_locked;
mod quantize;
mod queue;
mod stream;
mod tiles;
mod transfer;

use std::ffi::{CStr, c_char, c_int, c_uchar, c_uint, c_ulonglong, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys;
use sys::{
    CUcontext, CUdevice, CUdeviceptr, CUevent, CUfunction, CUmemAccessDesc, CUmemAllocationProp,
    CUmemGenericAllocationHandle, CUmodule, CUstream,
};

use super::super::DeviceError;

pub(super) use context::Context;
pub(super) use kernels::KernelModule;
pub(super) use memory::DeviceMemory;
pub(super) use multiply::KernelMultiplier;
use overlap::LaunchEx;
pub(super) use page_locked::CudaPageLocked;
pub(super) use quantize::{KernelQuantizer, WorkspaceMemory};
pub(super) use queue::{CudaQueue, Kept};
use tiles::EncodeTiled;
pub(super) use transfer::Staging;

/// `CUDA_ERROR_INVALID_VALUE`.
const INVALID_VALUE: c_uint = 1;
/// `CUDA_ERROR_OUT_OF_MEMORY`.
const OUT_OF_MEMORY: c_uint = 2;
/// `CUDA_ERROR_NOT_READY`.
const NOT_READY: c_uint = 600;
/// `CUDA_ERROR_NOT_SUPPORTED`.
const NOT_SUPPORTED: c_uint = 801;
/// `CUDA_ERROR_STREAM_CAPTURE_IMPLICIT`.
const CAPTURE_IMPLICIT: c_uint = 906;
/// `CUDA_ERROR_NO_DEVICE`.
const NO_DEVICE: c_uint = 100;

macro_rules! api {
    ($($name:ident($($argument:ty),*);)*) => {
        /// The driver's functions.
        ///
        /// Looked up here and not through cudarc's wrappers, which panic for one that is missing,
        /// and return an enum: a driver newer than that enum may answer with what is none of its
        /// values.
        #[expect(non_snake_case, reason = "the driver's own names")]
        struct Api {
            $($name: unsafe extern "C" fn($($argument),*) -> c_uint,)*
            /// Which only drivers from CUDA 12 on have.
            encode_tiled: Option<EncodeTiled>,
            /// Which only drivers from CUDA 11.8 on have.
            launch_ex: Option<LaunchEx>,
        }

        impl Api {
            /// All functions, or the name of one that the library lacks.
            fn look_up() -> Result<Api, &'static str> {
                // SAFETY: opens the library by its well-known name, and runs what it runs when it
                // is opened. The caller has found out that it can be opened.
                let library = unsafe { sys::culib() };
                Ok(Api {
                    $($name: {
                        // SAFETY: the signature is the one in NVIDIA's cuda.h for this name, with
                        // the enum that it returns as the integer that it is in C. The library is
                        // never closed.
                        let symbol = unsafe {
                            library.get::<unsafe extern "C" fn($($argument),*) -> c_uint>(
                                concat!(stringify!($name), "\0").as_bytes(),
                            )
                        };
                        *symbol.map_err(|_| stringify!($name))?
                    },)*
                    encode_tiled: {
                        // SAFETY: as above.
                        let symbol = unsafe { library.get::<EncodeTiled>(tiles::NAME) };
                        symbol.ok().map(|symbol| *symbol)
                    },
                    launch_ex: {
                        // SAFETY: as above.
                        let symbol = unsafe { library.get::<LaunchEx>(overlap::NAME) };
                        symbol.ok().map(|symbol| *symbol)
                    },
                })
            }
        }
    };
}

api! {
    cuInit(c_uint);
    cuDriverGetVersion(*mut c_int);
    cuGetErrorName(c_uint, *mut *const c_char);
    cuDeviceGetCount(*mut c_int);
    cuDeviceGet(*mut CUdevice, c_int);
    cuDeviceGetAttribute(*mut c_int, c_uint, CUdevice);
    cuDevicePrimaryCtxRetain(*mut CUcontext, CUdevice);
    cuDevicePrimaryCtxRelease_v2(CUdevice);
    cuCtxGetCurrent(*mut CUcontext);
    cuCtxPushCurrent_v2(CUcontext);
    cuCtxPopCurrent_v2(*mut CUcontext);
    cuMemGetInfo_v2(*mut usize, *mut usize);
    cuMemGetAllocationGranularity(*mut usize, *const CUmemAllocationProp, c_uint);
    cuMemAddressReserve(*mut CUdeviceptr, usize, usize, CUdeviceptr, c_ulonglong);
    cuMemAddressFree(CUdeviceptr, usize);
    cuMemCreate(*mut CUmemGenericAllocationHandle, usize, *const CUmemAllocationProp, c_ulonglong);
    cuMemRelease(CUmemGenericAllocationHandle);
    cuMemMap(CUdeviceptr, usize, usize, CUmemGenericAllocationHandle, c_ulonglong);
    cuMemUnmap(CUdeviceptr, usize);
    cuMemSetAccess(CUdeviceptr, usize, *const CUmemAccessDesc, usize);
    cuMemAlloc_v2(*mut CUdeviceptr, usize);
    cuMemFree_v2(CUdeviceptr);
    cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
    cuMemFreeHost(*mut c_void);
    cuMemHostRegister_v2(*mut c_void, usize, c_uint);
    cuMemHostUnregister(*mut c_void);
    cuMemcpyHtoDAsync_v2(CUdeviceptr, *const c_void, usize, CUstream);
    cuMemcpyDtoH_v2(*mut c_void, CUdeviceptr, usize);
    cuMemcpyDtoHAsync_v2(*mut c_void, CUdeviceptr, usize, CUstream);
    cuMemcpyDtoDAsync_v2(CUdeviceptr, CUdeviceptr, usize, CUstream);
    cuMemsetD8Async(CUdeviceptr, c_uchar, usize, CUstream);
    cuMemsetD32Async(CUdeviceptr, c_uint, usize, CUstream);
    cuStreamCreate(*mut CUstream, c_uint);
    cuStreamDestroy_v2(CUstream);
    cuStreamSynchronize(CUstream);
    cuStreamIsCapturing(CUstream, *mut c_uint);
    cuStreamWaitEvent(CUstream, CUevent, c_uint);
    cuEventCreate(*mut CUevent, c_uint);
    cuEventDestroy_v2(CUevent);
    cuEventRecord(CUevent, CUstream);
    cuEventQuery(CUevent);
    cuThreadExchangeStreamCaptureMode(*mut c_uint);
    cuEventSynchronize(CUevent);
    cuModuleLoadData(*mut CUmodule, *const c_void);
    cuModuleUnload(CUmodule);
    cuModuleGetFunction(*mut CUfunction, CUmodule, *const c_char);
    cuFuncSetAttribute(CUfunction, c_uint, c_int);
    cuLaunchKernel(
        CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, CUstream,
        *mut *mut c_void, *mut *mut c_void
    );
}

impl Api {
    /// The driver, initialized.
    fn get(device: &str) -> Result<&'static Api, DeviceError> {
        static API: OnceLock<Api> = OnceLock::new();
        let api = match API.get() {
            Some(api) => api,
            None => {
                let api = load().map_err(|reason| unavailable(device, reason))?;
                API.get_or_init(|| api)
            }
        };
        // SAFETY: takes no pointers. Allowed any number of times and from any thread.
        match unsafe { (api.cuInit)(0) } {
            0 => Ok(api),
            NO_DEVICE => Err(unavailable(
                device,
                "the NVIDIA driver finds no device".to_owned(),
            )),
            code => Err(unavailable(
                device,
                format!(
                    "the NVIDIA driver cannot be started: cuInit says {}",
                    api.error_name(code)
                ),
            )),
        }
    }

    /// The driver's own name for an error.
    fn error_name(&self, code: c_uint) -> String {
        let mut name = std::ptr::null();
        // SAFETY: `name` outlives the call, which writes a pointer to static text or null there.
        let answer = unsafe { (self.cuGetErrorName)(code, &raw mut name) };
        if answer != 0 || name.is_null() {
            return format!("error {code}");
        }
        // SAFETY: not null, so text of the driver's that ends in a zero and is never freed.
        let name = unsafe { CStr::from_ptr(name) };
        name.to_string_lossy().into_owned()
    }

    /// What a call has answered.
    fn check(
        &self,
        device: &str,
        call: &'static str,
        bytes: u64,
        code: c_uint,
    ) -> Result<(), DeviceError> {
        if code == 0 {
            return Ok(());
        }
        Err(DeviceError::Driver {
            device: device.to_owned(),
            call,
            bytes,
            error: self.error_name(code),
            out_of_memory: code == OUT_OF_MEMORY,
        })
    }

    /// The same where there is nobody to tell: something is being given back.
    fn check_release(&self, device: &str, call: &'static str, code: c_uint) {
        if let Err(error) = self.check(device, call, 0, code) {
            tracing::warn!("{error}");
        }
    }
}

/// Opens the library and finds our functions in it; the reason where that cannot be done.
fn load() -> Result<Api, String> {
    // SAFETY: opens and closes the library by its well-known name.
    if !unsafe { sys::is_culib_present() } {
        return Err("there is no NVIDIA driver (libcuda) on this machine".to_owned());
    }
    Api::look_up().map_err(|missing| {
        format!("the NVIDIA driver is too old: it lacks {missing} (drivers for CUDA 10.2 and later have it)")
    })
}

/// How many devices the driver has.
pub(super) fn device_count() -> Result<u32, DeviceError> {
    let api = Api::get("cuda")?;
    let mut count = 0;
    // SAFETY: `count` outlives the call.
    let code = unsafe { (api.cuDeviceGetCount)(&raw mut count) };
    api.check("cuda", "cuDeviceGetCount", 0, code)?;
    Ok(u32::try_from(count).unwrap_or(0))
}

fn unavailable(device: &str, reason: String) -> DeviceError {
    DeviceError::Unavailable {
        device: device.to_owned(),
        reason,
    }
}

/// Tries what gives something back a second time: an error that passes must not leave it behind.
fn twice<T>(attempt: impl Fn() -> Result<T, DeviceError>) -> Result<T, DeviceError> {
    attempt().or_else(|error| {
        tracing::warn!("{error}, trying again");
        attempt()
    })
}
