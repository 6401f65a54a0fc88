//! Two plans for one model on the same devices, side by side.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::Serialize;

use super::Table;
use super::places::{arrows, rows};
use crate::error_report::ErrorReport;
use tightfit::checkpoint::TensorInfo;
use tightfit::plan::{DevicePlan, Plan, Proposed};
use tightfit::report::{Content, PolicyReport, purpose};
use tightfit::text::printable;
use tightfit::types::Bytes;

/// Two plans, and what is different. `None` of the differences are there when one side refuses.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Version of this form.
    pub schema: u32,
    /// The first plan.
    pub a: Side,
    /// The second plan.
    pub b: Side,
    /// Every device, in the user's order.
    pub devices: Vec<DeviceChange>,
    /// What lies on another device, or is loaded by one of them only.
    pub moved: Option<Vec<Move>>,
    /// What is loaded by both, in another format.
    pub formats: Option<Vec<FormatChange>>,
}

/// One of the plans.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Side {
    /// The policy as it was asked for.
    pub asked: String,
    /// The policy that answered, unless it refused.
    pub policy: Option<PolicyReport>,
    /// Sums over its devices, unless it refused.
    pub totals: Option<Totals>,
    /// Why there is no plan.
    pub refusal: Option<String>,
    /// The same for programs.
    pub error: Option<ErrorReport>,
}

/// Sums over the devices of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Totals {
    /// Bytes of everything stored.
    pub allocated: u64,
    /// Bytes taken from devices.
    pub reserved: u64,
    /// Bytes that the policy leaves free.
    pub headroom: u64,
    /// Share of its capacity that is reserved or headroom on the fullest device: 0.5 is half.
    pub fullest: f64,
}

/// One device under both plans, in bytes; `null` under the plan that is refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "as in `DeviceReport`, for each side")]
pub struct DeviceChange {
    pub name: String,
    pub capacity: u64,
    pub reserved_a: Option<u64>,
    pub reserved_b: Option<u64>,
    pub headroom_a: Option<u64>,
    pub headroom_b: Option<u64>,
    pub free_a: Option<u64>,
    pub free_b: Option<u64>,
}

/// Tensors that lie elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Move {
    /// Which, in words: `model.layers 8-11`.
    pub what: String,
    /// Their device under the first plan; `null` when it does not load them.
    pub from: Option<String>,
    /// Their device under the second plan.
    pub to: Option<String>,
}

/// Tensors of one kind that are kept in another format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FormatChange {
    /// What they are, for example `linear layers`.
    pub kind: &'static str,
    /// Their format under the first plan.
    pub from: String,
    /// Their format under the second plan.
    pub to: String,
    /// How many.
    pub tensors: u64,
    /// Their bytes under the first plan.
    pub bytes_a: u64,
    /// Their bytes under the second plan.
    pub bytes_b: u64,
}

impl Comparison {
    /// Compares what two policies, asked for by these names, answered: a plan for `tensors`, or
    /// why not. Both plans are for the same devices.
    pub fn new(
        tensors: &[TensorInfo],
        asked: [&str; 2],
        a: Result<&Proposed, &ErrorReport>,
        b: Result<&Proposed, &ErrorReport>,
    ) -> Comparison {
        let plans = [a, b].map(|side| side.ok().map(|proposed| &proposed.plan));
        // Slices of one are no tensors of the other.
        let are_cut = plans.iter().flatten().any(|plan| !plan.slices.is_empty());
        let both = plans[0].zip(plans[1]).filter(|_| !are_cut);
        let count = plans.iter().flatten().map(|plan| plan.devices.len()).max();
        Comparison {
            schema: 1,
            a: Side::new(asked[0], a),
            b: Side::new(asked[1], b),
            devices: (0..count.unwrap_or(0))
                .filter_map(|index| {
                    DeviceChange::new(plans.map(|plan| plan.and_then(|p| p.devices.get(index))))
                })
                .collect(),
            moved: both.map(|(a, b)| moves(tensors, a, b)),
            formats: both.map(|(a, b)| format_changes(tensors, a, b)),
        }
    }
}

