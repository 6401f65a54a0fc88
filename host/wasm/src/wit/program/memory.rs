//! A program's memory on the devices: pieces of chunks that are taken as they are needed and
//! returned when they are empty, within a quota.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::buffer::Buffer;
use super::stop::Stopped;
use tightfit::device::{Device, DeviceError, Piece, Reservation, WRITER_BUFFERS, Writer};
use tightfit::memory::{Allocation, Ledger, LedgerEntry, Pool, ReservationSize, Usage};
use tightfit::plan::{PART_ALIGNMENT, Plan};
use tightfit::types::Bytes;

/// The first chunk on a device. Later ones are as large as all before them, so that there are few.
const SMALLEST_CHUNK: u64 = 1 << 20;

/// Chunks are not larger, unless a single buffer is. A larger one is not kept when it is empty.
const LARGEST_CHUNK: u64 = 64 << 20;

/// What is written at once into memory that the processor cannot write.
const WRITER_BYTES: usize = 256 << 10;

/// Why a program's memory cannot be had or used.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A device that is not there.
    #[error("there is no device {device}: there are {devices} (from 0)")]
    NoSuchDevice {
        /// The index given.
        device: u32,
        /// How many devices there are.
        devices: usize,
    },
    /// More than the program may take.
    #[error("the quota is exceeded: need {}, have {}", Bytes(*need), Bytes(*have))]
    Quota {
        /// Bytes that would be reserved.
        need: u64,
        /// Bytes of the quota that are left.
        have: u64,
    },
    /// The device has too little memory, or failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A range outside of a buffer.
    #[error("{bytes} bytes from {offset} on lie outside of a buffer of {len}")]
    OutOfBounds {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        bytes: u64,
        /// Length of the buffer.
        len: u64,
    },
    /// The program is to end.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// All devices' memory as one program has it.
#[derive(Debug)]
pub(super) struct Memory {
    pools: Vec<Arc<DevicePool>>,
    quota: Quota,
}

/// Bytes that may be reserved on all devices together, and that are.
#[derive(Debug, Clone)]
struct Quota {
    limit: u64,
    ledger: Arc<Ledger>,
}

impl Quota {
    /// Whether so much is left. Asked before anything is taken; it is entered when it has been, so
    /// that a peak is of what there was.
    fn check(&self, bytes: u64) -> Result<(), MemoryError> {
        let have = self.limit.saturating_sub(self.ledger.usage().reserved.now);
        match bytes <= have {
            true => Ok(()),
            false => Err(MemoryError::Quota { need: bytes, have }),
        }
    }

    fn enter(&self, bytes: u64) -> Result<LedgerEntry, MemoryError> {
        let entry = Ledger::enter(&self.ledger, reserved_only(bytes), self.limit);
        entry.map_err(|have| MemoryError::Quota { need: bytes, have })
    }
}

fn reserved_only(bytes: u64) -> ReservationSize {
    ReservationSize {
        reserved: bytes,
        ..ReservationSize::default()
    }
}

impl Memory {
    pub(super) fn new(devices: &Arc<[Box<dyn Device>]>, quota: u64) -> Memory {
        let quota = Quota {
            limit: quota,
            ledger: Arc::default(),
        };
        let pool = |index| {
            Arc::new(DevicePool {
                devices: Arc::clone(devices),
                index,
                ledger: Arc::default(),
                quota: quota.clone(),
                chunks: Mutex::default(),
            })
        };
        Memory {
            pools: (0..devices.len()).map(pool).collect(),
            quota,
        }
    }

    /// The most that may be reserved on all devices together, in bytes.
    pub(super) fn quota(&self) -> u64 {
        self.quota.limit
    }

    /// What is reserved on all devices together.
    pub(super) fn reserved(&self) -> Usage {
        self.quota.ledger.usage()
    }

