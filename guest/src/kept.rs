//! What stays as stored because of what the checkpoint is, whatever the user sets.

use std::collections::BTreeMap;

use crate::config::{self, Value};
use crate::names::{layer_of, module_of};
use crate::{Request, Tensor};

/// Model types whose layers are of transformers' `Conv1D`.
const CONV1D_MODELS: [&str; 6] = [
    "gpt2",
    "openai-gpt",
    "imagegpt",
    "decision_transformer",
    "clvp",
    "clvp_decoder",
];

/// For each tensor, whether it is the matrix of a `Conv1D`, as GPT-2 and its kin have them in place of
/// linear layers: its rows are inputs and its columns outputs.
///
/// The projection of attention (`c_attn`) tells by its shape, which has at least as many outputs as inputs;
/// where that is missing or square, the model type in config.json does.
pub fn transposed(request: &Request) -> Vec<bool> {
    let mut transposed = vec![false; request.tensors.len()];
    // The two ways round, by stack of layers: other parts of a larger model are linear.
    let mut stacks: BTreeMap<&str, Option<bool>> = BTreeMap::new();
    let mut matrices: Vec<(usize, &str)> = Vec::new();
    for (t, tensor) in request.tensors.iter().enumerate() {
        let Some((module, "weight")) = tensor.name.rsplit_once('.') else {
            continue;
        };
        let name = module.rsplit('.').next();
        if !matches!(name, Some("c_attn" | "q_attn" | "c_proj" | "c_fc")) {
            continue;
        }
        let (Some((stack, _)), [rows, columns]) = (layer_of(&tensor.name), &tensor.shape[..])
        else {
            continue;
        };
        matrices.push((t, stack));
        let found = stacks.entry(stack).or_default();
        if name == Some("c_attn") && rows != columns {
            // One that says otherwise makes the whole stack linear: nothing is transposed in doubt.
            *found = Some(rows < columns && *found != Some(false));
        }
    }
    if matrices.is_empty() {
        return transposed;
    }
    let by_type = stacks.values().any(Option::is_none) && is_conv1d_model(&request.config_json);
    for (t, stack) in matrices {
        transposed[t] = stacks[stack].unwrap_or(by_type);
    }
    transposed
}

fn is_conv1d_model(config_json: &str) -> bool {
    let config = config::parse(config_json);
    let mut found = false;
    config::visit(&config, &mut |key, value| {
        found |= key == "model_type"
            && value
                .as_str()
                .is_some_and(|name| CONV1D_MODELS.contains(&name));
    });
    found
}

/// For each tensor, whether it is of a module that a checkpoint in 4 bits has left as it was on purpose
/// (`llm_int8_skip_modules`).
pub(crate) fn skipped(request: &Request) -> Vec<bool> {
    let mut skipped = vec![false; request.tensors.len()];
    if request
        .tensors
        .iter()
        .all(|tensor| tensor.quantized.is_none())
    {
        return skipped;
    }
    let root = config::parse(&request.config_json);
    let found = match &root["quantization_config"] {
        own @ Value::Object(_) => own,
        // Models of several parts have it beside the one that is quantized.
        _ => &config::language_model(&root)["quantization_config"],
    };
    let lists = ["llm_int8_skip_modules", "modules_to_not_convert"];
    let lists = lists.iter().filter_map(|key| found[*key].as_array());
    let names = lists.flatten().filter_map(Value::as_str);
    mark(&request.tensors, names, &mut skipped);
    skipped
}

/// Marks the tensors whose modules are named, as transformers matches names: by the beginning of a module's
/// or its end (version 5), or by whole components within (version 4).
///
/// There may be as many names as tensors, so that names are looked up among tensors that are sorted.
fn mark<'a>(tensors: &[Tensor], names: impl Iterator<Item = &'a str>, marked: &mut [bool]) {
    let modules = || {
        // Others stay as stored in any case.
        let open = tensors
            .iter()
            .enumerate()
            .filter(|(_, tensor)| tensor.is_quantizable());
        open.map(|(t, tensor)| (module_of(&tensor.name), t))
    };
    let mut whole: Vec<(&str, usize)> = modules().collect();
    let mut backward: Vec<(String, usize)> = modules()
        .map(|(module, t)| (backwards(module), t))
        .collect();
    let mut inner: Vec<(&str, usize)> = modules()
        .flat_map(|(module, t)| {
            let dots = module.match_indices('.');
            dots.map(move |(dot, _)| (&module[dot + 1..], t))
        })
        .collect();
    whole.sort_unstable();
    backward.sort_unstable();
    inner.sort_unstable();
    for name in names
        .map(|name| name.trim_matches('.'))
        .filter(|name| !name.is_empty())
    {
        for &(_, t) in beginning_with(&whole, name) {
            marked[t] = true;
        }
        let name_backwards = backwards(name);
        for (_, t) in beginning_with(&backward, &name_backwards) {
            marked[*t] = true;
        }
        for (rest, t) in beginning_with(&inner, name) {
            if rest.as_bytes().get(name.len()) == Some(&b'.') {
                marked[*t] = true;
            }
        }
    }
}

