//! The gradient of x, as training needs it.

use tightfit_kernels::{Float, FloatType};

use super::find::Place;
use super::{Linear, LinearError, LinearOptions};
use crate::device::HostOperands;

impl Linear<'_> {
    /// Computes the gradient of x by that of y, on all cores: `dx = dy * W`, of dy [rows, outputs] and
    /// dx [rows, inputs] in host memory. [`Linear::input_gradient_with`] has options.
    ///
    /// A weight on a GPU is multiplied there, as [`Linear::forward`] does it. Sums are f32; the result is
    /// rounded once.
    ///
    /// ```no_run
    /// # fn backward(model: &tightfit::Model) -> Result<(), Box<dyn std::error::Error>> {
    /// let up = model.linear("model.layers.0.mlp.up_proj.weight")?;
    /// let dy = vec![1f32; up.outputs()];
    /// let mut dx = vec![0f32; up.inputs()];
    /// up.input_gradient(&dy, 1, &mut dx)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`LinearError::Length`] where lengths do not belong together, with nothing written,
    /// [`LinearError::Device`], and on a GPU [`LinearError::Inside`] for a matrix of a stack that begins
    /// between two nested scales.
    pub fn input_gradient<T: Float>(
        &self,
        dy: &[T],
        rows: usize,
        dx: &mut [T],
    ) -> Result<(), LinearError> {
        self.input_gradient_with(dy, rows, dx, &LinearOptions::default())
    }

    /// [`Linear::input_gradient`] with options.
    ///
    /// # Errors
    /// As [`Linear::input_gradient`].
    pub fn input_gradient_with<T: Float>(
        &self,
        dy: &[T],
        rows: usize,
        dx: &mut [T],
        options: &LinearOptions,
    ) -> Result<(), LinearError> {
        self.check_length("dy", "elements", rows.checked_mul(self.outputs), dy.len())?;
        self.check_length("dx", "elements", rows.checked_mul(self.inputs), dx.len())?;
        let (dy, dx) = (bytemuck::cast_slice(dy), bytemuck::cast_slice_mut(dx));
        self.compute_gradient(T::TYPE, rows, dy, dx, options)
    }

    /// [`Linear::input_gradient_with`] of elements of type `float` as little-endian bytes, at any alignment.
    ///
    /// # Errors
    /// As [`Linear::input_gradient`], with lengths in bytes.
    pub fn input_gradient_bytes(
        &self,
        float: FloatType,
        rows: usize,
        dy: &[u8],
        dx: &mut [u8],
        options: &LinearOptions,
    ) -> Result<(), LinearError> {
        self.check_gradient_lengths(float, rows, dy.len(), dx.len())?;
        self.compute_gradient(float, rows, dy, dx, options)
    }

    /// Whether operands of these lengths in bytes belong together, as [`Linear::input_gradient_bytes`] needs
    /// them.
    ///
    /// # Errors
    /// [`LinearError::Length`].
    pub fn check_gradient_lengths(
        &self,
        float: FloatType,
        rows: usize,
        dy: usize,
        dx: usize,
    ) -> Result<(), LinearError> {
        let bytes = |elements: Option<usize>| elements?.checked_mul(float.bytes());
        self.check_length("dy", "bytes", bytes(rows.checked_mul(self.outputs)), dy)?;
        self.check_length("dx", "bytes", bytes(rows.checked_mul(self.inputs)), dx)
    }

    fn compute_gradient(
        &self,
        float: FloatType,
        rows: usize,
        dy: &[u8],
        dx: &mut [u8],
        options: &LinearOptions,
    ) -> Result<(), LinearError> {
        match &self.place {
            Place::Host(weights) => {
                let weights = weights.view(&self.quantization, self.outputs, self.inputs);
                let threads = options.threads_for(self.outputs, self.inputs, rows);
                let kernels = options.kernels;
                Ok(kernels.linear_transposed_bytes(&weights, float, rows, dy, dx, threads)?)
            }
            Place::Device(on_device) => {
                let operands = HostOperands {
                    x: dy,
                    bias: None,
                    y: dx,
                };
                let product = self.gradient_product(on_device, float, rows, options.by_row)?;
                self.compute_by_copying(on_device, &product, operands)
            }
        }
    }
}
