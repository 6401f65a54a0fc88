//! What the user can set.

use tightfit_guest::patterns::Patterns;
use tightfit_guest::settings::{Settings, Spec};
use tightfit_guest::{Nf4Format, Refusal, Request};

/// Every setting of the policy.
pub(crate) const SPECS: &[Spec] = &[
    Spec {
        name: "skip",
        default: "",
        help: "Modules left as stored besides the default ones, separated by commas: components of \
               a name (visual, self_attn.q_proj) or patterns with * and ? over all of it.",
    },
    Spec {
        name: "experts",
        default: "nf4",
        help: "Format of mixture-of-experts weights: nf4 or stored.",
    },
    Spec {
        name: "double-quant",
        default: "false",
        help: "Whether NF4 scales are stored in 8 bits too (true or false).",
    },
    Spec {
        name: "block-size",
        default: "64",
        help: "Elements that share an NF4 scale: a power of two from 32 to 4096.",
    },
    Spec {
        name: "reserve",
        default: "0",
        help: "Bytes left free on every device, for example 2GiB.",
    },
    Spec {
        name: "context",
        default: "0",
        help: "Tokens to leave room for in the 16-bit KV cache, beside each layer.",
    },
    Spec {
        name: "batch",
        default: "1",
        help: "Sequences that `context` counts for.",
    },
];

/// Their values.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) skip: Patterns,
    pub(crate) quantize_experts: bool,
    pub(crate) nf4: Nf4Format,
    /// Bytes per device.
    pub(crate) reserve: u64,
    /// Tokens per sequence.
    pub(crate) context: u32,
    /// Sequences.
    pub(crate) batch: u32,
}

impl Options {
    pub(crate) fn read(request: &Request) -> Result<Options, Refusal> {
        let settings = Settings::new(SPECS, request);
        let block_size = settings.u32("block-size", 32..=4096)?;
        if !block_size.is_power_of_two() {
            return Err(settings.bad("block-size", "a power of two from 32 to 4096"));
        }
        Ok(Options {
            skip: settings.patterns("skip"),
            quantize_experts: settings.choice("experts", &["nf4", "stored"])? == "nf4",
            nf4: Nf4Format {
                block_size,
                double_quantized: settings.bool("double-quant")?,
            },
            reserve: settings.bytes("reserve")?,
            context: settings.u32("context", 0..=u32::MAX)?,
            batch: settings.u32("batch", 1..=u32::MAX)?,
        })
    }
}
