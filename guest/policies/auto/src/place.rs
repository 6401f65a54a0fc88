//! Where everything goes: the tidiest way that fits.

use tightfit_guest::partition::{Bin, Item, balance, best_fit, fill};
use tightfit_guest::{Device, Level};

use crate::units::{Part, Unit};

/// A placement of everything.
#[derive(Debug)]
pub(crate) struct Placed {
    /// The device of each tensor, by index; none for what is not loaded.
    pub(crate) devices: Vec<Option<usize>>,
    /// What the user may want to know.
    pub(crate) notes: Vec<(Level, String)>,
}

/// Tries one way after the other:
/// whole layers in order, over the accelerators;
/// in order, but cutting through layers where a device ends;
/// in any order, tensor by tensor;
/// and then the same with the end of the model in host memory.
pub(crate) fn place(
    devices: &[Device],
    bins: &[Bin],
    units: &[Unit<'_>],
    items: &[Item],
) -> Option<Placed> {
    let which = |accelerator: bool| -> Group {
        let of_kind = (0..bins.len()).filter(|&d| devices[d].is_accelerator() == accelerator);
        let devices: Vec<usize> = of_kind.collect();
        let bins = devices.iter().map(|&d| bins[d]).collect();
        Group { devices, bins }
    };
    let (accelerators, hosts) = (which(true), which(false));
    let model = Model::new(units, items)?;

    if !accelerators.bins.is_empty() {
        if let Some(found) = balance(&model.units, &accelerators.bins) {
            return Some(model.placed(&accelerators.of(&model.by_unit(&found)), vec![]));
        }
        if let Some(found) = balance(&model.tensors, &accelerators.bins) {
            let note = "whole layers do not fit side by side: some layers are split over devices";
            let notes = vec![(Level::Info, note.into())];
            return Some(model.placed(&accelerators.of(&found), notes));
        }
        let found: Option<Vec<usize>> = best_fit(&model.tensors, &accelerators.bins)
            .into_iter()
            .collect();
        if let Some(found) = found {
            let note = "the model fits only tensor by tensor: layers are scattered over devices";
            let notes = vec![(Level::Warn, note.into())];
            return Some(model.placed(&accelerators.of(&found), notes));
        }
    }
    if hosts.bins.is_empty() {
        return None;
    }
    let found = model
        .spill_whole(&accelerators, &hosts)
        .or_else(|| model.spill_in_order(&accelerators, &hosts))
        .or_else(|| model.spill_any(&accelerators, &hosts))?;
    let mut notes = Vec::new();
    if !accelerators.bins.is_empty() {
        let spilled = found
            .iter()
            .filter(|device| hosts.devices.contains(device))
            .count();
        let note = format!("the accelerators are full: {spilled} tensors stay in host memory");
        notes.push((Level::Warn, note));
    }
    Some(model.placed(&found, notes))
}

/// Devices of one sort.
struct Group {
    /// Their indices in the request.
    devices: Vec<usize>,
    bins: Vec<Bin>,
}

impl Group {
    /// From indices into the group to indices into the request.
    fn of(&self, owners: &[usize]) -> Vec<usize> {
        owners.iter().map(|&owner| self.devices[owner]).collect()
    }

    /// Fills the group with what is in order if possible, else in any.
    fn hold(&self, items: &[Item]) -> Option<Vec<usize>> {
        let filled = fill(items, &self.bins);
        let owners = if filled.len() == items.len() {
            filled
        } else {
            best_fit(items, &self.bins)
                .into_iter()
                .collect::<Option<_>>()?
        };
        Some(self.of(&owners))
    }
}

/// The model as two sequences: of units and of tensors, both in model order.
struct Model<'a> {
    parts: &'a [Unit<'a>],
    units: Vec<Item>,
    tensors: Vec<Item>,
    /// All tensors of the request, those not loaded too.
    count: usize,
}

