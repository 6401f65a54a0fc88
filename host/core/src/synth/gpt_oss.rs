//! gpt-oss: attention with sinks, in every other layer over a window only; experts as stacks in MXFP4.

use serde_json::{Value, json};

use super::layout::List;
use super::model::{Tensor, Values};
use crate::types::DType;

/// Elements that share a scale, and the bytes that hold them.
const BLOCK: u64 = 32;
const BLOCK_BYTES: u64 = BLOCK / 2;

/// The shape of a gpt-oss.
#[derive(Debug, Clone, Copy)]
pub(super) struct GptOss {
    pub(super) layers: u64,
    pub(super) hidden: u64,
    pub(super) vocab: u64,
    pub(super) heads: u64,
    pub(super) kv_heads: u64,
    pub(super) head_dim: u64,
    pub(super) experts: u64,
    /// Inner size of an expert.
    pub(super) intermediate: u64,
}

impl GptOss {
    pub(super) fn tensors(&self) -> Vec<Tensor> {
        let mut list = List::default();
        let (h, q, kv) = (
            self.hidden,
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
        );
        list.add("model.embed_tokens.weight", &[self.vocab, h]);
        for layer in 0..self.layers {
            list.prefix = format!("model.layers.{layer}.");
            list.add("self_attn.sinks", &[self.heads]);
            list.biased("self_attn.q_proj", &[q, h]);
            list.biased("self_attn.k_proj", &[kv, h]);
            list.biased("self_attn.v_proj", &[kv, h]);
            list.biased("self_attn.o_proj", &[h, q]);
            list.biased("mlp.router", &[self.experts, h]);
            self.stack(&mut list, "gate_up_proj", 2 * self.intermediate, h);
            self.stack(&mut list, "down_proj", h, self.intermediate);
            list.add("input_layernorm.weight", &[h]);
            list.add("post_attention_layernorm.weight", &[h]);
        }
        list.prefix.clear();
        list.add("model.norm.weight", &[h]);
        list.add("lm_head.weight", &[self.vocab, h]);
        list.tensors
    }

    /// The matrices of all experts in MXFP4, what their codes are multiplied by, and their biases.
    fn stack(&self, list: &mut List, name: &str, rows: u64, columns: u64) {
        let blocks = columns.div_ceil(BLOCK);
        list.add_as(
            DType::U8,
            Values::Mxfp4Codes,
            &format!("mlp.experts.{name}_blocks"),
            &[self.experts, rows, blocks, BLOCK_BYTES],
        );
        list.add_as(
            DType::U8,
            Values::Mxfp4Scales,
            &format!("mlp.experts.{name}_scales"),
            &[self.experts, rows, blocks],
        );
        list.add(&format!("mlp.experts.{name}_bias"), &[self.experts, rows]);
    }

    pub(super) fn config(&self) -> Value {
        let layer_types: Vec<&str> = (0..self.layers)
            .map(|layer| match layer % 2 {
                0 => "sliding_attention",
                _ => "full_attention",
            })
            .collect();
        json!({
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": true,
            "attention_dropout": 0.0,
            "eos_token_id": 200_002,
            "experts_per_token": 4,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initial_context_length": 4096,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "layer_types": layer_types,
            "max_position_embeddings": 131_072,
            "model_type": "gpt_oss",
            "num_attention_heads": self.heads,
            "num_experts_per_tok": 4,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "num_local_experts": self.experts,
            "output_router_logits": false,
            "pad_token_id": 199_999,
            "quantization_config": {
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
                "quant_method": "mxfp4",
            },
            "rms_norm_eps": 1e-5,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "truncate": false,
            },
            "rope_theta": 150_000,
            "router_aux_loss_coef": 0.9,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "tie_word_embeddings": false,
            "transformers_version": "4.55.0.dev0",
            "use_cache": true,
            "vocab_size": self.vocab,
        })
    }
}
