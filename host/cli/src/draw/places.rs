//! Where things are, in few words: `model.layers 0-6, 7 (part)`.
//!
//! Names come from a checkpoint: their number and length do not make the text longer than a
//! screen.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use tightfit_common::names::{TensorKind, layer_of, module_of, side_branch_of};

use tightfit::checkpoint::TensorInfo;
use tightfit::plan::Plan;
use tightfit::report::purpose;
use tightfit::text::printable;

/// Runs of layers, or modules, that one line names.
const MOST_ON_A_LINE: usize = 6;
/// Lines of a list.
pub(super) const MOST_LINES: usize = 20;
/// Characters of a name.
const LONGEST_NAME: usize = 64;

/// Tensors that have something in common, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Row<T> {
    /// What they have in common.
    pub(super) label: T,
    /// Which they are.
    pub(super) what: String,
}

/// In the order in which a model uses them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Embeddings,
    Layers,
    Rest,
}

/// Which device holds what, one line each; tensors that are not loaded come last.
pub fn map(tensors: &[TensorInfo], plan: &Plan) -> String {
    let rows = rows(tensors, |index| {
        plan.tensors[index].placement.device.unwrap_or(u32::MAX)
    });
    let spills = plan
        .devices
        .iter()
        .any(|device| device.device.kind.is_accelerator());
    let shown: Vec<(&str, Cow<'_, str>)> = rows
        .iter()
        .map(|row| {
            let place = match plan.devices.get(row.label as usize) {
                None => "not loaded".into(),
                Some(device) if spills && !device.device.kind.is_accelerator() => {
                    format!("{} (spilled)", printable(&device.device.name)).into()
                }
                Some(device) => printable(&device.device.name),
            };
            (row.what.as_str(), place)
        })
        .collect();
    arrows(&shown)
}

/// Lines `what -> where`, as many as a screen shows.
pub(super) fn arrows(rows: &[(&str, Cow<'_, str>)]) -> String {
    let shown = &rows[..rows.len().min(MOST_LINES)];
    let widths = shown.iter().map(|(what, _)| what.chars().count());
    // A single long line does not push all arrows off the screen.
    let width = widths.filter(|&width| width <= 48).max().unwrap_or(0);
    let mut text = String::new();
    for (what, place) in shown {
        text += &format!("{what:<width$} -> {place}\n");
    }
    if rows.len() > shown.len() {
        text += &format!("... and {} more\n", rows.len() - shown.len());
    }
    text
}

/// A name as a line can hold it.
pub(super) fn short(name: &str) -> Cow<'_, str> {
    let name = printable(name);
    let count = name.chars().count();
    if count <= LONGEST_NAME {
        return name;
    }
    let half = (LONGEST_NAME - 3) / 2;
    let head: String = name.chars().take(half).collect();
    let tail: String = name.chars().skip(count - half).collect();
    Cow::Owned(format!("{head}...{tail}"))
}

/// One layer's share of a label, in a stack of layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct InLayer<T> {
    stack: u32,
    layer: u32,
    expert: bool,
    label: T,
}

/// One label of a module outside the layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct InModule<T> {
    module: u32,
    label: T,
}

