//! Models to cut, made up here: names and shapes as their checkpoints have them.

use tightfit_guest::{Device, Dtype, Request, Tensor};

pub(crate) fn tensor(name: impl Into<String>, shape: &[u64]) -> Tensor {
    Tensor::new(name, Dtype::Bf16, shape)
}

pub(crate) fn sims(count: usize) -> Vec<Device> {
    (0..count)
        .map(|number| Device::new(&format!("sim:{number}"), 80 << 30))
        .collect()
}

pub(crate) fn request(tensors: Vec<Tensor>, devices: usize, config: &str) -> Request {
    Request {
        config_json: config.into(),
        ..Request::new(tensors, sims(devices))
    }
}

/// Sizes of a decoder.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) hidden: u64,
    pub(crate) inner: u64,
    /// Rows of queries, and of keys.
    pub(crate) rows: [u64; 2],
    pub(crate) vocabulary: u64,
    pub(crate) biases: bool,
}

pub(crate) const LLAMA: Shape = Shape {
    hidden: 4096,
    inner: 14336,
    rows: [4096, 1024],
    vocabulary: 128_256,
    biases: false,
};

pub(crate) const LLAMA_CONFIG: &str =
    r#"{"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8}"#;

const QWEN2: Shape = Shape {
    hidden: 3584,
    inner: 18944,
    rows: [3584, 512],
    vocabulary: 152_064,
    biases: true,
};

/// What is outside of layers, a table and a head among it.
fn outside(shape: Shape) -> Vec<Tensor> {
    let table = [shape.vocabulary, shape.hidden];
    vec![
        tensor("model.embed_tokens.weight", &table),
        tensor("model.norm.weight", &[shape.hidden]),
        tensor("lm_head.weight", &table),
    ]
}

fn attention(tensors: &mut Vec<Tensor>, layer: &str, shape: Shape) {
    let [queries, keys] = shape.rows;
    for (name, rows) in [("q", queries), ("k", keys), ("v", keys)] {
        let module = format!("{layer}.self_attn.{name}_proj");
        tensors.push(tensor(format!("{module}.weight"), &[rows, shape.hidden]));
        if shape.biases {
            tensors.push(tensor(format!("{module}.bias"), &[rows]));
        }
    }
    let output = format!("{layer}.self_attn.o_proj.weight");
    tensors.push(tensor(output, &[shape.hidden, queries]));
    for norm in ["input_layernorm", "post_attention_layernorm"] {
        tensors.push(tensor(format!("{layer}.{norm}.weight"), &[shape.hidden]));
    }
}

fn layers(count: u64) -> impl Iterator<Item = String> {
    (0..count).map(|number| format!("model.layers.{number}"))
}

/// A model with so many layers of attention and an MLP.
pub(crate) fn dense(shape: Shape, count: u64) -> Vec<Tensor> {
    let mut tensors = outside(shape);
    for layer in layers(count) {
        attention(&mut tensors, &layer, shape);
        for name in ["gate", "up"] {
            let name = format!("{layer}.mlp.{name}_proj.weight");
            tensors.push(tensor(name, &[shape.inner, shape.hidden]));
        }
        let name = format!("{layer}.mlp.down_proj.weight");
        tensors.push(tensor(name, &[shape.hidden, shape.inner]));
    }
    tensors
}

pub(crate) fn llama(devices: usize) -> Request {
    request(dense(LLAMA, 32), devices, LLAMA_CONFIG)
}

pub(crate) fn qwen2(devices: usize) -> Request {
    let config = r#"{"model_type": "qwen2", "num_attention_heads": 28, "num_key_value_heads": 4}"#;
    request(dense(QWEN2, 28), devices, config)
}

/// Qwen3-30B-A3B with four of its layers, each expert with tensors of its own.
pub(crate) fn qwen3_moe(devices: usize) -> Request {
    let shape = Shape {
        hidden: 2048,
        inner: 768,
        rows: [4096, 512],
        vocabulary: 151_936,
        biases: false,
    };
    let mut tensors = outside(shape);
    for layer in layers(4) {
        attention(&mut tensors, &layer, shape);
        for name in ["q_norm", "k_norm"] {
            tensors.push(tensor(format!("{layer}.self_attn.{name}.weight"), &[128]));
        }
        tensors.push(tensor(format!("{layer}.mlp.gate.weight"), &[128, 2048]));
        for expert in 0..128 {
            let expert = format!("{layer}.mlp.experts.{expert}");
            for name in ["gate", "up"] {
                let name = format!("{expert}.{name}_proj.weight");
                tensors.push(tensor(name, &[768, 2048]));
            }
            let name = format!("{expert}.down_proj.weight");
            tensors.push(tensor(name, &[2048, 768]));
        }
    }
    let config = r#"{"model_type": "qwen3_moe", "num_attention_heads": 32, "num_key_value_heads": 4,
                     "num_experts": 128}"#;
    request(tensors, devices, config)
}

