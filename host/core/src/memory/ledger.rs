//! What a device has given out, now and at most.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The sizes of one reservation, in bytes: what is stored, the same after alignment, and what is
/// taken from the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReservationSize {
    /// Bytes of everything that will be stored.
    pub requested: u64,
    /// The same with every part rounded up to its alignment.
    pub padded: u64,
    /// What is taken from the device: `padded` rounded up to the device's granularity.
    pub reserved: u64,
}

/// A number of bytes now, and the most it has been.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Gauge {
    /// Bytes now.
    pub now: u64,
    /// The most it has been.
    pub peak: u64,
}

impl Gauge {
    pub(super) fn add(&mut self, bytes: u64) {
        self.now += bytes;
        self.peak = self.peak.max(self.now);
    }

    pub(super) fn subtract(&mut self, bytes: u64) {
        self.now = self.now.saturating_sub(bytes);
    }
}

/// What is in use on one device, in bytes. `requested <= padded <= reserved`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// What is stored.
    pub requested: Gauge,
    /// The same after alignment.
    pub padded: Gauge,
    /// What was taken from the device for it.
    pub reserved: Gauge,
}

/// The books of one device.
#[derive(Debug, Default)]
pub struct Ledger {
    usage: Mutex<Usage>,
}

impl Ledger {
    fn lock(&self) -> MutexGuard<'_, Usage> {
        // Every update is complete before a panic could happen, so a poisoned lock is still right.
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns what is in use now, and was at most.
    pub fn usage(&self) -> Usage {
        *self.lock()
    }

    /// Enters a reservation, unless that would exceed `capacity`.
    ///
    /// # Errors
    /// The bytes that are still free, with nothing entered.
    pub fn take(&self, size: ReservationSize, capacity: u64) -> Result<(), u64> {
        let mut usage = self.lock();
        let free = capacity.saturating_sub(usage.reserved.now);
        if size.reserved > free {
            return Err(free);
        }
        usage.requested.add(size.requested);
        usage.padded.add(size.padded);
        usage.reserved.add(size.reserved);
        Ok(())
    }

    /// Strikes out a reservation that [`Ledger::take`] entered.
    pub fn give_back(&self, size: ReservationSize) {
        let mut usage = self.lock();
        usage.requested.subtract(size.requested);
        usage.padded.subtract(size.padded);
        usage.reserved.subtract(size.reserved);
    }
}

impl Ledger {
    /// Like [`Ledger::take`]; the entry is struck out when what this gives is dropped.
    ///
    /// # Errors
    /// The bytes that are still free, with nothing entered.
    pub fn enter(
        ledger: &Arc<Ledger>,
        size: ReservationSize,
        capacity: u64,
    ) -> Result<LedgerEntry, u64> {
        ledger.take(size, capacity)?;
        Ok(LedgerEntry {
            ledger: Arc::clone(ledger),
            size,
        })
    }
}

/// A ledger's line for one reservation, struck out when dropped.
#[derive(Debug)]
pub struct LedgerEntry {
    ledger: Arc<Ledger>,
    size: ReservationSize,
}

impl Drop for LedgerEntry {
    fn drop(&mut self) {
        self.ledger.give_back(self.size);
    }
}
