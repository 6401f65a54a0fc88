//! Slices of a plan, held against what was expected.

use std::collections::{BTreeMap, BTreeSet};

use tightfit_common::patterns::{Patterns, glob};

use super::expect::{Extent, SliceExpect};
use super::outcome::Finding;
use tightfit::checkpoint::{Checkpoint, TensorInfo};
use tightfit::plan::Plan;
use tightfit::types::Slice;

/// A tensor with its slices, in the plan's order.
struct Cut<'a> {
    tensor: &'a TensorInfo,
    slices: Vec<&'a Slice>,
}

/// Judges how the tensors are cut that a pattern matches.
pub(super) fn judge(
    checkpoint: &Checkpoint,
    plan: &Plan,
    pattern: &str,
    expect: &SliceExpect,
) -> Vec<Finding> {
    let patterns = Patterns::parse(pattern);
    let mut slices: BTreeMap<usize, Vec<&Slice>> = BTreeMap::new();
    for slice in &plan.slices {
        slices.entry(slice.tensor as usize).or_default().push(slice);
    }
    let named = checkpoint.tensors().iter().enumerate();
    let matched: Vec<Cut<'_>> = named
        .filter(|(_, tensor)| patterns.matches(&tensor.name))
        .map(|(index, tensor)| Cut {
            tensor,
            slices: slices.remove(&index).unwrap_or_default(),
        })
        .collect();
    let of = |what: String| format!("slices of '{pattern}' {what}");
    let mut findings = Vec::new();
    if let Some(range) = &expect.count {
        let count = matched.len() as u64;
        let wanted = of(format!("are of {range} tensors"));
        findings.push(Finding::new(range.holds(count), wanted, count.to_string()));
    }
    if matched.is_empty() {
        if expect.count.is_none() {
            let found = "no tensor has such a name";
            findings.push(Finding::new(false, of("are there".into()), found));
        }
        return findings;
    }
    let mut each =
        |wanted: String, holds: &dyn Fn(&Cut<'_>) -> bool, show: &dyn Fn(&Cut<'_>) -> String| {
            findings.push(of_each(of(wanted), &matched, holds, show));
        };
    if let Some(range) = &expect.parts {
        each(
            format!("are {range} of each"),
            &|cut| range.holds(cut.slices.len() as u64),
            &|cut| format!("{} slices", cut.slices.len()),
        );
    }
    if let Some(dimension) = expect.dimension {
        each(
            format!("are along dimension {dimension}"),
            &|cut| !cut.slices.is_empty() && cut.slices.iter().all(|s| s.dimension == dimension),
            &|cut| {
                let dimensions: BTreeSet<u32> = cut.slices.iter().map(|s| s.dimension).collect();
                let shown: Vec<String> = dimensions.iter().map(u32::to_string).collect();
                match shown.is_empty() {
                    true => NOT_CUT.to_owned(),
                    false => format!("dimension {}", shown.join(" and ")),
                }
            },
        );
    }
    if let Some(complete) = expect.complete {
        let wanted = if complete { "have" } else { "do not have" };
        each(
            format!("{wanted} each element once"),
            &|cut| (coverage(cut) == Coverage::Once) == complete,
            &|cut| coverage(cut).shown().to_owned(),
        );
    }
    if let Some(copies) = expect.copies {
        let wanted = if copies { "are" } else { "are not" };
        each(
            format!("{wanted} a whole copy on each device"),
            &|cut| has_copies(cut, plan) == copies,
            &|cut| match has_copies(cut, plan) {
                true => "a copy on each device".to_owned(),
                false => shown(cut, plan),
            },
        );
    }
    for (device, extents) in &expect.ranges {
        let text = |extents: &[Extent]| {
            let texts = extents.iter().map(|e| format!("{}:{}", e.start, e.end));
            texts.collect::<Vec<_>>().join("+")
        };
        let holds = |cut: &Cut<'_>| {
            let mut there = cut
                .slices
                .iter()
                .filter(|slice| glob(device, name(slice, plan)));
            let is_same = |slice: &&Slice| {
                let wanted = extents.iter().map(|extent| extent.start..extent.end);
                slice.ranges.iter().cloned().eq(wanted)
            };
            there
                .next()
                .is_some_and(|first| is_same(first) && there.all(|slice| is_same(slice)))
        };
        each(
            format!("are {} on {device}", text(extents)),
            &holds,
            &|cut| shown(cut, plan),
        );
    }
    findings
}

/// What is said of a tensor without slices.
const NOT_CUT: &str = "not cut";

