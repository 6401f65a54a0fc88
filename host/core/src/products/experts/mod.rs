//! Layers of experts, and products where each row has an expert of its own.

mod find;
mod names;
#[allow(unsafe_code)] // Passes the promises of its caller on.
mod on_device;
#[cfg(test)]
mod tests;

use std::fmt;

use tightfit_kernels::{
    Activation, Choices, ExpertsGates, ExpertsLayer, ExpertsMatrices, Float, FloatType, GateLayout,
    LinearWeights,
};

pub use names::{ExpertsNames, ExpertsTensors, GateTensors};

use super::find::Place;
use super::{LinearError, LinearOptions};
use crate::device::{HostExpertsOperands, Multiplier};
use crate::model::{Model, Tensor};
use find::{Matrices, Stack};

/// A layer of experts of a model: of each token, the sum over the experts that its router has chosen of
/// `weight * (down * activation(gate, up) + down_bias)`, where gate and up are `gate_up * x + gate_up_bias`.
/// x and y are [tokens, hidden], row-major and of one type, as are the biases. The weights are used as they
/// lie.
///
/// Sums, activations and the sum over a token's experts are f32, in the order of the choices; what the
/// activation gives is rounded once, and so is the result. On every device the bits of a token's result do
/// not depend on other tokens, or on how many there are.
#[derive(Clone)]
pub struct Experts<'m> {
    /// As errors name it.
    name: String,
    gates: Gates<'m>,
    down: Stack<'m>,
    activation: Activation,
    /// Where all of it is in a GPU's memory.
    multiplier: Option<&'m dyn Multiplier>,
}

#[derive(Clone)]
enum Gates<'m> {
    Together(Stack<'m>, GateLayout),
    Apart { gate: Stack<'m>, up: Stack<'m> },
}

/// Products with a stack of a model where each row has one of its matrices, an expert:
/// `y[r] = x[r] * transpose(W[ids[r]]) + bias[ids[r]]`, where x is [rows, inputs], y [rows, outputs] and the
/// bias [experts, outputs], row-major and of one type. The stack is used as it lies.
///
/// Sums are f32, and the result is rounded once. On every device the bits of a row do not depend on other
/// rows. A row whose id is no number of an expert, such as -1, is skipped: its y stays as it is.
#[derive(Clone)]
pub struct ExpertsLinear<'m> {
    name: String,
    stack: Stack<'m>,
    multiplier: Option<&'m dyn Multiplier>,
}

impl fmt::Debug for Experts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Experts")
            .field("name", &self.name)
            .field("experts", &self.experts())
            .field("hidden", &self.hidden())
            .field("intermediate", &self.intermediate())
            .field("activation", &self.activation)
            .field("is_on_gpu", &self.is_on_gpu())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for ExpertsLinear<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExpertsLinear")
            .field("name", &self.name)
            .field("experts", &self.experts())
            .field("outputs", &self.outputs())
            .field("inputs", &self.inputs())
            .field("is_on_gpu", &self.is_on_gpu())
            .finish_non_exhaustive()
    }
}

impl Model {
    /// Lends a layer of experts in 4 bits by the name of its module, such as `model.layers.3.mlp.experts`.
    /// Under it are, with or without `.weight` at the end,
    /// - `gate_up_proj` [experts, 2 * intermediate, hidden] and `down_proj` [experts, hidden, intermediate],
    ///   as Qwen3.5-MoE and gpt-oss have them;
    /// - `0.gate_proj`, `0.up_proj`, `0.down_proj` and so on, as Qwen3-MoE and DeepSeek have them; or
    /// - `0.w1`, `0.w3` and `0.w2`, as Mixtral has them.
    ///
    /// Gates lie before the other rows, or with [`Activation::Clamped`], which is gpt-oss', each before its
    /// own. [`Model::experts_of`] is for other names and layouts.
    ///
    /// Where the weights are on a GPU, that is made ready as by [`Model::linear`]: the kernels for experts
    /// are loaded. It is to be called before a graph is captured.
    ///
    /// # Errors
    /// [`LinearError::NoExperts`]; [`LinearError::ExpertsShape`] where the lengths do not belong together;
    /// on a GPU [`LinearError::NotStacked`] for experts that do not lie as stacks, and
    /// [`LinearError::Elsewhere`] where they are on several; and those of [`Model::linear`].
    pub fn experts(
        &self,
        module: &str,
        activation: Activation,
    ) -> Result<Experts<'_>, LinearError> {
        let names = ExpertsNames::find(self, module, activation)?;
        Experts::find(self, module, &names, activation)?.prepared()
    }

    /// Lends a layer of experts in 4 bits by the names of its tensors.
    ///
    /// # Errors
    /// As [`Model::experts`].
    pub fn experts_of(
        &self,
        names: &ExpertsNames,
        activation: Activation,
    ) -> Result<Experts<'_>, LinearError> {
        Experts::find(self, names.first(), names, activation)?.prepared()
    }

    /// Lends the products with the matrices of a stack [experts, outputs, inputs] in 4 bits, or with experts
    /// that are apart, where each row has its own. As [`Model::experts`].
    ///
    /// # Errors
    /// As [`Model::experts`].
    pub fn experts_linear(
        &self,
        tensors: &ExpertsTensors,
    ) -> Result<ExpertsLinear<'_>, LinearError> {
        ExpertsLinear::find(self, tensors)?.prepared()
    }
}

