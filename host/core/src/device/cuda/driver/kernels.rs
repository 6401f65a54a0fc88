//! The kernels that quantize, compiled by the driver for one device.

use std::ffi::{CStr, CString, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::sys::{CUdeviceptr, CUfunction, CUmodule};
use tightfit_kernels::cuda::{self, Launch};

use super::stream::Stream;
use super::{Context, twice, unavailable};
use crate::device::DeviceError;

/// The kernels that are launched here, as the PTX names them.
const USED: [&str; 9] = [
    "tightfit_quantize_nf4_f32",
    "tightfit_quantize_nf4_f16",
    "tightfit_quantize_nf4_bf16",
    "tightfit_quantize_source_f16",
    "tightfit_quantize_source_bf16",
    "tightfit_sum_absmax",
    "tightfit_sum_sums",
    "tightfit_mean",
    "tightfit_quantize_absmax",
];

/// The kernels of one device. The driver compiles them when they are first asked for, which takes
/// its time.
#[derive(Debug)]
pub(in crate::device::cuda) struct KernelModule {
    context: Arc<Context>,
    module: OnceLock<Module>,
    /// Held by whoever has them compiled.
    compiling: Mutex<()>,
}

impl KernelModule {
    pub(in crate::device::cuda) fn new(context: &Arc<Context>) -> KernelModule {
        KernelModule {
            context: Arc::clone(context),
            module: OnceLock::new(),
            compiling: Mutex::new(()),
        }
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Whether they have been compiled.
    pub(super) fn are_ready(&self) -> bool {
        self.module.get().is_some()
    }

    /// Has them compiled, unless they are. An error is not remembered.
    pub(super) fn compile(&self) -> Result<(), DeviceError> {
        self.module().map(|_| ())
    }

    fn module(&self) -> Result<&Module, DeviceError> {
        if let Some(module) = self.module.get() {
            return Ok(module);
        }
        let _alone = self
            .compiling
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = self.module.get() {
            return Ok(module);
        }
        let module = Module::load(&self.context)?;
        Ok(self.module.get_or_init(|| module))
    }

    /// Gives a kernel to a stream of this device, whose context is current.
    ///
    /// # Safety
    /// The arguments are those that [`cuda`] names for the kernel, the lower half of them for a
    /// `u32`. Pointers are addresses of this device's memory, long enough, which is kept until the
    /// stream is done.
    pub(super) unsafe fn launch<const N: usize>(
        &self,
        stream: &Stream,
        launch: Launch,
        mut arguments: [u64; N],
    ) -> Result<(), DeviceError> {
        let module = self.module()?;
        let function = USED.iter().position(|name| *name == launch.kernel);
        let Some(function) = function.map(|index| module.functions[index]) else {
            let reason = format!("internal error: {} is not looked up", launch.kernel);
            return Err(unavailable(self.context.name(), reason));
        };
        let mut pointers = arguments
            .each_mut()
            .map(|argument| ptr::from_mut(argument).cast::<c_void>());
        // SAFETY: the function is of a module that `self` keeps; there are as many pointers as it
        // has parameters, each to a value that is at least as wide and outlives the call, which
        // copies them. What they mean is the caller's promise.
        let code = unsafe {
            (self.context.api.cuLaunchKernel)(
                function,
                launch.grid,
                1,
                1,
                launch.threads,
                1,
                1,
                0,
                stream.raw,
                pointers.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        self.context.check("cuLaunchKernel", 0, code)
    }

    /// Sets `len` bytes at an address to zero in a stream of this device, whose context is current.
    ///
    /// # Safety
    /// The bytes are this device's memory, which is kept until the stream is done.
    pub(super) unsafe fn clear(
        &self,
        stream: &Stream,
        address: CUdeviceptr,
        len: usize,
    ) -> Result<(), DeviceError> {
        // SAFETY: as the caller promises.
        let code = unsafe { (self.context.api.cuMemsetD8Async)(address, 0, len, stream.raw) };
        self.context.check("cuMemsetD8Async", len as u64, code)
    }
}

/// Compiled code in a device's context. Unloaded when dropped.
#[derive(Debug)]
struct Module {
    context: Arc<Context>,
    raw: CUmodule,
    /// In the order of [`USED`].
    functions: [CUfunction; USED.len()],
}

// SAFETY: module and functions are handles; the driver lets any thread use them.
unsafe impl Send for Module {}
// SAFETY: as above. Nothing here changes after it was made.
unsafe impl Sync for Module {}

impl Module {
    fn load(context: &Arc<Context>) -> Result<Module, DeviceError> {
        let image = CString::new(cuda::PTX)
            .map_err(|_| unavailable(context.name(), "its PTX has a zero".to_owned()))?;
        let _current = context.enter()?;
        let mut raw = ptr::null_mut();
        // SAFETY: `raw` outlives the call, and the image is text that ends in a zero, as PTX is
        // passed. The context is current.
        let code = unsafe {
            (context.api.cuModuleLoadData)(&raw mut raw, image.as_ptr().cast::<c_void>())
        };
        context.check("cuModuleLoadData", image.as_bytes().len() as u64, code)?;
        // From here on its destructor unloads it.
        let mut module = Module {
            context: Arc::clone(context),
            raw,
            functions: [ptr::null_mut(); USED.len()],
        };
        for (function, name) in module.functions.iter_mut().zip(USED) {
            let name = CString::new(name).unwrap_or_default();
            *function = look_up(context, raw, &name)?;
        }
        // The kernels' tables may still be on their way to the device, and our streams wait for no
        // other stream, whoever launches next.
        // SAFETY: takes no pointers; the context is current.
        let code = unsafe { (context.api.cuCtxSynchronize)() };
        context.check("cuCtxSynchronize", 0, code)?;
        Ok(module)
    }
}

fn look_up(context: &Context, module: CUmodule, name: &CStr) -> Result<CUfunction, DeviceError> {
    let mut function = ptr::null_mut();
    // SAFETY: `function` and the name outlive the call, and the module is loaded.
    let code =
        unsafe { (context.api.cuModuleGetFunction)(&raw mut function, module, name.as_ptr()) };
    context.check("cuModuleGetFunction", 0, code)?;
    Ok(function)
}

impl Drop for Module {
    fn drop(&mut self) {
        let _current = twice(|| self.context.enter());
        // SAFETY: loaded by us and unloaded once; whoever launches its kernels waits for them
        // before giving up the `KernelModule` that own it.
        let code = unsafe { (self.context.api.cuModuleUnload)(self.raw) };
        self.context.check_release("cuModuleUnload", code);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_kernels_are_in_the_ptx() {
        for name in USED {
            assert!(cuda::KERNELS.contains(&name), "{name}");
        }
    }
}
