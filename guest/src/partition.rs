//! Spreading a sequence of things over devices.
//!
//! Pure functions over sizes. What a thing is (a tensor, a layer, half a model) is the policy's
//! business. Every function answers with the bin of each item, by index.
//!
//! Mostly the things are layers, each of which should stay whole. Tensors are grouped by what their
//! names say, in the order of the model rather than of the checkpoint, whose shards are often sorted
//! by name:
//!
//! ```
//! use std::collections::BTreeMap;
//! use tightfit_guest::names::layer_of;
//! use tightfit_guest::partition::{Item, balance};
//! use tightfit_guest::sizing::Sizer;
//! use tightfit_guest::{Format, Proposal, Refusal, Request};
//!
//! fn plan(request: &Request) -> Result<Proposal, Refusal> {
//!     let formats = vec![Format::Stored; request.tensors.len()];
//!     let (mut sizer, mut items) = (Sizer::new(), vec![]);
//!     // The tensors of each layer, by its number; what stands outside the layers comes first.
//!     let mut layers: BTreeMap<Option<(&str, u32)>, Vec<usize>> = BTreeMap::new();
//!     for (index, tensor) in request.tensors.iter().enumerate() {
//!         let bytes = sizer.size(tensor, formats[index])?.padded;
//!         items.push(Item { bytes, headroom: 0 });
//!         layers.entry(layer_of(&tensor.name)).or_default().push(index);
//!     }
//!     let whole: Vec<Item> = layers
//!         .values()
//!         .map(|layer| Item {
//!             bytes: layer.iter().map(|&tensor| items[tensor].bytes).sum(),
//!             headroom: 0,
//!         })
//!         .collect();
//!     let bins = request.bins(0);
//!     let owners = balance(&whole, &bins)
//!         .ok_or_else(|| Refusal::does_not_fit("the layers do not fit on the devices", None))?;
//!     let mut devices = vec![None; items.len()];
//!     for (layer, owner) in layers.values().zip(owners) {
//!         for &tensor in layer {
//!             devices[tensor] = Some(owner);
//!         }
//!     }
//!     Ok(Proposal::new(&devices, &formats, &items, &bins))
//! }
//! # use tightfit_guest::{Device, Dtype, Tensor};
//! # let name = |layer| format!("model.layers.{layer}.mlp.up_proj.weight");
//! # let tensors = [10, 2, 1, 0].map(|layer| Tensor::new(name(layer), Dtype::Bf16, &[64, 64]));
//! # let devices = vec![Device::new("sim:0", 1 << 20), Device::new("sim:1", 1 << 20)];
//! # let proposal = plan(&Request::new(tensors.into(), devices)).unwrap();
//! # let found = proposal.placements.iter().map(|placement| placement.device.unwrap());
//! # assert_eq!(found.collect::<Vec<_>>(), [1, 1, 0, 0]);
//! ```

use std::cmp::Reverse;

use crate::Device;

/// Something to be placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Item {
    /// Bytes of its tensors, each padded as [`StoredSize`](crate::StoredSize) says.
    pub bytes: u64,
    /// Bytes to be left free where it is, beside its own: its KV cache, for example.
    pub headroom: u64,
}

/// Something that holds items.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bin {
    /// Bytes that may be used.
    pub capacity: u64,
    /// Bytes of these that are left free as soon as the bin holds anything.
    pub reserve: u64,
    /// The items' bytes, in sum, are rounded up to a multiple of this.
    pub granularity: u64,
}

impl Bin {
    /// Returns what holds items on a device that has this much available, with this much of it in
    /// reserve. [`Request::bins`](crate::Request::bins) does so for all devices.
    pub fn new(device: &Device, available: u64, reserve: u64) -> Bin {
        Bin {
            capacity: available,
            reserve,
            granularity: device.granularity,
        }
    }

    /// Returns the bytes used when it holds items of this much, in sum. `None` when 64 bits cannot
    /// say it.
    pub fn used(&self, load: Item) -> Option<u64> {
        let reserved = load
            .bytes
            .checked_next_multiple_of(self.granularity.max(1))?;
        reserved
            .checked_add(load.headroom)?
            .checked_add(self.reserve)
    }

    /// Returns whether it then uses no more than `limit` bytes.
    fn holds(&self, load: Item, limit: u64) -> bool {
        // Mostly it does by far, and no division is needed to see that.
        let most = load.bytes.saturating_add(load.headroom);
        if most < limit && self.reserve.saturating_add(self.granularity) <= limit - most {
            return true;
        }
        self.used(load).is_some_and(|used| used <= limit)
    }

    /// Returns the part of it that is in use, before rounding: that says more about small models.
    fn fullness(&self, load: Item) -> f64 {
        let used = load.bytes as f64 + load.headroom as f64 + self.reserve as f64;
        used / self.capacity.max(1) as f64
    }
}

