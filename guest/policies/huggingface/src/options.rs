//! What the user can set.

use tightfit_guest::formats::{self, Formats};
use tightfit_guest::settings::{Settings, Spec};
use tightfit_guest::{Nf4Format, Refusal, Request};

/// Every setting of the policy.
pub(crate) const SPECS: &[Spec] = &[
    Spec {
        name: "library",
        default: "transformers",
        help: "Whose device map: transformers (that of transformers 5) or accelerate (the one that \
               transformers 4 used).",
    },
    Spec {
        name: "strategy",
        default: "auto",
        help: "auto, balanced (the same), balanced_low_0 or sequential.",
    },
    Spec {
        name: "max-memory",
        default: "",
        help: "Bytes per device as a JSON object, for example {\"0\":\"20GiB\",\"cpu\":\"60GiB\"}, \
               accelerators numbered in their order; by default what is free.",
    },
    Spec {
        name: "offload",
        default: "false",
        help: "Whether modules may go to host memory beside accelerators (true or false).",
    },
    formats::SKIP,
    Spec {
        name: "experts",
        default: "as-library",
        help: "Format of mixture-of-experts weights: as-library (transformers 5 leaves them stored, \
               transformers 4 quantized those that were not stacks), nf4 or stored.",
    },
    formats::DOUBLE_QUANT,
    formats::BLOCK_SIZE,
];

/// Whose arithmetic is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Library {
    /// accelerate, as transformers 4.5x called it.
    Accelerate,
    /// transformers 5.
    Transformers,
}

/// `device_map`, where it is a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Strategy {
    Balanced,
    BalancedLow0,
    Sequential,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Experts {
    AsLibrary,
    Nf4,
    Stored,
}

/// The settings' values.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) library: Library,
    pub(crate) strategy: Strategy,
    pub(crate) offload: bool,
    pub(crate) experts: Experts,
    /// What experts make of it is in `experts`.
    pub(crate) formats: Formats,
}

impl Options {
    pub(crate) fn read(settings: &Settings<'_>) -> Result<Options, Refusal> {
        let library = match settings.choice("library", &["accelerate", "transformers"])? {
            "accelerate" => Library::Accelerate,
            _ => Library::Transformers,
        };
        let words = ["auto", "balanced", "balanced_low_0", "sequential"];
        let strategy = match settings.choice("strategy", &words)? {
            "balanced_low_0" => Strategy::BalancedLow0,
            "sequential" => Strategy::Sequential,
            _ => Strategy::Balanced,
        };
        let experts = match settings.choice("experts", &["as-library", "nf4", "stored"])? {
            "nf4" => Experts::Nf4,
            "stored" => Experts::Stored,
            _ => Experts::AsLibrary,
        };
        let block_size = settings.u32(formats::BLOCK_SIZE.name, 32..=4096)?;
        if !block_size.is_power_of_two() {
            return Err(settings.bad(formats::BLOCK_SIZE.name, "a power of two from 32 to 4096"));
        }
        Ok(Options {
            library,
            strategy,
            offload: settings.bool("offload")?,
            experts,
            formats: Formats {
                skip: settings.patterns(formats::SKIP.name),
                quantize_experts: experts == Experts::Nf4,
                nf4: Nf4Format {
                    block_size,
                    double_quantized: settings.bool(formats::DOUBLE_QUANT.name)?,
                },
            },
        })
    }

    pub(crate) fn of(request: &Request) -> Result<Options, Refusal> {
        Options::read(&Settings::new(SPECS, request))
    }
}
