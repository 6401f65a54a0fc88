//! What products with 4-bit weights need beside them on an accelerator: a workspace, and constants.

use tightfit_kernels::cuda::linear::Linear;
use tightfit_kernels::{Activation, FloatType, GateLayout, NESTED_BLOCK_SIZE, QuantType};

use super::stacks::{self, Stack};
use super::{PART_ALIGNMENT, round_up};
use crate::cancel::{Cancelled, Watch};
use crate::checkpoint::TensorInfo;
use crate::device::experts::{layout, layout_of_matrix, matrix};
use crate::device::{
    DeviceInfo, ExpertsProduct, ExpertsWeights, MatrixOfStack, Product, ProductWeights,
};
use crate::types::{BlockSize, Format};

/// Bytes of the values of double quantization's codes, and of one weight's mean with what aligns it.
const MAP_BYTES: u64 = 256 * 4;
/// Kernels want every pointer at a multiple of this many bytes.
pub(crate) const MEAN_BYTES: u64 = 16;

/// Bytes of what a device has to have beside this many double-quantized weights.
pub(crate) const fn constants_bytes(double_quantized: u64) -> u64 {
    match double_quantized {
        0 => 0,
        weights => MAP_BYTES + MEAN_BYTES * weights,
    }
}

/// Whether products are of weights with such a shape: matrices, and stacks of matrices.
pub(crate) fn is_multiplied(shape: &[u64]) -> bool {
    matches!(shape.len(), 2 | 3)
}

/// What there shall be room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Rows of products, and tokens of layers of experts.
    pub(crate) rows: usize,
    /// Experts of each token.
    pub(crate) experts_per_token: usize,
    /// Whether gradients of inputs shall have room, too.
    pub(crate) gradients: bool,
}

/// Whether a stack with this name has the gates and up projections of a layer of experts, beside its
/// down projections: what [`ExpertsNames::find`](crate::products::ExpertsNames::find) looks for.
pub(crate) fn is_of_gates(name: &str) -> bool {
    let name = name.strip_suffix(".weight").unwrap_or(name);
    name.ends_with(".gate_up_proj") || name == "gate_up_proj"
}

/// What a weight needs at most as the workspace of its products, on every GPU.
fn workspace_bytes(
    is_of_gates: bool,
    shape: &[u64],
    block_size: BlockSize,
    double: bool,
    wanted: &Wanted,
) -> u64 {
    let length = |length: u64| usize::try_from(length).unwrap_or(usize::MAX);
    let [.., outputs, inputs] = *shape else {
        return 0;
    };
    let (outputs, inputs) = (length(outputs), length(inputs));
    let weights = |outputs, inputs| ProductWeights {
        quant_type: QuantType::Nf4,
        block_size,
        outputs,
        inputs,
        codes: 0,
        absmax: 0,
        nested: None,
        of_stack: None,
    };
    let mut most = 0;
    for by_row in [false, true] {
        let linear = Linear {
            float: FloatType::Bf16,
            rows: wanted.rows,
            outputs,
            inputs,
            block_size,
            aligned: true,
            by_row,
        };
        most = most.max(linear.most_workspace_bytes(None) as u64);
        if wanted.gradients {
            most = most.max(linear.most_transposed_workspace_bytes(None) as u64);
        }
    }
    let [matrices, _, _] = *shape else {
        return most;
    };
    let experts = length(matrices);
    // f32 has no fast kernels, which would need most, but everything between launches is wider.
    for float in [FloatType::Bf16, FloatType::F32] {
        let product = ExpertsProduct {
            float,
            experts,
            tokens: wanted.rows,
            choices: 1,
        };
        let stack = weights(experts.saturating_mul(outputs), inputs);
        let plain = layout(&ExpertsWeights::Linear(stack), &product, None);
        most = most.max(plain[4]);
        let of_nested = u64::from(block_size) * NESTED_BLOCK_SIZE as u64;
        let of_matrix = (outputs as u64).saturating_mul(inputs as u64);
        if double && experts > 1 && !of_matrix.is_multiple_of(of_nested) {
            let of_stack = MatrixOfStack {
                matrices: experts,
                index: 0,
            };
            let product = Product {
                float,
                rows: wanted.rows,
                by_row: false,
                transposed: false,
            };
            let matrix = matrix(&weights(outputs, inputs), of_stack, &product);
            most = most.max(layout_of_matrix(&matrix, None)[4]);
        }
        if is_of_gates {
            let layer = ExpertsWeights::Layer {
                gate_up: stack,
                down: weights(experts.saturating_mul(inputs), outputs / 2),
                layout: GateLayout::Halves,
                activation: Activation::Silu,
            };
            let product = ExpertsProduct {
                choices: wanted.experts_per_token,
                ..product
            };
            most = most.max(layout(&layer, &product, None)[4]);
        }
    }
    most
}