/// gpt-oss-20b, its experts decoded.
pub(crate) fn gpt_oss(devices: usize) -> Request {
    let shape = Shape {
        hidden: 2880,
        inner: 2880,
        rows: [4096, 512],
        vocabulary: 201_088,
        biases: true,
    };
    let mut tensors = outside(shape);
    for layer in layers(24) {
        attention(&mut tensors, &layer, shape);
        tensors.push(tensor(format!("{layer}.self_attn.o_proj.bias"), &[2880]));
        tensors.push(tensor(format!("{layer}.self_attn.sinks"), &[64]));
        tensors.push(tensor(format!("{layer}.mlp.router.weight"), &[32, 2880]));
        tensors.push(tensor(format!("{layer}.mlp.router.bias"), &[32]));
        let experts = format!("{layer}.mlp.experts");
        let stack: &[(&str, &[u64])] = &[
            ("gate_up_proj", &[32, 2880, 5760]),
            ("gate_up_proj_bias", &[32, 5760]),
            ("down_proj", &[32, 2880, 2880]),
            ("down_proj_bias", &[32, 2880]),
        ];
        let stack = stack.iter();
        tensors.extend(stack.map(|(name, shape)| tensor(format!("{experts}.{name}"), shape)));
    }
    let config =
        r#"{"model_type": "gpt_oss", "num_attention_heads": 64, "num_key_value_heads": 8}"#;
    request(tensors, devices, config)
}

/// Phi-3-mini: queries, keys and values are one matrix, gate and up another.
pub(crate) fn phi3(devices: usize) -> Request {
    let mut tensors = vec![
        tensor("model.embed_tokens.weight", &[32064, 3072]),
        tensor("lm_head.weight", &[32064, 3072]),
    ];
    for layer in layers(32) {
        let matrices: &[(&str, [u64; 2])] = &[
            ("self_attn.qkv_proj", [9216, 3072]),
            ("self_attn.o_proj", [3072, 3072]),
            ("mlp.gate_up_proj", [16384, 3072]),
            ("mlp.down_proj", [3072, 8192]),
        ];
        for (name, shape) in matrices {
            tensors.push(tensor(format!("{layer}.{name}.weight"), shape));
        }
        tensors.push(tensor(format!("{layer}.input_layernorm.weight"), &[3072]));
    }
    let config = r#"{"model_type": "phi3", "num_attention_heads": 32, "num_key_value_heads": 32}"#;
    request(tensors, devices, config)
}

/// Qwen3.5-35B-A3B with one layer of each kind, its experts as stacks.
pub(crate) fn qwen3_5_moe(devices: usize) -> Request {
    let shape = Shape {
        hidden: 2048,
        inner: 512,
        rows: [8192, 512],
        vocabulary: 248_320,
        biases: false,
    };
    let mut tensors = vec![
        tensor("model.language_model.embed_tokens.weight", &[248_320, 2048]),
        tensor("lm_head.weight", &[248_320, 2048]),
        tensor("model.visual.blocks.0.attn.qkv.weight", &[3456, 1152]),
        tensor("model.visual.blocks.0.mlp.up_proj.weight", &[4304, 1152]),
    ];
    attention(&mut tensors, "model.language_model.layers.1", shape);
    for (name, rows) in [
        ("in_proj_qkv", 8192),
        ("in_proj_z", 4096),
        ("in_proj_a", 32),
    ] {
        let name = format!("model.language_model.layers.0.linear_attn.{name}.weight");
        tensors.push(tensor(name, &[rows, 2048]));
    }
    for layer in [0, 1] {
        let mlp = format!("model.language_model.layers.{layer}.mlp");
        tensors.push(tensor(
            format!("{mlp}.experts.gate_up_proj"),
            &[256, 1024, 2048],
        ));
        tensors.push(tensor(
            format!("{mlp}.experts.down_proj"),
            &[256, 2048, 512],
        ));
        for name in ["gate", "up"] {
            let name = format!("{mlp}.shared_expert.{name}_proj.weight");
            tensors.push(tensor(name, &[512, 2048]));
        }
        let name = format!("{mlp}.shared_expert.down_proj.weight");
        tensors.push(tensor(name, &[2048, 512]));
        tensors.push(tensor(
            format!("{mlp}.shared_expert_gate.weight"),
            &[1, 2048],
        ));
    }
    let config = r#"{"model_type": "qwen3_5_moe", "text_config": {"model_type": "qwen3_5_moe_text",
                     "num_attention_heads": 16, "num_key_value_heads": 2}}"#;
    request(tensors, devices, config)
}
