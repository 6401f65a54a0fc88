//! A device's primary context, which everything else of it lives in.

use std::ffi::{c_int, c_uint};
use std::fmt;
use std::marker::PhantomData;
use std::ptr;

use cudarc::driver::sys;
use sys::{CUcontext, CUdevice, CUdevice_attribute, CUmemAllocationProp};

use super::{Api, CAPTURE_IMPLICIT, INVALID_VALUE, unavailable};
use crate::device::{Attached, DeviceError};

/// A device and its primary context: the one that the CUDA runtime and other libraries use, so that
/// they can use our memory. Released when dropped.
pub(in crate::device::cuda) struct Context {
    pub(super) api: &'static Api,
    pub(super) device: CUdevice,
    index: u32,
    name: String,
    raw: CUcontext,
}

// SAFETY: a context is a handle; the driver lets any thread use it.
unsafe impl Send for Context {}
// SAFETY: as above. Nothing here changes after it was made.
unsafe impl Sync for Context {}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Context").field(&self.name).finish()
    }
}

impl Context {
    /// The primary context of the device with this number, created where nobody has yet.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] without a driver, or with one that has no such device.
    pub(in crate::device::cuda) fn retain(index: u32) -> Result<Context, DeviceError> {
        let name = format!("cuda:{index}");
        let api = Api::get(&name)?;
        let mut count = 0;
        // SAFETY: `count` outlives the call.
        let code = unsafe { (api.cuDeviceGetCount)(&raw mut count) };
        api.check(&name, "cuDeviceGetCount", 0, code)?;
        let ordinal = match c_int::try_from(index) {
            Ok(ordinal) if ordinal < count => ordinal,
            _ => {
                let reason = format!("the NVIDIA driver has {count} devices, counted from 0");
                return Err(unavailable(&name, reason));
            }
        };
        let mut device = 0;
        // SAFETY: `device` outlives the call.
        let code = unsafe { (api.cuDeviceGet)(&raw mut device, ordinal) };
        api.check(&name, "cuDeviceGet", 0, code)?;
        let mut raw = ptr::null_mut();
        // SAFETY: `raw` outlives the call, `device` is the driver's.
        let code = unsafe { (api.cuDevicePrimaryCtxRetain)(&raw mut raw, device) };
        api.check(&name, "cuDevicePrimaryCtxRetain", 0, code)?;
        Ok(Context {
            api,
            device,
            index,
            name,
            raw,
        })
    }

    /// For example `cuda:0`.
    pub(in crate::device::cuda) fn name(&self) -> &str {
        &self.name
    }

    /// The driver's number of the device.
    pub(in crate::device::cuda) fn ordinal(&self) -> u32 {
        self.index
    }

    pub(super) fn check(
        &self,
        call: &'static str,
        bytes: u64,
        code: u32,
    ) -> Result<(), DeviceError> {
        self.api.check(&self.name, call, bytes, code)
    }

    pub(super) fn check_release(&self, call: &'static str, code: u32) {
        self.api.check_release(&self.name, call, code);
    }

