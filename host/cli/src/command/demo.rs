//! `tightfit demo`: a whole run on a model that it makes itself.

use tightfit::cancel::CancelToken;
use tightfit::checkpoint::{Checkpoint, OpenOptions};
use tightfit::device::{DeviceSpec, open_devices};
use tightfit::synth::{Preset, SynthOptions};
use tightfit::text::printable;
use tightfit::types::Bytes;

use crate::command::args::DemoOptions;
use crate::command::error::CommandError;
use crate::command::{load, output, session, synth};
use crate::draw;

/// An accelerator on which the model fits in 4 bits and not in 16.
const DEVICE: DeviceSpec = DeviceSpec::Sim {
    capacity: 128 << 20,
};

pub(crate) fn run(options: &DemoOptions, cancel: CancelToken) -> Result<(), CommandError> {
    let quiet = options.output.quiet;
    let say = |text: String| match quiet || options.output.json {
        true => Ok(()),
        false => output::print(&text),
    };
    // Removed when dropped, on every way out of this function.
    let directory = tempfile::Builder::new()
        .prefix("tightfit-demo-")
        .tempdir()
        .map_err(CommandError::TemporaryDirectory)?;
    let model = directory.path().join("model");

    say("1. A model with random weights, as a bf16 checkpoint\n".to_owned())?;
    let how = SynthOptions::default();
    let written = synth::write(Preset::Demo, &model, how, quiet, &cancel)?;
    say(format!(
        "   {} tensors, {}\n\n",
        written.tensors,
        Bytes(written.bytes)
    ))?;

    let checkpoint =
        Checkpoint::open_with(&model, &OpenOptions::default().with_cancel(cancel.clone()))?;
    let specs = match options.placement.devices.as_slice() {
        [] => &[DEVICE],
        given => given,
    };
    let devices = open_devices(specs)?;
    let placed = session::reserve_with(&options.placement.policy, &checkpoint, &devices, &cancel)?;
    let planned: u64 = placed
        .proposed
        .plan
        .devices
        .iter()
        .map(|device| device.size.reserved)
        .sum();
    say(format!(
        "2. A plan, made by the policy '{}' in its sandbox before any weight is read\n   {} bytes ({}) are reserved\n\n",
        printable(&placed.proposed.policy),
        planned,
        Bytes(planned),
    ))?;

    let way = load::Way {
        engine: &options.engine,
        quantize_on: options.quantize_on,
        quiet,
        recorder: None,
        cancel,
    };
    let (loaded, report) = load::carry_out(&checkpoint, placed, &devices, way)?;
    let peak: u64 = report
        .devices
        .iter()
        .map(|device| device.peak_reserved)
        .sum();
    say(format!(
        "3. The load, quantized to NF4 on the way\n   {peak} bytes were reserved at the peak: {}\n\n",
        match peak.cmp(&planned) {
            std::cmp::Ordering::Equal => "exactly the plan".to_owned(),
            std::cmp::Ordering::Less => format!("{} less than planned", Bytes(planned - peak)),
            std::cmp::Ordering::Greater => format!("{} MORE than planned", Bytes(peak - planned)),
        }
    ))?;
    if options.output.json {
        output::print_json(&report)?;
    } else if !quiet {
        output::print_text(&draw::report(&report, output::columns()))?;
    }
    drop(loaded);
    let left: u64 = devices
        .iter()
        .map(|device| device.usage().reserved.now)
        .sum();
    say(format!("\n4. Unloaded: {} still reserved\n", Bytes(left)))
}
