//! Layers of experts on the processor.
//!
//! Pairs of a token and one of its choices are grouped by expert, and each group is a product of its rows
//! with a slice of the stack, [`crate::linear`]. Groups and ranges of their results are dealt out to
//! threads one by one. A result depends on its own row only, as there.

use std::{num::NonZeroUsize, ops::Range};

use crate::{
    Float, FloatType, KernelError, Kernels, LinearWeights, error::check_length, float,
    linear::Product, threads::each,
};

mod activation;

pub use activation::{Activation, GateLayout};

/// Tokens whose parts are in memory at a time.
const MOST_TOKENS: usize = 1024;

/// The stacks of a layer of experts, each quantized as a whole.
#[derive(Debug, Clone, Copy)]
pub struct ExpertsWeights<'a> {
    /// How many there are.
    pub experts: usize,
    /// Gates and up projections [experts, 2 * intermediate, hidden], as one matrix whose outputs are
    /// those of all experts.
    pub gate_up: LinearWeights<'a>,
    /// Down projections [experts, hidden, intermediate], likewise.
    pub down: LinearWeights<'a>,
    /// How gates and up projections lie.
    pub layout: GateLayout,
    /// What is made of them.
    pub activation: Activation,
}

/// The matrices of experts, of one shape.
#[derive(Debug, Clone, Copy)]
pub enum ExpertsMatrices<'a> {
    /// One for each expert, of which each has been quantized by itself.
    Each(&'a [LinearWeights<'a>]),
    /// A stack [experts, outputs, inputs] that has been quantized as a whole, as one matrix whose outputs
    /// are those of all experts.
    Stack {
        /// How many experts there are.
        experts: usize,
        /// Their weights.
        weights: LinearWeights<'a>,
    },
}

/// Gates and up projections of experts.
#[derive(Debug, Clone, Copy)]
pub enum ExpertsGates<'a> {
    /// In one matrix of each expert, [2 * intermediate, hidden].
    Together(ExpertsMatrices<'a>, GateLayout),
    /// In two, each [intermediate, hidden].
    Apart {
        /// The gates.
        gate: ExpertsMatrices<'a>,
        /// The other projection.
        up: ExpertsMatrices<'a>,
    },
}

/// A layer of experts, stacked or not.
#[derive(Debug, Clone, Copy)]
pub struct ExpertsLayer<'a> {
    /// Gates and up projections.
    pub gates: ExpertsGates<'a>,
    /// Down projections, each [hidden, intermediate].
    pub down: ExpertsMatrices<'a>,
    /// What is made of gates and up projections.
    pub activation: Activation,
}

impl<'a> From<&ExpertsWeights<'a>> for ExpertsLayer<'a> {
    fn from(layer: &ExpertsWeights<'a>) -> ExpertsLayer<'a> {
        let stack = |weights| ExpertsMatrices::Stack {
            experts: layer.experts,
            weights,
        };
        ExpertsLayer {
            gates: ExpertsGates::Together(stack(layer.gate_up), layer.layout),
            down: stack(layer.down),
            activation: layer.activation,
        }
    }
}

impl<'a> ExpertsMatrices<'a> {
    /// Returns how many experts there are.
    pub fn experts(&self) -> usize {
        match self {
            ExpertsMatrices::Each(matrices) => matrices.len(),
            ExpertsMatrices::Stack { experts, .. } => *experts,
        }
    }

    /// Outputs of an expert.
    fn outputs(&self) -> usize {
        match self {
            ExpertsMatrices::Each(matrices) => matrices.first().map_or(0, |first| first.outputs),
            ExpertsMatrices::Stack { experts, weights } => weights.outputs / (*experts).max(1),
        }
    }

    fn inputs(&self) -> usize {
        match self {
            ExpertsMatrices::Each(matrices) => matrices.first().map_or(0, |first| first.inputs),
            ExpertsMatrices::Stack { weights, .. } => weights.inputs,
        }
    }

