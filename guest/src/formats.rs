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
//!     if let Some(note) = formats.unmatched(request) {
//!         log(Level::Warn, &note);
//!     }
//!     Ok(formats.choose(request, &formats::kinds(request)))
//! }
//! ```

use crate::names::TensorKind::{self, Embedding, Expert, Linear, OutputHead};
use crate::names::{kind_of, kind_of_module};
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
    /// reserves.
    pub fn choose(&self, request: &Request, kinds: &[TensorKind]) -> Vec<Format> {
        let format = |(tensor, kind): (&Tensor, &TensorKind)| {
            let wanted = match kind {
                Linear => true,
                Expert => self.quantize_experts,
                _ => false,
            };
            if wanted && tensor.is_quantizable() && !self.skip.matches(&tensor.name) {
                Format::Nf4(self.nf4)
            } else {
                Format::Stored
            }
        };
        let mut formats: Vec<Format> = request.tensors.iter().zip(kinds).map(format).collect();
        request.fix_formats(&mut formats);
        formats
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

/// Returns what each tensor is for. A tensor that is tied to an embedding is that embedding,
/// whatever the checkpoint calls it: the first thing that is needed, and looked up in.
pub fn kinds(request: &Request) -> Vec<TensorKind> {
    let mut kinds: Vec<TensorKind> = request.tensors.iter().map(kind_of).collect();
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
