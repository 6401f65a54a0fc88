//! Finds, sets up and questions the stand-in's library.

use std::ffi::c_void;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use libloading::Library;

pub use crate::setup::Setup;

/// The variable in which a process that was started with the stand-in finds its [`Setup`].
pub const VARIABLE: &str = "TIGHTFIT_CUDA_STAND_IN";

/// The driver's functions that the stand-in has, and that a driver has to have.
pub const FUNCTIONS: &[&str] = &[
    "cuCtxGetCurrent",
    "cuCtxPopCurrent_v2",
    "cuCtxPushCurrent_v2",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAddressFree",
    "cuMemAddressReserve",
    "cuMemAlloc_v2",
    "cuMemCreate",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetAllocationGranularity",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemMap",
    "cuMemRelease",
    "cuMemSetAccess",
    "cuMemUnmap",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoH_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD32Async",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamIsCapturing",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuThreadExchangeStreamCaptureMode",
];

/// The library, which cargo builds beside the tests.
fn library() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    let directory = test.parent().expect("it lies in a directory");
    let path = directory.join("libcuda_stand_in.so");
    assert!(path.exists(), "{} is not there", path.display());
    path
}

/// Puts the library into a directory under the name that programs look for, without one of its
/// functions if `missing` names one.
pub fn install(directory: &Path, missing: Option<&str>) {
    let mut bytes = fs::read(library()).expect("the library can be read");
    if let Some(name) = missing {
        let name = [b"\0", name.as_bytes(), b"\0"].concat();
        let found: Vec<usize> = bytes
            .windows(name.len())
            .enumerate()
            .filter_map(|(index, window)| (window == name).then_some(index))
            .collect();
        assert!(!found.is_empty(), "it has no such function");
        for index in found {
            bytes[index + 1] = b'x';
        }
    }
    fs::write(directory.join("libcuda.so"), bytes).expect("the library can be written");
}

/// The stand-in in this process. Only one test at a time can have it.
#[derive(Debug)]
pub struct StandIn {
    library: &'static Library,
    _alone: MutexGuard<'static, ()>,
}

impl StandIn {
    /// Loads it, so that whoever asks for the driver gets it, with new books.
    pub fn start(setup: &Setup) -> StandIn {
        static ALONE: Mutex<()> = Mutex::new(());
        static LIBRARY: OnceLock<Library> = OnceLock::new();
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let library = LIBRARY.get_or_init(|| {
            // SAFETY: ours, and nothing runs when it is loaded.
            unsafe { Library::new(library()) }.expect("the stand-in can be loaded")
        });
        let stand_in = StandIn {
            library,
            _alone: alone,
        };
        let text = setup.to_string();
        // SAFETY: the function has this signature, and `text` outlives the call.
        let answer = unsafe {
            let start = library
                .get::<unsafe extern "C" fn(*const u8, usize) -> u32>(b"stand_in_start\0")
                .expect("it is in the library");
            start(text.as_ptr(), text.len())
        };
        assert_eq!(answer, 0, "{setup:?}");
        stand_in
    }

    /// Has others take `bytes` of a device in all.
    pub fn take(&self, device: usize, bytes: u64) {
        // SAFETY: the function has this signature.
        unsafe {
            let take = self
                .library
                .get::<extern "C" fn(usize, u64)>(b"stand_in_take\0")
                .expect("it is in the library");
            take(device, bytes);
        }
    }

    /// What it has seen.
    pub fn report(&self) -> Report {
        unsafe extern "C" fn take(target: *mut c_void, text: *const u8, len: usize) {
            // SAFETY: the pointer given below, and a text of this length.
            unsafe {
                let text = std::slice::from_raw_parts(text, len);
                let text = String::from_utf8_lossy(text).into_owned();
                *target.cast::<String>() = text;
            }
        }
        let mut text = String::new();
        // SAFETY: the function has this signature, and `text` outlives the call.
        unsafe {
            let report = self
                .library
                .get::<unsafe extern "C" fn(
                    unsafe extern "C" fn(*mut c_void, *const u8, usize),
                    *mut c_void,
                )>(b"stand_in_report\0")
                .expect("it is in the library");
            report(take, (&raw mut text).cast());
        }
        Report::read(&text)
    }
}

/// What the stand-in has seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The calls in their order, without versions.
    pub calls: Vec<String>,
    /// The kernels that were launched, in their order.
    pub launches: Vec<String>,
    /// What must never be done and was.
    pub faults: Vec<String>,
    /// What is left.
    pub leaks: Vec<String>,
    /// The most bytes in use at a time, of each device.
    pub peaks: Vec<u64>,
    /// The most bytes of page-locked host memory at a time.
    pub host_peak: u64,
}

impl Report {
    /// Reads what a stand-in has written.
    pub fn read(text: &str) -> Report {
        let mut report = Report::default();
        for line in text.lines() {
            let (kind, rest) = line.split_once(' ').expect("a kind and a text");
            match kind {
                "call" => report.calls.push(rest.to_owned()),
                "launch" => report.launches.push(rest.to_owned()),
                "fault" => report.faults.push(rest.to_owned()),
                "leak" => report.leaks.push(rest.to_owned()),
                "peak" => report.peaks.push(rest.parse().expect("a number")),
                "host" => report.host_peak = rest.parse().expect("a number"),
                _ => panic!("{line}"),
            }
        }
        report
    }

    /// Asserts that the books are in order and nothing is left.
    #[track_caller]
    pub fn is_clean(&self, context: &str) {
        assert!(self.faults.is_empty(), "{context}: {:?}", self.faults);
        assert!(self.leaks.is_empty(), "{context}: {:?}", self.leaks);
    }
}