impl Side {
    fn new(asked: &str, side: Result<&Proposed, &ErrorReport>) -> Side {
        Side {
            asked: asked.to_owned(),
            policy: side.ok().map(PolicyReport::from),
            totals: side.ok().map(|proposed| Totals::of(&proposed.plan)),
            refusal: side.err().map(|error| error.message.clone()),
            error: side.err().cloned(),
        }
    }
}

impl Totals {
    fn of(plan: &Plan) -> Totals {
        let sum =
            |f: fn(&DevicePlan) -> u64| plan.devices.iter().map(f).fold(0, u64::saturating_add);
        let share = |device: &DevicePlan| {
            let used = device.size.reserved.saturating_add(device.headroom);
            used as f64 / device.device.capacity.max(1) as f64
        };
        // On a device that holds nothing, headroom is no load.
        let held = plan.devices.iter().filter(|d| d.size.reserved > 0);
        Totals {
            allocated: sum(|device| device.size.requested),
            reserved: sum(|device| device.size.reserved),
            headroom: sum(|device| device.headroom),
            fullest: held.map(share).fold(0.0, f64::max),
        }
    }
}

impl DeviceChange {
    fn new(sides: [Option<&DevicePlan>; 2]) -> Option<DeviceChange> {
        let device = &sides.iter().flatten().next()?.device;
        let free = |side: &DevicePlan| {
            let used = side.size.reserved.saturating_add(side.headroom);
            side.device.available.saturating_sub(used)
        };
        let [a, b] = sides;
        Some(DeviceChange {
            name: device.name.clone(),
            capacity: device.capacity,
            reserved_a: a.map(|side| side.size.reserved),
            reserved_b: b.map(|side| side.size.reserved),
            headroom_a: a.map(|side| side.headroom),
            headroom_b: b.map(|side| side.headroom),
            free_a: a.map(free),
            free_b: b.map(free),
        })
    }
}

fn moves(tensors: &[TensorInfo], a: &Plan, b: &Plan) -> Vec<Move> {
    let device = |plan: &Plan, index: usize| plan.tensors[index].placement.device;
    let name = |plan: &Plan, device: Option<u32>| {
        device.map(|device| plan.devices[device as usize].device.name.clone())
    };
    rows(tensors, |index| (device(a, index), device(b, index)))
        .into_iter()
        .filter(|row| row.label.0 != row.label.1)
        .map(|row| Move {
            what: row.what,
            from: name(a, row.label.0),
            to: name(b, row.label.1),
        })
        .collect()
}

fn format_changes(tensors: &[TensorInfo], a: &Plan, b: &Plan) -> Vec<FormatChange> {
    // A policy may give every tensor another block size, but there are few of those.
    let mut changes: BTreeMap<(&str, String, String), FormatChange> = BTreeMap::new();
    let pairs = a.tensors.iter().zip(&b.tensors);
    for (tensor, (a, b)) in tensors.iter().zip(pairs) {
        let loaded = a.placement.device.is_some() && b.placement.device.is_some();
        if !loaded || a.placement.format == b.placement.format {
            continue;
        }
        let kind = Content::of(purpose(tensor)).name();
        let (from, to) = (a.placement.format, b.placement.format);
        let change = changes
            .entry((kind, from.to_string(), to.to_string()))
            .or_insert_with(|| FormatChange {
                kind,
                from: from.to_string(),
                to: to.to_string(),
                tensors: 0,
                bytes_a: 0,
                bytes_b: 0,
            });
        change.tensors += 1;
        change.bytes_a += a.requested();
        change.bytes_b += b.requested();
    }
    changes.into_values().collect()
}

