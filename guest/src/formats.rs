//! Which tensor is stored in which format: the choice of the built-in policies.
//!
//! NF4 for every matrix of a linear layer and for all experts, everything else as stored. The user
//! can say otherwise with four settings, which a policy lists among its own:
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

    /// The format of each tensor of the request; `kinds` are those that [`kinds`] finds.
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
        request.tensors.iter().zip(kinds).map(format).collect()
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
