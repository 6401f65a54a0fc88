//! A program's buffers.

use std::fmt;
use std::sync::Arc;

use super::error::MemoryError;
use super::pool::{DevicePool, Held, HostRange};
use crate::stop::Stop;
use tightfit_kernels::decoder::Operand;

use tightfit::device::{DeviceBytes, DeviceError, MOST_WORK, Operation, Queue};

/// A range of bytes on a device. Its memory is given back when it is dropped.
pub struct Buffer {
    pool: Arc<DevicePool>,
    bytes: u64,
    /// None for nothing. Weights that are made of it have a share in it.
    held: Option<Arc<HeldPiece>>,
    /// Bytes at the beginning that have been written. What is behind them may be somebody's, and is
    /// cleared before anything is written after it; until then it reads as zeros. So allocating takes
    /// no time, however much is allocated.
    written: u64,
}

/// A piece of a device's memory. Given back when dropped.
#[derive(Debug)]
pub(crate) struct HeldPiece {
    pool: Arc<DevicePool>,
    /// None while it is being dropped.
    held: Option<Held>,
}

impl Drop for HeldPiece {
    fn drop(&mut self) {
        if let Some(held) = self.held.take() {
            self.pool.give_back(held);
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer")
            .field("device", &self.pool.index())
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl Buffer {
    pub(super) fn new(pool: Arc<DevicePool>, bytes: u64, held: Option<Held>) -> Buffer {
        let held = held.map(|held| {
            Arc::new(HeldPiece {
                pool: Arc::clone(&pool),
                held: Some(held),
            })
        });
        Buffer {
            pool,
            bytes,
            held,
            written: 0,
        }
    }

    fn held(&self) -> Option<&Held> {
        self.held.as_ref()?.held.as_ref()
    }

    /// Returns its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns the index of its device.
    pub fn device(&self) -> usize {
        self.pool.index()
    }

    /// Checks that this range lies inside.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`].
    pub(crate) fn check(&self, offset: u64, bytes: u64) -> Result<(), MemoryError> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.bytes => Ok(()),
            _ => Err(MemoryError::OutOfBounds {
                offset,
                bytes,
                len: self.bytes,
            }),
        }
    }

    /// Copies bytes from `offset` on.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`] and [`MemoryError::Device`].
    pub(crate) fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), MemoryError> {
        self.check(offset, out.len() as u64)?;
        let written = self.written.saturating_sub(offset).min(out.len() as u64);
        let (held, rest) = out.split_at_mut(written as usize);
        if let Some(from) = self.held()
            && !held.is_empty()
        {
            self.pool.read(from, offset, held)?;
        }
        rest.fill(0);
        Ok(())
    }

    /// Writes bytes at `offset`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`] with nothing written, [`MemoryError::Device`], and
    /// [`MemoryError::Stopped`] while what lies before is being cleared.
    pub(crate) fn write(
        &mut self,
        offset: u64,
        bytes: &[u8],
        stop: &Stop,
    ) -> Result<(), MemoryError> {
        self.check(offset, bytes.len() as u64)?;
        if bytes.is_empty() {
            return Ok(());
        }
        self.clear_until(offset, stop)?;
        if let Some(held) = self.held() {
            self.pool.write(held, offset, bytes)?;
        }
        self.wrote(offset + bytes.len() as u64);
        Ok(())
    }

    /// Clears what has never been written before `end`.
    ///
    /// # Errors
    /// [`MemoryError::Device`] and [`MemoryError::Stopped`].
    pub(crate) fn clear_until(&mut self, end: u64, stop: &Stop) -> Result<(), MemoryError> {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        while self.written < end {
            stop.check()?;
            let Some(held) = self.held() else {
                return Ok(());
            };
            let gap = (end - self.written).min(MOST_WORK);
            let queue = self.pool.queue()?;
            let range = match queue {
                Some(_) => self.pool.range(held, self.written, gap)?,
                None => None,
            };
            let cleared = match queue.zip(range) {
                Some((queue, range)) => {
                    queue.give(&Operation::Clear(range))?;
                    gap
                }
                None => {
                    let gap = gap.min(ZEROS.len() as u64);
                    self.pool
                        .write(held, self.written, &ZEROS[..gap as usize])?;
                    gap
                }
            };
            self.written += cleared;
        }
        Ok(())
    }

    /// Notes that bytes before `end` have been written: they are shown from now on.
    pub(crate) fn wrote(&mut self, end: u64) {
        self.written = self.written.max(end);
    }

    /// Returns the device's own order of work; none where the processor does it.
    ///
    /// # Errors
    /// When the driver refuses.
    pub(crate) fn queue(&self) -> Result<Option<&Arc<dyn Queue>>, DeviceError> {
        self.pool.queue()
    }

    /// Returns some bytes for the queue, as they are; none for memory of the host, and for nothing.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`] and [`MemoryError::Device`].
    pub(crate) fn range(
        &self,
        offset: u64,
        bytes: u64,
    ) -> Result<Option<DeviceBytes>, MemoryError> {
        self.check(offset, bytes)?;
        match self.held() {
            Some(held) => Ok(self.pool.range(held, offset, bytes)?),
            None => Ok(None),
        }
    }

    /// Has `work` see bytes of buffers of one device in place, in their order; none where the processor cannot
    /// read them. Each is a buffer, an offset, a number of bytes, and whether they are written. They have been
    /// checked: they lie inside, have been cleared where they were never written, and nothing overlaps what is
    /// written.
    pub(crate) fn with_host<T>(
        ranges: &[(&Buffer, u64, u64, bool)],
        work: impl FnOnce(Vec<Operand<'_>>) -> T,
    ) -> Option<T> {
        let pool = &ranges.first()?.0.pool;
        let mut held = vec![];
        for &(buffer, offset, bytes, is_written) in ranges {
            held.push(buffer.held().map(|held| HostRange {
                held,
                offset,
                bytes,
                is_written,
            }));
        }
        let is_there: Vec<bool> = held.iter().map(Option::is_some).collect();
        let held: Vec<HostRange<'_>> = held.into_iter().flatten().collect();
        pool.with_host_mut(&held, |operands| {
            // Buffers of nothing have nothing to lend.
            let mut operands = operands.into_iter();
            let all =
                ranges
                    .iter()
                    .zip(is_there)
                    .map(|((.., is_written), is_there)| {
                        match is_there.then(|| operands.next()).flatten() {
                            Some(operand) => operand,
                            None if *is_written => Operand::Written(&mut []),
                            None => Operand::Read(&[]),
                        }
                    });
            work(all.collect())
        })
    }

    /// Returns a share in its memory, which is kept as long; none for nothing.
    pub(crate) fn share(&self) -> Option<Arc<HeldPiece>> {
        self.held.clone()
    }
}

impl HeldPiece {
    /// Has `work` see bytes of two pieces of one device in place, where the processor can read them.
    pub(crate) fn with_host<T>(
        ranges: [(&HeldPiece, u64, u64); 2],
        work: impl FnOnce([&[u8]; 2]) -> T,
    ) -> Option<T> {
        let [one, other] = ranges;
        let pair = [
            (one.0.held.as_ref()?, one.1, one.2),
            (other.0.held.as_ref()?, other.1, other.2),
        ];
        one.0.pool.with_host(pair, work)
    }
}