/// Block size and double quantization of a weight in a format, if that has 4 bits.
fn in_4_bits(tensor: &TensorInfo, format: Format) -> Option<(BlockSize, bool)> {
    match (format, &tensor.quantized) {
        (
            Format::Nf4 {
                block_size,
                double_quantized,
            },
            _,
        ) => Some((block_size, double_quantized)),
        (Format::Stored, Some(quantized)) => {
            Some((quantized.block_size, quantized.nested.is_some()))
        }
        _ => None,
    }
}

/// What products of up to some number of rows need on one device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct ProductBytes {
    /// Of the weight that needs most of it: all share one.
    workspace: u64,
    double_quantized: u64,
}

impl ProductBytes {
    /// Adds a weight in a format, if that has 4 bits.
    pub(super) fn add(&mut self, tensor: &TensorInfo, format: Format, wanted: &Wanted) {
        if let Some((block_size, double_quantized)) = in_4_bits(tensor, format) {
            self.add_weight(tensor, block_size, double_quantized, wanted);
        }
    }

    /// Adds what tensors need as a stack beyond what each of them does, the first of which is this one.
    pub(super) fn add_stack(
        &mut self,
        stack: &Stack,
        first: &TensorInfo,
        format: Format,
        wanted: &Wanted,
    ) {
        if let Some((block_size, double)) = in_4_bits(first, format) {
            let bytes =
                workspace_bytes(stack.is_of_gates, &stack.shape, block_size, double, wanted);
            self.workspace = self.workspace.max(bytes);
        }
    }

    /// Adds a weight that may be placed in 4 bits.
    pub(super) fn add_possible(&mut self, tensor: &TensorInfo, wanted: &Wanted) {
        if tensor.quantized.is_some() || tensor.dtype.is_quantizable() {
            self.add_weight(tensor, BlockSize::DEFAULT, true, wanted);
        }
    }

    fn add_weight(
        &mut self,
        tensor: &TensorInfo,
        block_size: BlockSize,
        double: bool,
        wanted: &Wanted,
    ) {
        if !is_multiplied(&tensor.shape) {
            return;
        }
        self.double_quantized += u64::from(double);
        let is_of_gates = is_of_gates(&tensor.name);
        let bytes = workspace_bytes(is_of_gates, &tensor.shape, block_size, double, wanted);
        self.workspace = self.workspace.max(bytes);
    }

    /// All bytes, of which every allocation begins at a multiple of the alignment.
    pub(super) fn bytes(self) -> u64 {
        let constants = constants_bytes(self.double_quantized);
        round_up(self.workspace, PART_ALIGNMENT) + round_up(constants, PART_ALIGNMENT)
    }
}

/// What a policy is not offered of each device, because products will need it there.
///
/// # Errors
/// [`Cancelled`].
pub(super) fn most_bytes(
    tensors: &[TensorInfo],
    wanted: &Wanted,
    watch: &mut Watch<'_>,
) -> Result<u64, Cancelled> {
    let mut most = ProductBytes::default();
    for tensor in tensors {
        watch.item(0)?;
        most.add_possible(tensor, wanted);
    }
    for stack in stacks::possible(tensors, watch)? {
        watch.item(0)?;
        let first = &tensors[stack.members[0]];
        let format = match first.quantized {
            Some(_) => Format::Stored,
            None => Format::NF4,
        };
        if first.quantized.is_some() || first.dtype.is_quantizable() {
            most.add_stack(&stack, first, format, wanted);
        }
    }
    Ok(most.bytes())
}

/// Whether products on a device need something beside the weights. A simulated one stands for one that
/// does.
pub(super) fn are_computed_on(device: &DeviceInfo) -> bool {
    device.kind.is_accelerator()
}