/// Fills one bin after the other to the brim, items in order. The answer is as long as the longest
/// beginning of the sequence that fits.
pub fn fill(items: &[Item], bins: &[Bin]) -> Vec<usize> {
    let brim: Vec<u64> = bins.iter().map(|bin| bin.capacity).collect();
    fill_prefix(items, bins, &brim)
}

/// Fills as few bins as possible, to the brim and in order, items in order too. Of the sets of bins
/// that are enough it is one that ends early in the sequence: the first bins, where all are equal.
/// `None` when the items do not fit in that way on all bins together.
pub fn pack(items: &[Item], bins: &[Bin]) -> Option<Vec<usize>> {
    // reach[c][b]: how many items, from the first on, `c` of the first `b` bins can hold.
    let mut reach = vec![vec![0; bins.len() + 1]];
    while reach[reach.len() - 1][bins.len()] < items.len() {
        if reach.len() > bins.len() {
            return None;
        }
        let before = &reach[reach.len() - 1];
        let mut with_one_more = vec![0; bins.len() + 1];
        for (b, bin) in bins.iter().enumerate() {
            let start = before[b];
            let held = fill_prefix(&items[start..], &[*bin], &[bin.capacity]).len();
            with_one_more[b + 1] = with_one_more[b].max(start + held);
        }
        reach.push(with_one_more);
    }
    let mut owners = vec![0; items.len()];
    let (mut b, mut end) = (bins.len(), items.len());
    for c in (1..reach.len()).rev() {
        while b > 0 && reach[c][b - 1] == end {
            b -= 1;
        }
        b -= 1;
        let start = reach[c - 1][b];
        owners[start..end].fill(b);
        end = start;
    }
    Some(owners)
}

/// Spreads items over bins, in order, so that the fullest bin (relative to its capacity) is as
/// empty as possible. The answer is exact. Among the partitions that reach it, for sequences of up
/// to [`BALANCE_UP_TO`] items, it is one that leaves the fewest bins empty, and among these one
/// with the smallest sum of squares of fullness (before rounding). `None` when none fits.
pub fn balance(items: &[Item], bins: &[Bin]) -> Option<Vec<usize>> {
    let brim: Vec<u64> = bins.iter().map(|bin| bin.capacity).collect();
    let mut best = fill_to(items, bins, &brim)?;
    // Bisection comes close. Then only what is strictly better counts, until nothing is.
    let limits_at = |level: u64| -> Vec<u64> {
        let share = |bin: &Bin| ((u128::from(bin.capacity) * u128::from(level)) >> LEVELS) as u64;
        bins.iter().map(share).collect()
    };
    let (mut low, mut high) = (0, 1 << LEVELS);
    while low < high {
        let middle = low + (high - low) / 2;
        match fill_to(items, bins, &limits_at(middle)) {
            Some(found) => (best, high) = (found, middle),
            None => low = middle + 1,
        }
    }
    let mut level = fullest(items, bins, &best);
    while level.used > 0 {
        let below: Vec<u64> = bins.iter().map(|bin| level.below(bin.capacity)).collect();
        let Some(found) = fill_to(items, bins, &below) else {
            break;
        };
        best = found;
        level = fullest(items, bins, &best);
    }
    if items.len() > BALANCE_UP_TO {
        return Some(best);
    }
    let limits: Vec<u64> = bins.iter().map(|bin| level.within(bin.capacity)).collect();
    Some(even_out(items, bins, &limits).unwrap_or(best))
}

/// Steps of bisection. A GPU's memory in 2^28 parts is far finer than what it is reserved in.
const LEVELS: u32 = 28;

/// See [`balance`].
pub const BALANCE_UP_TO: usize = 2000;

/// Puts every item, the largest first, where the least room remains. The order of items is lost.
/// `None` for an item that fits nowhere any more.
pub fn best_fit(items: &[Item], bins: &[Bin]) -> Vec<Option<usize>> {
    let size = |item: &Item| item.bytes.saturating_add(item.headroom);
    let sizes = items.iter().map(size).enumerate();
    let mut order: Vec<(Reverse<u64>, usize)> = sizes.map(|(i, size)| (Reverse(size), i)).collect();
    order.sort_unstable();
    let mut loads = vec![Item::default(); bins.len()];
    let mut owners = vec![None; items.len()];
    for (_, i) in order {
        let room_after = |b: usize| {
            let load = plus(loads[b], items[i])?;
            bins[b].capacity.checked_sub(bins[b].used(load)?)
        };
        let candidates = (0..bins.len()).filter_map(|b| Some((room_after(b)?, b)));
        if let Some((_, b)) = candidates.min() {
            // It fitted just now.
            loads[b] = plus(loads[b], items[i]).unwrap_or(loads[b]);
            owners[i] = Some(b);
        }
    }
    owners
}