/// Says which tensors have which label, ordered by label and then as a model uses them.
pub(super) fn rows<T: Copy + Ord>(
    tensors: &[TensorInfo],
    label: impl Fn(usize) -> T,
) -> Vec<Row<T>> {
    let mut stacks = Names::default();
    let mut modules = Names::default();
    let mut ranks: Vec<(Rank, bool)> = Vec::new();
    let mut in_layers = Vec::new();
    let mut in_modules = Vec::new();
    for (index, tensor) in tensors.iter().enumerate() {
        let kind = purpose(tensor);
        let label = label(index);
        if let Some((stack, layer)) = layer_of(&tensor.name) {
            in_layers.push(InLayer {
                stack: stacks.number(stack),
                layer,
                expert: kind == TensorKind::Expert,
                label,
            });
            continue;
        }
        let name = side_branch_of(&tensor.name).unwrap_or_else(|| module_of(&tensor.name));
        let module = modules.number(name);
        let rank = match kind {
            TensorKind::Embedding => (Rank::Embeddings, false),
            kind => (Rank::Rest, kind == TensorKind::OutputHead),
        };
        match ranks.get_mut(module as usize) {
            Some(known) => *known = rank.min(*known),
            None => ranks.push(rank),
        }
        in_modules.push(InModule { module, label });
    }
    let mut found: Vec<(T, Rank, String)> = Vec::new();
    in_layers.sort_unstable();
    in_layers.dedup();
    for stack in in_layers.chunk_by(|a, b| a.stack == b.stack) {
        let name = short(stacks.names[stack[0].stack as usize]);
        let together = split_layers(stack, false);
        // Where experts lie apart from the rest of their layer, that says more than that all
        // layers are in parts.
        if together > 0 && split_layers(stack, true) < together {
            for (expert, suffix) in [(false, " without experts"), (true, " experts")] {
                let those: Vec<_> = stack
                    .iter()
                    .filter(|x| x.expert == expert)
                    .copied()
                    .collect();
                say_layers(&format!("{name}{suffix}"), &those, &mut found);
            }
        } else {
            say_layers(&name, stack, &mut found);
        }
    }
    in_modules.sort_unstable();
    in_modules.dedup();
    let mut lists: BTreeMap<(T, Rank), Vec<(bool, String)>> = BTreeMap::new();
    for module in in_modules.chunk_by(|a, b| a.module == b.module) {
        let (rank, is_head) = ranks[module[0].module as usize];
        let part = if module.len() > 1 { " (part)" } else { "" };
        let name = modules.names[module[0].module as usize];
        for InModule { label, .. } in module {
            let list = lists.entry((*label, rank)).or_default();
            list.push((is_head, format!("{}{part}", short(name))));
        }
    }
    for ((label, rank), mut list) in lists {
        list.sort_by_key(|&(is_head, _)| is_head);
        found.push((label, rank, listed(list.into_iter().map(|(_, name)| name))));
    }
    found.sort_by_key(|&(label, rank, _)| (label, rank));
    found
        .into_iter()
        .map(|(label, _, what)| Row { label, what })
        .collect()
}

/// Names in the order in which they are first seen, numbered.
#[derive(Default)]
pub(super) struct Names<'a> {
    numbers: HashMap<&'a str, u32>,
    pub(super) names: Vec<&'a str>,
}

impl<'a> Names<'a> {
    pub(super) fn number(&mut self, name: &'a str) -> u32 {
        // Mostly, a tensor belongs where the one before does.
        if let Some(last) = self.names.last()
            && *last == name
        {
            return self.names.len() as u32 - 1;
        }
        *self.numbers.entry(name).or_insert_with(|| {
            self.names.push(name);
            self.names.len() as u32 - 1
        })
    }
}

/// How many layers have several labels; with `apart`, a layer's experts are a layer of their own.
fn split_layers<T: Copy + Ord>(stack: &[InLayer<T>], apart: bool) -> usize {
    stack
        .chunk_by(|a, b| a.layer == b.layer && !(apart && a.expert != b.expert))
        .filter(|layer| layer.iter().any(|x| x.label != layer[0].label))
        .count()
}

/// Adds a line for each label in this stack.
fn say_layers<T: Copy + Ord>(name: &str, stack: &[InLayer<T>], found: &mut Vec<(T, Rank, String)>) {
    // A run of layers, by their positions in the stack: the layers with experts may be every
    // second one.
    struct Run {
        first: u32,
        last: u32,
        end: usize,
        part: bool,
    }
    let mut runs: BTreeMap<T, Vec<Run>> = BTreeMap::new();
    let layers = stack.chunk_by(|a, b| a.layer == b.layer);
    for (position, layer) in layers.enumerate() {
        let mut labels: Vec<T> = layer.iter().map(|x| x.label).collect();
        labels.sort_unstable();
        labels.dedup();
        let (number, part) = (layer[0].layer, labels.len() > 1);
        for label in labels {
            let runs = runs.entry(label).or_default();
            match runs.last_mut() {
                Some(run) if run.end == position && run.part == part => {
                    run.last = number;
                    run.end = position + 1;
                }
                _ => runs.push(Run {
                    first: number,
                    last: number,
                    end: position + 1,
                    part,
                }),
            }
        }
    }
    for (label, runs) in runs {
        let runs = runs.iter().map(|run| {
            let part = if run.part { " (part)" } else { "" };
            match run.first == run.last {
                true => format!("{}{part}", run.first),
                false => format!("{}-{}{part}", run.first, run.last),
            }
        });
        found.push((label, Rank::Layers, format!("{name} {}", listed(runs))));
    }
}

/// `a, b, c and 4 more`.
fn listed(items: impl ExactSizeIterator<Item = String>) -> String {
    let more = items.len().saturating_sub(MOST_ON_A_LINE);
    let shown: Vec<String> = items.take(MOST_ON_A_LINE).collect();
    match more {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

#[cfg(test)]
#[path = "places_tests.rs"]
mod tests;
