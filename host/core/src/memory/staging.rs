//! Host memory through which weights pass on their way from disk to a device: a fixed amount,
//! whatever the model's size.

use crate::types::Bytes;

/// Staging in all, unless the user says otherwise.
pub const DEFAULT_STAGING: u64 = 64 << 20;

/// A slot holds at least the largest block of the widest type (4096 elements of 4 bytes), and
/// enough that a read is worth its system call.
const SMALLEST_SLOT: u64 = 64 << 10;

/// Larger slots would fall out of a core's second-level cache between being read and quantized.
const LARGEST_SLOT: u64 = 512 << 10;

/// Buffers for a device are better larger: each is a transfer and some calls of its driver, which lets one
/// thread in at a time. Beyond this there is little to gain, and page-locking them takes time.
const LARGEST_BUFFER: u64 = 2 << 20;

/// One slot per worker thread, in one allocation, and room for buffers that are taken elsewhere.
#[derive(Debug)]
pub struct StagingRing {
    memory: Vec<u8>,
    slot: usize,
    buffers: usize,
    buffer: usize,
}

/// Staging that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("staging of {} is too small: need at least {}", Bytes(*have), Bytes(*need))]
pub struct StagingError {
    /// Bytes needed for one worker.
    pub need: u64,
    /// Bytes allowed.
    pub have: u64,
}

impl StagingRing {
    /// Slots for up to `workers` threads within `limit` bytes. Where the limit is too small for
    /// all of them there are fewer slots, and the caller starts fewer workers. Each worker has
    /// `buffers` more of at least a slot's size, for transfers to devices; the caller takes these,
    /// and they count towards the limit.
    ///
    /// # Errors
    /// [`StagingError`] when not even one worker has room.
    pub fn new(limit: u64, workers: usize, buffers: usize) -> Result<StagingRing, StagingError> {
        let each = buffers as u64 + 1;
        let need = SMALLEST_SLOT.saturating_mul(each);
        if limit < need {
            return Err(StagingError { need, have: limit });
        }
        let workers = (workers.max(1) as u64).min(limit / need);
        // Multiples of the page, so that a slot's reads start on one.
        let pages = |bytes: u64| bytes / 4096 * 4096;
        let slot = pages((limit / workers / each).min(LARGEST_SLOT));
        let buffer = match buffers as u64 {
            0 => 0,
            buffers => pages(((limit / workers - slot) / buffers).min(LARGEST_BUFFER)),
        };
        Ok(StagingRing {
            memory: vec![0; (slot * workers) as usize],
            slot: slot as usize,
            buffers,
            buffer: buffer as usize,
        })
    }

    /// Returns the number of bytes taken in all, the workers' buffers included.
    pub fn bytes(&self) -> u64 {
        let buffers = self.buffers as u64 * self.buffer as u64;
        self.memory.len() as u64 + self.workers() as u64 * buffers
    }

    /// Returns how many workers have a slot.
    pub fn workers(&self) -> usize {
        self.memory.len() / self.slot
    }

    /// Returns the number of bytes of one slot.
    pub fn slot_bytes(&self) -> usize {
        self.slot
    }

    /// Returns the number of bytes of one buffer; zero where workers have none.
    pub fn buffer_bytes(&self) -> usize {
        self.buffer
    }

    /// Returns the slots, one for each worker.
    pub fn slots(&mut self) -> impl ExactSizeIterator<Item = &mut [u8]> {
        self.memory.chunks_exact_mut(self.slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn staging_never_exceeds_its_limit() {
        for limit in [SMALLEST_SLOT, 100_000, 1 << 20, DEFAULT_STAGING, 1 << 30] {
            for workers in [0, 1, 2, 3, 16, 500] {
                for buffers in [0, 2, 16] {
                    let Ok(mut ring) = StagingRing::new(limit, workers, buffers) else {
                        assert!(limit < SMALLEST_SLOT * (buffers as u64 + 1));
                        continue;
                    };
                    assert!(ring.bytes() <= limit);
                    assert!(ring.slot_bytes() as u64 >= SMALLEST_SLOT);
                    let slots = ring.slots().len();
                    assert!(slots >= 1 && slots <= workers.max(1));
                    assert_eq!(slots, ring.workers());
                    assert_eq!(ring.buffer_bytes() == 0, buffers == 0);
                    assert!(buffers == 0 || ring.buffer_bytes() >= ring.slot_bytes());
                    assert!(ring.buffer_bytes() as u64 <= LARGEST_BUFFER);
                    let all = slots * (ring.slot_bytes() + buffers * ring.buffer_bytes());
                    assert_eq!(ring.bytes(), all as u64);
                }
            }
        }
        assert!(StagingRing::new(SMALLEST_SLOT - 1, 1, 0).is_err());
        assert!(StagingRing::new(3 * SMALLEST_SLOT - 1, 1, 2).is_err());
    }
}
