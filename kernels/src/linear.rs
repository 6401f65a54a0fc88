//! Products with 4-bit weights on the processor.
//!
//! Outputs are dealt out to threads. A thread takes four outputs and a segment of the inputs at a
//! time: it decodes the weights into a buffer that stays in the first-level cache, and multiplies
//! them with every row of x. Rows of bf16 are multiplied otherwise where the processor has
//! instructions for them: `x86/avx512/linear/bf16.rs` and `arm/neon/linear/bf16.rs`. Either way each result is the sum of
//! its segments in their order, and a segment's sum does not depend on other rows or outputs, nor on
//! the number of threads.

use std::{num::NonZeroUsize, ops::Range};

#[cfg(target_arch = "aarch64")]
use crate::arm::neon::linear::bf16;
#[cfg(target_arch = "x86_64")]
use crate::x86::avx512::linear::bf16;
use crate::{
    BlockSize, Float, FloatType, Isa, KernelError, Kernels, NESTED_BLOCK_SIZE, QuantType, blocks,
    error::check_length, float, packed_bytes, threads::each,
};

/// Inputs of a segment, and outputs that are computed together.
pub(crate) const SEGMENT: usize = 2048;
pub(crate) const GROUP: usize = 4;

/// Pieces of outputs that a thread takes are multiples of so many, or of a quarter of it where there are few.
const PIECE: usize = 64;

/// Sums that a dot product is made of.
const LANES: usize = 16;

/// The scales of quantized weights.
#[derive(Debug, Clone, Copy)]
pub enum Scales<'a> {
    /// One absmax for each block, as [`Kernels::quantize_nf4`] writes them.
    Absmax(&'a [f32]),
    /// Absmax values that are quantized themselves, as [`Kernels::quantize_absmax`] writes them.
    Double {
        /// The code of each absmax.
        codes: &'a [u8],
        /// One for every [`NESTED_BLOCK_SIZE`] of them, rounded up.
        nested_absmax: &'a [f32],
        /// The mean of the absmax values, which is added to each.
        absmax_mean: f32,
        /// The values of the codes: [`crate::DYNAMIC_MAP`], or what a checkpoint has.
        map: &'a [f32; 256],
    },
}

impl Scales<'_> {
    /// Writes the scales from block `first` on.
    fn read(&self, first: usize, out: &mut [f32]) {
        match self {
            Scales::Absmax(absmax) => out.copy_from_slice(&absmax[first..][..out.len()]),
            Scales::Double {
                codes,
                nested_absmax,
                absmax_mean,
                map,
            } => {
                for (i, out) in out.iter_mut().enumerate() {
                    let block = first + i;
                    let nested = nested_absmax[block / NESTED_BLOCK_SIZE];
                    *out = map[usize::from(codes[block])] * nested + absmax_mean;
                }
            }
        }
    }
}

/// Quantized weights W [outputs, inputs]: of the tensor flattened in row-major order, so that a row
/// may begin in the middle of a byte or of a block.
#[derive(Debug, Clone, Copy)]
pub struct LinearWeights<'a> {
    /// The 4-bit format.
    pub quant_type: QuantType,
    /// Rows.
    pub outputs: usize,
    /// Columns.
    pub inputs: usize,
    /// Elements that share one scale.
    pub block_size: BlockSize,
    /// [`packed_bytes`] of all elements.
    pub codes: &'a [u8],
    /// One for each of the [`blocks`] of all elements.
    pub scales: Scales<'a>,
}

impl LinearWeights<'_> {
    pub(crate) fn check(&self) -> Result<(), KernelError> {
        let elements = self.outputs.saturating_mul(self.inputs);
        check_length("codes", packed_bytes(elements), self.codes.len())?;
        let blocks = blocks(elements, self.block_size);
        match self.scales {
            Scales::Absmax(absmax) => check_length("absmax", blocks, absmax.len()),
            Scales::Double {
                codes,
                nested_absmax,
                ..
            } => {
                check_length("absmax", blocks, codes.len())?;
                let need = blocks.div_ceil(NESTED_BLOCK_SIZE);
                check_length("nested_absmax", need, nested_absmax.len())
            }
        }
    }

    /// Writes the scales that inputs from `first` on have, of `run` each, where each of these lies in
    /// one block.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    pub(crate) fn read_scales(&self, first: usize, run: usize, out: &mut [f32]) {
        let size = self.block_size.elements();
        if size == run {
            self.scales.read(first / run, out);
            return;
        }
        for (i, out) in out.iter_mut().enumerate() {
            let block = (first + run * i) / size;
            self.scales.read(block, std::slice::from_mut(out));
        }
    }
}

