//! How a workspace for experts is laid out: for the driver that uses it, and for plans, which reserve it.

use tightfit_kernels::cuda::experts::{
    ExpertsProduct as StackProduct, Form, Quantized, Routing, RowsOfX,
};
use tightfit_kernels::cuda::linear::Gpu;

use super::{ExpertsProduct, ExpertsWeights, MatrixOfStack, Product, ProductWeights};

/// What pieces of a workspace are rounded up to.
const ALIGNMENT: u64 = 256;
/// Bytes between the launches of a layer; tokens that would take more are computed part after part.
const MOST_BETWEEN: u64 = 64 << 20;

/// Where in a workspace is what: what kernels work in, at its beginning; the routing; what the activation
/// gives, or the ids of a single matrix; the parts of sums, or the biases of all matrices; and the end.
pub(crate) type Layout = [u64; 5];

/// Where pieces of these lengths are put one behind the other, and the end.
pub(crate) fn places<const N: usize, const ENDS: usize>(lengths: [u64; N]) -> [u64; ENDS] {
    let mut places = [0; ENDS];
    for (index, length) in lengths.into_iter().enumerate() {
        let rounded = length.checked_next_multiple_of(ALIGNMENT);
        places[index + 1] = rounded.map_or(u64::MAX, |rounded| {
            u64::saturating_add(places[index], rounded)
        });
    }
    places
}

pub(crate) fn bytes(elements: usize, width: usize) -> u64 {
    (elements as u64).saturating_mul(width as u64)
}

fn routing_of(product: &ExpertsProduct, tokens: usize) -> Routing {
    Routing {
        tokens,
        choices: product.choices,
        experts: product.experts,
    }
}

/// What of a stack of so many experts has been quantized by itself.
fn quantized(weights: &ProductWeights, experts: usize) -> Quantized {
    match weights.nested {
        Some(nested) if nested.tensors > 1 && nested.tensors > experts => Quantized::Halves,
        Some(nested) if nested.tensors > 1 => Quantized::Experts,
        _ => Quantized::Whole,
    }
}

/// The product with the first stack of a layer or the only one, and that with the second.
pub(crate) fn products(
    weights: &ExpertsWeights,
    product: &ExpertsProduct,
    tokens: usize,
) -> (StackProduct, Option<StackProduct>) {
    let of = |weights: &ProductWeights, results, form| StackProduct {
        routing: routing_of(product, tokens),
        float: product.float,
        x: RowsOfX::Tokens,
        results,
        inputs: weights.inputs,
        block_size: weights.block_size,
        form,
        quantized: quantized(weights, product.experts),
        aligned: true,
        follows: false,
    };
    match *weights {
        ExpertsWeights::Linear(stack) => {
            let outputs = stack.outputs / product.experts.max(1);
            (of(&stack, outputs, Form::Plain), None)
        }
        ExpertsWeights::Layer {
            gate_up,
            down,
            layout,
            activation,
        } => {
            let form = Form::Gated { layout, activation };
            let second = StackProduct {
                x: RowsOfX::Pairs,
                follows: true,
                ..of(&down, gate_up.inputs, Form::Parts)
            };
            (of(&gate_up, down.inputs, form), Some(second))
        }
    }
}

/// Tokens that are computed together: as many as may be between the launches of a layer.
pub(crate) fn tokens_at_once(weights: &ExpertsWeights, product: &ExpertsProduct) -> usize {
    let ExpertsWeights::Layer { gate_up, down, .. } = weights else {
        return product.tokens;
    };
    let of_pair =
        bytes(down.inputs, product.float.bytes()).saturating_add(bytes(gate_up.inputs, 4));
    let of_token = of_pair.saturating_mul(product.choices as u64).max(1);
    let most = usize::try_from(MOST_BETWEEN / of_token).unwrap_or(usize::MAX);
    product.tokens.min(most.max(1))
}

/// The workspace of experts; on `gpu`, or on every GPU.
pub(crate) fn layout(
    weights: &ExpertsWeights,
    product: &ExpertsProduct,
    gpu: Option<Gpu>,
) -> Layout {
    let tokens = tokens_at_once(weights, product);
    let pairs = tokens.saturating_mul(product.choices);
    let (first, second) = products(weights, product, tokens);
    let kernels = |product: &StackProduct| product.most_workspace_bytes(gpu);
    let work = kernels(&first).max(second.as_ref().map_or(0, kernels));
    let [between, parts] = match &second {
        None => [0, 0],
        Some(second) => [
            bytes(pairs.saturating_mul(second.inputs), product.float.bytes()),
            bytes(pairs.saturating_mul(second.results), 4),
        ],
    };
    let routing = first.routing.most_bytes() as u64;
    places([work as u64, routing, between, parts])
}

/// The workspace of a product with a matrix that begins between nested scales: the kernels for experts
/// compute it, with the same number of an expert for every row.
pub(crate) fn layout_of_matrix(product: &StackProduct, gpu: Option<Gpu>) -> Layout {
    let work = product.most_workspace_bytes(gpu);
    let routing = product.routing.most_bytes() as u64;
    let ids = bytes(product.routing.tokens, 4);
    let of_all = product.results.saturating_mul(product.routing.experts);
    let biases = bytes(of_all, product.float.bytes());
    places([work as u64, routing, ids, biases])
}

/// The product with a matrix as one with the stack that it is of.
pub(crate) fn matrix(
    weights: &ProductWeights,
    stack: MatrixOfStack,
    product: &Product,
) -> StackProduct {
    StackProduct {
        routing: Routing {
            tokens: product.rows,
            choices: 1,
            experts: stack.matrices,
        },
        float: product.float,
        x: RowsOfX::Tokens,
        results: weights.outputs,
        inputs: weights.inputs,
        block_size: weights.block_size,
        form: Form::Plain,
        quantized: Quantized::Whole,
        aligned: true,
        follows: false,
    }
}
