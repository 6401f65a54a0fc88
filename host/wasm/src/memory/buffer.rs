//! A program's buffers.

use std::fmt;
use std::sync::Arc;

use super::error::MemoryError;
use super::pool::{DevicePool, Held};
use crate::stop::Stop;

/// A range of bytes on a device. Its memory is given back when it is dropped.
pub struct Buffer {
    pool: Arc<DevicePool>,
    bytes: u64,
    /// None for nothing.
    held: Option<Held>,
    /// Bytes at the beginning that have been written. What is behind them may be somebody's, and is
    /// cleared before anything is written after it; until then it reads as zeros. So allocating takes
    /// no time, however much is allocated.
    written: u64,
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
        Buffer {
            pool,
            bytes,
            held,
            written: 0,
        }
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
        if let Some(from) = &self.held
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
        let Some(held) = self.held.as_ref().filter(|_| !bytes.is_empty()) else {
            return Ok(());
        };
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        while self.written < offset {
            stop.check()?;
            let gap = (offset - self.written).min(ZEROS.len() as u64);
            self.pool
                .write(held, self.written, &ZEROS[..gap as usize])?;
            self.written += gap;
        }
        self.pool.write(held, offset, bytes)?;
        self.written = self.written.max(offset + bytes.len() as u64);
        Ok(())
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(held) = self.held.take() {
            self.pool.give_back(held);
        }
    }
}
