//! Heads of attention, which are never cut.

use tightfit_guest::config::{self, Value};

/// How many heads a model has.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Heads {
    queries: Option<u64>,
    /// Of keys and values.
    keys: Option<u64>,
}

/// Heads of one projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OfProjection {
    pub(crate) count: u64,
    /// What config.json calls their number.
    pub(crate) key: &'static str,
}

impl Heads {
    /// Returns what config.json says.
    pub(crate) fn read(config_json: &str) -> Heads {
        let root = config::parse(config_json);
        let model: &Value = config::language_model(&root);
        let number = |keys| config::number(model, keys).filter(|&heads| heads > 0);
        let queries = number(&["num_attention_heads", "n_head", "num_heads"]);
        Heads {
            queries,
            keys: number(&["num_key_value_heads", "num_kv_heads"]).or(queries),
        }
    }

    /// Returns the heads that the outputs of a projection are, by the module's name. `None` for another
    /// module, and where nobody says.
    pub(crate) fn of(self, module: &str) -> Option<OfProjection> {
        let (count, key) = match module.rsplit('.').next()? {
            // Of latent attention keys and values have a head for each head of queries.
            "q_proj" | "q_b_proj" | "kv_b_proj" => (self.queries?, "num_attention_heads"),
            "k_proj" | "v_proj" => (self.keys?, "num_key_value_heads"),
            _ => return None,
        };
        Some(OfProjection { count, key })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn projections_have_the_heads_that_the_config_says() {
        let heads = Heads::read(r#"{"num_attention_heads": 28, "num_key_value_heads": 4}"#);
        let count = |heads: Heads, module| heads.of(module).map(|heads| heads.count);
        assert_eq!(count(heads, "model.layers.0.self_attn.q_proj"), Some(28));
        assert_eq!(count(heads, "model.layers.0.self_attn.v_proj"), Some(4));
        assert_eq!(count(heads, "model.layers.0.mlp.up_proj"), None);
        let nested = Heads::read(r#"{"text_config": {"num_attention_heads": 8}}"#);
        assert_eq!(count(nested, "a.k_proj"), Some(8));
        for nothing in [
            "",
            "[]",
            r#"{"num_attention_heads": 0}"#,
            r#"{"num_attention_heads": "x"}"#,
        ] {
            assert_eq!(count(Heads::read(nothing), "a.q_proj"), None, "{nothing}");
        }
    }
}
