//! What came of asking a policy, held against what was expected.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use tightfit_common::patterns::{Patterns, glob};

use super::expect::{
    Balance, DeviceExpect, DeviceRule, Expect, Fails, FailureKind, Reason, Refused, TensorExpect,
    TotalExpect,
};
use super::outcome::Finding;
use super::slices;
use super::values::{OneOrMany, Parsed, Quantity, Range, Size, TextOr};
use tightfit::checkpoint::{Checkpoint, TensorInfo};
use tightfit::plan::{DevicePlan, Plan, ProposeError};
use tightfit::policy::{PolicyError, RefusalReason};
use tightfit::types::Placement;
use tightfit_wasm::sandbox::GuestFailure;

/// Judges every expectation.
///
/// A pattern that matches nothing is an expectation that does not hold. Where a plan is expected
/// and there is none, that is the only finding.
pub fn judge(
    expect: &Expect,
    checkpoint: &Checkpoint,
    outcome: Result<&Plan, &ProposeError>,
) -> Vec<Finding> {
    let stated = &expect.stated;
    let mut findings = Vec::new();
    if stated.fits == Some(false) {
        findings.push(no_fit(outcome));
    }
    if let Some(refused) = &stated.refused {
        findings.push(refusal(refused, outcome));
    }
    if let Some(TextOr(fails)) = &stated.fails {
        findings.push(failure(fails, outcome));
    }
    if !findings.is_empty() {
        return findings;
    }
    let plan = match outcome {
        Ok(plan) => plan,
        Err(_) => return vec![Finding::new(false, "a plan", shown(outcome))],
    };
    if stated.fits == Some(true) {
        findings.push(Finding::new(true, "a plan", "a plan"));
    }
    // Of the checkpoint that the plan was made for it can be cut.
    let cut = plan.cut(checkpoint).ok().flatten();
    let names = Names::new(cut.as_ref().unwrap_or(checkpoint), plan);
    for (pattern, expect) in &stated.tensors {
        findings.extend(names.tensors(pattern, expect));
    }
    if let Some(OneOrMany(patterns)) = &stated.together {
        findings.extend(patterns.iter().map(|pattern| names.together(pattern)));
    }
    for (pattern, expect) in &stated.devices {
        findings.extend(devices(plan, pattern, expect));
    }
    if let Some(expect) = &stated.total {
        findings.extend(total(plan, expect));
    }
    if let Some(expect) = &stated.balance {
        findings.extend(balance(plan, expect));
    }
    for (pattern, expect) in &stated.slices {
        findings.extend(slices::judge(checkpoint, plan, pattern, expect));
    }
    findings
}

/// What came of it, in a few words.
fn shown(outcome: Result<&Plan, &ProposeError>) -> String {
    match outcome {
        Ok(_) => "a plan".to_owned(),
        Err(error) => error.to_string(),
    }
}

fn no_fit(outcome: Result<&Plan, &ProposeError>) -> Finding {
    let holds = matches!(
        outcome,
        Err(ProposeError::Policy(PolicyError::Refused { refusal, .. }))
            if refusal.reason == RefusalReason::DoesNotFit
    );
    Finding::new(
        holds,
        "a refusal because the model does not fit",
        shown(outcome),
    )
}

fn refusal(expect: &Refused, outcome: Result<&Plan, &ProposeError>) -> Finding {
    let mut wanted = vec![match expect.reason {
        Some(reason) => format!("a refusal with reason {}", reason.name()),
        None => "a refusal".to_owned(),
    }];
    if let Some(text) = &expect.message {
        wanted.push(format!("a message with '{text}'"));
    }
    if let Some(missing) = &expect.missing {
        wanted.push(format!("missing bytes {missing}"));
    }
    let wanted = wanted.join(", ");
    let Err(ProposeError::Policy(PolicyError::Refused { refusal, .. })) = outcome else {
        return Finding::new(false, wanted, shown(outcome));
    };
    let reason = Reason::of(refusal.reason);
    let holds = expect.reason.is_none_or(|wanted| wanted == reason)
        && expect
            .message
            .as_ref()
            .is_none_or(|text| refusal.message.contains(text))
        && expect.missing.is_none_or(|range| {
            refusal
                .missing_bytes
                .is_some_and(|bytes| range.holds(bytes))
        });
    let missing = match refusal.missing_bytes {
        Some(bytes) => format!("missing bytes {}", Size::show(bytes)),
        None => "missing bytes not stated".to_owned(),
    };
    let found = format!("{}, {missing}: {}", reason.name(), refusal.message);
    Finding::new(holds, wanted, found)
}

