//! Room for the KV cache and the logits, by what config.json says about attention.

use serde_json::Value;
use tightfit_guest::names::TensorKind::{self, Embedding, Linear};
use tightfit_guest::partition::Item;
use tightfit_guest::{Refusal, Request};

use crate::options::Options;
use crate::units::{Part, Unit};

/// Keys and values are kept in 16 bits.
const ELEMENT_BYTES: u64 = 2;
/// Logits are computed in 32.
const LOGIT_BYTES: u64 = 4;

/// What a request of some length takes beside the weights.
#[derive(Debug)]
pub(crate) struct Cache {
    /// The part of config.json that describes the language model.
    config: Value,
    /// Bytes of one token of one sequence in one layer.
    token: u64,
    layers: Option<u64>,
    context: u64,
    batch: u64,
}

/// How far back a layer looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Attention {
    Full,
    /// So many tokens.
    Window(u64),
    /// It keeps a state that does not grow.
    None,
}

impl Cache {
    /// Reads the geometry.
    ///
    /// # Errors
    /// A refusal when config.json does not tell it.
    pub(crate) fn read(config_json: &str, options: &Options) -> Result<Cache, Refusal> {
        let unusable = |why: &str| {
            let instead = "use `reserve` instead of `context`";
            Refusal::unsupported(format!("no KV cache can be computed: {why}; {instead}"))
        };
        let root: Value = serde_json::from_str(&without_python_constants(config_json))
            .map_err(|error| unusable(&format!("config.json is not valid JSON ({error})")))?;
        let config = language_model(root);
        let token = token_bytes(&config)
            .ok_or_else(|| unusable("config.json lacks the number or size of attention heads"))?;
        Ok(Cache {
            layers: number(
                &config,
                &["num_hidden_layers", "n_layer", "n_layers", "num_layers"],
            ),
            config,
            token,
            context: options.context.into(),
            batch: options.batch.into(),
        })
    }

    /// Adds what a layer needs to one of its tensors, and what the logits need to the output head.
    pub(crate) fn reserve(
        &self,
        request: &Request,
        kinds: &[TensorKind],
        units: &[Unit<'_>],
        items: &mut [Item],
    ) {
        let main = main_stack(units);
        for unit in units {
            if let Part::Layer { stack, index, .. } = unit.part
                && Some(stack) == main
            {
                let carrier = attention(request, kinds, unit);
                items[carrier as usize].headroom = self.layer_bytes(index.into());
            }
        }
        // A tied head is the embedding.
        let table = |unit: &&Unit<'_>| unit.part == Part::Output || unit.part == Part::Input;
        let mut tables = units
            .iter()
            .filter(table)
            .rev()
            .flat_map(|unit| &unit.tensors);
        let head =
            tables.find(|&&t| matches!(kinds[t as usize], TensorKind::OutputHead | Embedding));
        if let Some(&head) = head {
            let rows = request.tensors[head as usize].shape.first().copied();
            let vocabulary = number(&self.config, &["vocab_size"]).or(rows).unwrap_or(0);
            let logits = product(&[vocabulary, self.batch, LOGIT_BYTES]);
            let headroom = &mut items[head as usize].headroom;
            *headroom = headroom.saturating_add(logits);
        }
    }

    fn layer_bytes(&self, layer: u64) -> u64 {
        let tokens = match self.attention(layer) {
            Attention::Full => self.context,
            Attention::Window(tokens) => self.context.min(tokens),
            Attention::None => 0,
        };
        product(&[self.token, tokens, self.batch])
    }

    /// Returns what config.json says about a layer. In doubt it is full attention: too much room is
    /// better than too little.
    fn attention(&self, layer: u64) -> Attention {
        let config = &self.config;
        if self.layers.is_some_and(|layers| layer >= layers) {
            // Multi-token prediction, which generation does not run.
            return Attention::None;
        }
        let window = number(config, &["sliding_window", "attention_chunk_size"])
            .filter(|&tokens| tokens > 0)
            .map_or(Attention::Full, Attention::Window);
        let at = |list: &str| {
            config
                .get(list)?
                .get(usize::try_from(layer).ok()?)?
                .as_str()
        };
        if let Some(kind) = at("layer_types").or_else(|| at("layers_block_type")) {
            return match kind {
                "sliding_attention" | "chunked_attention" => window,
                "linear_attention" | "mamba" | "mamba2" | "recurrent" | "conv" | "moe" | "mlp" => {
                    Attention::None
                }
                _ => Attention::Full,
            };
        }
        let every = |interval: u64, offset: u64| interval > 0 && layer % interval == offset;
        if let Some(interval) = number(config, &["full_attention_interval"])
            && interval > 0
        {
            return if every(interval, interval - 1) {
                Attention::Full
            } else {
                Attention::None
            };
        }
        if let Some(period) = number(config, &["attn_layer_period"])
            && period > 0
        {
            let offset = number(config, &["attn_layer_offset"]).unwrap_or(0);
            return if every(period, offset) {
                Attention::Full
            } else {
                Attention::None
            };
        }
        if let Some(pattern) = config
            .get("hybrid_override_pattern")
            .and_then(Value::as_str)
        {
            let here = usize::try_from(layer)
                .ok()
                .and_then(|layer| pattern.as_bytes().get(layer));
            return if here == Some(&b'*') {
                Attention::Full
            } else {
                Attention::None
            };
        }
        if window == Attention::Full || self.sees_all(layer) {
            Attention::Full
        } else {
            window
        }
    }

    /// Returns whether a layer of a model with a sliding window does without.
    fn sees_all(&self, layer: u64) -> bool {
        let config = &self.config;
        if let Some(used) = config.get("use_sliding_window").and_then(Value::as_bool) {
            // Qwen2: the first layers are full.
            let first = number(config, &["max_window_layers"]).unwrap_or(0);
            return !used || layer < first;
        }
        if let Some(pattern) = config.get("sliding_window_pattern").and_then(Value::as_str) {
            // EXAONE: `LLLG`, repeated.
            let length = pattern.len().max(1) as u64;
            return pattern.as_bytes().get((layer % length) as usize) != Some(&b'L');
        }
        let by_family = match config.get("model_type").and_then(Value::as_str) {
            Some("gemma2") => Some(2),
            Some("gemma3" | "gemma3_text") => Some(6),
            Some("cohere2") => Some(4),
            _ => None,
        };
        match number(config, &["sliding_window_pattern"]).or(by_family) {
            Some(0) => true,
            Some(pattern) => layer % pattern == pattern - 1,
            None => false,
        }
    }
}

/// Returns the stack that generates: the one with the most layers, the last of several.
fn main_stack<'a>(units: &[Unit<'a>]) -> Option<&'a str> {
    let mut counts: Vec<(&str, usize)> = Vec::new();
    for unit in units {
        if let Part::Layer { stack, .. } = unit.part {
            match counts.last_mut() {
                Some((last, count)) if *last == stack => *count += 1,
                _ => counts.push((stack, 1)),
            }
        }
    }
    let most = counts.into_iter().max_by_key(|&(_, count)| count);
    most.map(|(stack, _)| stack)
}

