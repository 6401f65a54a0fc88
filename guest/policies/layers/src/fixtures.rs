//! Models to place, made up here: names and shapes as their checkpoints have them.

use tightfit_guest::{Device, DeviceKind, Dtype, Request, Tensor, Tie};

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const GIB: u64 = 1 << 30;

pub(crate) fn tensor(name: impl Into<String>, shape: &[u64]) -> Tensor {
    Tensor::new(name, Dtype::Bf16, shape)
}

pub(crate) fn device(kind: DeviceKind, available: u64) -> Device {
    Device {
        name: format!("{kind:?}"),
        kind,
        capacity: available,
        available,
        granularity: if kind == DeviceKind::Cpu {
            4096
        } else {
            2 * MIB
        },
    }
}

/// Stand-ins with this much memory each.
pub(crate) fn sims(available: &[u64]) -> Vec<Device> {
    let sim = |&available: &u64| device(DeviceKind::Sim, available);
    available.iter().map(sim).collect()
}

pub(crate) fn request(tensors: Vec<Tensor>, devices: Vec<Device>) -> Request {
    Request::new(tensors, devices)
}

pub(crate) fn with(mut request: Request, settings: &[(&str, &str)]) -> Request {
    let owned = |&(name, value): &(&str, &str)| (name.to_owned(), value.to_owned());
    request.settings = settings.iter().map(owned).collect();
    request
}

/// Sizes of a decoder.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) layers: u64,
    pub(crate) hidden: u64,
    pub(crate) inner: u64,
    pub(crate) kv: u64,
    pub(crate) vocabulary: u64,
}

pub(crate) const QWEN2_7B: Shape = Shape {
    layers: 28,
    hidden: 3584,
    inner: 18_944,
    kv: 512,
    vocabulary: 152_064,
};

pub(crate) const TINY: Shape = Shape {
    layers: 2,
    hidden: 128,
    inner: 320,
    kv: 64,
    vocabulary: 256,
};