fn plus(a: Item, b: Item) -> Option<Item> {
    Some(Item {
        bytes: a.bytes.checked_add(b.bytes)?,
        headroom: a.headroom.checked_add(b.headroom)?,
    })
}

/// Fills each bin up to a limit. For fixed limits taking as much as possible is as good as
/// anything, so this decides whether there is a partition within them.
fn fill_to(items: &[Item], bins: &[Bin], limits: &[u64]) -> Option<Vec<usize>> {
    let owners = fill_prefix(items, bins, limits);
    (owners.len() == items.len()).then_some(owners)
}

fn fill_prefix(items: &[Item], bins: &[Bin], limits: &[u64]) -> Vec<usize> {
    let mut owners = Vec::with_capacity(items.len());
    let mut load = Item::default();
    let mut bin = 0;
    for &item in items {
        loop {
            if bin == bins.len() {
                return owners;
            }
            if let Some(more) = plus(load, item)
                && bins[bin].holds(more, limits[bin])
            {
                load = more;
                break;
            }
            load = Item::default();
            bin += 1;
        }
        owners.push(bin);
    }
    owners
}

/// A level of fullness, as a fraction.
#[derive(Debug, Clone, Copy)]
struct Level {
    used: u64,
    capacity: u64,
}

impl Level {
    fn above(self, other: Level) -> bool {
        u128::from(self.used) * u128::from(other.capacity)
            > u128::from(other.used) * u128::from(self.capacity)
    }

    /// Returns the most bytes of `capacity` that are not above this level.
    fn within(self, capacity: u64) -> u64 {
        let bytes = u128::from(self.used) * u128::from(capacity) / u128::from(self.capacity);
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }

    /// Returns the most bytes of `capacity` that are below this level, which is not zero.
    fn below(self, capacity: u64) -> u64 {
        let product = u128::from(self.used) * u128::from(capacity);
        // A bin without capacity holds only what takes nothing, and that at any level.
        let bytes = product
            .div_ceil(u128::from(self.capacity))
            .saturating_sub(1);
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }
}

fn fullest(items: &[Item], bins: &[Bin], owners: &[usize]) -> Level {
    let mut loads = vec![None; bins.len()];
    for (&owner, &item) in owners.iter().zip(items) {
        loads[owner] = plus(loads[owner].unwrap_or_default(), item);
    }
    let mut fullest = Level {
        used: 0,
        capacity: 1,
    };
    for (bin, load) in bins.iter().zip(loads) {
        if let Some(load) = load {
            let level = Level {
                used: bin.used(load).unwrap_or(u64::MAX),
                capacity: bin.capacity.max(1),
            };
            if level.above(fullest) {
                fullest = level;
            }
        }
    }
    fullest
}

/// Of all partitions within the limits the one that leaves the fewest bins empty and then has the
/// smallest sum of squares of fullness.
fn even_out(items: &[Item], bins: &[Bin], limits: &[u64]) -> Option<Vec<usize>> {
    #[derive(Clone, Copy)]
    struct Best {
        empty: usize,
        squares: f64,
        /// The bin before holds everything up to this item.
        start: usize,
    }
    let count = items.len();
    // tables[b][i]: the first `i` items in the first `b` bins.
    let mut tables: Vec<Vec<Option<Best>>> = Vec::with_capacity(bins.len() + 1);
    let mut first = vec![None; count + 1];
    first[0] = Some(Best {
        empty: 0,
        squares: 0.0,
        start: 0,
    });
    tables.push(first);
    for (b, bin) in bins.iter().enumerate() {
        let before = &tables[b];
        let mut table = vec![None; count + 1];
        for (end, entry) in table.iter_mut().enumerate() {
            let mut best: Option<Best> = None;
            let mut load = Item::default();
            for start in (0..=end).rev() {
                let mut squares = 0.0;
                if start < end {
                    load = match plus(load, items[start]) {
                        Some(load) if bin.holds(load, limits[b]) => load,
                        _ => break,
                    };
                    let fullness = bin.fullness(load);
                    squares = fullness * fullness;
                }
                let Some(so_far) = before[start] else {
                    continue;
                };
                let found = Best {
                    empty: so_far.empty + usize::from(start == end),
                    squares: so_far.squares + squares,
                    start,
                };
                let better = best.is_none_or(|best| {
                    found.empty < best.empty
                        || (found.empty == best.empty && found.squares < best.squares)
                });
                if better {
                    best = Some(found);
                }
            }
            *entry = best;
        }
        tables.push(table);
    }
    let mut owners = vec![0; count];
    let mut end = count;
    for b in (0..bins.len()).rev() {
        let start = tables[b + 1][end]?.start;
        owners[start..end].fill(b);
        end = start;
    }
    (end == 0).then_some(owners)
}

#[cfg(test)]
#[path = "partition_tests.rs"]
mod tests;
