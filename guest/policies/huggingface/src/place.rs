//! The placement itself: one greedy pass over the modules.
//!
//! A device that something did not fit on is never looked at again. On the first accelerator, and
//! in host memory, room is kept for the largest layer that is still to come.

use std::collections::VecDeque;

use tightfit_guest::tree::{ModuleId, Tree};

use crate::budgets::{Budgets, Place};
use crate::model::Model;
use crate::options::Library;
use crate::sizes::Sizes;

/// What is placed as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Item {
    Module(ModuleId),
    /// A tensor directly in a module that was split.
    Tensor(u32, ModuleId),
}

/// Places everything. In the order of the answer.
pub(crate) fn place(
    model: &Model<'_>,
    sizes: &Sizes,
    budgets: &Budgets,
    library: Library,
) -> Vec<(Item, Place)> {
    let positions = Positions::new(model, sizes);
    let main = match budgets.first() {
        Some((gpu @ Place::Gpu(_), _)) => [*gpu, Place::Cpu],
        _ => [Place::Cpu; 2],
    };
    let mut devices = budgets.iter().copied();
    let mut device = devices.next();
    let mut used = 0.0;
    let mut placed = Vec::new();
    let mut open: VecDeque<Item> = parts(model, Tree::ROOT).collect();
    while let Some(item) = open.pop_front() {
        let Some((at, budget)) = device else {
            placed.push((item, Place::Disk));
            continue;
        };
        let mut room = budget;
        if main.contains(&at) {
            room -= positions.largest_after(item);
        }
        let size = size_of(sizes, item);
        let holders = holders(model, &positions, item, &open);
        let mut with_ties = size;
        for &(holder, shared) in &holders {
            with_ties += size_of(sizes, holder);
            if library == Library::Accelerate {
                with_ties -= shared.map_or(0.0, |tensor| sizes.tensors[tensor as usize]);
            }
        }
        if used + with_ties <= room {
            used += with_ties;
            placed.push((item, at));
            for (holder, _) in holders {
                open.retain(|other| *other != holder);
                placed.push((holder, at));
            }
            continue;
        }
        if !holders.is_empty() && used + size <= room {
            if let Some(split) = split_holder(model, &holders, &open) {
                open = split;
                open.push_front(item);
                continue;
            }
            if library == Library::Accelerate {
                open.push_front(item);
                (device, used) = (devices.next(), 0.0);
                continue;
            }
        }
        match item {
            Item::Module(module) if !model.is_whole(module) => {
                let parts: Vec<Item> = parts(model, module).collect();
                for part in parts.into_iter().rev() {
                    open.push_front(part);
                }
            }
            _ => {
                open.push_front(item);
                (device, used) = (devices.next(), 0.0);
            }
        }
    }
    placed
}

/// Returns what a module is split into: its own tensors, then its children. Its own buffers are
/// left out, as they are by both libraries.
fn parts(model: &Model<'_>, module: ModuleId) -> impl Iterator<Item = Item> {
    let tensors = model.tree.tensors(module).iter();
    let tensors = tensors.map(move |&tensor| Item::Tensor(tensor, module));
    let children = model.tree.children(module).iter();
    tensors.chain(children.map(|&child| Item::Module(child)))
}

fn size_of(sizes: &Sizes, item: Item) -> f64 {
    match item {
        Item::Module(module) => sizes.of(module),
        Item::Tensor(tensor, _) => sizes.tensors[tensor as usize],
    }
}

/// Returns what is still to be placed and holds the other name of a tensor of `item`; with the
/// tensor where the data is counted there.
fn holders(
    model: &Model<'_>,
    positions: &Positions,
    item: Item,
    open: &VecDeque<Item>,
) -> Vec<(Item, Option<u32>)> {
    let mut found: Vec<(Item, Option<u32>)> = Vec::new();
    for &(tensor, alias) in &model.ties {
        let module = positions.module_of(tensor);
        let has_data = |item| match item {
            Item::Module(holder) => positions.is_in(module, holder),
            Item::Tensor(other, _) => other == tensor,
        };
        let has_alias = |item| match item {
            Item::Module(holder) => positions.is_in(alias, holder),
            Item::Tensor(..) => false,
        };
        let (holder, shared) = match (has_data(item), has_alias(item)) {
            (true, false) => (open.iter().find(|&&other| has_alias(other)), None),
            (false, true) => (open.iter().find(|&&other| has_data(other)), Some(tensor)),
            _ => continue,
        };
        if let Some(&holder) = holder
            && !found.iter().any(|(other, _)| *other == holder)
        {
            found.push((holder, shared));
        }
    }
    found
}

/// Returns what is still to be placed, with the first holder that can be split replaced by its
/// parts.
fn split_holder(
    model: &Model<'_>,
    holders: &[(Item, Option<u32>)],
    open: &VecDeque<Item>,
) -> Option<VecDeque<Item>> {
    let split = holders.iter().find_map(|&(holder, _)| match holder {
        Item::Module(module) if !model.is_whole(module) => Some(module),
        _ => None,
    })?;
    let mut all = VecDeque::with_capacity(open.len() + model.tree.children(split).len());
    for &item in open {
        if item == Item::Module(split) {
            all.extend(parts(model, split));
        } else {
            all.push_back(item);
        }
    }
    Some(all)
}

/// Modules numbered so that those inside of one have the numbers that follow its own.
struct Positions {
    first: Vec<u32>,
    /// One after the last inside.
    end: Vec<u32>,
    /// By position: the largest of what is placed whole from there on.
    largest: Vec<f64>,
    /// By tensor.
    modules: Vec<ModuleId>,
}

impl Positions {
    fn new(model: &Model<'_>, sizes: &Sizes) -> Positions {
        let tree = &model.tree;
        let order = tree.in_order();
        let mut first = vec![0; tree.len()];
        let mut end: Vec<u32> = vec![1; tree.len()];
        let mut modules = vec![Tree::ROOT; sizes.tensors.len()];
        for (position, &module) in (1..).zip(&order) {
            first[module.index()] = position;
            end[module.index()] = position + 1;
            for &tensor in tree.tensors(module) {
                modules[tensor as usize] = module;
            }
        }
        let mut largest = vec![0.0; tree.len() + 1];
        for &module in order.iter().rev() {
            let position = first[module.index()] as usize;
            let mut most: f64 = largest[position + 1];
            if model.is_whole(module) {
                // What is inside of it is not placed by itself.
                most = largest[end[module.index()] as usize].max(sizes.of(module));
            }
            largest[position] = most;
            if let Some(parent) = tree.parent(module) {
                let own = end[module.index()];
                end[parent.index()] = end[parent.index()].max(own);
            }
        }
        Positions {
            first,
            end,
            largest,
            modules,
        }
    }

    fn module_of(&self, tensor: u32) -> ModuleId {
        self.modules[tensor as usize]
    }

    fn is_in(&self, module: ModuleId, holder: ModuleId) -> bool {
        let at = self.first[module.index()];
        self.first[holder.index()] <= at && at < self.end[holder.index()]
    }

    /// Returns the bytes of the largest that is placed whole and comes after this.
    fn largest_after(&self, item: Item) -> f64 {
        let position = match item {
            Item::Module(module) => self.end[module.index()],
            Item::Tensor(_, module) => self.first[module.index()] + 1,
        };
        self.largest[position as usize]
    }
}
