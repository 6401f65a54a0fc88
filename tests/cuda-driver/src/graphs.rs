//! Streams that are captured, and graphs of what they were given. What allocates or waits must not be
//! called meanwhile.

use crate::books::{Books, Kind, call};
use crate::streams::Work;

/// What may be called while a stream is captured: what gives work to streams, and changes the context.
pub(crate) const WHILE_CAPTURING: [&str; 12] = [
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

/// Work that can be given to a stream again.
#[derive(Debug)]
pub(crate) struct Graph {
    device: usize,
    works: Vec<Work>,
    /// Whether it can be launched.
    is_executable: bool,
}

impl Books {
    pub(crate) fn is_capturing(&self) -> bool {
        self.streams.values().any(|stream| stream.is_captured())
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
