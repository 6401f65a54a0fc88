//! The model as a sequence of parts that should stay whole.

use std::collections::BTreeMap;

use tightfit_guest::Request;
use tightfit_guest::names::TensorKind::{self, Embedding, Norm, OutputHead};
use tightfit_guest::names::{kind_of_module, layer_of, module_of, side_branch_of};

/// A part of the model, in the order in which a forward pass comes to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part<'a> {
    /// Embeddings, and whatever else stands outside the layers.
    Input,
    /// A vision or audio tower, or its projector.
    Tower(&'a str),
    /// One layer.
    Layer {
        /// Which stack runs first where there are several.
        rank: u8,
        stack: &'a str,
        index: u32,
    },
    /// Heads for multi-token prediction.
    Ahead(&'a str),
    FinalNorm,
    Output,
}

/// Tensors that should stay together.
#[derive(Debug)]
pub(crate) struct Unit<'a> {
    pub(crate) part: Part<'a>,
    /// Indices into the request's tensors, in its order.
    pub(crate) tensors: Vec<u32>,
}

/// Returns everything that is to be loaded, in model order. Checkpoints are in another: shards are
/// often sorted by name.
pub(crate) fn in_model_order<'a>(
    request: &'a Request,
    kinds: &[TensorKind],
    duplicates: &[bool],
) -> Vec<Unit<'a>> {
    let mut units = collect(request, kinds, duplicates, true);
    // A tower that stands alone is the model.
    if !units
        .iter()
        .any(|unit| matches!(unit.part, Part::Layer { .. }))
    {
        units = collect(request, kinds, duplicates, false);
    }
    units
}

fn collect<'a>(
    request: &'a Request,
    kinds: &[TensorKind],
    duplicates: &[bool],
    with_towers: bool,
) -> Vec<Unit<'a>> {
    // Neighbors in a checkpoint are mostly neighbors in the model: collecting runs first is much
    // less work than looking up the unit of each of 100,000 tensors.
    let mut runs: Vec<Unit<'a>> = Vec::new();
    let mut prefix = None;
    for (t, tensor) in request.tensors.iter().enumerate() {
        if duplicates[t] {
            continue;
        }
        let name = tensor.name.as_str();
        if let (Some(prefix), Some(run)) = (prefix, runs.last_mut())
            && name.starts_with(prefix)
        {
            run.tensors.push(t as u32);
            continue;
        }
        let part = part_of(name, kinds[t], with_towers);
        prefix = prefix_of(name, part);
        runs.push(Unit {
            part,
            tensors: vec![t as u32],
        });
    }
    let mut units: BTreeMap<Part<'a>, Vec<u32>> = BTreeMap::new();
    for mut run in runs {
        units.entry(run.part).or_default().append(&mut run.tensors);
    }
    let unit = |(part, tensors)| Unit { part, tensors };
    units.into_iter().map(unit).collect()
}

/// Returns what the names of a part's tensors all begin with, and those of no other part.
fn prefix_of<'a>(name: &'a str, part: Part<'_>) -> Option<&'a str> {
    let numbered = match part {
        Part::Layer { stack, .. } => stack.len() + 1,
        Part::Tower(branch) | Part::Ahead(branch) => branch.len(),
        Part::Input | Part::FinalNorm | Part::Output => return None,
    };
    let end = numbered + name.get(numbered..)?.find('.')? + 1;
    name.get(..end)
}

fn part_of(name: &str, kind: TensorKind, with_towers: bool) -> Part<'_> {
    if with_towers && let Some(branch) = side_branch_of(name) {
        return if branch.ends_with("mtp") {
            Part::Ahead(branch)
        } else {
            Part::Tower(branch)
        };
    }
    if let Some((stack, index)) = layer_of(name) {
        return Part::Layer {
            rank: rank(stack),
            stack,
            index,
        };
    }
    // Outside the layers there are few tensors; a bias belongs where its weight is.
    let kind = match kind {
        Embedding | OutputHead => kind,
        _ => kind_of_module(module_of(name)),
    };
    match kind {
        OutputHead => Part::Output,
        Norm if !name.contains("embed") => Part::FinalNorm,
        _ => Part::Input,
    }
}

fn rank(stack: &str) -> u8 {
    if stack.contains("encoder") {
        0
    } else if stack.ends_with("single_transformer_blocks") {
        2
    } else {
        1
    }
}
