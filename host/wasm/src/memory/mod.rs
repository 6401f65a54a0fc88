//! A program's memory on the devices: pieces of chunks that are taken as they are needed and
//! returned when they are empty, within a quota.

mod buffer;
mod error;
mod pool;

pub use buffer::Buffer;
pub(crate) use buffer::HeldPiece;
pub(crate) use error::MemoryError;

use std::sync::Arc;

use pool::{DevicePool, LARGEST_CHUNK, Quota};
use tightfit::device::{Device, Queue};
use tightfit::memory::{LedgerEntry, Usage};
use tightfit::plan::{PART_ALIGNMENT, Plan};

/// The first chunk on a device. Later ones are as large as all before them, so that there are few.
const SMALLEST_CHUNK: u64 = 1 << 20;

/// All devices' memory as one program has it.
#[derive(Debug)]
pub(crate) struct Memory {
    pools: Vec<Arc<DevicePool>>,
    quota: Quota,
}

impl Memory {
    pub(crate) fn new(devices: &Arc<[Box<dyn Device>]>, quota: u64) -> Memory {
        let quota = Quota::new(quota);
        let pool = |index| Arc::new(DevicePool::new(Arc::clone(devices), index, quota.clone()));
        Memory {
            pools: (0..devices.len()).map(pool).collect(),
            quota,
        }
    }

    /// Returns the most that may be reserved on all devices together, in bytes.
    pub(crate) fn quota(&self) -> u64 {
        self.quota.limit()
    }

    /// Returns what is reserved on all devices together.
    pub(crate) fn reserved(&self) -> Usage {
        self.quota.usage()
    }

    /// Returns what the program has of a device.
    pub(crate) fn usage(&self, device: u32) -> Result<Usage, MemoryError> {
        Ok(self.pool(device)?.usage())
    }

    fn pool(&self, device: u32) -> Result<&Arc<DevicePool>, MemoryError> {
        let pool = usize::try_from(device).ok();
        let pool = pool.and_then(|index| self.pools.get(index));
        pool.ok_or(MemoryError::NoSuchDevice {
            device,
            devices: self.pools.len(),
        })
    }

    /// Takes memory, or uses some again.
    ///
    /// # Errors
    /// [`MemoryError`], with nothing taken.
    pub(crate) fn allocate(&self, device: u32, bytes: u64) -> Result<Buffer, MemoryError> {
        let pool = self.pool(device)?;
        let buffer = |held| Buffer::new(Arc::clone(pool), bytes, held);
        if bytes == 0 {
            return Ok(buffer(None));
        }
        if let Some(held) = pool.allocate(bytes) {
            return Ok(buffer(Some(held)));
        }
        let too_much = || MemoryError::Quota {
            need: u64::MAX,
            have: self.quota.limit(),
        };
        let granularity = pool.device().info().granularity.max(1);
        let round = |bytes: u64| bytes.checked_next_multiple_of(granularity);
        let need = bytes.checked_next_multiple_of(PART_ALIGNMENT);
        let need = need.and_then(round).ok_or_else(too_much)?;
        let reserved = pool.chunk_bytes();
        let chunk = round(reserved.clamp(SMALLEST_CHUNK, LARGEST_CHUNK)).unwrap_or(need);
        let mut grown = pool.grow(chunk.max(need));
        if is_short(&grown) {
            // There may be just enough.
            grown = pool.grow(need);
        }
        if is_short(&grown) {
            // What is kept for later may be what is missing now.
            self.trim();
            grown = pool.grow(need);
        }
        grown?;
        let held = pool.allocate(bytes).ok_or_else(too_much)?;
        Ok(buffer(Some(held)))
    }

    /// Waits until all devices have done everything.
    ///
    /// # Errors
    /// The first of what has failed.
    pub(crate) fn finish(&self) -> Result<(), MemoryError> {
        let finished = self.pools.iter().map(|pool| pool.finish());
        // All of them, whatever one says.
        let finished: Vec<_> = finished.collect();
        Ok(finished.into_iter().collect::<Result<(), _>>()?)
    }

    /// Returns a device's own order of work; none where the processor does it.
    pub(crate) fn queue(&self, device: usize) -> Result<Option<Arc<dyn Queue>>, MemoryError> {
        match self.pools.get(device) {
            Some(pool) => Ok(pool.queue()?.cloned()),
            None => Ok(None),
        }
    }

    /// Returns what waits for the devices before something is given back that they may be using.
    pub(crate) fn settler(&self) -> Settler {
        Settler(self.pools.clone())
    }

    /// Returns what holds nothing to the devices.
    pub(crate) fn trim(&self) {
        for pool in &self.pools {
            pool.trim();
        }
    }

    /// Checks that the quota has room for what a plan will reserve.
    ///
    /// # Errors
    /// [`MemoryError::Quota`].
    pub(crate) fn check(&self, plan: &Plan) -> Result<(), MemoryError> {
        self.quota.check(reserved(plan))
    }

    /// Enters what has been reserved for a plan.
    ///
    /// # Errors
    /// [`MemoryError::Quota`], with nothing entered.
    pub(crate) fn enter(&self, plan: &Plan) -> Result<Vec<LedgerEntry>, MemoryError> {
        let mut entries = vec![self.quota.enter(reserved(plan))?];
        let sizes = plan.devices.iter().map(|device| device.size);
        for (pool, size) in self.pools.iter().zip(sizes) {
            entries.extend(pool.enter(size));
        }
        Ok(entries)
    }
}

/// Waits, when it is dropped, until the devices have done everything. It is the first field of what has
/// memory that is not a buffer's.
#[derive(Debug)]
pub(crate) struct Settler(Vec<Arc<DevicePool>>);

impl Drop for Settler {
    fn drop(&mut self) {
        for pool in &self.0 {
            pool.settle();
        }
    }
}

/// Returns whether less would do.
fn is_short(grown: &Result<(), MemoryError>) -> bool {
    grown.as_ref().is_err_and(MemoryError::is_short)
}

/// Returns the bytes that a plan reserves on all devices.
fn reserved(plan: &Plan) -> u64 {
    let reserved = plan.devices.iter().map(|device| device.size.reserved);
    reserved.fold(0, u64::saturating_add)
}
