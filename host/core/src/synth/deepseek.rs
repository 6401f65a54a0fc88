//! DeepSeek-V3: latent attention, and experts beside a shared one after a few dense layers; linear
//! layers in FP8.

use serde_json::{Value, json};

use super::layout::List;
use super::model::{Tensor, Values};
use crate::types::DType;

/// Rows and columns that share a scale. Tiles at the edges are cut off.
const TILE: u64 = 128;

/// The shape of a DeepSeek-V3.
#[derive(Debug, Clone, Copy)]
pub(super) struct DeepseekV3 {
    pub(super) layers: u64,
    /// Layers at the beginning that have a perceptron instead of experts.
    pub(super) dense_layers: u64,
    pub(super) hidden: u64,
    pub(super) vocab: u64,
    pub(super) heads: u64,
    /// Ranks of the projections of queries, and of keys and values.
    pub(super) query_rank: u64,
    pub(super) key_value_rank: u64,
    /// Elements of a head's query and key without and with a rotary position, and of its value.
    pub(super) plain_dim: u64,
    pub(super) rotary_dim: u64,
    pub(super) value_dim: u64,
    /// Inner size of the perceptron of a dense layer.
    pub(super) intermediate: u64,
    pub(super) experts: u64,
    /// Inner size of an expert and of the shared one.
    pub(super) expert_intermediate: u64,
}

impl DeepseekV3 {
    pub(super) fn tensors(&self) -> Vec<Tensor> {
        let mut list = List::default();
        let h = self.hidden;
        list.add("model.embed_tokens.weight", &[self.vocab, h]);
        for layer in 0..self.layers {
            list.prefix = format!("model.layers.{layer}.");
            self.attention(&mut list);
            if layer < self.dense_layers {
                gated(&mut list, "mlp.", h, self.intermediate);
            } else {
                let inner = self.expert_intermediate;
                list.add("mlp.gate.weight", &[self.experts, h]);
                list.add_as(
                    DType::F32,
                    Values::AroundZero,
                    "mlp.gate.e_score_correction_bias",
                    &[self.experts],
                );
                for expert in 0..self.experts {
                    gated(&mut list, &format!("mlp.experts.{expert}."), h, inner);
                }
                gated(&mut list, "mlp.shared_experts.", h, inner);
            }
            list.add("input_layernorm.weight", &[h]);
            list.add("post_attention_layernorm.weight", &[h]);
        }
        list.prefix.clear();
        list.add("model.norm.weight", &[h]);
        list.add("lm_head.weight", &[self.vocab, h]);
        list.tensors
    }

    fn attention(&self, list: &mut List) {
        let (h, heads) = (self.hidden, self.heads);
        let (q, kv) = (self.query_rank, self.key_value_rank);
        let key = self.plain_dim + self.rotary_dim;
        linear(list, "self_attn.q_a_proj", q, h);
        list.add("self_attn.q_a_layernorm.weight", &[q]);
        linear(list, "self_attn.q_b_proj", heads * key, q);
        linear(
            list,
            "self_attn.kv_a_proj_with_mqa",
            kv + self.rotary_dim,
            h,
        );
        list.add("self_attn.kv_a_layernorm.weight", &[kv]);
        let unfolded = heads * (self.plain_dim + self.value_dim);
        linear(list, "self_attn.kv_b_proj", unfolded, kv);
        linear(list, "self_attn.o_proj", h, heads * self.value_dim);
    }

    pub(super) fn config(&self) -> Value {
        json!({
            "architectures": ["DeepseekV3ForCausalLM"],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "first_k_dense_replace": self.dense_layers,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "kv_lora_rank": self.key_value_rank,
            "max_position_embeddings": 163_840,
            "model_type": "deepseek_v3",
            "moe_intermediate_size": self.expert_intermediate,
            "moe_layer_freq": 1,
            "n_group": 8,
            "n_routed_experts": self.experts,
            "n_shared_experts": 1,
            "norm_topk_prob": true,
            "num_attention_heads": self.heads,
            "num_experts_per_tok": 8,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.heads,
            // One in the published file, whose tensors are left out.
            "num_nextn_predict_layers": 0,
            "q_lora_rank": self.query_rank,
            "qk_nope_head_dim": self.plain_dim,
            "qk_rope_head_dim": self.rotary_dim,
            "quantization_config": {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [TILE, TILE],
            },
            "rms_norm_eps": 1e-6,
            "rope_scaling": {
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 40,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096,
                "type": "yarn",
            },
            "rope_theta": 10_000,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "tie_word_embeddings": false,
            "topk_group": 4,
            "topk_method": "noaux_tc",
            "torch_dtype": "bfloat16",
            "use_cache": true,
            "v_head_dim": self.value_dim,
            "vocab_size": self.vocab,
        })
    }
}

/// A linear layer in FP8, and what its codes are multiplied by.
fn linear(list: &mut List, module: &str, rows: u64, columns: u64) {
    let weight = format!("{module}.weight");
    list.add_as(DType::F8E4M3, Values::Fp8Codes, &weight, &[rows, columns]);
    list.add_as(
        DType::F32,
        Values::Fp8Scales,
        &format!("{weight}_scale_inv"),
        &[rows.div_ceil(TILE), columns.div_ceil(TILE)],
    );
}

/// The three of a gated perceptron.
fn gated(list: &mut List, module: &str, hidden: u64, inner: u64) {
    linear(list, &format!("{module}gate_proj"), inner, hidden);
    linear(list, &format!("{module}up_proj"), inner, hidden);
    linear(list, &format!("{module}down_proj"), hidden, inner);
}
