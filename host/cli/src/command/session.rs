//! What every subcommand opens: model, policy, devices; and what Ctrl-C does.

use std::collections::HashSet;
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::draw::Table;
use serde::Serialize;
use tightfit::cancel::CancelToken;
use tightfit::checkpoint::{self, Checkpoint, CheckpointError, OpenOptions};
use tightfit::device::{Device, DeviceError, DeviceInfo, DeviceKind, open_devices};
use tightfit::hub::{self, FetchOptions, FileProgress, Hub, HubError};
use tightfit::load::{self, ReservedPlan};
use tightfit::plan::{self, PlanOptions, Proposed};
use tightfit::text::truncated;
use tightfit::types::Bytes;
use tightfit_wasm::policy::WasmPolicy;

use crate::command::args::{DevicesOptions, ModelOptions, PolicyOptions};
use crate::command::error::CommandError;
use crate::command::output::Envelope;
use crate::command::{output, progress};

/// What an interrupt uses, if it is to be orderly.
pub(crate) fn interrupted() -> CancelToken {
    static TOKEN: OnceLock<CancelToken> = OnceLock::new();
    TOKEN.get_or_init(CancelToken::new).clone()
}

/// An interrupt ends this process at once, and with it the compiler that it may have started.
pub(crate) fn exit_on_interrupt() {
    // Without it the signal does, with another status.
    if let Err(error) = ctrlc::set_handler(|| std::process::exit(130)) {
        tracing::debug!("interrupts end the process with the signal: {error}");
    }
}

/// The first interrupt asks for an orderly end, the second ends at once.
pub(crate) fn cancel_on_interrupt() -> CancelToken {
    let token = interrupted();
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

/// Finds and opens a checkpoint, and downloads what the cache lacks of it. An interrupt leaves a
/// download fit to be resumed.
pub(crate) fn open_checkpoint(
    options: &ModelOptions,
    quiet: bool,
    cancel: &CancelToken,
) -> Result<Checkpoint, CommandError> {
    match open_local(options, cancel)? {
        Local::Here(checkpoint) => Ok(*checkpoint),
        Local::Missing(hub) => download(&hub, options, quiet, cancel),
    }
}

/// Opens a checkpoint, and meanwhile the devices: a driver takes its time to start.
///
/// # Errors
/// As [`open_checkpoint`], then what `devices` gives.
pub(crate) fn open_both(
    options: &ModelOptions,
    devices: impl Fn() -> Result<Vec<Box<dyn Device>>, DeviceError> + Sync,
    quiet: bool,
    cancel: &CancelToken,
) -> Result<(Checkpoint, Vec<Box<dyn Device>>), CommandError> {
    let open = &devices;
    std::thread::scope(|scope| {
        let devices = std::thread::Builder::new()
            .name("tightfit-devices".to_owned())
            .spawn_scoped(scope, open);
        let checkpoint = open_checkpoint(options, quiet, cancel)?;
        let devices = match devices {
            Ok(opening) => opening
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            // The system has no more threads.
            Err(_) => open(),
        };
        Ok((checkpoint, devices?))
    })
}

/// Finds a checkpoint and opens it as far as planning takes: of what the cache lacks, only
/// configuration and headers are asked for, and all of it only where that is not enough.
pub(crate) fn open_headers(
    options: &ModelOptions,
    quiet: bool,
) -> Result<Checkpoint, CommandError> {
    let cancel = CancelToken::new();
    let hub = match open_local(options, &cancel)? {
        Local::Here(checkpoint) => return Ok(*checkpoint),
        Local::Missing(hub) => hub,
    };
    let fetch = FetchOptions::default()
        .with_revision(options.revision.as_deref())
        .with_dequantize(options.dequantize)
        .with_cancel(cancel.clone());
    match hub::headers(&hub, &options.model, &fetch) {
        Err(HubError::Checkpoint(CheckpointError::HeadersOnly { .. })) => {
            download(&hub, options, quiet, &cancel)
        }
        other => Ok(remarked(other?)),
    }
}

fn open_options(options: &ModelOptions, cancel: &CancelToken) -> OpenOptions {
    OpenOptions::default()
        .with_dequantize(options.dequantize)
        .with_cancel(cancel.clone())
}

/// What there is of a model without a download.
enum Local {
    Here(Box<Checkpoint>),
    /// Nothing, or not all of it: the hub to ask.
    Missing(Hub),
}

fn open_local(options: &ModelOptions, cancel: &CancelToken) -> Result<Local, CommandError> {
    let mut hub = Hub::from_process();
    hub.offline |= options.offline;
    let (model, revision) = (&options.model, options.revision.as_deref());
    let local = checkpoint::resolve_revision(model, revision, &hub.cache)
        .and_then(|path| Checkpoint::open_with(&path, &open_options(options, cancel)));
    match local {
        Err(error) if hub.may_have(model, &error) => Ok(Local::Missing(hub)),
        other => Ok(Local::Here(Box::new(remarked(other?)))),
    }
}

fn download(
    hub: &Hub,
    options: &ModelOptions,
    quiet: bool,
    cancel: &CancelToken,
) -> Result<Checkpoint, CommandError> {
    let bar = progress::bytes("downloading", quiet);
    let shown = Mutex::new(String::new());
    let report = |progress: FileProgress<'_>| {
        let mut shown = shown.lock().unwrap_or_else(PoisonError::into_inner);
        if *shown != progress.file {
            progress.file.clone_into(&mut shown);
            bar.set_length(progress.bytes_total);
            bar.set_message(progress::message(&shown));
            bar.reset_eta();
        }
        bar.set_position(progress.bytes_done);
    };
    let fetch = FetchOptions::default()
        .with_revision(options.revision.as_deref())
        .with_progress(&report)
        .with_cancel(cancel.clone());
    let fetched = hub::fetch(hub, &options.model, &fetch);
    bar.finish_and_clear();
    let opened = Checkpoint::open_with(&fetched?, &open_options(options, cancel));
    Ok(remarked(opened?))
}

