//! Adapters, which change a model and are none: LoRA and what else PEFT writes.

use serde::Deserialize;

use super::directory::Directory;
use super::{CheckpointError, MAX_CONFIG_BYTES, TensorInfo, python_json};
use crate::cancel::{CancelToken, Cancelled, Watch};

/// What PEFT writes beside an adapter's weights.
pub(super) const CONFIG: &str = "adapter_config.json";

#[derive(Debug, Default, Deserialize)]
struct AdapterConfig {
    base_model_name_or_path: Option<String>,
    peft_type: Option<String>,
}

/// The error that says which adapter the directory holds, and for which model.
pub(super) fn error(directory: &Directory, cancel: &CancelToken) -> CheckpointError {
    let text = directory.read_text(
        CONFIG,
        "an adapter's configuration (bytes)",
        MAX_CONFIG_BYTES,
        cancel,
    );
    let text = match text {
        Err(CheckpointError::Cancelled) => return CheckpointError::Cancelled,
        other => other.ok().flatten().unwrap_or_default(),
    };
    let config: AdapterConfig = python_json::strict(&text, cancel)
        .ok()
        .and_then(|text| serde_json::from_str(&text).ok())
        .unwrap_or_default();
    CheckpointError::Adapter {
        path: directory.path().into(),
        kind: config.peft_type,
        base: config
            .base_model_name_or_path
            .filter(|base| !base.is_empty()),
    }
}

/// Whether these tensors are those of an adapter and nothing else. Models that have low-rank matrices
/// of their own (Phi-4-multimodal) have others too.
pub(super) fn is_adapter(tensors: &[TensorInfo], cancel: &CancelToken) -> Result<bool, Cancelled> {
    let mut watch = Watch::new(cancel);
    let mut has_low_rank = false;
    for tensor in tensors {
        watch.item(tensor.name.len())?;
        let is_low_rank = tensor.name.split('.').any(is_low_rank);
        if !is_low_rank
            && !tensor.name.starts_with("base_model.model.")
            && !tensor.name.ends_with(".alpha")
        {
            return Ok(false);
        }
        has_low_rank |= is_low_rank;
    }
    Ok(has_low_rank)
}

/// As PEFT, diffusers and kohya's scripts call the parts of an adapter.
fn is_low_rank(component: &str) -> bool {
    const NAMES: [&str; 2] = ["lora", "prompt_embeddings"];
    const PREFIXES: [&str; 6] = ["lora_", "ia3_", "hada_", "lokr_", "oft_", "vera_lambda_"];
    NAMES.contains(&component) || PREFIXES.iter().any(|prefix| component.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use crate::types::DType;

    #[test]
    fn adapters_are_known_by_their_tensors() {
        let is_adapter = |names: &[&str]| {
            let tensor = |name: &&str| testing::tensor(name, DType::F32, &[16, 64]);
            let tensors: Vec<TensorInfo> = names.iter().map(tensor).collect();
            super::is_adapter(&tensors, &CancelToken::new()).unwrap()
        };
        let lora = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
        assert!(is_adapter(&[lora]));
        assert!(is_adapter(&[lora, "base_model.model.lm_head.weight"]));
        assert!(is_adapter(&["unet.down.0.attn.lora.up.weight"]));
        assert!(is_adapter(&[
            "lora_unet_down_0.lora_up.weight",
            "lora_unet_down_0.alpha"
        ]));
        assert!(!is_adapter(&[lora, "model.embed_tokens.weight"]));
        assert!(!is_adapter(&["model.embed_tokens.weight"]));
        assert!(!is_adapter(&["base_model.model.lm_head.weight"]));
        assert!(!is_adapter(&[]));
    }
}
