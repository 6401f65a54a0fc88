//! `config.json`: the few facts about the model that placement depends on.
//!
//! Key names are those of transformers' configuration classes, old spellings included. A value of
//! another type or outside of what any model has is treated as absent: models in the wild carry
//! lists and strings under these keys, and nothing here may decide over memory safety.

use std::path::Path;

use serde_json::{Map, Value};

use super::directory::Directory;
use super::file_kind::FileKind;
use super::{CheckpointError, method, python_json};
use crate::cancel::CancelToken;

/// Largest `config.json` that is read, in bytes.
pub const MAX_CONFIG_BYTES: u64 = 4 << 20;

const NAME: &str = "config.json";
/// Most values in it. Parsed, a value can take a hundred times as much memory as in the file: an
/// object with one member takes 600 bytes. Real ones have some thousands, those with the labels of a
/// classifier or the modules that are not quantized some ten thousands.
const MAX_VALUES: usize = 200_000;

const WHAT: &str = "the configuration";

/// What kind of mixing a layer does over the sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LayerType {
    /// Attention over the whole context.
    FullAttention,
    /// Attention over the last [`Config::sliding_window`] tokens.
    SlidingAttention,
    /// A recurrent state of fixed size instead of a cache of keys and values.
    LinearAttention,
    /// Another kind, one that this version does not know.
    Other,
}

impl LayerType {
    fn from_name(name: &str) -> LayerType {
        match name {
            "full_attention" => LayerType::FullAttention,
            "sliding_attention" | "chunked_attention" => LayerType::SlidingAttention,
            "linear_attention" => LayerType::LinearAttention,
            _ => LayerType::Other,
        }
    }
}

/// The configuration of a model. Sizes are those of its text model where it has several models.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The file as it is. Python's `NaN` and `Infinity`, which it may hold, are no JSON: see
    /// [`Config::strict_text`].
    pub text: String,
    /// The same as JSON, where the file is not.
    strict: Option<String>,
    /// The same, parsed; always an object.
    pub json: Value,
    /// The first of `architectures`, for example `Qwen2ForCausalLM`.
    pub architecture: Option<String>,
    /// For example `qwen2`.
    pub model_type: Option<String>,
    /// `model_type` of the text model; the same as above unless it is nested.
    pub text_model_type: Option<String>,
    /// Layers of the text model.
    pub num_hidden_layers: Option<u32>,
    /// Whether the output head is the embedding, where the configuration says so.
    pub tie_word_embeddings: Option<bool>,
    /// Rows of the embedding.
    pub vocab_size: Option<u64>,
    /// Elements of a hidden state.
    pub hidden_size: Option<u64>,
    /// Heads of queries.
    pub num_attention_heads: Option<u32>,
    /// Heads of keys and values; those of queries where the configuration says nothing else.
    pub num_key_value_heads: Option<u32>,
    /// Elements of a head; hidden size over heads where the configuration says nothing else.
    pub head_dim: Option<u32>,
    /// Kind of every layer, from `layer_types` or `full_attention_interval`. Empty when the
    /// configuration does not tell; otherwise `num_hidden_layers` long.
    pub layer_types: Vec<LayerType>,
    /// Tokens that sliding attention looks back, where it is in use.
    pub sliding_window: Option<u64>,
}

impl Config {
    /// Reads `config.json` of a directory; `None` where there is none.
    pub(crate) fn read(
        directory: &Directory,
        cancel: &CancelToken,
    ) -> Result<Option<Config>, CheckpointError> {
        match directory.read_text(NAME, "a configuration (bytes)", MAX_CONFIG_BYTES, cancel)? {
            Some(text) => {
                let kind = FileKind::of(text.as_bytes());
                Config::parse(&directory.path().join(NAME), text)
                    .map(Some)
                    .map_err(|error| error.or_kind(kind))
            }
            None => Ok(None),
        }
    }

