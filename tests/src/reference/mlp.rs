//! The gated feed-forward network.

use super::tensors::Matrix;
use super::{Reference, silu};

impl Reference<'_> {
    pub(super) fn mlp(&self, module: &str, hidden: &Matrix) -> Matrix {
        let linear =
            |name: &str, inputs: &Matrix| self.weights.linear(&format!("{module}.{name}"), inputs);
        let mut inner = linear("gate_proj", hidden);
        gate(&mut inner.data, &linear("up_proj", hidden).data);
        linear("down_proj", &inner)
    }
}

/// Lets as much of `up` through as the gate says, in place of the gate.
pub(super) fn gate(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = silu(*gate) * up;
    }
}
