//! What every subcommand opens: model, policy, devices; and what Ctrl-C does.

use serde::Serialize;
use tightfit::checkpoint::{self, Checkpoint};
use tightfit::device::{Device, DeviceInfo, DeviceKind, open_devices};
use tightfit::load::CancelToken;
use tightfit::plan::{Proposed, propose};
use tightfit::policy::{Limits, WasmPolicy};
use tightfit::report::Table;
use tightfit::types::Bytes;

use crate::args::{DevicesOptions, PolicyOptions};
use crate::failure::Failure;
use crate::output;

/// The first interrupt asks for an orderly end, the second ends at once.
pub(crate) fn cancel_on_interrupt() -> CancelToken {
    let token = CancelToken::new();
    let asked = token.clone();
    let handler = move || {
        if asked.is_cancelled() {
            std::process::exit(130);
        }
        asked.cancel();
    };
    if let Err(error) = ctrlc::set_handler(handler) {
        tracing::warn!("interrupts will not be orderly: {error}");
    }
    token
}

/// Finds and opens a checkpoint.
pub(crate) fn open_checkpoint(model: &str) -> Result<Checkpoint, Failure> {
    Ok(Checkpoint::open(&checkpoint::resolve(model)?)?)
}

/// Asks the policy. It is gone when this returns: its compiled code would count in the peak.
pub(crate) fn propose_with(
    options: &PolicyOptions,
    checkpoint: &Checkpoint,
    devices: &[DeviceInfo],
) -> Result<Proposed, Failure> {
    let policy = WasmPolicy::open(&options.policy, Limits::default())?;
    Ok(propose(checkpoint, &policy, devices, &options.settings)?)
}

/// A device on which everything fits: for asking a policy about formats, not places.
pub(crate) fn anywhere() -> DeviceInfo {
    DeviceInfo {
        name: "any".to_owned(),
        kind: DeviceKind::Sim,
        capacity: 1 << 60,
        available: 1 << 60,
        granularity: 1,
    }
}

/// What the devices say of themselves.
pub(crate) fn infos(devices: &[Box<dyn Device>]) -> Vec<DeviceInfo> {
    devices.iter().map(|device| device.info()).collect()
}

#[derive(Serialize)]
struct Listed {
    name: String,
    kind: String,
    capacity: u64,
    available: u64,
    granularity: u64,
}

/// `tightfit devices`.
pub(crate) fn list_devices(options: &DevicesOptions) -> Result<(), Failure> {
    let devices = infos(&open_devices(&options.devices)?);
    if options.output.json {
        let listed: Vec<Listed> = devices
            .into_iter()
            .map(|device| Listed {
                name: device.name,
                kind: device.kind.to_string(),
                capacity: device.capacity,
                available: device.available,
                granularity: device.granularity,
            })
            .collect();
        return output::print_json(&listed);
    }
    if options.output.quiet {
        return Ok(());
    }
    let mut table = Table::new(["device", "capacity", "available"]);
    for device in devices {
        table.row([
            device.name,
            Bytes(device.capacity).to_string(),
            Bytes(device.available).to_string(),
        ]);
    }
    output::print(&table.to_string())
}
