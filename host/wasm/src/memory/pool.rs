//! One device's memory as one program has it, in chunks.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::error::MemoryError;
use tightfit::device::{
    Device, DeviceBytes, DeviceError, Piece, Queue, Reservation, WRITER_BUFFERS, Writer,
};
use tightfit::memory::{Allocation, Ledger, LedgerEntry, Pool, ReservationSize, Usage};
use tightfit::plan::PART_ALIGNMENT;
use tightfit_kernels::decoder::Operand;

/// Chunks are not larger, unless a single buffer is. A larger one is not kept when it is empty.
pub(super) const LARGEST_CHUNK: u64 = 64 << 20;

/// What is written at once into memory that the processor cannot write.
const WRITER_BYTES: usize = 256 << 10;

/// Bytes that may be reserved on all devices together, and that are.
#[derive(Debug, Clone)]
pub(super) struct Quota {
    limit: u64,
    ledger: Arc<Ledger>,
}

impl Quota {
    pub(super) fn new(limit: u64) -> Quota {
        Quota {
            limit,
            ledger: Arc::default(),
        }
    }

    /// Returns the most that may be reserved, in bytes.
    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    /// Returns what is reserved.
    pub(super) fn usage(&self) -> Usage {
        self.ledger.usage()
    }

    /// Checks that this many bytes are left. Asked before anything is taken; it is entered when it
    /// has been, so that a peak is of what there was.
    ///
    /// # Errors
    /// [`MemoryError::Quota`].
    pub(super) fn check(&self, bytes: u64) -> Result<(), MemoryError> {
        let have = self.limit.saturating_sub(self.ledger.usage().reserved.now);
        match bytes <= have {
            true => Ok(()),
            false => Err(MemoryError::Quota { need: bytes, have }),
        }
    }