impl Kernels {
    /// Multiplies rows with quantized weights: `y = x * transpose(W) + bias`.
    ///
    /// - `x` [rows, inputs], `bias` \[outputs\] and `y` [rows, outputs].
    /// - `threads`: how many to use. Beside the caller's, they are kept for the next call.
    ///
    /// Products and sums are f32, or products are of numbers rounded to bf16 where `x` is of bf16
    /// and the processor multiplies that; the result is rounded once to `T`. The bits of a
    /// result depend on the instruction set, but not on other rows or outputs, nor on `threads`.
    ///
    /// ```
    /// use std::num::NonZeroUsize;
    ///
    /// use tightfit_kernels::half::bf16;
    /// use tightfit_kernels::{BlockSize, Float, Kernels, LinearWeights, QuantType, Scales};
    ///
    /// // One output of 64 inputs, all of code 15: the largest value of NF4, 1.
    /// let weights = LinearWeights {
    ///     quant_type: QuantType::Nf4,
    ///     outputs: 1,
    ///     inputs: 64,
    ///     block_size: BlockSize::DEFAULT,
    ///     codes: &[0xff; 32],
    ///     scales: Scales::Absmax(&[0.5]),
    /// };
    /// let (x, mut y) = ([bf16::ONE; 64], [bf16::ZERO; 1]);
    /// Kernels::detect().linear(&weights, 1, &x, None, &mut y, NonZeroUsize::MIN)?;
    /// assert_eq!(y[0].to_f32(), 32.0);
    /// # Ok::<(), tightfit_kernels::KernelError>(())
    /// ```
    ///
    /// # Errors
    /// [`KernelError::Length`] if the lengths do not belong together.
    pub fn linear<T: Float>(
        self,
        weights: &LinearWeights<'_>,
        rows: usize,
        x: &[T],
        bias: Option<&[T]>,
        y: &mut [T],
        threads: NonZeroUsize,
    ) -> Result<(), KernelError> {
        self.linear_bytes(
            weights,
            T::TYPE,
            rows,
            bytemuck::cast_slice(x),
            bias.map(bytemuck::cast_slice),
            bytemuck::cast_slice_mut(y),
            threads,
        )
    }

    /// [`Kernels::linear`] on elements of type `float` as little-endian bytes at any alignment.
    ///
    /// # Errors
    /// [`KernelError::Length`] in bytes.
    #[expect(
        clippy::too_many_arguments,
        reason = "each is one thing that a caller has to decide"
    )]
    pub fn linear_bytes(
        self,
        weights: &LinearWeights<'_>,
        float: FloatType,
        rows: usize,
        x: &[u8],
        bias: Option<&[u8]>,
        y: &mut [u8],
        threads: NonZeroUsize,
    ) -> Result<(), KernelError> {
        weights.check()?;
        let bytes = |elements: usize| elements.saturating_mul(float.bytes());
        let (outputs, inputs) = (weights.outputs, weights.inputs);
        check_length("x", bytes(rows.saturating_mul(inputs)), x.len())?;
        check_length("y", bytes(rows.saturating_mul(outputs)), y.len())?;
        if let Some(bias) = bias {
            check_length("bias", bytes(outputs), bias.len())?;
        }
        if rows == 0 || outputs == 0 {
            return Ok(());
        }

        let product = Product::new(self, weights, float, rows, x);
        // Some pieces for each thread, so that all end at about the same time.
        let piece = outputs / (8 * threads.get());
        let piece =
            piece
                .max(1)
                .next_multiple_of(if piece < PIECE / 2 { PIECE / 4 } else { PIECE });
        let ranges: Vec<Range<usize>> = (0..outputs)
            .step_by(piece)
            .map(|begin| begin..outputs.min(begin + piece))
            .collect();
        let mut sums = each(threads, &ranges, |range| product.sums(range.clone()));
        let size = float.bytes();
        for (range, sums) in ranges.iter().zip(&mut sums) {
            for (row, sums) in sums.chunks_exact_mut(range.len()).enumerate() {
                if let Some(bias) = bias {
                    let bias = bias[range.start * size..range.end * size].chunks_exact(size);
                    for (sum, bias) in sums.iter_mut().zip(bias) {
                        *sum += float::read(float, bias);
                    }
                }
                let y = &mut y[(row * outputs + range.start) * size..][..range.len() * size];
                self.cast(bytemuck::cast_slice(sums), FloatType::F32, float, y)?;
            }
        }
        Ok(())
    }
}

