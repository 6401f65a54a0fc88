//! The tensors of a model: names, shapes and order, as its checkpoint has them.

use super::model::{Tensor, Values};
use crate::types::DType;

/// A decoder whose layers are all alike: attention, then a multi-layer perceptron or experts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Decoder {
    pub(super) layers: u64,
    pub(super) hidden: u64,
    pub(super) heads: u64,
    pub(super) kv_heads: u64,
    pub(super) head_dim: u64,
    pub(super) vocab: u64,
    /// Biases on the projections of queries, keys and values.
    pub(super) qkv_bias: bool,
    /// Norms on queries and keys.
    pub(super) qk_norm: bool,
    /// The output head is the embedding and not stored.
    pub(super) tied: bool,
    /// Inner size of the perceptron or of an expert.
    pub(super) intermediate: u64,
    pub(super) experts: Experts,
}

/// What stands in the place of the perceptron.
#[derive(Debug, Clone, Copy)]
pub(super) enum Experts {
    /// One perceptron.
    None,
    /// `block_sparse_moe.experts.E.{w1,w2,w3}`.
    Mixtral { count: u64 },
    /// `mlp.experts.E.{gate,up,down}_proj`.
    Qwen3 { count: u64 },
}

impl Decoder {
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
            for (name, rows) in [("q", q), ("k", kv), ("v", kv)] {
                list.add(&format!("self_attn.{name}_proj.weight"), &[rows, h]);
                if self.qkv_bias {
                    list.add(&format!("self_attn.{name}_proj.bias"), &[rows]);
                }
            }
            list.add("self_attn.o_proj.weight", &[h, q]);
            if self.qk_norm {
                list.add("self_attn.q_norm.weight", &[self.head_dim]);
                list.add("self_attn.k_norm.weight", &[self.head_dim]);
            }
            self.perceptron(&mut list);
            list.add("input_layernorm.weight", &[h]);
            list.add("post_attention_layernorm.weight", &[h]);
        }
        list.prefix.clear();
        list.add("model.norm.weight", &[h]);
        if !self.tied {
            list.add("lm_head.weight", &[self.vocab, h]);
        }
        list.tensors
    }

    fn perceptron(&self, list: &mut List) {
        let (h, inner) = (self.hidden, self.intermediate);
        match self.experts {
            Experts::None => list.gated("mlp.", h, inner),
            Experts::Mixtral { count } => {
                list.add("block_sparse_moe.gate.weight", &[count, h]);
                for expert in 0..count {
                    let expert = format!("block_sparse_moe.experts.{expert}");
                    list.add(&format!("{expert}.w1.weight"), &[inner, h]);
                    list.add(&format!("{expert}.w2.weight"), &[h, inner]);
                    list.add(&format!("{expert}.w3.weight"), &[inner, h]);
                }
            }
            Experts::Qwen3 { count } => {
                list.add("mlp.gate.weight", &[count, h]);
                for expert in 0..count {
                    list.gated(&format!("mlp.experts.{expert}."), h, inner);
                }
            }
        }
    }
}

/// Qwen3.5 with experts: linear attention with full attention in every fourth layer, experts
/// stored as stacks, a shared expert, and a vision tower.
#[derive(Debug, Clone, Copy)]
pub(super) struct Qwen35 {
    pub(super) layers: u64,
    /// Number of layers of which the last one has full attention.
    pub(super) full_attention_interval: u64,
    pub(super) hidden: u64,
    pub(super) vocab: u64,
    pub(super) heads: u64,
    pub(super) kv_heads: u64,
    pub(super) head_dim: u64,
    pub(super) linear_key_heads: u64,
    pub(super) linear_value_heads: u64,
    /// Elements of a head of linear attention, for keys and for values.
    pub(super) linear_head_dim: u64,
    pub(super) conv_kernel: u64,
    pub(super) experts: u64,
    /// Inner size of an expert and of the shared one.
    pub(super) intermediate: u64,
    pub(super) vision: Vision,
}

/// The vision tower of Qwen3.5. Its output has the text model's hidden size.
#[derive(Debug, Clone, Copy)]
pub(super) struct Vision {
    pub(super) blocks: u64,
    pub(super) hidden: u64,
    pub(super) intermediate: u64,
    pub(super) channels: u64,
    pub(super) patch: u64,
    pub(super) temporal_patch: u64,
    /// Patches along an edge that are merged into one token.
    pub(super) merge: u64,
    pub(super) positions: u64,
}

impl Qwen35 {
    pub(super) fn is_full_attention(&self, layer: u64) -> bool {
        (layer + 1).is_multiple_of(self.full_attention_interval)
    }

