//! A forward pass through a loaded model, in f32 and as plain as it can be: what the logits are to
//! be compared with, and an example of using [`Model`](tightfit::model::Model).
//!
//! It follows the definitions of transformers with eager attention, one text at a time and
//! without a cache. Speed is not a goal.

mod attention;
mod config;
mod linear_attention;
mod mlp;
mod moe;
mod saved;
mod tensors;

pub use config::Config;
pub use saved::SavedWeights;
pub use tensors::{Choices, Matrix, Weight, Weights};

use config::LayerType;

/// A model that can be run.
#[derive(Clone, Copy)]
pub struct Reference<'m> {
    config: &'m Config,
    weights: &'m dyn Weights,
}

impl<'m> Reference<'m> {
    /// Runs `weights` the way `config` says.
    pub fn new(config: &'m Config, weights: &'m dyn Weights) -> Reference<'m> {
        Reference { config, weights }
    }

    /// Logits of the token that follows each of `tokens`: one row a token.
    pub fn logits(&self, tokens: &[usize]) -> Matrix {
        if let Some(window) = self.config.sliding_window() {
            // Within the window it is plain causal attention.
            assert!(tokens.len() <= window, "the text is longer than the window");
        }
        let embedding = self.weights.matrix("model.embed_tokens.weight");
        let mut hidden = Matrix::from_rows(
            embedding.columns,
            tokens.iter().map(|&token| embedding.row(token).to_vec()),
        );
        for index in 0..self.config.num_hidden_layers {
            self.layer(index, &mut hidden);
        }
        self.norm("model.norm", &mut hidden);
        // With a tied head this is the embedding under another name.
        self.weights.linear("lm_head", &hidden)
    }

    /// One block: tokens are mixed, then features; both are added to what came in.
    fn layer(&self, index: usize, hidden: &mut Matrix) {
        let layer = format!("model.layers.{index}");
        let mut normed = hidden.clone();
        self.norm(&format!("{layer}.input_layernorm"), &mut normed);
        hidden.add(&match self.config.layer_type(index) {
            LayerType::FullAttention => self.attention(&layer, &normed),
            LayerType::LinearAttention => self.linear_attention(&layer, &normed),
        });

        let mut normed = hidden.clone();
        self.norm(&format!("{layer}.post_attention_layernorm"), &mut normed);
        hidden.add(&match self.router(&layer) {
            Some(router) => self.mixture_of_experts(&layer, &router, &normed),
            None => self.mlp(&format!("{layer}.mlp"), &normed),
        });
    }

    /// Applies a norm to every row. `module` can also be a norm of single attention heads; then
    /// the rows are made of heads.
    fn norm(&self, module: &str, rows: &mut Matrix) {
        let mut weight = self.weights.vector(&format!("{module}.weight"));
        if self.config.has_zero_centered_norms() {
            for weight in &mut weight {
                *weight += 1.0;
            }
        }
        for row in rows.data.chunks_exact_mut(weight.len()) {
            rms_norm(row, &weight, self.config.rms_norm_eps);
        }
    }
}

/// Divides by the root of the mean square, and multiplies with the weights.
fn rms_norm(row: &mut [f32], weight: &[f32], eps: f32) {
    let squares: f32 = row.iter().map(|value| value * value).sum();
    let scale = 1.0 / (squares / row.len() as f32 + eps).sqrt();
    for (value, weight) in row.iter_mut().zip(weight) {
        *value *= scale * weight;
    }
}

fn sigmoid(value: f32) -> f32 {
    1.0 / (1.0 + (-value).exp())
}

fn silu(value: f32) -> f32 {
    value * sigmoid(value)
}

/// Turns logits into weights of sum one.
fn softmax(logits: &mut [f32]) {
    // Without the largest taken off, the exponential could overflow.
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for logit in &mut *logits {
        *logit = (*logit - largest).exp();
    }
    scale_to_one(logits);
}

/// Divides by the sum.
fn scale_to_one(weights: &mut [f32]) {
    let sum: f32 = weights.iter().sum();
    for weight in weights {
        *weight /= sum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn softmax_gives_shares_of_one_however_large_the_logits_are() {
        let mut shares = [1000.0, 1000.0 + 3_f32.ln(), f32::NEG_INFINITY];
        softmax(&mut shares);
        for (share, expected) in shares.into_iter().zip([0.25, 0.75, 0.0]) {
            assert!((share - expected).abs() < 1e-4, "{shares:?}");
        }
    }

    #[test]
    fn a_norm_makes_the_mean_square_one_before_it_multiplies() {
        let mut row = [3.0, -4.0, 0.0, 5.0];
        rms_norm(&mut row, &[1.0, 1.0, 1.0, 2.0], 0.0);
        let root = 12.5_f32.sqrt();
        for (value, expected) in row.into_iter().zip([3.0, -4.0, 0.0, 10.0]) {
            assert!((value - expected / root).abs() < 1e-6, "{row:?}");
        }
    }
}
