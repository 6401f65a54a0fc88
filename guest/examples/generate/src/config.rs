//! What config.json says about the arithmetic. Anything that would need other arithmetic than there is here is an
//! error: to ignore it would give wrong tokens without a word.

use serde_json::Value;
use tightfit_program::GaveUp;

pub(crate) struct Config {
    pub(crate) hidden: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head: usize,
    pub(crate) vocabulary: usize,
    pub(crate) eps: f32,
    /// Tokens that attention looks back over, by layer, where that is limited.
    pub(crate) windows: Vec<Option<u32>>,
    pub(crate) frequencies: Vec<f32>,
    /// What sines and cosines are multiplied with.
    pub(crate) scaling: f32,
    pub(crate) experts: Option<Experts>,
}

/// Of models with experts.
pub(crate) struct Experts {
    /// How many see a token.
    pub(crate) chosen: usize,
    /// Whether their weights are scaled to a sum of one.
    pub(crate) normalize: bool,
}

struct Json(Value);

impl Json {
    fn number(&self, name: &str) -> Option<f64> {
        self.0.get(name)?.as_f64()
    }

    fn count(&self, name: &str) -> Option<usize> {
        usize::try_from(self.0.get(name)?.as_u64()?).ok()
    }

    fn needed(&self, name: &str) -> Result<usize, GaveUp> {
        match self.count(name) {
            Some(count) if count > 0 && count < 1 << 24 => Ok(count),
            _ => Err(format!("config.json says no {name}").into()),
        }
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name)?.as_str()
    }

    fn flag(&self, name: &str) -> Option<bool> {
        self.0.get(name)?.as_bool()
    }
}

impl Config {
    pub(crate) fn parse(json: &str) -> Result<Config, GaveUp> {
        let json = serde_json::from_str(json).map_err(|error| format!("config.json: {error}"))?;
        let json = Json(json);
        let kind = json.text("model_type").unwrap_or_default();
        let has_experts = matches!(kind, "qwen3_moe" | "mixtral");
        if !matches!(kind, "llama" | "mistral" | "qwen2" | "qwen3") && !has_experts {
            return Err(format!("models of type '{kind}' are not known here").into());
        }
        if json.text("hidden_act").is_some_and(|act| act != "silu") {
            return Err("another activation than silu is not known here".into());
        }
        let (hidden, heads) = (
            json.needed("hidden_size")?,
            json.needed("num_attention_heads")?,
        );
        let head = json.count("head_dim").unwrap_or(hidden / heads);
        if head == 0 || head > 256 || !head.is_multiple_of(8) {
            return Err(format!("heads of {head} elements are not known here").into());
        }
        let layers = json.needed("num_hidden_layers")?;
        let (frequencies, scaling) = rotary(&json, head)?;
        Ok(Config {
            hidden,
            layers,
            heads,
            kv_heads: json.count("num_key_value_heads").unwrap_or(heads),
            head,
            vocabulary: json.needed("vocab_size")?,
            eps: json.number("rms_norm_eps").unwrap_or(1e-6) as f32,
            windows: windows(&json, kind, layers),
            frequencies,
            scaling,
            experts: match has_experts {
                false => None,
                true => Some(Experts {
                    chosen: json.needed("num_experts_per_tok")?,
                    normalize: kind != "qwen3_moe" || json.flag("norm_topk_prob") == Some(true),
                }),
            },
        })
    }

    pub(crate) fn check_tokens(&self, tokens: &[u32]) -> Result<(), GaveUp> {
        match tokens
            .iter()
            .find(|token| **token as usize >= self.vocabulary)
        {
            Some(token) => Err(format!("token {token}: there are {}", self.vocabulary).into()),
            None => Ok(()),
        }
    }
}

fn windows(json: &Json, kind: &str, layers: usize) -> Vec<Option<u32>> {
    let window = json
        .count("sliding_window")
        .and_then(|window| u32::try_from(window).ok());
    let window = window.filter(|window| *window > 0);
    let types = json.0.get("layer_types").and_then(Value::as_array);
    // Mistral's kin has it wherever it has one, Qwen's only where it is told to use it.
    let is_used = json
        .flag("use_sliding_window")
        .unwrap_or(!kind.starts_with("qwen"));
    // Of Qwen's layers the first so many have none.
    let first = json
        .count("max_window_layers")
        .filter(|_| kind.starts_with("qwen"));
    let has = |layer: usize| match types {
        Some(types) => types.get(layer).and_then(Value::as_str) == Some("sliding_attention"),
        None => is_used && first.is_none_or(|first| layer >= first),
    };
    (0..layers)
        .map(|layer| window.filter(|_| has(layer)))
        .collect()
}

