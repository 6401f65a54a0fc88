//! The embedded PTX, on the first GPU.

use std::collections::HashMap;
use std::sync::Arc;

use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtrMut, LaunchConfig,
    PushKernelArg, sys,
};
use cudarc::nvrtc::Ptx;
use tightfit_kernels::KernelError;
use tightfit_kernels::cuda::{self, Launch, decoder, experts, linear};

use crate::device::{Argument, Device, skip};

const REQUIRE: &str = "TIGHTFIT_REQUIRE_CUDA";

/// Bytes on both sides of a buffer that no kernel may change, and their value: as floats they are
/// NaN, so that reading them shows too.
const GUARD: usize = 256;
const GUARD_BYTE: u8 = 0xff;

/// The first GPU, with the kernels loaded.
pub(crate) struct Gpu {
    /// For benchmarks, which name the GPU.
    #[allow(dead_code)]
    pub(crate) context: Arc<CudaContext>,
    pub(crate) stream: Arc<CudaStream>,
    module: Arc<CudaModule>,
    products: Arc<CudaModule>,
    experts: Arc<CudaModule>,
    decoder: Arc<CudaModule>,
    functions: HashMap<&'static str, CudaFunction>,
}

impl Gpu {
    /// Nothing where there is no driver or no GPU.
    pub(crate) fn open() -> Option<Gpu> {
        // SAFETY: loads the driver's library, which NVIDIA means to be loaded by anyone.
        if !unsafe { sys::is_culib_present() } {
            skip(REQUIRE, "there is no CUDA driver");
            return None;
        }
        let context = match CudaContext::new(0) {
            Ok(context) => context,
            Err(error) => {
                skip(REQUIRE, &format!("there is no GPU: {error}"));
                return None;
            }
        };
        // For GPUs that are newer than the machine code.
        context
            .load_module(Ptx::from_src(cuda::PTX))
            .expect("the driver compiles the PTX");
        let capability = capability_of(&context);
        let load = |image: Result<Vec<u8>, KernelError>| {
            let image = image.expect("kernels for the GPU");
            context
                .load_module(Ptx::from_binary(image))
                .expect("the driver loads the kernels")
        };
        let module = load(cuda::module(capability));
        let products = load(linear::module(capability));
        let experts = load(experts::module(capability));
        let decoder = load(decoder::module(capability));
        Some(Gpu {
            stream: context.default_stream(),
            context,
            module,
            products,
            experts,
            decoder,
            functions: HashMap::new(),
        })
    }

    pub(crate) fn function(&mut self, kernel: &'static str) -> CudaFunction {
        let module = if kernel.starts_with("tightfit_linear") {
            &self.products
        } else if kernel.starts_with("tightfit_experts") {
            &self.experts
        } else if kernel.starts_with("tightfit_decoder") {
            &self.decoder
        } else {
            &self.module
        };
        self.functions
            .entry(kernel)
            .or_insert_with(|| module.load_function(kernel).expect(kernel))
            .clone()
    }

    /// Queues a kernel, with numbers and addresses as arguments.
    ///
    /// # Safety
    /// The arguments must be what the kernel takes, and the addresses those of memory on the
    /// device that is long enough for what the kernel does with it and lives until it is done.
    pub(crate) unsafe fn queue(&mut self, launch: Launch, shared_bytes: u32, arguments: &[u64]) {
        let function = self.function(launch.kernel);
        if shared_bytes > 0 {
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function
                .set_attribute(attribute, shared_bytes as i32)
                .expect("so much shared memory");
        }
        let stream = self.stream.clone();
        let mut builder = stream.launch_builder(&function);
        for argument in arguments {
            // Of a u32 the kernel takes the lower half.
            builder.arg(argument);
        }
        let shape = LaunchConfig {
            grid_dim: (launch.grid, 1, 1),
            block_dim: (launch.threads, 1, 1),
            shared_mem_bytes: shared_bytes,
        };
        // SAFETY: as the caller promises.
        unsafe { builder.launch(shape) }
            .unwrap_or_else(|error| panic!("{}: {error}", launch.kernel));
    }
}

fn capability_of(context: &CudaContext) -> (u32, u32) {
    let (major, minor) = context.compute_capability().expect("a capability");
    (major as u32, minor as u32)
}

/// The address of device memory, for as long as it is not freed. There is only one stream, so
/// nothing has to be waited for.
pub(crate) fn address(memory: &mut CudaSlice<u8>, stream: &CudaStream) -> u64 {
    memory.device_ptr_mut(stream).0
}

impl Device for Gpu {
    fn run(&mut self, launch: Launch, shared_bytes: u32, arguments: &mut [Argument]) {
        let mut buffers = Vec::new();
        let mut passed = Vec::new();
        for argument in &*arguments {
            match argument {
                Argument::Number(value) => passed.push(*value),
                Argument::Buffer {
                    misalignment,
                    bytes,
                } => {
                    // Allocations are multiples of 256.
                    let mut image = vec![GUARD_BYTE; GUARD + misalignment];
                    image.extend_from_slice(bytes);
                    image.resize(image.len() + GUARD, GUARD_BYTE);
                    let mut memory = self.stream.clone_htod(&image).expect("copied to the GPU");
                    let address = address(&mut memory, &self.stream);
                    passed.push(address + (GUARD + misalignment) as u64);
                    buffers.push(memory);
                }
            }
        }
        // SAFETY: tests pass what the module's table says; the buffers live until they are copied
        // back, which waits for the kernel.
        unsafe { self.queue(launch, shared_bytes, &passed) };
        let mut memory = buffers.into_iter();
        for argument in arguments {
            let Argument::Buffer {
                misalignment,
                bytes,
            } = argument
            else {
                continue;
            };
            let memory = memory.next().expect("one for each buffer");
            let image = self.stream.clone_dtoh(&memory);
            let image = image.unwrap_or_else(|error| panic!("{}: {error}", launch.kernel));
            let (before, rest) = image.split_at(GUARD + *misalignment);
            let (inside, after) = rest.split_at(bytes.len());
            assert!(
                before.iter().chain(after).all(|byte| *byte == GUARD_BYTE),
                "{} writes beside a buffer",
                launch.kernel
            );
            bytes.copy_from_slice(inside);
        }
    }
    fn compute_capability(&self) -> (u32, u32) {
        capability_of(&self.context)
    }
}
