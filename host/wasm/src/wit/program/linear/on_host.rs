//! Products by the processor, in pieces between which it is asked whether the program may go on.

use std::borrow::Cow;
use std::num::NonZeroUsize;

use tightfit_kernels::{
    Choices, DYNAMIC_MAP, ExpertsMatrices, LinearWeights, NESTED_BLOCK_SIZE, Scales, packed_bytes,
};

use super::super::ProgramCtxView;
use super::super::error::CallError;
use super::super::view::not_there;
use super::Checked;
use super::weight::{Shared, Source};
use crate::memory::HeldPiece;
use tightfit::plan::PartKind;

/// Multiplications of one piece: some tens of milliseconds on two cores. Tests have many pieces of little work.
const PIECE: u64 = if cfg!(test) { 1 << 16 } else { 1 << 31 };

/// Bytes of input and output of one piece, unless a row has more.
const PIECE_BYTES: u64 = 4 << 20;

/// Elements of a weight that are multiplied with in one go: larger ones are cut up.
const LARGE: u64 = if cfg!(test) { 1 << 15 } else { 1 << 30 };

/// Multiplications that are worth a thread.
const WORK_OF_A_THREAD: u64 = 1 << 18;

/// Codes and scales of a whole weight in place.
struct InPlace<'a> {
    codes: &'a [u8],
    scales: &'a [u8],
    /// Of scales that are quantized, and their mean.
    nested: Option<(&'a [u8], f32)>,
}

/// Numbers in place; copied only where a device has them at odd addresses.
fn floats(bytes: &[u8]) -> Cow<'_, [f32]> {
    match bytemuck::try_cast_slice(bytes) {
        Ok(floats) => Cow::Borrowed(floats),
        Err(_) => {
            let (floats, _) = bytes.as_chunks::<4>();
            Cow::Owned(floats.iter().copied().map(f32::from_le_bytes).collect())
        }
    }
}

impl InPlace<'_> {
    /// Has `work` see rows `first..end` of all matrices as one matrix. They begin with a block, and where
    /// scales are quantized with the blocks of a nested one.
    fn with_rows<T>(
        &self,
        weight: &Shared,
        [first, end]: [usize; 2],
        work: impl FnOnce(&LinearWeights<'_>) -> T,
    ) -> Option<T> {
        let shape = &weight.shape;
        let start = first * shape.inputs;
        let elements = (end - first) * shape.inputs;
        let block = start / shape.block_size.elements();
        let count = elements.div_ceil(shape.block_size.elements());
        let codes = self.codes.get(start / 2..)?.get(..packed_bytes(elements))?;
        let each = if self.nested.is_some() { 1 } else { 4 };
        let scales = self.scales.get(each * block..)?.get(..each * count)?;
        let (absmax, nested);
        let scales = match self.nested {
            None => {
                absmax = floats(scales);
                Scales::Absmax(&absmax)
            }
            Some((all, mean)) => {
                let begin = 4 * (block / NESTED_BLOCK_SIZE);
                let bytes = 4 * count.div_ceil(NESTED_BLOCK_SIZE);
                nested = floats(all.get(begin..)?.get(..bytes)?);
                Scales::Double {
                    codes: scales,
                    nested_absmax: &nested,
                    absmax_mean: mean,
                    map: &DYNAMIC_MAP,
                }
            }
        };
        Some(work(&LinearWeights {
            quant_type: weight.quant_type,
            outputs: end - first,
            inputs: shape.inputs,
            block_size: shape.block_size,
            codes,
            scales,
        }))
    }
}