    /// Parses the text of the file at `path`, which is named in errors only. It may be JSON as Python
    /// writes it.
    ///
    /// # Errors
    /// [`CheckpointError::Json`], [`CheckpointError::NotAnObject`], and
    /// [`CheckpointError::TooLarge`] for too many values.
    pub fn parse(path: &Path, text: String) -> Result<Config, CheckpointError> {
        let have = most_values(&text);
        if have > MAX_VALUES {
            return Err(CheckpointError::TooLarge {
                path: path.into(),
                what: "a number of values in the configuration",
                have: have as u64,
                limit: MAX_VALUES as u64,
            });
        }
        let strict = python_json::strict(&text, &CancelToken::new())?;
        let json: Value =
            serde_json::from_str(&strict).map_err(|source| CheckpointError::Json {
                path: path.into(),
                what: WHAT,
                source,
            })?;
        let Value::Object(top) = &json else {
            return Err(CheckpointError::NotAnObject {
                path: path.into(),
                what: WHAT,
            });
        };
        let model = text_config(top);
        let num_hidden_layers = small(model, &["num_hidden_layers", "n_layer", "num_layers"]);
        let hidden_size = integer(model, &["hidden_size", "n_embd", "d_model"], 1 << 24);
        let heads = small(model, &["num_attention_heads", "n_head", "num_heads"]);
        let architecture = top.get("architectures").and_then(|list| match list {
            Value::Array(list) => string(list.first()),
            _ => None,
        });
        let model_type = string(top.get("model_type"));
        let config = Config {
            architecture,
            text_model_type: string(model.get("model_type")).or_else(|| model_type.clone()),
            model_type,
            num_hidden_layers,
            tie_word_embeddings: boolean(top, "tie_word_embeddings")
                .or_else(|| boolean(model, "tie_word_embeddings")),
            vocab_size: integer(model, &["vocab_size"], 1 << 32),
            hidden_size,
            num_attention_heads: heads,
            num_key_value_heads: small(model, &["num_key_value_heads"]).or(heads),
            head_dim: small(model, &["head_dim"]).or_else(|| {
                let per_head = hidden_size?.checked_div(u64::from(heads?))?;
                u32::try_from(per_head).ok().filter(|&size| size > 0)
            }),
            layer_types: layer_types(model, num_hidden_layers),
            sliding_window: integer(model, &["sliding_window"], 1 << 32)
                .filter(|_| boolean(model, "use_sliding_window") != Some(false)),
            json: Value::Null,
            text: String::new(),
            strict: (*strict != text).then(|| strict.into_owned()),
        };
        Ok(Config {
            json,
            text,
            ..config
        })
    }

    /// Returns the text as JSON that every parser reads, for policies that look for more: what Python
    /// writes as `NaN`, `Infinity` and `-Infinity` is `null`, and there is no byte order mark.
    pub fn strict_text(&self) -> &str {
        self.strict.as_deref().unwrap_or(&self.text)
    }

    /// Whether it says that the model is quantized, wherever it does.
    pub(crate) fn states_quantization(&self) -> bool {
        method::of_config(&self.json).is_some()
    }

    /// Returns whether the architecture is one that has an output head over the vocabulary.
    pub fn has_language_head(&self) -> bool {
        self.architecture.as_deref().is_some_and(|name| {
            name.ends_with("ForCausalLM")
                || name.ends_with("ForConditionalGeneration")
                || name.ends_with("LMHeadModel")
        })
    }
}

/// The part of the configuration that describes the text model: models with several nest it.
/// Same names as in transformers' `get_text_config`, and those of models with code of their own.
fn text_config(top: &Map<String, Value>) -> &Map<String, Value> {
    let nested = |map: &'_ Map<String, Value>, key: &str| {
        map.get(key)
            .and_then(Value::as_object)
            .is_some_and(|nested| !nested.is_empty())
    };
    let mut map = top;
    // Twice, because Qwen's omni models nest it as thinker_config.text_config.
    for _ in 0..2 {
        let key = [
            "text_config",
            "llm_config",
            "language_config",
            "thinker_config",
        ]
        .into_iter()
        .find(|key| nested(map, key));
        match key.and_then(|key| map.get(key)).and_then(Value::as_object) {
            Some(inner) => map = inner,
            None => break,
        }
    }
    map
}

