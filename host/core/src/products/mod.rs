//! Computing with a loaded model: products with its 4-bit weights, where they lie and as they lie.
//!
//! ```no_run
//! use tightfit::kernels::half::bf16;
//!
//! # fn forward(model: &tightfit::Model) -> Result<(), Box<dyn std::error::Error>> {
//! let up = model.linear("model.layers.0.mlp.up_proj.weight")?;
//! let rows = 3;
//! let x = vec![bf16::ONE; rows * up.inputs()];
//! let mut y = vec![bf16::ZERO; rows * up.outputs()];
//! up.forward(&x, rows, None, &mut y)?;
//! # Ok(())
//! # }
//! ```
//!
//! On a GPU operands are where the application's own kernels have them: [`Linear::forward_on_device`] gives
//! the product to a stream of the application, without allocating or waiting, so that it can be captured
//! into a graph. What that needs beside the weights is made ready by [`Model::linear`]. The gradient of x is
//! [`Linear::input_gradient`].
//!
//! Layers of experts are [`Experts`], and products where each row has an expert of its own [`ExpertsLinear`]:
//!
//! ```no_run
//! use tightfit::kernels::{Activation, Choices};
//!
//! # fn forward(model: &tightfit::Model) -> Result<(), Box<dyn std::error::Error>> {
//! let experts = model.experts("model.layers.0.mlp.experts", Activation::Silu)?;
//! // Two tokens, each with the two experts that the router has chosen for it.
//! let choices = Choices { of_token: 2, ids: &[3, 0, 1, 3], weights: &[0.8, 0.2, 0.6, 0.4] };
//! let x = vec![0f32; 2 * experts.hidden()];
//! let mut y = vec![0f32; 2 * experts.hidden()];
//! experts.forward(&x, &choices, None, None, &mut y)?;
//! # Ok(())
//! # }
//! ```

mod error;
mod experts;
mod find;
mod gradient;
#[allow(unsafe_code)] // Passes the promises of its caller on.
mod on_device;
#[cfg(test)]
mod tests;

use std::fmt;
use std::num::NonZeroUsize;

use tightfit_kernels::{Float, FloatType, Kernels};

pub use error::LinearError;
pub use experts::{Experts, ExpertsLinear, ExpertsNames, ExpertsTensors, GateTensors};
pub use on_device::{LinearWorkspace, WorkspaceOptions};

use crate::device::{HostOperands, Product};
use crate::model::{Model, Quantization, Tensor};
use find::{HostWeights, Place};

/// How a product with weights in host memory is computed.
///
/// ```
/// use tightfit::products::LinearOptions;
///
/// let options = LinearOptions::default().with_threads(1);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct LinearOptions {
    /// Threads at most, the caller's among them; by default as many as the machine has cores. What is too
    /// little work for a thread of its own is done with fewer. They do not change results.
    pub threads: usize,
    /// Whether a row's bits shall not depend on the rows beside it, nor on how many there are. On the
    /// processor they never do; on a GPU that has its price.
    pub by_row: bool,
    /// The processor's kernels. The bits of a result depend on them.
    pub kernels: Kernels,
}

impl Default for LinearOptions {
    fn default() -> Self {
        LinearOptions {
            threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
            by_row: false,
            kernels: Kernels::detect(),
        }
    }
}

tightfit_common::setters!([] LinearOptions:
    with_threads: threads, usize;
    with_by_row: by_row, bool;
    with_kernels: kernels, Kernels;
);

/// Products of elements and weights that are worth a thread.
const WORK_OF_A_THREAD: usize = 1 << 18;

impl LinearOptions {
    /// How many threads a product is worth.
    fn threads_for(&self, outputs: usize, inputs: usize, rows: usize) -> NonZeroUsize {
        let products = outputs.saturating_mul(inputs).saturating_mul(rows);
        let threads = self.threads.min(products / WORK_OF_A_THREAD);
        NonZeroUsize::new(threads).unwrap_or(NonZeroUsize::MIN)
    }
}

