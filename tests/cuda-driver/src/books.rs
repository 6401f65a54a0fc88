//! The stand-in's state, and what it holds against its user.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::graphs::Graph;
use crate::host::HostMemory;
use crate::memory::{Pages, Range};
use crate::modules::Modules;
use crate::setup::Setup;
use crate::streams::{Event, Stream};

/// What a driver function answers.
pub(crate) type Answer = Result<(), u32>;

pub(crate) const INVALID_VALUE: u32 = 1;
pub(crate) const OUT_OF_MEMORY: u32 = 2;
pub(crate) const NOT_INITIALIZED: u32 = 3;
pub(crate) const NO_DEVICE: u32 = 100;
pub(crate) const INVALID_DEVICE: u32 = 101;
pub(crate) const INVALID_CONTEXT: u32 = 201;
pub(crate) const NOT_READY: u32 = 600;
pub(crate) const NOT_SUPPORTED: u32 = 801;
pub(crate) const CAPTURE_IMPLICIT: u32 = 906;
pub(crate) const UNSUPPORTED_PTX_VERSION: u32 = 222;

/// Addresses of devices start here: no host memory can, so that the processor cannot use them.
const FIRST_ADDRESS: u64 = 1 << 60;

/// Everything there is.
#[derive(Debug)]
pub(crate) struct Books {
    pub(crate) setup: Setup,
    pub(crate) initialized: bool,
    pub(crate) devices: Vec<Gpu>,
    /// Reserved addresses and what is mapped there, by first address.
    pub(crate) ranges: BTreeMap<u64, Range>,
    /// Physical memory by handle.
    pub(crate) pages: HashMap<u64, Pages>,
    /// Page-locked host memory by address.
    pub(crate) host: BTreeMap<usize, HostMemory>,
    pub(crate) streams: HashMap<u64, Stream>,
    pub(crate) events: HashMap<u64, Event>,
    pub(crate) modules: Modules,
    /// Captured work by handle, of graphs and of what is instantiated of them.
    pub(crate) graphs: HashMap<u64, Graph>,
    /// Names of the calls, in order.
    pub(crate) calls: Vec<&'static str>,
    /// Those that [`Setup::fail_at`] counts.
    counted: u64,
    /// The kernels that were launched, in order.
    pub(crate) launches: Vec<&'static str>,
    pub(crate) faults: Vec<String>,
    /// The most bytes in use at a time, of each device.
    pub(crate) peaks: Vec<u64>,
    pub(crate) host_peak: u64,
    next_address: u64,
    next_handle: u64,
}

#[derive(Debug, Default, Clone)]
pub(crate) struct Gpu {
    pub(crate) total: u64,
    pub(crate) used: u64,
    /// By others.
    pub(crate) taken: u64,
    pub(crate) retained: u64,
}

impl Gpu {
    pub(crate) fn free(&self) -> u64 {
        self.total.saturating_sub(self.used + self.taken)
    }
}

static BOOKS: Mutex<Option<Books>> = Mutex::new(None);

thread_local! {
    /// The thread's stack of contexts, by device.
    static CURRENT: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
    /// `CU_STREAM_CAPTURE_MODE_GLOBAL`, or another.
    static MODE: Cell<u32> = const { Cell::new(0) };
}

impl Books {
    pub(crate) fn new(setup: Setup) -> Books {
        Books {
            devices: setup
                .devices
                .iter()
                .map(|&total| Gpu {
                    total,
                    ..Gpu::default()
                })
                .collect(),
            peaks: vec![0; setup.devices.len()],
            setup,
            initialized: false,
            ranges: BTreeMap::new(),
            pages: HashMap::new(),
            host: BTreeMap::new(),
            streams: HashMap::new(),
            events: HashMap::new(),
            modules: Modules::default(),
            graphs: HashMap::new(),
            calls: Vec::new(),
            counted: 0,
            launches: Vec::new(),
            faults: Vec::new(),
            host_peak: 0,
            next_address: FIRST_ADDRESS,
            next_handle: 1,
        }
    }

    /// Notes what a caller must never do, and gives the error for it.
    pub(crate) fn fault(&mut self, text: String) -> u32 {
        self.faults.push(text);
        INVALID_VALUE
    }

    pub(crate) fn handle(&mut self) -> u64 {
        self.next_handle += 1;
        self.next_handle
    }

    /// Addresses that were never given out before, so that stale ones are noticed.
    pub(crate) fn address(&mut self, len: u64) -> u64 {
        let address = self.next_address;
        let step = self.setup.granularity.max(4096);
        self.next_address += len.next_multiple_of(step) + step;
        address
    }

