//! What the user can set.

use tightfit_guest::formats::{self, Formats};
use tightfit_guest::settings::{RESERVE, Settings, Spec};
use tightfit_guest::{Refusal, Request};

/// Every setting of the policy.
pub(crate) const SPECS: &[Spec] = &[
    formats::SKIP,
    formats::EXPERTS,
    formats::DOUBLE_QUANT,
    formats::BLOCK_SIZE,
    RESERVE,
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
    Spec {
        name: "encoder-context",
        default: "0",
        help: "Tokens of an encoder that `context` counts for, in the cache of cross-attention; 0 for as \
               many as config.json fixes, or else as many as `context`.",
    },
    Spec {
        name: "latent-cache",
        default: "expanded",
        help: "What is cached of latent attention (MLA): expanded keys and values, as in transformers, or \
               compressed.",
    },
];

/// Their values.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) formats: Formats,
    /// Bytes per device.
    pub(crate) reserve: u64,
    /// Tokens per sequence.
    pub(crate) context: u32,
    /// Sequences.
    pub(crate) batch: u32,
    /// Tokens of an encoder, 0 where the user says nothing.
    pub(crate) encoder_context: u32,
    /// Whether latent attention is cached as it is, not as the keys and values that are made of it.
    pub(crate) compressed_latent: bool,
}

impl Options {
    pub(crate) fn read(request: &Request) -> Result<Options, Refusal> {
        let settings = Settings::new(SPECS, request);
        Ok(Options {
            formats: Formats::read(&settings)?,
            reserve: settings.bytes(RESERVE.name)?,
            context: settings.u32("context", 0..=u32::MAX)?,
            batch: settings.u32("batch", 1..=u32::MAX)?,
            encoder_context: settings.u32("encoder-context", 0..=u32::MAX)?,
            compressed_latent: settings.choice("latent-cache", &["expanded", "compressed"])?
                == "compressed",
        })
    }
}