/// Ranges and devices that a message repeats.
const MOST_SHOWN: usize = 8;

fn of_each(
    wanted: String,
    matched: &[Cut<'_>],
    holds: &dyn Fn(&Cut<'_>) -> bool,
    show: &dyn Fn(&Cut<'_>) -> String,
) -> Finding {
    let bad: Vec<&Cut<'_>> = matched.iter().filter(|cut| !holds(cut)).collect();
    let judged: Vec<&Cut<'_>> = match bad.is_empty() {
        true => matched.iter().collect(),
        false => bad,
    };
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for cut in &judged {
        *counts.entry(show(cut)).or_default() += 1;
    }
    let more = counts.len().saturating_sub(MOST_SHOWN);
    let shown = counts.iter().take(MOST_SHOWN);
    let shown: Vec<String> = shown
        .map(|(text, count)| format!("{text} for {count}"))
        .collect();
    let mut found = shown.join(", ");
    if more > 0 {
        found += &format!(" and {more} others");
    }
    if judged.iter().all(|cut| holds(cut)) {
        return Finding::new(true, wanted, found);
    }
    let names: Vec<&str> = judged.iter().map(|cut| cut.tensor.name.as_str()).collect();
    Finding::new(
        false,
        wanted,
        format!("{found} (of {} in all)", matched.len()),
    )
    .with_tensors(&names)
}

/// How often slices have a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Coverage {
    NotCut,
    Once,
    Gap,
    Overlap,
    Mixed,
}

impl Coverage {
    const fn shown(self) -> &'static str {
        match self {
            Coverage::NotCut => NOT_CUT,
            Coverage::Once => "each once",
            Coverage::Gap => "some in no slice",
            Coverage::Overlap => "some in several slices",
            Coverage::Mixed => "slices along several dimensions",
        }
    }
}

fn coverage(cut: &Cut<'_>) -> Coverage {
    let Some(first) = cut.slices.first() else {
        return Coverage::NotCut;
    };
    if cut
        .slices
        .iter()
        .any(|slice| slice.dimension != first.dimension)
    {
        return Coverage::Mixed;
    }
    let length = cut.tensor.shape.get(first.dimension as usize).copied();
    let mut ranges: Vec<_> = cut.slices.iter().flat_map(|slice| &slice.ranges).collect();
    ranges.sort_unstable_by_key(|range| (range.start, range.end));
    let mut end = 0;
    let mut has_gap = false;
    for range in ranges {
        if range.start < end {
            return Coverage::Overlap;
        }
        has_gap |= range.start > end;
        end = range.end;
    }
    match has_gap || Some(end) != length {
        true => Coverage::Gap,
        false => Coverage::Once,
    }
}

fn has_copies(cut: &Cut<'_>, plan: &Plan) -> bool {
    let is_whole = |slice: &Slice| {
        let length = cut.tensor.shape.get(slice.dimension as usize).copied();
        slice.ranges.first().map(|range| range.start) == Some(0)
            && slice
                .ranges
                .windows(2)
                .all(|pair| pair[0].end == pair[1].start)
            && slice.ranges.last().map(|range| range.end) == length
    };
    let with_copy = cut.slices.iter().filter(|slice| is_whole(slice));
    let on: BTreeSet<u32> = with_copy
        .filter_map(|slice| slice.placement.device)
        .collect();
    on.len() == plan.devices.len()
}

fn name<'a>(slice: &Slice, plan: &'a Plan) -> &'a str {
    let device = slice
        .placement
        .device
        .and_then(|device| plan.devices.get(device as usize));
    device.map_or("not loaded", |device| device.device.name.as_str())
}

/// The slices of a tensor in a few words: `0:64 on sim:0, 64:128 on sim:1`.
fn shown(cut: &Cut<'_>, plan: &Plan) -> String {
    if cut.slices.is_empty() {
        return NOT_CUT.to_owned();
    }
    let one = |slice: &&Slice| {
        let ranges = slice.ranges.iter().take(MOST_SHOWN);
        let ranges: Vec<String> = ranges.map(|r| format!("{}:{}", r.start, r.end)).collect();
        let more = if slice.ranges.len() > MOST_SHOWN {
            "+..."
        } else {
            ""
        };
        format!("{}{more} on {}", ranges.join("+"), name(slice, plan))
    };
    let some = cut.slices.iter().take(MOST_SHOWN);
    let mut text = some.map(one).collect::<Vec<_>>().join(", ");
    let more = cut.slices.len().saturating_sub(MOST_SHOWN);
    if more > 0 {
        text += &format!(" and {more} others");
    }
    text
}
