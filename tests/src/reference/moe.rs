//! Mixture of experts: every token goes to the few experts that the router gives it.

use super::mlp::gate;
use super::tensors::{Choices, Layer, Matrix, add_scaled};
use super::{Reference, scale_to_one, sigmoid, softmax};

/// One expert: a gated feed-forward network.
struct Expert<'w> {
    /// Two weights, or one whose rows for the gate come before those of `up`.
    gate_and_up: Vec<Layer<'w>>,
    down: Layer<'w>,
}

impl Expert<'_> {
    fn apply(&self, input: &[f32]) -> Vec<f32> {
        let layers = self.gate_and_up.iter();
        let mut inner: Vec<f32> = layers.flat_map(|layer| layer.apply(input)).collect();
        let up = inner.split_off(inner.len() / 2);
        gate(&mut inner, &up);
        self.down.apply(&inner)
    }
}

impl Reference<'_> {
    /// Name of a layer's router; `None` where there are no experts.
    pub(super) fn router(&self, layer: &str) -> Option<String> {
        ["mlp.gate", "block_sparse_moe.gate"]
            .map(|name| format!("{layer}.{name}"))
            .into_iter()
            .find(|router| self.weights.find(&format!("{router}.weight")).is_some())
    }

    pub(super) fn mixture_of_experts(&self, layer: &str, router: &str, hidden: &Matrix) -> Matrix {
        let mut scores = self.weights.linear(router, hidden);
        let count = scores.columns;
        let chosen: Vec<(usize, f32)> = scores
            .rows_mut()
            .flat_map(|scores| self.choose(scores))
            .collect();
        let choices = Choices {
            of_token: chosen.len() / hidden.rows().len().max(1),
            ids: chosen.iter().map(|(expert, _)| *expert as i32).collect(),
            weights: chosen.iter().map(|(_, share)| *share).collect(),
        };
        let modules = ["mlp.experts", "block_sparse_moe.experts"];
        let mut as_a_whole = modules.iter().filter_map(|module| {
            let module = format!("{layer}.{module}");
            self.weights.experts(&module, hidden, &choices)
        });
        let mut outputs = as_a_whole.next().unwrap_or_else(|| {
            let experts = self.experts(layer, count);
            let mut outputs = Matrix::zeros(hidden.rows().len(), hidden.columns);
            let of_tokens = chosen.chunks(choices.of_token.max(1));
            for ((input, chosen), output) in hidden.rows().zip(of_tokens).zip(outputs.rows_mut()) {
                for (expert, share) in chosen {
                    add_scaled(output, *share, &experts[*expert].apply(input));
                }
            }
            outputs
        });

        // Every token goes to the shared expert, where there is one.
        let shared = format!("{layer}.mlp.shared_expert");
        let shared_gate = format!("{shared}_gate");
        if self
            .weights
            .find(&format!("{shared_gate}.weight"))
            .is_some()
        {
            let gates = self.weights.linear(&shared_gate, hidden);
            let shared = self.mlp(&shared, hidden);
            for ((output, gate), row) in outputs.rows_mut().zip(gates.rows()).zip(shared.rows()) {
                add_scaled(output, sigmoid(gate[0]), row);
            }
        }
        outputs
    }

    /// The experts of one token, and how much each counts.
    fn choose(&self, scores: &mut [f32]) -> impl Iterator<Item = (usize, f32)> + use<> {
        softmax(scores);
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        order.truncate(self.config.experts_per_token());
        let mut shares: Vec<f32> = order.iter().map(|&expert| scores[expert]).collect();
        if self.config.normalizes_expert_weights() {
            scale_to_one(&mut shares);
        }
        order.into_iter().zip(shares)
    }

    /// Every expert of a layer, from stacks or from tensors of its own.
    fn experts(&self, layer: &str, count: usize) -> Vec<Expert<'_>> {
        let stacks = format!("{layer}.mlp.experts");
        let stack = |name: &str| self.weights.layers(&format!("{stacks}.{name}"));
        if let Some((gate_up, down)) = stack("gate_up_proj").zip(stack("down_proj")) {
            assert_eq!((gate_up.len(), down.len()), (count, count), "{stacks}");
            let pairs = gate_up.into_iter().zip(down);
            let expert = |(gate_up, down)| Expert {
                gate_and_up: vec![gate_up],
                down,
            };
            return pairs.map(expert).collect();
        }
        let expert = |index: usize| {
            let weight = |name: String| self.weights.layer(&format!("{layer}.{name}.weight"));
            let current = format!("mlp.experts.{index}");
            // Mixtral's names.
            let older = format!("block_sparse_moe.experts.{index}");
            if self
                .weights
                .find(&format!("{layer}.{older}.w1.weight"))
                .is_some()
            {
                return Expert {
                    gate_and_up: ["w1", "w3"]
                        .map(|name| weight(format!("{older}.{name}")))
                        .into(),
                    down: weight(format!("{older}.w2")),
                };
            }
            Expert {
                gate_and_up: ["gate_proj", "up_proj"]
                    .map(|name| weight(format!("{current}.{name}")))
                    .into(),
                down: weight(format!("{current}.down_proj")),
            }
        };
        (0..count).map(expert).collect()
    }
}
