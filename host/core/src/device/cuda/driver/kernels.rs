//! The kernels of one device: those that quantize, those of products, and what a decoder computes between them.

use std::ffi::{CStr, CString, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::sys::{CUfunction, CUfunction_attribute, CUmodule, CUstream};
use tightfit_kernels::cuda::{self, Launch, decoder, experts, linear};

use super::stream::Stream;
use super::tiles::TensorMap;
use super::{Context, overlap, twice, unavailable};
use crate::device::DeviceError;

/// The kernels that quantize and dequantize, as the PTX names them.
const QUANTIZING: [&str; 13] = [
    "tightfit_quantize_nf4_f32",
    "tightfit_quantize_nf4_f16",
    "tightfit_quantize_nf4_bf16",
    "tightfit_quantize_source_f16",
    "tightfit_quantize_source_bf16",
    "tightfit_dequantize_f32",
    "tightfit_dequantize_f16",
    "tightfit_dequantize_bf16",
    "tightfit_sum_absmax",
    "tightfit_sum_sums",
    "tightfit_mean",
    "tightfit_quantize_absmax",
    "tightfit_dequantize_absmax",
];

/// Which kernels a module has.
#[derive(Debug, Clone, Copy)]
enum Contents {
    Quantizing,
    Products,
    Decoder,
    Experts,
}

/// Kernels of one device. The driver loads and, where it must, compiles them when they are first asked
/// for, which takes its time.
#[derive(Debug)]
pub(in crate::device::cuda) struct KernelModule {
    context: Arc<Context>,
    contents: Contents,
    module: OnceLock<Module>,
    /// Held by whoever has them compiled.
    compiling: Mutex<()>,
}

impl KernelModule {
    /// Those that quantize.
    pub(in crate::device::cuda) fn quantizing(context: &Arc<Context>) -> KernelModule {
        KernelModule::new(context, Contents::Quantizing)
    }

    /// Those of products.
    pub(in crate::device::cuda) fn products(context: &Arc<Context>) -> KernelModule {
        KernelModule::new(context, Contents::Products)
    }

    /// What a decoder computes between products.
    pub(in crate::device::cuda) fn decoder(context: &Arc<Context>) -> KernelModule {
        KernelModule::new(context, Contents::Decoder)
    }

    /// Those for experts.
    pub(in crate::device::cuda) fn experts(context: &Arc<Context>) -> KernelModule {
        KernelModule::new(context, Contents::Experts)
    }

    fn new(context: &Arc<Context>, contents: Contents) -> KernelModule {
        KernelModule {
            context: Arc::clone(context),
            contents,
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

    /// Has them loaded, unless they are. An error is not remembered.
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
        let module = Module::load(&self.context, self.contents)?;
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
        let shape = Shape {
            kernel: launch.kernel,
            grid: launch.grid,
            threads: launch.threads,
            shared_bytes: 0,
            overlaps: false,
        };
        // SAFETY: as the caller promises.
        unsafe { self.launch_in(stream.raw, shape, &mut arguments, &[]) }
    }

    /// The same for any kernel, and in any stream of the device, whose context is current.
    ///
    /// # Safety
    /// As above; `arguments` and `maps` behind them are as many as the kernel has parameters.
    pub(super) unsafe fn launch_in(
        &self,
        stream: CUstream,
        shape: Shape,
        arguments: &mut [u64],
        maps: &[TensorMap],
    ) -> Result<(), DeviceError> {
        let module = self.module()?;
        let mut functions = module.functions.iter();
        let Some((_, function)) = functions.find(|(name, _)| *name == shape.kernel) else {
            let reason = format!("internal error: {} is not looked up", shape.kernel);
            return Err(unavailable(self.context.name(), reason));
        };
        let mut pointers = [ptr::null_mut::<c_void>(); MOST_ARGUMENTS];
        // The driver only reads what they point to.
        let maps = maps.iter().map(|map| ptr::from_ref(map).cast_mut().cast());
        let arguments = arguments
            .iter_mut()
            .map(|argument| ptr::from_mut(argument).cast());
        for (pointer, argument) in pointers.iter_mut().zip(arguments.chain(maps)) {
            *pointer = argument;
        }
        let api = self.context.api;
        if shape.overlaps && module.overlaps {
            // SAFETY: as below, and the kernels of the module wait themselves.
            let code =
                unsafe { overlap::launch(api, *function, shape, stream, pointers.as_mut_ptr()) };
            if let Some(code) = code {
                return self.context.check("cuLaunchKernelEx", 0, code);
            }
        }
        // SAFETY: the function is of a module that `self` keeps; there are as many pointers as it
        // has parameters, each to a value that is at least as wide and outlives the call, which
        // copies them. What they mean is the caller's promise.
        let code = unsafe {
            (api.cuLaunchKernel)(
                *function,
                shape.grid,
                1,
                1,
                shape.threads,
                1,
                1,
                shape.shared_bytes,
                stream,
                pointers.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        self.context.check("cuLaunchKernel", 0, code)
    }
}

/// Parameters that a kernel has at most.
const MOST_ARGUMENTS: usize = 19;

/// A kernel, and how many blocks of how many threads run it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) kernel: &'static str,
    pub(super) grid: u32,
    pub(super) threads: u32,
    /// Dynamic shared memory of each block.
    pub(super) shared_bytes: u32,
    /// Whether it may begin before the launch before it in its stream has ended. The kernel waits itself before it
    /// reads anything but weights and their scales: none of that may still be written by what the stream was given.
    pub(super) overlaps: bool,
}

impl Shape {
    pub(super) fn of_experts(launch: &experts::ExpertsLaunch, overlaps: bool) -> Shape {
        Shape {
            kernel: launch.kernel,
            grid: launch.grid,
            threads: launch.threads,
            shared_bytes: launch.shared_bytes,
            overlaps,
        }
    }
}

/// Compiled code in a device's context. Unloaded when dropped.
#[derive(Debug)]
struct Module {
    context: Arc<Context>,
    raw: CUmodule,
    /// By name.
    functions: Vec<(&'static str, CUfunction)>,
    /// Whether [`Shape::overlaps`] is heeded.
    overlaps: bool,
}

// SAFETY: module and functions are handles; the driver lets any thread use them.
unsafe impl Send for Module {}
// SAFETY: as above. Nothing here changes after it was made.
unsafe impl Sync for Module {}

impl Module {
    fn load(context: &Arc<Context>, contents: Contents) -> Result<Module, DeviceError> {
        let capability = context.compute_capability()?;
        // Each with the dynamic shared memory of its blocks.
        let (image, kernels) = match contents {
            Contents::Quantizing => {
                let kernels = QUANTIZING.map(|kernel| (kernel, 0)).to_vec();
                (cuda::module(capability), kernels)
            }
            Contents::Products => (linear::module(capability), linear::kernels(capability)),
            Contents::Decoder => {
                let kernels = decoder::KERNELS.map(|kernel| (kernel, 0)).to_vec();
                (decoder::module(capability), kernels)
            }
            Contents::Experts => (experts::module(capability), experts::kernels(capability)),
        };
        let image = image.map_err(|error| unavailable(context.name(), error.to_string()))?;
        let overlaps =
            !matches!(contents, Contents::Quantizing) && overlap::is_possible(context, capability)?;
        let _current = context.enter()?;
        let _beside = context.beside_captures()?;
        let mut raw = ptr::null_mut();
        // SAFETY: `raw` outlives the call, and the image is machine code, which says how long it is, or
        // text that ends in a zero, as PTX is passed. The context is current.
        let code = unsafe {
            (context.api.cuModuleLoadData)(&raw mut raw, image.as_ptr().cast::<c_void>())
        };
        context.check("cuModuleLoadData", image.len() as u64, code)?;
        // From here on its destructor unloads it.
        let mut module = Module {
            context: Arc::clone(context),
            raw,
            functions: Vec::with_capacity(kernels.len()),
            overlaps,
        };
        for (kernel, shared_bytes) in kernels {
            let name = CString::new(kernel).unwrap_or_default();
            let function = look_up(context, raw, &name)?;
            if shared_bytes > UNASKED_SHARED_BYTES {
                allow_shared(context, function, shared_bytes)?;
            }
            module.functions.push((kernel, function));
        }
        // The kernels' tables are on the device by now: `cuModuleLoadData` waits for that itself. To wait for the
        // context would end graphs that other threads record, in whatever mode.
        Ok(module)
    }
}

/// Dynamic shared memory that a launch may have without asking for it first.
const UNASKED_SHARED_BYTES: u32 = 48 << 10;

/// Tells the driver that launches of a function will have as much dynamic shared memory.
fn allow_shared(context: &Context, function: CUfunction, bytes: u32) -> Result<(), DeviceError> {
    let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as u32;
    // SAFETY: the function is of a module that is loaded, and the context is current.
    let code = unsafe { (context.api.cuFuncSetAttribute)(function, attribute, bytes as i32) };
    context.check("cuFuncSetAttribute", u64::from(bytes), code)
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
        let _beside = self.context.beside_captures();
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
        for name in QUANTIZING {
            assert!(cuda::KERNELS.contains(&name), "{name}");
        }
    }
}
