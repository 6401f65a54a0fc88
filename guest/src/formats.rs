//! Which tensor is stored in which format: the choice of the built-in policies.
//!
//! NF4 for every matrix of a linear layer and for all experts, everything else as stored. The user
//! can say otherwise with four settings, which a policy lists among its own, and for any tensor
//! with a rule (`--set format:"PATTERN"=FORMAT`), which the host enforces and states in the request:
//!
//! ```
//! use tightfit_guest::formats::{self, Formats};
//! use tightfit_guest::settings::{Settings, Spec};
//! use tightfit_guest::{Format, Refusal, Request};
//!
//! const SPECS: &[Spec] = &[
//!     formats::SKIP,
//!     formats::EXPERTS,
//!     formats::DOUBLE_QUANT,
//!     formats::BLOCK_SIZE,
//!     Spec { name: "reserve", default: "0", help: "Bytes left free on every device." },
//! ];
//!
//! fn formats_of(request: &Request) -> Result<Vec<Format>, Refusal> {
//!     let formats = Formats::read(&Settings::new(SPECS, request))?;
//!     Ok(formats.choose(request, &formats::kinds(request)))
//! }
//! ```

use crate::names::TensorKind::{self, Embedding, Expert, Linear, OutputHead};
use crate::names::{kind_of, kind_of_module};
use crate::patterns::Patterns;
use crate::settings::{Settings, Spec};
use crate::{Format, Nf4Format, Refusal, Request, Tensor};

/// What stays as stored besides what always does.
pub const SKIP: Spec = Spec {
    name: "skip",
    default: "",
    help: "Modules left as stored besides the default ones, separated by commas: components of a \
           name (visual, self_attn.q_proj) or patterns with * and ? over all of it.",
};

/// Whether experts are quantized.
pub const EXPERTS: Spec = Spec {
    name: "experts",
    default: "nf4",
    help: "Format of mixture-of-experts weights: nf4 or stored.",
};

/// Whether scales take 8 bits instead of 32.
pub const DOUBLE_QUANT: Spec = Spec {
    name: "double-quant",
    default: "false",
    help: "Whether NF4 scales are stored in 8 bits too (true or false).",
};

/// How many elements share a scale.
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

    /// The format of each tensor of the request; `kinds` are those that [`kinds`] finds. Formats
    /// that the user has fixed are among them, so that sizes are those that the host reserves.
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
        for required in &request.required_formats {
            if let Some(format) = formats.get_mut(required.tensor as usize) {
                *format = required.format;
            }
        }
        formats
    }
}

/// What each tensor is for. A tensor that is tied to an embedding is that embedding, whatever
/// the checkpoint calls it: the first thing that is needed, and looked up in.
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
    use crate::{DType, RequiredFormat};

    #[test]
    fn a_required_format_comes_before_every_setting() {
        let tensor = |name: &str| Tensor {
            name: name.into(),
            dtype: DType::Bf16,
            shape: vec![64, 64],
            bytes: 8192,
            quantized: None,
        };
        let names = ["lm_head.weight", "a.up_proj.weight", "a.down_proj.weight"];
        let nf4 = |block_size, double_quantized| {
            Format::Nf4(Nf4Format {
                block_size,
                double_quantized,
            })
        };
        let required = |tensor, format| RequiredFormat { tensor, format };
        let request = Request {
            config_json: "{}".into(),
            tensors: names.map(tensor).into(),
            ties: vec![],
            devices: vec![],
            settings: vec![("skip".into(), "down_proj".into())],
            required_formats: vec![
                required(0, nf4(32, true)),
                required(1, Format::Cast(DType::F16)),
                // The host names only tensors that there are; another would be its mistake.
                required(9, Format::Stored),
            ],
            failure: None,
        };
        let specs = [SKIP, EXPERTS, DOUBLE_QUANT, BLOCK_SIZE];
        let choose = |request: &Request| {
            let formats = Formats::read(&Settings::new(&specs, request)).unwrap();
            formats.choose(request, &kinds(request))
        };
        let fixed = [nf4(32, true), Format::Cast(DType::F16), Format::Stored];
        assert_eq!(choose(&request), fixed);
        let free = Request {
            required_formats: vec![],
            ..request
        };
        let own = [Format::Stored, nf4(64, false), Format::Stored];
        assert_eq!(choose(&free), own);
    }
}
