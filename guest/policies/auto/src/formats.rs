//! Which tensor is quantized.

use tightfit_guest::names::TensorKind::{self, Embedding, Expert, Linear, OutputHead};
use tightfit_guest::names::{kind_of, kind_of_module};
use tightfit_guest::{Format, Request};

use crate::options::Options;

/// What each tensor is for. A tensor that is tied to an embedding is that embedding, whatever
/// the checkpoint calls it: the first thing that is needed, and looked up in.
pub(crate) fn kinds(request: &Request) -> Vec<TensorKind> {
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

/// The format of each tensor.
pub(crate) fn formats(request: &Request, kinds: &[TensorKind], options: &Options) -> Vec<Format> {
    let format = |(tensor, kind): (&tightfit_guest::Tensor, &TensorKind)| {
        let wanted = match kind {
            Linear => true,
            Expert => options.quantize_experts,
            _ => false,
        };
        if wanted && tensor.is_quantizable() && !options.skip.matches(&tensor.name) {
            Format::Nf4(options.nf4)
        } else {
            Format::Stored
        }
    };
    request.tensors.iter().zip(kinds).map(format).collect()
}
