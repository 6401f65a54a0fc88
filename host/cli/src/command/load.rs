//! `tightfit load`.

use crate::draw;
use tightfit::Progress;
use tightfit::cancel::CancelToken;
use tightfit::checkpoint::Checkpoint;
use tightfit::device::{Device, WorldDevices, open_devices};
use tightfit::load::{self, QuantizeOn, ReservedPlan};
use tightfit::memory::DEFAULT_STAGING;
use tightfit::model::Model;
use tightfit::ranks::World;
use tightfit::report::Report;
use tightfit::save::check_target;

use crate::command::args::{EngineOptions, LoadOptions};
use crate::command::error::CommandError;
use crate::command::ranks::{self, Agreed, Place};
use crate::command::timeline::Recorder;
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
    let recorder = options.timeline.as_ref().map(|_| Recorder::new());
    let placed = session::reserve_with(&options.placement.policy, &checkpoint, &devices, &cancel)?;
    let proposed = placed.proposed.clone();
    ranks::check_plan(&options.placement.ranks, &checkpoint, &proposed.plan)?;
    if options.save.is_some() {
        save::check_plan(&proposed)?;
    }
    let way = Way {
        recorder: recorder.as_ref(),
        ..Way::of(options, &cancel)
    };
    let (model, mut report) = carry_out(&checkpoint, placed, &devices, way)?;
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
    if draw_timeline(options, recorder.as_ref(), &model)? {
        return Ok(());
    }
    print(&report, options)
}

/// Draws what was recorded. Gives whether that went to standard output.
fn draw_timeline(
    options: &LoadOptions,
    recorder: Option<&Recorder>,
    model: &Model,
) -> Result<bool, CommandError> {
    let Some((path, recorder)) = options.timeline.as_ref().zip(recorder) else {
        return Ok(false);
    };
    let limit = options.engine.staging.unwrap_or(DEFAULT_STAGING);
    let title = options.model.model.clone();
    let drawing = recorder.finish(title, model.stats().staging_bytes, limit);
    let drawing = draw::timeline(&drawing);
    output::write("--timeline", path, &drawing, options.output.json)
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
    let recorder = options.timeline.as_ref().map(|_| Recorder::new());
    let (model, mut report) = agreed.load(|placed, devices| {
        let way = Way {
            recorder: recorder.as_ref(),
            ..Way::of(options, cancel)
        };
        carry_out(checkpoint, placed, devices, way)
    })?;
    if options.placements {
        report = report.with_placements(checkpoint, model.plan());
    }
    if draw_timeline(options, recorder.as_ref(), &model)? {
        return Ok(());
    }
    print(&report, options)
}

fn print(report: &Report, options: &LoadOptions) -> Result<(), CommandError> {
    if options.output.json {
        output::print_json(report)
    } else if options.output.quiet {
        Ok(())
    } else {
        output::print_text(&draw::report(report, output::columns()))?;
        output::print(&draw::placements(report))
    }
}

/// How to load.
pub(crate) struct Way<'a> {
    pub(crate) engine: &'a EngineOptions,
    pub(crate) quantize_on: QuantizeOn,
    pub(crate) quiet: bool,
    /// What watches it.
    pub(crate) recorder: Option<&'a Recorder>,
    pub(crate) cancel: CancelToken,
}

impl<'a> Way<'a> {
    fn of(options: &'a LoadOptions, cancel: &CancelToken) -> Way<'a> {
        Way {
            engine: &options.engine,
            quantize_on: options.quantize_on,
            quiet: options.output.quiet,
            recorder: None,
            cancel: cancel.clone(),
        }
    }
}

/// Loads with a progress bar. Gives the model and the report made while it is loaded.
pub(crate) fn carry_out(
    checkpoint: &Checkpoint,
    placed: ReservedPlan,
    devices: &[Box<dyn Device>],
    way: Way<'_>,
) -> Result<(Model, Report), CommandError> {
    let Way {
        engine, recorder, ..
    } = way;
    let bar = progress::bytes("loading", way.quiet);
    let defaults = load::LoadOptions::default();
    if let Some(recorder) = recorder {
        recorder.reserved(placed.reserved.plan(), devices);
    }
    let report = |progress: Progress| {
        progress::show(&bar, progress);
        if let Some(recorder) = recorder {
            recorder.step(progress, devices);
        }
    };
    let options = load::LoadOptions::default()
        .with_threads(engine.threads.map_or(defaults.threads, usize::from))
        .with_staging_bytes(engine.staging.unwrap_or(defaults.staging_bytes))
        .with_strict(engine.strict)
        .with_quantize_on(way.quantize_on)
        .with_kernels(engine.kernels()?)
        .with_progress(&report)
        .with_cancel(way.cancel);
    let result = load::load_reserved(checkpoint, placed.reserved, &options);
    bar.finish_and_clear();
    let model = result?;
    let usage: Vec<_> = devices.iter().map(|device| device.usage()).collect();
    let report = Report::of_plan(checkpoint, &placed.proposed, options.staging_bytes)
        .with_revisions(&placed.revisions)
        .with_load(&model, &usage);
    Ok((model, report))
}
