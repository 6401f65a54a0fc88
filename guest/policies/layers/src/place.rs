//! Where everything goes: the tidiest way that fits.

use tightfit_guest::partition::{Bin, Item, balance, best_fit, fill, pack};
use tightfit_guest::{Device, Level};

use crate::Arrangement;
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
/// whole layers in order, over the accelerators as the arrangement says;
/// in order, but cutting through layers where a device ends;
/// in any order, tensor by tensor;
/// and then the same with the end of the model in host memory.
pub(crate) fn place(
    devices: &[Device],
    bins: &[Bin],
    units: &[Unit<'_>],
    items: &[Item],
    arrangement: Arrangement,
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
        let (whole, split) = match arrangement {
            Arrangement::Spread => {
                let whole = balance(&model.units, &accelerators.bins);
                let split = match &whole {
                    Some(_) => None,
                    None => balance(&model.tensors, &accelerators.bins),
                };
                (whole, split)
            }
            Arrangement::Pack => {
                let whole = pack(&model.units, &accelerators.bins);
                let split = match &whole {
                    Some(owners) if distinct(owners) <= 1 => None,
                    _ => pack(&model.tensors, &accelerators.bins),
                };
                // Whole layers are worth much, but not another device.
                let fewer = |split: &Vec<usize>| {
                    let whole = whole.as_ref();
                    whole.is_none_or(|whole| distinct(split) < distinct(whole))
                };
                let split = split.filter(fewer);
                (if split.is_some() { None } else { whole }, split)
            }
        };
        if let Some(found) = whole {
            return Some(model.placed(&accelerators.of(&model.by_unit(&found)), vec![]));
        }
        if let Some(found) = split {
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

/// Returns the bytes that every device would need more, so that everything fits in some order.
pub(crate) fn missing_on_each(bins: &[Bin], items: &[Item]) -> Option<u64> {
    let fits = |more: u64| {
        let roomier = bins.iter().map(|bin| Bin {
            capacity: bin.capacity.saturating_add(more),
            ..*bin
        });
        let roomier: Vec<Bin> = roomier.collect();
        best_fit(items, &roomier).iter().all(Option::is_some)
    };
    let (mut low, mut high) = (0, 1);
    while !fits(high) {
        low = high;
        high = high.checked_mul(2)?;
    }
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle) {
            high = middle;
        } else {
            low = middle;
        }
    }
    Some(high)
}

/// Returns the number of bins that a partition in order uses.
fn distinct(owners: &[usize]) -> usize {
    owners.chunk_by(|a, b| a == b).count()
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

    /// Places whole units, the end of the model in host memory. None when that leaves room on the
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
        self.fill_gaps(accelerators, &mut found);
        self.rest_to(hosts, accelerators, &found)
    }

    /// A device too small for what came next was left behind with room on it: whole parts that
    /// have no place yet go there.
    fn fill_gaps(&self, accelerators: &Group, found: &mut [Option<usize>]) {
        let bins = &accelerators.bins;
        let mut loads = vec![Item::default(); bins.len()];
        for (owner, item) in found.iter().zip(&self.tensors) {
            if let Some(owner) = *owner {
                // It fits there, so 64 bits hold it.
                loads[owner].bytes += item.bytes;
                loads[owner].headroom += item.headroom;
            }
        }
        let mut start = 0;
        for (part, item) in self.parts.iter().zip(&self.units) {
            let tensors = start..start + part.tensors.len();
            start = tensors.end;
            // The last norm alone would be far from the output head that it belongs to.
            if part.part == Part::FinalNorm || found[tensors.clone()].iter().any(Option::is_some) {
                continue;
            }
            for (b, bin) in bins.iter().enumerate() {
                let load = Item {
                    bytes: loads[b].bytes.saturating_add(item.bytes),
                    headroom: loads[b].headroom.saturating_add(item.headroom),
                };
                if bin.used(load).is_some_and(|used| used <= bin.capacity) {
                    loads[b] = load;
                    found[tensors].fill(Some(b));
                    break;
                }
            }
        }
    }

    /// Places the largest tensors first, on whatever accelerator takes them; the rest in host
    /// memory.
    fn spill_any(&self, accelerators: &Group, hosts: &Group) -> Option<Vec<usize>> {
        let found = best_fit(&self.tensors, &accelerators.bins);
        self.rest_to(hosts, accelerators, &found)
    }

    /// Gives what has no accelerator to the hosts.
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

/// Returns the bytes that remain unused on all bins together.
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
