//! Page-locked host memory.

use std::alloc::{Layout, alloc, dealloc};
use std::ffi::c_void;

use crate::books::{Books, INVALID_VALUE, Kind, OUT_OF_MEMORY, call};

const PAGE: usize = 4096;

/// A piece of it.
#[derive(Debug)]
pub(crate) struct HostMemory {
    pub(crate) len: usize,
}

impl Books {
    /// Whether `len` bytes at `address` are page-locked.
    pub(crate) fn is_locked(&self, address: usize, len: usize) -> bool {
        self.host
            .range(..=address)
            .next_back()
            .is_some_and(|(&start, memory)| address + len <= start + memory.len)
    }
}

/// `cuMemHostAlloc`.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(out: *mut *mut c_void, bytes: usize, _: u32) -> u32 {
    call("cuMemHostAlloc", Kind::Takes, |books| {
        books.current("cuMemHostAlloc")?;
        let layout = Layout::from_size_align(bytes, PAGE).map_err(|_| INVALID_VALUE)?;
        if bytes == 0 {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the layout is not empty.
        let memory = unsafe { alloc(layout) };
        if memory.is_null() {
            return Err(OUT_OF_MEMORY);
        }
        // SAFETY: `bytes` bytes of ours; nobody may count on what is in them.
        unsafe { memory.write_bytes(0xee, bytes) };
        books.host.insert(memory.addr(), HostMemory { len: bytes });
        let now: usize = books.host.values().map(|memory| memory.len).sum();
        books.host_peak = books.host_peak.max(now as u64);
        // SAFETY: the caller's pointer to the result.
        unsafe { out.write(memory.cast()) };
        Ok(())
    })
}

/// `cuMemFreeHost`.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeHost(memory: *mut c_void) -> u32 {
    call("cuMemFreeHost", Kind::GivesBack, |books| {
        books.current("cuMemFreeHost")?;
        let Some(entry) = books.host.remove(&memory.addr()) else {
            return Err(books.fault("host memory freed that is not there".to_owned()));
        };
        let (start, end) = (memory.addr(), memory.addr() + entry.len);
        if books.is_read(start, end) {
            books.fault("host memory freed while it is copied".to_owned());
        }
        let layout = Layout::from_size_align(entry.len, PAGE).map_err(|_| INVALID_VALUE)?;
        // SAFETY: allocated with this layout, and in the books only once.
        unsafe {
            memory.cast::<u8>().write_bytes(0xdd, entry.len);
            dealloc(memory.cast(), layout);
        }
        Ok(())
    })
}