/// Has `work` see a weight in place; none where the processor cannot read it.
fn in_place<T>(weight: &Shared, work: impl FnOnce(&InPlace<'_>) -> T) -> Option<T> {
    match &weight.source {
        Source::Model {
            loaded,
            tensor,
            mean,
        } => {
            let tensor = loaded.model().tensor_at(*tensor)?;
            let nested = match mean {
                Some(mean) => Some((tensor.part(PartKind::NestedAbsmax)?, *mean)),
                None => None,
            };
            Some(work(&InPlace {
                codes: tensor.part(PartKind::Codes)?,
                scales: tensor.part(PartKind::Absmax)?,
                nested,
            }))
        }
        Source::Buffers { codes, absmax } => {
            let ranges = [
                (&*codes.piece, codes.offset, codes.bytes),
                (&*absmax.piece, absmax.offset, absmax.bytes),
            ];
            HeldPiece::with_host(ranges, |[codes, scales]| {
                work(&InPlace {
                    codes,
                    scales,
                    nested: None,
                })
            })
        }
    }
}

/// Rows of matrices that are multiplied with at once, of a large weight: a multiple of what they have to begin
/// with.
fn rows_of_segment(weight: &Shared) -> usize {
    let nested = match &weight.source {
        Source::Model { mean: Some(_), .. } => NESTED_BLOCK_SIZE,
        _ => 1,
    };
    let step = weight.shape.block_size.elements() * nested;
    let most = (LARGE as usize / 8) / weight.shape.inputs.max(1);
    (most / step).max(1) * step
}

impl ProgramCtxView<'_> {
    pub(super) fn multiply_on_host(&mut self, product: &Checked<'_>) -> Result<(), CallError> {
        let shape = &product.weight.shape;
        let [of_input, of_output] = product.row_bytes();
        let of_row = (shape.outputs as u64).saturating_mul(shape.inputs as u64);
        let is_large = of_row > LARGE;
        let mut bias = vec![0; product.bias.map_or(0, |_| product.bias_bytes() as usize)];
        if let Some(place) = product.bias {
            self.fetch(place, 0, &mut bias)?;
        }
        let bias = product.bias.map(|_| &bias[..]);
        let rows = match is_large {
            true => 1,
            false => (PIECE / of_row.max(1)).min(PIECE_BYTES / (of_input + of_output).max(1)),
        };
        let (mut x, mut y, mut ids) = (vec![], vec![], vec![0i32; 0]);
        self.in_pieces(product.rows, rows.max(1), |view, first, rows| {
            x.resize(rows * of_input as usize, 0);
            y.resize(rows * of_output as usize, 0);
            view.fetch(product.input, first * of_input, &mut x)?;
            if let Some(place) = product.experts {
                ids.resize(rows, 0);
                let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut ids);
                view.fetch(place, 4 * first, bytes)?;
                // Rows of no expert are left as they are.
                view.fetch(product.output, first * of_output, &mut y)?;
            }
            let ids = product.experts.map(|_| &ids[..]);
            match is_large {
                true => view.large_row(product, ids, &x, bias, &mut y)?,
                false => view.some_rows(product, ids, [&x, bias.unwrap_or_default()], &mut y)?,
            }
            view.store(product.output, first * of_output, &y)
        })
    }

    fn threads(&self, multiplications: u64) -> NonZeroUsize {
        let worth = usize::try_from(multiplications / WORK_OF_A_THREAD).unwrap_or(usize::MAX);
        let threads = self.context.models.threads.min(worth);
        NonZeroUsize::new(threads).unwrap_or(NonZeroUsize::MIN)
    }

    /// Some rows with the whole weight. `x` and the bias, which is empty where there is none.
    fn some_rows(
        &self,
        product: &Checked<'_>,
        ids: Option<&[i32]>,
        [x, bias]: [&[u8]; 2],
        y: &mut [u8],
    ) -> Result<(), CallError> {
        let (weight, kernels) = (&*product.weight, self.context.kernels);
        let shape = &weight.shape;
        let of_row = (shape.outputs * shape.inputs) as u64;
        let rows = x.len() / product.row_bytes()[0] as usize;
        let threads = self.threads(of_row.saturating_mul(rows as u64));
        let bias = product.bias.map(|_| bias);
        let all = [0, shape.all_outputs()];
        let done = in_place(weight, |matrix| {
            matrix.with_rows(weight, all, |weights| match (ids, shape.experts) {
                (Some(ids), Some(experts)) => {
                    let matrices = ExpertsMatrices::Stack {
                        experts,
                        weights: *weights,
                    };
                    let choices = Choices {
                        of_token: 1,
                        ids,
                        weights: &[],
                    };
                    let float = product.float;
                    kernels.experts_linear_bytes(&matrices, &choices, float, x, bias, y, threads)
                }
                _ => kernels.linear_bytes(weights, product.float, rows, x, bias, y, threads),
            })
        });
        Ok(done.flatten().ok_or_else(not_there)??)
    }

    /// One row with a weight that takes its time, a piece of the weight after the other.
    fn large_row(
        &self,
        product: &Checked<'_>,
        ids: Option<&[i32]>,
        x: &[u8],
        bias: Option<&[u8]>,
        y: &mut [u8],
    ) -> Result<(), CallError> {
        let (weight, kernels) = (&*product.weight, self.context.kernels);
        let (shape, each) = (&weight.shape, product.float.bytes());
        let expert = match ids {
            Some(ids) => usize::try_from(ids[0]).unwrap_or(usize::MAX),
            None => 0,
        };
        if expert >= shape.experts.unwrap_or(1) {
            return Ok(());
        }
        let (begin, end) = (expert * shape.outputs, (expert + 1) * shape.outputs);
        let step = rows_of_segment(weight);
        let mut part = vec![];
        for first in (begin / step * step..end).step_by(step) {
            self.context.stop.check()?;
            let last = (first + step).min(shape.all_outputs());
            part.resize((last - first) * each, 0);
            let threads = self.threads(((last - first) * shape.inputs) as u64);
            let bias = bias.map(|bias| &bias[first * each..last * each]);
            let done = in_place(weight, |matrix| {
                matrix.with_rows(weight, [first, last], |weights| {
                    let (float, y) = (product.float, &mut part[..]);
                    kernels.linear_bytes(weights, float, 1, x, bias, y, threads)
                })
            });
            done.flatten().ok_or_else(not_there)??;
            let (from, to) = (first.max(begin), last.min(end));
            let given = &part[(from - first) * each..(to - first) * each];
            y[(from - begin) * each..(to - begin) * each].copy_from_slice(given);
        }
        Ok(())
    }
}
