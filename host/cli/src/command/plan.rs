//! `tightfit plan`.

use crate::draw::{self, Heading, svg};
use tightfit::cancel::CancelToken;
use tightfit::checkpoint::Checkpoint;
use tightfit::device::{DeviceKind, WRITER_BUFFERS, planned_devices};
use tightfit::load::LoadError;
use tightfit::memory::{DEFAULT_STAGING, StagingRing};
use tightfit::plan::Proposed;
use tightfit::report::Report;

use crate::command::args::PlanOptions;
use crate::command::error::CommandError;
use crate::command::{diff, output, session};

/// `tightfit plan`.
pub(crate) fn run(options: &PlanOptions) -> Result<(), CommandError> {
    let staging = options.staging.unwrap_or(DEFAULT_STAGING);
    // What a load would refuse is refused here.
    StagingRing::new(staging, 1, 0).map_err(LoadError::Staging)?;
    let checkpoint = session::open_headers(&options.model, options.output.quiet)?;
    let devices = planned_devices(&options.placement.devices)?;
    let policy = &options.placement.policy;
    if let Some([a, b]) = options.diff.as_deref() {
        return diff::run(&checkpoint, &devices, [a, b], policy, &options.output);
    }
    let proposed = session::propose_with(policy, &checkpoint, &devices, &CancelToken::new())?;
    let gpus = proposed
        .plan
        .devices
        .iter()
        .filter(|plan| plan.device.kind == DeviceKind::Cuda && plan.size.reserved > 0);
    let buffers = gpus.count() * WRITER_BUFFERS;
    StagingRing::new(staging, 1, buffers).map_err(LoadError::Staging)?;
    if let Some(path) = &options.svg {
        let drawing = drawing(&checkpoint, &proposed);
        if output::write("--svg", path, &drawing, options.output.json)? {
            return Ok(());
        }
    }
    let mut report = Report::of_plan(&checkpoint, &proposed, staging);
    if options.placements {
        report = report.with_placements(&checkpoint, &proposed.plan);
    }
    let cut = proposed.plan.cut(&checkpoint).unwrap_or(None);
    if options.output.json {
        return output::print_json(&report);
    }
    if options.output.quiet {
        return Ok(());
    }
    output::print(&draw::plan(
        &report,
        cut.as_ref().unwrap_or(&checkpoint).tensors(),
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
