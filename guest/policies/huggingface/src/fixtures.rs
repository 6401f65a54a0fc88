//! Models to place, made up here: names and shapes as their checkpoints have them.

use tightfit_guest::{Device, DeviceKind, Dtype, Request, Tensor, Tie};

pub(crate) const GIB: f64 = (1u64 << 30) as f64;

pub(crate) fn tensor(name: impl Into<String>, shape: &[u64]) -> Tensor {
    Tensor::new(name, Dtype::Bf16, shape)
}

pub(crate) fn device(kind: DeviceKind, gib: f64) -> Device {
    let available = (gib * GIB) as u64;
    Device {
        name: format!("{kind:?}"),
        kind,
        capacity: available,
        available,
        granularity: 4096,
    }
}

/// Accelerators with this much memory each.
pub(crate) fn sims(count: usize, gib: f64) -> Vec<Device> {
    vec![device(DeviceKind::Sim, gib); count]
}

pub(crate) fn request(mut tensors: Vec<Tensor>, devices: Vec<Device>, config: &str) -> Request {
    // As `save_pretrained` sorts: the head first, layer 10 before layer 2.
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Request {
        config_json: config.into(),
        ..Request::new(tensors, devices)
    }
}

pub(crate) fn set(request: &mut Request, name: &str, value: &str) {
    *request = request.clone().set(name, value);
}

/// Gives the embedding a second name.
pub(crate) fn tie(request: &mut Request) {
    let embedding = |tensor: &Tensor| tensor.name.ends_with("embed_tokens.weight");
    let tensor = request.tensors.iter().position(embedding).unwrap() as u32;
    request.ties.push(Tie {
        tensor,
        alias: "lm_head.weight".into(),
        alias_tensor: None,
    });
}

/// Sizes of a decoder.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) layers: u64,
    pub(crate) hidden: u64,
    pub(crate) inner: u64,
    /// Rows of queries, and of keys.
    pub(crate) rows: [u64; 2],
    pub(crate) vocabulary: u64,
    pub(crate) biases: bool,
    pub(crate) experts: u64,
}

pub(crate) const QWEN2_7B: Shape = Shape {
    layers: 28,
    hidden: 3584,
    inner: 18_944,
    rows: [3584, 512],
    vocabulary: 152_064,
    biases: true,
    experts: 0,
};

pub(crate) const MIXTRAL: Shape = Shape {
    layers: 32,
    hidden: 4096,
    inner: 14_336,
    rows: [4096, 1024],
    vocabulary: 32_000,
    biases: false,
    experts: 8,
};

pub(crate) const GEMMA3_27B: Shape = Shape {
    layers: 62,
    hidden: 5376,
    inner: 21_504,
    rows: [4096, 2048],
    vocabulary: 262_208,
    biases: false,
    experts: 0,
};

/// Returns a decoder. Its head is left out where `head` is not set.
pub(crate) fn decoder(shape: Shape, head: bool) -> Vec<Tensor> {
    let Shape { hidden, inner, .. } = shape;
    let table = [shape.vocabulary, hidden];
    let mut tensors = vec![
        tensor("model.embed_tokens.weight", &table),
        tensor("model.norm.weight", &[hidden]),
    ];
    if head {
        tensors.push(tensor("lm_head.weight", &table));
    }
    let [query, key] = shape.rows;
    for layer in 0..shape.layers {
        let mut add = |name: &str, shape: &[u64]| {
            tensors.push(tensor(format!("model.layers.{layer}.{name}"), shape));
        };
        for (name, rows) in [("q", query), ("k", key), ("v", key)] {
            add(&format!("self_attn.{name}_proj.weight"), &[rows, hidden]);
            if shape.biases {
                add(&format!("self_attn.{name}_proj.bias"), &[rows]);
            }
        }
        add("self_attn.o_proj.weight", &[hidden, query]);
        add("input_layernorm.weight", &[hidden]);
        add("post_attention_layernorm.weight", &[hidden]);
        if shape.experts == 0 {
            add("mlp.gate_proj.weight", &[inner, hidden]);
            add("mlp.up_proj.weight", &[inner, hidden]);
            add("mlp.down_proj.weight", &[hidden, inner]);
        } else {
            add("block_sparse_moe.gate.weight", &[shape.experts, hidden]);
        }
        for expert in 0..shape.experts {
            let expert = format!("block_sparse_moe.experts.{expert}");
            add(&format!("{expert}.w1.weight"), &[inner, hidden]);
            add(&format!("{expert}.w2.weight"), &[hidden, inner]);
            add(&format!("{expert}.w3.weight"), &[inner, hidden]);
        }
    }
    tensors
}
