//! Linear attention with a gated delta rule: each head remembers in one matrix what it has read,
//! forgets some of it with every token, and corrects what it would recall for the token's key.

use super::config::LinearAttentionConfig;
use super::tensors::{Matrix, add_scaled, dot};
use super::{Reference, rms_norm, sigmoid, silu};

/// Keeps the norm of a key or query of zeros finite; not from the configuration.
const L2_NORM_EPS: f32 = 1e-6;

impl Reference<'_> {
    pub(super) fn linear_attention(&self, layer: &str, hidden: &Matrix) -> Matrix {
        let config = self.config.linear_attention.as_ref();
        let config = config.expect("the configuration has the sizes of linear attention");
        let module = format!("{layer}.linear_attn");
        let name = |name: &str| format!("{module}.{name}");
        let project = |projection: &str| self.weights.linear(&name(projection), hidden);

        let mixed = self.convolve(&name("conv1d.weight"), config, &project("in_proj_qkv"));
        let mut decays = project("in_proj_a");
        let (rates, biases) = (
            self.weights.vector(&name("A_log")),
            self.weights.vector(&name("dt_bias")),
        );
        for row in decays.rows_mut() {
            for ((value, rate), bias) in row.iter_mut().zip(&rates).zip(&biases) {
                *value = (-rate.exp() * softplus(*value + bias)).exp();
            }
        }
        let mut outputs = remember(config, &mixed, &decays, &project("in_proj_b"));

        // This norm is not zero-centered, in no model.
        let weight = self.weights.vector(&name("norm.weight"));
        let gates = project("in_proj_z");
        let heads = outputs.data.chunks_exact_mut(config.value_head_dim);
        for (head, gates) in heads.zip(gates.data.chunks_exact(config.value_head_dim)) {
            rms_norm(head, &weight, self.config.rms_norm_eps);
            for (value, &gate) in head.iter_mut().zip(gates) {
                *value *= silu(gate);
            }
        }
        self.weights.linear(&name("out_proj"), &outputs)
    }

    /// Mixes each feature with the same feature of the tokens before. The last of the weights is
    /// for the token itself.
    fn convolve(&self, name: &str, config: &LinearAttentionConfig, inputs: &Matrix) -> Matrix {
        let taps = self.weights.stack(name);
        let taps = taps.unwrap_or_else(|| panic!("the model has no {name}"));
        assert_eq!(taps.len(), inputs.columns, "{name}");
        let mut outputs = Matrix::zeros(inputs.rows().len(), inputs.columns);
        for (position, output) in outputs.rows_mut().enumerate() {
            for ((feature, output), taps) in output.iter_mut().enumerate().zip(&taps) {
                assert_eq!(taps.data.len(), config.conv_kernel_dim, "{name}");
                let before = (0..=position).rev();
                let weighted = before.zip(taps.data.iter().rev());
                let sum: f32 = weighted
                    .map(|(position, tap)| inputs.row(position)[feature] * tap)
                    .sum();
                *output = silu(sum);
            }
        }
        outputs
    }
}

/// Reads the tokens into each head's memory, and what their queries recall from it.
///
/// Rows of `mixed` are the queries of all heads, their keys, then their values. `decays` has the
/// share of the memory that a head keeps, `strengths` the logit of how far it corrects it.
fn remember(
    config: &LinearAttentionConfig,
    mixed: &Matrix,
    decays: &Matrix,
    strengths: &Matrix,
) -> Matrix {
    let (key_dim, value_dim) = (config.key_head_dim, config.value_head_dim);
    let keys_start = key_dim * config.num_key_heads;
    let values_start = 2 * keys_start;
    let heads = config.num_value_heads;
    let mut outputs = Matrix::zeros(mixed.rows().len(), heads * value_dim);
    for head in 0..heads {
        // Consecutive heads of values share one of keys and queries.
        let shared = head / (heads / config.num_key_heads) * key_dim;
        let own = head * value_dim;
        // For each feature of the key what is remembered of the values.
        let mut memory = Matrix::zeros(key_dim, value_dim);
        for (position, row) in mixed.rows().enumerate() {
            let query = unit(&row[shared..][..key_dim]);
            let key = unit(&row[keys_start + shared..][..key_dim]);
            let value = &row[values_start + own..][..value_dim];

            for kept in &mut memory.data {
                *kept *= decays.row(position)[head];
            }
            let recalled = recall(&memory, &key);
            let strength = sigmoid(strengths.row(position)[head]);
            let correction: Vec<f32> = value
                .iter()
                .zip(recalled)
                .map(|(value, recalled)| (value - recalled) * strength)
                .collect();
            for (row, &key) in memory.rows_mut().zip(&key) {
                add_scaled(row, key, &correction);
            }

            let output = &mut outputs.row_mut(position)[own..][..value_dim];
            let scale = 1.0 / (key_dim as f32).sqrt();
            add_scaled(output, scale, &recall(&memory, &query));
        }
    }
    outputs
}

/// The values that the memory has for a key.
fn recall(memory: &Matrix, key: &[f32]) -> Vec<f32> {
    let mut values = vec![0.0; memory.columns];
    for (row, &key) in memory.rows().zip(key) {
        add_scaled(&mut values, key, row);
    }
    values
}

/// The vector, of length one.
fn unit(vector: &[f32]) -> Vec<f32> {
    let scale = 1.0 / (dot(vector, vector) + L2_NORM_EPS).sqrt();
    vector.iter().map(|value| value * scale).collect()
}

fn softplus(value: f32) -> f32 {
    // Further up the logarithm is the value itself, and the exponential overflows in the end.
    if value > 20.0 {
        value
    } else {
        value.exp().ln_1p()
    }
}
