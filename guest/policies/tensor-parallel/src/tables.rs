//! Styles by architecture, as the models' own `base_model_tp_plan` and `_tp_plan` have them in transformers 5.

/// Modules with their styles.
pub(crate) type Table = &'static [(&'static str, &'static str)];

const ATTENTION: Table = &[
    ("layers.*.self_attn.q_proj", "colwise"),
    ("layers.*.self_attn.k_proj", "colwise"),
    ("layers.*.self_attn.v_proj", "colwise"),
    ("layers.*.self_attn.o_proj", "rowwise"),
];

const MLP: Table = &[
    ("layers.*.mlp.gate_proj", "colwise"),
    ("layers.*.mlp.up_proj", "colwise"),
    ("layers.*.mlp.down_proj", "rowwise"),
];

const EXPERTS: Table = &[
    ("layers.*.mlp.experts.gate_up_proj", "packed_colwise"),
    ("layers.*.mlp.experts.down_proj", "rowwise"),
    ("layers.*.mlp.shared_expert.gate_proj", "colwise"),
    ("layers.*.mlp.shared_expert.up_proj", "colwise"),
    ("layers.*.mlp.shared_expert.down_proj", "rowwise"),
    ("layers.*.mlp.shared_experts.gate_proj", "colwise"),
    ("layers.*.mlp.shared_experts.up_proj", "colwise"),
    ("layers.*.mlp.shared_experts.down_proj", "rowwise"),
];

const HEAD: Table = &[("lm_head", "colwise_gather_output")];

/// Latent attention (MLA): by heads where there are heads.
const LATENT: Table = &[
    ("layers.*.self_attn.q_proj", "colwise"),
    ("layers.*.self_attn.q_b_proj", "colwise"),
    ("layers.*.self_attn.kv_a_proj_with_mqa", "mla_kv_a_proj"),
    ("layers.*.self_attn.kv_b_proj", "colwise"),
    ("layers.*.self_attn.o_proj", "rowwise"),
];

/// Linear attention of Qwen3-Next and Qwen3.5, whose heads are of several kinds: each result is put together.
const LINEAR_ATTENTION: Table = &[
    ("layers.*.linear_attn.in_proj_qkv", "colwise_gather_output"),
    ("layers.*.linear_attn.in_proj_z", "colwise_gather_output"),
    ("layers.*.linear_attn.in_proj_b", "colwise_gather_output"),
    ("layers.*.linear_attn.in_proj_a", "colwise_gather_output"),
    ("layers.*.linear_attn.in_proj_qkvz", "colwise_gather_output"),
    ("layers.*.linear_attn.in_proj_ba", "colwise_gather_output"),
    ("layers.*.linear_attn.out_proj", "colwise_gather_output"),
];

/// Queries, keys and values, gate and up are one matrix each, and taken apart behind it.
const PHI3: Table = &[
    ("layers.*.self_attn.qkv_proj", "colwise_gather_output"),
    ("layers.*.self_attn.o_proj", "rowwise_split_input"),
    ("layers.*.mlp.gate_up_proj", "colwise_gather_output"),
    ("layers.*.mlp.down_proj", "rowwise_split_input"),
];

/// Queries and keys have a norm over all heads.
const OLMO2: Table = &[
    ("layers.*.self_attn.q_proj", "colwise_gather_output"),
    ("layers.*.self_attn.k_proj", "colwise_gather_output"),
    ("layers.*.self_attn.v_proj", "colwise_gather_output"),
    ("layers.*.self_attn.o_proj", "rowwise_split_input"),
];

/// Experts of Llama 4 are stacks of transposed matrices.
const LLAMA4: Table = &[
    ("layers.*.feed_forward.shared_expert.gate_proj", "colwise"),
    ("layers.*.feed_forward.shared_expert.up_proj", "colwise"),
    ("layers.*.feed_forward.shared_expert.down_proj", "rowwise"),
    (
        "layers.*.feed_forward.experts.gate_up_proj",
        "packed_rowwise",
    ),
    ("layers.*.feed_forward.experts.down_proj", "colwise"),
    ("layers.*.feed_forward.gate_proj", "colwise"),
    ("layers.*.feed_forward.up_proj", "colwise"),
    ("layers.*.feed_forward.down_proj", "rowwise"),
];

/// The table is cut, attention is not, and experts are given whole.
const GPT_OSS: Table = &[("embed_tokens", "embedding_rowwise")];

/// Experts given whole, as in a `base_model_ep_plan`.
pub(crate) const WHOLE_EXPERTS: Table = &[
    ("experts.gate_up_proj", "grouped_gemm"),
    ("experts.gate_up_proj_bias", "grouped_gemm"),
    ("experts.down_proj", "grouped_gemm"),
    ("experts.down_proj_bias", "grouped_gemm"),
    // In MXFP4 as it is stored.
    ("experts.gate_up_proj_blocks", "grouped_gemm"),
    ("experts.gate_up_proj_scales", "grouped_gemm"),
    ("experts.down_proj_blocks", "grouped_gemm"),
    ("experts.down_proj_scales", "grouped_gemm"),
];

/// Architectures whose modules are called, and cut, as Llama's are.
const AS_LLAMA: [&str; 19] = [
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "glm4_moe",
    "granite",
    "llama",
    "ministral",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_5_vl",
    "qwen2_5_vl_text",
    "qwen2_moe",
    "qwen2_vl",
    "qwen3",
    "qwen3_moe",
    "qwen3_vl_text",
    "smollm3",
];

/// What is known of an architecture.
#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) tables: Vec<Table>,
    /// Whether its experts are given whole.
    pub(crate) whole_experts: bool,
    /// Whether there is a table for it, or names have to do.
    pub(crate) is_known: bool,
}

/// Returns the styles of an architecture, which config.json calls `model_type`.
pub(crate) fn of(model_type: &str) -> Known {
    let known = |tables: &[Table]| Known {
        tables: tables.to_vec(),
        whole_experts: false,
        is_known: true,
    };
    match model_type {
        "gpt_oss" => Known {
            whole_experts: true,
            ..known(&[GPT_OSS, HEAD])
        },
        "phi3" => known(&[PHI3, HEAD]),
        "olmo2" | "olmo3" | "olmoe" => known(&[OLMO2, MLP, EXPERTS, HEAD]),
        "deepseek_v2" | "deepseek_v3" | "glm4_moe_lite" => known(&[LATENT, MLP, EXPERTS, HEAD]),
        "llama4" | "llama4_text" => known(&[ATTENTION, LLAMA4, HEAD]),
        "qwen3_next" | "qwen3_5" | "qwen3_5_text" | "qwen3_5_moe" | "qwen3_5_moe_text" => {
            known(&[ATTENTION, LINEAR_ATTENTION, MLP, EXPERTS, HEAD])
        }
        other => Known {
            is_known: AS_LLAMA.contains(&other),
            ..known(&[ATTENTION, MLP, EXPERTS, HEAD])
        },
    }
}