fn length_error(
    name: &str,
    what: &'static str,
    unit: &'static str,
    need: Option<usize>,
    have: usize,
) -> Result<(), LinearError> {
    if need == Some(have) {
        return Ok(());
    }
    Err(LinearError::Length {
        tensor: name.to_owned(),
        what,
        unit,
        need: need.unwrap_or(usize::MAX),
        have,
    })
}

impl<'m> Experts<'m> {
    /// Has its kernels loaded.
    fn prepared(self) -> Result<Self, LinearError> {
        if let Some(multiplier) = self.multiplier {
            multiplier.prepare_experts()?;
        }
        Ok(self)
    }

    pub(in crate::products) fn find(
        model: &'m Model,
        name: &str,
        names: &ExpertsNames,
        activation: Activation,
    ) -> Result<Experts<'m>, LinearError> {
        let down = Stack::find(model, &names.down)?;
        let (experts, hidden, intermediate) = (down.experts, down.outputs, down.inputs);
        let (gates, multiplier) = match &names.gates {
            GateTensors::Together(tensors, layout) => {
                let both = Stack::find(model, tensors)?;
                both.has_shape([experts, intermediate.saturating_mul(2), hidden])?;
                let multiplier = find::multiplier(&[&both, &down])?;
                (Gates::Together(both, *layout), multiplier)
            }
            GateTensors::Apart { gate, up } => {
                let (gate, up) = (Stack::find(model, gate)?, Stack::find(model, up)?);
                for stack in [&gate, &up] {
                    stack.has_shape([experts, intermediate, hidden])?;
                }
                if let Some(both) = Stack::together(&gate, &up) {
                    let multiplier = find::multiplier(&[&both, &down])?;
                    (Gates::Together(both, GateLayout::Halves), multiplier)
                } else {
                    let multiplier = find::multiplier(&[&gate, &up, &down])?;
                    if multiplier.is_some() {
                        return Err(gate.not_stacked());
                    }
                    (Gates::Apart { gate, up }, multiplier)
                }
            }
        };
        Ok(Experts {
            name: name.to_owned(),
            gates,
            down,
            activation,
            multiplier,
        })
    }

    /// Returns how many experts there are.
    pub fn experts(&self) -> usize {
        self.down.experts
    }

    /// Returns the number of elements of a row of x and of y.
    pub fn hidden(&self) -> usize {
        self.down.outputs
    }

    /// Returns the number of results of an expert's gates: the inputs of its down projection.
    pub fn intermediate(&self) -> usize {
        self.down.inputs
    }

    /// Returns what is made of gates and up projections.
    pub fn activation(&self) -> Activation {
        self.activation
    }

    /// Returns how gates and the other projections lie in one tensor, and in the bias for both.
    pub fn layout(&self) -> GateLayout {
        match self.gates {
            Gates::Together(_, layout) => layout,
            Gates::Apart { .. } => GateLayout::Halves,
        }
    }

    /// Returns whether the weights are in a GPU's memory, which [`Experts::forward_on_device`] is for.
    pub fn is_on_gpu(&self) -> bool {
        self.multiplier.is_some()
    }

    /// Index in the plan of the device that the down projections are on.
    pub fn device(&self) -> usize {
        self.down.tensor().device()
    }

    /// Returns the tensors of the layer: gates, up projections where they are apart, down projections.
    pub fn tensors(&self) -> Vec<Tensor<'m>> {
        let stacks = match &self.gates {
            Gates::Together(both, _) => vec![both, &self.down],
            Gates::Apart { gate, up } => vec![gate, up, &self.down],
        };
        stacks.into_iter().flat_map(Stack::tensors).collect()
    }

    /// Computes the layer on operands in host memory, on all cores. [`Experts::forward_with`] has options.
    ///
    /// - `x` and `y` [tokens, hidden], `gate_up_bias` [experts, 2 * intermediate] in the layout of the gates,
    ///   `down_bias` [experts, hidden].
    /// - `choices`: numbers of experts and their weights, [tokens, choices]. What is no number of an expert,
    ///   such as -1, is skipped: it adds nothing.
    ///
    /// Weights on a GPU are multiplied there: operands are copied, through memory that is taken from the
    /// device for the call (and entered in its ledger), which is simple and slow.
    ///
    /// # Errors
    /// [`LinearError::Length`] where lengths do not belong together, with nothing written, and
    /// [`LinearError::Device`].
    pub fn forward<T: Float>(
        &self,
        x: &[T],
        choices: &Choices<'_>,
        gate_up_bias: Option<&[T]>,
        down_bias: Option<&[T]>,
        y: &mut [T],
    ) -> Result<(), LinearError> {
        let options = LinearOptions::default();
        self.forward_with(x, choices, gate_up_bias, down_bias, y, &options)
    }

    /// [`Experts::forward`] with options. By row it is in any case.
    ///
    /// # Errors
    /// As [`Experts::forward`].
    pub fn forward_with<T: Float>(
        &self,
        x: &[T],
        choices: &Choices<'_>,
        gate_up_bias: Option<&[T]>,
        down_bias: Option<&[T]>,
        y: &mut [T],
        options: &LinearOptions,
    ) -> Result<(), LinearError> {
        let len = |bias: Option<&[T]>| bias.map(<[T]>::len);
        let biases = [len(gate_up_bias), len(down_bias)];
        self.check((1, "elements"), choices, x.len(), biases, y.len())?;
        let operands = HostExpertsOperands {
            x: bytemuck::cast_slice(x),
            choices: *choices,
            bias: gate_up_bias.map(bytemuck::cast_slice),
            down_bias: down_bias.map(bytemuck::cast_slice),
            y: bytemuck::cast_slice_mut(y),
        };
        self.compute(T::TYPE, operands, options)
    }

    /// [`Experts::forward_with`] of elements of type `float` as little-endian bytes, at any alignment.
    ///
    /// # Errors
    /// As [`Experts::forward`], with lengths in bytes.
    pub fn forward_bytes(
        &self,
        float: FloatType,
        operands: HostExpertsOperands<'_>,
        options: &LinearOptions,
    ) -> Result<(), LinearError> {
        let HostExpertsOperands {
            x,
            choices,
            bias,
            down_bias,
            y,
        } = &operands;
        let biases = [bias.map(<[u8]>::len), down_bias.map(<[u8]>::len)];
        self.check_lengths(float, choices, x.len(), biases, y.len())?;
        self.compute(float, operands, options)
    }

    /// Whether operands of these lengths in bytes belong together, as [`Experts::forward_bytes`] needs them;
    /// `biases` are that of gates and up projections, and that of down projections.
    ///
    /// # Errors
    /// [`LinearError::Length`].
    pub fn check_lengths(
        &self,
        float: FloatType,
        choices: &Choices<'_>,
        x: usize,
        biases: [Option<usize>; 2],
        y: usize,
    ) -> Result<(), LinearError> {
        self.check((float.bytes(), "bytes"), choices, x, biases, y)
    }

    fn check(
        &self,
        (element, unit): (usize, &'static str),
        choices: &Choices<'_>,
        x: usize,
        [gate_up_bias, down_bias]: [Option<usize>; 2],
        y: usize,
    ) -> Result<(), LinearError> {
        let (experts, hidden) = (self.experts(), self.hidden());
        let check = |what, need: Option<usize>, have| {
            let need = need.and_then(|need| need.checked_mul(element));
            length_error(&self.name, what, unit, need, have)
        };
        let tokens = x / (hidden * element).max(1);
        check("x", tokens.checked_mul(hidden), x)?;
        check("y", tokens.checked_mul(hidden), y)?;
        self.check_choices(tokens, choices)?;
        for (what, outputs, bias) in [
            (
                "the bias of gate and up",
                self.intermediate().saturating_mul(2),
                gate_up_bias,
            ),
            ("the bias of down", hidden, down_bias),
        ] {
            if let Some(bias) = bias {
                check(what, experts.checked_mul(outputs), bias)?;
            }
        }
        Ok(())
    }

    fn check_choices(&self, tokens: usize, choices: &Choices<'_>) -> Result<(), LinearError> {
        let need = tokens.checked_mul(choices.of_token);
        length_error(&self.name, "the ids", "elements", need, choices.ids.len())?;
        let weights = choices.weights.len();
        length_error(
            &self.name,
            "the weights of the ids",
            "elements",
            need,
            weights,
        )
    }

    fn compute(
        &self,
        float: FloatType,
        operands: HostExpertsOperands<'_>,
        options: &LinearOptions,
    ) -> Result<(), LinearError> {
        if self.multiplier.is_some() {
            return self.compute_by_copying(float, operands);
        }
        let HostExpertsOperands {
            x,
            choices,
            bias,
            down_bias,
            y,
        } = operands;
        let (hidden, intermediate) = (self.hidden(), self.intermediate());
        let threads =
            options.threads_for(hidden, intermediate.saturating_mul(3), choices.ids.len());
        let (gates, up, down) = match &self.gates {
            Gates::Together(both, _) => (both.views(), vec![], self.down.views()),
            Gates::Apart { gate, up } => (gate.views(), up.views(), self.down.views()),
        };
        let gates = match &self.gates {
            Gates::Together(both, layout) => ExpertsGates::Together(both.matrices(&gates), *layout),
            Gates::Apart { gate, up: stack } => ExpertsGates::Apart {
                gate: gate.matrices(&gates),
                up: stack.matrices(&up),
            },
        };
        let layer = ExpertsLayer {
            gates,
            down: self.down.matrices(&down),
            activation: self.activation,
        };
        let kernels = options.kernels;
        kernels
            .experts_layer_bytes(&layer, &choices, float, x, bias, down_bias, y, threads)
            .map_err(LinearError::from)
    }
}

