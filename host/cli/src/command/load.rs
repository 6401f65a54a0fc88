//! `tightfit load`.

use crate::draw::Table;
use tightfit::Progress;
use tightfit::cancel::CancelToken;
use tightfit::checkpoint::Checkpoint;
use tightfit::device::{Device, open_devices};
use tightfit::load::{self, QuantizeOn, ReservedPlan};
use tightfit::model::Model;
use tightfit::report::Report;
use tightfit::save::check_target;
use tightfit::text::printable;
use tightfit::types::Bytes;

use crate::command::args::{EngineOptions, LoadOptions};
use crate::command::error::CommandError;
use crate::command::{output, progress, save, session};

/// `tightfit load`.
pub(crate) fn load(options: &LoadOptions, cancel: CancelToken) -> Result<(), CommandError> {
    if let Some(directory) = &options.save {
        // Before a load that would have been for nothing.
        check_target(directory, options.write.force)?;
    }
    let checkpoint = session::open_checkpoint(&options.model, options.output.quiet, &cancel)?;
    let devices = open_devices(&options.placement.devices)?;
    let placed = session::reserve_with(&options.placement.policy, &checkpoint, &devices, &cancel)?;
    let proposed = placed.proposed.clone();
    let quiet = options.output.quiet;
    let (model, mut report) = carry_out(
        &checkpoint,
        placed,
        &devices,
        &options.engine,
        options.quantize_on,
        quiet,
        cancel.clone(),
    )?;
    if let Some(directory) = &options.save {
        save::write(
            &checkpoint,
            &proposed,
            directory,
            &options.engine,
            &options.write,
            quiet,
            cancel,
        )?;
    }
    if options.placements {
        report = report.with_placements(&checkpoint, model.plan());
    }
    if options.output.json {
        output::print_json(&report)
    } else if quiet {
        Ok(())
    } else {
        output::print(&(text(&report) + &placements(&report)))
    }
}

/// Loads with a progress bar. Gives the model and the report made while it is loaded.
pub(crate) fn carry_out(
    checkpoint: &Checkpoint,
    placed: ReservedPlan,
    devices: &[Box<dyn Device>],
    engine: &EngineOptions,
    quantize_on: QuantizeOn,
    quiet: bool,
    cancel: CancelToken,
) -> Result<(Model, Report), CommandError> {
    let bar = progress::bytes("loading", quiet);
    let defaults = load::LoadOptions::default();
    let report = |progress: Progress| progress::show(&bar, progress);
    let options = load::LoadOptions::default()
        .with_threads(engine.threads.map_or(defaults.threads, usize::from))
        .with_staging_bytes(engine.staging.unwrap_or(defaults.staging_bytes))
        .with_strict(engine.strict)
        .with_quantize_on(quantize_on)
        .with_kernels(engine.kernels()?)
        .with_progress(&report)
        .with_cancel(cancel);
    let result = load::load_reserved(checkpoint, placed.reserved, &options);
    bar.finish_and_clear();
    let model = result?;
    let usage: Vec<_> = devices.iter().map(|device| device.usage()).collect();
    let report = Report::of_plan(checkpoint, &placed.proposed, options.staging_bytes)
        .with_revisions(&placed.revisions)
        .with_load(checkpoint, model.stats(), &usage);
    Ok((model, report))
}

/// The report for people, without a list of placements.
pub(crate) fn text(report: &Report) -> String {
    let model = &report.model;
    let mut text = format!(
        "{}{}: {} tensors, {}\npolicy {} {}, {:.3} s\n\n",
        printable(&model.path),
        match &model.architecture {
            Some(architecture) => format!(" ({})", printable(architecture)),
            None => String::new(),
        },
        model.tensors,
        Bytes(model.source_bytes),
        printable(&report.policy.name),
        printable(&report.policy.version),
        report.policy.seconds,
    );
    if let Some(method) = &model.quantization {
        text += &format!("{method}\n\n");
    }
    for revision in &report.policy.revisions {
        text += &format!(
            "revised: {} had {} left where the plan needed {}\n\n",
            printable(&revision.device),
            Bytes(revision.available),
            Bytes(revision.needed),
        );
    }
    let mut table = Table::new([
        "device",
        "tensors",
        "allocated",
        "reserved",
        "peak",
        "headroom",
        "capacity",
        "used",
    ]);
    for device in &report.devices {
        let used = device.reserved.saturating_add(device.headroom) as f64;
        table.row([
            device.name.clone(),
            device.tensors.to_string(),
            Bytes(device.allocated).to_string(),
            Bytes(device.reserved).to_string(),
            Bytes(device.peak_reserved).to_string(),
            Bytes(device.headroom).to_string(),
            Bytes(device.capacity).to_string(),
            format!("{:.1} %", 100.0 * used / device.capacity.max(1) as f64),
        ]);
    }
    // What says most stays longest.
    let expendable = [
        "peak",
        "allocated",
        "tensors",
        "headroom",
        "capacity",
        "reserved",
    ];
    text += &table.within(output::columns(), &expendable).to_string();
    let allocated: u64 = report.devices.iter().map(|device| device.allocated).sum();
    text += &format!(
        "\n{} in the checkpoint, {} as stored ({:.2} x smaller)\n",
        Bytes(model.source_bytes),
        Bytes(allocated),
        model.source_bytes as f64 / allocated.max(1) as f64,
    );
    if let Some(load) = &report.load {
        text += &format!(
            "loaded in {:.2} s ({:.2} GB/s): {} tensors quantized, {} stored\n",
            load.seconds,
            load.bytes_read as f64 / 1e9 / load.seconds.max(1e-9),
            load.quantized,
            load.stored,
        );
        for (device, bytes) in &load.quantized_on {
            if bytes.by_device > 0 {
                text += &format!(
                    "quantized for {}: {} by the GPU, {} by the processor\n",
                    printable(device),
                    Bytes(bytes.by_device),
                    Bytes(bytes.by_host),
                );
            }
        }
        if load.nonfinite_blocks > 0 {
            text += &format!(
                "warning: {} blocks with infinities or NaN, in {}\n",
                load.nonfinite_blocks,
                load.nonfinite
                    .keys()
                    .map(|name| printable(name))
                    .collect::<Vec<_>>()
                    .join(", "),
            );
        }
        text += &format!("host: staging {}", Bytes(report.host.staging_bytes));
        if report.host.scratch_bytes > 0 {
            text += &format!(", scratch {}", Bytes(report.host.scratch_bytes));
        }
        if let Some(peak) = report.host.peak_rss_bytes {
            text += &format!(", peak resident {}", Bytes(peak));
        }
        text += "\n";
    }
    text
}

/// The list of placements, where it was asked for.
pub(crate) fn placements(report: &Report) -> String {
    let Some(placements) = &report.placements else {
        return String::new();
    };
    let mut table = Table::new(["tensor", "device", "format", "bytes"]);
    for placement in placements {
        table.row([
            placement.tensor.clone(),
            placement.device.clone().unwrap_or_else(|| "-".to_owned()),
            placement.format.clone(),
            placement.bytes.to_string(),
        ]);
    }
    format!("\n{table}")
}
