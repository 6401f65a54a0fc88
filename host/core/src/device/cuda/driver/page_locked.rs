//! Memory of the host that devices can read while the processor goes on.

use std::any::Any;
use std::mem::ManuallyDrop;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::sys;
use memmap2::MmapMut;

use super::{Context, NOT_SUPPORTED, twice, unavailable};
use crate::device::{DeviceError, PageLocked};
use crate::types::Bytes;

/// Memory in one piece that is page-locked. Given back when dropped.
#[derive(Debug)]
struct Allocation {
    context: Arc<Context>,
    memory: NonNull<u8>,
    len: usize,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// The system's, in large pages where there are any, which the driver has locked: of small ones
    /// it locks each by itself.
    Registered(ManuallyDrop<MmapMut>),
    /// The driver's own, where it locks no other.
    Allocated,
}

// SAFETY: the memory is bound to no thread.
unsafe impl Send for Allocation {}
// SAFETY: as above. Its bytes are reached only through pieces, no two of which have the same.
unsafe impl Sync for Allocation {}

impl Allocation {
    fn new(context: &Arc<Context>, len: usize) -> Result<Allocation, DeviceError> {
        match Allocation::register(context, len)? {
            Some(registered) => Ok(registered),
            None => Allocation::allocate(context, len),
        }
    }

    /// `None` where the driver cannot lock what is not its own.
    fn register(context: &Arc<Context>, len: usize) -> Result<Option<Allocation>, DeviceError> {
        let refused = |source| DeviceError::Refused {
            device: context.name().to_owned(),
            call: "mmap",
            bytes: len as u64,
            source,
        };
        let mut mapping = MmapMut::map_anon(len).map_err(refused)?;
        #[cfg(target_os = "linux")]
        {
            // Refusal costs only time.
            let _ = mapping.advise(memmap2::Advice::HugePage);
        }
        let memory = NonNull::from(&mut *mapping).cast::<u8>();
        let _current = context.enter()?;
        let _beside = context.beside_captures()?;
        // SAFETY: the memory is mapped, and stays so until it is given back by the destructor.
        let code = unsafe {
            (context.api.cuMemHostRegister_v2)(
                memory.as_ptr().cast(),
                len,
                sys::CU_MEMHOSTREGISTER_PORTABLE,
            )
        };
        if code == NOT_SUPPORTED {
            return Ok(None);
        }
        context.check("cuMemHostRegister", len as u64, code)?;
        Ok(Some(Allocation {
            context: Arc::clone(context),
            memory,
            len,
            kind: Kind::Registered(ManuallyDrop::new(mapping)),
        }))
    }

    fn allocate(context: &Arc<Context>, len: usize) -> Result<Allocation, DeviceError> {
        let _current = context.enter()?;
        let _beside = context.beside_captures()?;
        let mut memory = ptr::null_mut();
        // SAFETY: `memory` outlives the call; the context is current.
        let code = unsafe {
            (context.api.cuMemHostAlloc)(&raw mut memory, len, sys::CU_MEMHOSTALLOC_PORTABLE)
        };
        context.check("cuMemHostAlloc", len as u64, code)?;
        let memory = NonNull::new(memory.cast::<u8>()).ok_or_else(|| DeviceError::Driver {
            device: context.name().to_owned(),
            call: "cuMemHostAlloc",
            bytes: len as u64,
            error: "no address".to_owned(),
            out_of_memory: false,
        })?;
        Ok(Allocation {
            context: Arc::clone(context),
            memory,
            len,
            kind: Kind::Allocated,
        })
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let start = Instant::now();
        let (api, context) = (self.context.api, &self.context);
        let _current = twice(|| context.enter());
        let _beside = context.beside_captures();
        let memory = self.memory.as_ptr().cast();
        // No piece is left, and no device reads it: a piece that one may be reading is not dropped
        // (`Staging` sees to that).
        match &mut self.kind {
            Kind::Registered(mapping) => {
                // SAFETY: registered by us, and given back once.
                let code = unsafe { (api.cuMemHostUnregister)(memory) };
                context.check_release("cuMemHostUnregister", code);
                if code == 0 {
                    // SAFETY: dropped here and nowhere else. Otherwise it is rather lost than mapped
                    // anew while the driver takes it for locked.
                    unsafe { ManuallyDrop::drop(mapping) };
                }
            }
            Kind::Allocated => {
                // SAFETY: allocated by us and freed once.
                let code = unsafe { (api.cuMemFreeHost)(memory) };
                context.check_release("cuMemFreeHost", code);
            }
        }
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
        let allocation = Allocation::new(context, len.max(1))?;
        let bytes = Bytes(allocation.len as u64);
        tracing::debug!("page-locked {bytes} in {:.1?}", start.elapsed());
        Ok(CudaPageLocked {
            // What the system maps is all zeros.
            is_initialized: matches!(allocation.kind, Kind::Registered(_)),
            allocation: Arc::new(allocation),
            start: 0,
            len,
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
