//! `tightfit synth`.

use std::path::Path;
use std::time::Instant;

use serde::Serialize;
use tightfit::Progress;
use tightfit::cancel::CancelToken;
use tightfit::synth::{self, Model, Written};
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

/// Writes a checkpoint with a progress bar.
pub(crate) fn write(
    model: impl Into<Model>,
    directory: &Path,
    options: synth::SynthOptions<'_>,
    quiet: bool,
    cancel: &CancelToken,
) -> Result<Written, CommandError> {
    let bar = progress::bytes("writing", quiet);
    let report = |progress: Progress| progress::show(&bar, progress);
    let options = options.with_progress(&report).with_cancel(cancel.clone());
    let written = synth::write_model(&model.into(), directory, &options);
    bar.finish_and_clear();
    Ok(written?)
}

pub(crate) fn run(options: &SynthOptions, cancel: &CancelToken) -> Result<(), CommandError> {
    let preset = options.preset;
    let model = match options.layers {
        Some(layers) => preset.first_layers(layers)?,
        None => preset.into(),
    };
    let given = synth::SynthOptions::default()
        .with_headers_only(options.headers_only)
        .with_seed(options.seed);
    let start = Instant::now();
    let quiet = options.output.quiet;
    let written = write(model, &options.directory, given, quiet, cancel)?;
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