/// Warns of what is worth saying of a checkpoint: also of heads that are no second copies of the table
/// that config.json ties them to.
fn remarked(checkpoint: Checkpoint) -> Checkpoint {
    for remark in checkpoint.remarks() {
        tracing::warn!("{remark}");
    }
    for tie in checkpoint.untied() {
        tracing::warn!(
            "'{}' is stored with other values than '{}', to which config.json ties it: both are kept",
            truncated(tie.alias.clone(), MOST_NAME),
            truncated(checkpoint.tensors()[tie.tensor].name.clone(), MOST_NAME)
        );
    }
    checkpoint
}

/// Asks the policy. It is gone when this returns: its compiled code would count in the peak.
pub(crate) fn propose_with(
    options: &PolicyOptions,
    checkpoint: &Checkpoint,
    devices: &[DeviceInfo],
    cancel: &CancelToken,
) -> Result<Proposed, CommandError> {
    let policy = WasmPolicy::open(&options.policy, options.sandbox.options()?)?;
    let settings = &options.settings;
    let options = PlanOptions::default().with_cancel(cancel.clone());
    let proposed = plan::propose_with(checkpoint, &policy, devices, settings, &options)?;
    warn_of_unloaded(checkpoint, &proposed);
    Ok(proposed)
}

/// Asks the policy and takes the memory of its plan, as often as that takes. The policy is gone when
/// this returns.
pub(crate) fn reserve_with(
    options: &PolicyOptions,
    checkpoint: &Checkpoint,
    devices: &[Box<dyn Device>],
    cancel: &CancelToken,
) -> Result<ReservedPlan, CommandError> {
    let policy = WasmPolicy::open(&options.policy, options.sandbox.options()?)?;
    let settings = &options.settings;
    let options = PlanOptions::default().with_cancel(cancel.clone());
    let reserved = load::reserve_with(checkpoint, &policy, devices, settings, &options)?;
    warn_of_unloaded(checkpoint, &reserved.proposed);
    Ok(reserved)
}

/// Warns of tensors that the policy puts on no device. Second copies of tied parameters are none of
/// them: their names resolve to the first.
fn warn_of_unloaded(checkpoint: &Checkpoint, proposed: &Proposed) {
    // A plan that is not for it has been refused before.
    let cut = proposed.plan.cut(checkpoint).unwrap_or(None);
    let checkpoint = cut.as_ref().unwrap_or(checkpoint);
    let ties = checkpoint.ties().iter();
    let copies: HashSet<usize> = ties.filter_map(|tie| tie.alias_tensor).collect();
    let tensors = proposed.plan.tensors.iter().enumerate();
    let mut unloaded = tensors
        .filter(|(index, tensor)| tensor.placement.device.is_none() && !copies.contains(index))
        .map(|(index, _)| index);
    let Some(first) = unloaded.next() else {
        return;
    };
    tracing::warn!(
        "{} of {} tensors are not loaded, '{}' first: the policy puts them on no device",
        1 + unloaded.count(),
        checkpoint.tensors().len(),
        truncated(checkpoint.tensors()[first].name.clone(), MOST_NAME)
    );
}

/// Bytes that are shown of a tensor's name.
const MOST_NAME: usize = 256;

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

#[derive(Serialize)]
struct DeviceList {
    devices: Vec<Listed>,
}

/// `tightfit devices`.
pub(crate) fn list_devices(options: &DevicesOptions) -> Result<(), CommandError> {
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
        return output::print_json(&Envelope::new(DeviceList { devices: listed }));
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