/// Qwen2, sorted by name as `save_pretrained` sorts: the head first, layer 10 before layer 2.
pub(crate) fn qwen2(shape: Shape) -> Vec<Tensor> {
    let mut tensors = llama(shape);
    for layer in 0..shape.layers {
        for (module, rows) in [("q", shape.hidden), ("k", shape.kv), ("v", shape.kv)] {
            let name = format!("model.layers.{layer}.self_attn.{module}_proj.bias");
            tensors.push(tensor(name, &[rows]));
        }
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    tensors
}

pub(crate) fn llama(shape: Shape) -> Vec<Tensor> {
    let Shape { hidden, inner, .. } = shape;
    let mut tensors = around_layers("model", shape);
    for layer in 0..shape.layers {
        let layer = format!("model.layers.{layer}");
        attention(&mut tensors, &layer, shape);
        matrix(&mut tensors, &layer, "mlp.gate_proj", inner, hidden);
        matrix(&mut tensors, &layer, "mlp.up_proj", inner, hidden);
        matrix(&mut tensors, &layer, "mlp.down_proj", hidden, inner);
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    tensors
}

pub(crate) fn mixtral(shape: Shape, experts: u64) -> Vec<Tensor> {
    let names = ["w1", "w3", "w2"];
    per_expert(shape, experts, "block_sparse_moe", names)
}

pub(crate) fn qwen3_moe(shape: Shape, experts: u64) -> Vec<Tensor> {
    let mut tensors = per_expert(shape, experts, "mlp", ["gate_proj", "up_proj", "down_proj"]);
    for layer in 0..shape.layers {
        for norm in ["q_norm", "k_norm"] {
            let name = format!("model.layers.{layer}.self_attn.{norm}.weight");
            tensors.push(tensor(name, &[32]));
        }
    }
    tensors
}

fn per_expert(shape: Shape, experts: u64, block: &str, names: [&str; 3]) -> Vec<Tensor> {
    let Shape { hidden, inner, .. } = shape;
    let mut tensors = around_layers("model", shape);
    for layer in 0..shape.layers {
        let layer = format!("model.layers.{layer}");
        attention(&mut tensors, &layer, shape);
        matrix(
            &mut tensors,
            &layer,
            &format!("{block}.gate"),
            experts,
            hidden,
        );
        for expert in 0..experts {
            let block = format!("{block}.experts.{expert}");
            for (name, rows, columns) in [
                (names[0], inner, hidden),
                (names[1], inner, hidden),
                (names[2], hidden, inner),
            ] {
                matrix(
                    &mut tensors,
                    &layer,
                    &format!("{block}.{name}"),
                    rows,
                    columns,
                );
            }
        }
    }
    tensors
}

/// Qwen3.5-MoE with fused experts, a vision tower and a head for multi-token prediction. Every
/// fourth layer has full attention.
pub(crate) fn qwen3_5_moe(shape: Shape, experts: u64) -> Vec<Tensor> {
    let Shape { hidden, inner, .. } = shape;
    let mut tensors = around_layers("model.language_model", shape);
    for layer in 0..shape.layers {
        let at = format!("model.language_model.layers.{layer}");
        if layer % 4 == 3 {
            attention(&mut tensors, &at, shape);
        } else {
            for (module, rows) in [("in_proj_qkv", 2 * hidden), ("in_proj_z", hidden)] {
                matrix(
                    &mut tensors,
                    &at,
                    &format!("linear_attn.{module}"),
                    rows,
                    hidden,
                );
            }
            matrix(&mut tensors, &at, "linear_attn.in_proj_a", 4, hidden);
            matrix(&mut tensors, &at, "linear_attn.in_proj_b", 4, hidden);
            matrix(&mut tensors, &at, "linear_attn.out_proj", hidden, hidden);
            let conv = [2 * hidden, 1, 4];
            tensors.push(tensor(format!("{at}.linear_attn.conv1d.weight"), &conv));
            tensors.push(tensor(format!("{at}.linear_attn.A_log"), &[4]));
            tensors.push(tensor(format!("{at}.linear_attn.dt_bias"), &[4]));
            tensors.push(tensor(format!("{at}.linear_attn.norm.weight"), &[32]));
        }
        matrix(&mut tensors, &at, "mlp.gate", experts, hidden);
        matrix(&mut tensors, &at, "mlp.shared_expert_gate", 1, hidden);
        matrix(
            &mut tensors,
            &at,
            "mlp.shared_expert.up_proj",
            inner,
            hidden,
        );
        let stack = [experts, 2 * inner, hidden];
        tensors.push(tensor(format!("{at}.mlp.experts.gate_up_proj"), &stack));
        let stack = [experts, hidden, inner];
        tensors.push(tensor(format!("{at}.mlp.experts.down_proj"), &stack));
    }
    for block in 0..3 {
        let at = format!("model.visual.blocks.{block}");
        matrix(&mut tensors, &at, "attn.qkv", 3 * hidden, hidden);
        tensors.push(tensor(format!("{at}.norm1.weight"), &[hidden]));
    }
    matrix(
        &mut tensors,
        "model.visual",
        "merger.linear_fc1",
        hidden,
        hidden,
    );
    tensors.push(tensor("model.visual.pos_embed.weight", &[64, hidden]));
    let patch = [hidden, 3, 2, 16, 16];
    tensors.push(tensor("model.visual.patch_embed.proj.weight", &patch));
    matrix(&mut tensors, "mtp", "fc", hidden, 2 * hidden);
    matrix(
        &mut tensors,
        "mtp.layers.0",
        "self_attn.q_proj",
        hidden,
        hidden,
    );
    tensors
}

/// A head that shares the embedding's data, stored twice or once.
pub(crate) fn tie(request: &mut Request, stored: bool) {
    let index = |name: &str| {
        request
            .tensors
            .iter()
            .position(|tensor| tensor.name == name)
    };
    let alias = "lm_head.weight";
    let head = index(alias).expect("the model has a head");
    if !stored {
        request.tensors.remove(head);
    }
    let index = |name: &str| {
        request
            .tensors
            .iter()
            .position(|tensor| tensor.name == name)
    };
    let embedding = index("model.embed_tokens.weight").expect("the model has an embedding");
    request.ties.push(Tie {
        tensor: embedding as u32,
        alias: alias.into(),
        alias_tensor: stored.then_some(head as u32),
    });
}

fn around_layers(prefix: &str, shape: Shape) -> Vec<Tensor> {
    let table = [shape.vocabulary, shape.hidden];
    vec![
        tensor("lm_head.weight", &table),
        tensor(format!("{prefix}.norm.weight"), &[shape.hidden]),
        tensor(format!("{prefix}.embed_tokens.weight"), &table),
    ]
}

fn attention(tensors: &mut Vec<Tensor>, layer: &str, shape: Shape) {
    let Shape { hidden, kv, .. } = shape;
    tensors.push(tensor(format!("{layer}.input_layernorm.weight"), &[hidden]));
    for (module, rows) in [("q", hidden), ("k", kv), ("v", kv), ("o", hidden)] {
        matrix(
            tensors,
            layer,
            &format!("self_attn.{module}_proj"),
            rows,
            hidden,
        );
    }
    tensors.push(tensor(
        format!("{layer}.post_attention_layernorm.weight"),
        &[hidden],
    ));
}

fn matrix(tensors: &mut Vec<Tensor>, layer: &str, module: &str, rows: u64, columns: u64) {
    tensors.push(tensor(format!("{layer}.{module}.weight"), &[rows, columns]));
}

/// SplitMix64: the same cases on every run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % bound
    }

    pub(crate) fn one_of<T: Copy>(&mut self, choice: &[T]) -> T {
        choice[self.below(choice.len() as u64) as usize]
    }
}