    /// What the program has of a device.
    pub(super) fn usage(&self, device: u32) -> Result<Usage, MemoryError> {
        Ok(self.pool(device)?.ledger.usage())
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
    pub(super) fn allocate(&self, device: u32, bytes: u64) -> Result<Buffer, MemoryError> {
        let pool = self.pool(device)?;
        if let Some(buffer) = DevicePool::allocate(pool, bytes) {
            return Ok(buffer);
        }
        let too_much = || MemoryError::Quota {
            need: u64::MAX,
            have: self.quota.limit,
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
        DevicePool::allocate(pool, bytes).ok_or_else(too_much)
    }

    /// Returns what holds nothing to the devices.
    pub(super) fn trim(&self) {
        for pool in &self.pools {
            pool.lock().trim(|_| true);
        }
    }

    /// Whether the quota has room for what a plan will reserve.
    ///
    /// # Errors
    /// [`MemoryError::Quota`].
    pub(super) fn check(&self, plan: &Plan) -> Result<(), MemoryError> {
        self.quota.check(reserved(plan))
    }

    /// Enters what has been reserved for a plan.
    ///
    /// # Errors
    /// [`MemoryError::Quota`], with nothing entered.
    pub(super) fn enter(&self, plan: &Plan) -> Result<Vec<LedgerEntry>, MemoryError> {
        let mut entries = vec![self.quota.enter(reserved(plan))?];
        let sizes = plan.devices.iter().map(|device| device.size);
        for (pool, size) in self.pools.iter().zip(sizes) {
            // The quota bounds it.
            entries.extend(Ledger::enter(&pool.ledger, size, u64::MAX));
        }
        Ok(entries)
    }
}

/// Whether less would do.
fn is_short(grown: &Result<(), MemoryError>) -> bool {
    use DeviceError::{Driver, OutOfMemory};
    match grown {
        Err(MemoryError::Quota { .. } | MemoryError::Device(OutOfMemory { .. })) => true,
        Err(MemoryError::Device(Driver { out_of_memory, .. })) => *out_of_memory,
        _ => false,
    }
}

/// Bytes that a plan reserves on all devices.
fn reserved(plan: &Plan) -> u64 {
    let reserved = plan.devices.iter().map(|device| device.size.reserved);
    reserved.fold(0, u64::saturating_add)
}

/// One device's memory as one program has it.
#[derive(Debug)]
pub(super) struct DevicePool {
    devices: Arc<[Box<dyn Device>]>,
    index: usize,
    /// Buffers and models as requested and padded, chunks and models as reserved.
    ledger: Arc<Ledger>,
    quota: Quota,
    chunks: Mutex<Chunks>,
}

#[derive(Debug, Default)]
struct Chunks {
    next: u64,
    by_number: BTreeMap<u64, Chunk>,
    /// Carries bytes into the chunk that was written last, where the processor cannot. It holds
    /// that chunk's memory and page-locked buffers, so there is only one.
    writer: Option<(u64, Box<dyn Writer>)>,
}

/// Memory that was taken in one piece, and which pieces of it are in use.
#[derive(Debug)]
struct Chunk {
    pool: Pool,
    /// Given back before the books say so: fields drop in this order.
    memory: Box<dyn Reservation>,
    _entries: [LedgerEntry; 2],
}

/// A piece of a chunk.
#[derive(Debug)]
pub(super) struct Held {
    chunk: u64,
    allocation: Allocation,
    entry: LedgerEntry,
}

impl DevicePool {
    fn device(&self) -> &dyn Device {
        &*self.devices[self.index]
    }

    /// The device's index.
    pub(super) fn index(&self) -> usize {
        self.index
    }

    fn lock(&self) -> MutexGuard<'_, Chunks> {
        // No update is left half done by a panic: the pools' own calls do not panic.
        self.chunks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of all chunks.
    fn chunk_bytes(&self) -> u64 {
        let chunks = self.lock();
        let bytes = chunks.by_number.values().map(|chunk| chunk.memory.len());
        bytes.fold(0, u64::saturating_add)
    }

    /// A piece of what there is; the oldest chunks are filled first, so that later ones get empty.
    fn allocate(pool: &Arc<DevicePool>, bytes: u64) -> Option<Buffer> {
        if bytes == 0 {
            return Some(Buffer::new(Arc::clone(pool), 0, None));
        }
        let padded = bytes.checked_next_multiple_of(PART_ALIGNMENT)?;
        let mut chunks = pool.lock();
        let (chunk, allocation) = chunks.by_number.iter_mut().find_map(|(&number, chunk)| {
            let allocation = chunk.pool.allocate(bytes)?;
            Some((number, allocation))
        })?;
        drop(chunks);
        let size = ReservationSize {
            requested: bytes,
            padded,
            reserved: 0,
        };
        let held = match Ledger::enter(&pool.ledger, size, u64::MAX) {
            Ok(entry) => Some(Held {
                chunk,
                allocation,
                entry,
            }),
            // Nothing is reserved by it, so that it is never too much.
            Err(_) => return None,
        };
        Some(Buffer::new(Arc::clone(pool), bytes, held))
    }

    /// Takes another chunk of this many bytes, a multiple of the device's granularity.
    fn grow(&self, bytes: u64) -> Result<(), MemoryError> {
        self.quota.check(bytes)?;
        let memory = self.device().reserve(ReservationSize {
            requested: bytes,
            padded: bytes,
            reserved: bytes,
        })?;
        let quota = self.quota.enter(bytes)?;
        let own = Ledger::enter(&self.ledger, reserved_only(bytes), u64::MAX);
        let own = own.map_err(|have| MemoryError::Quota { need: bytes, have })?;
        let mut chunks = self.lock();
        let number = chunks.next;
        chunks.next += 1;
        chunks.by_number.insert(
            number,
            Chunk {
                pool: Pool::new(memory.len(), PART_ALIGNMENT),
                memory,
                _entries: [quota, own],
            },
        );
        Ok(())
    }

    /// Takes a piece back, and returns chunks that have become empty: all but one, of which a
    /// program that allocates and frees in turn has the use.
    pub(super) fn give_back(&self, held: Held) {
        let Held {
            chunk: number,
            allocation,
            entry,
        } = held;
        drop(entry);
        let mut chunks = self.lock();
        if let Some(chunk) = chunks.by_number.get_mut(&number) {
            // It comes from there.
            let _ = chunk.pool.free(allocation);
        }
        let mut kept = false;
        chunks.trim(|chunk| {
            let keep = !kept && chunk.memory.len() <= LARGEST_CHUNK;
            kept |= keep;
            !keep
        });
    }

    /// Copies bytes of a piece from `offset` on.
    pub(super) fn read(&self, held: &Held, offset: u64, out: &mut [u8]) -> Result<(), DeviceError> {
        let chunks = self.lock();
        match chunks.by_number.get(&held.chunk) {
            Some(chunk) => {
                let offset = held.allocation.offset().saturating_add(offset);
                chunk.memory.read(offset, out)
            }
            None => Err(self.gone()),
        }
    }

    /// Writes bytes into a piece at `offset`. They lie inside of it.
    pub(super) fn write(&self, held: &Held, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        let mut chunks = self.lock();
        let Chunks {
            by_number, writer, ..
        } = &mut *chunks;
        let chunk = by_number.get_mut(&held.chunk).ok_or_else(|| self.gone())?;
        let mut offset = held.allocation.offset().saturating_add(offset);
        if let Some(memory) = chunk.memory.host_memory_mut() {
            let start = usize::try_from(offset).ok();
            let place = start.and_then(|start| memory.get_mut(start..)?.get_mut(..bytes.len()));
            place.ok_or_else(|| self.gone())?.copy_from_slice(bytes);
            return Ok(());
        }
        let carrier = match writer {
            Some((number, carrier)) if *number == held.chunk => carrier,
            _ => {
                // The last one's buffers are released before others are taken.
                *writer = None;
                let buffers = chunk.memory.page_lock(WRITER_BUFFERS * WRITER_BYTES)?;
                let buffers = buffers.ok_or_else(|| self.gone())?;
                let carrier = chunk.memory.writer(buffers)?;
                let carrier = carrier.ok_or_else(|| self.gone())?;
                &mut writer.insert((held.chunk, carrier)).1
            }
        };
        for bytes in bytes.chunks(WRITER_BYTES) {
            let staged = carrier.stage()?;
            let place = staged.get_mut(..bytes.len()).ok_or_else(|| self.gone())?;
            place.copy_from_slice(bytes);
            carrier.write(&[Piece {
                start: 0,
                len: bytes.len(),
                offset,
            }])?;
            offset += bytes.len() as u64;
        }
        carrier.finish()
    }

    /// A device whose memory is not what it said: a fault that has no better name.
    fn gone(&self) -> DeviceError {
        DeviceError::Unavailable {
            device: self.device().info().name,
            reason: "its memory is not there any more".to_owned(),
        }
    }
}

impl Chunks {
    /// Returns those empty chunks that `unwanted` names.
    fn trim(&mut self, mut unwanted: impl FnMut(&Chunk) -> bool) {
        let writer = &mut self.writer;
        self.by_number.retain(|number, chunk| {
            let keep = chunk.pool.used().now > 0 || !unwanted(chunk);
            if !keep && writer.as_ref().is_some_and(|(last, _)| last == number) {
                // It would keep the memory.
                *writer = None;
            }
            keep
        });
    }
}
