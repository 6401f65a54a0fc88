//! Writes checkpoints in 4 bits.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use tightfit::device::{DeviceInfo, DeviceKind};
use tightfit::plan::{PlanOptions, Proposed, propose_with};
use tightfit::save::{SaveError, SaveOptions, Saved};
use tightfit::types::{Placement, parse_bytes};

use crate::checkpoint::Checkpoint;
use crate::failure::Failure;
use crate::plan::{Plan, formats, without};
use crate::{command, policies, work};

/// What is to be saved.
#[derive(FromPyObject)]
pub(crate) enum Source<'py> {
    Plan(Bound<'py, Plan>),
    Checkpoint(Bound<'py, Checkpoint>),
}

/// Writes a checkpoint: see `tightfit.save`.
#[pyfunction]
#[pyo3(signature = (source, directory, policy, settings, formats, omit, limits, force, max_shard_size, threads, staging, strict, progress))]
#[expect(clippy::too_many_arguments, reason = "called by tightfit.save alone")]
pub(crate) fn save<'py>(
    py: Python<'py>,
    source: Source<'py>,
    directory: PathBuf,
    policy: String,
    settings: Vec<(String, String)>,
    formats: HashMap<String, String>,
    omit: Vec<String>,
    limits: Vec<(String, String)>,
    force: bool,
    max_shard_size: Option<String>,
    threads: Option<usize>,
    staging: Option<String>,
    strict: bool,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let (checkpoint, planned) = match source {
        Source::Plan(plan) => {
            let plan = plan.get();
            (
                Arc::clone(&plan.checkpoint),
                Some(Arc::clone(&plan.proposed)),
            )
        }
        Source::Checkpoint(checkpoint) => (Arc::clone(&checkpoint.get().inner), None),
    };
    let compiler = command::compiler(py)?;
    let saved: Saved = work::run(py, progress, |cancel, counter| {
        let (checkpoint, proposed) = match planned {
            Some(proposed) => (checkpoint, proposed),
            None => {
                let checkpoint = without(&checkpoint, &omit)?;
                let policy = policies::open(&policy, &limits, compiler, cancel)?;
                let options = PlanOptions::default()
                    .with_formats(self::formats(&checkpoint, &formats)?)
                    .with_cancel(cancel.clone());
                let proposed =
                    propose_with(&checkpoint, &*policy, &[anywhere()], &settings, &options)?;
                (checkpoint, Arc::new(proposed))
            }
        };
        let report = |progress| counter.set(progress);
        let mut options = SaveOptions::default()
            .with_strict(strict)
            .with_force(force)
            .with_skipped_on_request(skips(&proposed))
            .with_progress(&report)
            .with_cancel(cancel.clone());
        if let Some(size) = max_shard_size {
            options.max_shard_bytes = parse_bytes(&size).map_err(Failure::usage)?;
        }
        if let Some(threads) = threads {
            options.threads = threads;
        }
        if let Some(staging) = staging {
            options.staging_bytes = parse_bytes(&staging).map_err(Failure::usage)?;
        }
        if !proposed.plan.slices.is_empty() {
            return Err(SaveError::Slices.into());
        }
        let placements: Vec<Placement> = proposed
            .plan
            .tensors
            .iter()
            .map(|tensor| tensor.placement)
            .collect();
        let saved = tightfit::save::save(&checkpoint, &placements, &directory, &options)?;
        for file in &saved.left_out {
            tracing::warn!("{file}");
        }
        Ok(saved)
    })?;
    let result = PyDict::new(py);
    result.set_item("files", saved.shards)?;
    result.set_item("bytes", saved.bytes)?;
    result.set_item("quantized", saved.quantized)?;
    result.set_item("nonfinite_blocks", saved.nonfinite_blocks)?;
    Ok(result)
}

/// Whether modules were left out on the user's wish, of which a reader has to be told.
fn skips(proposed: &Proposed) -> bool {
    let mut settings = proposed.settings.iter();
    settings.any(|(name, value)| name == "skip" && !value.is_empty())
}

/// A device on which everything fits: for asking a policy about formats, not places.
fn anywhere() -> DeviceInfo {
    DeviceInfo {
        name: "any".to_owned(),
        kind: DeviceKind::Sim,
        capacity: 1 << 60,
        available: 1 << 60,
        granularity: 1,
    }
}
