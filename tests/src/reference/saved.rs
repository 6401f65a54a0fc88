//! Weights as bitsandbytes saved them, dequantized from its files alone: no table, no kernel and
//! no reader of ours takes part. Where a model loaded by us gives other logits, these tell
//! whether its weights differ or the forward pass does.

use serde::Deserialize;

use super::tensors::{Weight, Weights};
use crate::tensors::{FileTensor, FileTensors, floats};

/// What follows the name of a weight in that of its [`QuantState`].
const QUANT_STATE: &str = ".quant_state.bitsandbytes__nf4";

/// The tensors of a checkpoint that transformers and bitsandbytes quantized.
#[derive(Debug, Clone)]
pub struct SavedWeights(pub FileTensors);

/// What bitsandbytes writes beside a weight, as far as it is used.
#[derive(Debug, Deserialize)]
struct QuantState {
    quant_type: String,
    blocksize: usize,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
}

impl Weights for SavedWeights {
    fn find(&self, name: &str) -> Option<Weight> {
        let stored = match self.0.0.get(name) {
            // A tied head is not saved.
            None if name == "lm_head.weight" => return self.find("model.embed_tokens.weight"),
            stored => stored?,
        };
        Some(match self.0.0.get(&format!("{name}{QUANT_STATE}")) {
            Some(state) => self.dequantize(name, &state.data),
            None => plain(name, stored),
        })
    }
}

impl SavedWeights {
    /// Names of the weights that were quantized.
    pub fn quantized(&self) -> Vec<String> {
        let names = self.0.0.keys();
        names
            .filter_map(|name| name.strip_suffix(QUANT_STATE))
            .map(str::to_owned)
            .collect()
    }

    fn dequantize(&self, name: &str, state: &[u8]) -> Weight {
        let state: QuantState =
            serde_json::from_slice(state).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(state.quant_type, "nf4", "{name}");
        let part = |part: &str| self.0.data(&format!("{name}.{part}"));
        let scales = match state.nested_blocksize {
            None => floats(part("absmax")),
            Some(size) => {
                let values = floats(part("nested_quant_map"));
                let nested = floats(part("nested_absmax"));
                let offset = self.0.nested_offset(name);
                let codes = part("absmax").iter().enumerate();
                codes
                    .map(|(block, &code)| values[usize::from(code)] * nested[block / size] + offset)
                    .collect()
            }
        };
        let values = floats(part("quant_map"));
        let elements: usize = state.shape.iter().product();
        let codes = self.0.data(name).iter();
        // The first of two elements is in the upper half of the byte.
        let codes = codes.flat_map(|byte| [byte >> 4, byte & 15]).take(elements);
        let data = codes
            .enumerate()
            .map(|(index, code)| values[usize::from(code)] * scales[index / state.blocksize]);
        Weight {
            data: data.collect(),
            shape: state.shape,
        }
    }
}

/// A weight that was not quantized.
fn plain(name: &str, stored: &FileTensor) -> Weight {
    assert_eq!(stored.dtype, safetensors::Dtype::BF16, "{name}");
    let (pairs, _) = stored.data.as_chunks::<2>();
    // The upper half of the f32 of the same value.
    let data = pairs
        .iter()
        .map(|&[low, high]| f32::from_le_bytes([0, 0, low, high]));
    Weight {
        shape: stored.shape.clone(),
        data: data.collect(),
    }
}