/// Codes lose less in bf16 if they are all multiplied with the same number first, which sums are
/// divided by. FP4's become exact; for NF4 it is the number for which the sum of the squares of what
/// rounding loses is least.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) const fn code_factor(quant_type: QuantType) -> f32 {
    match quant_type {
        QuantType::Nf4 => 1.437_006,
        QuantType::Fp4 => 3.0,
    }
}

/// x as the kernels read it.
enum Prepared {
    /// f32, row by row.
    Widened(Vec<f32>),
    /// Pairs of bf16, or of rows of them, as the instructions take them.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    Pairs(Vec<bf16::Unit>),
}

/// A product that is to be computed.
pub(crate) struct Product<'a> {
    kernels: Kernels,
    weights: &'a LinearWeights<'a>,
    rows: usize,
    x: Prepared,
}

impl<'a> Product<'a> {
    pub(crate) fn new(
        kernels: Kernels,
        weights: &'a LinearWeights<'a>,
        float: FloatType,
        rows: usize,
        x: &[u8],
    ) -> Product<'a> {
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        if matches!(kernels.isa(), Isa::Avx512 | Isa::Neon)
            && float == FloatType::Bf16
            && let Some(pairs) = bf16::pairs_if_possible(weights, rows, x)
        {
            return Product {
                kernels,
                weights,
                rows,
                x: Prepared::Pairs(pairs),
            };
        }
        let widened = x.chunks_exact(float.bytes());
        Product {
            kernels,
            weights,
            rows,
            x: Prepared::Widened(widened.map(|x| float::read(float, x)).collect()),
        }
    }

    /// The sums of some outputs, for each row those of all of these outputs.
    pub(crate) fn sums(&self, outputs: Range<usize>) -> Vec<f32> {
        let mut sums = vec![0.0; self.rows * outputs.len()];
        match &self.x {
            Prepared::Widened(x) => {
                let add = add_products_with(self.kernels.isa());
                self.widened_sums(x, outputs, &mut sums, add);
            }
            #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
            Prepared::Pairs(x) => {
                // SAFETY: rows are only made pairs for a processor that has the instructions.
                unsafe { bf16::sums_of_pairs(self.weights, self.rows, x, outputs, &mut sums) };
            }
        }
        sums
    }

    fn widened_sums(&self, x: &[f32], outputs: Range<usize>, sums: &mut [f32], add: AddProducts) {
        let (inputs, count) = (self.weights.inputs, outputs.len());
        let mut decoder = Decoder::new(self.kernels, self.weights);
        for begin in (0..inputs).step_by(SEGMENT) {
            let segment = begin..inputs.min(begin + SEGMENT);
            for first in (0..count).step_by(GROUP) {
                let group = (count - first).min(GROUP);
                for i in 0..GROUP {
                    // Where there are less than four, the last one comes more than once.
                    let output = outputs.start + first + i.min(group - 1);
                    decoder.decode(i, output, segment.clone());
                }
                let decoded = decoder.decoded(segment.len());
                for row in 0..self.rows {
                    let x = &x[row * inputs..][segment.clone()];
                    let mut products = [0.0; GROUP];
                    add(x, &decoded, &mut products);
                    let sums = &mut sums[row * count + first..][..group];
                    for (sum, product) in sums.iter_mut().zip(products) {
                        *sum += product;
                    }
                }
            }
        }
    }
}

