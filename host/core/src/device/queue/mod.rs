//! Work that a device does in the order in which it is given.
//!
//! What an operation takes are [`DeviceBytes`]: ranges of reservations, which are kept until the work is
//! done. So there is no pointer that a caller could get wrong; what overlaps, is too short or lies on
//! another device is an error, and nothing is done.

mod decoder;
mod operation;
mod products;

use std::fmt;

pub use decoder::QueuedDecode;
#[cfg(feature = "cuda")]
pub(in crate::device) use operation::Operand;
pub use operation::{
    AbsmaxMean, AbsmaxQuantization, AbsmaxRecovery, Dequantization, Operation, Quantization,
};
pub use products::{MatrixShape, QueuedProduct, QueuedScales, QueuedWeights};

use tightfit_kernels::decoder as kernels;

use super::{DeviceBytes, DeviceError, Product};

/// Bytes that one operation should move at most, [`Operation::work`]: whoever has more to do gives it in
/// pieces, so that it can be looked at a clock in between.
pub const MOST_WORK: u64 = 4 << 30;

/// A device's own order of work. Operations return when they have been given to the device; they see what
/// all earlier ones have written, and errors that come later come out of whatever waits.
///
/// Only so much is under way at a time, about three times [`MOST_WORK`]: whoever gives more waits for what
/// was given before. So work that was bought with a cheap call takes its time from the caller.
pub trait Queue: Send + Sync + fmt::Debug {
    /// Gives an operation to the device.
    ///
    /// # Errors
    /// [`DeviceError::Operand`] for operands that do not belong together, overlap what is written or are
    /// another device's, with nothing given; when the driver refuses, and when earlier work has failed.
    fn give(&self, operation: &Operation) -> Result<(), DeviceError>;

    /// Copies bytes of the host to the device. They have been read when this returns, and arrive in turn.
    ///
    /// # Errors
    /// [`DeviceError::Operand`] where lengths differ; else as [`Queue::give`].
    fn write(&self, target: &DeviceBytes, bytes: &[u8]) -> Result<(), DeviceError>;

    /// Waits for everything before, and copies bytes of the device to the host.
    ///
    /// # Errors
    /// As [`Queue::write`].
    fn read(&self, source: &DeviceBytes, out: &mut [u8]) -> Result<(), DeviceError>;

    /// Waits until everything is done. What it kept is let go then.
    ///
    /// # Errors
    /// When something has failed.
    fn finish(&self) -> Result<(), DeviceError>;

    /// Returns how many bytes of workspace are enough for a product with such a matrix, and for one of fewer
    /// rows; 0 where none is needed.
    fn workspace_bytes(&self, product: &Product, shape: &MatrixShape) -> u64;

    /// Returns how many bytes of workspace an operation of a decoder needs; 0 where it needs none.
    fn decode_workspace_bytes(&self, operation: &kernels::Operation) -> u64;
}
