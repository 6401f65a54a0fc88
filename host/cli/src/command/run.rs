//! `tightfit run`.

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::thread;
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
use crate::command::stderr;

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
    output: Said,
}

/// What the program has said while it ran.
#[derive(Serialize, Default)]
struct Said {
    /// The beginning of it.
    text: String,
    /// How many texts it was.
    texts: u64,
    /// From the first of them to the last.
    seconds: f64,
}

/// Bytes of what a program says that a report has.
const MOST_TEXT: usize = 1 << 20;

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
    let (to, texts) = tightfit_wasm::wit::program::output();
    let context = context.with_output(to);
    let (json, quiet) = (options.output.json, options.output.quiet);
    let start = Instant::now();
    let (outcome, said) = thread::scope(|scope| {
        let listener = scope.spawn(|| listen(texts, json, quiet));
        let outcome = program.run(context, &options.arguments);
        // The program has ended, and with it what it says.
        let said = listener.join().unwrap_or_else(|_| Ok(Said::default()));
        (outcome, said)
    });
    let (outcome, said) = (outcome?, said?);
    let seconds = start.elapsed().as_secs_f64();
    if json {
        return output::print_json(&ran(options, &devices, outcome, said, seconds));
    }
    if quiet {
        return Ok(());
    }
    output::print(&lines(&outcome.answer))?;
    if said.texts > 1 && said.seconds > 0.0 {
        let (texts, seconds) = (said.texts, said.seconds);
        // Between the first and the last there is one less.
        let pace = (texts - 1) as f64 / seconds;
        stderr::write(&format!("tightfit: {texts} texts, {pace:.1} a second\n"));
    }
    Ok(())
}

/// Shows what a program says as it comes, or keeps it for a report.
fn listen(texts: Receiver<String>, json: bool, quiet: bool) -> Result<Said, CommandError> {
    let mut said = Said::default();
    let mut first = None;
    for text in texts {
        let now = Instant::now();
        said.texts += 1;
        said.seconds = (now - *first.get_or_insert(now)).as_secs_f64();
        if json {
            let room = MOST_TEXT - said.text.len();
            said.text.push_str(&text[..text.floor_char_boundary(room)]);
        } else if !quiet {
            output::print(&text)?;
        }
    }
    Ok(said)
}

fn ran(
    options: &RunOptions,
    devices: &[Box<dyn Device>],
    outcome: Outcome,
    said: Said,
    seconds: f64,
) -> Ran {
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
        output: said,
    }
}

/// An answer's lines, none of which can do anything to a terminal.
fn lines(answer: &str) -> String {
    let lines = answer.lines().map(|line| format!("{}\n", printable(line)));
    lines.collect()
}
