//! Places tensors as a device map says, in the form in which transformers and accelerate keep one
//! (`hf_device_map`): a JSON object from the beginnings of module names to devices.

#![forbid(unsafe_code)]

mod device_map;
mod places;

#[cfg(test)]
mod tests;

use tightfit_guest::amounts;
use tightfit_guest::formats::{self, Formats};
use tightfit_guest::partition::{Bin, Item};
use tightfit_guest::settings::{RESERVE, Settings, Spec};
use tightfit_guest::sizing::Sizer;
use tightfit_guest::{
    Description, Format, Level, Placement, Policy, Proposal, Refusal, Request, log, policy,
};

use device_map::DeviceMap;
use places::Places;

const DEVICE_MAP: &str = "device-map";

const SPECS: &[Spec] = &[
    Spec {
        name: DEVICE_MAP,
        default: "",
        help: "JSON object from module names to devices, as hf_device_map: {\"model.layers.0\": 0, \
               \"\": \"cpu\"}. The longest name that a tensor begins with counts.",
    },
    formats::SKIP,
    formats::EXPERTS,
    formats::DOUBLE_QUANT,
    formats::BLOCK_SIZE,
    RESERVE,
];

/// The policy.
#[derive(Debug)]
pub struct Map;

policy!(Map);

impl Policy for Map {
    fn describe() -> Description {
        Description::new("map", env!("CARGO_PKG_VERSION"), SPECS)
    }

    fn plan(request: Request) -> Result<Proposal, Refusal> {
        let settings = Settings::new(SPECS, &request);
        let formats = Formats::read(&settings)?;
        let reserve = settings.bytes(RESERVE.name)?;
        let text = settings.text(DEVICE_MAP);
        if text.is_empty() {
            return Err(Refusal::bad_setting(
                "setting `device-map` is missing: it is a JSON object from module names to \
                 devices, for example {\"\": 0}",
            ));
        }
        let map = DeviceMap::parse(text).map_err(|error| {
            Refusal::bad_setting(format!("setting `device-map` is no device map: {error}"))
        })?;
        let places = Places::find(&request, &map)?;
        for note in &places.notes {
            log(Level::Warn, note);
        }
        for warning in formats.warnings(&request) {
            log(Level::Warn, &warning);
        }
        let formats = formats.choose(&request, &formats::kinds(&request));
        let headroom = headroom(&request, &places.devices, &formats, reserve)?;
        let placement = |(&device, &format)| Placement { device, format };
        Ok(Proposal {
            placements: places.devices.iter().zip(&formats).map(placement).collect(),
            headroom,
        })
    }
}

/// Returns what is left free on each device.
///
/// # Errors
/// A refusal when the map puts more on a device than it holds.
fn headroom(
    request: &Request,
    devices: &[Option<u32>],
    formats: &[Format],
    reserve: u64,
) -> Result<Vec<u64>, Refusal> {
    let mut sizer = Sizer::new();
    let available = request.available();
    let mut loads = vec![Item::default(); available.len()];
    for ((tensor, format), device) in request.tensors.iter().zip(formats).zip(devices) {
        if let Some(device) = *device {
            let size = sizer.size(tensor, *format).map_err(|error| {
                Refusal::unsupported(format!("{}: {}", tensor.name, error.message))
            })?;
            let load = &mut loads[device as usize].bytes;
            *load = load.saturating_add(size.padded);
        }
    }
    let mut used = Vec::new();
    for (d, load) in loads.iter().enumerate() {
        let bin = Bin::new(&request.devices[d], available[d], reserve);
        used.push(match load.bytes {
            0 => 0,
            _ => bin.used(*load).unwrap_or(u64::MAX),
        });
    }
    let free = |d: usize| available[d].saturating_sub(used[d]);
    if let Some(d) = (0..used.len()).find(|&d| used[d] > available[d]) {
        let missing = used[d] - available[d];
        let mut message = format!("the device map needs {}", amounts::need(used[d]));
        if reserve > 0 {
            message += &format!(" with the reserve of {}", amounts::need(reserve));
        }
        message += &format!(
            " on {}, which has {}: {} are missing",
            request.devices[d].name,
            amounts::have(available[d]),
            amounts::need(missing)
        );
        let others = (0..used.len()).filter(|&other| other != d);
        let roomiest = others.max_by_key(|&other| free(other));
        message += &match roomiest.filter(|&other| free(other) > 0) {
            Some(other) => {
                let name = &request.devices[other].name;
                let free = amounts::have(free(other));
                format!("; moving modules to {name}, where {free} are free, would help")
            }
            None => "; another device would help".to_owned(),
        };
        return Err(Refusal::does_not_fit(message, Some(missing)));
    }
    let available = available.iter();
    Ok(available.map(|&bytes| reserve.min(bytes)).collect())
}
