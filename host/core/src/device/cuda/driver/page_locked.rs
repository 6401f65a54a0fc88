//! Memory of the host that devices can read while the processor goes on.

use std::any::Any;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::sys;

use super::{Context, twice, unavailable};
use crate::device::{DeviceError, PageLocked};
use crate::types::Bytes;

/// What the driver has given in one piece. Given back when dropped.
#[derive(Debug)]
struct Allocation {
    context: Arc<Context>,
    memory: NonNull<u8>,
    len: usize,
}

// SAFETY: the memory is bound to no thread.
unsafe impl Send for Allocation {}
// SAFETY: as above. Its bytes are reached only through pieces, no two of which have the same.
unsafe impl Sync for Allocation {}

impl Drop for Allocation {
    fn drop(&mut self) {
        let start = Instant::now();
        let _current = twice(|| self.context.enter());
        // SAFETY: allocated by us and freed once: no piece is left. No device reads it: a piece that
        // one may be reading is not dropped (`Staging` sees to that).
        let code = unsafe { (self.context.api.cuMemFreeHost)(self.memory.as_ptr().cast()) };
        self.context.check_release("cuMemFreeHost", code);
        let bytes = Bytes(self.len as u64);
        tracing::debug!("page-locked {bytes} given back in {:.1?}", start.elapsed());
    }
}

/// A piece of page-locked host memory, which every device can read. Its bytes are nobody else's. The
/// memory is given back when its last piece is dropped: to lock and to free it takes the driver a
/// long time, in which it does nothing else, so that a load takes all of it at once.
#[derive(Debug)]
pub(in crate::device::cuda) struct CudaPageLocked {
    allocation: Arc<Allocation>,
    start: usize,
    len: usize,
    is_initialized: bool,
}

impl CudaPageLocked {
    /// Takes `len` bytes.
    pub(in crate::device::cuda) fn new(
        context: &Arc<Context>,
        len: usize,
    ) -> Result<CudaPageLocked, DeviceError> {
        let start = Instant::now();
        let taken = len.max(1);
        let _current = context.enter()?;
        let mut memory = ptr::null_mut();
        // SAFETY: `memory` outlives the call; the context is current.
        let code = unsafe {
            (context.api.cuMemHostAlloc)(&raw mut memory, taken, sys::CU_MEMHOSTALLOC_PORTABLE)
        };
        context.check("cuMemHostAlloc", taken as u64, code)?;
        let memory = NonNull::new(memory.cast::<u8>()).ok_or_else(|| DeviceError::Driver {
            device: context.name().to_owned(),
            call: "cuMemHostAlloc",
            bytes: taken as u64,
            error: "no address".to_owned(),
            out_of_memory: false,
        })?;
        let bytes = Bytes(taken as u64);
        tracing::debug!("page-locked {bytes} in {:.1?}", start.elapsed());
        Ok(CudaPageLocked {
            allocation: Arc::new(Allocation {
                context: Arc::clone(context),
                memory,
                len: taken,
            }),
            start: 0,
            len,
            is_initialized: false,
        })
    }

    /// Returns what is behind the trait.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] for memory of another driver, which `device` may not read.
    pub(super) fn of(
        memory: Box<dyn PageLocked>,
        device: &str,
    ) -> Result<CudaPageLocked, DeviceError> {
        let memory: Box<dyn Any> = memory;
        match memory.downcast() {
            Ok(own) => Ok(*own),
            Err(_) => Err(unavailable(
                device,
                "the buffers are not page-locked by its driver".to_owned(),
            )),
        }
    }

    /// Cuts off the first `bytes` bytes; all where there are not as many.
    #[must_use]
    pub(super) fn cut(&mut self, bytes: usize) -> CudaPageLocked {
        let first = CudaPageLocked {
            allocation: Arc::clone(&self.allocation),
            start: self.start,
            len: bytes.min(self.len),
            is_initialized: self.is_initialized,
        };
        self.start += first.len;
        self.len -= first.len;
        first
    }

    /// Takes all of its bytes.
    #[must_use]
    pub(super) fn cut_all(&mut self) -> CudaPageLocked {
        self.cut(self.len)
    }

    /// Both as one piece, if the other begins where this one ends; else this one alone.
    #[must_use]
    pub(super) fn join(mut self, other: CudaPageLocked) -> CudaPageLocked {
        let is_one_allocation = Arc::ptr_eq(&self.allocation, &other.allocation);
        if is_one_allocation && self.start + self.len == other.start {
            self.len += other.len;
            self.is_initialized &= other.is_initialized;
        }
        self
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Its first byte, for the driver.
    pub(super) fn as_ptr(&self) -> *const u8 {
        self.first()
    }

    /// Its bytes. Not to be asked for while a device reads them.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        let first = self.first();
        if !self.is_initialized {
            // By whoever uses it, so that workers share this.
            // SAFETY: `len` bytes of the allocation, and this piece's alone.
            unsafe { first.write_bytes(0, self.len) };
            self.is_initialized = true;
        }
        // SAFETY: as above, and initialized; no device reads them.
        unsafe { std::slice::from_raw_parts_mut(first, self.len) }
    }

    fn first(&self) -> *mut u8 {
        // SAFETY: pieces lie inside of their allocation, or end where it ends.
        unsafe { self.allocation.memory.as_ptr().add(self.start) }
    }
}

impl PageLocked for CudaPageLocked {
    fn take(&mut self, bytes: usize) -> Box<dyn PageLocked> {
        Box::new(self.cut(bytes))
    }
}