    pub(super) fn tensors(&self) -> Vec<Tensor> {
        let mut list = List::default();
        let h = self.hidden;
        self.vision.tensors(&mut list, h);
        list.prefix = "model.language_model.".into();
        list.add("embed_tokens.weight", &[self.vocab, h]);
        for layer in 0..self.layers {
            list.prefix = format!("model.language_model.layers.{layer}.");
            if self.is_full_attention(layer) {
                self.full_attention(&mut list);
            } else {
                self.linear_attention(&mut list);
            }
            let (experts, inner) = (self.experts, self.intermediate);
            list.add("mlp.gate.weight", &[experts, h]);
            list.add("mlp.experts.gate_up_proj", &[experts, 2 * inner, h]);
            list.add("mlp.experts.down_proj", &[experts, h, inner]);
            list.gated("mlp.shared_expert.", h, inner);
            list.add("mlp.shared_expert_gate.weight", &[1, h]);
            list.add("input_layernorm.weight", &[h]);
            list.add("post_attention_layernorm.weight", &[h]);
        }
        list.prefix.clear();
        list.add("model.language_model.norm.weight", &[h]);
        list.add("lm_head.weight", &[self.vocab, h]);
        list.tensors
    }

    fn full_attention(&self, list: &mut List) {
        let (h, q, kv) = (
            self.hidden,
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
        );
        // Queries and, interleaved by head, their gates.
        list.add("self_attn.q_proj.weight", &[2 * q, h]);
        list.add("self_attn.k_proj.weight", &[kv, h]);
        list.add("self_attn.v_proj.weight", &[kv, h]);
        list.add("self_attn.o_proj.weight", &[h, q]);
        list.add("self_attn.q_norm.weight", &[self.head_dim]);
        list.add("self_attn.k_norm.weight", &[self.head_dim]);
    }

    fn linear_attention(&self, list: &mut List) {
        let (h, heads) = (self.hidden, self.linear_value_heads);
        let values = heads * self.linear_head_dim;
        let channels = 2 * self.linear_key_heads * self.linear_head_dim + values;
        list.add("linear_attn.dt_bias", &[heads]);
        list.add("linear_attn.A_log", &[heads]);
        list.add(
            "linear_attn.conv1d.weight",
            &[channels, 1, self.conv_kernel],
        );
        list.add("linear_attn.norm.weight", &[self.linear_head_dim]);
        list.add("linear_attn.out_proj.weight", &[h, values]);
        list.add("linear_attn.in_proj_qkv.weight", &[channels, h]);
        list.add("linear_attn.in_proj_z.weight", &[values, h]);
        list.add("linear_attn.in_proj_b.weight", &[heads, h]);
        list.add("linear_attn.in_proj_a.weight", &[heads, h]);
    }
}

impl Vision {
    fn tensors(&self, list: &mut List, out: u64) {
        let (h, inner) = (self.hidden, self.intermediate);
        list.prefix = "model.visual.".into();
        list.add(
            "patch_embed.proj.weight",
            &[
                h,
                self.channels,
                self.temporal_patch,
                self.patch,
                self.patch,
            ],
        );
        list.add("patch_embed.proj.bias", &[h]);
        list.add("pos_embed.weight", &[self.positions, h]);
        for block in 0..self.blocks {
            list.prefix = format!("model.visual.blocks.{block}.");
            list.biased("norm1", &[h]);
            list.biased("norm2", &[h]);
            list.biased("attn.qkv", &[3 * h, h]);
            list.biased("attn.proj", &[h, h]);
            list.biased("mlp.linear_fc1", &[inner, h]);
            list.biased("mlp.linear_fc2", &[h, inner]);
        }
        list.prefix = "model.visual.merger.".into();
        let merged = h * self.merge * self.merge;
        list.biased("norm", &[h]);
        list.biased("linear_fc1", &[merged, merged]);
        list.biased("linear_fc2", &[out, merged]);
    }
}

/// A list that grows, and the prefix of what comes next.
#[derive(Default)]
pub(super) struct List {
    pub(super) prefix: String,
    pub(super) tensors: Vec<Tensor>,
}

impl List {
    pub(super) fn add(&mut self, name: &str, shape: &[u64]) {
        let name = format!("{}{name}", self.prefix);
        self.tensors.push(Tensor::new(name, shape));
    }

    /// A tensor that is not bf16.
    pub(super) fn add_as(&mut self, dtype: DType, values: Values, name: &str, shape: &[u64]) {
        self.tensors.push(Tensor {
            name: format!("{}{name}", self.prefix),
            dtype,
            shape: shape.to_vec(),
            values,
        });
    }

    /// A module with a weight of this shape and a bias of its rows.
    pub(super) fn biased(&mut self, module: &str, shape: &[u64]) {
        self.add(&format!("{module}.weight"), shape);
        self.add(&format!("{module}.bias"), &shape[..1]);
    }

    /// The three matrices of a gated perceptron.
    pub(super) fn gated(&mut self, module: &str, hidden: u64, inner: u64) {
        self.add(&format!("{module}gate_proj.weight"), &[inner, hidden]);
        self.add(&format!("{module}up_proj.weight"), &[inner, hidden]);
        self.add(&format!("{module}down_proj.weight"), &[hidden, inner]);
    }
}
