//! Causal attention with grouped queries and rotary positions.

use super::tensors::{Matrix, add_scaled, dot};
use super::{Reference, sigmoid, softmax};

impl Reference<'_> {
    pub(super) fn attention(&self, layer: &str, hidden: &Matrix) -> Matrix {
        let config = self.config;
        let module = format!("{layer}.self_attn");
        let project = |name: &str| self.weights.linear(&format!("{module}.{name}"), hidden);
        let head_dim = config.head_dim();
        let (mut queries, gates) = if config.has_attention_output_gate() {
            let (queries, gates) = split_heads(&project("q_proj"), head_dim);
            (queries, Some(gates))
        } else {
            (project("q_proj"), None)
        };
        let (mut keys, values) = (project("k_proj"), project("v_proj"));
        for (rows, norm) in [(&mut queries, "q_norm"), (&mut keys, "k_norm")] {
            let norm = format!("{module}.{norm}");
            // Only some architectures have them.
            if self.weights.find(&format!("{norm}.weight")).is_some() {
                self.norm(&norm, rows);
            }
            self.rotate(rows);
        }

        let mut mixed = self.attend(&queries, &keys, &values);
        if let Some(gates) = gates {
            for (value, gate) in mixed.data.iter_mut().zip(gates.data) {
                *value *= sigmoid(gate);
            }
        }
        self.weights.linear(&format!("{module}.o_proj"), &mixed)
    }

    /// For each query a mean of the values up to its own position, weighted by how well their
    /// keys match.
    fn attend(&self, queries: &Matrix, keys: &Matrix, values: &Matrix) -> Matrix {
        let head_dim = self.config.head_dim();
        let heads = self.config.num_attention_heads;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let mut mixed = Matrix::zeros(queries.rows().len(), heads * head_dim);
        for head in 0..heads {
            let own = head * head_dim..(head + 1) * head_dim;
            // Consecutive query heads share a head of keys and values.
            let shared = head / (heads / self.config.num_key_value_heads);
            let shared = shared * head_dim..(shared + 1) * head_dim;
            for (position, query) in queries.rows().enumerate() {
                let query = &query[own.clone()];
                let mut shares: Vec<f32> = keys
                    .rows()
                    .take(position + 1)
                    .map(|key| dot(query, &key[shared.clone()]) * scale)
                    .collect();
                softmax(&mut shares);
                let output = &mut mixed.row_mut(position)[own.clone()];
                for (share, value) in shares.into_iter().zip(values.rows()) {
                    add_scaled(output, share, &value[shared.clone()]);
                }
            }
        }
        mixed
    }

    /// Turns pairs of features of every head by angles that grow with the position. A pair is a
    /// feature of the first half of those that are turned and its counterpart in the second.
    fn rotate(&self, rows: &mut Matrix) {
        let half = self.config.rotary_dim() / 2;
        let theta = self.config.rope_parameters.rope_theta;
        let head_dim = self.config.head_dim();
        for (position, row) in rows.rows_mut().enumerate() {
            for head in row.chunks_exact_mut(head_dim) {
                for feature in 0..half {
                    let frequency = 1.0 / theta.powf(feature as f32 / half as f32);
                    let (sin, cos) = (position as f32 * frequency).sin_cos();
                    let (first, second) = (head[feature], head[feature + half]);
                    head[feature] = first * cos - second * sin;
                    head[feature + half] = second * cos + first * sin;
                }
            }
        }
    }
}

/// Takes rows of heads apart that each hold a query before a gate.
fn split_heads(rows: &Matrix, head_dim: usize) -> (Matrix, Matrix) {
    let take = |second: usize| Matrix {
        columns: rows.columns / 2,
        data: rows
            .data
            .chunks_exact(head_dim)
            .skip(second)
            .step_by(2)
            .flatten()
            .copied()
            .collect(),
    };
    (take(0), take(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_and_gates_alternate_by_head() {
        let rows = Matrix {
            columns: 8,
            data: (0..16).map(|value| value as f32).collect(),
        };
        let (queries, gates) = split_heads(&rows, 2);
        assert_eq!(queries.row(0), [0.0, 1.0, 4.0, 5.0]);
        assert_eq!(gates.row(0), [2.0, 3.0, 6.0, 7.0]);
        assert_eq!(queries.row(1), [8.0, 9.0, 12.0, 13.0]);
    }
}
