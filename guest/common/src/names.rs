//! What a tensor's name says: its module, its layer, what it is for.
//!
//! Names are those of Hugging Face checkpoints. The rules follow what transformers leaves out of
//! 4-bit quantization (embeddings, output head, norms, routers, convolutions), except that experts
//! are recognized in all their layouts: one matrix per expert, and stacks of three dimensions.
//!
//! Policies and the host read names by the same rules, so that a report calls a tensor what the
//! policy took it for.
/// What a tensor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TensorKind {
    /// The matrix of a linear layer.
    Linear,
    /// A matrix of one expert, or a stack of those of all experts.
    Expert,
    /// A table that is looked up: tokens, positions, token types.
    Embedding,
    /// What turns hidden states into logits or scores.
    OutputHead,
    /// The scale of a normalization.
    Norm,
    /// Added to something, of any number of dimensions.
    Bias,
    /// Decides which experts a token goes to.
    Router,
    /// A convolution's kernel.
    Convolution,
    /// Anything else: scales of a quantized checkpoint, state-space parameters, buffers.
    Other,
}

/// Containers whose numbered children are layers.
const CONTAINERS: [&str; 8] = [
    "layers",
    "h",
    "blocks",
    "block",
    "layer",
    "resblocks",
    "transformer_blocks",
    "single_transformer_blocks",
];

/// Modules that stand beside the main stack of layers. Besides these: `vision*`, `visual*`,
/// `audio*` and `*projector*`.
const SIDE_BRANCHES: [&str; 12] = [
    "mtp",
    "connector",
    "aligner",
    "embed_vision",
    "embed_audio",
    "image_encoder",
    "img_processor",
    "speech_encoder",
    "modality_projection",
    "talker",
    "code2wav",
    "token2wav",
];

const HEADS: [&str; 7] = [
    "lm_head",
    "lm_heads",
    "embed_out",
    "output_layer",
    "score",
    "classifier",
    "qa_outputs",
];

/// Modules whose `output` turns hidden states into logits.
const LANGUAGE_MODELS: [&str; 5] = ["language_model", "model", "llm", "lm", "text_model"];

const EMBEDDINGS: [&str; 10] = [
    "wte",
    "wpe",
    "wtt",
    "embed",
    "embeds",
    "emb",
    "embedding",
    "embeddings",
    "tok_embeddings",
    "relative_attention_bias",
];

/// Returns the module that a tensor belongs to: its name without `.weight` or `.bias`. A parameter
/// of another name, such as a stack of experts, counts as a module itself.
pub fn module_of(name: &str) -> &str {
    name.strip_suffix(".weight")
        .or_else(|| name.strip_suffix(".bias"))
        .unwrap_or(name)
}

/// Returns the stack of layers that a tensor belongs to and the layer's number in it:
/// `("model.layers", 7)` for `model.layers.7.mlp.up_proj.weight`. Of nested stacks the outer one.
pub fn layer_of(name: &str) -> Option<(&str, u32)> {
    let mut container_end = None;
    let mut start = 0;
    for component in components(name) {
        if let Some(end) = container_end
            && component.as_bytes().first().is_some_and(u8::is_ascii_digit)
            && let Ok(index) = component.parse()
        {
            return Some((&name[..end], index));
        }
        let end = start + component.len();
        container_end = CONTAINERS.contains(&component).then_some(end);
        start = end + 1;
    }
    None
}

/// Returns the side branch that a tensor belongs to, if any: `model.visual` for
/// `model.visual.blocks.0.attn.qkv.weight`. Vision and audio towers, projectors and heads for
/// multi-token prediction are side branches.
pub fn side_branch_of(name: &str) -> Option<&str> {
    let mut start = 0;
    for component in components(name) {
        // What comes below a numbered layer is a part of that layer.
        if component.as_bytes().first().is_some_and(u8::is_ascii_digit) {
            return None;
        }
        let end = start + component.len();
        let is_branch = match component.as_bytes().first() {
            Some(b'v') => component.starts_with("vision") || component.starts_with("visual"),
            Some(b'a') => component.starts_with("audio"),
            _ => false,
        };
        if is_branch || contains(component, "projector") || SIDE_BRANCHES.contains(&component) {
            return Some(&name[..end]);
        }
        start = end + 1;
    }
    None
}

