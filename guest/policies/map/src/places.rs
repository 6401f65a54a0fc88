//! From names to devices.

use std::collections::{BTreeMap, HashMap};

use tightfit_guest::in_memory::InMemory;
use tightfit_guest::{Refusal, Request};

use crate::device_map::{DeviceMap, Target};

/// Number of entries that are complained about one by one, at most.
const MOST_NOTES: usize = 8;

/// The places where a map puts everything.
#[derive(Debug)]
pub(crate) struct Places {
    /// The device of each tensor; none for the second copy of a tied one.
    pub(crate) devices: Vec<Option<u32>>,
    /// What the user may have meant otherwise.
    pub(crate) notes: Vec<String>,
}

impl Places {
    /// # Errors
    /// A refusal for a device that is not there, and for tensors that no entry covers.
    pub(crate) fn find(request: &Request, map: &DeviceMap) -> Result<Places, Refusal> {
        let mut entries = Entries::new(request, map)?;
        let in_memory = InMemory::new(request);
        let duplicates = request.duplicates();
        let mut aliases: BTreeMap<usize, Vec<&str>> = BTreeMap::new();
        for tie in &request.ties {
            let tensor = tie.tensor as usize;
            aliases.entry(tensor).or_default().push(&tie.alias);
        }
        let mut notes = Vec::new();
        let mut devices = Vec::with_capacity(request.tensors.len());
        let mut uncovered = Vec::new();
        for (t, tensor) in request.tensors.iter().enumerate() {
            if duplicates[t] {
                // What the map says of it is looked at with the tensor that it is tied to.
                devices.push(None);
                continue;
            }
            let mut device = entries.of_tensor(&tensor.name, &in_memory);
            for alias in aliases.get(&t).into_iter().flatten() {
                let other = entries.of_tensor(alias, &in_memory);
                match (device, other) {
                    (Some(own), Some(other)) if own != other => notes.push(format!(
                        "`{alias}` and `{}` are one parameter: both are on {}, not on {}",
                        tensor.name,
                        request.devices[own as usize].name,
                        request.devices[other as usize].name
                    )),
                    (None, other) => device = other,
                    _ => {}
                }
            }
            if device.is_none() {
                uncovered.push(tensor.name.as_str());
            }
            devices.push(device);
        }
        if let Some((first, rest)) = uncovered.split_first() {
            let others = match rest.len() {
                0 => String::new(),
                1 => " and one other tensor".into(),
                more => format!(" and {more} other tensors"),
            };
            return Err(Refusal::bad_setting(format!(
                "setting `device-map` has no entry for `{first}`{others}; an entry \"\" covers \
                 everything"
            )));
        }
        notes.extend(entries.unused());
        Ok(Places { devices, notes })
    }
}

/// The map with its devices found.
struct Entries<'a> {
    by_name: HashMap<&'a str, Entry>,
    /// Components of the longest name.
    longest: usize,
}

struct Entry {
    device: u32,
    used: bool,
}

impl<'a> Entries<'a> {
    fn new(request: &Request, map: &'a DeviceMap) -> Result<Entries<'a>, Refusal> {
        let mut by_name = HashMap::with_capacity(map.0.len());
        let mut longest = 0;
        for (name, target) in &map.0 {
            let device = device(request, name, target)?;
            let name = name.as_str();
            longest = longest.max(name.bytes().filter(|&c| c == b'.').count() + 1);
            let used = false;
            by_name.insert(name, Entry { device, used });
        }
        Ok(Entries { by_name, longest })
    }

    /// Returns the device of the longest entry for a tensor, by its name in the checkpoint or in
    /// memory.
    fn of_tensor(&mut self, name: &str, in_memory: &InMemory) -> Option<u32> {
        let own = self.of_name(name);
        if own.is_some_and(|(count, _)| count == self.longest) {
            return own.map(|(_, device)| device);
        }
        let other = in_memory.name(name).and_then(|name| self.of_name(&name));
        let longer = match (own, other) {
            (Some(own), Some(other)) if other.0 > own.0 => Some(other),
            (own, other) => own.or(other),
        };
        longer.map(|(_, device)| device)
    }

    /// Returns the longest entry that a name begins with: its number of components, and its device.
    fn of_name(&mut self, name: &str) -> Option<(usize, u32)> {
        let mut found = None;
        if let Some(all) = self.by_name.get_mut("") {
            all.used = true;
            found = Some((0, all.device));
        }
        let ends = name.bytes().enumerate().filter(|&(_, c)| c == b'.');
        let ends = ends.map(|(end, _)| end).chain([name.len()]);
        for (count, end) in ends.take(self.longest).enumerate() {
            if end > 0
                && let Some(entry) = self.by_name.get_mut(&name[..end])
            {
                entry.used = true;
                found = Some((count + 1, entry.device));
            }
        }
        found
    }

    /// Returns the entries without a tensor.
    fn unused(&self) -> Vec<String> {
        // transformers lists these modules too; they hold nothing that a checkpoint has.
        let is_odd = |name: &str, entry: &Entry| !entry.used && !name.ends_with("rotary_emb");
        let odd = self.by_name.iter().filter(|(name, e)| is_odd(name, e));
        let mut odd: Vec<&str> = odd.map(|(name, _)| *name).collect();
        odd.sort_unstable();
        let note = |name| format!("device-map: no tensor begins with `{name}`");
        let mut notes: Vec<String> = odd.into_iter().map(note).collect();
        let more = notes.len().saturating_sub(MOST_NOTES);
        notes.truncate(MOST_NOTES);
        if more > 0 {
            notes.push(format!("device-map: nor with {more} other entries"));
        }
        notes
    }
}

/// Returns the index of the device that an entry names.
fn device(request: &Request, entry: &str, target: &Target) -> Result<u32, Refusal> {
    let named = |wanted: &str| request.devices.iter().position(|d| d.name == wanted);
    let found = match target {
        Target::Name(name) if name == "disk" => {
            return Err(Refusal::bad_setting(format!(
                "setting `device-map` puts `{entry}` on disk, and everything is loaded into \
                 memory here: name a device, or \"cpu\""
            )));
        }
        Target::Name(name) => named(name),
        Target::Number(number) => named(&format!("cuda:{number}")).or_else(|| {
            let accelerators = request.devices.iter().enumerate();
            let mut accelerators = accelerators.filter(|(_, device)| device.is_accelerator());
            let (found, _) = accelerators.nth(usize::try_from(*number).ok()?)?;
            Some(found)
        }),
    };
    if let Some(found) = found {
        return Ok(found as u32);
    }
    let names: Vec<&str> = request.devices.iter().map(|d| d.name.as_str()).collect();
    let there = match names.len() {
        0 => "none".into(),
        _ => names.join(", "),
    };
    Err(Refusal::bad_setting(format!(
        "setting `device-map` puts `{entry}` on {target}; the devices are: {there}"
    )))
}