/// The product with one 4-bit weight W of a model: `y = x * transpose(W) + bias`, where x is
/// [rows, inputs], y [rows, outputs], and the bias \[outputs\]; all are row-major and of one type. The
/// weight is used as it lies: nothing of it is copied or kept beside.
///
/// Sums are f32; products are exact, or of weights rounded to 16 bits where x has 16 and the
/// instructions or the GPU multiply those. The result is rounded once.
#[derive(Clone)]
pub struct Linear<'m> {
    tensor: Tensor<'m>,
    quantization: Quantization,
    outputs: usize,
    inputs: usize,
    place: Place<'m>,
}

impl fmt::Debug for Linear<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Linear")
            .field("tensor", &self.tensor.name())
            .field("outputs", &self.outputs)
            .field("inputs", &self.inputs)
            .field("device", &self.device())
            .finish_non_exhaustive()
    }
}

impl Model {
    /// Lends the product with a matrix in 4 bits (NF4 or FP4, plain or double-quantized, quantized while
    /// loading or before), by its name or the name that it is tied to.
    ///
    /// Where the weight is on a GPU, that is made ready for products, once for the model: its kernels are
    /// loaded, and a few KiB are taken where there are double-quantized weights. They lie behind the weights
    /// if [`PlanOptions::rows`](crate::plan::PlanOptions::rows) has reserved them there, else they are taken
    /// beside the plan and entered in the device's ledger, rounded up to its granularity; they go back with
    /// the model. So all that [`Linear::forward_on_device`] will use is to be asked for before a graph is
    /// captured.
    ///
    /// # Errors
    /// [`LinearError::NotLoaded`], [`LinearError::NotFourBit`] with its format, [`LinearError::NotMatrix`],
    /// and [`LinearError::Device`] where a GPU has too little memory or is older than the kernels.
    pub fn linear(&self, name: &str) -> Result<Linear<'_>, LinearError> {
        Linear::find(self, name, None)
    }

    /// Lends the product with matrix `index` of a stack [matrices, outputs, inputs] in 4 bits: an expert's
    /// weight, for example.
    ///
    /// On a GPU a matrix that begins inside of the 256 blocks of one nested scale is multiplied by the kernels
    /// for experts: always by row, with at least two launches, a workspace that also holds a bias for each of
    /// the matrices, and without [`Linear::input_gradient`].
    ///
    /// # Errors
    /// As [`Model::linear`]; [`LinearError::NoSuchMatrix`], and [`LinearError::Inside`] where the matrix
    /// begins inside of a block.
    pub fn linear_of(&self, name: &str, index: u64) -> Result<Linear<'_>, LinearError> {
        Linear::find(self, name, Some(index))
    }
}

