//! How far back each layer looks, by what config.json says.
//!
//! Models say it under many keys. What is not understood is taken to see everything: too much room is
//! better than too little.

use tightfit_guest::config::{Value, number};

/// How far back a layer looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sight {
    Everything,
    /// So many tokens.
    Window(u64),
    /// It keeps a state that does not grow, if anything.
    State,
    /// The layer uses the keys and values of another.
    Shared,
}

/// What a configuration says about the layers.
#[derive(Debug)]
pub(crate) struct Windows<'a> {
    config: &'a Value,
    rule: Rule<'a>,
    /// Tokens in a window.
    window: Option<u64>,
    /// The layer from which on keys and values are those of earlier ones.
    shared_from: Option<u64>,
    is_griffin: bool,
}

#[derive(Debug)]
enum Rule<'a> {
    /// Nothing has a window.
    None,
    /// Something has, but what is unknown.
    Unknown,
    /// All layers have.
    All,
    /// The name of each layer's kind, from the beginning again where the list ends.
    Names(Vec<&'a Value>),
    /// A number for each layer, those equal to `full` see everything, others have `other`.
    Flags {
        list: &'a [Value],
        full: u64,
        other: Other,
    },
    /// A window for each layer, null or 0 for those without.
    Sizes(&'a [Value]),
    /// Layers by their numbers, counted from `first`.
    Listed {
        list: &'a [Value],
        first: u64,
        /// Those in the list see everything; those that are not have `other`. Else the other way round.
        full: bool,
        other: Other,
    },
    /// Layer `offset` of every `period` sees everything.
    Every {
        period: u64,
        offset: u64,
        other: Other,
    },
    /// A letter for each layer, from the beginning again where the text ends.
    Letters { text: &'a str, window: u8 },
    /// `*` is attention.
    Hybrid(&'a str),
    /// The last layer of each group sees everything, and so do those behind the last whole group; the
    /// others have a state.
    Groups { size: u64, tail: u64 },
    /// Layers before this one see everything.
    From(u64),
}

/// What layers that do not see everything have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Other {
    Window,
    State,
}

const WINDOWS: &[&str] = &[
    "sliding_window",
    "attention_chunk_size",
    "sliding_window_size",
    "attention_window_size",
    "window_size",
    "local_attention",
    "local_attention_window",
    "sliding_window_attention",
];

/// Families all of whose layers have the window that is stated.
const ALL_WINDOWED: [&str; 9] = [
    "mistral",
    "mixtral",
    "phi3",
    "phi3_v",
    "phimoe",
    "starcoder2",
    "phi4_multimodal",
    "pixtral",
    "ministral",
];

/// Families of linear attention: what layers have attention of the other kind is listed.
const LINEAR: [&str; 6] = ["delta_net", "gla", "hgrn", "hgrn2", "linear_attn", "retnet"];

impl<'a> Windows<'a> {
    /// Reads the part of a configuration that describes the language model.
    pub(crate) fn of(config: &'a Value) -> Windows<'a> {
        let window = number(config, WINDOWS)
            .or_else(|| number(config.get("attn_config")?, &["sliding_window_size"]))
            .filter(|&tokens| tokens > 0);
        let layers = layer_count(config);
        let shared = number(config, &["num_kv_shared_layers"]).filter(|&shared| shared > 0);
        Windows {
            config,
            rule: rule(config, window),
            window,
            is_griffin: config.get("model_type").and_then(Value::as_str) == Some("recurrent_gemma"),
            shared_from: shared.and_then(|shared| layers?.checked_sub(shared)),
        }
    }

    /// Returns what a layer sees.
    pub(crate) fn sight(&self, layer: u64) -> Sight {
        if self
            .shared_from
            .is_some_and(|first| first > 0 && layer >= first)
        {
            return Sight::Shared;
        }
        let window = self.window.map_or(Sight::Everything, Sight::Window);
        let other = |other| match other {
            Other::Window => window,
            Other::State => Sight::State,
        };
        let full_or = |is_full: bool, rest: Other| match is_full {
            true => Sight::Everything,
            false => other(rest),
        };
        let index = usize::try_from(layer).unwrap_or(usize::MAX);
        match &self.rule {
            Rule::None | Rule::Unknown => Sight::Everything,
            Rule::All => window,
            Rule::Names(names) => {
                let name = names
                    .get(index % names.len().max(1))
                    .and_then(|name| name.as_str());
                match name {
                    // Griffin's attention is local.
                    Some("attention") if self.is_griffin => window,
                    Some(name) => by_name(name, window),
                    None => Sight::Everything,
                }
            }
            Rule::Flags { list, full, other } => match list.get(index).and_then(as_flag) {
                Some(flag) => full_or(flag == *full, *other),
                None => Sight::Everything,
            },
            Rule::Sizes(list) => {
                let size = list.get(index % list.len().max(1)).and_then(Value::as_u64);
                size.filter(|&tokens| tokens > 0)
                    .map_or(Sight::Everything, Sight::Window)
            }
            Rule::Listed {
                list,
                first,
                full,
                other,
            } => {
                let listed = list
                    .iter()
                    .any(|number| number.as_u64() == layer.checked_add(*first));
                full_or(listed == *full, *other)
            }
            Rule::Every {
                period,
                offset,
                other,
            } => full_or(layer % period == *offset, *other),
            Rule::Letters {
                text,
                window: letter,
            } => {
                let found = text.as_bytes().get(index % text.len().max(1));
                full_or(found != Some(letter), Other::Window)
            }
            Rule::Hybrid(pattern) => {
                full_or(pattern.as_bytes().get(index) == Some(&b'*'), Other::State)
            }
            Rule::Groups { size, tail } => {
                full_or(layer % size == size - 1 || layer >= *tail, Other::State)
            }
            Rule::From(first) => full_or(layer < *first, Other::Window),
        }
    }

    /// Returns a warning where a window is stated and it is not known which layers have it, or the other
    /// way round.
    pub(crate) fn note(&self) -> Option<String> {
        if let (Rule::Unknown, Some(window)) = (&self.rule, self.window) {
            return Some(format!(
                "config.json states a window of {window} tokens, but not in a way that is known here which \
                 layers have it: room is left as if every layer saw all tokens"
            ));
        }
        let Rule::Names(names) = &self.rule else {
            return None;
        };
        let mut names = names.iter().filter_map(|name| name.as_str());
        let name = names.find(|name| match by_name(name, Sight::Window(1)) {
            Sight::Window(_) => self.window.is_none(),
            Sight::Everything => !sees_everything(name),
            _ => false,
        })?;
        let name: String = name.chars().take(40).collect();
        Some(format!(
            "config.json has layers of the kind {name:?}, of which it is not known how far back they look: \
             room is left as if they saw all tokens"
        ))
    }

    /// Returns whether a layer uses the attention of another, in whose tensors it is.
    pub(crate) fn borrows(&self, layer: u64) -> bool {
        let Rule::Names(names) = &self.rule else {
            return false;
        };
        let index = usize::try_from(layer).unwrap_or(usize::MAX);
        names
            .get(index)
            .is_some_and(|name| name.as_str() == Some("hybrid"))
    }

    /// Returns whether a layer is one that generation does not run: those for multi-token prediction are
    /// counted on from the model's own.
    pub(crate) fn is_draft(&self, layer: u64) -> bool {
        let is_decoder = ["decoder_layers", "num_decoder_layers", "encoder_layers"];
        let counted_apart = is_decoder.iter().any(|key| self.config.get(key).is_some());
        !counted_apart && layer_count(self.config).is_some_and(|layers| layer >= layers)
    }
}

fn layer_count(config: &Value) -> Option<u64> {
    number(
        config,
        &["num_hidden_layers", "n_layer", "n_layers", "num_layers"],
    )
}

fn as_flag(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_bool().map(u64::from))
}

fn by_name(name: &str, window: Sight) -> Sight {
    let has = |words: &[&str]| words.iter().any(|word| name.contains(word));
    if has(&["sliding", "chunked", "local", "window", "swa"]) {
        return window;
    }
    let states = [
        "linear",
        "mamba",
        "recurrent",
        "conv",
        "rwkv",
        "lightning",
        "delta",
        "kda",
        "ssm",
        "gdn",
    ];
    if has(&states) || matches!(name, "moe" | "mlp" | "m" | "r") {
        return Sight::State;
    }
    Sight::Everything
}

fn sees_everything(name: &str) -> bool {
    let words = ["full", "global", "attention", "attn", "hybrid", "dense"];
    words.iter().any(|word| name.contains(word)) || name == "a"
}

fn rule<'a>(config: &'a Value, window: Option<u64>) -> Rule<'a> {
    let list = |key: &str| config.get(key)?.as_array().filter(|list| !list.is_empty());
    let flag = |key: &str| config.get(key).and_then(Value::as_bool);
    let positive = |keys: &[&str]| number(config, keys).filter(|&n| n > 0);
    let text = |key: &str| {
        config
            .get(key)
            .and_then(Value::as_str)
            .filter(|text| !text.is_empty())
    };

    let family = config
        .get("model_type")
        .and_then(Value::as_str)
        .unwrap_or("");

    for key in [
        "layer_types",
        "layers_block_type",
        "block_types",
        "_block_types",
        "attention_layers",
        "mixer_types",
    ] {
        if let Some(list) = list(key) {
            return Rule::Names(list.iter().collect());
        }
    }
    if let Some(types) = list("attention_types") {
        return gpt_neo(types);
    }
    if let Some(list) = list("attn_type_list") {
        return Rule::Flags {
            list,
            full: 1,
            other: Other::State,
        };
    }
    if let Some(list) = list("hybrid_layer_pattern") {
        return Rule::Flags {
            list,
            full: 0,
            other: Other::Window,
        };
    }
    for key in [
        "sliding_window",
        "interleaved_sliding_window",
        "_interleaved_sliding_window",
    ] {
        if let Some(list) = list(key) {
            return Rule::Sizes(list);
        }
    }
    let linear = config.get("linear_attn_config");
    if let Some(list) = linear.and_then(|linear| linear.get("full_attn_layers")?.as_array()) {
        return Rule::Listed {
            list,
            first: 1,
            full: true,
            other: Other::State,
        };
    }
    for (key, full, other) in [
        ("full_attn_idxs", true, Other::State),
        ("attn_layer_indices", true, Other::State),
        ("attention_layer_indices", true, Other::State),
        ("global_attn_idx", true, Other::Window),
        ("global_attention_layers", true, Other::Window),
        ("full_attention_layers", true, Other::Window),
        ("sliding_window_layers", false, Other::Window),
        ("sliding_attention_layers", false, Other::Window),
        ("swa_layers", false, Other::Window),
    ] {
        if let Some(list) = list(key) {
            return Rule::Listed {
                list,
                first: 0,
                full,
                other,
            };
        }
    }
    if let Some(period) = positive(&["full_attention_interval"]) {
        return Rule::Every {
            period,
            offset: period - 1,
            other: Other::State,
        };
    }
    if let Some(period) = positive(&["attn_layer_period"]) {
        let offset = number(config, &["attn_layer_offset"]).unwrap_or(0);
        return Rule::Every {
            period,
            offset,
            other: Other::State,
        };
    }
    if let (Some(size), Some(layers)) = (positive(&["layer_group_size"]), layer_count(config)) {
        // Ring-linear.
        let tail = layers - layers % size;
        return Rule::Groups { size, tail };
    }
    if LINEAR.contains(&family) {
        let list = config
            .get("attn")
            .and_then(|attention| attention.get("layers"));
        return Rule::Listed {
            list: list.and_then(Value::as_array).map_or(&[], Vec::as_slice),
            first: 0,
            full: true,
            other: Other::State,
        };
    }
    if let Some(pattern) = text("hybrid_override_pattern") {
        return Rule::Hybrid(pattern);
    }
    if window.is_none() || flag("use_sliding_window") == Some(false) {
        return Rule::None;
    }
    if positive(&["attention_chunk_size"]).is_some() || flag("use_sliding_window") == Some(true) {
        // Layers with rotary embeddings look at a chunk; an empty list means every fourth without.
        if let Some(list) = list("no_rope_layers") {
            return Rule::Flags {
                list,
                full: 0,
                other: Other::Window,
            };
        }
    }
    if positive(&["attention_chunk_size"]).is_some() {
        let period = positive(&["no_rope_layer_interval"]).unwrap_or(4);
        return Rule::Every {
            period,
            offset: period - 1,
            other: Other::Window,
        };
    }
    if flag("use_sliding_window") == Some(true) {
        // Qwen2: the first layers see everything.
        return Rule::From(number(config, &["max_window_layers"]).unwrap_or(0));
    }
    if let Some(text) = text("sliding_window_pattern") {
        // EXAONE: `LLLG`, repeated.
        return Rule::Letters { text, window: b'L' };
    }
    if let Some(period) = positive(&["global_attn_every_n_layers"]) {
        let offset = if family.starts_with("modernbert") {
            0
        } else {
            period - 1
        };
        return Rule::Every {
            period,
            offset,
            other: Other::Window,
        };
    }
    let by_family = match family {
        "gemma2" | "gpt_oss" | "vaultgemma" | "t5gemma" => Some(2),
        "cohere2" | "olmo3" | "exaone4" => Some(4),
        "gemma3n" | "gemma3n_text" => Some(5),
        "gemma3" | "gemma3_text" => Some(6),
        _ => None,
    };
    let pattern = number(
        config,
        &["sliding_window_pattern", "_sliding_window_pattern"],
    );
    match pattern.or(by_family) {
        Some(0) => return Rule::None,
        Some(period) => {
            return Rule::Every {
                period,
                offset: period - 1,
                other: Other::Window,
            };
        }
        None => {}
    }
    if family.starts_with("qwen") || family == "smollm3" {
        // Their default is to have no window in use.
        return Rule::None;
    }
    if ALL_WINDOWED.contains(&family) && number(config, &["max_window_layers"]).is_none() {
        return Rule::All;
    }
    Rule::Unknown
}

/// GPT-Neo: lists of kinds, each with how often it is repeated.
fn gpt_neo(types: &[Value]) -> Rule<'_> {
    /// More than any model has layers.
    const MOST: usize = 10_000;
    let mut names = Vec::new();
    for entry in types {
        if let (Some(kinds), Some(times)) = (entry[0].as_array(), entry[1].as_u64()) {
            for _ in 0..times.min(MOST as u64) {
                if names.len() < MOST {
                    names.extend(kinds.iter().take(MOST));
                }
            }
        }
    }
    match names.is_empty() {
        true => Rule::Unknown,
        false => Rule::Names(names),
    }
}
