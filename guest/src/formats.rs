//! Which tensor is stored in which format: the choice of the built-in policies.
//!
//! NF4 for every matrix of a linear layer and for all experts, everything else as stored. The user
//! can say otherwise with four settings, which a policy lists among its own, and for any tensor
//! with a rule (`--set format:"PATTERN"=FORMAT`), which the host enforces and states in the request:
//!
//! ```
//! use tightfit_guest::formats::{self, Formats};
//! use tightfit_guest::settings::{RESERVE, Settings, Spec};
//! use tightfit_guest::{Format, Level, Refusal, Request, log};
//!
//! const SPECS: &[Spec] = &[
//!     formats::SKIP,
//!     formats::EXPERTS,
//!     formats::DOUBLE_QUANT,
//!     formats::BLOCK_SIZE,
//!     RESERVE,
//! ];
//!
//! fn formats_of(request: &Request) -> Result<Vec<Format>, Refusal> {
//!     let formats = Formats::read(&Settings::new(SPECS, request))?;
//!     for warning in formats.warnings(request) {
//!         log(Level::Warn, &warning);
//!     }
//!     Ok(formats.choose(request, &formats::kinds(request)))
//! }
//! ```

use std::collections::BTreeSet;

use crate::config;
use crate::kept::{skipped, transposed};
use crate::names::TensorKind::{self, Embedding, Expert, Linear, OutputHead};
use crate::names::{kind_of, kind_of_module, layer_of};
use crate::patterns::Patterns;
use crate::settings::{Settings, Spec};
use crate::{Format, Nf4Format, Refusal, Request, Tensor};

/// The setting `skip`, by default empty: what stays as stored besides what always does, as
/// [`Patterns`].
pub const SKIP: Spec = Spec {
    name: "skip",
    default: "",
    help: "Modules left as stored besides the default ones, separated by commas: components of a \
           name (visual, self_attn.q_proj) or patterns with * and ? over all of it.",
};

/// The setting `experts`, by default `nf4`: whether experts are quantized; `stored` where not.
pub const EXPERTS: Spec = Spec {
    name: "experts",
    default: "nf4",
    help: "Format of mixture-of-experts weights: nf4 or stored.",
};

/// The setting `double-quant`, by default `false`: whether scales take 8 bits instead of 32.
pub const DOUBLE_QUANT: Spec = Spec {
    name: "double-quant",
    default: "false",
    help: "Whether NF4 scales are stored in 8 bits too (true or false).",
};

/// The setting `block-size`, by default `64`: the number of elements that share a scale.
pub const BLOCK_SIZE: Spec = Spec {
    name: "block-size",
    default: "64",
    help: "Elements that share an NF4 scale: a power of two from 32 to 4096.",
};

/// The values of [`SKIP`], [`EXPERTS`], [`DOUBLE_QUANT`] and [`BLOCK_SIZE`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Formats {
    /// What stays as stored besides what always does.
    pub skip: Patterns,
    /// Whether experts are quantized.
    pub quantize_experts: bool,
    /// The format of what is quantized.
    pub nf4: Nf4Format,
}

impl Formats {
    /// Reads them. The policy's list must have all four.
    ///
    /// # Errors
    /// A refusal that names the setting whose value cannot be used, and says what is allowed.
    pub fn read(settings: &Settings<'_>) -> Result<Formats, Refusal> {
        let block_size = settings.u32(BLOCK_SIZE.name, 32..=4096)?;
        if !block_size.is_power_of_two() {
            return Err(settings.bad(BLOCK_SIZE.name, "a power of two from 32 to 4096"));
        }
        Ok(Formats {
            skip: settings.patterns(SKIP.name),
            quantize_experts: settings.choice(EXPERTS.name, &["nf4", "stored"])? == "nf4",
            nf4: Nf4Format {
                block_size,
                double_quantized: settings.bool(DOUBLE_QUANT.name)?,
            },
        })
    }

    /// Returns the format of each tensor of the request; `kinds` are those that [`kinds`] finds.
    /// Formats that the user has fixed are among them, so that sizes are those that the host
    /// reserves. What [`keeps`] says stays as stored.
    pub fn choose(&self, request: &Request, kinds: &[TensorKind]) -> Vec<Format> {
        self.choose_where(request, |t| match kinds[t] {
            Linear => true,
            Expert => self.quantize_experts,
            _ => false,
        })
    }

    /// Returns the format of each tensor of the request, as [`Formats::choose`] does, where `wanted` says
    /// by its index whether a tensor is of a kind that is quantized.
    pub fn choose_where(&self, request: &Request, wanted: impl Fn(usize) -> bool) -> Vec<Format> {
        let kept = keeps(request);
        let format = |(t, tensor): (usize, &Tensor)| {
            let quantized = wanted(t) && !kept[t] && tensor.is_quantizable();
            match quantized && !self.skip.matches(&tensor.name) {
                true => Format::Nf4(self.nf4),
                false => Format::Stored,
            }
        };
        let mut formats: Vec<Format> = request.tensors.iter().enumerate().map(format).collect();
        request.fix_formats(&mut formats);
        formats
    }