/// Returns those of sorted texts that begin so.
fn beginning_with<'s, T: AsRef<str>>(
    sorted: &'s [(T, usize)],
    beginning: &str,
) -> &'s [(T, usize)] {
    let from = sorted.partition_point(|(text, _)| text.as_ref() < beginning);
    let rest = &sorted[from..];
    let end = rest.partition_point(|(text, _)| text.as_ref().starts_with(beginning));
    &rest[..end]
}

fn backwards(name: &str) -> String {
    name.chars().rev().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    fn tensor(name: &str, shape: &[u64]) -> Tensor {
        Tensor::new(name, Dtype::Bf16, shape)
    }

    fn transposed_names(tensors: &[(&str, &[u64])], config: &str) -> Vec<String> {
        let tensors: Vec<Tensor> = tensors
            .iter()
            .map(|(name, shape)| tensor(name, shape))
            .collect();
        let request = Request {
            config_json: config.into(),
            ..Request::new(tensors, vec![])
        };
        let found = transposed(&request);
        let both = request.tensors.iter().zip(found);
        both.filter(|(_, found)| *found)
            .map(|(tensor, _)| tensor.name.clone())
            .collect()
    }

    #[test]
    fn conv1d_lies_the_other_way_round() {
        let gpt2: &[(&str, &[u64])] = &[
            ("wte.weight", &[256, 64]),
            ("h.0.attn.c_attn.weight", &[64, 192]),
            ("h.0.attn.c_attn.bias", &[192]),
            ("h.0.attn.c_proj.weight", &[64, 64]),
            ("h.0.mlp.c_fc.weight", &[64, 256]),
            ("h.0.mlp.c_proj.weight", &[256, 64]),
            ("encoder.layer.0.mlp.c_fc.weight", &[256, 64]),
        ];
        let all = [
            "h.0.attn.c_attn.weight",
            "h.0.attn.c_proj.weight",
            "h.0.mlp.c_fc.weight",
            "h.0.mlp.c_proj.weight",
        ];
        for config in ["{}", r#"{"model_type": "gpt2"}"#] {
            let found = transposed_names(&gpt2[..6], config);
            assert_eq!(found, all, "{config}");
        }
        // The encoder beside it is of another kind.
        assert_eq!(transposed_names(gpt2, "{}"), all);
        // GPT-BigCode and Qwen have the names, and linear layers.
        let linear: &[(&str, &[u64])] = &[
            ("transformer.h.0.attn.c_attn.weight", &[96, 64]),
            ("transformer.h.0.attn.c_proj.weight", &[64, 64]),
            ("transformer.h.0.mlp.c_fc.weight", &[256, 64]),
        ];
        for config in ["{}", r#"{"model_type": "gpt2"}"#] {
            assert!(transposed_names(linear, config).is_empty());
        }
        // Nothing but the type tells where the projection of attention lies.
        let some = &gpt2[4..6];
        assert!(transposed_names(some, "{}").is_empty());
        assert!(transposed_names(some, r#"{"model_type": "clip"}"#).is_empty());
        let nested = r#"{"decoder": {"model_type": "gpt2"}}"#;
        assert_eq!(transposed_names(some, nested), all[2..]);
    }

    fn is_marked(name: &str, skipped: &[&str]) -> bool {
        let others = ["a.b.c.weight", "z.weight", "model.layers.2.mlp.weight"];
        let mut tensors: Vec<Tensor> = others.iter().map(|name| tensor(name, &[8, 8])).collect();
        tensors.insert(1, tensor(name, &[8, 8]));
        let mut marked = vec![false; 4];
        mark(&tensors, skipped.iter().copied(), &mut marked);
        marked[1]
    }

    #[test]
    fn skipped_modules_match_as_in_transformers() {
        let skipped = [
            "lm_head",
            "model.layers.1",
            "vision_tower",
            "mlp.down_proj",
            "layers.3.self_attn",
            "",
        ];
        for (name, matches) in [
            ("lm_head.weight", true),
            ("language_model.lm_head.weight", true),
            ("model.layers.1.mlp.up_proj.weight", true),
            // A beginning need not end at a dot.
            ("model.layers.12.mlp.up_proj.weight", true),
            ("model.layers.2.mlp.up_proj.weight", false),
            ("model.layers.2.mlp.down_proj.weight", true),
            ("model.layers.3.self_attn.q_proj.weight", true),
            ("model.layers.3.mlp.up_proj.weight", false),
            ("model.vision_tower.blocks.0.fc1.weight", true),
            ("model.visions.fc1.weight", false),
        ] {
            assert_eq!(is_marked(name, &skipped), matches, "{name}");
        }
        assert!(!is_marked("a.weight", &[]));
    }

    #[test]
    fn a_name_is_found_among_others_with_its_beginning() {
        let skipped = ["a.b.c", "a.b.z", "a.b.d"];
        assert!(is_marked("a.b.z.y.weight", &skipped));
        assert!(!is_marked("a.b.y.z.weight", &skipped));
        assert!(is_marked("m.a.b.c.y.weight", &skipped));
        assert!(!is_marked("m.a.b.cc.y.weight", &skipped));
    }
}
