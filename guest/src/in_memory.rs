//! What transformers 5 calls a checkpoint's tensors once they are loaded.
//!
//! Device maps (`hf_device_map`) name modules of the model in memory. For some architectures the
//! checkpoint has other names, which transformers converts while loading. The rules, as its
//! `conversion_mapping.py` and its vision-language models have them:
//!
//! | in the checkpoint | in memory |
//! |---|---|
//! | `*.block_sparse_moe.*` (Mixtral, MiniMax) | `*.mlp.*` |
//! | `*.experts.N.gate_proj.weight`, `.up_proj.weight`, `.w1.weight`, `.w3.weight` | `*.experts.gate_up_proj` |
//! | `*.experts.N.down_proj.weight`, `.w2.weight` | `*.experts.down_proj` |
//! | `language_model.model.*` (LLaVA and others) | `model.language_model.*` |
//! | `language_model.lm_head.*` | `lm_head.*` |
//! | `vision_tower.*`, `multi_modal_projector.*`, `visual.*` | `model.vision_tower.*` and so on |
//! | `model.*` beside `visual.*` (Qwen2-VL) | `model.language_model.*` |

use crate::Request;

/// Modules that moved into `model` as they are.
const MOVED: [&str; 3] = ["vision_tower.", "multi_modal_projector.", "visual."];

/// What Mixtral's checkpoint calls the block that is `mlp` everywhere else.
const SPARSE: &str = ".block_sparse_moe.";

/// Translates the names of one checkpoint.
#[derive(Debug, Clone, Copy)]
pub struct InMemory {
    /// A vision tower stands beside the language model, which then is not all of `model`.
    beside_vision: bool,
}

impl InMemory {
    /// For the tensors of `request`.
    pub fn new(request: &Request) -> InMemory {
        let mut names = request.tensors.iter().map(|tensor| &tensor.name);
        InMemory {
            beside_vision: names.any(|name| name.starts_with("visual.")),
        }
    }

    /// Returns the name in memory; `None` when it is the same.
    pub fn name(&self, name: &str) -> Option<String> {
        let moved = self.moved(name);
        let name = moved.as_deref().unwrap_or(name);
        let renamed = find(name, SPARSE).map(|at| {
            let (before, after) = (&name[..at], &name[at + SPARSE.len()..]);
            format!("{before}.mlp.{after}")
        });
        let name = renamed.as_deref().unwrap_or(name);
        fused(name).or(renamed).or(moved)
    }

    fn moved(&self, name: &str) -> Option<String> {
        if let Some(rest) = name.strip_prefix("language_model.") {
            return if let Some(rest) = rest.strip_prefix("model.") {
                Some(format!("model.language_model.{rest}"))
            } else if rest.starts_with("lm_head.") {
                Some(rest.to_owned())
            } else {
                None
            };
        }
        if MOVED.iter().any(|module| name.starts_with(module)) {
            return Some(format!("model.{name}"));
        }
        let rest = name.strip_prefix("model.")?;
        let inside = rest.starts_with("language_model.") || rest.starts_with("visual.");
        (self.beside_vision && !inside).then(|| format!("model.language_model.{rest}"))
    }
}

/// Returns the stack that a matrix of one expert becomes a part of.
fn fused(name: &str) -> Option<String> {
    let module = name.strip_suffix(".weight")?;
    let (expert, matrix) = split_last(module)?;
    let (experts, number) = split_last(expert)?;
    let stack = match matrix {
        "gate_proj" | "up_proj" | "w1" | "w3" => "gate_up_proj",
        "down_proj" | "w2" => "down_proj",
        _ => return None,
    };
    let numbered = !number.is_empty() && number.bytes().all(|c| c.is_ascii_digit());
    let is_expert = numbered && (experts == "experts" || experts.ends_with(".experts"));
    is_expert.then(|| format!("{experts}.{stack}"))
}

// Over strings this short, plain loops take far less fuel than the standard library's searchers.

fn find(name: &str, part: &str) -> Option<usize> {
    let (name, part) = (name.as_bytes(), part.as_bytes());
    // All parts begin with a dot: the second byte says more.
    name.windows(part.len())
        .position(|window| window[1] == part[1] && window == part)
}

fn split_last(name: &str) -> Option<(&str, &str)> {
    let dot = name.bytes().rposition(|c| c == b'.')?;
    Some((&name[..dot], &name[dot + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_change_as_transformers_changes_them() {
        let plain = InMemory {
            beside_vision: false,
        };
        for (name, expected) in [
            ("model.layers.3.mlp.up_proj.weight", None),
            (
                "model.layers.3.mlp.experts.17.up_proj.weight",
                Some("model.layers.3.mlp.experts.gate_up_proj"),
            ),
            (
                "model.layers.3.block_sparse_moe.experts.1.w2.weight",
                Some("model.layers.3.mlp.experts.down_proj"),
            ),
            (
                "model.layers.3.block_sparse_moe.gate.weight",
                Some("model.layers.3.mlp.gate.weight"),
            ),
            ("model.layers.3.mlp.shared_experts.up_proj.weight", None),
            ("model.layers.3.mlp.experts.gate_up_proj", None),
            ("x.experts.a.up_proj.weight", None),
            ("x.experts..up_proj.weight", None),
            (
                "language_model.model.layers.0.mlp.experts.2.w1.weight",
                Some("model.language_model.layers.0.mlp.experts.gate_up_proj"),
            ),
            ("language_model.lm_head.weight", Some("lm_head.weight")),
            ("vision_tower.x.weight", Some("model.vision_tower.x.weight")),
            ("model.visual.x.weight", None),
            ("", None),
        ] {
            assert_eq!(plain.name(name).as_deref(), expected, "{name}");
        }
        let beside = InMemory {
            beside_vision: true,
        };
        for (name, expected) in [
            (
                "model.layers.0.x.weight",
                Some("model.language_model.layers.0.x.weight"),
            ),
            ("visual.x.weight", Some("model.visual.x.weight")),
            ("model.visual.x.weight", None),
            ("lm_head.weight", None),
        ] {
            assert_eq!(beside.name(name).as_deref(), expected, "{name}");
        }
    }
}