    /// The matrix that an expert's outputs are in, and which of its outputs is the first.
    fn of(&self, expert: usize) -> (&LinearWeights<'a>, usize) {
        match self {
            ExpertsMatrices::Each(matrices) => (&matrices[expert], 0),
            ExpertsMatrices::Stack { weights, .. } => (weights, expert * self.outputs()),
        }
    }

    /// Whether all of it is there, and has these lengths.
    fn check(
        &self,
        what: &'static str,
        experts: usize,
        [outputs, inputs]: [usize; 2],
    ) -> Result<(), KernelError> {
        check_length(what, experts, self.experts())?;
        match self {
            ExpertsMatrices::Each(matrices) => matrices.iter().try_for_each(|matrix| {
                matrix.check()?;
                check_length(what, outputs, matrix.outputs)?;
                check_length(what, inputs, matrix.inputs)
            }),
            ExpertsMatrices::Stack { weights, .. } => {
                weights.check()?;
                check_length(what, outputs.saturating_mul(experts), weights.outputs)?;
                check_length(what, inputs, weights.inputs)
            }
        }
    }
}

/// What a router has chosen.
#[derive(Debug, Clone, Copy)]
pub struct Choices<'a> {
    /// How many there are for each token.
    pub of_token: usize,
    /// Numbers of experts [tokens, of_token]. What is no number of an expert, such as -1, is skipped: it
    /// adds nothing.
    pub ids: &'a [i32],
    /// What the results of the experts are multiplied with [tokens, of_token].
    pub weights: &'a [f32],
}