/// Returns what a tensor is for, by its name, its number of dimensions, and whether its elements
/// are floating-point numbers of their own (those of block formats are not).
pub fn kind_of(name: &str, dimensions: usize, is_float: bool) -> TensorKind {
    let (path, leaf) = split_last(name);
    if leaf == "bias" || leaf.ends_with("_bias") {
        return TensorKind::Bias;
    }
    if !is_float || contains(leaf, "scale") {
        return TensorKind::Other;
    }
    // `experts.gate_up_proj` has no `.weight`: the parameter stands where a module would.
    let module = if leaf == "weight" { path } else { name };
    let (parent, last) = split_last(module);
    let below = |component: &str| components(path).any(|c| c == component);

    if below("experts") {
        return if dimensions >= 2 {
            TensorKind::Expert
        } else {
            TensorKind::Other
        };
    }
    if last == "gate"
        || last == "wg" && parent.ends_with("gate")
        || last == "router"
        || below("router")
    {
        return TensorKind::Router;
    }
    if dimensions == 3 && (below("moe") || below("block_sparse_moe")) {
        return TensorKind::Expert;
    }
    if is_head(module, parent, last) {
        return TensorKind::OutputHead;
    }
    if dimensions <= 2 && is_embedding(parent, last) {
        return TensorKind::Embedding;
    }
    // One of several: models with a vocabulary for each of some streams have a list of tables or heads.
    if is_number(last) && dimensions == 2 {
        let (above, list) = split_last(parent);
        if is_head(parent, above, list) {
            return TensorKind::OutputHead;
        }
        if is_table_list(list) && is_embedding(above, list) {
            return TensorKind::Embedding;
        }
    }
    if is_norm(last) {
        return TensorKind::Norm;
    }
    match (leaf == "weight", dimensions) {
        (true, 2) if last == "conv1d" || last == "conv" => TensorKind::Convolution,
        (true, 2) => TensorKind::Linear,
        (true, 3..) => TensorKind::Convolution,
        _ => TensorKind::Other,
    }
}

/// Returns what the weight of a module would be for, by the module's name alone. A name that says
/// nothing is a [`TensorKind::Linear`].
pub fn kind_of_module(module: &str) -> TensorKind {
    kind_of(&format!("{}.weight", module_of(module)), 2, true)
}

fn is_head(module: &str, parent: &str, last: &str) -> bool {
    match last {
        // DeepSeek's multi-token prediction keeps a copy of the output head in its layer.
        "head" => parent.is_empty() || parent.ends_with("shared_head"),
        "output" => parent.is_empty() || LANGUAGE_MODELS.contains(&split_last(parent).1),
        "proj_out" => parent.is_empty(),
        "decoder" => parent.ends_with("predictions"),
        _ => (HEADS.contains(&last) || last.ends_with("_lm_head")) && layer_of(module).is_none(),
    }
}

fn is_embedding(parent: &str, last: &str) -> bool {
    (last.starts_with("embed_") && !last.ends_with("_proj"))
        || last.ends_with("_embeds")
        || (last.ends_with("_emb") && is_table_list(last))
        || last.ends_with("_embeds_layer")
        || last.ends_with("_embeds_layers")
        || last.ends_with("_embeddings_table")
        || last.ends_with("_embed")
        || last.ends_with("_embedding")
        || last.ends_with("_embeddings")
        || last.ends_with("position_embedding_table")
        || EMBEDDINGS.contains(&last)
        || (last == "shared" && parent.is_empty())
}

/// Returns whether what is called so, or a list of them, can be tables. Times and labels are embedded by
/// linear layers in diffusion models, whose numbers are places in a sequence.
fn is_table_list(list: &str) -> bool {
    !contains(list, "time")
        && !contains(list, "label")
        && !contains(list, "patch")
        && list != "embedding"
}

fn is_number(component: &str) -> bool {
    !component.is_empty() && component.bytes().all(|byte| byte.is_ascii_digit())
}

fn is_norm(last: &str) -> bool {
    let ln = last.strip_prefix("ln");
    contains(last, "norm")
        || contains(last, "Norm")
        || ln.is_some_and(|rest| rest.is_empty() || rest.starts_with(['_', '0', '1', '2', '3']))
}

// A model may have 100,000 tensors and a policy's fuel is bounded. Over strings this short, plain
// loops take a tenth of the instructions of the standard library's searchers.

fn components(name: &str) -> impl Iterator<Item = &str> {
    let mut rest = Some(name);
    std::iter::from_fn(move || {
        let text = rest?;
        let dot = text.bytes().position(|b| b == b'.');
        rest = dot.map(|dot| &text[dot + 1..]);
        Some(dot.map_or(text, |dot| &text[..dot]))
    })
}

fn split_last(name: &str) -> (&str, &str) {
    match name.bytes().rposition(|b| b == b'.') {
        Some(dot) => (&name[..dot], &name[dot + 1..]),
        None => ("", name),
    }
}

fn contains(text: &str, part: &str) -> bool {
    let (text, part) = (text.as_bytes(), part.as_bytes());
    text.windows(part.len())
        .any(|window| window[0] == part[0] && window == part)
}

#[cfg(test)]
mod tests;