/// Returns the tensor beside which a layer's cache belongs, should the layer be split.
fn attention(request: &Request, kinds: &[TensorKind], unit: &Unit<'_>) -> u32 {
    let is_attention = |&&t: &&u32| {
        let name = &request.tensors[t as usize].name;
        kinds[t as usize] == Linear && (name.contains("attn") || name.contains("attention"))
    };
    let found = unit
        .tensors
        .iter()
        .find(is_attention)
        .or(unit.tensors.first());
    found.copied().unwrap_or(0)
}

/// Returns the configuration of the language model within that of a larger one.
fn language_model(mut root: Value) -> Value {
    if let Some(thinker) = root
        .get_mut("thinker_config")
        .filter(|found| found.is_object())
    {
        root = thinker.take();
    }
    for name in ["text_config", "llm_config", "language_config"] {
        if let Some(found) = root.get_mut(name).filter(|found| found.is_object()) {
            return found.take();
        }
    }
    root
}

/// Returns the bytes of the keys and values of one token in one layer.
fn token_bytes(config: &Value) -> Option<u64> {
    let heads = number(
        config,
        &["num_attention_heads", "n_head", "n_heads", "num_heads"],
    );
    if let (Some(heads), Some(rope), Some(value)) = (
        heads,
        number(config, &["qk_rope_head_dim"]),
        number(config, &["v_head_dim"]),
    ) {
        // DeepSeek's latent attention, as transformers caches it: expanded to all heads.
        let nope = number(config, &["qk_nope_head_dim"]).unwrap_or(0);
        let elements = nope.saturating_add(rope).saturating_add(value);
        return Some(product(&[heads, elements, ELEMENT_BYTES]));
    }
    let kv_heads = number(
        config,
        &[
            "num_key_value_heads",
            "num_kv_heads",
            "n_head_kv",
            "multi_query_group_num",
        ],
    );
    let kv_heads = match (kv_heads, config.get("multi_query").and_then(Value::as_bool)) {
        (Some(heads), _) => heads,
        (None, Some(true)) => 1,
        (None, _) => heads?,
    };
    let head = number(config, &["head_dim", "kv_channels"]).or_else(|| {
        let hidden = number(config, &["hidden_size", "n_embd", "d_model"])?;
        hidden.checked_div(heads?)
    })?;
    Some(product(&[2, kv_heads, head, ELEMENT_BYTES]))
}

fn number(config: &Value, names: &[&str]) -> Option<u64> {
    names.iter().find_map(|name| config.get(name)?.as_u64())
}

fn product(factors: &[u64]) -> u64 {
    factors
        .iter()
        .fold(1, |product, &factor| product.saturating_mul(factor))
}

/// Python writes `NaN` and `Infinity` into JSON, and some published configurations have them.
fn without_python_constants(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    let mut rest = json;
    let (mut in_string, mut escaped) = (false, false);
    while let Some(c) = rest.chars().next() {
        if !in_string {
            let constants = ["-Infinity", "Infinity", "NaN"];
            if let Some(after) = constants.iter().find_map(|word| rest.strip_prefix(word)) {
                out.push_str("null");
                rest = after;
                continue;
            }
        }
        if c == '"' && !escaped {
            in_string = !in_string;
        }
        escaped = in_string && c == '\\' && !escaped;
        out.push(c);
        rest = &rest[c.len_utf8()..];
    }
    out
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