impl Kernels {
    /// Computes a layer of experts: `y` = the sum over a token's choices of
    /// `weight * (down * activation(gate, up) + down_bias)`, where gate and up are `gate_up * x + gate_up_bias`
    /// of the choice's expert.
    ///
    /// - `x` and `y` [tokens, hidden], `gate_up_bias` [experts, 2 * intermediate], in the layout of the
    ///   gates, and `down_bias` [experts, hidden].
    /// - `threads`: how many to use. Beside the caller's, they are kept for the next call.
    ///
    /// Products are those of [`Kernels::linear`]; what the activation gives is rounded to `T` once, and so
    /// is the result. Sums over choices are f32, in the order of the choices. The bits of a token's result
    /// depend on the instruction set, but not on other tokens or `threads`.
    ///
    /// ```
    /// use std::num::NonZeroUsize;
    ///
    /// use tightfit_kernels::{
    ///     Activation, BlockSize, Choices, ExpertsWeights, GateLayout, Kernels, LinearWeights, QuantType,
    ///     Scales,
    /// };
    ///
    /// // Two experts of 64 inputs and one result; all weights are 1, those of expert 1 times 0.5.
    /// let stack = LinearWeights {
    ///     quant_type: QuantType::Nf4,
    ///     outputs: 4,
    ///     inputs: 64,
    ///     block_size: BlockSize::DEFAULT,
    ///     codes: &[0xff; 128],
    ///     scales: Scales::Absmax(&[1.0, 1.0, 0.5, 0.5]),
    /// };
    /// let layer = ExpertsWeights {
    ///     experts: 2,
    ///     gate_up: stack,
    ///     down: LinearWeights {
    ///         outputs: 128,
    ///         inputs: 1,
    ///         codes: &[0xff; 64],
    ///         scales: Scales::Absmax(&[1.0, 0.5]),
    ///         ..stack
    ///     },
    ///     layout: GateLayout::Halves,
    ///     activation: Activation::Silu,
    /// };
    /// let choices = Choices { of_token: 2, ids: &[1, -1], weights: &[3.0, 1.0] };
    /// let (x, mut y) = ([1.0f32; 64], [0f32; 64]);
    /// Kernels::detect().experts(&layer, &choices, &x, None, None, &mut y, NonZeroUsize::MIN)?;
    /// // The gate and the other projection are 32, whose product is halved by the down projection.
    /// assert_eq!(y, [3.0 * 32.0 * 32.0 * 0.5; 64]);
    /// # Ok::<(), tightfit_kernels::KernelError>(())
    /// ```
    ///
    /// # Errors
    /// [`KernelError::Length`] if the lengths do not belong together.
    #[expect(
        clippy::too_many_arguments,
        reason = "each is one thing that a caller has to decide"
    )]
    pub fn experts<T: Float>(
        self,
        layer: &ExpertsWeights<'_>,
        choices: &Choices<'_>,
        x: &[T],
        gate_up_bias: Option<&[T]>,
        down_bias: Option<&[T]>,
        y: &mut [T],
        threads: NonZeroUsize,
    ) -> Result<(), KernelError> {
        self.experts_bytes(
            layer,
            choices,
            T::TYPE,
            bytemuck::cast_slice(x),
            gate_up_bias.map(bytemuck::cast_slice),
            down_bias.map(bytemuck::cast_slice),
            bytemuck::cast_slice_mut(y),
            threads,
        )
    }

    /// [`Kernels::experts`] on elements of type `float` as little-endian bytes at any alignment.
    ///
    /// # Errors
    /// [`KernelError::Length`], of elements in bytes.
    #[expect(
        clippy::too_many_arguments,
        reason = "each is one thing that a caller has to decide"
    )]
    pub fn experts_bytes(
        self,
        layer: &ExpertsWeights<'_>,
        choices: &Choices<'_>,
        float: FloatType,
        x: &[u8],
        gate_up_bias: Option<&[u8]>,
        down_bias: Option<&[u8]>,
        y: &mut [u8],
        threads: NonZeroUsize,
    ) -> Result<(), KernelError> {
        let layer = ExpertsLayer::from(layer);
        self.experts_layer_bytes(
            &layer,
            choices,
            float,
            x,
            gate_up_bias,
            down_bias,
            y,
            threads,
        )
    }

    /// [`Kernels::experts_bytes`] of a layer whose experts may be apart. The biases are as there, those of
    /// gates that are apart in [`GateLayout::Halves`].
    ///
    /// # Errors
    /// [`KernelError::Length`], of elements in bytes.
    #[expect(
        clippy::too_many_arguments,
        reason = "each is one thing that a caller has to decide"
    )]
    pub fn experts_layer_bytes(
        self,
        layer: &ExpertsLayer<'_>,
        choices: &Choices<'_>,
        float: FloatType,
        x: &[u8],
        gate_up_bias: Option<&[u8]>,
        down_bias: Option<&[u8]>,
        y: &mut [u8],
        threads: NonZeroUsize,
    ) -> Result<(), KernelError> {
        let (experts, intermediate) = (layer.down.experts(), layer.down.inputs());
        let hidden = layer.gates.inputs();
        let (gate_up, down) = (intermediate.saturating_mul(2), hidden);
        let of_all = |outputs: usize| outputs.saturating_mul(experts);
        match layer.gates {
            ExpertsGates::Together(both, _) => both.check("gate_up", experts, [gate_up, hidden])?,
            ExpertsGates::Apart { gate, up } => {
                gate.check("gate", experts, [intermediate, hidden])?;
                up.check("up", experts, [intermediate, hidden])?;
            }
        }
        layer.down.check("down", experts, [down, intermediate])?;
        let row = hidden.saturating_mul(float.bytes());
        let tokens = choices.check(row, x.len())?;
        check_length("x", tokens.saturating_mul(row), x.len())?;
        check_length("y", x.len(), y.len())?;
        check_length("weights", choices.ids.len(), choices.weights.len())?;
        let bytes = |elements: usize| elements.saturating_mul(float.bytes());
        for (what, bias, outputs) in [
            ("gate_up_bias", gate_up_bias, gate_up),
            ("down_bias", down_bias, down),
        ] {
            if let Some(bias) = bias {
                check_length(what, bytes(of_all(outputs)), bias.len())?;
            }
        }
        if row == 0 {
            return Ok(());
        }

        let of_token = choices.of_token;
        for (i, y) in y.chunks_mut(MOST_TOKENS * row).enumerate() {
            let tokens = i * MOST_TOKENS..i * MOST_TOKENS + y.len() / row;
            let pairs = tokens.start * of_token..tokens.end * of_token;
            let (ids, weights) = (&choices.ids[pairs.clone()], &choices.weights[pairs]);
            let first = Stack {
                kernels: self,
                weights: layer.gates,
                bias: gate_up_bias,
                activation: Some(layer.activation),
                float,
                threads,
            };
            let x = &x[tokens.start * row..tokens.end * row];
            let between = first.multiply(ids, x, |pair| pair / of_token);
            let mut rounded = vec![0; bytes(between.len())];
            for (value, to) in between.iter().zip(rounded.chunks_exact_mut(float.bytes())) {
                float::write(float, *value, to);
            }
            let second = Stack {
                weights: ExpertsGates::plain(layer.down),
                bias: down_bias,
                activation: None,
                ..first
            };
            let parts = second.multiply(ids, &rounded, |pair| pair);
            let valid = |id: i32| usize::try_from(id).is_ok_and(|id| id < experts);
            for (token, y) in y.chunks_exact_mut(row).enumerate() {
                let mut sums = vec![0.0f32; hidden];
                for pair in token * of_token..(token + 1) * of_token {
                    if !valid(ids[pair]) {
                        continue;
                    }
                    let part = &parts[pair * hidden..][..hidden];
                    for (sum, part) in sums.iter_mut().zip(part) {
                        *sum += weights[pair] * part;
                    }
                }
                for (sum, y) in sums.iter().zip(y.chunks_exact_mut(float.bytes())) {
                    float::write(float, *sum, y);
                }
            }
        }
        Ok(())
    }

    /// Multiplies tokens with the weights of the experts that they have chosen: of each pair,
    /// `y = x * transpose(W) + bias` as in [`Kernels::linear`].
    ///
    /// - `stack`: W [experts, outputs, inputs] as one matrix whose outputs are those of all experts.
    /// - `x` [tokens, inputs], `bias` [experts, outputs], `y` [tokens, choices, outputs]. What belongs to
    ///   skipped pairs is left as it is. The weights of the choices are not read.
    ///
    /// # Errors
    /// [`KernelError::Length`] if the lengths do not belong together.
    #[expect(
        clippy::too_many_arguments,
        reason = "each is one thing that a caller has to decide"
    )]
    pub fn experts_linear<T: Float>(
        self,
        stack: &LinearWeights<'_>,
        experts: usize,
        choices: &Choices<'_>,
        x: &[T],
        bias: Option<&[T]>,
        y: &mut [T],
        threads: NonZeroUsize,
    ) -> Result<(), KernelError> {
        let matrices = ExpertsMatrices::Stack {
            experts,
            weights: *stack,
        };
        self.experts_linear_bytes(
            &matrices,
            choices,
            T::TYPE,
            bytemuck::cast_slice(x),
            bias.map(bytemuck::cast_slice),
            bytemuck::cast_slice_mut(y),
            threads,
        )
    }

    /// [`Kernels::experts_linear`] of experts that may be apart, on elements of type `float` as
    /// little-endian bytes at any alignment.
    ///
    /// # Errors
    /// [`KernelError::Length`], of elements in bytes.
    #[expect(
        clippy::too_many_arguments,
        reason = "each is one thing that a caller has to decide"
    )]
    pub fn experts_linear_bytes(
        self,
        matrices: &ExpertsMatrices<'_>,
        choices: &Choices<'_>,
        float: FloatType,
        x: &[u8],
        bias: Option<&[u8]>,
        y: &mut [u8],
        threads: NonZeroUsize,
    ) -> Result<(), KernelError> {
        let (experts, outputs, inputs) =
            (matrices.experts(), matrices.outputs(), matrices.inputs());
        matrices.check("stack", experts, [outputs, inputs])?;
        let bytes = |elements: usize| elements.saturating_mul(float.bytes());
        let tokens = choices.check(bytes(inputs), x.len())?;
        check_length("x", bytes(tokens.saturating_mul(inputs)), x.len())?;
        let results = choices.ids.len().saturating_mul(outputs);
        check_length("y", bytes(results), y.len())?;
        if let Some(bias) = bias {
            check_length("bias", bytes(experts.saturating_mul(outputs)), bias.len())?;
        }
        let product = Stack {
            kernels: self,
            weights: ExpertsGates::plain(*matrices),
            bias,
            activation: None,
            float,
            threads,
        };
        let results = product.multiply(choices.ids, x, |pair| pair / choices.of_token);
        let row = bytes(outputs);
        for (pair, id) in choices.ids.iter().enumerate() {
            if usize::try_from(*id).is_ok_and(|id| id < experts) {
                let y = y[pair * row..][..row].chunks_exact_mut(float.bytes());
                for (result, y) in results[pair * outputs..].iter().zip(y) {
                    float::write(float, *result, y);
                }
            }
        }
        Ok(())
    }
}

