//! Which files of a model are needed.

use crate::checkpoint::{MAX_CONFIG_BYTES, MAX_INDEX_BYTES};

/// The index of weights in several files.
pub(super) const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// What is needed beside the weights, as far as a model has it.
pub(super) const SMALL: [&str; 12] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
];

/// The most that is downloaded of a file, in bytes, and what kind it is; `None` for weights, of which
/// the hub's length is all that is known. Many times what the largest models have.
pub(super) fn limit(name: &str) -> Option<(u64, &'static str)> {
    const MIB: u64 = 1 << 20;
    match name {
        INDEX => Some((MAX_INDEX_BYTES, "an index")),
        "config.json" => Some((MAX_CONFIG_BYTES, "a configuration")),
        // The largest have 40 MB.
        "tokenizer.json" => Some((256 * MIB, "a tokenizer")),
        "tokenizer.model"
        | "vocab.json"
        | "merges.txt"
        | "added_tokens.json"
        | "tokenizer_config.json" => Some((64 * MIB, "a part of a tokenizer")),
        _ if SMALL.contains(&name) => Some((4 * MIB, "a small file")),
        _ => None,
    }
}

/// The file to begin the weights with, in the order in which a directory's files are looked at.
pub(super) fn weights<'a>(names: &[&'a str]) -> Option<&'a str> {
    for wanted in [SINGLE, INDEX] {
        if let Some(name) = names.iter().find(|name| **name == wanted) {
            return Some(name);
        }
    }
    let mut others = names.iter().filter(|name| {
        name.ends_with(".safetensors") && crate::checkpoint::is_plain_file_name(name)
    });
    match (others.next(), others.next()) {
        (Some(name), None) => Some(name),
        _ => None,
    }
}

/// A file with weights of another kind, to say why nothing was downloaded.
pub(super) fn other_weights<'a>(names: &[&'a str]) -> Option<&'a str> {
    let is_weights = |name: &&&str| {
        [
            ".safetensors",
            ".bin",
            ".pt",
            ".pth",
            ".gguf",
            ".onnx",
            ".h5",
            ".msgpack",
        ]
        .iter()
        .any(|end| name.ends_with(end))
    };
    names.iter().find(is_weights).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_but_weights_has_a_limit() {
        assert!(
            SMALL
                .iter()
                .chain([&INDEX])
                .all(|name| limit(name).is_some())
        );
        assert_eq!(limit(SINGLE), None);
        assert_eq!(limit("model-00001-of-00002.safetensors"), None);
    }

    #[test]
    fn one_file_is_preferred_and_then_the_index() {
        assert_eq!(weights(&[INDEX, "model.safetensors"]), Some(SINGLE));
        assert_eq!(weights(&["a.safetensors", INDEX]), Some(INDEX));
        assert_eq!(
            weights(&["a.safetensors", SINGLE, "pytorch_model.bin"]),
            Some(SINGLE)
        );
        assert_eq!(weights(&["a.safetensors"]), Some("a.safetensors"));
        for none in [
            &["a.safetensors", "b.safetensors"][..],
            &["pytorch_model.bin", "model.gguf"],
            &["onnx/model.safetensors"],
            &["../model.safetensors"],
            &[],
        ] {
            assert_eq!(weights(none), None, "{none:?}");
        }
        assert_eq!(other_weights(&["README.md", "x.gguf"]), Some("x.gguf"));
    }
}
