//! `tightfit synth`.

use std::time::Instant;

use serde::Serialize;
use tightfit::Progress;
use tightfit::cancel::CancelToken;
use tightfit::synth;
use tightfit::text::printable;
use tightfit::types::Bytes;

use crate::command::args::SynthOptions;
use crate::command::error::CommandError;
use crate::command::output::Envelope;
use crate::command::{output, progress};

/// What was written.
#[derive(Serialize)]
struct Synthesized {
    path: String,
    preset: &'static str,
    seed: u64,
    headers_only: bool,
    shards: usize,
    tensors: usize,
    bytes: u64,
    seconds: f64,
}

pub(crate) fn run(options: &SynthOptions, cancel: &CancelToken) -> Result<(), CommandError> {
    let preset = options.preset;
    let bar = progress::bytes("writing", options.output.quiet);
    let start = Instant::now();
    let report = |progress: Progress| progress::show(&bar, progress);
    let how = synth::SynthOptions::default()
        .with_headers_only(options.headers_only)
        .with_seed(options.seed)
        .with_progress(&report)
        .with_cancel(cancel.clone());
    let written = synth::write(preset, &options.directory, &how);
    bar.finish_and_clear();
    let written = written?;
    let seconds = start.elapsed().as_secs_f64();
    if options.output.json {
        return output::print_json(&Envelope::new(Synthesized {
            path: options.directory.display().to_string(),
            preset: preset.name(),
            seed: options.seed,
            headers_only: options.headers_only,
            shards: written.shards,
            tensors: written.tensors,
            bytes: written.bytes,
            seconds,
        }));
    }
    if options.output.quiet {
        return Ok(());
    }
    output::print(&format!(
        "{}: {} tensors, {} in {} file{} ({:.1} s)\n",
        printable(&options.directory.display().to_string()),
        written.tensors,
        Bytes(written.bytes),
        written.shards,
        if written.shards == 1 { "" } else { "s" },
        seconds,
    ))
}
