//! The launches of a whole layer.

use super::{ExpertsLaunch, ExpertsProduct, Form, Quantized, Routing, RowsOfX, combine};
use crate::{Activation, BlockSize, FloatType, GateLayout, KernelError, cuda::linear::Gpu};

/// A whole layer: y = the sum over a token's choices of weight * (down * activation(gate, up) + bias).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpertsLayer {
    /// What is chosen from.
    pub routing: Routing,
    /// The type of x [tokens, hidden], the biases and y [tokens, hidden].
    pub float: FloatType,
    /// Inputs of gates and up projections, and outputs of down projections.
    pub hidden: usize,
    /// Results of an expert's gates: inputs of its down projection.
    pub intermediate: usize,
    /// Elements of both stacks that share one absmax.
    pub block_size: BlockSize,
    /// How gates and up projections [experts, 2 * intermediate, hidden] lie.
    pub layout: GateLayout,
    /// What is made of them.
    pub activation: Activation,
    /// Whether gates, up and down projections of each expert have been quantized by themselves: [`Quantized`].
    pub apart: bool,
    /// Whether all pointers are multiples of 16.
    pub aligned: bool,
}

/// The launches of a layer, in their order. The workspace is the same for both products.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpertsLayerLaunches {
    /// Nothing for one token.
    pub route: Option<ExpertsLaunch>,
    /// From x to what the activation gives, [tokens, choices, intermediate] of the layer's type.
    pub gate_up: ExpertsLaunch,
    /// From there to parts [tokens, choices, hidden], f32.
    pub down: ExpertsLaunch,
    /// From parts to y.
    pub combine: ExpertsLaunch,
    /// [`Routing::bytes`].
    pub routing_bytes: usize,
    /// Of what both products need.
    pub workspace_bytes: usize,
}

impl ExpertsLayer {
    /// Returns how to compute it.
    ///
    /// # Errors
    /// As in [`ExpertsProduct::launch`].
    pub fn launches(&self, gpu: Gpu) -> Result<ExpertsLayerLaunches, KernelError> {
        let (gate_up, down) = self.products();
        let (gate_up, down) = (gate_up.launch(gpu)?, down.launch(gpu)?);
        Ok(ExpertsLayerLaunches {
            route: self.routing.launch()?,
            gate_up,
            down,
            combine: combine(self.routing, self.float, self.hidden)?,
            routing_bytes: self.routing.bytes(),
            workspace_bytes: gate_up.workspace_bytes.max(down.workspace_bytes),
        })
    }

    /// The products with both stacks.
    pub(super) fn products(&self) -> (ExpertsProduct, ExpertsProduct) {
        let of = |quantized| match self.apart {
            true => quantized,
            false => Quantized::Whole,
        };
        let gate_up = ExpertsProduct {
            routing: self.routing,
            float: self.float,
            x: RowsOfX::Tokens,
            results: self.intermediate,
            inputs: self.hidden,
            block_size: self.block_size,
            form: Form::Gated {
                layout: self.layout,
                activation: self.activation,
            },
            quantized: of(Quantized::Halves),
            aligned: self.aligned,
            follows: false,
        };
        let down = ExpertsProduct {
            x: RowsOfX::Pairs,
            results: self.hidden,
            inputs: self.intermediate,
            form: Form::Parts,
            quantized: of(Quantized::Experts),
            follows: true,
            ..gate_up
        };
        (gate_up, down)
    }
}
