//! Page-locked host memory.

use std::alloc::{Layout, alloc, dealloc};
use std::ffi::c_void;

use crate::books::{Books, INVALID_VALUE, Kind, NOT_SUPPORTED, OUT_OF_MEMORY, call};

const PAGE: usize = 4096;

/// A piece of it.
#[derive(Debug)]
pub(crate) struct HostMemory {
    pub(crate) len: usize,
    /// Whether it is the caller's, and was registered.
    is_registered: bool,
}

impl Books {
    fn lock(&mut self, address: usize, len: usize, is_registered: bool) {
        let memory = HostMemory { len, is_registered };
        self.host.insert(address, memory);
        let now: usize = self.host.values().map(|memory| memory.len).sum();
        self.host_peak = self.host_peak.max(now as u64);
    }

    /// Gives the length.
    fn unlock(&mut self, address: usize, is_registered: bool) -> Result<usize, u32> {
        let found = self.host.get(&address);
        let Some(len) = found
            .filter(|memory| memory.is_registered == is_registered)
            .map(|memory| memory.len)
        else {
            return Err(self.fault("host memory given back that was not taken so".to_owned()));
        };
        self.host.remove(&address);
        if self.is_read(address, address + len) {
            self.fault("host memory given back while it is copied".to_owned());
        }
        Ok(len)
    }

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
        books.lock(memory.addr(), bytes, false);
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
        let len = books.unlock(memory.addr(), false)?;
        let layout = Layout::from_size_align(len, PAGE).map_err(|_| INVALID_VALUE)?;
        // SAFETY: allocated with this layout, and in the books only once.
        unsafe {
            memory.cast::<u8>().write_bytes(0xdd, len);
            dealloc(memory.cast(), layout);
        }
        Ok(())
    })
}

/// `cuMemHostRegister_v2`.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostRegister_v2(memory: *mut c_void, bytes: usize, _: u32) -> u32 {
    call("cuMemHostRegister", Kind::Takes, |books| {
        books.current("cuMemHostRegister")?;
        if !books.setup.virtual_memory {
            return Err(NOT_SUPPORTED);
        }
        let (start, end) = (memory.addr(), memory.addr().saturating_add(bytes));
        let before = books.host.range(..end).next_back();
        let is_taken = before.is_some_and(|(&other, memory)| other + memory.len > start);
        if bytes == 0 || is_taken {
            return Err(INVALID_VALUE);
        }
        books.lock(start, bytes, true);
        Ok(())
    })
}

/// `cuMemHostUnregister`.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostUnregister(memory: *mut c_void) -> u32 {
    call("cuMemHostUnregister", Kind::GivesBack, |books| {
        books.current("cuMemHostUnregister")?;
        books.unlock(memory.addr(), true)?;
        Ok(())
    })
}
