//! How a device multiplies with weights that lie in its memory.

use std::any::Any;
use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

use tightfit_kernels::{Activation, BlockSize, Choices, FloatType, GateLayout, QuantType};

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
    /// Where the matrix begins between nested scales: the stack that it is of, in which codes and scales are
    /// counted then. It is multiplied by the kernels for experts.
    pub of_stack: Option<MatrixOfStack>,
}

/// A matrix of a stack, of which all have the same shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatrixOfStack {
    /// How many there are.
    pub matrices: usize,
    /// Which one it is, from 0.
    pub index: usize,
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
    /// How many tensors of one shape the matrix is, of which each has been quantized by itself. Their means
    /// lie 16 bytes apart, and the nested scales of each begin at a multiple of 256 bytes from those of the
    /// first; their codes and scales are those of one matrix.
    pub tensors: usize,
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
    /// Whether it is `y = x * W` instead, of x [rows, outputs] and y [rows, inputs], without bias.
    pub transposed: bool,
}

impl Product {
    /// Columns of x and of y.
    pub(crate) fn columns(&self, weights: &ProductWeights) -> (usize, usize) {
        match self.transposed {
            false => (weights.inputs, weights.outputs),
            true => (weights.outputs, weights.inputs),
        }
    }
}

/// Stacks of experts in a reservation, and what is to be computed with them. Each stack is one matrix whose
/// outputs are those of all experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ExpertsWeights {
    /// The sum over a token's experts of `weight * (down * activation(gate, up) + down_bias)`, where gate and
    /// up are `gate_up * x + gate_up_bias`.
    Layer {
        /// [experts, 2 * intermediate, hidden].
        gate_up: ProductWeights,
        /// [experts, hidden, intermediate].
        down: ProductWeights,
        /// How gates and up projections lie.
        layout: GateLayout,
        /// What is made of them.
        activation: Activation,
    },
    /// `x * transpose(W) + bias` of each expert of a row, [experts, outputs, inputs].
    Linear(ProductWeights),
}

/// What is multiplied with experts: x [tokens, hidden].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertsProduct {
    /// The type of x, of the biases and of y.
    pub float: FloatType,
    /// Experts that there are.
    pub experts: usize,
    /// Rows of x.
    pub tokens: usize,
    /// Experts that each of them has.
    pub choices: usize,
}

/// Where the operands of experts are in a GPU's memory: pointers as in [`DeviceOperands`].
///
/// ```
/// use tightfit::device::DeviceExpertsOperands;
///
/// # let (x, ids, weights, y, stream) = (0x1000, 0x2000, 0x2100, 0x3000, std::ptr::null_mut());
/// let operands = DeviceExpertsOperands::new(x, ids, weights, y, stream);
/// assert_eq!(operands.down_bias, 0);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceExpertsOperands {
    /// [tokens, hidden], row-major.
    pub x: u64,
    /// Numbers of experts [tokens, choices], i32. What is no number of an expert, such as -1, is skipped.
    pub ids: u64,
    /// What the experts' results are multiplied with [tokens, choices], f32; 0 where they are not added up.
    pub weights: u64,
    /// [experts, 2 * intermediate], in the layout of the gates, or the bias of the one product there is,
    /// [experts, outputs]; 0 for none.
    pub bias: u64,
    /// [experts, hidden]; 0 for none.
    pub down_bias: u64,
    /// [tokens, hidden], or of one product [tokens, choices, outputs], row-major.
    pub y: u64,
    /// Memory to work in, at a multiple of 256; 0 where none is needed.
    pub workspace: u64,
    /// Length of the workspace.
    pub workspace_bytes: u64,
    /// The `CUstream` (or `cudaStream_t`) that the kernels are given to; null for the default stream.
    pub stream: *mut c_void,
}

impl DeviceExpertsOperands {
    /// Returns operands without biases and workspace.
    pub fn new(x: u64, ids: u64, weights: u64, y: u64, stream: *mut c_void) -> Self {
        DeviceExpertsOperands {
            x,
            ids,
            weights,
            bias: 0,
            down_bias: 0,
            y,
            workspace: 0,
            workspace_bytes: 0,
            stream,
        }
    }

    /// Returns the same operands with biases, of which each may be 0.
    #[must_use]
    pub fn with_biases(self, bias: u64, down_bias: u64) -> Self {
        DeviceExpertsOperands {
            bias,
            down_bias,
            ..self
        }
    }

    /// Returns the same operands with memory to work in.
    #[must_use]
    pub fn with_workspace(self, workspace: u64, workspace_bytes: u64) -> Self {
        DeviceExpertsOperands {
            workspace,
            workspace_bytes,
            ..self
        }
    }
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

    /// Makes the kernels for experts ready, once: they are loaded.
    ///
    /// # Errors
    /// When the driver refuses.
    fn prepare_experts(&self) -> Result<(), DeviceError>;

    /// Returns how many bytes of workspace are enough for experts, and for fewer tokens.
    fn experts_workspace_bytes(&self, weights: &ExpertsWeights, product: &ExpertsProduct) -> u64;

    /// Gives the launches of experts to a stream, as [`Multiplier::multiply`] does.
    ///
    /// # Errors
    /// As [`Multiplier::multiply`].
    ///
    /// # Safety
    /// As with [`Multiplier::multiply`], for what [`DeviceExpertsOperands`] says.
    unsafe fn multiply_experts(
        &self,
        weights: &ExpertsWeights,
        product: &ExpertsProduct,
        operands: &DeviceExpertsOperands,
    ) -> Result<(), DeviceError>;

    /// Returns how many bytes of the device's memory [`Multiplier::multiply_experts_in`] needs.
    fn copied_experts_bytes(&self, weights: &ExpertsWeights, product: &ExpertsProduct) -> u64;

    /// As [`Multiplier::multiply_in`], for experts. What is in y before stays where pairs are skipped.
    ///
    /// # Errors
    /// As [`Multiplier::multiply_in`].
    fn multiply_experts_in(
        &self,
        memory: &DeviceBytes,
        weights: &ExpertsWeights,
        product: &ExpertsProduct,
        operands: HostExpertsOperands<'_>,
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

/// Operands of experts in host memory, as little-endian bytes at any alignment.
#[derive(Debug)]
pub struct HostExpertsOperands<'a> {
    /// [tokens, hidden], row-major.
    pub x: &'a [u8],
    /// What a router has chosen.
    pub choices: Choices<'a>,
    /// [experts, 2 * intermediate], in the layout of the gates, or the bias of the one product there is,
    /// [experts, outputs].
    pub bias: Option<&'a [u8]>,
    /// [experts, hidden].
    pub down_bias: Option<&'a [u8]>,
    /// [tokens, hidden], or of one product [tokens, choices, outputs], row-major.
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