impl<'a> Model<'a> {
    /// None when its size does not fit in 64 bits.
    fn new(parts: &'a [Unit<'a>], items: &[Item]) -> Option<Model<'a>> {
        let mut units = Vec::with_capacity(parts.len());
        let mut tensors = Vec::with_capacity(items.len());
        for part in parts {
            let mut sum = Item::default();
            for &t in &part.tensors {
                let item = items[t as usize];
                sum.bytes = sum.bytes.checked_add(item.bytes)?;
                sum.headroom = sum.headroom.checked_add(item.headroom)?;
                tensors.push(item);
            }
            units.push(sum);
        }
        Some(Model {
            parts,
            units,
            tensors,
            count: items.len(),
        })
    }

    /// Owners of units to owners of their tensors.
    fn by_unit(&self, owners: &[usize]) -> Vec<usize> {
        let parts = self.parts.iter().zip(owners);
        parts
            .flat_map(|(part, &owner)| std::iter::repeat_n(owner, part.tensors.len()))
            .collect()
    }

    fn placed(&self, owners: &[usize], notes: Vec<(Level, String)>) -> Placed {
        let mut devices = vec![None; self.count];
        let tensors = self.parts.iter().flat_map(|part| &part.tensors);
        for (&t, &owner) in tensors.zip(owners) {
            devices[t as usize] = Some(owner);
        }
        Placed { devices, notes }
    }

    /// Whole units, the end of the model in host memory. None when that leaves room on the
    /// accelerators in which another layer would fit if layers were split.
    fn spill_whole(&self, accelerators: &Group, hosts: &Group) -> Option<Vec<usize>> {
        let kept = fill(&self.units, &accelerators.bins);
        let spilled = &self.units[kept.len()..];
        if !accelerators.bins.is_empty() {
            if kept.is_empty() {
                return None;
            }
            let room = room(&self.units, &kept, &accelerators.bins);
            let parts = self.parts[kept.len()..].iter().zip(spilled);
            let layers = parts.filter(|(unit, _)| matches!(unit.part, Part::Layer { .. }));
            let next = layers.map(|(_, item)| size(*item)).min();
            if room >= next.or_else(|| spilled.first().map(|item| size(*item)))? {
                return None;
            }
        }
        let mut owners = accelerators.of(&kept);
        let rest = fill(spilled, &hosts.bins);
        if rest.len() < spilled.len() {
            return None;
        }
        owners.extend(hosts.of(&rest));
        Some(self.by_unit(&owners))
    }

    /// As many tensors from the beginning of the model as the accelerators hold, the rest in host
    /// memory. What is too large for any accelerator goes there at once and holds up nothing.
    fn spill_in_order(&self, accelerators: &Group, hosts: &Group) -> Option<Vec<usize>> {
        let fits = |item: &Item| !fill(&[*item], &accelerators.bins).is_empty();
        let small: Vec<usize> = (0..self.tensors.len())
            .filter(|&t| fits(&self.tensors[t]))
            .collect();
        let sequence: Vec<Item> = small.iter().map(|&t| self.tensors[t]).collect();
        let kept = fill(&sequence, &accelerators.bins);
        let mut found = vec![None; self.tensors.len()];
        for (&t, &owner) in small.iter().zip(&kept) {
            found[t] = Some(owner);
        }
        self.rest_to(hosts, accelerators, &found)
    }

    /// The largest tensors first, on whatever accelerator takes them; the rest in host memory.
    fn spill_any(&self, accelerators: &Group, hosts: &Group) -> Option<Vec<usize>> {
        let found = best_fit(&self.tensors, &accelerators.bins);
        self.rest_to(hosts, accelerators, &found)
    }

    /// What has no accelerator goes to the hosts.
    fn rest_to(
        &self,
        hosts: &Group,
        accelerators: &Group,
        found: &[Option<usize>],
    ) -> Option<Vec<usize>> {
        let without = self.tensors.iter().zip(found);
        let without = without.filter(|(_, owner)| owner.is_none());
        let items: Vec<Item> = without.map(|(item, _)| *item).collect();
        let mut rest = hosts.hold(&items)?.into_iter();
        let owner = |owner: &Option<usize>| match owner {
            Some(owner) => Some(accelerators.devices[*owner]),
            None => rest.next(),
        };
        found.iter().map(owner).collect()
    }
}

fn size(item: Item) -> u64 {
    item.bytes.saturating_add(item.headroom)
}

/// Bytes that remain unused on all bins together.
fn room(items: &[Item], owners: &[usize], bins: &[Bin]) -> u64 {
    let mut loads = vec![Item::default(); bins.len()];
    for (&owner, item) in owners.iter().zip(items) {
        loads[owner].bytes += item.bytes;
        loads[owner].headroom += item.headroom;
    }
    let rooms = bins.iter().zip(loads).map(|(bin, load)| {
        bin.used(load)
            .map_or(0, |used| bin.capacity.saturating_sub(used))
    });
    rooms.fold(0, u64::saturating_add)
}
