//! Row by row: norms, gates, sums, rows of a table, products with matrices that are not quantized.

use std::{num::NonZeroUsize, ops::Range, thread};

use super::{Faults, RmsNorm};
use crate::{
    Activation, FloatType, KernelError, Kernels,
    error::check_length,
    float,
    linear::{GROUP, SEGMENT, add_products_with},
};

/// Elements that are widened at a time.
const PIECE: usize = 4096;

impl Kernels {
    /// Computes `y` = [`RmsNorm`] of `x`.
    ///
    /// `x` and `y` [rows, columns], `weight` \[columns\], as bytes.
    ///
    /// ```
    /// use tightfit_kernels::{FloatType, Kernels, decoder::RmsNorm};
    ///
    /// let norm = RmsNorm { float: FloatType::F32, rows: 1, columns: 2, eps: 0.0, weight_offset: 1.0 };
    /// let bytes = |values: [f32; 2]| values.map(f32::to_le_bytes).concat();
    /// let mut y = [0; 8];
    /// Kernels::detect().rms_norm(&norm, &bytes([1.0, 7.0]), &bytes([1.0, 0.0]), &mut y)?;
    /// assert_eq!(y[..], bytes([0.4, 1.4]));
    /// # Ok::<(), tightfit_kernels::KernelError>(())
    /// ```
    ///
    /// # Errors
    /// [`KernelError::Length`] if the lengths do not belong together.
    pub fn rms_norm(
        self,
        norm: &RmsNorm,
        x: &[u8],
        weight: &[u8],
        y: &mut [u8],
    ) -> Result<(), KernelError> {
        let (row, weights) = self.norm_operands(norm, x.len(), weight, y.len())?;
        if row == 0 {
            return Ok(());
        }
        let mut values = vec![];
        for (x, y) in x.chunks_exact(row).zip(y.chunks_exact_mut(row)) {
            self.widen(norm.float, x, &mut values);
            normalize(norm, &mut values, &weights);
            self.narrow(norm.float, &values, y);
        }
        Ok(())
    }

    /// Computes `x = x + add`, rounded, and `y` = [`RmsNorm`] of that: a residual and the norm behind it.
    ///
    /// # Errors
    /// As [`Kernels::rms_norm`].
    pub fn add_rms_norm(
        self,
        norm: &RmsNorm,
        x: &mut [u8],
        add: &[u8],
        weight: &[u8],
        y: &mut [u8],
    ) -> Result<(), KernelError> {
        let (row, weights) = self.norm_operands(norm, x.len(), weight, y.len())?;
        check_length("add", x.len(), add.len())?;
        if row == 0 {
            return Ok(());
        }
        let (mut values, mut more) = (vec![], vec![]);
        let rows = x.chunks_exact_mut(row).zip(add.chunks_exact(row));
        for ((x, add), y) in rows.zip(y.chunks_exact_mut(row)) {
            self.widen(norm.float, x, &mut values);
            self.widen(norm.float, add, &mut more);
            for (value, more) in values.iter_mut().zip(&more) {
                *value += more;
            }
            self.narrow(norm.float, &values, x);
            self.widen(norm.float, x, &mut values);
            normalize(norm, &mut values, &weights);
            self.narrow(norm.float, &values, y);
        }
        Ok(())
    }

    /// The bytes of a row, and what it is multiplied with.
    fn norm_operands(
        self,
        norm: &RmsNorm,
        x: usize,
        weight: &[u8],
        y: usize,
    ) -> Result<(usize, Vec<f32>), KernelError> {
        let row = norm.columns.saturating_mul(norm.float.bytes());
        check_length("x", norm.rows.saturating_mul(row), x)?;
        check_length("y", x, y)?;
        check_length("weight", row, weight.len())?;
        let mut weights = vec![];
        self.widen(norm.float, weight, &mut weights);
        for weight in &mut weights {
            *weight += norm.weight_offset;
        }
        Ok((row, weights))
    }

    /// Computes `y = activation(gate, up)` of each element.
    ///
    /// # Errors
    /// [`KernelError::Length`] unless all are of one length, whole elements.
    pub fn gate(
        self,
        float: FloatType,
        activation: Activation,
        gate: &[u8],
        up: &[u8],
        y: &mut [u8],
    ) -> Result<(), KernelError> {
        check_whole("gate", float, gate.len())?;
        check_length("up", gate.len(), up.len())?;
        check_length("y", gate.len(), y.len())?;
        let piece = PIECE * float.bytes();
        let (mut gates, mut ups) = (vec![], vec![]);
        let inputs = gate.chunks(piece).zip(up.chunks(piece));
        for ((gate, up), y) in inputs.zip(y.chunks_mut(piece)) {
            self.widen(float, gate, &mut gates);
            self.widen(float, up, &mut ups);
            for (gate, up) in gates.iter_mut().zip(&ups) {
                *gate = activation.apply(*gate, *up);
            }
            self.narrow(float, &gates, y);
        }
        Ok(())
    }

