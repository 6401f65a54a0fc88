//! `tightfit run`.

use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use tightfit::cancel::CancelToken;
use tightfit::checkpoint::{Checkpoint, OpenOptions};
use tightfit::device::{Device, open_devices};
use tightfit::text::printable;
use tightfit_wasm::program::{Outcome, WasmProgram, default_limits};
use tightfit_wasm::wit::program::ProgramCtx;

use crate::command::args::RunOptions;
use crate::command::error::CommandError;
use crate::command::output;

#[derive(Serialize)]
struct Ran {
    schema: u32,
    program: String,
    answer: String,
    fuel: u64,
    seconds: f64,
    /// The most that was reserved on all devices together.
    peak_reserved: u64,
    devices: Vec<RanDevice>,
}

#[derive(Serialize)]
struct RanDevice {
    name: String,
    peak_reserved: u64,
}

/// `tightfit run`.
pub(crate) fn run(options: &RunOptions, cancel: CancelToken) -> Result<(), CommandError> {
    let devices: Arc<[Box<dyn Device>]> = open_devices(&options.devices)?.into();
    let quota = options.quota.unwrap_or(u64::MAX);
    let mut context = ProgramCtx::new(Arc::clone(&devices), quota)
        .cancelled_by(cancel.clone())
        .load_with(options.threads.map(usize::from), options.staging);
    for (name, path) in &options.grants {
        // The program is only told that something is wrong with it; the user is told what.
        Checkpoint::open_with(path, &OpenOptions::default().with_cancel(cancel.clone()))?;
        context = context.grant(name, path);
    }
    let program = WasmProgram::open(
        &options.program,
        options.sandbox.options_from(default_limits())?,
    )?;
    let start = Instant::now();
    let outcome = program.run(context, &options.arguments)?;
    let seconds = start.elapsed().as_secs_f64();
    if options.output.json {
        return output::print_json(&ran(options, &devices, outcome, seconds));
    }
    match options.output.quiet {
        true => Ok(()),
        false => output::print(&lines(&outcome.answer)),
    }
}

fn ran(options: &RunOptions, devices: &[Box<dyn Device>], outcome: Outcome, seconds: f64) -> Ran {
    let devices = devices.iter().map(|device| RanDevice {
        name: device.info().name,
        peak_reserved: device.usage().reserved.peak,
    });
    Ran {
        schema: 1,
        program: options.program.display().to_string(),
        answer: outcome.answer,
        fuel: outcome.fuel,
        seconds,
        peak_reserved: outcome.peak_reserved,
        devices: devices.collect(),
    }
}

/// An answer's lines, none of which can do anything to a terminal.
fn lines(answer: &str) -> String {
    let lines = answer.lines().map(|line| format!("{}\n", printable(line)));
    lines.collect()
}
