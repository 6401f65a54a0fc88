//! What config.json says about the sizes of attention, where shapes leave something open.

use tightfit_guest::config::{Value, number};

/// The sizes in the configuration of a language model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Geometry<'a> {
    pub(crate) config: &'a Value,
}

const HEADS: &[&str] = &[
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "decoder_attention_heads",
    "num_query_heads",
];

const KV_HEADS: &[&str] = &[
    "num_key_value_heads",
    "num_kv_heads",
    "n_head_kv",
    "n_kv_heads",
    "kv_n_heads",
    "num_query_groups",
    "multi_query_group_num",
];

const HEAD: &[&str] = &[
    "head_dim",
    "kv_channels",
    "d_kv",
    "attention_head_dim",
    "attention_head_size",
    "head_size",
    "d_head",
];

const HIDDEN: &[&str] = &["hidden_size", "n_embd", "d_model", "dim"];

impl Geometry<'_> {
    /// Returns the elements of the keys and values of a token in a layer.
    pub(crate) fn token_elements(&self, layer: u64) -> Option<u64> {
        let heads = self.at(HEADS, layer);
        if let (Some(heads), Some(rope), Some(value)) = (
            heads,
            number(self.config, &["qk_rope_head_dim"]),
            number(self.config, &["v_head_dim"]),
        ) {
            // DeepSeek's latent attention, as transformers caches it: expanded to all heads.
            let nope = number(self.config, &["qk_nope_head_dim"]).unwrap_or(0);
            let elements = nope.saturating_add(rope).saturating_add(value);
            return Some(heads.saturating_mul(elements));
        }
        let flag = |key: &str| self.config.get(key).and_then(Value::as_bool);
        let kv_heads = match flag("multi_query") {
            // Falcon-7B says 71, and has one.
            Some(true) if flag("new_decoder_architecture") != Some(true) => 1,
            _ => self.at(KV_HEADS, layer).or(heads)?,
        };
        let head = self.head_at(layer)?;
        let value = number(self.config, &["v_head_dim"]).unwrap_or(head);
        Some(kv_heads.saturating_mul(head.saturating_add(value)))
    }

    /// Returns the elements of the queries of a token in a layer.
    pub(crate) fn query_elements(&self, layer: u64) -> Option<u64> {
        Some(self.at(HEADS, layer)?.saturating_mul(self.head_at(layer)?))
    }

    /// Returns the elements of a head.
    pub(crate) fn head(&self) -> Option<u64> {
        self.head_at(0)
    }

    /// Returns the elements of a head's keys where attention is linear.
    pub(crate) fn linear_key_head(&self) -> Option<u64> {
        number(self.config, &["linear_key_head_dim"])
    }

    /// Returns the groups that share projections to the states of a state-space model.
    pub(crate) fn state_groups(&self) -> u64 {
        let keys = ["n_groups", "mamba_n_groups", "mamba_ngroups", "ngroups"];
        number(self.config, &keys).unwrap_or(1)
    }

    fn head_at(&self, layer: u64) -> Option<u64> {
        self.at(HEAD, layer).or_else(|| {
            let hidden = number(self.config, HIDDEN)?;
            hidden.checked_div(self.at(HEADS, layer)?)
        })
    }

    /// Returns a number of the configuration or of what it says about attention, or that of the layer
    /// where there is one for each.
    fn at(&self, keys: &[&str], layer: u64) -> Option<u64> {
        let read = |map: &Value, key: &str| match map.get(key)? {
            Value::Array(list) => list.get(usize::try_from(layer).ok()?)?.as_u64(),
            one => one.as_u64(),
        };
        let nested = self.config.get("attn_config");
        let maps = || [Some(self.config), nested].into_iter().flatten();
        keys.iter()
            .find_map(|key| maps().find_map(|map| read(map, key)))
    }
}