    /// Computes `x = x + add` of each element.
    ///
    /// # Errors
    /// As [`Kernels::gate`].
    pub fn add(self, float: FloatType, x: &mut [u8], add: &[u8]) -> Result<(), KernelError> {
        check_whole("x", float, x.len())?;
        check_length("add", x.len(), add.len())?;
        let piece = PIECE * float.bytes();
        let (mut values, mut more) = (vec![], vec![]);
        for (x, add) in x.chunks_mut(piece).zip(add.chunks(piece)) {
            self.widen(float, x, &mut values);
            self.widen(float, add, &mut more);
            for (value, more) in values.iter_mut().zip(&more) {
                *value += more;
            }
            self.narrow(float, &values, x);
        }
        Ok(())
    }

    /// Copies rows of a table: `y[i] = table[ids[i]]`, of `columns` elements each.
    ///
    /// Of an id that is no row of the table the row gets zeros, and [`Faults::ID`] says so.
    ///
    /// # Errors
    /// [`KernelError::Length`] if the lengths do not belong together.
    pub fn gather(
        self,
        float: FloatType,
        columns: usize,
        table: &[u8],
        ids: &[u32],
        y: &mut [u8],
    ) -> Result<Faults, KernelError> {
        let row = columns.saturating_mul(float.bytes());
        check_length("y", ids.len().saturating_mul(row), y.len())?;
        if row == 0 {
            return Ok(Faults::NONE);
        }
        let rows = table.len() / row;
        check_length("table", rows * row, table.len())?;
        let mut faults = Faults::NONE;
        for (id, y) in ids.iter().zip(y.chunks_exact_mut(row)) {
            match *id as usize {
                id if id < rows => y.copy_from_slice(&table[id * row..][..row]),
                _ => {
                    y.fill(0);
                    faults = faults.with(Faults::ID);
                }
            }
        }
        Ok(faults)
    }

    /// Sums up rows with weights: `y[i]` = the sum of `weights[i, j] * x[i, j]` over `j`, in their order.
    ///
    /// `x` [rows, k, columns] and `y` [rows, columns], as bytes, `weights` [rows, k].
    ///
    /// # Errors
    /// [`KernelError::Length`] if the lengths do not belong together.
    pub fn combine(
        self,
        float: FloatType,
        [rows, k, columns]: [usize; 3],
        x: &[u8],
        weights: &[f32],
        y: &mut [u8],
    ) -> Result<(), KernelError> {
        let row = columns.saturating_mul(float.bytes());
        check_length("x", rows.saturating_mul(k).saturating_mul(row), x.len())?;
        check_length("weights", rows.saturating_mul(k), weights.len())?;
        check_length("y", rows.saturating_mul(row), y.len())?;
        if row == 0 {
            return Ok(());
        }
        let (mut sums, mut part) = (vec![], vec![]);
        let mut parts = x.chunks_exact(row).zip(weights);
        for y in y.chunks_exact_mut(row) {
            sums.clear();
            sums.resize(columns, 0.0);
            for (x, weight) in parts.by_ref().take(k) {
                self.widen(float, x, &mut part);
                for (sum, part) in sums.iter_mut().zip(&part) {
                    *sum += weight * part;
                }
            }
            self.narrow(float, &sums, y);
        }
        Ok(())
    }

