//! Python's side of DLPack: capsules, each the owner of what it holds until a consumer takes that.
#![allow(unsafe_code)] // PyO3 has no capsule whose contents a consumer may take.

use std::ffi::CStr;

use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use tightfit::dlpack::{DLDevice, DLManagedTensor, DLManagedTensorVersioned, Exported};

const VERSIONED: &CStr = c"dltensor_versioned";
const UNVERSIONED: &CStr = c"dltensor";

/// `kDLCUDA`.
const CUDA: i32 = 2;

/// Checks what a consumer asks for beside the tensor as it is.
///
/// # Errors
/// `BufferError` for a copy, another device, or a stream that cannot be.
pub(crate) fn check(
    device: DLDevice,
    stream: Option<i64>,
    dl_device: Option<(i32, i32)>,
    copy: Option<bool>,
) -> PyResult<()> {
    let refuse = |message: String| Err(PyBufferError::new_err(message));
    if copy == Some(true) {
        return refuse("it is exported in place: copy it once it is imported".to_owned());
    }
    let own = (device.device_type, device.device_id);
    if let Some(other) = dl_device.filter(|&other| other != own) {
        return refuse(format!("it lies on DLPack's device {own:?}, not {other:?}"));
    }
    match stream {
        None | Some(-1) => Ok(()),
        // The default streams, and a stream's address. 0 would be either of the former.
        Some(stream) if device.device_type == CUDA && stream > 0 => Ok(()),
        Some(stream) => refuse(format!("{stream} is no stream of its device")),
    }
}

/// A capsule that owns an exported tensor; `raw`: as unsigned integers of its elements' size.
pub(crate) fn capsule(
    py: Python<'_>,
    exported: Exported,
    versioned: bool,
    raw: bool,
) -> PyResult<Bound<'_, PyAny>> {
    /// `kDLUInt`.
    const UNSIGNED: u8 = 1;
    let (pointer, name, free): (*mut std::ffi::c_void, _, ffi::PyCapsule_Destructor) =
        match versioned {
            true => (exported.into_versioned().cast(), VERSIONED, free_versioned),
            false => (
                exported.into_unversioned().cast(),
                UNVERSIONED,
                free_unversioned,
            ),
        };
    if raw {
        // SAFETY: it came from `Exported` in this form, and nobody else has it yet.
        let tensor = unsafe {
            match versioned {
                true => &mut (*pointer.cast::<DLManagedTensorVersioned>()).dl_tensor,
                false => &mut (*pointer.cast::<DLManagedTensor>()).dl_tensor,
            }
        };
        tensor.dtype.code = UNSIGNED;
    }
    // SAFETY: the pointer is not NULL, the name lives as long as the program, and the destructor is the
    // one for what the pointer points to.
    let capsule = unsafe {
        let capsule = ffi::PyCapsule_New(pointer, name.as_ptr(), Some(free));
        Bound::from_owned_ptr_or_err(py, capsule)
    };
    if capsule.is_err() {
        // SAFETY: nobody else has it, and it came from `Exported` in this form.
        unsafe {
            match versioned {
                true => delete_versioned(pointer.cast()),
                false => delete_unversioned(pointer.cast()),
            }
        }
    }
    capsule
}

/// # Safety
/// `managed` came from [`Exported::into_versioned`] and has not been freed.
unsafe fn delete_versioned(managed: *mut DLManagedTensorVersioned) {
    // SAFETY: as the caller promises.
    unsafe {
        if let Some(delete) = (*managed).deleter {
            delete(managed);
        }
    }
}

/// # Safety
/// `managed` came from [`Exported::into_unversioned`] and has not been freed.
unsafe fn delete_unversioned(managed: *mut DLManagedTensor) {
    // SAFETY: as the caller promises.
    unsafe {
        if let Some(delete) = (*managed).deleter {
            delete(managed);
        }
    }
}

/// Frees what nobody took: a consumer that takes a tensor renames its capsule.
unsafe extern "C" fn free_versioned(capsule: *mut ffi::PyObject) {
    // SAFETY: called by Python with a capsule of `capsule`, which holds what it was made of as long as it
    // has its name.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, VERSIONED.as_ptr()) == 1 {
            let pointer = ffi::PyCapsule_GetPointer(capsule, VERSIONED.as_ptr());
            delete_versioned(pointer.cast());
        }
    }
}

/// The same for the form before DLPack 1.0.
unsafe extern "C" fn free_unversioned(capsule: *mut ffi::PyObject) {
    // SAFETY: as in `free_versioned`.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, UNVERSIONED.as_ptr()) == 1 {
            let pointer = ffi::PyCapsule_GetPointer(capsule, UNVERSIONED.as_ptr());
            delete_unversioned(pointer.cast());
        }
    }
}
