//! An application of its own: what somebody does who runs kernels beside Tightfit's, on the stand-in or a
//! real driver.

use std::ffi::{CStr, c_char, c_int, c_uchar, c_uint, c_void};
use std::ptr;

use libloading::Library;
use tightfit_kernels::cuda::linear::Gpu;

/// A stream of an application in the primary context of a device, and copies to and from its memory.
#[derive(Debug)]
pub struct Application {
    driver: Library,
    device: c_int,
    context: *mut c_void,
    stream: *mut c_void,
}

macro_rules! call {
    ($self:expr, $name:ident($($argument:expr => $type:ty),*)) => {{
        let name = concat!(stringify!($name), "\0").as_bytes();
        // SAFETY: the signature is that in NVIDIA's cuda.h; what arguments point to outlives the call.
        let code = unsafe {
            let function = $self
                .get::<unsafe extern "C" fn($($type),*) -> c_uint>(name)
                .expect(stringify!($name));
            function($($argument),*)
        };
        assert_eq!(code, 0, stringify!($name));
    }};
}

impl Application {
    /// Starts on a device, whose driver has been loaded by whoever tests. Its context is current only
    /// while this does something.
    pub fn start(ordinal: i32) -> Application {
        let library = ["libcuda.so", "libcuda.so.1"].into_iter().find_map(|name| {
            // SAFETY: the stand-in, which has been loaded, or NVIDIA's library, which anyone may load.
            unsafe { Library::new(name) }.ok()
        });
        let driver = library.expect("there is a driver");
        let (mut device, mut context, mut stream) = (0, ptr::null_mut(), ptr::null_mut());
        call!(driver, cuDeviceGet(&raw mut device => *mut c_int, ordinal => c_int));
        call!(driver, cuDevicePrimaryCtxRetain(&raw mut context => *mut *mut c_void, device => c_int));
        let mut application = Application {
            driver,
            device,
            context,
            stream,
        };
        application.apart(|driver| {
            // Without the flag for streams that do not wait for the default one.
            call!(driver, cuStreamCreate(&raw mut stream => *mut *mut c_void, 0 => c_uint));
        });
        application.stream = stream;
        application
    }

    /// In its context.
    fn within<T>(&self, work: impl FnOnce(&Library) -> T) -> T {
        let driver = &self.driver;
        let mut popped = ptr::null_mut();
        call!(driver, cuCtxPushCurrent_v2(self.context => *mut c_void));
        let result = work(driver);
        call!(driver, cuCtxPopCurrent_v2(&raw mut popped => *mut *mut c_void));
        result
    }

    /// The same for what waits or allocates: without ending what other threads capture, as other tests do on a
    /// real driver.
    fn apart<T>(&self, work: impl FnOnce(&Library) -> T) -> T {
        const RELAXED: c_uint = 2;
        self.within(|driver| {
            let mut mode = RELAXED;
            call!(driver, cuThreadExchangeStreamCaptureMode(&raw mut mode => *mut c_uint));
            let result = work(driver);
            call!(driver, cuThreadExchangeStreamCaptureMode(&raw mut mode => *mut c_uint));
            result
        })
    }

    /// Its stream, a `CUstream`.
    pub fn stream(&self) -> *mut c_void {
        self.stream
    }

    /// Waits for its stream.
    pub fn synchronize(&self) {
        self.apart(|driver| call!(driver, cuStreamSynchronize(self.stream => *mut c_void)));
    }

    /// Its device, as launches depend on it.
    pub fn gpu(&self) -> Gpu {
        let attribute = |attribute: c_uint| {
            let mut value: c_int = 0;
            call!(
                self.driver,
                cuDeviceGetAttribute(
                    &raw mut value => *mut c_int,
                    attribute => c_uint,
                    self.device => c_int
                )
            );
            value as u32
        };
        // `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and `_MINOR`, `.._MULTIPROCESSOR_COUNT`.
        Gpu {
            compute_capability: (attribute(75), attribute(76)),
            multiprocessors: attribute(16),
        }
    }

