//! The module tree that transformers builds in memory, from what a checkpoint holds on disk.
//!
//! Checkpoints are mostly sorted by name and hold experts one by one; in memory modules stand in
//! the order in which their classes create them, and experts are stacks.

use serde_json::Value;
use tightfit_guest::Request;
use tightfit_guest::names::TensorKind::{Embedding, OutputHead};
use tightfit_guest::names::{kind_of_module, layer_of, side_branch_of};
use tightfit_guest::tree::{ModuleId, Tree};

/// A model as transformers sees it.
#[derive(Debug)]
pub(crate) struct Model<'a> {
    pub(crate) tree: Tree<'a>,
    /// For each module, whether it is one of `_no_split_modules`: a layer of a stack.
    pub(crate) blocks: Vec<bool>,
    /// Tensors with a second name, and the module that has it.
    pub(crate) ties: Vec<(u32, ModuleId)>,
    /// Elements of f32 buffers that a checkpoint does not hold, by module.
    pub(crate) buffers: Vec<(ModuleId, u64)>,
    /// Tensors that transformers does not load: draft layers for multi-token prediction.
    pub(crate) unused: Vec<u32>,
}

impl<'a> Model<'a> {
    pub(crate) fn new(request: &'a Request, duplicates: &[bool]) -> Model<'a> {
        let config = tightfit_guest::config::parse(&request.config_json);
        let drafts_from = drafts_from(&config);
        let mut tree = Tree::new();
        let mut unused = Vec::new();
        for (t, tensor) in request.tensors.iter().enumerate() {
            if duplicates[t] {
                continue;
            }
            if is_draft(&tensor.name, drafts_from) {
                unused.push(t as u32);
            } else {
                let module = tree.module(module_path(&tensor.name));
                tree.add(module, t as u32);
            }
        }
        let mut ties = Vec::new();
        for tie in &request.ties {
            // Two names of which one is the other's module would not be two modules.
            let alias = tree.module(module_path(&tie.alias));
            let known = request.tensors.get(tie.tensor as usize);
            if known.is_some_and(|tensor| !is_draft(&tensor.name, drafts_from)) {
                ties.push((tie.tensor, alias));
            }
        }
        let buffers = add_rotary(&mut tree, &config);
        let blocks = blocks(&tree);
        tree.sort_children(|tree, parent, child| {
            if blocks[parent.index()] {
                return (0, 0);
            }
            place_among_siblings(tree.name(child))
        });
        Model {
            tree,
            blocks,
            ties,
            buffers,
            unused,
        }
    }

    /// Returns whether it is placed whole: a layer, or a module without children.
    pub(crate) fn is_whole(&self, module: ModuleId) -> bool {
        self.blocks[module.index()] || self.tree.children(module).is_empty()
    }
}

/// Returns the modules that hold a tensor in memory. All experts of a layer are one module.
fn module_path(name: &str) -> impl Iterator<Item = &str> {
    let (modules, _) = name.rsplit_once('.').unwrap_or(("", name));
    let mut components = modules.split('.').filter(move |_| !modules.is_empty());
    let mut in_experts = false;
    std::iter::from_fn(move || {
        let component = components.next()?;
        if in_experts && component.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        in_experts = component == "experts";
        Some(match component {
            "block_sparse_moe" => "mlp",
            other => other,
        })
    })
    .fuse()
}

/// Returns the first layer that is a draft layer, where those are counted on from the model's own.
fn drafts_from(config: &Value) -> Option<u32> {
    config["num_nextn_predict_layers"]
        .as_u64()
        .filter(|&n| n > 0)?;
    config["num_hidden_layers"].as_u64()?.try_into().ok()
}

fn is_draft(name: &str, drafts_from: Option<u32>) -> bool {
    if name.split('.').take(2).any(|component| component == "mtp") {
        return true;
    }
    match (drafts_from, layer_of(name)) {
        (Some(first), Some(("model.layers", index))) => index >= first,
        _ => false,
    }
}

fn blocks(tree: &Tree<'_>) -> Vec<bool> {
    let mut blocks = vec![false; tree.len()];
    for module in tree.modules() {
        let name = tree.name(module);
        if !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit()) {
            let path = tree.path(module);
            // Not a layer inside of a layer, nor another numbered module of one.
            blocks[module.index()] = layer_of(&path)
                .is_some_and(|(stack, _)| stack.len() + 1 + name.len() == path.len());
        }
    }
    blocks
}

/// Adds the frequencies of rotary embeddings, which are kept twice, as used and as first computed,
/// beside the stack of layers.
fn add_rotary(tree: &mut Tree<'_>, config: &Value) -> Vec<(ModuleId, u64)> {
    let Some(elements) = rotary_elements(config) else {
        return Vec::new();
    };
    let named =
        |module: &ModuleId, name| tree.children(*module).iter().any(|&c| tree.name(c) == name);
    let decoders: Vec<ModuleId> = tree
        .modules()
        .filter(|module| named(module, "layers") && named(module, "embed_tokens"))
        .collect();
    let buffers = decoders.into_iter().map(|decoder| {
        let rotary = tree.child(decoder, "rotary_emb");
        (rotary, elements)
    });
    buffers.collect()
}

fn rotary_elements(config: &Value) -> Option<u64> {
    let text = match &config["text_config"] {
        Value::Object(_) => &config["text_config"],
        _ => config,
    };
    let has = |key: &str| text.get(key).is_some_and(|value| !value.is_null());
    if !has("rope_theta") && !has("rope_parameters") && !has("rope_scaling") {
        return None;
    }
    let number = |key: &str| text[key].as_u64().filter(|&n| n > 0);
    let dimensions = number("qk_rope_head_dim")
        .or_else(|| number("head_dim"))
        .or_else(|| number("hidden_size")?.checked_div(number("num_attention_heads")?))?;
    let partial = text["partial_rotary_factor"]
        .as_f64()
        .or_else(|| text["rope_parameters"]["partial_rotary_factor"].as_f64())
        .filter(|part| (0.0..=1.0).contains(part))
        .unwrap_or(1.0);
    // Half as many frequencies as dimensions, twice.
    let rotated = (dimensions as f64 * partial) as u64;
    Some(rotated.div_ceil(2).saturating_mul(2))
}

/// Returns where modules of this name stand among their siblings; with equal answers they stay in
/// the checkpoint's order.
fn place_among_siblings(name: &str) -> (u8, u32) {
    if name.bytes().all(|byte| byte.is_ascii_digit()) {
        return (4, name.parse().unwrap_or(u32::MAX));
    }
    let rank = match name {
        "layers" | "h" | "blocks" | "block" | "layer" => 5,
        "norm" | "ln_f" | "final_layer_norm" | "final_layernorm" | "final_norm" => 6,
        "norm_f" | "ln_post" | "post_layernorm" => 6,
        "rotary_emb" => 7,
        "encoder" => 3,
        "decoder" => 4,
        "pooler" => 8,
        _ if side_branch_of(name).is_some() => u8::from(is_connector(name)),
        _ => match kind_of_module(name) {
            Embedding => 2,
            OutputHead => 9,
            _ => 4,
        },
    };
    (rank, 0)
}

/// Returns whether it stands between a tower and the text model.
fn is_connector(name: &str) -> bool {
    name.contains("project") || name.contains("connector") || name.contains("aligner")
}
