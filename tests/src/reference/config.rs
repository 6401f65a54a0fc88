//! What `config.json` says about the arithmetic.

use std::fs;
use std::path::Path;

use serde::Deserialize;

/// Model types whose arithmetic is implemented.
const MODEL_TYPES: [&str; 5] = ["llama", "qwen2", "qwen3_moe", "mixtral", "qwen3_5_moe_text"];

/// `config.json`, as far as it is used.
#[derive(Debug, Clone, Deserialize)]
pub struct Config {
    model_type: String,
    hidden_act: String,
    hidden_size: usize,
    pub(super) num_hidden_layers: usize,
    pub(super) num_attention_heads: usize,
    pub(super) num_key_value_heads: usize,
    head_dim: Option<usize>,
    pub(super) rms_norm_eps: f32,
    pub(super) rope_parameters: RopeParameters,
    sliding_window: Option<usize>,
    #[serde(default = "yes")]
    use_sliding_window: bool,
    layer_types: Option<Vec<LayerType>>,
    /// How many experts see a token; of models with experts only.
    num_experts_per_tok: Option<usize>,
    norm_topk_prob: Option<bool>,
    #[serde(flatten)]
    pub(super) linear_attention: Option<LinearAttentionConfig>,
}

/// Rotary position embedding.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct RopeParameters {
    rope_type: String,
    pub(super) rope_theta: f32,
    partial_rotary_factor: Option<f32>,
}

/// What mixes the tokens in a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum LayerType {
    FullAttention,
    LinearAttention,
}

/// Sizes of the layers with linear attention.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct LinearAttentionConfig {
    #[serde(rename = "linear_conv_kernel_dim")]
    pub(super) conv_kernel_dim: usize,
    #[serde(rename = "linear_key_head_dim")]
    pub(super) key_head_dim: usize,
    #[serde(rename = "linear_num_key_heads")]
    pub(super) num_key_heads: usize,
    #[serde(rename = "linear_num_value_heads")]
    pub(super) num_value_heads: usize,
    #[serde(rename = "linear_value_head_dim")]
    pub(super) value_head_dim: usize,
}

fn yes() -> bool {
    true
}

impl Config {
    /// Reads a file. Anything that would need other arithmetic than there is here is a panic: to
    /// ignore it would give wrong numbers without a word.
    pub fn read(path: &Path) -> Config {
        let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let config: Config = serde_json::from_slice(&bytes)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let model_type = config.model_type.as_str();
        assert!(MODEL_TYPES.contains(&model_type), "{model_type} models");
        assert_eq!(config.hidden_act, "silu");
        assert_eq!(config.rope_parameters.rope_type, "default");
        config
    }

    /// Features of one attention head.
    pub(super) fn head_dim(&self) -> usize {
        self.head_dim
            .unwrap_or(self.hidden_size / self.num_attention_heads)
    }

    /// How many features of a head the rotary embedding turns, from the first on.
    pub(super) fn rotary_dim(&self) -> usize {
        let factor = self.rope_parameters.partial_rotary_factor.unwrap_or(1.0);
        (self.head_dim() as f32 * factor) as usize
    }

    /// Over how many tokens attention can look back, when that is limited.
    pub(super) fn sliding_window(&self) -> Option<usize> {
        self.sliding_window.filter(|_| self.use_sliding_window)
    }

    pub(super) fn layer_type(&self, layer: usize) -> LayerType {
        match &self.layer_types {
            Some(types) => types[layer],
            None => LayerType::FullAttention,
        }
    }

    pub(super) fn experts_per_token(&self) -> usize {
        self.num_experts_per_tok
            .expect("a model with experts says how many a token goes to")
    }

    /// Whether the weights of the chosen experts are scaled to a sum of one. Only Qwen3-MoE
    /// leaves that to the configuration.
    pub(super) fn normalizes_expert_weights(&self) -> bool {
        self.model_type != "qwen3_moe" || self.norm_topk_prob == Some(true)
    }

    /// Whether norms multiply with 1 + weight, and not with the weight.
    pub(super) fn has_zero_centered_norms(&self) -> bool {
        self.is_qwen3_5()
    }

    /// Whether the query projection gives a gate for the output of attention, too.
    pub(super) fn has_attention_output_gate(&self) -> bool {
        self.is_qwen3_5()
    }

    fn is_qwen3_5(&self) -> bool {
        self.model_type == "qwen3_5_moe_text"
    }
}