impl<'m> Linear<'m> {
    /// Returns the number of elements of a row of y: rows of W.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Returns the number of elements of a row of x: columns of W.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Returns the tensor that W is, or is in.
    pub fn tensor(&self) -> Tensor<'m> {
        self.tensor
    }

    /// Index of its device in the plan.
    pub fn device(&self) -> usize {
        self.tensor.device()
    }

    /// Returns whether the weight is in a GPU's memory, which [`Linear::forward_on_device`] is for.
    pub fn is_on_gpu(&self) -> bool {
        matches!(self.place, Place::Device(_))
    }

    /// Returns how W is quantized.
    pub fn quantization(&self) -> Quantization {
        self.quantization
    }

    /// Computes the product of operands in host memory, on all cores. [`Linear::forward_with`] has options.
    ///
    /// A weight on a GPU is multiplied there: operands are copied, through memory that is taken from the
    /// device for the call (and entered in its ledger), which is simple and slow.
    ///
    /// # Errors
    /// [`LinearError::Length`] where lengths do not belong together, with nothing written, and
    /// [`LinearError::Device`].
    pub fn forward<T: Float>(
        &self,
        x: &[T],
        rows: usize,
        bias: Option<&[T]>,
        y: &mut [T],
    ) -> Result<(), LinearError> {
        self.forward_with(x, rows, bias, y, &LinearOptions::default())
    }

    /// [`Linear::forward`] with options.
    ///
    /// # Errors
    /// As [`Linear::forward`].
    pub fn forward_with<T: Float>(
        &self,
        x: &[T],
        rows: usize,
        bias: Option<&[T]>,
        y: &mut [T],
        options: &LinearOptions,
    ) -> Result<(), LinearError> {
        self.check_length("x", "elements", rows.checked_mul(self.inputs), x.len())?;
        self.check_length("y", "elements", rows.checked_mul(self.outputs), y.len())?;
        if let Some(bias) = bias {
            self.check_length("the bias", "elements", Some(self.outputs), bias.len())?;
        }
        let operands = HostOperands {
            x: bytemuck::cast_slice(x),
            bias: bias.map(bytemuck::cast_slice),
            y: bytemuck::cast_slice_mut(y),
        };
        self.compute(T::TYPE, rows, operands, options)
    }

    /// [`Linear::forward_with`] of elements of type `float` as little-endian bytes, at any alignment.
    ///
    /// # Errors
    /// As [`Linear::forward`], with lengths in bytes.
    pub fn forward_bytes(
        &self,
        float: FloatType,
        rows: usize,
        operands: HostOperands<'_>,
        options: &LinearOptions,
    ) -> Result<(), LinearError> {
        let HostOperands { x, bias, y } = &operands;
        self.check_lengths(float, rows, x.len(), bias.map(<[u8]>::len), y.len())?;
        self.compute(float, rows, operands, options)
    }

    /// Whether operands of these lengths in bytes belong together, as [`Linear::forward_bytes`] needs them.
    ///
    /// # Errors
    /// [`LinearError::Length`].
    pub fn check_lengths(
        &self,
        float: FloatType,
        rows: usize,
        x: usize,
        bias: Option<usize>,
        y: usize,
    ) -> Result<(), LinearError> {
        let bytes = |elements: Option<usize>| elements?.checked_mul(float.bytes());
        self.check_length("x", "bytes", bytes(rows.checked_mul(self.inputs)), x)?;
        self.check_length("y", "bytes", bytes(rows.checked_mul(self.outputs)), y)?;
        match bias {
            None => Ok(()),
            Some(bias) => self.check_length("the bias", "bytes", bytes(Some(self.outputs)), bias),
        }
    }

    /// What does not fit into memory has no operand of the right length.
    pub(super) fn check_length(
        &self,
        what: &'static str,
        unit: &'static str,
        need: Option<usize>,
        have: usize,
    ) -> Result<(), LinearError> {
        if need == Some(have) {
            return Ok(());
        }
        Err(LinearError::Length {
            tensor: self.tensor.name().to_owned(),
            what,
            unit,
            need: need.unwrap_or(usize::MAX),
            have,
        })
    }

    fn compute(
        &self,
        float: FloatType,
        rows: usize,
        operands: HostOperands<'_>,
        options: &LinearOptions,
    ) -> Result<(), LinearError> {
        match &self.place {
            Place::Host(weights) => self.compute_on_host(weights, float, rows, operands, options),
            Place::Device(on_device) => {
                let product = Product {
                    float,
                    rows,
                    by_row: options.by_row,
                    transposed: false,
                };
                self.compute_by_copying(on_device, &product, operands)
            }
        }
    }

    fn compute_on_host(
        &self,
        weights: &HostWeights<'m>,
        float: FloatType,
        rows: usize,
        operands: HostOperands<'_>,
        options: &LinearOptions,
    ) -> Result<(), LinearError> {
        let weights = weights.view(&self.quantization, self.outputs, self.inputs);
        let HostOperands { x, bias, y } = operands;
        let threads = options.threads_for(self.outputs, self.inputs, rows);
        let kernels = options.kernels;
        Ok(kernels.linear_bytes(&weights, float, rows, x, bias, y, threads)?)
    }
}
