//! The device map as people know it: from the shortest names that say it all to devices.

use std::fmt::Write as _;

use tightfit_guest::Request;
use tightfit_guest::names::layer_of;
use tightfit_guest::tree::{ModuleId, Tree};

use crate::budgets::Place;
use crate::place::Item;

/// What is known of the devices below a module.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Below {
    Nothing,
    One(Place),
    Several,
}

impl Below {
    fn and(self, place: Place) -> Below {
        match self {
            Below::Nothing => Below::One(place),
            Below::One(other) if other == place => self,
            _ => Below::Several,
        }
    }
}

/// Returns names and devices, in the order of the model. A module whose parts are all on one device
/// stands for them.
pub(crate) fn device_map(
    request: &Request,
    tree: &Tree<'_>,
    placed: &[(Item, Place)],
) -> Vec<(String, Place)> {
    let mut below = vec![Below::Nothing; tree.len()];
    let mut tensors: Vec<Vec<(u32, Place)>> = vec![Vec::new(); tree.len()];
    for &(item, place) in placed {
        match item {
            Item::Module(module) => below[module.index()] = Below::One(place),
            Item::Tensor(tensor, module) => tensors[module.index()].push((tensor, place)),
        }
    }
    let modules: Vec<ModuleId> = tree.modules().collect();
    for &module in modules.iter().rev() {
        for &(_, place) in &tensors[module.index()] {
            below[module.index()] = below[module.index()].and(place);
        }
        if let Some(parent) = tree.parent(module) {
            let own = below[module.index()];
            let parent = &mut below[parent.index()];
            *parent = match own {
                Below::Nothing => *parent,
                Below::One(place) => parent.and(place),
                Below::Several => Below::Several,
            };
        }
    }
    let mut map = Vec::new();
    let mut open = vec![Tree::ROOT];
    while let Some(module) = open.pop() {
        match below[module.index()] {
            Below::Nothing => {}
            Below::One(place) => map.push((tree.path(module), place)),
            Below::Several => {
                for &(tensor, place) in &tensors[module.index()] {
                    let name = &request.tensors[tensor as usize].name;
                    let last = name.rsplit('.').next().unwrap_or(name);
                    let path = tree.path(module);
                    let dot = if path.is_empty() { "" } else { "." };
                    map.push((format!("{path}{dot}{last}"), place));
                }
                open.extend(tree.children(module).iter().rev());
            }
        }
    }
    map
}

/// Returns the map as JSON objects of at most about this many bytes each: a log message has a
/// bound.
pub(crate) fn as_json(map: &[(String, Place)], most: usize) -> Vec<String> {
    let mut objects = Vec::new();
    let mut text = String::new();
    for (name, place) in map {
        let entry = format!(
            "{}:{}",
            serde_json::Value::from(name.as_str()),
            json(*place)
        );
        if !text.is_empty() && text.len() + entry.len() > most {
            objects.push(format!("{{{text}}}"));
            text.clear();
        }
        let comma = if text.is_empty() { "" } else { "," };
        let _ = write!(text, "{comma}{entry}");
    }
    objects.push(format!("{{{text}}}"));
    objects
}

fn json(place: Place) -> String {
    match place {
        Place::Gpu(gpu) => gpu.to_string(),
        Place::Cpu => "\"cpu\"".into(),
        Place::Disk => "\"disk\"".into(),
    }
}

/// Returns the names that are on `place`, for a sentence: layers in a row as `model.layers.3 to
/// 17`.
pub(crate) fn names_on(map: &[(String, Place)], place: Place) -> String {
    const MOST: usize = 8;
    let mut runs: Vec<(&str, Option<u32>)> = Vec::new();
    for (name, _) in map.iter().filter(|(_, at)| *at == place) {
        let layer = layer_of(name).filter(|(stack, index)| {
            // Whole layers only.
            name.len() == stack.len() + 1 + index.to_string().len()
        });
        if let (Some((stack, index)), Some((first, last))) = (layer, runs.last_mut())
            && let Some((of, start)) = layer_of(first)
            && of == stack
            && last.unwrap_or(start).checked_add(1) == Some(index)
            && (last.is_some() || first.len() == of.len() + 1 + start.to_string().len())
        {
            *last = Some(index);
        } else {
            runs.push((name, None));
        }
    }
    let more = runs.len().saturating_sub(MOST);
    let mut words: Vec<String> = runs
        .iter()
        .take(MOST)
        .map(|(first, last)| match last {
            Some(last) => format!("{first} to {last}"),
            None if first.is_empty() => "the whole model".into(),
            None => (*first).to_owned(),
        })
        .collect();
    if more > 0 {
        words.push(format!("{more} more"));
    }
    words.join(", ")
}
