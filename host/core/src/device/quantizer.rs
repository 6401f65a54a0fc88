//! How a device quantizes by itself what is carried to it.

use std::fmt;

use tightfit_kernels::{BlockSize, FloatType, cuda::SourceRun};

use super::{DeviceError, PageLocked, Piece, Writer};

/// Memory of a device for what its kernels need beside the results, for as long as they are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workspace {
    /// Bytes of the reservation that nothing else is in meanwhile.
    Within {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Memory of its own, which is entered in the device's ledger.
    Beside {
        /// Length in bytes; rounded up to the device's granularity.
        len: u64,
    },
}

/// A device's own kernels, putting their results into one reservation. Shared by the workers of a
/// load. Offsets are in the workspace that it was made with, unless they are said to be in the
/// reservation.
pub trait Quantizer: Send + Sync + fmt::Debug {
    /// Makes the kernels ready, unless they are: the driver compiles them, which takes its time.
    ///
    /// # Errors
    /// When the driver refuses. It may be tried again.
    fn prepare(&self) -> Result<(), DeviceError>;

    /// Whether the kernels are ready.
    fn is_prepared(&self) -> bool;

    /// One worker's way to the device, with [`super::WRITER_BUFFERS`] buffers that are equal parts of
    /// `buffers`.
    ///
    /// # Errors
    /// When the driver refuses, and for buffers of another one.
    fn worker(
        &self,
        buffers: Box<dyn PageLocked>,
    ) -> Result<Box<dyn QuantizingWriter>, DeviceError>;

    /// Sets `len` bytes at `offset` to zero.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`], and when the driver refuses.
    fn clear(&self, offset: u64, len: u64) -> Result<(), DeviceError>;

    /// Copies `out.len()` bytes from `offset`. Whoever writes there has finished.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`], and when the driver refuses.
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), DeviceError>;
}

/// A [`Writer`] whose device can quantize what was staged.
pub trait QuantizingWriter: Writer {
    /// Starts to carry the buffer that was staged last to the device, and to quantize it there. The
    /// next buffer can be filled meanwhile.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`] for what lies outside the buffer, the workspace or the
    /// reservation, and when the driver refuses.
    fn quantize(&mut self, job: &QuantizeJob) -> Result<(), DeviceError>;

    /// Like [`Writer::write`]; another piece of the buffer, f32 scales, goes into the workspace.
    ///
    /// # Errors
    /// As [`Writer::write`].
    fn write_scaled(&mut self, pieces: &[Piece], scales: &Piece) -> Result<(), DeviceError>;

    /// Quantizes the scales of a tensor after everything that the quantizer's workers have started
    /// so far, and waits until that is done.
    ///
    /// # Errors
    /// As [`QuantizingWriter::quantize`].
    fn quantize_scales(&mut self, job: &ScalesJob) -> Result<(), DeviceError>;
}

/// A piece of a tensor to be quantized to NF4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuantizeJob {
    /// How its elements lie in the buffer.
    pub staged: Staged,
    /// Elements of a block.
    pub block_size: BlockSize,
    /// How many elements there are.
    pub elements: usize,
    /// Where they are carried to. No other worker uses it.
    pub source: u64,
    /// Where packed codes go, in the reservation.
    pub codes: u64,
    /// Where scales go, as f32.
    pub absmax: ScalePlace,
    /// Where the number of blocks with infinities or NaN is added to, as u64.
    pub nonfinite: u64,
}

/// How elements that are to be quantized lie in a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Staged {
    /// As numbers of this type, from the beginning on.
    Floats(FloatType),
    /// As another method has stored them. They are what [`tightfit_kernels::Kernels::decode`] makes of
    /// them.
    Codes {
        /// The type that they are rounded to, of 16 bits.
        float: FloatType,
        /// How codes lie, from the beginning on.
        run: SourceRun,
        /// The byte at which scales begin, as f32.
        scales: usize,
    },
}

impl Staged {
    /// Returns the bytes of the buffer, from the beginning on, that this many elements take.
    pub fn bytes(&self, elements: usize) -> usize {
        match self {
            Staged::Floats(float) => elements.saturating_mul(float.bytes()),
            Staged::Codes { run, scales, .. } => {
                let scale_bytes = run.scales(elements).saturating_mul(4);
                run.code_bytes(elements)
                    .max(scales.saturating_add(scale_bytes))
            }
        }
    }
}

/// Where the scales of a piece go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScalePlace {
    /// Into the reservation.
    Reservation(u64),
    /// Into the workspace, to be quantized when the tensor's are complete.
    Workspace(u64),
}

/// All scales of a tensor, to be quantized to 8 bits relative to their mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScalesJob {
    /// How many there are.
    pub scales: usize,
    /// Where they are, as f32.
    pub absmax: u64,
    /// Where sums may be put: [`ScalesJob::sums_bytes`].
    pub sums: u64,
    /// Where their mean goes, as f32.
    pub mean: u64,
    /// Where the 8-bit codes go, in the reservation.
    pub codes: u64,
    /// Where the nested scales go, as f32, in the reservation.
    pub nested: u64,
}

impl ScalesJob {
    /// Returns the number of bytes of the sums of this many scales: those of groups, and those of
    /// groups of sums.
    pub fn sums_bytes(scales: u64) -> u64 {
        let sums = scales.div_ceil(SUMMED);
        8 * (sums + sums.div_ceil(SUMMED))
    }
}

/// Values that one sum is of.
const SUMMED: u64 = tightfit_kernels::NESTED_BLOCK_SIZE as u64;
