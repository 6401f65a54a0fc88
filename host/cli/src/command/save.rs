//! `tightfit save`, and `tightfit load --save`.

use std::path::Path;
use std::time::Instant;

use serde::Serialize;
use tightfit::Progress;
use tightfit::cancel::CancelToken;
use tightfit::checkpoint::Checkpoint;
use tightfit::plan::Proposed;
use tightfit::save::{SaveError, SaveOptions, Saved, save};
use tightfit::text::printable;
use tightfit::types::{Bytes, Placement};

use crate::command::args::{EngineOptions, SaveCommand, WriteOptions};
use crate::command::error::CommandError;
use crate::command::{output, progress, session};

#[derive(Serialize)]
struct SaveReport {
    schema: u32,
    path: String,
    shards: usize,
    bytes: u64,
    source_bytes: u64,
    quantized: u64,
    nonfinite_blocks: u64,
    /// Files beside the weights that were not copied.
    left_out: Vec<String>,
    seconds: f64,
    peak_rss_bytes: Option<u64>,
}

/// `tightfit save`.
pub(crate) fn run(options: &SaveCommand, cancel: CancelToken) -> Result<(), CommandError> {
    let checkpoint = session::open_checkpoint(&options.model, options.output.quiet, &cancel)?;
    let proposed = session::propose_with(
        &options.policy,
        &checkpoint,
        &[session::anywhere()],
        &cancel,
    )?;
    let start = Instant::now();
    let saved = write(
        &checkpoint,
        &proposed,
        &options.directory,
        &options.engine,
        &options.write,
        options.output.quiet,
        cancel,
    )?;
    let seconds = start.elapsed().as_secs_f64();
    if options.output.json {
        return output::print_json(&SaveReport {
            schema: 1,
            path: options.directory.display().to_string(),
            shards: saved.shards,
            bytes: saved.bytes,
            source_bytes: checkpoint.source_bytes(),
            quantized: saved.quantized,
            nonfinite_blocks: saved.nonfinite_blocks,
            left_out: saved.left_out.into_iter().map(|left| left.file).collect(),
            seconds,
            peak_rss_bytes: tightfit::memory::peak_rss_bytes(),
        });
    }
    if options.output.quiet {
        return Ok(());
    }
    output::print(&format!(
        "{}: {} in {} file{}, from {} ({:.1} s); {} weights in 4 bits\n",
        printable(&options.directory.display().to_string()),
        Bytes(saved.bytes),
        saved.shards,
        if saved.shards == 1 { "" } else { "s" },
        Bytes(checkpoint.source_bytes()),
        seconds,
        saved.quantized,
    ))
}

/// Writes what was proposed, with a progress bar.
pub(crate) fn write(
    checkpoint: &Checkpoint,
    proposed: &Proposed,
    directory: &Path,
    engine: &EngineOptions,
    write: &WriteOptions,
    quiet: bool,
    cancel: CancelToken,
) -> Result<Saved, CommandError> {
    let bar = progress::bytes("saving", quiet);
    let defaults = SaveOptions::default();
    let skip = proposed.settings.iter().find(|(name, _)| name == "skip");
    let report = |progress: Progress| progress::show(&bar, progress);
    let max_shard_bytes = write.max_shard_size.unwrap_or(defaults.max_shard_bytes);
    let options = SaveOptions::default()
        .with_threads(engine.threads.map_or(defaults.threads, usize::from))
        .with_staging_bytes(engine.staging.unwrap_or(defaults.staging_bytes))
        .with_strict(engine.strict)
        .with_kernels(engine.kernels()?)
        .with_max_shard_bytes(max_shard_bytes)
        .with_force(write.force)
        .with_skipped_on_request(skip.is_some_and(|(_, value)| !value.is_empty()))
        .with_progress(&report)
        .with_cancel(cancel);
    check_plan(proposed)?;
    let placements: Vec<Placement> = proposed
        .plan
        .tensors
        .iter()
        .map(|tensor| tensor.placement)
        .collect();
    let saved = save(checkpoint, &placements, directory, &options);
    bar.finish_and_clear();
    let saved = saved?;
    for file in &saved.left_out {
        tracing::warn!("{file}");
    }
    match checkpoint.quantization() {
        _ if saved.quantized > 0 => {}
        Some(method) if checkpoint.encoded().decoded > 0 => tracing::warn!(
            "no weight is in 4 bits: what {} had quantized was written decoded",
            printable(&method.to_string())
        ),
        Some(method) => tracing::warn!(
            "no weight is in 4 bits: the checkpoint is quantized by {} already, and was copied as it is",
            printable(&method.to_string())
        ),
        None => tracing::warn!(
            "no weight is in 4 bits: of its {} tensors the policy chose none to be quantized",
            checkpoint.tensors().len()
        ),
    }
    Ok(saved)
}

/// Refuses a plan that no checkpoint can be written for.
pub(crate) fn check_plan(proposed: &Proposed) -> Result<(), CommandError> {
    match proposed.plan.slices.is_empty() {
        true => Ok(()),
        false => Err(SaveError::Slices.into()),
    }
}
