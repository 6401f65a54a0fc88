//! Products by a device's own kernels, in its order of work.

use super::super::ProgramCtxView;
use super::super::error::CallError;
use super::super::view::not_there;
use super::Checked;
use tightfit::device::{MOST_WORK, Operation, Product, Queue, QueuedProduct};

/// Rows that are multiplied in one go: as much as a device is given at once, and as kernels can count.
fn rows_at_once(product: &Checked<'_>) -> u64 {
    let shape = &product.weight.shape;
    let [input, output] = product.row_bytes();
    let arithmetic = (shape.outputs as u64).saturating_mul(shape.inputs as u64) / 16;
    let of_row = input + output + arithmetic;
    let left = MOST_WORK.saturating_sub(product.weight.bytes());
    (left / of_row.max(1)).clamp(1, MOST_ROWS)
}

/// Far less than kernels can count.
const MOST_ROWS: u64 = 1 << 20;

impl ProgramCtxView<'_> {
    pub(super) fn multiply_on_device(
        &mut self,
        queue: &dyn Queue,
        product: &Checked<'_>,
    ) -> Result<(), CallError> {
        let weights = product.weight.queued().ok_or_else(not_there)?;
        let bias = match product.bias {
            Some(bias) => Some(self.source(bias, 0, product.bias_bytes())?),
            None => None,
        };
        let [of_input, of_output] = product.row_bytes();
        self.in_pieces(product.rows, rows_at_once(product), |view, first, rows| {
            let how = Product {
                float: product.float,
                rows,
                by_row: product.by_row,
                transposed: false,
            };
            let need = queue.workspace_bytes(&how, &product.weight.shape);
            let workspace = match need {
                0 => None,
                _ => Some(view.context.scratch(queue, product.weight.device, need)?),
            };
            let rows = rows as u64;
            let (start, bytes) = (first * of_output, rows * of_output);
            let experts = match product.experts {
                Some(experts) => Some(view.source(experts, 4 * first, 4 * rows)?),
                None => None,
            };
            let y = match experts {
                // Not all rows need be written.
                Some(_) => view.source(product.output, start, bytes)?,
                None => view.target(product.output, start, bytes)?,
            };
            queue.give(&Operation::Multiply(QueuedProduct {
                weights: weights.clone(),
                product: how,
                x: view.source(product.input, first * of_input, rows * of_input)?,
                experts,
                bias: bias.clone(),
                y,
                workspace,
            }))?;
            view.wrote(product.output, start + bytes)
        })
    }
}
