//! Experts that the checkpoint has as tensors of their own, where the model in memory has one stack.

use std::collections::BTreeMap;

use tightfit_guest::Request;

/// The experts of a checkpoint.
#[derive(Debug)]
pub(crate) struct Experts<'a> {
    /// How many there are, by what their names begin with.
    counts: BTreeMap<&'a str, u64>,
}

impl<'a> Experts<'a> {
    pub(crate) fn of(request: &'a Request) -> Experts<'a> {
        let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
        for tensor in &request.tensors {
            if let Some((stack, number)) = split(&tensor.name) {
                let count = counts.entry(stack).or_default();
                *count = (*count).max(number.saturating_add(1));
            }
        }
        Experts { counts }
    }

    /// Returns the number of the expert that a tensor is of, and how many there are in its stack.
    pub(crate) fn number(&self, name: &str) -> Option<(u64, u64)> {
        let (stack, number) = split(name)?;
        Some((number, *self.counts.get(stack)?))
    }
}

/// Returns what the names of an expert's stack begin with, and its number: `a.experts` and 7 of
/// `a.experts.7.up_proj.weight`.
fn split(name: &str) -> Option<(&str, u64)> {
    const EXPERTS: &str = "experts.";
    let at = name.rfind(EXPERTS)?;
    let is_component = at == 0 || name.as_bytes()[at - 1] == b'.';
    let (stack, rest) = (&name[..at + EXPERTS.len() - 1], &name[at + EXPERTS.len()..]);
    let (number, _) = rest.split_once('.')?;
    let is_number = !number.is_empty() && number.bytes().all(|c| c.is_ascii_digit());
    (is_component && is_number).then_some((stack, number.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tightfit_guest::{Dtype, Tensor};

    #[test]
    fn experts_are_counted_stack_by_stack() {
        let names = [
            "model.layers.0.mlp.experts.0.up_proj.weight",
            "model.layers.0.mlp.experts.7.up_proj.weight",
            "model.layers.1.block_sparse_moe.experts.3.w1.weight",
            "model.layers.1.mlp.shared_experts.up_proj.weight",
            "model.layers.1.mlp.noexperts.3.w1.weight",
        ];
        let tensors = names.map(|name| Tensor::new(name, Dtype::Bf16, &[8, 8]));
        let request = Request::new(tensors.into(), vec![]);
        let experts = Experts::of(&request);
        let numbers = names.map(|name| experts.number(name));
        assert_eq!(
            numbers,
            [Some((0, 8)), Some((7, 8)), Some((3, 4)), None, None]
        );
    }
}