fn failure(expect: &Fails, outcome: Result<&Plan, &ProposeError>) -> Finding {
    let Parsed(kind) = expect.kind;
    let mut wanted = format!("failure {}", kind.name());
    if let Some(text) = &expect.message {
        wanted += &format!(", a message with '{text}'");
    }
    let found = match outcome {
        Err(ProposeError::BadPlan { .. } | ProposeError::Policy(PolicyError::BadAnswer { .. })) => {
            Some(FailureKind::BadPlan)
        }
        Err(ProposeError::Policy(error)) => GuestFailure::of(error).and_then(FailureKind::of),
        Err(ProposeError::DoesNotFit { .. }) => Some(FailureKind::Overfull),
        Err(_) | Ok(_) => None,
    };
    let message = shown(outcome);
    let holds = found == Some(kind)
        && expect
            .message
            .as_ref()
            .is_none_or(|text| message.contains(text));
    let found = match found {
        Some(kind) => format!("{}: {message}", kind.name()),
        None => message,
    };
    Finding::new(holds, wanted, found)
}

/// Every name that a model knows a tensor by, with what became of the tensor.
struct Names<'a> {
    plan: &'a Plan,
    /// In checkpoint order, then the second names that the checkpoint does not store.
    placed: Vec<(&'a str, Placement)>,
    /// What patterns match: the same names, but of slices those of their tensors.
    whole: Vec<&'a str>,
}

impl<'a> Names<'a> {
    /// The second name of a tensor stands for it, whether the checkpoint stores a copy or not.
    fn new(checkpoint: &'a Checkpoint, plan: &'a Plan) -> Names<'a> {
        let placement = |index: usize| plan.tensors[index].placement;
        let tied: HashMap<usize, usize> = checkpoint
            .ties()
            .iter()
            .filter_map(|tie| Some((tie.alias_tensor?, tie.tensor)))
            .collect();
        let stored = checkpoint
            .tensors()
            .iter()
            .enumerate()
            .map(|(index, tensor)| {
                let own = placement(index);
                let placed = match (own.device, tied.get(&index)) {
                    (None, Some(&owner)) => placement(owner),
                    _ => own,
                };
                (tensor.name.as_str(), placed)
            });
        let mut placed: Vec<_> = stored.collect();
        let of = |tensor: &'a TensorInfo| match &tensor.piece {
            Some(piece) => piece.of.as_str(),
            None => tensor.name.as_str(),
        };
        let mut whole: Vec<&str> = checkpoint.tensors().iter().map(of).collect();
        let aliases = checkpoint.ties().iter();
        for tie in aliases.filter(|tie| tie.alias_tensor.is_none()) {
            let alias = tie.alias.as_str();
            placed.push((alias, placement(tie.tensor)));
            let tensor = &checkpoint.tensors()[tie.tensor];
            let suffix = tensor.name.len() - of(tensor).len();
            whole.push(&alias[..alias.len() - suffix]);
        }
        Names {
            plan,
            placed,
            whole,
        }
    }

    fn device(&self, placement: &Placement) -> &'a str {
        match placement.device {
            Some(device) => &self.plan.devices[device as usize].device.name,
            None => "not loaded",
        }
    }

    /// What is expected of the tensors that a pattern matches.
    fn tensors(&self, pattern: &str, expect: &TensorExpect) -> Vec<Finding> {
        let patterns = Patterns::parse(pattern);
        let named = self.placed.iter().zip(&self.whole);
        let matched: Vec<&(&str, Placement)> = named
            .filter(|(_, name)| patterns.matches(name))
            .map(|(placed, _)| placed)
            .collect();
        let mut findings = Vec::new();
        let of = |what: String| format!("tensors '{pattern}' {what}");
        if let Some(range) = &expect.count {
            let count = matched.len() as u64;
            findings.push(Finding::new(
                range.holds(count),
                of(format!("are {range}")),
                count.to_string(),
            ));
            // Told to be none, they cannot be anything else.
            if matched.is_empty() {
                return findings;
            }
        }
        if matched.is_empty() {
            let found = "no tensor has such a name";
            return vec![Finding::new(false, format!("tensors '{pattern}'"), found)];
        }
        if let Some(loaded) = expect.loaded {
            let wanted = if loaded { "loaded" } else { "not loaded" };
            findings.push(unexpected(
                of(wanted.to_owned()),
                &matched,
                |placed| placed.device.is_some() == loaded,
                |placed| self.device(placed).to_owned(),
            ));
        }
        match &expect.device {
            None => {}
            Some(DeviceRule::Same) => {
                let usual = most_common(matched.iter().map(|(_, placed)| placed.device));
                let devices: BTreeSet<_> = matched.iter().map(|(_, p)| p.device).collect();
                let mut finding = unexpected(
                    of("all on one device".to_owned()),
                    &matched,
                    |placed| placed.device.is_some() && placed.device == usual,
                    |placed| self.device(placed).to_owned(),
                );
                if devices.len() > 1 {
                    finding.found = tally(matched.iter().map(|(_, p)| self.device(p).to_owned()));
                }
                findings.push(finding);
            }
            Some(DeviceRule::AnyOf(names)) => {
                findings.push(unexpected(
                    of(format!("on {}", names.join(" or "))),
                    &matched,
                    |placed| {
                        placed.device.is_some()
                            && names.iter().any(|name| glob(name, self.device(placed)))
                    },
                    |placed| self.device(placed).to_owned(),
                ));
            }
        }
        if let Some(formats) = &expect.format {
            let names: Vec<String> = formats.iter().map(ToString::to_string).collect();
            findings.push(unexpected(
                of(format!("as {}", names.join(" or "))),
                &matched,
                |placed| placed.device.is_some() && formats.contains(&placed.format),
                |placed| match placed.device {
                    Some(_) => placed.format.to_string(),
                    None => "not loaded".to_owned(),
                },
            ));
        }
        findings
    }

    /// Whether the tensors of every module that a pattern matches lie on one device.
    fn together(&self, pattern: &str) -> Finding {
        let wanted = format!("every '{pattern}' on one device");
        let mut modules: BTreeMap<&str, BTreeMap<&str, Vec<&str>>> = BTreeMap::new();
        for (name, placed) in &self.placed {
            if let Some(module) = module_matching(pattern, name) {
                let devices = modules.entry(module).or_default();
                devices.entry(self.device(placed)).or_default().push(name);
            }
        }
        if modules.is_empty() {
            return Finding::new(false, wanted, "no tensor is in such a module");
        }
        let torn: Vec<_> = modules
            .iter()
            .filter(|(_, devices)| devices.len() > 1)
            .collect();
        let Some((module, devices)) = torn.first() else {
            let found = format!("each of {} is on one device", modules.len());
            return Finding::new(true, wanted, found);
        };
        let devices_of: Vec<&str> = devices.keys().copied().collect();
        let mut found = format!("'{module}' is on {}", devices_of.join(" and "));
        if torn.len() > 1 {
            found += &format!(", and {} more are torn apart", torn.len() - 1);
        }
        // Those away from where most of the module is.
        let most = devices.values().map(Vec::len).max().unwrap_or(0);
        let home = devices.iter().find(|(_, names)| names.len() == most);
        let away: Vec<&str> = devices
            .iter()
            .filter(|(device, _)| home.is_some_and(|(home, _)| home != *device))
            .flat_map(|(_, names)| names.iter().copied())
            .collect();
        Finding::new(false, wanted, found).with_tensors(&away)
    }
}

