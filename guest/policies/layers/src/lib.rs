//! What the policies `auto` and `packed` share: the model as a sequence of layers, room for the KV
//! cache, ways to place the sequence, and refusals. They differ in the [`Arrangement`].

#![forbid(unsafe_code)]

mod cache;
mod options;
mod place;
mod refusals;
mod units;

#[cfg(test)]
mod fixtures;
#[cfg(test)]
mod promise_tests;
#[cfg(test)]
mod tests;

use tightfit_guest::partition::{Bin, Item};
use tightfit_guest::sizing::Sizer;
use tightfit_guest::{
    Description, Format, Level, Placement, Proposal, Refusal, Request, formats, log, settings,
};

use cache::Cache;
use options::{Options, SPECS};

/// How layers are arranged where there is more than one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrangement {
    /// Over all accelerators, the fullest as empty as possible.
    Spread,
    /// On the fewest accelerators, each filled before the next.
    Pack,
}

/// A description with the settings that [`plan`] reads.
pub fn describe(name: &str, version: &str) -> Description {
    Description {
        name: name.into(),
        version: version.into(),
        settings: settings::describe(SPECS),
    }
}

/// Places every tensor of the request.
///
/// # Errors
/// A refusal when it does not fit, with the bytes that are missing and what would help; or when a
/// setting cannot be used, there is no device, or no KV cache can be computed.
pub fn plan(request: &Request, arrangement: Arrangement) -> Result<Proposal, Refusal> {
    let options = Options::read(request)?;
    if request.devices.is_empty() {
        return Err(Refusal::unsupported(
            "there is no device to place anything on",
        ));
    }
    let kinds = formats::kinds(request);
    let duplicates = request.duplicates();
    let formats = options.formats.choose(request, &kinds);

    let mut sizer = Sizer::new();
    let mut items = vec![Item::default(); request.tensors.len()];
    for (t, tensor) in request.tensors.iter().enumerate() {
        if !duplicates[t] {
            let size = sizer.size(tensor, formats[t]).map_err(|error| {
                Refusal::unsupported(format!("{}: {}", tensor.name, error.message))
            })?;
            items[t].bytes = size.padded;
        }
    }
    let units = units::in_model_order(request, &kinds, &duplicates);
    if options.context > 0 {
        let cache = Cache::read(&request.config_json, &options)?;
        cache.reserve(request, &kinds, &units, &mut items);
    }

    let bins = bins(request, &options);
    let placed = place::place(&request.devices, &bins, &units, &items, arrangement);
    let Some(placed) = placed else {
        return Err(refusals::does_not_fit(
            request, &options, &kinds, &formats, &items, &bins,
        ));
    };
    if let Some(note) = refusals::earlier_failure(request) {
        log(Level::Info, &note);
    }
    for (level, note) in &placed.notes {
        log(*level, note);
    }
    log(
        Level::Debug,
        &format!("{} units, {} tensors", units.len(), items.len()),
    );
    Ok(proposal(&placed.devices, &formats, &items, &bins))
}

fn bins(request: &Request, options: &Options) -> Vec<Bin> {
    let devices = request.devices.iter().zip(request.available());
    let bin = |(device, capacity): (&tightfit_guest::Device, u64)| Bin {
        capacity,
        reserve: options.reserve,
        granularity: device.granularity,
    };
    devices.map(bin).collect()
}

fn proposal(
    devices: &[Option<usize>],
    formats: &[Format],
    items: &[Item],
    bins: &[Bin],
) -> Proposal {
    // Where nothing goes nothing can be eaten into, so a device without room for the reserve is
    // no reason to refuse.
    let mut headroom: Vec<u64> = bins
        .iter()
        .map(|bin| bin.reserve.min(bin.capacity))
        .collect();
    let mut placements = Vec::with_capacity(items.len());
    for ((&device, &format), item) in devices.iter().zip(formats).zip(items) {
        if let Some(device) = device {
            headroom[device] = headroom[device].saturating_add(item.headroom);
        }
        placements.push(Placement {
            device: device.map(|device| device as u32),
            format,
        });
    }
    Proposal {
        placements,
        headroom,
    }
}
