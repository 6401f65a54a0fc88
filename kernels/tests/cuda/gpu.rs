//! The embedded PTX, on the first GPU.

use std::collections::HashMap;
use std::sync::Arc;

use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtrMut, DeviceRepr,
    LaunchConfig, PushKernelArg, sys,
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
    #[allow(dead_code)] // For benchmarks.
    pub(crate) unsafe fn queue(&mut self, launch: Launch, shared_bytes: u32, arguments: &[u64]) {
        // SAFETY: as the caller promises.
        unsafe { self.queue_with_maps(launch, shared_bytes, arguments, &[]) };
    }

    /// The same with maps behind the arguments.
    ///
    /// # Safety
    /// As above; the maps are of such memory too.
    unsafe fn queue_with_maps(
        &mut self,
        launch: Launch,
        shared_bytes: u32,
        arguments: &[u64],
        maps: &[TensorMap],
    ) {
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
        for map in maps {
            builder.arg(map);
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

/// A `CUtensorMap`.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct TensorMap([u64; 16]);

// SAFETY: plain bytes, as large and as aligned as the kernels' parameter is.
unsafe impl DeviceRepr for TensorMap {}

/// `cuTensorMapEncodeTiled`, which drivers have from CUDA 12 on.
type EncodeTiled = unsafe extern "C" fn(
    *mut TensorMap,
    u32,
    u32,
    u64,
    *const u64,
    *const u64,
    *const u32,
    *const u32,
    u32,
    u32,
    u32,
    u32,
) -> u32;

impl TensorMap {
    /// Of a matrix at an address, by the numbers of [`Argument::Map`].
    fn new(address: u64, numbers: [u64; 7]) -> TensorMap {
        let mut encode = std::ptr::null_mut();
        let name = c"cuTensorMapEncodeTiled";
        // SAFETY: the name ends in a zero, and the driver writes one pointer.
        let found = unsafe { sys::cuGetProcAddress(name.as_ptr(), &raw mut encode, 12000, 0) };
        found.result().expect("a driver of CUDA 12");
        assert!(!encode.is_null(), "a driver of CUDA 12");
        // SAFETY: that is its type in the driver's header, all of whose enumerations are 32 bits wide.
        let encode: EncodeTiled = unsafe { std::mem::transmute(encode) };
        let [
            element_bytes,
            columns,
            rows,
            row_bytes,
            tile_columns,
            tile_rows,
            swizzle,
        ] = numbers;
        let mut map = TensorMap([0; 16]);
        // SAFETY: two numbers of each dimension, and the stride of one; all outlive the call.
        let code = unsafe {
            encode(
                &raw mut map,
                // Unsigned integers of 8 and of 16 bits.
                element_bytes as u32 - 1,
                2,
                address,
                [columns, rows].as_ptr(),
                &raw const row_bytes,
                [tile_columns as u32, tile_rows as u32].as_ptr(),
                [1, 1].as_ptr(),
                0,
                // 32, 64 and 128 bytes are 1, 2 and 3.
                (swizzle / 16).ilog2(),
                // To 128 bytes.
                2,
                0,
            )
        };
        assert_eq!(code, 0, "a map of {numbers:?}");
        map
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
        let (mut passed, mut maps, mut addresses) = (Vec::new(), Vec::new(), Vec::new());
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
                    let address = address + (GUARD + misalignment) as u64;
                    passed.push(address);
                    addresses.push(address);
                    buffers.push(memory);
                }
                Argument::Map { of, numbers } => {
                    maps.push(TensorMap::new(addresses[*of], *numbers));
                }
            }
        }
        // SAFETY: tests pass what the module's table says; the buffers live until they are copied
        // back, which waits for the kernel.
        unsafe { self.queue_with_maps(launch, shared_bytes, &passed, &maps) };
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