/// The beginning of `name` that `pattern` matches, component by component: of
/// `model.layers.3.mlp.up_proj.weight` and `model.layers.*` it is `model.layers.3`.
fn module_matching<'n>(pattern: &str, name: &'n str) -> Option<&'n str> {
    let mut end = 0;
    let mut components = name.split('.');
    for part in pattern.split('.') {
        let component = components.next()?;
        if !glob(part, component) {
            return None;
        }
        end += component.len() + 1;
    }
    name.get(..end - 1)
}

/// Judges tensors one by one.
fn unexpected(
    wanted: String,
    matched: &[&(&str, Placement)],
    holds: impl Fn(&Placement) -> bool,
    show: impl Fn(&Placement) -> String,
) -> Finding {
    let bad: Vec<_> = matched
        .iter()
        .filter(|(_, placed)| !holds(placed))
        .collect();
    if bad.is_empty() {
        let found = tally(matched.iter().map(|(_, placed)| show(placed)));
        return Finding::new(true, wanted, found);
    }
    let names: Vec<&str> = bad.iter().map(|(name, _)| *name).collect();
    let found = tally(bad.iter().map(|(_, placed)| show(placed)));
    let found = format!("{found} (of {} in all)", matched.len());
    Finding::new(false, wanted, found).with_tensors(&names)
}

/// How often each text is there: `sim:0 for 3, sim:1 for 4`.
fn tally(texts: impl Iterator<Item = String>) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for text in texts {
        *counts.entry(text).or_default() += 1;
    }
    let shown: Vec<String> = counts
        .into_iter()
        .map(|(text, count)| format!("{text} for {count}"))
        .collect();
    shown.join(", ")
}

