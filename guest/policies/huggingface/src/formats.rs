//! What each library quantizes.

use tightfit_guest::names::TensorKind::{self, Expert, Linear, Router};
use tightfit_guest::{Format, Request, Tensor};

use crate::options::{Experts, Library, Options};

/// Returns the format of each tensor.
pub(crate) fn formats(request: &Request, kinds: &[TensorKind], options: &Options) -> Vec<Format> {
    options.formats.choose_where(request, |t| match kinds[t] {
        Linear => true,
        Expert => match options.experts {
            Experts::Nf4 => true,
            Experts::Stored => false,
            Experts::AsLibrary => as_linear(&request.tensors[t], options.library),
        },
        Router => as_linear(&request.tensors[t], options.library),
        _ => false,
    })
}

/// Returns whether it is the matrix of a linear layer in memory. Transformers 5 makes stacks of all
/// experts and plain parameters of routers; in version 4 they were linear layers unless a
/// checkpoint held stacks.
fn as_linear(tensor: &Tensor, library: Library) -> bool {
    library == Library::Accelerate && tensor.shape.len() == 2 && tensor.name.ends_with(".weight")
}
