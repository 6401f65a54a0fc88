//! The driver itself, its devices and their contexts.

use std::ffi::{CStr, c_char};

use crate::books::{
    INVALID_CONTEXT, INVALID_DEVICE, INVALID_VALUE, Kind, NO_DEVICE, books, call, exchange_mode,
    pop, push, top,
};
use crate::products::GPU;

/// `CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED`.
const VIRTUAL_MEMORY: u32 = 102;
/// `CU_DEVICE_ATTRIBUTE_INTEGRATED`.
const INTEGRATED: u32 = 18;
/// `CU_DEVICE_ATTRIBUTE_NUMA_CONFIG`, which drivers of CUDA 12.2 and later have.
const NUMA_CONFIG: u32 = 130;
/// `CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT`.
const MULTIPROCESSORS: u32 = 16;
/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR`, and `_MINOR`.
const CAPABILITY: [u32; 2] = [75, 76];

/// `cuInit`.
#[unsafe(no_mangle)]
pub extern "C" fn cuInit(_: u32) -> u32 {
    call("cuInit", Kind::Takes, |books| {
        books.initialized = true;
        if books.devices.is_empty() {
            return Err(NO_DEVICE);
        }
        Ok(())
    })
}

/// `cuGetErrorName`. Not counted: it is asked for after failures only.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(code: u32, out: *mut *const c_char) -> u32 {
    let name: &'static CStr = match code {
        1 => c"CUDA_ERROR_INVALID_VALUE",
        2 => c"CUDA_ERROR_OUT_OF_MEMORY",
        3 => c"CUDA_ERROR_NOT_INITIALIZED",
        100 => c"CUDA_ERROR_NO_DEVICE",
        101 => c"CUDA_ERROR_INVALID_DEVICE",
        201 => c"CUDA_ERROR_INVALID_CONTEXT",
        222 => c"CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
        719 => c"CUDA_ERROR_LAUNCH_FAILED",
        803 => c"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
        _ => return INVALID_VALUE,
    };
    // SAFETY: the caller's pointer to the result.
    unsafe { out.write(name.as_ptr()) };
    0
}

/// `cuDeviceGetCount`.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(out: *mut i32) -> u32 {
    call("cuDeviceGetCount", Kind::Takes, |books| {
        // SAFETY: the caller's pointer to the result.
        unsafe { out.write(books.devices.len() as i32) };
        Ok(())
    })
}

/// `cuDeviceGet`.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(out: *mut i32, ordinal: i32) -> u32 {
    call("cuDeviceGet", Kind::Takes, |books| {
        if usize::try_from(ordinal).is_ok_and(|ordinal| ordinal < books.devices.len()) {
            // SAFETY: the caller's pointer to the result.
            unsafe { out.write(ordinal) };
            return Ok(());
        }
        books.fault(format!("cuDeviceGet of device {ordinal}"));
        Err(INVALID_DEVICE)
    })
}

/// `cuDriverGetVersion`.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(out: *mut i32) -> u32 {
    call("cuDriverGetVersion", Kind::Takes, |books| {
        // SAFETY: the caller's pointer to the result.
        unsafe { out.write(books.setup.version) };
        Ok(())
    })
}

/// `cuDeviceGetAttribute`.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(out: *mut i32, attribute: u32, _: i32) -> u32 {
    call("cuDeviceGetAttribute", Kind::Takes, |books| {
        let (major, minor) = GPU.compute_capability;
        let value = match attribute {
            VIRTUAL_MEMORY => u32::from(books.setup.virtual_memory),
            MULTIPROCESSORS => GPU.multiprocessors,
            INTEGRATED => u32::from(books.setup.integrated),
            NUMA_CONFIG if books.setup.version >= 12_020 => u32::from(books.setup.numa_node),
            NUMA_CONFIG => return Err(INVALID_VALUE),
            _ if attribute == CAPABILITY[0] => major,
            _ if attribute == CAPABILITY[1] => minor,
            _ => return Err(books.fault(format!("cuDeviceGetAttribute of {attribute}"))),
        };
        // SAFETY: the caller's pointer to the result.
        unsafe { out.write(value as i32) };
        Ok(())
    })
}

/// `cuDevicePrimaryCtxRetain`. A context is the number of its device plus one.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(out: *mut usize, device: i32) -> u32 {
    call("cuDevicePrimaryCtxRetain", Kind::Takes, |books| {
        let gpu = books
            .devices
            .get_mut(device as usize)
            .ok_or(INVALID_DEVICE)?;
        gpu.retained += 1;
        // SAFETY: the caller's pointer to the result.
        unsafe { out.write(device as usize + 1) };
        Ok(())
    })
}

/// `cuDevicePrimaryCtxRelease_v2`.
#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(device: i32) -> u32 {
    call(
        "cuDevicePrimaryCtxRelease",
        Kind::GivesBack,
        |books| match books.devices.get_mut(device as usize) {
            Some(gpu) if gpu.retained > 0 => {
                gpu.retained -= 1;
                Ok(())
            }
            _ => Err(books.fault("a context released that was not retained".to_owned())),
        },
    )
}

/// `cuThreadExchangeStreamCaptureMode`.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuThreadExchangeStreamCaptureMode(mode: *mut u32) -> u32 {
    call("cuThreadExchangeStreamCaptureMode", Kind::GivesBack, |_| {
        // SAFETY: the caller's pointer to the mode.
        unsafe { mode.write(exchange_mode(mode.read())) };
        Ok(())
    })
}

/// `cuCtxGetCurrent`.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetCurrent(out: *mut usize) -> u32 {
    call("cuCtxGetCurrent", Kind::Takes, |_| {
        // SAFETY: the caller's pointer to the result.
        unsafe { out.write(top().map_or(0, |device| device + 1)) };
        Ok(())
    })
}

/// `cuCtxPushCurrent_v2`.
#[unsafe(no_mangle)]
pub extern "C" fn cuCtxPushCurrent_v2(context: usize) -> u32 {
    call("cuCtxPushCurrent", Kind::Takes, |books| {
        let gpu = context
            .checked_sub(1)
            .and_then(|device| books.devices.get(device));
        if gpu.is_none_or(|gpu| gpu.retained == 0) {
            books.fault("a context made current that is not retained".to_owned());
            return Err(INVALID_CONTEXT);
        }
        push(context - 1);
        Ok(())
    })
}

/// `cuCtxPopCurrent_v2`.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxPopCurrent_v2(out: *mut usize) -> u32 {
    call("cuCtxPopCurrent", Kind::GivesBack, |books| {
        let Some(device) = pop() else {
            books.fault("cuCtxPopCurrent of an empty stack".to_owned());
            return Err(INVALID_CONTEXT);
        };
        // SAFETY: the caller's pointer to the result.
        unsafe { out.write(device + 1) };
        Ok(())
    })
}

/// For tests: starts new books. The text of a [`crate::setup::Setup`].
///
/// # Safety
/// `len` bytes of text at `text`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stand_in_start(text: *const u8, len: usize) -> u32 {
    // SAFETY: as the caller promises.
    let text = unsafe { std::slice::from_raw_parts(text, len) };
    let setup = std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.parse().ok());
    let Some(setup) = setup else {
        return INVALID_VALUE;
    };
    *books() = Some(crate::books::Books::new(setup));
    0
}

/// For tests: hands the report to `take`.
///
/// # Safety
/// `take` is a function that reads `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stand_in_report(
    take: unsafe extern "C" fn(*mut std::ffi::c_void, *const u8, usize),
    target: *mut std::ffi::c_void,
) {
    let mut text = books()
        .as_ref()
        .map(crate::books::Books::report)
        .unwrap_or_default();
    if pop().is_some() {
        text += "\nleak a context is left current";
    }
    // SAFETY: as the caller promises.
    unsafe { take(target, text.as_ptr(), text.len()) };
}

/// For tests: others take `bytes` of a device, from now on and in all.
#[unsafe(no_mangle)]
pub extern "C" fn stand_in_take(device: usize, bytes: u64) {
    if let Some(books) = &mut *books()
        && let Some(gpu) = books.devices.get_mut(device)
    {
        gpu.taken = bytes;
    }
}