/// Of several that are equally common, the first device.
fn most_common(devices: impl Iterator<Item = Option<u32>>) -> Option<u32> {
    let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
    for device in devices.flatten() {
        *counts.entry(device).or_default() += 1;
    }
    let most = counts.values().copied().max()?;
    counts
        .into_iter()
        .find(|&(_, count)| count == most)
        .map(|(device, _)| device)
}

fn devices(plan: &Plan, pattern: &str, expect: &DeviceExpect) -> Vec<Finding> {
    let matched: Vec<&DevicePlan> = plan
        .devices
        .iter()
        .filter(|device| glob(pattern, &device.device.name))
        .collect();
    if matched.is_empty() {
        let names: Vec<&str> = plan
            .devices
            .iter()
            .map(|d| d.device.name.as_str())
            .collect();
        let found = format!("there are {}", names.join(", "));
        return vec![Finding::new(false, format!("device '{pattern}'"), found)];
    }
    let mut findings = Vec::new();
    for device in matched {
        let name = &device.device.name;
        if let Some(used) = expect.used {
            let wanted = if used { "is used" } else { "is not used" };
            let found = match device.tensors {
                1 => "1 tensor".to_owned(),
                count => format!("{count} tensors"),
            };
            let holds = (device.tensors > 0) == used;
            findings.push(Finding::new(holds, format!("{name} {wanted}"), found));
        }
        let free = device.device.available.saturating_sub(device.size.reserved);
        findings.extend(bounds(name, "tensors", &expect.tensors, device.tensors));
        findings.extend(bounds(
            name,
            "requested",
            &expect.requested,
            device.size.requested,
        ));
        findings.extend(bounds(
            name,
            "reserved",
            &expect.reserved,
            device.size.reserved,
        ));
        findings.extend(bounds(name, "headroom", &expect.headroom, device.headroom));
        findings.extend(bounds(name, "free", &expect.free, free));
    }
    findings
}

fn bounds<Q: Quantity>(
    who: &str,
    what: &str,
    range: &Option<Range<Q>>,
    value: u64,
) -> Option<Finding> {
    let range = range.as_ref()?;
    Some(Finding::new(
        range.holds(value),
        format!("{who}: {what} {range}"),
        Q::show(value),
    ))
}

fn total(plan: &Plan, expect: &TotalExpect) -> Vec<Finding> {
    let sum = |of: fn(&DevicePlan) -> u64| plan.devices.iter().map(of).fold(0, u64::saturating_add);
    let used = plan
        .devices
        .iter()
        .filter(|device| device.tensors > 0)
        .count();
    let who = "in all";
    [
        bounds(who, "devices used", &expect.devices, used as u64),
        bounds(who, "tensors", &expect.tensors, sum(|d| d.tensors)),
        bounds(
            who,
            "requested",
            &expect.requested,
            sum(|d| d.size.requested),
        ),
        bounds(who, "reserved", &expect.reserved, sum(|d| d.size.reserved)),
        bounds(who, "headroom", &expect.headroom, sum(|d| d.headroom)),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn balance(plan: &Plan, expect: &Balance) -> Vec<Finding> {
    let full = |device: &&DevicePlan| device.size.reserved.saturating_add(device.headroom);
    let accelerators: Vec<&DevicePlan> = plan
        .devices
        .iter()
        .filter(|device| device.device.kind.is_accelerator())
        .collect();
    let fullest = accelerators.iter().copied().max_by_key(full);
    let emptiest = accelerators.iter().copied().min_by_key(full);
    let (Some(fullest), Some(emptiest), true) = (fullest, emptiest, accelerators.len() > 1) else {
        let found = format!("{} of them", accelerators.len());
        return vec![Finding::new(false, "a balance of accelerators", found)];
    };
    let (most, least) = (full(&fullest), full(&emptiest));
    let found = format!(
        "{} with {} and {} with {}",
        fullest.device.name,
        Size::show(most),
        emptiest.device.name,
        Size::show(least)
    );
    let mut findings = Vec::new();
    if let Some(ratio) = expect.ratio {
        findings.push(Finding::new(
            least > 0 && most as f64 <= ratio * least as f64,
            format!("the fullest accelerator at most {ratio} x as full as the emptiest"),
            found.clone(),
        ));
    }
    if let Some(within) = expect.within {
        findings.push(Finding::new(
            most - least <= within,
            format!(
                "at most {} between the fullest and the emptiest accelerator",
                Size::show(within)
            ),
            found,
        ));
    }
    findings
}
