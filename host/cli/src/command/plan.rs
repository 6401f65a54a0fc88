//! `tightfit plan`.

use crate::draw::{self, Heading, svg};
use tightfit::cancel::CancelToken;
use tightfit::checkpoint::Checkpoint;
use tightfit::device::{DeviceInfo, DeviceKind, WRITER_BUFFERS, WorldDevices, planned_devices};
use tightfit::load::LoadError;
use tightfit::memory::{DEFAULT_STAGING, StagingRing};
use tightfit::plan::Proposed;
use tightfit::ranks::{PlanDigest, World};
use tightfit::report::{RanksReport, Report};

use crate::command::args::PlanOptions;
use crate::command::error::CommandError;
use crate::command::ranks::{self, Agreed, Place};
use crate::command::{diff, output, session};

/// `tightfit plan`.
pub(crate) fn run(options: &PlanOptions) -> Result<(), CommandError> {
    let staging = options.staging.unwrap_or(DEFAULT_STAGING);
    // What a load would refuse is refused here.
    StagingRing::new(staging, 1, 0).map_err(LoadError::Staging)?;
    let (policy, asked) = (&options.placement.policy, &options.placement.ranks);
    let (world, rank) = match Place::of(asked, true)? {
        Place::Alone => (None, None),
        Place::Outside(size) => (Some(size), None),
        Place::Rank(world) => (Some(world.size), Some(world)),
    };
    // Plans of two policies are compared as wholes.
    if let Some(rank) = rank.filter(|_| options.diff.is_none()) {
        return of_share(options, rank, staging);
    }
    let checkpoint = session::open_headers(&options.model, options.output.quiet)?;
    let specs = &options.placement;
    let devices: Vec<DeviceInfo> = match world {
        None => planned_devices(&ranks::of_one_process(specs)?)?,
        Some(size) => {
            let devices = WorldDevices::new(&specs.devices, size)?.planned()?;
            devices.into_iter().map(|device| device.info).collect()
        }
    };
    if let Some([a, b]) = options.diff.as_deref() {
        return diff::run(&checkpoint, &devices, [a, b], policy, &options.output);
    }
    let proposed = session::propose_with(policy, &checkpoint, &devices, &CancelToken::new())?;
    ranks::check_plan(asked, &checkpoint, &proposed.plan)?;
    let outside = |report: Report| match world {
        None => report,
        Some(world) => {
            let ranks = RanksReport {
                rank: None,
                world,
                agreed: false,
                turned_away: 0,
            };
            report.with_ranks(ranks, &PlanDigest::of(&checkpoint, &proposed.plan))
        }
    };
    show(options, &checkpoint, &proposed, staging, outside)
}

/// Plans as one of several ranks, and shows what is its own. The others are asked where that is wished, or
/// where only they know what they have.
fn of_share(options: &PlanOptions, world: World, staging: u64) -> Result<(), CommandError> {
    let placement = &options.placement;
    let devices = WorldDevices::new(&placement.devices, world.size)?;
    let meet = placement.ranks.rendezvous.is_some() || !devices.are_sized();
    let asked = meet && world.rendezvous.is_some();
    let open = |world: &World, devices: &WorldDevices| {
        let checkpoint = session::open_headers(&options.model, options.output.quiet)?;
        let devices = match asked {
            true => devices.open(world.rank, world.local_rank, world.local_size)?,
            // They need not be there.
            false => Vec::new(),
        };
        Ok((checkpoint, devices))
    };
    let agreed = Agreed::upon(world, meet, placement, open, &CancelToken::new())?;
    let (checkpoint, proposed) = (&agreed.checkpoint, agreed.proposed());
    show(options, checkpoint, &proposed, staging, |report| {
        agreed.report(report)
    })
}

/// Shows a plan, or a rank's part of one.
fn show(
    options: &PlanOptions,
    checkpoint: &Checkpoint,
    proposed: &Proposed,
    staging: u64,
    of_ranks: impl FnOnce(Report) -> Report,
) -> Result<(), CommandError> {
    let gpus = proposed
        .plan
        .devices
        .iter()
        .filter(|plan| plan.device.kind == DeviceKind::Cuda && plan.size.reserved > 0);
    // Of whichever GPU a worker writes to.
    let buffers = gpus.count().min(1) * WRITER_BUFFERS;
    StagingRing::new(staging, 1, buffers).map_err(LoadError::Staging)?;
    if let Some(path) = &options.svg {
        let drawing = drawing(checkpoint, proposed);
        if output::write("--svg", path, &drawing, options.output.json)? {
            return Ok(());
        }
    }
    let mut report = of_ranks(Report::of_plan(checkpoint, proposed, staging));
    if options.placements {
        report = report.with_placements(checkpoint, &proposed.plan);
    }
    if options.output.json {
        return output::print_json(&report);
    }
    if options.output.quiet {
        return Ok(());
    }
    let cut = proposed.plan.cut(checkpoint).unwrap_or(None);
    output::print_text(&draw::plan(
        &report,
        cut.as_ref().unwrap_or(checkpoint).tensors(),
        &proposed.plan,
        output::bar_style(),
        output::columns(),
    ))
}

/// The plan as SVG.
fn drawing(checkpoint: &Checkpoint, proposed: &Proposed) -> String {
    let heading = Heading {
        model: &checkpoint.path().display().to_string(),
        policy: &format!("{} {}", proposed.policy, proposed.version),
    };
    // A plan that is not for it has been refused before.
    let cut = proposed.plan.cut(checkpoint).unwrap_or(None);
    let tensors = cut.as_ref().unwrap_or(checkpoint).tensors();
    svg(heading, tensors, &proposed.plan)
}
