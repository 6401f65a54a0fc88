//! Memory for those who outlive a model or stand beside it: tensors for other libraries, and what is
//! reserved behind the weights.

use std::ffi::c_char;

use tightfit::device::DeviceError;
use tightfit::dlpack::{DLManagedTensor, DLManagedTensorVersioned, Exported};
use tightfit::model::TailAllocation;
use tightfit::status::Status;
use tightfit::types::DType;

use crate::TightfitStatus;
use crate::boundary::{
    Error, Growing, array, call, give, give_pointer, object, take, take_value, text, write_sized,
};
use crate::model::{TightfitModel, part_kind};

/// A piece of the memory that a model has reserved behind its weights. It keeps its device's memory
/// when the model is unloaded.
pub struct TightfitAllocation {
    inner: TailAllocation,
    /// The first byte in host memory, or NULL.
    host: *mut u8,
}

/// Where an allocation is. Growing as TightfitTensor.
#[repr(C)]
pub struct TightfitMemory {
    /// Set by the caller: sizeof(TightfitMemory).
    pub struct_size: usize,
    /// Length in bytes.
    pub length: u64,
    /// Its address in a GPU's memory, valid in the device's primary context; 0 for host memory.
    pub device_address: u64,
    /// Its bytes to read and write, in host memory; otherwise NULL.
    pub host: *mut u8,
}

// SAFETY: `repr(C)`, begins with a `usize`, and holds numbers and a pointer.
unsafe impl Growing for TightfitMemory {
    const FIRST: usize = size_of::<TightfitMemory>();
}

/// One part (TIGHTFIT_PART_...) of a tensor for PyTorch, NumPy and others, in place: a DLPack tensor
/// in the form since DLPack 1.0, in Python the capsule "dltensor_versioned". It must not be written
/// to, and says so. A part of kind DATA has the tensor's type and shape; codes are uint8 [bytes, 1],
/// scales float `[blocks]`, or uint8 under double quantization. On success the caller calls
/// `(*out)->deleter(*out)` once, from any thread, also after the model is unloaded: its device's
/// memory is kept until then. Otherwise `*out` is NULL.
///
/// # Safety
/// `model` is loaded; `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_tensor_to_dlpack(
    model: *const TightfitModel,
    tensor: usize,
    kind: u32,
    out: *mut *mut DLManagedTensorVersioned,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let make = || Ok(unsafe { export(model, tensor, kind) }?.into_versioned());
        // SAFETY: as the caller promises.
        unsafe { give_pointer(out, "out", make) }
    })
}

/// The same in the form before DLPack 1.0, in Python the capsule "dltensor", which cannot say that it
/// must not be written to.
///
/// # Safety
/// `model` is loaded; `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_tensor_to_dlpack_unversioned(
    model: *const TightfitModel,
    tensor: usize,
    kind: u32,
    out: *mut *mut DLManagedTensor,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let make = || Ok(unsafe { export(model, tensor, kind) }?.into_unversioned());
        // SAFETY: as the caller promises.
        unsafe { give_pointer(out, "out", make) }
    })
}

/// # Safety
/// `model` is NULL or loaded.
unsafe fn export(model: *const TightfitModel, tensor: usize, kind: u32) -> Result<Exported, Error> {
    // SAFETY: as the caller promises.
    let tensor = unsafe { object(model, "model") }?.tensor(tensor)?;
    let kind = part_kind(tensor, kind)?.kind;
    tensor.to_dlpack(kind).map_err(Error::usage)
}

/// Takes `bytes` bytes of what was reserved behind the weights of a device (`reserve_headroom` of
/// TightfitLoadOptions), at a multiple of 256. On success `*out` is for tightfit_allocation_free or
/// tightfit_allocation_to_dlpack; otherwise it is NULL. TIGHTFIT_STATUS_DEVICE if no free piece is
/// large enough.
///
/// # Safety
/// `model` is loaded; `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_model_allocate(
    model: *const TightfitModel,
    device: usize,
    bytes: u64,
    out: *mut *mut TightfitAllocation,
) -> TightfitStatus {
    call(|| {
        let allocate = || {
            // SAFETY: as the caller promises.
            let tail = unsafe { object(model, "model") }?.tail(device)?;
            let mut inner = tail
                .allocate(bytes)
                .map_err(|error: DeviceError| Error::new(Status::Device, error))?;
            let host = inner.host_mut().map(<[u8]>::as_mut_ptr);
            Ok(TightfitAllocation {
                host: host.unwrap_or(std::ptr::null_mut()),
                inner,
            })
        };
        // SAFETY: as the caller promises.
        unsafe { give(out, "out", allocate) }
    })
}

/// Where an allocation is.
///
/// # Safety
/// `allocation` has not been given back; `out` points to a structure whose `struct_size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_allocation_memory(
    allocation: *const TightfitAllocation,
    out: *mut TightfitMemory,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let allocation = unsafe { object(allocation, "allocation") }?;
        let make = |struct_size| {
            let address = allocation.inner.address();
            Ok(TightfitMemory {
                struct_size,
                length: allocation.inner.bytes(),
                device_address: address.map_or(0, |address| address.pointer),
                host: allocation.host,
            })
        };
        // SAFETY: as the caller promises.
        unsafe { write_sized(out, "out", make) }
    })
}

/// Makes an allocation a DLPack tensor of this type (as safetensors names it, for example "BF16") and
/// row-major shape, to which others may write, and sets `*allocation` to NULL: its deleter gives it
/// back. On failure it is given back at once, and `*out` is NULL.
///
/// # Safety
/// `*allocation` has not been given back, and no other call uses it now or later; `dtype` is
/// NUL-terminated; `shape` has `rank` numbers; `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_allocation_to_dlpack(
    allocation: *mut *mut TightfitAllocation,
    dtype: *const c_char,
    shape: *const u64,
    rank: usize,
    out: *mut *mut DLManagedTensorVersioned,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let allocation = unsafe { take_value(allocation) };
        let make = || {
            let allocation = allocation.ok_or_else(|| Error::usage("allocation is NULL"))?;
            // SAFETY: as the caller promises.
            let name = unsafe { text(dtype, "dtype") }?;
            let dtype = DType::from_safetensors_name(name)
                .ok_or_else(|| Error::usage(format_args!("there is no element type '{name}'")))?;
            // SAFETY: as the caller promises.
            let shape = unsafe { array(shape, rank, "shape") }?;
            let exported = allocation.inner.into_dlpack(dtype, shape);
            Ok(exported.map_err(Error::usage)?.into_versioned())
        };
        // SAFETY: as the caller promises.
        unsafe { give_pointer(out, "out", make) }
    })
}

/// Gives an allocation back and sets `*allocation` to NULL. Kernels that use it must have ended. NULL,
/// or a pointer to NULL, does nothing.
///
/// # Safety
/// `*allocation` has not been given back, and no other call uses it now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_allocation_free(allocation: *mut *mut TightfitAllocation) {
    // SAFETY: as the caller promises.
    unsafe { take(allocation) }
}
