//! The device maps of accelerate and transformers, for those who need the same map.
//!
//! What is reproduced: the module tree that transformers builds, the sizes it counts with, its
//! budgets and its placement. Its sizes leave out scales, so a map can be one that does not fit;
//! the host's exact plan then says so.
//!
//! Like bitsandbytes' quantizer, it refuses a map that has modules in host memory beside
//! accelerators, unless the setting `offload` allows them. Unlike there, they are quantized all
//! the same. There is no disk to place anything on.
//!
//! The map itself and the budgets behind it are logged (level debug), also when it is refused.

#![forbid(unsafe_code)]

mod budgets;
mod device_map;
mod formats;
mod model;
mod options;
mod place;
mod sizes;

#[cfg(test)]
mod fixtures;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod vectors;

use tightfit_guest::settings::Settings;
use tightfit_guest::{
    Description, Format, Level, Placement, Policy, Proposal, Refusal, Request, log, policy,
};

use budgets::Place;
use model::Model;
use options::{Library, Options, SPECS};
use place::Item;
use sizes::Sizes;

/// Bytes of the map in one message. The host keeps four KiB.
const MESSAGE: usize = 3500;

/// The policy.
#[derive(Debug)]
pub struct HuggingFace;

policy!(HuggingFace);

impl Policy for HuggingFace {
    fn describe() -> Description {
        Description::new("huggingface", env!("CARGO_PKG_VERSION"), SPECS)
    }

    fn plan(request: Request) -> Result<Proposal, Refusal> {
        let options = Options::of(&request)?;
        if request.devices.is_empty() {
            return Err(Refusal::unsupported(
                "there is no device to place anything on",
            ));
        }
        for warning in options.formats.warnings(&request) {
            log(Level::Warn, &warning);
        }
        let duplicates = request.duplicates();
        let kinds = tightfit_guest::formats::kinds(&request);
        let formats = formats::formats(&request, &kinds, &options);
        let model = Model::new(&request, &duplicates);
        let sizes = Sizes::new(&request, &model, &kinds, &formats, &options);
        let settings = Settings::new(SPECS, &request);
        let budgets = budgets::budgets(&request, &settings, &model, &sizes, &options)?;
        log(
            Level::Debug,
            &format!("budgets: {}", budgets::as_json(&budgets)),
        );
        let placed = place::place(&model, &sizes, &budgets, options.library);

        let map = device_map::device_map(&request, &model.tree, &placed);
        for part in device_map::as_json(&map, MESSAGE) {
            log(Level::Debug, &format!("device map: {part}"));
        }
        check(&map, &options)?;
        proposal(&request, &model, &placed, &formats)
    }
}

/// Refuses what the libraries refuse, and the disk.
fn check(map: &[(String, Place)], options: &Options) -> Result<(), Refusal> {
    let has = |place| map.iter().any(|(_, at)| *at == place);
    let who = match options.library {
        Library::Accelerate => "accelerate",
        Library::Transformers => "transformers",
    };
    let (cpu, disk) = (has(Place::Cpu), has(Place::Disk));
    let on_accelerators = map.iter().any(|(_, at)| matches!(at, Place::Gpu(_)));
    if disk {
        let mut message = format!(
            "the device map of {who} puts {} on the disk",
            device_map::names_on(map, Place::Disk)
        );
        if cpu {
            message += &format!(" and {} on the cpu", device_map::names_on(map, Place::Cpu));
        }
        message += "; more memory, another `strategy` or the policy `auto` would help";
        return Err(Refusal::does_not_fit(message, None));
    }
    if cpu && on_accelerators && !options.offload {
        return Err(Refusal::does_not_fit(
            format!(
                "the device map of {who} puts {} on the cpu, which it refuses with 4-bit weights; \
                 `offload=true` would place them there, more memory, another `strategy` or the \
                 policy `auto` would help",
                device_map::names_on(map, Place::Cpu)
            ),
            None,
        ));
    }
    Ok(())
}

fn proposal(
    request: &Request,
    model: &Model<'_>,
    placed: &[(Item, Place)],
    formats: &[Format],
) -> Result<Proposal, Refusal> {
    let which = |accelerator: bool| -> Vec<u32> {
        let devices = request.devices.iter().enumerate();
        let of_kind = devices.filter(|(_, device)| device.is_accelerator() == accelerator);
        of_kind.map(|(device, _)| device as u32).collect()
    };
    let (accelerators, hosts) = (which(true), which(false));
    let mut devices = vec![None; request.tensors.len()];
    let mut last = None;
    for &(item, place) in placed {
        let device = match place {
            Place::Gpu(gpu) => accelerators.get(gpu as usize).copied(),
            Place::Cpu => hosts.first().copied(),
            Place::Disk => None,
        };
        let Some(device) = device else {
            return Err(Refusal::does_not_fit(
                "the device map uses the cpu, which is not among the devices: `--device cpu` adds it",
                None,
            ));
        };
        match item {
            Item::Module(module) => {
                for tensor in model.tree.tensors_below(module) {
                    devices[tensor as usize] = Some(device);
                }
            }
            Item::Tensor(tensor, _) => devices[tensor as usize] = Some(device),
        }
        last = Some(device);
    }
    // Transformers leaves them out. We load all that a checkpoint has: behind the model.
    for &tensor in &model.unused {
        devices[tensor as usize] = last.or(Some(0));
    }
    let placements = devices.into_iter().zip(formats);
    Ok(Proposal {
        placements: placements
            .map(|(device, &format)| Placement { device, format })
            .collect(),
        headroom: vec![0; request.devices.len()],
    })
}