    /// The device of the thread's current context.
    pub(crate) fn current(&mut self, call: &str) -> Result<usize, u32> {
        match CURRENT.with_borrow(|stack| stack.last().copied()) {
            Some(device) if self.devices.get(device).is_some_and(|gpu| gpu.retained > 0) => {
                Ok(device)
            }
            Some(_) => {
                self.fault(format!("{call} under a context that was released"));
                Err(INVALID_CONTEXT)
            }
            None => {
                self.fault(format!("{call} without a current context"));
                Err(INVALID_CONTEXT)
            }
        }
    }

    /// What is still there and should not be.
    pub(crate) fn leaks(&self) -> Vec<String> {
        let mut leaks = Vec::new();
        let mut count = |what: &str, number: usize| {
            if number > 0 {
                leaks.push(format!("{number} {what} left"));
            }
        };
        count("address ranges", self.ranges.len());
        count("pieces of memory", self.pages.len());
        count("pieces of host memory", self.host.len());
        count("streams", self.streams.len());
        count("events", self.events.len());
        count("graphs", self.graphs.len());
        count("modules", self.modules.loaded.len());
        let retained: u64 = self.devices.iter().map(|gpu| gpu.retained).sum();
        count("primary contexts", retained as usize);
        leaks
    }

    /// One fact per line.
    pub(crate) fn report(&self) -> String {
        let mut lines: Vec<String> = Vec::new();
        lines.extend(self.calls.iter().map(|call| format!("call {call}")));
        let launches = self.launches.iter();
        lines.extend(launches.map(|kernel| format!("launch {kernel}")));
        lines.extend(self.faults.iter().map(|fault| format!("fault {fault}")));
        lines.extend(self.leaks().iter().map(|leak| format!("leak {leak}")));
        lines.extend(self.peaks.iter().map(|peak| format!("peak {peak}")));
        lines.push(format!("host {}", self.host_peak));
        lines.join("\n")
    }
}

/// The books, opened as the environment says if nobody has said otherwise.
pub(crate) fn books() -> MutexGuard<'static, Option<Books>> {
    let mut books = BOOKS.lock().unwrap_or_else(PoisonError::into_inner);
    if books.is_none() {
        let setup = std::env::var(crate::control::VARIABLE).unwrap_or_default();
        let setup: Setup = setup.parse().unwrap_or_default();
        if !setup.report.is_empty() {
            // SAFETY: registers a function that may run at any time after.
            unsafe { libc::atexit(write_report) };
        }
        *books = Some(Books::new(setup));
    }
    books
}

extern "C" fn write_report() {
    let books = BOOKS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(books) = &*books {
        // Nobody is left to tell; the test misses the file.
        let _ = std::fs::write(&books.setup.report, books.report());
    }
}

/// What a call does where it is told to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Nothing.
    Takes,
    /// Its work: what gives something back reports errors of earlier work.
    GivesBack,
}

/// Counts a call and carries it out, or fails it.
pub(crate) fn call(name: &'static str, kind: Kind, work: impl FnOnce(&mut Books) -> Answer) -> u32 {
    let mut guard = books();
    let Some(books) = &mut *guard else {
        return NOT_INITIALIZED;
    };
    books.calls.push(name);
    let setup = &books.setup;
    let counts = setup.fail_on.is_none_or(|device| top() == Some(device))
        && (setup.fail_call.is_empty() || setup.fail_call == name);
    books.counted += u64::from(counts);
    let number = books.counted;
    let failing = books
        .setup
        .fail_at
        .is_some_and(|at| counts && (number == at || (books.setup.for_good && number > at)));
    if failing && (kind == Kind::Takes || books.setup.for_good) {
        return books.setup.error;
    }
    if !books.initialized && name != "cuInit" {
        books.fault(format!("{name} before cuInit"));
        return NOT_INITIALIZED;
    }
    if let Some(why) = books.ends_captures(name) {
        return books.fault(format!("{name} {why}"));
    }
    match work(books) {
        Ok(()) if failing => books.setup.error,
        Ok(()) => 0,
        Err(code) => code,
    }
}

/// Makes a device's context current. Only what [`call`] runs may use it.
pub(crate) fn push(device: usize) {
    CURRENT.with_borrow_mut(|stack| stack.push(device));
}

/// What a thread may do while streams are captured: sets it, and gives what it was. As [`push`].
pub(crate) fn exchange_mode(mode: u32) -> u32 {
    MODE.replace(mode)
}

/// What [`exchange_mode`] has set last.
pub(crate) fn mode() -> u32 {
    MODE.get()
}

/// The device whose context is current. As [`push`].
pub(crate) fn top() -> Option<usize> {
    CURRENT.with_borrow(|stack| stack.last().copied())
}

/// Undoes the last [`push`].
pub(crate) fn pop() -> Option<usize> {
    CURRENT.with_borrow_mut(Vec::pop)
}
