//! Experts that are tensors of their own, laid out as the stacks that models and kernels want: all codes of
//! a stack one behind the other, then all of its scales.
//!
//! What a checkpoint has as `experts.0.gate_proj.weight`, `experts.0.up_proj.weight` and so on is then
//! `gate_up_proj` [experts, 2 * intermediate, hidden] in memory, as transformers 5 has it, gates before the
//! other rows of each expert. Nothing takes a byte more or less for it, so that policies need not know:
//! only where codes and scales are whole multiples of [`PART_ALIGNMENT`] there is nothing between them, and only such
//! are laid out so. Of double-quantized experts, which have a mean each, the nested scales of each begin at
//! such a multiple, whatever lies between them.

use std::collections::HashMap;

use super::{PART_ALIGNMENT, PartKind, PartSizes};
use crate::cancel::{Cancelled, Watch};
use crate::checkpoint::TensorInfo;
use crate::types::Placement;

/// Tensors that can be laid out as one stack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stack {
    /// Their indices, in the order of the stack.
    pub(super) members: Vec<usize>,
    /// Matrices of the stack, and rows and columns of each: gates and up projections are one.
    pub(super) shape: [u64; 3],
    /// Whether it has gates and up projections.
    pub(super) is_of_gates: bool,
}

/// Which matrix of an expert a tensor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Projection {
    Gate,
    Up,
    Down,
}

/// What the experts of a layer have in common: the module, and how their tensors are named.
type Layer<'a> = (&'a str, bool, bool);

/// A tensor for one expert, by its name: `experts.0.gate_proj.weight`, or `experts.0.w1.weight` as Mixtral
/// has it.
fn of_expert(name: &str) -> Option<(Layer<'_>, usize, Projection)> {
    let stem = name.strip_suffix(".weight");
    let (rest, leaf) = stem.unwrap_or(name).rsplit_once('.')?;
    let (projection, is_short) = match leaf {
        "gate_proj" => (Projection::Gate, false),
        "up_proj" => (Projection::Up, false),
        "down_proj" => (Projection::Down, false),
        "w1" => (Projection::Gate, true),
        "w3" => (Projection::Up, true),
        "w2" => (Projection::Down, true),
        _ => return None,
    };
    let (module, number) = rest.rsplit_once('.')?;
    let is_number = number.bytes().all(|digit| digit.is_ascii_digit())
        && (number == "0" || !number.starts_with('0'));
    let expert = number.parse().ok().filter(|_| is_number)?;
    module.ends_with("experts").then_some(())?;
    Some(((module, is_short, stem.is_some()), expert, projection))
}

/// The experts of one layer: number and index of each tensor.
#[derive(Default)]
struct Found {
    gate: Vec<(usize, usize)>,
    up: Vec<(usize, usize)>,
    down: Vec<(usize, usize)>,
}

/// All stacks that there can be, by names, types and shapes, in the order of their first tensors.
///
/// # Errors
/// [`Cancelled`].
pub(super) fn possible(
    tensors: &[TensorInfo],
    watch: &mut Watch<'_>,
) -> Result<Vec<Stack>, Cancelled> {
    let mut layers: Vec<Found> = Vec::new();
    let mut by_name: HashMap<Layer<'_>, usize> = HashMap::new();
    for (index, tensor) in tensors.iter().enumerate() {
        watch.item(tensor.name.len())?;
        let Some((layer, expert, projection)) = of_expert(&tensor.name) else {
            continue;
        };
        let number = *by_name.entry(layer).or_insert(layers.len());
        if number == layers.len() {
            layers.push(Found::default());
        }
        let found = &mut layers[number];
        let found = match projection {
            Projection::Gate => &mut found.gate,
            Projection::Up => &mut found.up,
            Projection::Down => &mut found.down,
        };
        found.push((expert, index));
    }
    let mut stacks = Vec::new();
    for found in layers {
        watch.item(0)?;
        let [gate, up, down] = [found.gate, found.up, found.down].map(in_order);
        let both = gate.as_deref().zip(up.as_deref()).and_then(interleaved);
        match both.and_then(|both| Stack::of(tensors, both, true)) {
            Some(both) => stacks.push(both),
            None => stacks.extend(
                [gate, up]
                    .into_iter()
                    .flatten()
                    .filter_map(|each| Stack::of(tensors, each, false)),
            ),
        }
        stacks.extend(down.and_then(|down| Stack::of(tensors, down, false)));
    }
    stacks.sort_unstable_by_key(|stack| stack.members.iter().copied().min());
    Ok(stacks)
}