    /// A kernel of an image of machine code, to be launched as an application does it.
    pub fn kernel(&self, image: &[u8], name: &CStr, shared_bytes: u32) -> Kernel<'_> {
        const MAX_DYNAMIC_SHARED: c_uint = 8;
        let (mut module, mut function) = (ptr::null_mut(), ptr::null_mut());
        self.apart(|driver| {
            call!(
                driver,
                cuModuleLoadData(
                    &raw mut module => *mut *mut c_void,
                    image.as_ptr().cast() => *const c_void
                )
            );
            call!(
                driver,
                cuModuleGetFunction(
                    &raw mut function => *mut *mut c_void,
                    module => *mut c_void,
                    name.as_ptr() => *const c_char
                )
            );
            if shared_bytes > 48 << 10 {
                call!(
                    driver,
                    cuFuncSetAttribute(
                        function => *mut c_void,
                        MAX_DYNAMIC_SHARED => c_uint,
                        shared_bytes as i32 => c_int
                    )
                );
            }
        });
        // SAFETY: the signature is that in NVIDIA's cuda.h; the library is kept as long as the pointer.
        let launch = unsafe { self.driver.get::<Launch>(b"cuLaunchKernel\0") };
        Kernel {
            launch: *launch.expect("cuLaunchKernel"),
            application: self,
            module,
            function,
            shared_bytes,
        }
    }

    /// Captures what is given to its stream meanwhile into a graph that can be launched. Whoever allocates or
    /// waits meanwhile is told so by the driver, which is strict about it.
    pub fn capture(&self, work: impl FnOnce()) -> Graph<'_> {
        const GLOBAL: c_uint = 0;
        let stream = self.stream;
        self.within(|driver| {
            call!(driver, cuStreamBeginCapture_v2(stream => *mut c_void, GLOBAL => c_uint));
        });
        work();
        let (mut graph, mut executable) = (ptr::null_mut(), ptr::null_mut());
        self.within(|driver| {
            call!(
                driver,
                cuStreamEndCapture(stream => *mut c_void, &raw mut graph => *mut *mut c_void)
            );
        });
        self.apart(|driver| {
            call!(
                driver,
                cuGraphInstantiateWithFlags(
                    &raw mut executable => *mut *mut c_void,
                    graph => *mut c_void,
                    0 => u64
                )
            );
            call!(driver, cuGraphDestroy(graph => *mut c_void));
        });
        Graph {
            application: self,
            executable,
        }
    }

    /// Copies bytes to an address, and waits.
    pub fn put(&self, address: u64, bytes: &[u8]) {
        let mut locked = ptr::null_mut();
        self.apart(|driver| {
            call!(
                driver,
                cuMemHostAlloc(&raw mut locked => *mut *mut c_void, bytes.len().max(1) => usize, 0 => c_uint)
            );
            // SAFETY: as many bytes have just been taken.
            unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), locked.cast(), bytes.len()) };
            call!(
                driver,
                cuMemcpyHtoDAsync_v2(
                    address => u64,
                    locked.cast_const() => *const c_void,
                    bytes.len() => usize,
                    self.stream => *mut c_void
                )
            );
        });
        self.synchronize();
        self.apart(|driver| call!(driver, cuMemFreeHost(locked => *mut c_void)));
    }

    /// Sets bytes at an address, sometime.
    pub fn set(&self, address: u64, value: u8, len: usize) {
        self.within(|driver| {
            call!(
                driver,
                cuMemsetD8Async(
                    address => u64,
                    value => c_uchar,
                    len => usize,
                    self.stream => *mut c_void
                )
            );
        });
    }

    /// Copies bytes from an address. Not in the default stream, for which those wait that other tests capture.
    pub fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0u8; len];
        self.apart(|driver| {
            call!(
                driver,
                cuMemcpyDtoHAsync_v2(
                    bytes.as_mut_ptr().cast() => *mut c_void,
                    address => u64,
                    len => usize,
                    self.stream => *mut c_void
                )
            );
        });
        self.synchronize();
        bytes
    }
}

/// `cuLaunchKernel`.
type Launch = unsafe extern "C" fn(
    *mut c_void,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    *mut c_void,
    *mut *mut c_void,
    *mut *mut c_void,
) -> c_uint;

/// A kernel that an application has loaded itself.
#[derive(Debug)]
pub struct Kernel<'a> {
    application: &'a Application,
    launch: Launch,
    module: *mut c_void,
    function: *mut c_void,
    shared_bytes: u32,
}

impl Kernel<'_> {
    /// Gives it to the application's stream.
    ///
    /// # Safety
    /// The arguments are those of the kernel, the lower half of them for what is narrower.
    pub unsafe fn launch(&self, grid: u32, threads: u32, arguments: &mut [u64]) {
        let mut pointers: Vec<*mut c_void> = arguments
            .iter_mut()
            .map(|argument| ptr::from_mut(argument).cast())
            .collect();
        self.application.within(|_| {
            // SAFETY: the function is of a module that is loaded; arguments are as the caller promises.
            let code = unsafe {
                (self.launch)(
                    self.function,
                    grid,
                    1,
                    1,
                    threads,
                    1,
                    1,
                    self.shared_bytes,
                    self.application.stream,
                    pointers.as_mut_ptr(),
                    ptr::null_mut(),
                )
            };
            assert_eq!(code, 0, "cuLaunchKernel");
        });
    }
}

impl Drop for Kernel<'_> {
    fn drop(&mut self) {
        self.application
            .apart(|driver| call!(driver, cuModuleUnload(self.module => *mut c_void)));
    }
}

/// What has been captured.
#[derive(Debug)]
pub struct Graph<'a> {
    application: &'a Application,
    executable: *mut c_void,
}

impl Graph<'_> {
    /// Gives it to the application's stream, and waits.
    pub fn replay(&self) {
        let stream = self.application.stream;
        self.application.within(|driver| {
            call!(driver, cuGraphLaunch(self.executable => *mut c_void, stream => *mut c_void));
        });
        self.application.synchronize();
    }
}

impl Drop for Graph<'_> {
    fn drop(&mut self) {
        self.application.apart(|driver| {
            call!(driver, cuGraphExecDestroy(self.executable => *mut c_void));
        });
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        self.apart(|driver| call!(driver, cuStreamDestroy_v2(self.stream => *mut c_void)));
        call!(self.driver, cuDevicePrimaryCtxRelease_v2(self.device => c_int));
    }
}
