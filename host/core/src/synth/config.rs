//! `config.json` of the presets, as transformers writes it. What does not follow from the shape is
//! from the published files.

use serde_json::{Value, json};

use super::layout::{Decoder, Experts, Qwen35};

fn experts(decoder: &Decoder) -> u64 {
    match decoder.experts {
        Experts::None => 0,
        Experts::Mixtral { count } | Experts::Qwen3 { count } => count,
    }
}

pub(super) fn qwen2(d: &Decoder) -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151_643.min(d.vocab - 1),
        "eos_token_id": 151_645.min(d.vocab - 1),
        "hidden_act": "silu",
        "hidden_size": d.hidden,
        "initializer_range": 0.02,
        "intermediate_size": d.intermediate,
        "max_position_embeddings": 32_768,
        "max_window_layers": d.layers,
        "model_type": "qwen2",
        "num_attention_heads": d.heads,
        "num_hidden_layers": d.layers,
        "num_key_value_heads": d.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "sliding_window": 32_768,
        "tie_word_embeddings": d.tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "use_cache": true,
        "use_sliding_window": false,
        "vocab_size": d.vocab,
    })
}

pub(super) fn llama(d: &Decoder) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
        "hidden_act": "silu",
        "hidden_size": d.hidden,
        "initializer_range": 0.02,
        "intermediate_size": d.intermediate,
        "max_position_embeddings": 131_072,
        "mlp_bias": false,
        "model_type": "llama",
        "num_attention_heads": d.heads,
        "num_hidden_layers": d.layers,
        "num_key_value_heads": d.kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500_000.0,
        "tie_word_embeddings": d.tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0.dev0",
        "use_cache": true,
        "vocab_size": d.vocab,
    })
}

pub(super) fn mixtral(d: &Decoder) -> Value {
    json!({
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": d.hidden,
        "initializer_range": 0.02,
        "intermediate_size": d.intermediate,
        "max_position_embeddings": 32_768,
        "model_type": "mixtral",
        "num_attention_heads": d.heads,
        "num_experts_per_tok": 2,
        "num_hidden_layers": d.layers,
        "num_key_value_heads": d.kv_heads,
        "num_local_experts": experts(d),
        "output_router_logits": false,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": null,
        "tie_word_embeddings": d.tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0",
        "use_cache": true,
        "vocab_size": d.vocab,
    })
}

pub(super) fn qwen3_moe(d: &Decoder) -> Value {
    json!({
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "bos_token_id": 151_643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151_645,
        "head_dim": d.head_dim,
        "hidden_act": "silu",
        "hidden_size": d.hidden,
        "initializer_range": 0.02,
        // Of layers without experts, of which there are none.
        "intermediate_size": 6144,
        "max_position_embeddings": 40_960,
        "max_window_layers": d.layers,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": d.intermediate,
        "norm_topk_prob": true,
        "num_attention_heads": d.heads,
        "num_experts": experts(d),
        "num_experts_per_tok": 8,
        "num_hidden_layers": d.layers,
        "num_key_value_heads": d.kv_heads,
        "output_router_logits": false,
        "rms_norm_eps": 1e-6,
        "rope_scaling": null,
        "rope_theta": 1_000_000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": null,
        "tie_word_embeddings": d.tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": true,
        "use_sliding_window": false,
        "vocab_size": d.vocab,
    })
}

pub(super) fn qwen35(m: &Qwen35) -> Value {
    let layer_types: Vec<&str> = (0..m.layers)
        .map(|layer| {
            if m.is_full_attention(layer) {
                "full_attention"
            } else {
                "linear_attention"
            }
        })
        .collect();
    let v = &m.vision;
    json!({
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "image_token_id": 248_056,
        "model_type": "qwen3_5_moe",
        "text_config": {
            "attention_bias": false,
            "attention_dropout": 0.0,
            "attn_output_gate": true,
            "dtype": "bfloat16",
            "eos_token_id": 248_044,
            "full_attention_interval": m.full_attention_interval,
            "head_dim": m.head_dim,
            "hidden_act": "silu",
            "hidden_size": m.hidden,
            "initializer_range": 0.02,
            "layer_types": layer_types,
            "linear_conv_kernel_dim": m.conv_kernel,
            "linear_key_head_dim": m.linear_head_dim,
            "linear_num_key_heads": m.linear_key_heads,
            "linear_num_value_heads": m.linear_value_heads,
            "linear_value_head_dim": m.linear_head_dim,
            "max_position_embeddings": 262_144,
            "model_type": "qwen3_5_moe_text",
            "moe_intermediate_size": m.intermediate,
            "num_attention_heads": m.heads,
            "num_experts": m.experts,
            "num_experts_per_tok": 8,
            "num_hidden_layers": m.layers,
            "num_key_value_heads": m.kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "mrope_interleaved": true,
                "mrope_section": [11, 11, 10],
                "partial_rotary_factor": 0.25,
                "rope_theta": 10_000_000,
                "rope_type": "default",
            },
            "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": m.intermediate,
            "use_cache": true,
            "vocab_size": m.vocab,
        },
        "tie_word_embeddings": false,
        "transformers_version": "5.2.0",
        "video_token_id": 248_057,
        "vision_config": {
            "deepstack_visual_indexes": [],
            "depth": v.blocks,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": v.hidden,
            "in_channels": v.channels,
            "initializer_range": 0.02,
            "intermediate_size": v.intermediate,
            "model_type": "qwen3_5_moe",
            "num_heads": 16,
            "num_position_embeddings": v.positions,
            "out_hidden_size": m.hidden,
            "patch_size": v.patch,
            "spatial_merge_size": v.merge,
            "temporal_patch_size": v.temporal_patch,
        },
        "vision_end_token_id": 248_054,
        "vision_start_token_id": 248_053,
    })
}