    /// Makes the context this thread's current one, until the result is dropped. Which was current
    /// before is current again then: threads are not only ours. To ask which is current costs the driver
    /// nothing, to change it takes locks.
    pub(in crate::device::cuda) fn enter(&self) -> Result<Current<'_>, DeviceError> {
        let mut current = ptr::null_mut();
        // SAFETY: `current` outlives the call.
        let code = unsafe { (self.api.cuCtxGetCurrent)(&raw mut current) };
        // Where it does not say, as if it were another.
        let is_pushed = code != 0 || current != self.raw;
        if is_pushed {
            // SAFETY: retained until `self` is dropped.
            let code = unsafe { (self.api.cuCtxPushCurrent_v2)(self.raw) };
            self.check("cuCtxPushCurrent", 0, code)?;
        }
        Ok(Current {
            context: self,
            is_pushed,
            _this_thread: PhantomData,
        })
    }

    /// Allows this thread, until the result is dropped, what a driver forbids to all threads while any of them
    /// records a graph, unless it is told that nothing of that is meant: asked for an event, it would
    /// end the recording.
    pub(super) fn beside_captures(&self) -> Result<BesideCaptures<'_>, DeviceError> {
        /// `CU_STREAM_CAPTURE_MODE_RELAXED`.
        const RELAXED: c_uint = 2;
        let mut mode = RELAXED;
        // SAFETY: `mode` outlives the call, which puts there what it was before.
        let code = unsafe { (self.api.cuThreadExchangeStreamCaptureMode)(&raw mut mode) };
        self.check("cuThreadExchangeStreamCaptureMode", 0, code)?;
        Ok(BesideCaptures {
            context: self,
            before: mode,
            _this_thread: PhantomData,
        })
    }

    /// Whether somebody records a stream that waits for the default one. To use that one would end the recording, and is
    /// refused. The context is current.
    pub(super) fn default_stream_is_barred(&self) -> Result<bool, DeviceError> {
        let mut status = 0;
        // SAFETY: `status` outlives the call. The stream is the default one.
        let code = unsafe { (self.api.cuStreamIsCapturing)(ptr::null_mut(), &raw mut status) };
        if code == CAPTURE_IMPLICIT {
            return Ok(true);
        }
        self.check("cuStreamIsCapturing", 0, code)?;
        Ok(false)
    }

    /// Bytes that are free, and bytes in all.
    pub(in crate::device::cuda) fn memory(&self) -> Result<(u64, u64), DeviceError> {
        let _current = self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both outlive the call.
        let code = unsafe { (self.api.cuMemGetInfo_v2)(&raw mut free, &raw mut total) };
        self.check("cuMemGetInfo", 0, code)?;
        Ok((free as u64, total as u64))
    }

    fn attribute(&self, attribute: CUdevice_attribute) -> Result<u32, DeviceError> {
        let mut value = 0;
        // SAFETY: `value` outlives the call.
        let code = unsafe {
            (self.api.cuDeviceGetAttribute)(&raw mut value, attribute as u32, self.device)
        };
        self.check("cuDeviceGetAttribute", 0, code)?;
        Ok(u32::try_from(value).unwrap_or(0))
    }

    /// Major and minor.
    pub(super) fn compute_capability(&self) -> Result<(u32, u32), DeviceError> {
        use CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        };
        Ok((self.attribute(MAJOR)?, self.attribute(MINOR)?))
    }

    pub(super) fn multiprocessors(&self) -> Result<u32, DeviceError> {
        self.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
    }

    /// Whether what is free on the device is counted by the host's system as free, too: where the device has no
    /// memory of its own, or has lent it as a node of the host's.
    pub(in crate::device::cuda) fn shares_host_memory(&self) -> Result<bool, DeviceError> {
        /// `CU_DEVICE_ATTRIBUTE_NUMA_CONFIG`, of CUDA 12.2.
        const NUMA_CONFIG: u32 = 130;
        /// `CU_DEVICE_NUMA_CONFIG_NUMA_NODE`.
        const NUMA_NODE: c_int = 1;
        if self.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_INTEGRATED)? != 0 {
            return Ok(true);
        }
        let mut value = 0;
        // SAFETY: `value` outlives the call.
        let code =
            unsafe { (self.api.cuDeviceGetAttribute)(&raw mut value, NUMA_CONFIG, self.device) };
        // Drivers that do not know of it know of no such devices.
        if code == INVALID_VALUE {
            return Ok(false);
        }
        self.check("cuDeviceGetAttribute", 0, code)?;
        Ok(value == NUMA_NODE)
    }

    /// What virtual memory is a multiple of; `None` where the device has none.
    pub(in crate::device::cuda) fn virtual_granularity(&self) -> Result<Option<u64>, DeviceError> {
        let attribute =
            CUdevice_attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED;
        if self.attribute(attribute)? == 0 {
            return Ok(None);
        }
        let mut granularity = 0;
        let properties = self.properties();
        let minimum = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
        // SAFETY: `granularity` and `properties` outlive the call.
        let code = unsafe {
            (self.api.cuMemGetAllocationGranularity)(
                &raw mut granularity,
                &raw const properties,
                minimum as u32,
            )
        };
        self.check("cuMemGetAllocationGranularity", 0, code)?;
        Ok(Some((granularity as u64).max(1)))
    }

    /// Memory of this device that no other process sees.
    pub(super) fn properties(&self) -> CUmemAllocationProp {
        CUmemAllocationProp {
            type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
            requestedHandleTypes: sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
            location: self.location(),
            win32HandleMetaData: ptr::null_mut(),
            allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
                compressionType: 0,
                gpuDirectRDMACapable: 0,
                usage: 0,
                reserved: [0; 4],
            },
        }
    }

    pub(super) fn location(&self) -> sys::CUmemLocation {
        sys::CUmemLocation {
            type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
            id: self.device,
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once by us, and what lives in it keeps `self` alive.
        let code = unsafe { (self.api.cuDevicePrimaryCtxRelease_v2)(self.device) };
        self.check_release("cuDevicePrimaryCtxRelease", code);
    }
}

/// What other threads record is not this thread's concern.
pub(super) struct BesideCaptures<'a> {
    context: &'a Context,
    before: c_uint,
    _this_thread: PhantomData<*const ()>,
}

impl Drop for BesideCaptures<'_> {
    fn drop(&mut self) {
        let api = self.context.api;
        // SAFETY: as above; it is a mode that the driver has given.
        let code = unsafe { (api.cuThreadExchangeStreamCaptureMode)(&raw mut self.before) };
        self.context
            .check_release("cuThreadExchangeStreamCaptureMode", code);
    }
}

/// The context is current on this thread.
#[derive(Debug)]
pub(in crate::device::cuda) struct Current<'a> {
    context: &'a Context,
    /// It was not current already.
    is_pushed: bool,
    /// The stack of contexts belongs to the thread.
    _this_thread: PhantomData<*const ()>,
}

impl Attached for Current<'_> {}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        if !self.is_pushed {
            return;
        }
        let mut popped = ptr::null_mut();
        // SAFETY: pushed by this thread, and guards are dropped in the reverse order.
        let code = unsafe { (self.context.api.cuCtxPopCurrent_v2)(&raw mut popped) };
        self.context.check_release("cuCtxPopCurrent", code);
    }
}