    /// Returns what the user should know of the formats: patterns of [`SKIP`] that match nothing, and why
    /// matrices are left as stored that would be expected in NF4.
    pub fn warnings(&self, request: &Request) -> Vec<String> {
        let mut warnings: Vec<String> = self.unmatched(request).into_iter().collect();
        let transposed = transposed(request);
        let conv1d = transposed.iter().filter(|&&transposed| transposed).count();
        if let Some(first) = transposed.iter().position(|&transposed| transposed) {
            warnings.push(format!(
                "{conv1d} matrices stay as stored, {} the first of them: they are of Conv1D modules, whose rows \
                 are inputs, and 4-bit weights are those of the transposed matrix",
                request.tensors[first].name
            ));
        }
        warnings
    }

    /// Returns a warning for the user where patterns of [`SKIP`] match no tensor: mostly they are
    /// misspelt.
    pub fn unmatched(&self, request: &Request) -> Option<String> {
        let names = request.tensors.iter().map(|tensor| tensor.name.as_str());
        let unmatched = self.skip.unmatched(names);
        let shown = &unmatched[..unmatched.len().min(MOST_PATTERNS)];
        let patterns: Vec<String> = shown.iter().map(|text| format!("`{text}`")).collect();
        let more = match unmatched.len() - shown.len() {
            0 if shown.is_empty() => return None,
            0 => String::new(),
            others => format!(" and {others} others"),
        };
        Some(format!(
            "setting `{}`: no tensor matches {}{more}",
            SKIP.name,
            patterns.join(", ")
        ))
    }
}

/// Patterns that are named in one warning.
const MOST_PATTERNS: usize = 8;

/// For each tensor, whether it stays as stored because of what the checkpoint is: the matrices of Conv1D
/// modules, whose rows are inputs, and modules that a checkpoint in 4 bits has left out on purpose
/// (`llm_int8_skip_modules` in its config.json).
pub fn keeps(request: &Request) -> Vec<bool> {
    let mut keeps = transposed(request);
    for (keeps, skipped) in keeps.iter_mut().zip(skipped(request)) {
        *keeps |= skipped;
    }
    keeps
}

/// Returns what each tensor is for. A tensor that is tied to an embedding is that embedding,
/// whatever the checkpoint calls it: the first thing that is needed, and looked up in. A matrix outside
/// of all layers with a row for each entry of a vocabulary (`vocab_size` anywhere in config.json) is a
/// table or an output head, whatever it is called.
pub fn kinds(request: &Request) -> Vec<TensorKind> {
    let mut kinds: Vec<TensorKind> = request.tensors.iter().map(kind_of).collect();
    let mut sizes = None;
    for (kind, tensor) in kinds.iter_mut().zip(&request.tensors) {
        if *kind == Linear
            && let [rows, _] = tensor.shape[..]
            && layer_of(&tensor.name).is_none()
        {
            // Most models have no such matrix: config.json is read for those that do.
            let sizes = sizes.get_or_insert_with(|| vocabularies(&request.config_json));
            if sizes.contains(&rows) {
                *kind = if tensor.name.contains("emb") {
                    Embedding
                } else {
                    OutputHead
                };
            }
        }
    }
    for tie in &request.ties {
        let alias = kind_of_module(&tie.alias);
        if let Some(kind) = kinds.get_mut(tie.tensor as usize)
            && (alias == Embedding || alias == OutputHead && *kind != Embedding)
        {
            *kind = alias;
        }
    }
    kinds
}

