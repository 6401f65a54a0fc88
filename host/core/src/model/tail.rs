//! The bytes behind the weights, handed out to the application: for KV caches, which then are in the
//! plan like the weights.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memmap2::MmapMut;

use super::shared::address;
use crate::device::{DeviceAddress, DeviceError, Reservation};
use crate::memory::{Allocation, Gauge, Pool};
use crate::plan::{DevicePlan, PART_ALIGNMENT};

/// The tail of one device: what a plan reserved behind the weights. Clones hand out the same bytes.
/// The device's memory is not given back while one of them or an allocation lives.
#[derive(Debug, Clone)]
pub struct TailAllocator(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    device: String,
    memory: Arc<dyn Reservation>,
    /// First byte of the tail in the reservation.
    start: u64,
    pool: Mutex<Pool>,
}

impl TailAllocator {
    /// `None` for a device whose plan has no tail.
    pub(super) fn new(plan: &DevicePlan, memory: &Arc<dyn Reservation>) -> Option<TailAllocator> {
        (plan.tail > 0).then(|| {
            TailAllocator(Arc::new(Inner {
                device: plan.device.name.clone(),
                memory: Arc::clone(memory),
                start: plan.size.padded,
                pool: Mutex::new(Pool::new(plan.tail, PART_ALIGNMENT)),
            }))
        })
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        // A pool is changed by calls that do not panic, so a poisoned lock is still right.
        self.0.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes `bytes` bytes, at a multiple of 256, until the allocation is dropped. What is in them is
    /// undefined on a GPU and zero in host memory.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] with the largest piece that is free, and
    /// [`DeviceError::Refused`] by the operating system.
    pub fn allocate(&self, bytes: u64) -> Result<TailAllocation, DeviceError> {
        let piece = {
            let mut pool = self.pool();
            pool.allocate(bytes)
                .ok_or_else(|| DeviceError::OutOfMemory {
                    device: self.0.device.clone(),
                    need: bytes,
                    have: pool.largest_free(),
                })?
        };
        let mut allocation = TailAllocation {
            tail: self.clone(),
            offset: piece.offset(),
            bytes,
            piece: Some(piece),
            host: None,
        };
        // Readers of the weights hold references to all of the host's reservation, so nobody may
        // write to it. Its last bytes stay untouched and take no pages; those of each allocation are
        // a mapping of its own.
        if self.0.memory.host_memory().is_some() && bytes > 0 {
            let mapped = usize::try_from(bytes)
                .map_err(std::io::Error::other)
                .and_then(MmapMut::map_anon);
            let mapped = mapped.map_err(|source| DeviceError::Refused {
                device: self.0.device.clone(),
                call: "mmap",
                bytes,
                source,
            })?;
            allocation.host = Some(mapped);
        }
        Ok(allocation)
    }

    /// Returns the number of bytes that can be handed out at most.
    pub fn capacity(&self) -> u64 {
        self.pool().capacity()
    }

    /// Returns the number of bytes handed out, now and at most, each allocation rounded up to 256.
    pub fn used(&self) -> Gauge {
        self.pool().used()
    }

    /// Returns the most that one allocation can have now.
    pub fn largest_free(&self) -> u64 {
        self.pool().largest_free()
    }
}

/// A piece of a tail, given back when dropped. On a GPU, whoever runs kernels on it must have waited
/// for them by then: the next allocation may have the same bytes.
#[derive(Debug)]
pub struct TailAllocation {
    tail: TailAllocator,
    offset: u64,
    bytes: u64,
    /// Taken when dropped.
    piece: Option<Allocation>,
    host: Option<MmapMut>,
}

impl TailAllocation {
    /// Returns its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Its first byte in the reservation.
    pub(crate) fn offset(&self) -> u64 {
        self.tail.0.start + self.offset
    }

    /// Returns where it lies in a GPU's memory, a multiple of 256; `None` for host memory.
    pub fn address(&self) -> Option<DeviceAddress> {
        address(&*self.tail.0.memory, self.tail.0.start + self.offset)
    }

    /// Returns its bytes, where they are in host memory.
    pub fn host(&self) -> Option<&[u8]> {
        match &self.host {
            None if self.bytes > 0 => None,
            host => Some(host.as_deref().unwrap_or_default()),
        }
    }

    /// Returns its bytes to write, where they are in host memory.
    pub fn host_mut(&mut self) -> Option<&mut [u8]> {
        match &mut self.host {
            None if self.bytes > 0 => None,
            host => Some(host.as_deref_mut().unwrap_or_default()),
        }
    }

    /// Name of its device.
    pub fn device(&self) -> &str {
        &self.tail.0.device
    }
}

impl Drop for TailAllocation {
    fn drop(&mut self) {
        if let Some(piece) = self.piece.take() {
            // It comes from this pool.
            let freed = self.tail.pool().free(piece);
            debug_assert!(freed.is_ok());
        }
    }
}
