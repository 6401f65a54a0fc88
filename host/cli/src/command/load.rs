//! `tightfit load`.

use crate::draw;
use tightfit::Progress;
use tightfit::cancel::CancelToken;
use tightfit::checkpoint::Checkpoint;
use tightfit::device::{Device, WorldDevices, open_devices};
use tightfit::load::{self, QuantizeOn, ReservedPlan};
use tightfit::model::Model;
use tightfit::ranks::{PlanDigest, World};
use tightfit::report::Report;
use tightfit::save::check_target;

use crate::command::args::{EngineOptions, LoadOptions};
use crate::command::error::CommandError;
use crate::command::ranks::{self, Agreed, Place};
use crate::command::{output, progress, save, session};

/// `tightfit load`.
pub(crate) fn load(options: &LoadOptions, cancel: CancelToken) -> Result<(), CommandError> {
    if let Some(directory) = &options.save {
        // Before a load that would have been for nothing.
        check_target(directory, options.write.force)?;
    }
    let quiet = options.output.quiet;
    if let Place::Rank(world) = Place::of(&options.placement.ranks, false)? {
        return load_share(options, world, &cancel);
    }
    let specs = ranks::of_one_process(&options.placement)?;
    let open = || open_devices(&specs);
    let (checkpoint, devices) = session::open_both(&options.model, open, quiet, &cancel)?;
    let placed = session::reserve_with(&options.placement.policy, &checkpoint, &devices, &cancel)?;
    let proposed = placed.proposed.clone();
    if options.placement.ranks.digest.is_some() {
        let digest = PlanDigest::of(&checkpoint, &proposed.plan);
        ranks::check_digest(&options.placement.ranks, &digest)?;
    }
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
    print(&report, options)
}

/// Loads this rank's share.
fn load_share(
    options: &LoadOptions,
    world: World,
    cancel: &CancelToken,
) -> Result<(), CommandError> {
    if options.save.is_some() {
        return Err(CommandError::SaveOfShare);
    }
    let quiet = options.output.quiet;
    let open = |world: &World, devices: &WorldDevices| {
        let open = || devices.open(world.rank, world.local_rank, world.local_size);
        session::open_both(&options.model, open, quiet, cancel)
    };
    let agreed = Agreed::upon(world, true, &options.placement, open, cancel)?;
    let checkpoint = &agreed.checkpoint;
    let (model, mut report) = agreed.load(cancel, |placed, devices| {
        carry_out(
            checkpoint,
            placed,
            devices,
            &options.engine,
            options.quantize_on,
            quiet,
            cancel.clone(),
        )
    })?;
    if options.placements {
        report = report.with_placements(checkpoint, model.plan());
    }
    print(&report, options)
}

fn print(report: &Report, options: &LoadOptions) -> Result<(), CommandError> {
    if options.output.json {
        output::print_json(report)
    } else if options.output.quiet {
        Ok(())
    } else {
        output::print(&(draw::report(report, output::columns()) + &draw::placements(report)))
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
