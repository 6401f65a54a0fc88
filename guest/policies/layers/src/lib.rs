//! What the policies `auto` and `packed` share: the model as a sequence of layers, room for the KV
//! cache, ways to place the sequence, and refusals. They differ in the [`Arrangement`].

#![forbid(unsafe_code)]

mod attention;
mod cache;
mod geometry;
mod options;
mod place;
mod refusals;
mod units;
mod windows;

#[cfg(test)]
mod fixtures;
#[cfg(test)]
mod promise_tests;
#[cfg(test)]
mod tests;

use tightfit_guest::partition::Item;
use tightfit_guest::sizing::Sizer;
use tightfit_guest::{Description, Level, Proposal, Refusal, Request, formats, log};

use options::{Options, SPECS};

/// How layers are arranged where there is more than one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrangement {
    /// Over all accelerators, the fullest as empty as possible.
    Spread,
    /// On the fewest accelerators, each filled before the next.
    Pack,
}

/// Returns a description with the settings that [`plan`] reads.
pub fn describe(name: &str, version: &str) -> Description {
    Description::new(name, version, SPECS)
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
    for warning in options.formats.warnings(request) {
        log(Level::Warn, &warning);
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
        for (level, note) in cache::reserve(request, &options, &kinds, &units, &mut items)? {
            log(level, &note);
        }
    }

    let bins = request.bins(options.reserve);
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
    Ok(Proposal::new(&placed.devices, &formats, &items, &bins))
}