impl<'m> ExpertsLinear<'m> {
    /// Has its kernels loaded.
    fn prepared(self) -> Result<Self, LinearError> {
        if let Some(multiplier) = self.multiplier {
            multiplier.prepare_experts()?;
        }
        Ok(self)
    }

    pub(in crate::products) fn find(
        model: &'m Model,
        tensors: &ExpertsTensors,
    ) -> Result<ExpertsLinear<'m>, LinearError> {
        let stack = Stack::find(model, tensors)?;
        Ok(ExpertsLinear {
            name: tensors.first().to_owned(),
            multiplier: find::multiplier(&[&stack])?,
            stack,
        })
    }

    /// Returns how many experts there are.
    pub fn experts(&self) -> usize {
        self.stack.experts
    }

    /// Returns the number of elements of a row of y.
    pub fn outputs(&self) -> usize {
        self.stack.outputs
    }

    /// Returns the number of elements of a row of x.
    pub fn inputs(&self) -> usize {
        self.stack.inputs
    }

    /// Returns whether the weights are in a GPU's memory, which [`ExpertsLinear::forward_on_device`] is for.
    pub fn is_on_gpu(&self) -> bool {
        self.multiplier.is_some()
    }

    /// Index in the plan of the device that the first of them is on.
    pub fn device(&self) -> usize {
        self.stack.tensor().device()
    }

    /// Returns the stack, or the matrices of the experts.
    pub fn tensors(&self) -> Vec<Tensor<'m>> {
        self.stack.tensors()
    }

    /// Computes the products of operands in host memory, on all cores: of x [rows, inputs], the number of an
    /// expert for each row, and the bias [experts, outputs]. [`ExpertsLinear::forward_with`] has options.
    ///
    /// Weights on a GPU are multiplied there, as by [`Experts::forward`].
    ///
    /// # Errors
    /// As [`Experts::forward`].
    pub fn forward<T: Float>(
        &self,
        x: &[T],
        ids: &[i32],
        bias: Option<&[T]>,
        y: &mut [T],
    ) -> Result<(), LinearError> {
        self.forward_with(x, ids, bias, y, &LinearOptions::default())
    }

    /// [`ExpertsLinear::forward`] with options. By row it is in any case.
    ///
    /// # Errors
    /// As [`Experts::forward`].
    pub fn forward_with<T: Float>(
        &self,
        x: &[T],
        ids: &[i32],
        bias: Option<&[T]>,
        y: &mut [T],
        options: &LinearOptions,
    ) -> Result<(), LinearError> {
        let bias_len = bias.map(<[T]>::len);
        self.check((1, "elements"), ids.len(), x.len(), bias_len, y.len())?;
        let (x, y) = (bytemuck::cast_slice(x), bytemuck::cast_slice_mut(y));
        self.compute(T::TYPE, x, ids, bias.map(bytemuck::cast_slice), y, options)
    }

    /// [`ExpertsLinear::forward_with`] of elements of type `float` as little-endian bytes, at any alignment.
    ///
    /// # Errors
    /// As [`Experts::forward`], with lengths in bytes.
    pub fn forward_bytes(
        &self,
        float: FloatType,
        x: &[u8],
        ids: &[i32],
        bias: Option<&[u8]>,
        y: &mut [u8],
        options: &LinearOptions,
    ) -> Result<(), LinearError> {
        self.check_lengths(float, ids.len(), x.len(), bias.map(<[u8]>::len), y.len())?;
        self.compute(float, x, ids, bias, y, options)
    }

    /// Whether operands of these lengths in bytes belong together, with ids for `rows` rows, as
    /// [`ExpertsLinear::forward_bytes`] needs them.
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
        self.check((float.bytes(), "bytes"), rows, x, bias, y)
    }

    fn check(
        &self,
        (element, unit): (usize, &'static str),
        rows: usize,
        x: usize,
        bias: Option<usize>,
        y: usize,
    ) -> Result<(), LinearError> {
        let check = |what, need: Option<usize>, have| {
            let need = need.and_then(|need| need.checked_mul(element));
            length_error(&self.name, what, unit, need, have)
        };
        check("x", rows.checked_mul(self.inputs()), x)?;
        check("y", rows.checked_mul(self.outputs()), y)?;
        match bias {
            None => Ok(()),
            Some(bias) => check("the bias", self.experts().checked_mul(self.outputs()), bias),
        }
    }

    fn compute(
        &self,
        float: FloatType,
        x: &[u8],
        ids: &[i32],
        bias: Option<&[u8]>,
        y: &mut [u8],
        options: &LinearOptions,
    ) -> Result<(), LinearError> {
        let choices = Choices {
            of_token: 1,
            ids,
            weights: &[],
        };
        if self.multiplier.is_some() {
            let operands = HostExpertsOperands {
                x,
                choices,
                bias,
                down_bias: None,
                y,
            };
            return self.compute_by_copying(float, operands);
        }
        let threads = options.threads_for(self.outputs(), self.inputs(), ids.len());
        let views = self.stack.views();
        let matrices = self.stack.matrices(&views);
        let kernels = options.kernels;
        kernels
            .experts_linear_bytes(&matrices, &choices, float, x, bias, y, threads)
            .map_err(LinearError::from)
    }
}

impl<'m> Stack<'m> {
    /// What the processor's kernels take; nothing of what is in a GPU's memory.
    fn views(&self) -> Vec<LinearWeights<'_>> {
        match &self.matrices {
            Matrices::Each(linears) => linears
                .iter()
                .filter_map(|linear| match &linear.place {
                    Place::Host(weights) => {
                        Some(weights.view(&linear.quantization, linear.outputs, linear.inputs))
                    }
                    Place::Device(_) => None,
                })
                .collect(),
            Matrices::Stack(linear) => match &linear.place {
                Place::Host(weights) => {
                    vec![weights.view(&linear.quantization, linear.outputs, linear.inputs)]
                }
                Place::Device(_) => vec![],
            },
        }
    }

    fn matrices<'a>(&self, views: &'a [LinearWeights<'a>]) -> ExpertsMatrices<'a> {
        match (&self.matrices, views) {
            (Matrices::Stack(_), [weights]) => ExpertsMatrices::Stack {
                experts: self.experts,
                weights: *weights,
            },
            _ => ExpertsMatrices::Each(views),
        }
    }
}
