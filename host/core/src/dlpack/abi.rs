//! DLPack's structures as C has them, and what frees them. The only `unsafe` of this module.
//!
//! Source: `include/dlpack/dlpack.h` of DLPack 1.1. The names are its own.

use std::any::Any;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

/// What readers of [`DLManagedTensorVersioned`] have to know: this version's types and devices.
pub const DLPACK_VERSION: DLPackVersion = DLPackVersion { major: 1, minor: 1 };
/// Flag of a tensor that must not be written to.
pub const DLPACK_FLAG_BITMASK_READ_ONLY: u64 = 1;

/// A version of the interface. Another `major` means another layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct DLPackVersion {
    /// Layout.
    pub major: u32,
    /// Values of the enumerations.
    pub minor: u32,
}

/// Where a tensor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct DLDevice {
    /// 1 for host memory, 2 for CUDA.
    pub device_type: i32,
    /// The driver's number of a GPU; 0 for host memory.
    pub device_id: i32,
}

/// Type of the elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct DLDataType {
    /// What kind of number.
    pub code: u8,
    /// Bits of one.
    pub bits: u8,
    /// Numbers in an element; 1 unless it is a vector.
    pub lanes: u16,
}

/// A tensor, without its ownership.
#[derive(Debug)]
#[repr(C)]
pub struct DLTensor {
    /// Its first byte; NULL if it has none.
    pub data: *mut c_void,
    /// Where it is.
    pub device: DLDevice,
    /// Number of dimensions.
    pub ndim: i32,
    /// Type of its elements.
    pub dtype: DLDataType,
    /// `ndim` dimensions in elements.
    pub shape: *mut i64,
    /// `ndim` distances in elements.
    pub strides: *mut i64,
    /// Bytes from `data` to the first element.
    pub byte_offset: u64,
}

/// A tensor with what frees it: the form before DLPack 1.0.
#[derive(Debug)]
#[repr(C)]
pub struct DLManagedTensor {
    /// The tensor.
    pub dl_tensor: DLTensor,
    /// The producer's.
    pub manager_ctx: *mut c_void,
    /// Frees it. Called once, from any thread.
    pub deleter: Option<unsafe extern "C" fn(*mut DLManagedTensor)>,
}

/// A tensor with what frees it: the form since DLPack 1.0.
#[derive(Debug)]
#[repr(C)]
pub struct DLManagedTensorVersioned {
    /// Version of this structure.
    pub version: DLPackVersion,
    /// The producer's.
    pub manager_ctx: *mut c_void,
    /// Frees it. Called once, from any thread.
    pub deleter: Option<unsafe extern "C" fn(*mut DLManagedTensorVersioned)>,
    /// For example [`DLPACK_FLAG_BITMASK_READ_ONLY`].
    pub flags: u64,
    /// The tensor.
    pub dl_tensor: DLTensor,
}

/// What a tensor is made of, and what keeps its memory.
pub(super) struct Owned {
    /// The address of its first byte, in host memory one that may be used by C; 0 if it has none.
    pub(super) data: u64,
    pub(super) device: DLDevice,
    pub(super) dtype: DLDataType,
    pub(super) shape: Vec<i64>,
    pub(super) strides: Vec<i64>,
    pub(super) flags: u64,
    /// Dropped by the deleter.
    pub(super) _owner: Box<dyn Any + Send>,
}

/// A structure given to C, followed by what it points to.
#[repr(C)]
struct Held<M> {
    managed: M,
    owned: Owned,
}

/// Gives a tensor away. It is freed by its deleter alone.
pub(super) fn unversioned(owned: Owned) -> *mut DLManagedTensor {
    give(owned, |dl_tensor, _| DLManagedTensor {
        dl_tensor,
        manager_ctx: ptr::null_mut(),
        deleter: Some(delete),
    })
}

/// The same in the form since DLPack 1.0.
pub(super) fn versioned(owned: Owned) -> *mut DLManagedTensorVersioned {
    give(owned, |dl_tensor, flags| DLManagedTensorVersioned {
        version: DLPACK_VERSION,
        manager_ctx: ptr::null_mut(),
        deleter: Some(delete),
        flags,
        dl_tensor,
    })
}

fn give<M>(mut owned: Owned, make: impl FnOnce(DLTensor, u64) -> M) -> *mut M {
    let tensor = DLTensor {
        // A GPU's address is none of this process's, and that of host memory was exposed.
        data: ptr::with_exposed_provenance_mut(owned.data as usize),
        device: owned.device,
        // Checkpoints have no more than a few.
        ndim: owned.shape.len() as i32,
        dtype: owned.dtype,
        // What a vector holds stays where it is when the vector moves.
        shape: owned.shape.as_mut_ptr(),
        strides: owned.strides.as_mut_ptr(),
        byte_offset: 0,
    };
    let managed = make(tensor, owned.flags);
    Box::into_raw(Box::new(Held { managed, owned })).cast()
}

/// Frees what [`give`] gave.
///
/// # Safety
/// `managed` is NULL, or came from [`give`] as an `M` and has not been freed.
unsafe extern "C" fn delete<M>(managed: *mut M) {
    if managed.is_null() {
        return;
    }
    // SAFETY: made from a box of this type, whose first field `managed` is, and freed once, as the
    // caller promises.
    let held = unsafe { Box::from_raw(managed.cast::<Held<M>>()) };
    // A panic must not reach C, which can do nothing about one here.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(held)));
}
