//! Products with the transposed weights on the processor: what the gradient of x is.
//!
//! Inputs are dealt out to threads in panels. Of a panel the weights of some outputs are decoded into a
//! buffer that stays in the second-level cache, and every row of dy is multiplied with them. A result is
//! the sum of these outputs' sums in their order, whatever other rows, inputs or threads there are.

use std::{num::NonZeroUsize, ops::Range};

use crate::{
    Float, FloatType, Isa, KernelError, Kernels, LinearWeights,
    error::check_length,
    float,
    linear::{Decoder, GROUP},
    threads::each,
};

/// Inputs of a panel, and outputs whose weights are decoded at a time.
const INPUTS: usize = 512;
const OUTPUTS: usize = 32;

impl Kernels {
    /// Multiplies rows with the quantized weights as they are, not transposed: `dx = dy * W`, the gradient of
    /// the inputs of [`Kernels::linear`] by that of its outputs.
    ///
    /// - `dy` [rows, outputs] and `dx` [rows, inputs].
    /// - `threads`: how many to use. Beside the caller's, they are kept for the next call.
    ///
    /// Products and sums are f32; the result is rounded once to `T`. The bits of a result depend on the
    /// instruction set, but not on other rows, nor on `threads`.
    ///
    /// ```
    /// use std::num::NonZeroUsize;
    ///
    /// use tightfit_kernels::{BlockSize, Kernels, LinearWeights, QuantType, Scales};
    ///
    /// // Two outputs of 64 inputs; all weights are 1, those of the second output times 0.5.
    /// let weights = LinearWeights {
    ///     quant_type: QuantType::Nf4,
    ///     outputs: 2,
    ///     inputs: 64,
    ///     block_size: BlockSize::DEFAULT,
    ///     codes: &[0xff; 64],
    ///     scales: Scales::Absmax(&[1.0, 0.5]),
    /// };
    /// let (dy, mut dx) = ([1.0f32, 3.0], [0f32; 64]);
    /// Kernels::detect().linear_transposed(&weights, 1, &dy, &mut dx, NonZeroUsize::MIN)?;
    /// assert_eq!(dx, [2.5; 64]);
    /// # Ok::<(), tightfit_kernels::KernelError>(())
    /// ```
    ///
    /// # Errors
    /// [`KernelError::Length`] if the lengths do not belong together.
    pub fn linear_transposed<T: Float>(
        self,
        weights: &LinearWeights<'_>,
        rows: usize,
        dy: &[T],
        dx: &mut [T],
        threads: NonZeroUsize,
    ) -> Result<(), KernelError> {
        self.linear_transposed_bytes(
            weights,
            T::TYPE,
            rows,
            bytemuck::cast_slice(dy),
            bytemuck::cast_slice_mut(dx),
            threads,
        )
    }

    /// [`Kernels::linear_transposed`] on elements of type `float` as little-endian bytes at any alignment.
    ///
    /// # Errors
    /// [`KernelError::Length`] in bytes.
    pub fn linear_transposed_bytes(
        self,
        weights: &LinearWeights<'_>,
        float: FloatType,
        rows: usize,
        dy: &[u8],
        dx: &mut [u8],
        threads: NonZeroUsize,
    ) -> Result<(), KernelError> {
        weights.check()?;
        let bytes = |elements: usize| elements.saturating_mul(float.bytes());
        let (outputs, inputs) = (weights.outputs, weights.inputs);
        check_length("dy", bytes(rows.saturating_mul(outputs)), dy.len())?;
        check_length("dx", bytes(rows.saturating_mul(inputs)), dx.len())?;
        if rows == 0 || inputs == 0 {
            return Ok(());
        }
        let size = float.bytes();
        let elements = dy.chunks_exact(size);
        let dy: Vec<f32> = elements.map(|dy| float::read(float, dy)).collect();
        let product = Transposed {
            kernels: self,
            weights,
            rows,
            dy: &dy,
        };
        let panels: Vec<Range<usize>> = (0..inputs)
            .step_by(INPUTS)
            .map(|begin| begin..inputs.min(begin + INPUTS))
            .collect();
        let sums = each(threads, &panels, |panel| product.sums(panel.clone()));
        for (panel, sums) in panels.iter().zip(sums) {
            for (row, sums) in sums.chunks_exact(panel.len()).enumerate() {
                let dx = &mut dx[(row * inputs + panel.start) * size..][..panel.len() * size];
                for (dx, sum) in dx.chunks_exact_mut(size).zip(sums) {
                    float::write(float, *sum, dx);
                }
            }
        }
        Ok(())
    }
}

struct Transposed<'a> {
    kernels: Kernels,
    weights: &'a LinearWeights<'a>,
    rows: usize,
    dy: &'a [f32],
}

impl Transposed<'_> {
    /// The sums of some inputs, for each row those of all of these inputs.
    fn sums(&self, panel: Range<usize>) -> Vec<f32> {
        let add: AddScaled = match self.kernels.isa() {
            // What is portable is compiled with NEON where there is NEON.
            Isa::Portable | Isa::Neon => add_scaled,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => crate::x86::avx2::add_scaled_if_available(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => crate::x86::avx512::add_scaled_if_available(),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 => add_scaled,
        };
        let (outputs, length) = (self.weights.outputs, panel.len());
        let mut sums = vec![0.0f32; self.rows * length];
        let mut decoder = Decoder::new(self.kernels, self.weights);
        let mut decoded = vec![0.0f32; OUTPUTS * length];
        let mut of_outputs = vec![0.0f32; length];
        for first in (0..outputs).step_by(OUTPUTS) {
            let count = OUTPUTS.min(outputs - first);
            for (i, to) in decoded.chunks_exact_mut(length).enumerate() {
                if i >= count {
                    // Of outputs that are not there.
                    to.fill(0.0);
                    continue;
                }
                decoder.decode(0, first + i, panel.clone());
                let [weights, ..] = decoder.decoded(length);
                let weights = weights.as_chunks::<4>().0;
                for (to, weight) in to.iter_mut().zip(weights) {
                    *to = f32::from_le_bytes(*weight);
                }
            }
            for (row, sums) in sums.chunks_exact_mut(length).enumerate() {
                let dy = &self.dy[row * outputs + first..][..count];
                of_outputs.fill(0.0);
                let groups = decoded.chunks_exact(GROUP * length);
                for (dy, weights) in dy.chunks(GROUP).zip(groups) {
                    let mut factors = [0.0; GROUP];
                    factors[..dy.len()].copy_from_slice(dy);
                    add(weights, factors, &mut of_outputs);
                }
                for (sum, of_outputs) in sums.iter_mut().zip(&of_outputs) {
                    *sum += of_outputs;
                }
            }
        }
        sums
    }
}

/// Adds four rows of weights, [4, length], each times its factor.
pub(crate) type AddScaled = fn(&[f32], [f32; GROUP], &mut [f32]);

/// For every instruction set: the compiler makes vectors of it.
#[inline(always)]
pub(crate) fn add_scaled(weights: &[f32], factors: [f32; GROUP], sums: &mut [f32]) {
    let (a, rest) = weights.split_at(sums.len());
    let (b, rest) = rest.split_at(sums.len());
    let (c, d) = rest.split_at(sums.len());
    for ((((sum, a), b), c), d) in sums.iter_mut().zip(a).zip(b).zip(c).zip(d) {
        *sum += (a * factors[0] + b * factors[1]) + (c * factors[2] + d * factors[3]);
    }
}