/// Decodes segments of four outputs to f32.
pub(crate) struct Decoder<'a> {
    kernels: Kernels,
    weights: &'a LinearWeights<'a>,
    absmax: Vec<f32>,
    /// For each output an element that may be decoded too many, and the segment.
    buffers: [Vec<u8>; GROUP],
    /// How many were too many.
    skipped: [usize; GROUP],
}

impl<'a> Decoder<'a> {
    pub(crate) fn new(kernels: Kernels, weights: &'a LinearWeights<'a>) -> Decoder<'a> {
        Decoder {
            kernels,
            weights,
            absmax: vec![0.0; SEGMENT / 32 + 2],
            buffers: std::array::from_fn(|_| vec![0; (SEGMENT + 1) * 4]),
            skipped: [0; GROUP],
        }
    }

    pub(crate) fn decode(&mut self, i: usize, output: usize, inputs: Range<usize>) {
        let weights = self.weights;
        let size = weights.block_size.elements();
        let first = output * weights.inputs;
        let end = first + inputs.end;
        // A byte begins at an even element.
        let mut begin = (first + inputs.start) & !1;
        self.skipped[i] = (first + inputs.start) % 2;
        let mut out = &mut self.buffers[i][..(end - begin) * 4];
        // The rest of the block that it begins in, and then whole blocks.
        while begin < end {
            let stop = if begin.is_multiple_of(size) {
                end
            } else {
                end.min(begin.next_multiple_of(size))
            };
            let absmax = &mut self.absmax[..(stop - begin).div_ceil(size)];
            weights.scales.read(begin / size, absmax);
            let (piece, rest) = out.split_at_mut((stop - begin) * 4);
            let codes = &weights.codes[begin / 2..stop.div_ceil(2)];
            let decoded = self.kernels.dequantize(
                weights.quant_type,
                codes,
                absmax,
                weights.block_size,
                stop - begin,
                FloatType::F32,
                piece,
            );
            debug_assert_eq!(decoded, Ok(()));
            (begin, out) = (stop, rest);
        }
    }

    /// The bytes of `inputs` weights of each output.
    pub(crate) fn decoded(&self, inputs: usize) -> [&[u8]; GROUP] {
        std::array::from_fn(|i| &self.buffers[i][self.skipped[i] * 4..][..inputs * 4])
    }
}

/// [`add_products`], or the same with other instructions.
pub(crate) type AddProducts = fn(&[f32], &[&[u8]; GROUP], &mut [f32; GROUP]);

/// That of an instruction set that this machine has.
pub(crate) fn add_products_with(isa: Isa) -> AddProducts {
    match isa {
        Isa::Portable => add_products,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => crate::x86::avx2::add_products_if_available(),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => crate::x86::avx512::add_products_if_available(),
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512 => add_products,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => crate::arm::neon::add_products,
        #[cfg(not(target_arch = "aarch64"))]
        Isa::Neon => add_products,
    }
}

/// Adds up the products of a row with four outputs' weights, little-endian f32.
pub(crate) fn add_products(x: &[f32], weights: &[&[u8]; GROUP], sums: &mut [f32; GROUP]) {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let split = weights.map(|weights| weights.as_chunks::<{ LANES * 4 }>());
    let mut lanes = [[0.0f32; LANES]; GROUP];
    for (i, x) in chunks.iter().enumerate() {
        for (lanes, (weights, _)) in lanes.iter_mut().zip(&split) {
            let (weights, _) = weights[i].as_chunks::<4>();
            for ((lane, x), weight) in lanes.iter_mut().zip(x).zip(weights) {
                *lane += x * f32::from_le_bytes(*weight);
            }
        }
    }
    for ((sum, lanes), (_, weights)) in sums.iter_mut().zip(&mut lanes).zip(split) {
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
        }
        *sum += lanes[0] + rest_of_products(rest, weights);
    }
}

/// The sum of the products that make no vector.
pub(crate) fn rest_of_products(x: &[f32], weights: &[u8]) -> f32 {
    let (weights, _) = weights.as_chunks::<4>();
    let products = x.iter().zip(weights);
    products.fold(0.0, |sum, (x, weight)| {
        sum + x * f32::from_le_bytes(*weight)
    })
}
