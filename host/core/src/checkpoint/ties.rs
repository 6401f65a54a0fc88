//! Tensors that go by two names: the embedding that is also the output head.

use super::config::Config;
use super::{CheckpointError, TensorInfo};
use crate::cancel::{CancelToken, Cancelled, Watch};

/// A tensor that the model uses under a second name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tie {
    /// Index of the tensor that is loaded, the embedding.
    pub tensor: usize,
    /// The second name, for example `lm_head.weight`.
    pub alias: String,
    /// Index of the tensor stored under the second name, where the file holds it although the
    /// model is tied. The copy is not needed.
    pub alias_tensor: Option<usize>,
}

/// What ties are made of: a tensor's name, and what two tensors must share to be one.
pub(crate) struct Named<'a> {
    pub(crate) name: &'a str,
    pub(crate) shape: &'a [u64],
}

/// Modules that hold the embedding of the text model, and the head that is tied to each.
const EMBEDDINGS: [(&str, &str); 5] = [
    ("embed_tokens", "lm_head"),
    ("wte", "lm_head"),
    ("word_embeddings", "lm_head"),
    ("tok_embeddings", "lm_head"),
    ("embed_in", "embed_out"),
];

/// Modules between the head's parent and the embedding.
const WRAPPERS: [&str; 6] = [
    "model",
    "transformer",
    "decoder",
    "gpt_neox",
    "backbone",
    "language_model",
];