    /// Multiplies rows with a matrix that is not quantized: `y = x * transpose(W) + bias`.
    ///
    /// `weights` W [outputs, inputs], `x` [rows, inputs], `bias` \[outputs\] and `y` [rows, outputs], as
    /// bytes; `threads` as in [`Kernels::linear`]. The bits of a result do not depend on other rows or outputs.
    ///
    /// # Errors
    /// [`KernelError::Length`] if the lengths do not belong together.
    #[expect(
        clippy::too_many_arguments,
        reason = "each is one thing that a caller has to decide"
    )]
    pub fn dense(
        self,
        float: FloatType,
        [rows, outputs, inputs]: [usize; 3],
        weights: &[u8],
        x: &[u8],
        bias: Option<&[u8]>,
        y: &mut [u8],
        threads: NonZeroUsize,
    ) -> Result<(), KernelError> {
        self.dense_while(
            float,
            [rows, outputs, inputs],
            weights,
            x,
            bias,
            y,
            threads,
            &|| true,
        )
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "each is one thing that a caller has to decide"
    )]
    pub(super) fn dense_while(
        self,
        float: FloatType,
        [rows, outputs, inputs]: [usize; 3],
        weights: &[u8],
        x: &[u8],
        bias: Option<&[u8]>,
        y: &mut [u8],
        threads: NonZeroUsize,
        keep_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<(), KernelError> {
        let bytes = |elements: usize| elements.saturating_mul(float.bytes());
        check_length(
            "weights",
            bytes(outputs.saturating_mul(inputs)),
            weights.len(),
        )?;
        check_length("x", bytes(rows.saturating_mul(inputs)), x.len())?;
        check_length("y", bytes(rows.saturating_mul(outputs)), y.len())?;
        if let Some(bias) = bias {
            check_length("bias", bytes(outputs), bias.len())?;
        }
        if rows == 0 || outputs == 0 {
            return Ok(());
        }
        let mut widened = vec![];
        self.widen(float, x, &mut widened);
        let share = outputs.div_ceil(GROUP).div_ceil(threads.get()) * GROUP;
        let ranges: Vec<Range<usize>> = (0..outputs)
            .step_by(share)
            .map(|begin| begin..outputs.min(begin + share))
            .collect();
        let sums = on_threads(ranges.clone(), |range| {
            self.dense_sums(float, [rows, inputs], weights, &widened, range, keep_on)
        });
        let size = float.bytes();
        for (range, sums) in ranges.iter().zip(&sums) {
            for (row, sums) in sums.chunks_exact(range.len()).enumerate() {
                let y = &mut y[bytes(row * outputs + range.start)..][..bytes(range.len())];
                for (i, (y, sum)) in y.chunks_exact_mut(size).zip(sums).enumerate() {
                    let add = bias.map_or(0.0, |bias| {
                        float::read(float, &bias[bytes(range.start + i)..][..size])
                    });
                    float::write(float, sum + add, y);
                }
            }
        }
        Ok(())
    }

    /// The sums of some outputs, for each row those of all of these outputs.
    fn dense_sums(
        self,
        float: FloatType,
        [rows, inputs]: [usize; 2],
        weights: &[u8],
        x: &[f32],
        outputs: Range<usize>,
        keep_on: &(dyn Fn() -> bool + Sync),
    ) -> Vec<f32> {
        let (size, count) = (float.bytes(), outputs.len());
        let mut sums = vec![0.0; rows * count];
        let add = add_products_with(self.isa());
        let mut buffers: [Vec<f32>; GROUP] = std::array::from_fn(|_| vec![]);
        for begin in (0..inputs).step_by(SEGMENT) {
            let segment = begin..inputs.min(begin + SEGMENT);
            for first in (0..count).step_by(GROUP) {
                if !keep_on() {
                    return sums;
                }
                let group = (count - first).min(GROUP);
                for (i, buffer) in buffers.iter_mut().enumerate() {
                    // Where there are less than four, the last one comes more than once.
                    let output = outputs.start + first + i.min(group - 1);
                    let at = (output * inputs + begin) * size;
                    self.widen(float, &weights[at..][..segment.len() * size], buffer);
                }
                let of_outputs = std::array::from_fn(|i| bytemuck::cast_slice(&buffers[i][..]));
                for row in 0..rows {
                    let x = &x[row * inputs..][segment.clone()];
                    let mut products = [0.0; GROUP];
                    add(x, &of_outputs, &mut products);
                    let sums = &mut sums[row * count + first..][..group];
                    for (sum, product) in sums.iter_mut().zip(products) {
                        *sum += product;
                    }
                }
            }
        }
        sums
    }
}

/// What each of some pieces of work gives, each on a thread of its own but the first.
pub(super) fn on_threads<Piece: Send, Result: Send>(
    pieces: Vec<Piece>,
    work: impl Fn(Piece) -> Result + Sync,
) -> Vec<Result> {
    let mut pieces = pieces.into_iter();
    let Some(first) = pieces.next() else {
        return vec![];
    };
    thread::scope(|scope| {
        let work = &work;
        let others: Vec<_> = pieces
            .map(|piece| scope.spawn(move || work(piece)))
            .collect();
        let mut results = vec![work(first)];
        for other in others {
            match other.join() {
                Ok(result) => results.push(result),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        results
    })
}

fn normalize(norm: &RmsNorm, values: &mut [f32], weights: &[f32]) {
    // Sums of their own, which the compiler makes vectors of.
    let mut sums = [0.0f32; 16];
    let (chunks, rest) = values.as_chunks::<16>();
    for chunk in chunks {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum += value * value;
        }
    }
    let rest: f32 = rest.iter().map(|value| value * value).sum();
    let mean = (sums.iter().sum::<f32>() + rest) / norm.columns as f32;
    let factor = 1.0 / (mean + norm.eps).sqrt();
    for (value, weight) in values.iter_mut().zip(weights) {
        *value *= factor * weight;
    }
}

fn check_whole(what: &'static str, float: FloatType, have: usize) -> Result<(), KernelError> {
    check_length(what, have / float.bytes() * float.bytes(), have)
}