fn string(value: Option<&Value>) -> Option<String> {
    value.and_then(Value::as_str).map(str::to_owned)
}

fn boolean(map: &Map<String, Value>, key: &str) -> Option<bool> {
    map.get(key).and_then(Value::as_bool)
}

/// The first of the keys that holds an integer from 1 to `limit`.
fn integer(map: &Map<String, Value>, keys: &[&str], limit: u64) -> Option<u64> {
    keys.iter()
        .filter_map(|key| map.get(*key).and_then(Value::as_u64))
        .find(|value| (1..=limit).contains(value))
}

/// The same for counts of layers and heads and for the size of a head.
fn small(map: &Map<String, Value>, keys: &[&str]) -> Option<u32> {
    integer(map, keys, 1 << 16).and_then(|value| u32::try_from(value).ok())
}

fn layer_types(model: &Map<String, Value>, layers: Option<u32>) -> Vec<LayerType> {
    let Some(layers) = layers else {
        return Vec::new();
    };
    if let Some(Value::Array(list)) = model.get("layer_types") {
        let types: Option<Vec<LayerType>> = list
            .iter()
            .map(|name| name.as_str().map(LayerType::from_name))
            .collect();
        // A list of another length contradicts the number of layers: neither is believed.
        return types
            .filter(|types| types.len() == layers as usize)
            .unwrap_or_default();
    }
    match small(model, &["full_attention_interval"]) {
        // As transformers does it for Qwen3-Next and Qwen3.5: the last layer of every group.
        Some(interval) => (1..=layers)
            .map(|layer| {
                if layer.is_multiple_of(interval) {
                    LayerType::FullAttention
                } else {
                    LayerType::LinearAttention
                }
            })
            .collect(),
        None => Vec::new(),
    }
}