/// Returns the sizes of all vocabularies that a configuration has.
fn vocabularies(config_json: &str) -> BTreeSet<u64> {
    let mut sizes = BTreeSet::new();
    let config = config::parse(config_json);
    config::visit(&config, &mut |key, value| {
        if key.ends_with("vocab_size") {
            sizes.extend(value.as_u64());
        }
    });
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Dtype, RequiredFormat};

    #[test]
    fn a_required_format_comes_before_every_setting() {
        let tensor = |name: &str| Tensor::new(name, Dtype::Bf16, &[64, 64]);
        let names = ["lm_head.weight", "a.up_proj.weight", "a.down_proj.weight"];
        let nf4 = |block_size, double_quantized| {
            Format::Nf4(Nf4Format {
                block_size,
                double_quantized,
            })
        };
        let required = |tensor, format| RequiredFormat { tensor, format };
        let request = Request {
            required_formats: vec![
                required(0, nf4(32, true)),
                required(1, Format::Cast(Dtype::F16)),
                // The host names only tensors that there are; another would be its mistake.
                required(9, Format::Stored),
            ],
            ..Request::new(names.map(tensor).into(), vec![]).set("skip", "down_proj")
        };
        let specs = [SKIP, EXPERTS, DOUBLE_QUANT, BLOCK_SIZE];
        let choose = |request: &Request| {
            let formats = Formats::read(&Settings::new(&specs, request)).unwrap();
            formats.choose(request, &kinds(request))
        };
        let fixed = [nf4(32, true), Format::Cast(Dtype::F16), Format::Stored];
        assert_eq!(choose(&request), fixed);
        let free = Request {
            required_formats: vec![],
            ..request
        };
        let own = [Format::Stored, nf4(64, false), Format::Stored];
        assert_eq!(choose(&free), own);
    }

    /// Names of what is quantized by default.
    fn quantized(request: &Request) -> Vec<&str> {
        let specs = [SKIP, EXPERTS, DOUBLE_QUANT, BLOCK_SIZE];
        let formats = Formats::read(&Settings::new(&specs, request)).unwrap();
        let chosen = formats.choose(request, &kinds(request));
        let both = request.tensors.iter().zip(chosen);
        let quantized = both.filter(|(_, format)| *format != Format::Stored);
        quantized.map(|(tensor, _)| tensor.name.as_str()).collect()
    }

    fn model(names: &[(&str, [u64; 2])], config: &str) -> Request {
        let tensor = |(name, shape): &(&str, [u64; 2])| Tensor::new(*name, Dtype::Bf16, shape);
        Request {
            config_json: config.into(),
            ..Request::new(names.iter().map(tensor).collect(), vec![])
        }
    }

    #[test]
    fn a_row_for_each_entry_of_a_vocabulary_is_a_table_or_a_head() {
        let tensors = [
            ("model.tokens.weight", [300, 64]),
            ("model.emb_of_tokens.weight", [200, 64]),
            ("decode.weight", [300, 64]),
            ("projector.weight", [64, 64]),
            // In a layer it is what it looks like.
            ("model.layers.0.mlp.up_proj.weight", [300, 64]),
        ];
        let config = r#"{"a_config": {"vocab_size": 300}, "text_vocab_size": 200}"#;
        let request = model(&tensors, config);
        assert_eq!(
            kinds(&request)[..4],
            [OutputHead, Embedding, OutputHead, Linear]
        );
        let linear = ["projector.weight", "model.layers.0.mlp.up_proj.weight"];
        assert_eq!(quantized(&request), linear);
        assert_eq!(quantized(&model(&tensors, "{}")).len(), 5);
    }

    #[test]
    fn conv1d_stays_as_stored_and_a_warning_says_why() {
        let tensors = [
            ("h.0.attn.c_attn.weight", [64, 192]),
            ("h.0.attn.c_proj.weight", [64, 64]),
            ("adapter.weight", [64, 64]),
        ];
        let request = model(&tensors, r#"{"model_type": "gpt2"}"#);
        assert_eq!(quantized(&request), ["adapter.weight"]);
        let specs = [SKIP, EXPERTS, DOUBLE_QUANT, BLOCK_SIZE];
        let formats = Formats::read(&Settings::new(&specs, &request)).unwrap();
        let warnings = formats.warnings(&request);
        assert!(
            warnings[0].starts_with("2 matrices stay as stored, h.0.attn.c_attn.weight"),
            "{warnings:?}"
        );
    }

    #[test]
    fn modules_that_a_quantized_checkpoint_skipped_stay_as_stored() {
        let tensors = [
            ("model.layers.0.mlp.up_proj.weight", [64, 64]),
            ("model.layers.0.mlp.down_proj.weight", [64, 64]),
            ("model.layers.1.mlp.up_proj.weight", [64, 64]),
        ];
        let config = |list: &str| {
            format!(
                r#"{{"quantization_config": {{"load_in_4bit": true, "{list}": ["model.layers.0.mlp.down_proj"]}}}}"#
            )
        };
        for list in ["llm_int8_skip_modules", "modules_to_not_convert"] {
            let mut request = model(&tensors, &config(list));
            // Without a weight in 4 bits it is no such checkpoint.
            assert_eq!(quantized(&request).len(), 3);
            request.tensors[2].quantized = Some(crate::Quantization {
                quant_type: crate::QuantType::Nf4,
                block_size: 64,
                double_quantized: false,
            });
            assert_eq!(quantized(&request), [tensors[0].0]);
        }
    }

    #[test]
    fn patterns_that_match_nothing_are_pointed_out() {
        let tensors = vec![Tensor::new("a.up_proj.weight", Dtype::Bf16, &[64, 64])];
        let note = |skip: &str| {
            let request = Request::new(tensors.clone(), vec![]).set("skip", skip);
            let specs = [SKIP, EXPERTS, DOUBLE_QUANT, BLOCK_SIZE];
            let formats = Formats::read(&Settings::new(&specs, &request)).unwrap();
            formats.unmatched(&request)
        };
        for skip in ["", "up_proj", "a.*, up_proj", "*"] {
            assert_eq!(note(skip), None, "{skip}");
        }
        let expected = "setting `skip`: no tensor matches `q_proj`, `b.*`";
        assert_eq!(note("q_proj, a, b.*").as_deref(), Some(expected));
        let many: Vec<String> = (0..100).map(|i| format!("x{i}")).collect();
        let note = note(&many.join(",")).unwrap();
        assert!(note.ends_with("`x7` and 92 others"), "{note}");
    }
}