/// Finds the ties of a model.
///
/// They are stated (`tie_word_embeddings`), or, where nothing is stated, follow from a model that
/// needs an output head and stores none. A stated `false` is believed.
///
/// # Errors
/// [`Cancelled`].
pub(crate) fn find(
    tensors: &[Named<'_>],
    config: Option<&Config>,
    cancel: &CancelToken,
) -> Result<Vec<Tie>, Cancelled> {
    let Some(config) = config else {
        return Ok(Vec::new());
    };
    let mut watch = Watch::new(cancel);
    let tied = match config.tie_word_embeddings {
        Some(stated) => stated,
        None if !config.has_language_head() => false,
        None => {
            let mut has_head = false;
            for tensor in tensors {
                watch.item(2 * tensor.name.len())?;
                has_head |= is_head(tensor.name);
            }
            !has_head
        }
    };
    if !tied {
        return Ok(Vec::new());
    }
    // Of several embeddings, such as those of a vision tower or of a draft model, the outermost.
    let mut embedding: Option<(usize, usize, String)> = None;
    for (i, tensor) in tensors.iter().enumerate() {
        watch.item(2 * tensor.name.len())?;
        let Some(alias) = alias(tensor.name).filter(|_| tensor.shape.len() == 2) else {
            continue;
        };
        let depth = tensor.name.split('.').count();
        if embedding.as_ref().is_none_or(|(least, ..)| depth < *least) {
            embedding = Some((depth, i, alias));
        }
    }
    let Some((_, tensor, alias)) = embedding else {
        return Ok(Vec::new());
    };
    let mut alias_tensor = None;
    for (i, other) in tensors.iter().enumerate() {
        watch.item(0)?;
        if other.name == alias {
            alias_tensor = Some(i);
            break;
        }
    }
    // A head of another shape cannot be the embedding, whatever the configuration says.
    if alias_tensor.is_some_and(|i| tensors[i].shape != tensors[tensor].shape) {
        return Ok(Vec::new());
    }
    Ok(vec![Tie {
        tensor,
        alias,
        alias_tensor,
    }])
}

/// Bytes of each tensor that are held while two are compared.
const COMPARED_BYTES: u64 = 1 << 20;
/// Places at which two tensors are compared first: where they differ, it mostly shows at any of them.
const SAMPLES: u64 = 16;
const SAMPLE_BYTES: u64 = 4096;

/// Returns whether two tensors of a checkpoint are of the same type and shape and hold different bytes.
/// Other pairs are not compared: a head that is quantized, for example, has no bytes to compare with.
///
/// `read` fills a buffer with the bytes of a tensor from some byte on.
///
/// # Errors
/// Those of `read`, and [`CheckpointError::Cancelled`].
pub(crate) fn differ(
    first: &TensorInfo,
    second: &TensorInfo,
    read: impl Fn(&TensorInfo, u64, &mut [u8]) -> Result<(), CheckpointError>,
    cancel: &CancelToken,
) -> Result<bool, CheckpointError> {
    let is_plain = |tensor: &TensorInfo| tensor.quantized.is_none() && tensor.encoded.is_none();
    let plain = is_plain(first) && is_plain(second);
    if !plain || first.dtype != second.dtype || first.shape != second.shape {
        return Ok(false);
    }
    let bytes = first.bytes;
    let mut pieces = [Vec::new(), Vec::new()];
    let mut differ = |start: u64, length: u64| {
        cancel.check()?;
        let length = length.min(bytes - start) as usize;
        for (piece, tensor) in pieces.iter_mut().zip([first, second]) {
            piece.resize(length, 0);
            read(tensor, start, piece)?;
        }
        Ok::<bool, CheckpointError>(pieces[0] != pieces[1])
    };
    if bytes > SAMPLES * SAMPLE_BYTES {
        for sample in 0..SAMPLES {
            if differ(bytes / SAMPLES * sample, SAMPLE_BYTES)? {
                return Ok(true);
            }
        }
    }
    let mut start = 0;
    while start < bytes {
        if differ(start, COMPARED_BYTES)? {
            return Ok(true);
        }
        start += COMPARED_BYTES;
    }
    Ok(false)
}

/// Name of the head that is tied to the embedding of this name; `None` for other tensors.
///
/// The head is a sibling of the text model: `model.embed_tokens` goes with `lm_head`,
/// `model.language_model.embed_tokens` too, `language_model.model.embed_tokens` with
/// `language_model.lm_head`.
fn alias(name: &str) -> Option<String> {
    let module = name.strip_suffix(".weight")?;
    let (mut parent, leaf) = module.rsplit_once('.').unwrap_or(("", module));
    let (_, head) = EMBEDDINGS
        .into_iter()
        .find(|(embedding, _)| *embedding == leaf)?;
    if parent
        .split('.')
        .any(|part| part.contains("vis") || part.contains("encoder") || part == "mtp")
    {
        return None;
    }
    while let Some(part) = parent.rsplit('.').next().filter(|part| !part.is_empty()) {
        let outer = &parent[..parent.len() - part.len()];
        // `language_model` is inside of the model in new checkpoints, and around it in old ones,
        // where it has a head of its own.
        let unwrap = match part {
            "language_model" => outer.ends_with("model."),
            _ => WRAPPERS.contains(&part),
        };
        if !unwrap {
            break;
        }
        parent = outer.strip_suffix('.').unwrap_or(outer);
    }
    Some(if parent.is_empty() {
        format!("{head}.weight")
    } else {
        format!("{parent}.{head}.weight")
    })
}

/// Whether the tensor belongs to an output head, also to a quantized one.
fn is_head(name: &str) -> bool {
    name.split('.')
        .any(|part| matches!(part, "lm_head" | "embed_out" | "output_layer"))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn ties(names: &[&str], config: &str) -> Vec<Tie> {
        let tensors: Vec<Named<'_>> = names
            .iter()
            .map(|name| Named {
                name,
                shape: &[8, 4],
            })
            .collect();
        let config = Config::parse(Path::new("config.json"), config.into()).unwrap();
        find(&tensors, Some(&config), &CancelToken::new()).unwrap()
    }

    #[test]
    fn aliases_have_the_prefix_that_the_model_gives_its_head() {
        let cases = [
            ("model.embed_tokens.weight", Some("lm_head.weight")),
            ("embed_tokens.weight", Some("lm_head.weight")),
            (
                "model.language_model.embed_tokens.weight",
                Some("lm_head.weight"),
            ),
            (
                "language_model.model.embed_tokens.weight",
                Some("language_model.lm_head.weight"),
            ),
            (
                "thinker.model.embed_tokens.weight",
                Some("thinker.lm_head.weight"),
            ),
            ("model.decoder.embed_tokens.weight", Some("lm_head.weight")),
            ("transformer.wte.weight", Some("lm_head.weight")),
            ("wte.weight", Some("lm_head.weight")),
            ("gpt_neox.embed_in.weight", Some("embed_out.weight")),
            ("model.embed_tokens_per_layer.weight", None),
            ("model.visual.embed_tokens.weight", None),
            ("model.embed_tokens.bias", None),
            ("model.layers.0.mlp.up_proj.weight", None),
            ("", None),
            (".weight", None),
        ];
        for (name, expected) in cases {
            assert_eq!(alias(name).as_deref(), expected, "{name}");
        }
    }

    #[test]
    fn a_stated_tie_holds_with_and_without_a_stored_head() {
        let config = r#"{"tie_word_embeddings":true}"#;
        let tie = |alias_tensor| {
            vec![Tie {
                tensor: 1,
                alias: "lm_head.weight".into(),
                alias_tensor,
            }]
        };
        assert_eq!(
            ties(&["model.norm.weight", "model.embed_tokens.weight"], config),
            tie(None)
        );
        assert_eq!(
            ties(
                &[
                    "lm_head.weight",
                    "model.embed_tokens.weight",
                    "model.norm.weight"
                ],
                config
            ),
            tie(Some(0))
        );
    }

    #[test]
    fn an_untied_model_has_no_ties() {
        let both = ["lm_head.weight", "model.embed_tokens.weight"];
        let config = r#"{"architectures":["LlamaForCausalLM"],"tie_word_embeddings":false}"#;
        assert!(ties(&both, config).is_empty());
        assert!(ties(&both[1..], config).is_empty());
        // Nothing stated: the stored head decides.
        assert!(ties(&both, r#"{"architectures":["LlamaForCausalLM"]}"#).is_empty());
    }

    #[test]
    fn a_missing_head_means_a_tie_only_for_models_that_need_one() {
        let names = ["model.embed_tokens.weight"];
        for architecture in ["LlamaForCausalLM", "Gemma3ForConditionalGeneration"] {
            let config = format!(r#"{{"architectures":["{architecture}"]}}"#);
            assert_eq!(ties(&names, &config).len(), 1, "{architecture}");
        }
        assert!(ties(&names, r#"{"architectures":["BertModel"]}"#).is_empty());
        assert!(ties(&names, "{}").is_empty());
    }

    #[test]
    fn a_head_of_another_shape_is_not_the_embedding() {
        let tensors = [
            Named {
                name: "lm_head.weight",
                shape: &[9, 4],
            },
            Named {
                name: "model.embed_tokens.weight",
                shape: &[8, 4],
            },
        ];
        let config = r#"{"tie_word_embeddings":true}"#;
        let config = Config::parse(Path::new("config.json"), config.into()).unwrap();
        for config in [Some(&config), None] {
            let ties = find(&tensors, config, &CancelToken::new()).unwrap();
            assert!(ties.is_empty());
        }
    }
}
