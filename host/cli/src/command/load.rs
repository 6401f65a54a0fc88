//! `tightfit load`.

use crate::draw;
use tightfit::Progress;
use tightfit::cancel::CancelToken;
use tightfit::checkpoint::Checkpoint;
use tightfit::device::Device;
use tightfit::load::{self, QuantizeOn, ReservedPlan};
use tightfit::model::Model;
use tightfit::report::Report;
use tightfit::save::check_target;

use crate::command::args::{EngineOptions, LoadOptions};
use crate::command::error::CommandError;
use crate::command::{output, progress, save, session};

/// `tightfit load`.
pub(crate) fn load(options: &LoadOptions, cancel: CancelToken) -> Result<(), CommandError> {
    if let Some(directory) = &options.save {
        // Before a load that would have been for nothing.
        check_target(directory, options.write.force)?;
    }
    let quiet = options.output.quiet;
    let specs = &options.placement.devices;
    let (checkpoint, devices) = session::open_both(&options.model, specs, quiet, &cancel)?;
    let placed = session::reserve_with(&options.placement.policy, &checkpoint, &devices, &cancel)?;
    let proposed = placed.proposed.clone();
    if options.save.is_some() {
        save::check_plan(&proposed)?;
    }
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
        output::print(&(draw::report(&report, output::columns()) + &draw::placements(&report)))
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
        .with_load(&model, &usage);
    Ok((model, report))
}
