//! How bytes get into memory that the processor cannot write.

use std::any::Any;
use std::fmt;

use super::DeviceError;

/// Buffers of a [`Writer`]: one is filled while the other is copied.
pub const WRITER_BUFFERS: usize = 2;

/// Carries bytes into a reservation: each worker of a load has its own.
///
/// A buffer is staged, filled, and written. Writing returns before the bytes have arrived, and the
/// next buffer can be filled meanwhile. Dropping a writer waits for what is under way.
pub trait Writer: Send + fmt::Debug {
    /// The next buffer to be filled. Waits until what was in it has arrived.
    ///
    /// # Errors
    /// When a copy has failed.
    fn stage(&mut self) -> Result<&mut [u8], DeviceError>;

    /// Starts to copy pieces of the buffer that was staged last.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`] for what lies outside the buffer or the reservation, and when
    /// the driver refuses.
    fn write(&mut self, pieces: &[Piece]) -> Result<(), DeviceError>;

    /// Waits until everything has arrived.
    ///
    /// # Errors
    /// When a copy has failed.
    fn finish(&mut self) -> Result<(), DeviceError>;

    /// Waits until everything has arrived, and gives the buffers back, for another writer.
    ///
    /// # Errors
    /// When a copy has failed. The buffers are given back to the driver then.
    fn release(self: Box<Self>) -> Result<Box<dyn PageLocked>, DeviceError>;
}

/// A thread that is bound to a device; see [`Reservation::attach`](super::Reservation::attach).
pub trait Attached: fmt::Debug {}

/// What is to be copied where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Its first byte in the buffer.
    pub start: usize,
    /// Its length in bytes.
    pub len: usize,
    /// Where it goes in the reservation.
    pub offset: u64,
}

/// Page-locked host memory, which the devices of one driver can read while the processor goes on.
/// Whoever has it may cut it up; its bytes are nobody else's.
pub trait PageLocked: Any + Send + fmt::Debug {
    /// Cuts off the first `bytes` bytes; all where there are not as many.
    #[must_use]
    fn take(&mut self, bytes: usize) -> Box<dyn PageLocked>;
}