    /// Enters what has been reserved.
    ///
    /// # Errors
    /// [`MemoryError::Quota`], with nothing entered.
    pub(super) fn enter(&self, bytes: u64) -> Result<LedgerEntry, MemoryError> {
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

/// One device's memory as one program has it.
#[derive(Debug)]
pub(super) struct DevicePool {
    devices: Arc<[Box<dyn Device>]>,
    index: usize,
    /// Buffers and models as requested and padded, chunks and models as reserved.
    ledger: Arc<Ledger>,
    quota: Quota,
    chunks: Mutex<Chunks>,
    /// What the program has the device do, in the order of its calls. Made when it is first needed; none
    /// where the processor does it. Dropped after the memory that it may be using, which it keeps.
    queue: OnceLock<Option<Arc<dyn Queue>>>,
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

/// Bytes of a piece that are to be read or written in place.
#[derive(Debug)]
pub(super) struct HostRange<'a> {
    pub(super) held: &'a Held,
    pub(super) offset: u64,
    pub(super) bytes: u64,
    pub(super) is_written: bool,
}

/// A piece of a chunk.
#[derive(Debug)]
pub(super) struct Held {
    chunk: u64,
    allocation: Allocation,
    entry: LedgerEntry,
}

impl DevicePool {
    pub(super) fn new(devices: Arc<[Box<dyn Device>]>, index: usize, quota: Quota) -> DevicePool {
        DevicePool {
            devices,
            index,
            ledger: Arc::default(),
            quota,
            chunks: Mutex::default(),
            queue: OnceLock::new(),
        }
    }

    /// Returns the device's own order of work for this program; none where the processor does it.
    ///
    /// # Errors
    /// When the driver refuses. It may be tried again.
    pub(super) fn queue(&self) -> Result<Option<&Arc<dyn Queue>>, DeviceError> {
        if let Some(queue) = self.queue.get() {
            return Ok(queue.as_ref());
        }
        let queue = self.device().queue()?;
        Ok(self.queue.get_or_init(|| queue).as_ref())
    }

    /// Waits until the device has done everything: before memory is given back that it may be using, so
    /// that books and memory agree.
    pub(super) fn settle(&self) {
        if let Some(Some(queue)) = self.queue.get()
            && let Err(error) = queue.finish()
        {
            // The queue keeps the memory then. Whoever asks next is told, too.
            tracing::warn!("{error}");
        }
    }

    /// Waits until the device has done everything.
    ///
    /// # Errors
    /// When something has failed.
    pub(super) fn finish(&self) -> Result<(), DeviceError> {
        match self.queue.get() {
            Some(Some(queue)) => queue.finish(),
            _ => Ok(()),
        }
    }

    /// Returns a range of a piece for the queue; none for memory of the host.
    pub(super) fn range(
        &self,
        held: &Held,
        offset: u64,
        bytes: u64,
    ) -> Result<Option<DeviceBytes>, DeviceError> {
        let chunks = self.lock();
        let chunk = chunks
            .by_number
            .get(&held.chunk)
            .ok_or_else(|| self.gone())?;
        let offset = held.allocation.offset().saturating_add(offset);
        chunk.memory.range(offset, bytes)
    }

    /// Has `work` see bytes of pieces in place, where the processor can read them; else nothing is done.
    pub(super) fn with_host<T>(
        &self,
        ranges: [(&Held, u64, u64); 2],
        work: impl FnOnce([&[u8]; 2]) -> T,
    ) -> Option<T> {
        let chunks = self.lock();
        let find = |(held, offset, bytes): (&Held, u64, u64)| {
            let memory = chunks.by_number.get(&held.chunk)?.memory.host_memory()?;
            let start = held.allocation.offset().checked_add(offset)?;
            let start = usize::try_from(start).ok()?;
            memory.get(start..)?.get(..usize::try_from(bytes).ok()?)
        };
        let [one, other] = ranges.map(find);
        Some(work([one?, other?]))
    }

    /// Has `work` see bytes of pieces in place, each for reading or for writing, where the processor can read them;
    /// else nothing is done. What is written overlaps nothing: that has been checked, and is nothing done for else.
    pub(super) fn with_host_mut<T>(
        &self,
        ranges: &[HostRange<'_>],
        work: impl FnOnce(Vec<Operand<'_>>) -> T,
    ) -> Option<T> {
        let mut chunks = self.lock();
        let mut order: Vec<usize> = (0..ranges.len()).collect();
        let start =
            |range: &HostRange<'_>| range.held.allocation.offset().checked_add(range.offset);
        order.sort_by_key(|&index| (ranges[index].held.chunk, start(&ranges[index])));
        // What is read twice cannot be lent twice beside what is written: then it is copied.
        let mut copies: Vec<Option<Vec<u8>>> = ranges.iter().map(|_| None).collect();
        let mut last: Option<(u64, usize)> = None;
        for &index in order.iter().filter(|&&index| ranges[index].bytes > 0) {
            let range = &ranges[index];
            let begin = usize::try_from(start(range)?).ok()?;
            let end = begin.checked_add(usize::try_from(range.bytes).ok()?)?;
            let chunk = range.held.chunk;
            let overlaps = last.is_some_and(|(of, until)| of == chunk && begin < until);
            if overlaps {
                if range.is_written {
                    return None;
                }
                let memory = chunks.by_number.get(&chunk)?.memory.host_memory()?;
                copies[index] = Some(memory.get(begin..end)?.to_vec());
            } else {
                last = Some((chunk, end));
            }
        }
        let mut lent: Vec<Option<&mut [u8]>> = ranges.iter().map(|_| None).collect();
        let mut order = order.into_iter().peekable();
        for (number, chunk) in &mut chunks.by_number {
            if order
                .peek()
                .is_none_or(|&index| ranges[index].held.chunk != *number)
            {
                continue;
            }
            // What is not lent yet, and where it begins.
            let (mut rest, mut begins) = (chunk.memory.host_memory_mut()?, 0);
            while let Some(index) = order.next_if(|&index| ranges[index].held.chunk == *number) {
                let range = &ranges[index];
                if range.bytes == 0 || copies[index].is_some() {
                    continue;
                }
                let begin = usize::try_from(start(range)?).ok()?;
                let (_, memory) = rest.split_at_mut_checked(begin.checked_sub(begins)?)?;
                let len = usize::try_from(range.bytes).ok()?;
                let (bytes, after) = memory.split_at_mut_checked(len)?;
                lent[index] = Some(bytes);
                (rest, begins) = (after, begin + len);
            }
        }
        let operands = ranges.iter().zip(lent).zip(&copies);
        let operands = operands.map(|((range, lent), copy)| {
            Some(match (lent, copy) {
                (Some(bytes), _) if range.is_written => Operand::Written(bytes),
                (Some(bytes), _) => Operand::Read(bytes),
                (None, Some(copy)) => Operand::Read(copy),
                (None, None) if range.bytes > 0 => return None,
                (None, None) if range.is_written => Operand::Written(&mut []),
                (None, None) => Operand::Read(&[]),
            })
        });
        let operands: Option<Vec<Operand<'_>>> = operands.collect();
        Some(work(operands?))
    }

    /// Returns what the program has of the device.
    pub(super) fn usage(&self) -> Usage {
        self.ledger.usage()
    }

    /// Enters what has been reserved outside of the chunks, for a model. The quota bounds it.
    pub(super) fn enter(&self, size: ReservationSize) -> Option<LedgerEntry> {
        Ledger::enter(&self.ledger, size, u64::MAX).ok()
    }

    pub(super) fn device(&self) -> &dyn Device {
        &*self.devices[self.index]
    }

    /// Returns the device's index.
    pub(super) fn index(&self) -> usize {
        self.index
    }

    /// Returns the chunks that hold nothing to the device.
    pub(super) fn trim(&self) {
        self.lock().trim(|| self.settle(), |_| true);
    }

    fn lock(&self) -> MutexGuard<'_, Chunks> {
        // No update is left half done by a panic: the pools' own calls do not panic.
        self.chunks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the bytes of all chunks.
    pub(super) fn chunk_bytes(&self) -> u64 {
        let chunks = self.lock();
        let bytes = chunks.by_number.values().map(|chunk| chunk.memory.len());
        bytes.fold(0, u64::saturating_add)
    }

    /// Takes a piece of what there is, not empty; the oldest chunks are filled first, so that later ones get empty.
    pub(super) fn allocate(&self, bytes: u64) -> Option<Held> {
        let padded = bytes.checked_next_multiple_of(PART_ALIGNMENT)?;
        let mut chunks = self.lock();
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
        // Nothing is reserved by it, so that it is never too much.
        let entry = self.enter(size)?;
        Some(Held {
            chunk,
            allocation,
            entry,
        })
    }

    /// Takes another chunk of this many bytes, a multiple of the device's granularity.
    pub(super) fn grow(&self, bytes: u64) -> Result<(), MemoryError> {
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
        let settle = || self.settle();
        chunks.trim(settle, |chunk| {
            let keep = !kept && chunk.memory.len() <= LARGEST_CHUNK;
            kept |= keep;
            !keep
        });
    }

    /// Copies bytes of a piece from `offset` on.
    pub(super) fn read(&self, held: &Held, offset: u64, out: &mut [u8]) -> Result<(), DeviceError> {
        if let Some(queue) = self.queue()?
            && let Some(range) = self.range(held, offset, out.len() as u64)?
        {
            return queue.read(&range, out);
        }
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
        if let Some(queue) = self.queue()?
            && let Some(range) = self.range(held, offset, bytes.len() as u64)?
        {
            return queue.write(&range, bytes);
        }
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

    /// Returns the error of a device whose memory is not what it said: a fault that has no better
    /// name.
    fn gone(&self) -> DeviceError {
        DeviceError::Unavailable {
            device: self.device().info().name,
            reason: "its memory is not there any more".to_owned(),
        }
    }
}

impl Drop for DevicePool {
    fn drop(&mut self) {
        self.settle();
    }
}

impl Chunks {
    /// Returns those empty chunks that `unwanted` names, after `settle` if there are some.
    fn trim(&mut self, settle: impl FnOnce(), mut unwanted: impl FnMut(&Chunk) -> bool) {
        let is_empty = |chunk: &Chunk| chunk.pool.used().now == 0;
        let chunks = self.by_number.iter();
        let unwanted: Vec<u64> = chunks
            .filter(|(_, chunk)| is_empty(chunk) && unwanted(chunk))
            .map(|(number, _)| *number)
            .collect();
        if unwanted.is_empty() {
            return;
        }
        settle();
        for number in unwanted {
            if self
                .writer
                .as_ref()
                .is_some_and(|(last, _)| *last == number)
            {
                // It would keep the memory.
                self.writer = None;
            }
            self.by_number.remove(&number);
        }
    }
}