impl Choices<'_> {
    /// The number of tokens. Where nothing is chosen, rows of x say how many there are.
    fn check(&self, row_of_x: usize, x: usize) -> Result<usize, KernelError> {
        if self.of_token == 0 {
            check_length("ids", 0, self.ids.len())?;
            return Ok(x / row_of_x.max(1));
        }
        let tokens = self.ids.len() / self.of_token;
        check_length("ids", tokens * self.of_token, self.ids.len())?;
        Ok(tokens)
    }
}

impl<'a> ExpertsGates<'a> {
    /// Of outputs that are results by themselves.
    fn plain(matrices: ExpertsMatrices<'a>) -> ExpertsGates<'a> {
        ExpertsGates::Together(matrices, GateLayout::Halves)
    }

    fn inputs(&self) -> usize {
        match self {
            ExpertsGates::Together(both, _) => both.inputs(),
            ExpertsGates::Apart { gate, .. } => gate.inputs(),
        }
    }

    fn experts(&self) -> usize {
        match self {
            ExpertsGates::Together(both, _) => both.experts(),
            ExpertsGates::Apart { gate, .. } => gate.experts(),
        }
    }

    /// All outputs of an expert.
    fn outputs(&self) -> usize {
        match self {
            ExpertsGates::Together(both, _) => both.outputs(),
            ExpertsGates::Apart { gate, up } => gate.outputs() + up.outputs(),
        }
    }
}

/// A product with experts that is to be computed.
#[derive(Clone, Copy)]
struct Stack<'a> {
    kernels: Kernels,
    weights: ExpertsGates<'a>,
    bias: Option<&'a [u8]>,
    /// What is made of gates; outputs are results without.
    activation: Option<Activation>,
    float: FloatType,
    threads: NonZeroUsize,
}

