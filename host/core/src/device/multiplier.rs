//! How a device multiplies with weights that lie in its memory.

use std::any::Any;
use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

use tightfit_kernels::{BlockSize, FloatType, QuantType};

use super::{DeviceAddress, DeviceError};

/// A quantized matrix W [outputs, inputs] in a reservation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ProductWeights {
    /// The table of values.
    pub quant_type: QuantType,
    /// Elements that share a scale.
    pub block_size: BlockSize,
    /// Rows.
    pub outputs: usize,
    /// Columns.
    pub inputs: usize,
    /// First byte of the packed codes, in the reservation. They begin with a block.
    pub codes: u64,
    /// First byte of the scales, in the reservation.
    pub absmax: u64,
    /// Where what recovers the scales is, under double quantization.
    pub nested: Option<NestedScales>,
}

/// What recovers scales that are quantized themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NestedScales {
    /// First byte of the nested scales, in the reservation.
    pub absmax: u64,
    /// First byte of the 256 values of the codes, among the constants.
    pub map: u64,
    /// The mean that is added to each scale, among the constants.
    pub mean: u64,
}

/// What is multiplied: x [rows, inputs].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Product {
    /// The type of x, of the bias and of y.
    pub float: FloatType,
    /// Rows of x and y.
    pub rows: usize,
    /// Whether a row's bits shall not depend on other rows.
    pub by_row: bool,
}

/// Where the operands of a product are in a GPU's memory: pointers that are valid in the device's
/// primary context, as the driver's interface and the CUDA runtime give them.
///
/// ```
/// use tightfit::device::DeviceOperands;
///
/// # let (x, y, workspace, stream) = (0x1000, 0x2000, 0x3000, std::ptr::null_mut());
/// let operands = DeviceOperands::new(x, y, stream).with_workspace(workspace, 2_113_536);
/// assert_eq!(operands.bias, 0);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceOperands {
    /// [rows, inputs], row-major.
    pub x: u64,
    /// \[outputs\]; 0 for none.
    pub bias: u64,
    /// [rows, outputs], row-major.
    pub y: u64,
    /// Memory to work in, at a multiple of 256; 0 where none is needed.
    pub workspace: u64,
    /// Length of the workspace.
    pub workspace_bytes: u64,
    /// The `CUstream` (or `cudaStream_t`) that the kernels are given to; null for the default stream.
    pub stream: *mut c_void,
}

impl DeviceOperands {
    /// Returns operands without bias and workspace.
    pub fn new(x: u64, y: u64, stream: *mut c_void) -> DeviceOperands {
        DeviceOperands {
            x,
            bias: 0,
            y,
            workspace: 0,
            workspace_bytes: 0,
            stream,
        }
    }

    /// Returns the same operands with a bias.
    #[must_use]
    pub fn with_bias(self, bias: u64) -> DeviceOperands {
        DeviceOperands { bias, ..self }
    }

    /// Returns the same operands with memory to work in.
    #[must_use]
    pub fn with_workspace(self, workspace: u64, workspace_bytes: u64) -> DeviceOperands {
        DeviceOperands {
            workspace,
            workspace_bytes,
            ..self
        }
    }
}

/// A device's own kernels for products with weights in one reservation, which is kept as long as this
/// lives. Ready to be launched: nothing is allocated or compiled any more.
pub trait Multiplier: Send + Sync + fmt::Debug {
    /// Returns how many bytes of workspace are enough for a product, and for one of fewer rows.
    fn workspace_bytes(&self, weights: &ProductWeights, product: &Product) -> u64;

    /// Gives `y = x * transpose(W) + bias` to a stream, and returns before it is computed. Only launches:
    /// the stream may be one whose work is being captured into a graph.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`] for weights outside of the reservation and for a workspace that is too
    /// small, and when the driver refuses.
    ///
    /// # Safety
    /// - Pointers are of this device's memory and as long as [`DeviceOperands`] says, multiples of the
    ///   element's size; nothing overlaps y or the workspace.
    /// - The first [`tightfit_kernels::cuda::linear::COUNTERS`] bytes of the workspace are zero, or were when
    ///   its first product was given to this stream. Other streams do not use it meanwhile.
    /// - The stream is one of this device. All of it, and `self`, is kept until the stream is done, and
    ///   until graphs that have captured it are gone.
    unsafe fn multiply(
        &self,
        weights: &ProductWeights,
        product: &Product,
        operands: &DeviceOperands,
    ) -> Result<(), DeviceError>;

    /// Returns how many bytes of the device's memory [`Multiplier::multiply_in`] needs.
    fn copied_bytes(&self, weights: &ProductWeights, product: &Product) -> u64;

    /// Computes the same with operands of the host, as little-endian bytes: they are copied to `memory`,
    /// which nothing else uses meanwhile, and back. Waits for the result.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`] where the memory is too short, [`DeviceError::Unavailable`] where it is
    /// another driver's, and when the driver refuses.
    fn multiply_in(
        &self,
        memory: &DeviceBytes,
        weights: &ProductWeights,
        product: &Product,
        operands: HostOperands<'_>,
    ) -> Result<(), DeviceError>;
}

/// Operands of a product in host memory, as little-endian bytes at any alignment.
#[derive(Debug)]
pub struct HostOperands<'a> {
    /// [rows, inputs], row-major.
    pub x: &'a [u8],
    /// \[outputs\].
    pub bias: Option<&'a [u8]>,
    /// [rows, outputs], row-major.
    pub y: &'a mut [u8],
}

/// Some bytes of a device's memory, kept as long as this lives.
#[derive(Clone)]
pub struct DeviceBytes {
    address: DeviceAddress,
    bytes: u64,
    /// For the device that has made it.
    memory: Arc<dyn Any + Send + Sync>,
}

impl DeviceBytes {
    /// For devices: `memory` is what keeps the bytes.
    pub fn new(
        address: DeviceAddress,
        bytes: u64,
        memory: Arc<dyn Any + Send + Sync>,
    ) -> DeviceBytes {
        DeviceBytes {
            address,
            bytes,
            memory,
        }
    }

    /// Returns its first byte: a multiple of 256, unless it is a slice.
    pub fn address(&self) -> DeviceAddress {
        self.address
    }

    /// Returns its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns some of them, which keep all; `None` for what does not lie inside.
    pub fn slice(&self, offset: u64, bytes: u64) -> Option<DeviceBytes> {
        let end = offset.checked_add(bytes)?;
        (end <= self.bytes).then(|| DeviceBytes {
            address: DeviceAddress {
                pointer: self.address.pointer + offset,
                ..self.address
            },
            bytes,
            memory: Arc::clone(&self.memory),
        })
    }

    /// Returns whether both have a byte in common.
    pub fn overlaps(&self, other: &DeviceBytes) -> bool {
        let (one, two) = (self.address, other.address);
        one.ordinal == two.ordinal
            && self.bytes > 0
            && other.bytes > 0
            && one.pointer < two.pointer.saturating_add(other.bytes)
            && two.pointer < one.pointer.saturating_add(self.bytes)
    }

    /// Returns what keeps the bytes, for the device that has made it.
    pub fn memory(&self) -> &Arc<dyn Any + Send + Sync> {
        &self.memory
    }
}

impl fmt::Debug for DeviceBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceBytes")
            .field("address", &self.address)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}
