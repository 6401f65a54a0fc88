//! Streams that are captured, and graphs of what they were given. What allocates or waits must not be
//! called meanwhile.

use std::thread;

use crate::books::{Books, CAPTURE_IMPLICIT, Kind, call, mode};
use crate::streams::Work;

/// `CU_STREAM_CAPTURE_MODE_RELAXED`.
const RELAXED: u32 = 2;

/// What a thread may call while it captures a stream: what gives work to streams, and changes the context. A driver
/// would allow more to who asks for it, which would have no place in a graph.
const WHILE_CAPTURING: [&str; 12] = [
    "cuInit",
    "cuCtxGetCurrent",
    "cuCtxPushCurrent",
    "cuCtxPopCurrent",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cuMemsetD8Async",
    "cuMemsetD32Async",
    "cuMemcpyDtoDAsync",
    "cuStreamBeginCapture",
    "cuStreamEndCapture",
    "cuTensorMapEncodeTiled",
];

/// What ends nobody's capture in whatever mode it is called, as measured with drivers of CUDA 13.0. What else there is
/// asks for [`RELAXED`].
const BESIDE_CAPTURES: [&str; 22] = [
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDevicePrimaryCtxRelease",
    "cuDevicePrimaryCtxRetain",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy",
    "cuEventRecord",
    "cuFuncSetAttribute",
    "cuGraphLaunch",
    "cuMemGetAllocationGranularity",
    "cuMemGetInfo",
    "cuMemcpyDtoHAsync",
    "cuMemcpyHtoDAsync",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuStreamCreate",
    "cuStreamDestroy",
    "cuStreamIsCapturing",
    "cuStreamWaitEvent",
    "cuThreadExchangeStreamCaptureMode",
];

/// Work that can be given to a stream again.
#[derive(Debug)]
pub(crate) struct Graph {
    device: usize,
    works: Vec<Work>,
    /// Whether it can be launched.
    is_executable: bool,
}

impl Books {
    /// Why a call must not be made while this or another thread captures what it does.
    pub(crate) fn ends_captures(&self, name: &str) -> Option<&'static str> {
        let mut by = self
            .streams
            .values()
            .filter_map(|stream| stream.captured_by());
        let first = by.next()?;
        let this = thread::current().id();
        if WHILE_CAPTURING.contains(&name) {
            return None;
        }
        if first == this || by.any(|thread| thread == this) {
            return Some("while a stream is captured");
        }
        let is_allowed = mode() == RELAXED || BESIDE_CAPTURES.contains(&name);
        (!is_allowed).then_some("that would end what another thread captures")
    }

    /// Whether the default stream of a device cannot be used, because a stream that waits for it is captured.
    pub(crate) fn default_stream_is_barred(&self, device: usize) -> bool {
        let mut streams = self.streams.values();
        streams.any(|stream| stream.device == device && stream.bars_default())
    }

    fn drop_graph(&mut self, name: &str, handle: u64, is_executable: bool) -> Result<(), u32> {
        self.current(name)?;
        match self.graphs.remove(&handle) {
            Some(graph) if graph.is_executable == is_executable => Ok(()),
            _ => Err(self.fault(format!("{name} of what is not there"))),
        }
    }
}

/// `cuStreamBeginCapture_v2`.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamBeginCapture_v2(stream: u64, _: u32) -> u32 {
    call("cuStreamBeginCapture", Kind::Takes, |books| {
        let device = books.current("cuStreamBeginCapture")?;
        let began = books
            .streams
            .get_mut(&stream)
            .is_some_and(|stream| stream.begin_capture(device));
        match began {
            true => Ok(()),
            false => Err(books.fault("cuStreamBeginCapture of what cannot be".to_owned())),
        }
    })
}

/// `cuStreamIsCapturing`, of the default stream.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamIsCapturing(stream: u64, out: *mut u32) -> u32 {
    call("cuStreamIsCapturing", Kind::Takes, |books| {
        let device = books.current("cuStreamIsCapturing")?;
        if stream != 0 {
            return Err(books.fault("cuStreamIsCapturing of other than the default one".to_owned()));
        }
        if books.default_stream_is_barred(device) {
            return Err(CAPTURE_IMPLICIT);
        }
        // SAFETY: the caller's pointer to the result.
        unsafe { out.write(0) };
        Ok(())
    })
}

/// `cuStreamEndCapture`.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamEndCapture(stream: u64, out: *mut u64) -> u32 {
    call("cuStreamEndCapture", Kind::Takes, |books| {
        let device = books.current("cuStreamEndCapture")?;
        let captured = books
            .streams
            .get_mut(&stream)
            .and_then(|stream| stream.end_capture());
        let Some(works) = captured else {
            return Err(books.fault("cuStreamEndCapture of what is not captured".to_owned()));
        };
        let handle = books.handle();
        let graph = Graph {
            device,
            works,
            is_executable: false,
        };
        books.graphs.insert(handle, graph);
        // SAFETY: the caller's pointer to the result.
        unsafe { out.write(handle) };
        Ok(())
    })
}

/// `cuGraphInstantiateWithFlags`.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphInstantiateWithFlags(out: *mut u64, graph: u64, _: u64) -> u32 {
    call("cuGraphInstantiate", Kind::Takes, |books| {
        books.current("cuGraphInstantiate")?;
        let found = books.graphs.get(&graph).map(|graph| Graph {
            works: graph.works.clone(),
            is_executable: true,
            ..*graph
        });
        let Some(graph) = found else {
            return Err(books.fault("cuGraphInstantiate of what is not there".to_owned()));
        };
        let handle = books.handle();
        books.graphs.insert(handle, graph);
        // SAFETY: the caller's pointer to the result.
        unsafe { out.write(handle) };
        Ok(())
    })
}

/// `cuGraphLaunch`.
#[unsafe(no_mangle)]
pub extern "C" fn cuGraphLaunch(graph: u64, stream: u64) -> u32 {
    call("cuGraphLaunch", Kind::Takes, |books| {
        let device = books.current("cuGraphLaunch")?;
        let found = books.graphs.get(&graph);
        let found = found.filter(|graph| graph.is_executable && graph.device == device);
        let Some(works) = found.map(|graph| graph.works.clone()) else {
            return Err(books.fault("cuGraphLaunch of what cannot be launched".to_owned()));
        };
        for work in works {
            books.give("cuGraphLaunch", device, stream, work)?;
        }
        Ok(())
    })
}

/// `cuGraphExecDestroy`.
#[unsafe(no_mangle)]
pub extern "C" fn cuGraphExecDestroy(graph: u64) -> u32 {
    call("cuGraphExecDestroy", Kind::GivesBack, |books| {
        books.drop_graph("cuGraphExecDestroy", graph, true)
    })
}

/// `cuGraphDestroy`.
#[unsafe(no_mangle)]
pub extern "C" fn cuGraphDestroy(graph: u64) -> u32 {
    call("cuGraphDestroy", Kind::GivesBack, |books| {
        books.drop_graph("cuGraphDestroy", graph, false)
    })
}