/// Angles of a position, and what sines and cosines are multiplied with.
fn rotary(json: &Json, head: usize) -> Result<(Vec<f32>, f32), GaveUp> {
    let parameters = ["rope_parameters", "rope_scaling"]
        .iter()
        .find_map(|name| json.0.get(*name).filter(|value| value.is_object()));
    let parameters = Json(parameters.cloned().unwrap_or(Value::Null));
    let theta = parameters
        .number("rope_theta")
        .or(json.number("rope_theta"));
    let theta = theta.unwrap_or(10000.0);
    let part = parameters.number("partial_rotary_factor");
    let part = part.or(json.number("partial_rotary_factor")).unwrap_or(1.0);
    let dimensions = (head as f64 * part) as usize / 2 * 2;
    let plain = (0..dimensions / 2).map(|i| theta.powf(-2.0 * i as f64 / dimensions as f64));
    let plain: Vec<f64> = plain.collect();
    let kind = parameters.text("rope_type").or(parameters.text("type"));
    let factor = parameters.number("factor").unwrap_or(1.0);
    let original = parameters.number("original_max_position_embeddings");
    let original = original.or(json.number("max_position_embeddings"));
    let original = original.unwrap_or(8192.0);
    let turn = 2.0 * std::f64::consts::PI;
    let (frequencies, scaling): (Vec<f64>, f64) = match kind.unwrap_or("default") {
        "default" => (plain, 1.0),
        "linear" => (
            plain.iter().map(|frequency| frequency / factor).collect(),
            1.0,
        ),
        "llama3" => {
            let low = parameters.number("low_freq_factor").unwrap_or(1.0);
            let high = parameters.number("high_freq_factor").unwrap_or(4.0);
            let scaled = plain.iter().map(|frequency| {
                let length = turn / frequency;
                if length < original / high {
                    return *frequency;
                }
                if length > original / low {
                    return frequency / factor;
                }
                let smooth = (original / length - low) / (high - low);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            });
            (scaled.collect(), 1.0)
        }
        "yarn" => {
            let fast = parameters.number("beta_fast").unwrap_or(32.0);
            let slow = parameters.number("beta_slow").unwrap_or(1.0);
            // The dimension that turns so often over the original length.
            let dimension = |turns: f64| {
                dimensions as f64 * (original / (turns * turn)).ln() / (2.0 * theta.ln())
            };
            let low = dimension(fast).floor().max(0.0);
            let high = dimension(slow).ceil().min(dimensions as f64 - 1.0);
            let scaled = plain.iter().enumerate().map(|(i, frequency)| {
                let ramp = (i as f64 - low) / (high - low).max(0.001);
                let ramp = ramp.clamp(0.0, 1.0);
                frequency / factor * ramp + frequency * (1.0 - ramp)
            });
            let attention = parameters.number("attention_factor");
            let attention = attention.unwrap_or(0.1 * factor.ln() + 1.0);
            (scaled.collect(), attention)
        }
        other => {
            return Err(format!("rotary embeddings of type '{other}' are not known here").into());
        }
    };
    let frequencies = frequencies.into_iter().map(|frequency| frequency as f32);
    Ok((frequencies.collect(), scaling as f32))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA: &str = r#"{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4,
        "num_hidden_layers": 2, "vocab_size": 10"#;

    #[test]
    fn what_is_not_said_has_its_default() {
        let config = Config::parse(&format!("{LLAMA}}}")).unwrap();
        assert_eq!((config.head, config.kv_heads), (16, 4));
        assert_eq!((config.frequencies.len(), config.scaling), (8, 1.0));
        assert_eq!(config.frequencies[0], 1.0);
        assert!((config.frequencies[4] - 0.01).abs() < 1e-9);
        assert!(config.windows.iter().all(Option::is_none));
    }

    #[test]
    fn what_is_not_known_is_an_error() {
        for wrong in [
            "{}".to_owned(),
            format!("{LLAMA}, \"hidden_act\": \"gelu\"}}"),
            format!("{LLAMA}, \"head_dim\": 12}}"),
            format!("{LLAMA}, \"rope_scaling\": {{\"rope_type\": \"other\"}}}}"),
        ] {
            assert!(Config::parse(&wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn long_waves_of_llama3_are_stretched_and_short_ones_are_not() {
        let scaling = r#", "rope_theta": 500000.0, "head_dim": 128, "rope_scaling": {"rope_type": "llama3",
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}}"#;
        let config = Config::parse(&format!("{LLAMA}{scaling}")).unwrap();
        let plain = |i: usize| 500000f64.powf(-2.0 * i as f64 / 128.0) as f32;
        assert_eq!(config.frequencies[0], 1.0);
        assert_eq!(config.frequencies[63], plain(63) / 8.0);
        let between = config.frequencies[32];
        assert!(
            between < plain(32) && between > plain(32) / 8.0,
            "{between}"
        );
    }

    #[test]
    fn a_window_is_where_the_model_has_one() {
        let windows = |rest: &str| Config::parse(&format!("{LLAMA}{rest}")).unwrap().windows;
        let types =
            r#", "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}"#;
        assert_eq!(windows(types), [None, Some(8)]);
        assert_eq!(windows(", \"sliding_window\": 8}"), [Some(8), Some(8)]);
    }
}