impl Comparison {
    /// Returns the comparison for people.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (letter, side) in [("A", &self.a), ("B", &self.b)] {
            text += &format!("{letter}: ");
            match (&side.policy, &side.totals, &side.refusal) {
                (Some(policy), Some(totals), _) => {
                    text += &format!(
                        "{} {}, {} reserved, fullest device {:.1} %\n",
                        printable(&policy.name),
                        printable(&policy.version),
                        Bytes(totals.reserved),
                        100.0 * totals.fullest,
                    );
                }
                (_, _, refusal) => {
                    let reason = refusal.as_deref().unwrap_or_default();
                    text += &format!("no plan: {}\n", printable(reason));
                }
            }
        }
        text += &format!("\n{}", self.table());
        let (Some(moved), Some(formats)) = (&self.moved, &self.formats) else {
            if self.a.policy.is_some() && self.b.policy.is_some() {
                text +=
                    "\nWhere plans cut tensors into slices, these are not compared one by one.\n";
            }
            return text;
        };
        if moved.is_empty() && formats.is_empty() {
            return text + "\nEvery tensor has the same place and the same format.\n";
        }
        if !moved.is_empty() {
            let place = |place: &Option<String>| match place {
                Some(device) => printable(device).into_owned(),
                None => "not loaded".to_owned(),
            };
            let lines: Vec<(String, Cow<'_, str>)> = moved
                .iter()
                .map(|m| {
                    (
                        format!("{}: {}", m.what, place(&m.from)),
                        place(&m.to).into(),
                    )
                })
                .collect();
            let lines: Vec<(&str, Cow<'_, str>)> = lines
                .iter()
                .map(|(what, to)| (what.as_str(), to.clone()))
                .collect();
            text += &format!("\nmoved\n{}", arrows(&lines));
        }
        if !formats.is_empty() {
            text += "\nin another format\n";
            let mut table =
                Table::new(["what", "tensors", "A", "B", "bytes A", "bytes B", "B - A"]);
            for change in formats {
                table.row([
                    change.kind.to_owned(),
                    change.tensors.to_string(),
                    change.from.clone(),
                    change.to.clone(),
                    Bytes(change.bytes_a).to_string(),
                    Bytes(change.bytes_b).to_string(),
                    difference(Some(change.bytes_a), Some(change.bytes_b)),
                ]);
            }
            text += &table.to_string();
        }
        text
    }

    fn table(&self) -> Table {
        let mut table = Table::new([
            "device",
            "reserved A",
            "B",
            "B - A",
            "headroom A",
            "B",
            "free A",
            "B",
            "B - A",
        ]);
        let shown = |bytes: Option<u64>| bytes.map_or("-".to_owned(), |b| Bytes(b).to_string());
        let mut row = |name: String, [r, h, f]: [[Option<u64>; 2]; 3]| {
            table.row([
                name,
                shown(r[0]),
                shown(r[1]),
                difference(r[0], r[1]),
                shown(h[0]),
                shown(h[1]),
                shown(f[0]),
                shown(f[1]),
                difference(f[0], f[1]),
            ]);
        };
        let mut sums = [[Some(0u64); 2]; 3];
        for d in &self.devices {
            let values = [
                [d.reserved_a, d.reserved_b],
                [d.headroom_a, d.headroom_b],
                [d.free_a, d.free_b],
            ];
            for (sum, value) in sums.iter_mut().flatten().zip(values.iter().flatten()) {
                *sum = sum
                    .zip(*value)
                    .map(|(sum, value)| sum.saturating_add(value));
            }
            row(d.name.clone(), values);
        }
        if self.devices.len() > 1 {
            row("in all".to_owned(), sums);
        }
        table
    }
}

/// `+1.000 GiB`, `-12 B`, `0`.
fn difference(a: Option<u64>, b: Option<u64>) -> String {
    match a.zip(b) {
        None => "-".to_owned(),
        Some((a, b)) if a == b => "0".to_owned(),
        Some((a, b)) if a < b => format!("+{}", Bytes(b - a)),
        Some((a, b)) => format!("-{}", Bytes(a - b)),
    }
}

#[cfg(test)]
#[path = "diff_tests.rs"]
mod tests;
