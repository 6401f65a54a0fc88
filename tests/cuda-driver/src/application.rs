//! An application of its own: what somebody does who runs kernels beside Tightfit's, on the stand-in or a
//! real driver.

use std::ffi::{c_int, c_uint, c_void};
use std::ptr;

use libloading::Library;

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
        application.within(|driver| {
            // Without the flag for streams that do not wait for the default one.
            call!(driver, cuStreamCreate(&raw mut stream => *mut *mut c_void, 0 => c_uint));
        });
        application.stream = stream;
        application
    }

    fn within<T>(&self, work: impl FnOnce(&Library) -> T) -> T {
        let driver = &self.driver;
        let mut popped = ptr::null_mut();
        call!(driver, cuCtxPushCurrent_v2(self.context => *mut c_void));
        let result = work(driver);
        call!(driver, cuCtxPopCurrent_v2(&raw mut popped => *mut *mut c_void));
        result
    }

    /// Its stream, a `CUstream`.
    pub fn stream(&self) -> *mut c_void {
        self.stream
    }

    /// Waits for its stream.
    pub fn synchronize(&self) {
        self.within(|driver| call!(driver, cuStreamSynchronize(self.stream => *mut c_void)));
    }

    /// Copies bytes to an address, and waits.
    pub fn put(&self, address: u64, bytes: &[u8]) {
        let mut locked = ptr::null_mut();
        self.within(|driver| {
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
        self.within(|driver| call!(driver, cuMemFreeHost(locked => *mut c_void)));
    }

    /// Copies bytes from an address.
    pub fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0u8; len];
        self.within(|driver| {
            call!(
                driver,
                cuMemcpyDtoH_v2(bytes.as_mut_ptr().cast() => *mut c_void, address => u64, len => usize)
            );
        });
        bytes
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        self.within(|driver| call!(driver, cuStreamDestroy_v2(self.stream => *mut c_void)));
        call!(self.driver, cuDevicePrimaryCtxRelease_v2(self.device => c_int));
    }
}