/// The pairs of one expert.
struct Group {
    expert: usize,
    pairs: Vec<usize>,
}

/// The product of a group with the matrix that its expert's outputs are in.
struct Part<'a> {
    product: Product<'a>,
    /// The first of these outputs.
    first: usize,
}

impl Part<'_> {
    fn sums(&self, outputs: Range<usize>) -> Vec<f32> {
        let first = self.first;
        self.product
            .sums(first + outputs.start..first + outputs.end)
    }
}

impl Stack<'_> {
    /// Outputs of an expert, and results that are made of them.
    fn lengths(&self) -> (usize, usize) {
        let outputs = self.weights.outputs();
        match self.activation {
            Some(_) => (outputs, outputs / 2),
            None => (outputs, outputs),
        }
    }

    /// The results of all pairs, zeros for those that are skipped. `x`: rows of the type, of which
    /// `row_of` says which one a pair has.
    fn multiply<'s>(
        &'s self,
        ids: &[i32],
        x: &[u8],
        row_of: impl Fn(usize) -> usize + Sync,
    ) -> Vec<f32> {
        let mut by_expert: Vec<Vec<usize>> = vec![vec![]; self.weights.experts()];
        for (pair, id) in ids.iter().enumerate() {
            let group = usize::try_from(*id)
                .ok()
                .and_then(|id| by_expert.get_mut(id));
            if let Some(group) = group {
                group.push(pair);
            }
        }
        let groups: Vec<Group> = by_expert
            .into_iter()
            .enumerate()
            .filter(|(_, pairs)| !pairs.is_empty())
            .map(|(expert, pairs)| Group { expert, pairs })
            .collect();
        let (_, results) = self.lengths();
        let row = self.weights.inputs() * self.float.bytes();
        let products = each(self.threads, &groups, |group| {
            let rows = group.pairs.iter().map(|pair| &x[row_of(*pair) * row..]);
            let x = rows.flat_map(|x| &x[..row]).copied().collect::<Vec<u8>>();
            let rows = group.pairs.len();
            let of = |matrices: &'s ExpertsMatrices<'_>| {
                let (weights, first) = matrices.of(group.expert);
                let product = Product::new(self.kernels, weights, self.float, rows, &x);
                Part { product, first }
            };
            match &self.weights {
                ExpertsGates::Together(both, _) => (of(both), None),
                ExpertsGates::Apart { gate, up } => (of(gate), Some(of(up))),
            }
        });
        // Some pieces for each thread, so that all end at about the same time.
        let all = results * groups.len();
        let piece = (all / (8 * self.threads.get())).next_multiple_of(16);
        let piece = piece.clamp(16, 1024);
        let pieces: Vec<(usize, Range<usize>)> = (0..groups.len())
            .flat_map(|group| {
                let begins = (0..results).step_by(piece);
                begins.map(move |begin| (group, begin..results.min(begin + piece)))
            })
            .collect();
        let of_pieces = each(self.threads, &pieces, |(group, range)| {
            self.results_of(&groups[*group], &products[*group], range.clone())
        });
        let mut all = vec![0.0; ids.len() * results];
        for ((group, range), values) in pieces.iter().zip(of_pieces) {
            let rows = values.chunks_exact(range.len());
            for (pair, values) in groups[*group].pairs.iter().zip(rows) {
                all[pair * results..][range.clone()].copy_from_slice(values);
            }
        }
        all
    }

    /// Some results of a group, for each pair those of all of the range.
    fn results_of(
        &self,
        group: &Group,
        (product, up): &(Part<'_>, Option<Part<'_>>),
        range: Range<usize>,
    ) -> Vec<f32> {
        let (outputs, results) = self.lengths();
        let sums = |range: Range<usize>| {
            let mut sums = match up {
                Some(up) if range.start >= results => {
                    up.sums(range.start - results..range.end - results)
                }
                _ => product.sums(range.clone()),
            };
            if let Some(bias) = self.bias {
                let (size, first) = (self.float.bytes(), group.expert * outputs);
                let bias = &bias[(first + range.start) * size..(first + range.end) * size];
                for sums in sums.chunks_exact_mut(range.len()) {
                    for (sum, bias) in sums.iter_mut().zip(bias.chunks_exact(size)) {
                        *sum += float::read(self.float, bias);
                    }
                }
            }
            sums
        };
        let layout = match self.weights {
            ExpertsGates::Together(_, layout) => layout,
            ExpertsGates::Apart { .. } => GateLayout::Halves,
        };
        match self.activation.map(|activation| (layout, activation)) {
            None => sums(range),
            Some((GateLayout::Halves, activation)) => {
                let gates = sums(range.clone());
                let others = sums(results + range.start..results + range.end);
                let pairs = gates.iter().zip(&others);
                pairs
                    .map(|(gate, up)| activation.apply(*gate, *up))
                    .collect()
            }
            Some((GateLayout::Interleaved, activation)) => {
                let both = sums(2 * range.start..2 * range.end);
                let pairs = both.as_chunks::<2>().0.iter();
                pairs
                    .map(|[gate, up]| activation.apply(*gate, *up))
                    .collect()
            }
        }
    }
}