/// Indices in the order of experts, of which none is missing or there twice.
fn in_order(mut found: Vec<(usize, usize)>) -> Option<Vec<usize>> {
    found.sort_unstable();
    let is_whole = found
        .iter()
        .enumerate()
        .all(|(number, (expert, _))| number == *expert);
    (is_whole && !found.is_empty()).then(|| found.into_iter().map(|(_, index)| index).collect())
}

fn interleaved((gate, up): (&[usize], &[usize])) -> Option<Vec<usize>> {
    let each = gate.iter().zip(up).flat_map(|(gate, up)| [*gate, *up]);
    (gate.len() == up.len()).then(|| each.collect())
}

impl Stack {
    fn of(tensors: &[TensorInfo], members: Vec<usize>, is_of_gates: bool) -> Option<Stack> {
        let first = &tensors[*members.first()?];
        let &[rows, columns] = &first.shape[..] else {
            return None;
        };
        let quantization = |tensor: &TensorInfo| {
            let quantized = tensor.quantized.as_ref()?;
            Some((
                quantized.quant_type,
                quantized.block_size,
                quantized.nested.is_some(),
            ))
        };
        let is_like_first = |&index: &usize| {
            let tensor = &tensors[index];
            (tensor.dtype, &tensor.shape) == (first.dtype, &first.shape)
                && quantization(tensor) == quantization(first)
        };
        members.iter().all(is_like_first).then_some(())?;
        let matrices = members.len() as u64;
        let shape = match is_of_gates {
            true => [matrices / 2, rows.checked_mul(2)?, columns],
            false => [matrices, rows, columns],
        };
        Some(Stack {
            members,
            shape,
            is_of_gates,
        })
    }

    /// Whether it is laid out as one: all of it on one device and in one format, without anything between
    /// its codes or its scales.
    pub(super) fn is_one(&self, placements: &[Placement], sizes: &[Option<PartSizes>]) -> bool {
        let first = self.members[0];
        let Some(parts) = &sizes[first] else {
            return false;
        };
        let mut has_whole_parts = parts.iter().all(|(kind, bytes)| {
            kind == PartKind::NestedAbsmax || bytes.is_multiple_of(PART_ALIGNMENT)
        });
        has_whole_parts &= placements[first].device.is_some();
        has_whole_parts
            && self.members.iter().all(|&index| {
                placements[index] == placements[first] && sizes[index] == sizes[first]
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_experts_are_told_from_others() {
        let of = |name| {
            of_expert(name).map(|((module, ..), expert, projection)| (module, expert, projection))
        };
        assert_eq!(
            of("model.layers.3.mlp.experts.17.up_proj.weight"),
            Some(("model.layers.3.mlp.experts", 17, Projection::Up))
        );
        assert_eq!(of("experts.0.w2"), Some(("experts", 0, Projection::Down)));
        for name in [
            "model.layers.3.mlp.up_proj.weight",
            "model.layers.3.up_proj.weight",
            "model.layers.3.mlp.experts.gate_up_proj",
            "experts.01.w1.weight",
            "experts.+1.w1.weight",
            "experts..w1.weight",
            "experts.1.w1.bias",
            "experts.99999999999999999999999.w1.weight",
            "w1",
            ".w1",
            "",
        ] {
            assert_eq!(of(name), None, "{name}");
        }
    }
}