/// How many values a JSON text has, or more than it has: one behind each comma, and one in each
/// object and list.
fn most_values(text: &str) -> usize {
    // The shortest takes two bytes.
    if text.len() / 2 <= MAX_VALUES {
        return text.len() / 2;
    }
    let (mut values, mut in_string, mut is_escaped) = (1, false, false);
    for byte in text.bytes() {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' => is_escaped = in_string,
            b'"' => in_string = !in_string,
            b',' | b'[' | b'{' => values += usize::from(!in_string),
            _ => {}
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_in_proportion_to_the_file() {
        let parse = |text: String| Config::parse(Path::new("config.json"), text);
        for value in ["0,", "{},", r#"{"":0},"#, r#"[[[["",0]]]],"#] {
            let text = format!(r#"{{"a":[{}0]}}"#, value.repeat(MAX_VALUES));
            let error = parse(text).unwrap_err();
            assert!(
                matches!(error, CheckpointError::TooLarge { limit: 200_000, .. }),
                "{value}: {error}"
            );
        }
        // What is in texts does not count, nor do many values in all that real ones have.
        let text = ",[{\\\"\\\\".repeat(100_000);
        assert!(parse(format!(r#"{{"a":"{text}"}}"#)).is_ok());
        assert!(parse(format!(r#"{{"a":[{}0]}}"#, "0,".repeat(150_000))).is_ok());
    }

    fn config(text: &str) -> Config {
        Config::parse(Path::new("config.json"), text.into()).unwrap()
    }

    #[test]
    fn a_flat_configuration() {
        let c = config(
            r#"{"architectures":["Qwen2ForCausalLM"],"model_type":"qwen2","hidden_size":3584,
                "num_attention_heads":28,"num_key_value_heads":4,"num_hidden_layers":28,
                "vocab_size":152064,"tie_word_embeddings":false,"sliding_window":131072,
                "use_sliding_window":false,"head_dim":null}"#,
        );
        assert_eq!(c.architecture.as_deref(), Some("Qwen2ForCausalLM"));
        assert_eq!(c.model_type, c.text_model_type);
        assert_eq!(c.num_key_value_heads, Some(4));
        assert_eq!(c.head_dim, Some(128));
        assert_eq!(c.tie_word_embeddings, Some(false));
        assert_eq!(c.sliding_window, None);
        assert!(c.layer_types.is_empty());
        assert!(c.has_language_head());
    }

    #[test]
    fn a_nested_configuration_with_an_interval() {
        let c = config(
            r#"{"architectures":["Qwen3_5MoeForConditionalGeneration"],"model_type":"qwen3_5_moe",
                "text_config":{"model_type":"qwen3_5_moe_text","num_hidden_layers":8,
                "hidden_size":2048,"num_attention_heads":16,"head_dim":256,
                "full_attention_interval":4,"tie_word_embeddings":true}}"#,
        );
        assert_eq!(c.model_type.as_deref(), Some("qwen3_5_moe"));
        assert_eq!(c.text_model_type.as_deref(), Some("qwen3_5_moe_text"));
        assert_eq!(c.head_dim, Some(256));
        assert_eq!(c.num_key_value_heads, Some(16));
        assert_eq!(c.tie_word_embeddings, Some(true));
        let full: Vec<usize> = (0..8)
            .filter(|&i| c.layer_types[i] == LayerType::FullAttention)
            .collect();
        assert_eq!(full, [3, 7]);
    }

    #[test]
    fn layer_types_are_believed_when_there_are_as_many_as_layers() {
        let c = config(
            r#"{"num_hidden_layers":3,"sliding_window":512,
                "layer_types":["sliding_attention","full_attention","conv"]}"#,
        );
        assert_eq!(
            c.layer_types,
            [
                LayerType::SlidingAttention,
                LayerType::FullAttention,
                LayerType::Other
            ]
        );
        assert_eq!(c.sliding_window, Some(512));
        let c = config(r#"{"num_hidden_layers":2,"layer_types":["full_attention"]}"#);
        assert!(c.layer_types.is_empty());
    }

    #[test]
    fn absurd_values_are_as_good_as_absent() {
        for value in [
            "0",
            "-1",
            "1.5",
            "1e300",
            "1e18",
            "18446744073709551615",
            "\"8\"",
            "[8]",
            "{}",
            "true",
            "null",
        ] {
            let c = config(&format!(
                r#"{{"num_hidden_layers":{value},"hidden_size":{value},"head_dim":{value},
                    "num_attention_heads":{value},"vocab_size":{value},"sliding_window":{value},
                    "layer_types":{value},"full_attention_interval":{value},
                    "architectures":{value},"text_config":{value}}}"#
            ));
            assert_eq!(c.num_hidden_layers, None, "{value}");
            assert_eq!(c.hidden_size, None, "{value}");
            assert_eq!(c.head_dim, None, "{value}");
            assert_eq!(c.num_key_value_heads, None, "{value}");
            assert_eq!(c.architecture, None, "{value}");
        }
    }

    #[test]
    fn what_only_python_calls_json_is_read() {
        let text = "\u{feff}{\"time_step_limit\":[0.0,Infinity],\"a\":NaN,\"b\":-Infinity,\
            \"hidden_size\":64}";
        let c = config(text);
        assert_eq!(c.hidden_size, Some(64));
        assert_eq!(c.text, text);
        assert_eq!(
            c.strict_text(),
            "{\"time_step_limit\":[0.0,null],\"a\":null,\"b\":null,\"hidden_size\":64}"
        );
        assert_eq!(config("{}").strict_text(), "{}");
    }

    #[test]
    fn broken_configurations_are_errors() {
        let parse = |text: &str| Config::parse(Path::new("config.json"), text.into()).unwrap_err();
        for text in ["", "{", "{\"a\":}", "{} {}"] {
            assert!(
                matches!(parse(text), CheckpointError::Json { .. }),
                "{text}"
            );
        }
        for text in ["[]", "1", "\"x\"", "null"] {
            assert!(
                matches!(parse(text), CheckpointError::NotAnObject { .. }),
                "{text}"
            );
        }
        let deep = format!("{{\"a\":{}", "[".repeat(100_000));
        assert!(matches!(parse(&deep), CheckpointError::Json { .. }));
    }
}
