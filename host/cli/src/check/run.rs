//! Running cases: opening models, compiling policies, asking.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::error::{CheckError, RunError};
use super::judge::judge;
use super::model::{ModelSource, OpenModel};
use super::outcome::{CaseReport, CaseStatus, FileReport, Finding};
use super::parse::{Case, PolicySource, ScenarioFile};
use tightfit::cancel::CancelToken;
use tightfit::device::planned_devices;
use tightfit::plan::{PlanOptions, ProposeError, propose_with};
use tightfit::policy::PolicyError;
use tightfit::synth::SynthError;
use tightfit_wasm::policy::{BUILTIN_POLICIES, WasmPolicy};
use tightfit_wasm::sandbox::SandboxOptions;

/// Models that stay open: scenarios in a row mostly share one, and open files are few.
const OPEN_MODELS: usize = 4;

/// Runs cases, and keeps what many of them need.
#[derive(Debug, Default)]
pub struct Runner {
    options: SandboxOptions,
    policies: HashMap<PolicySource, Arc<WasmPolicy>>,
    /// The one used last is the last.
    models: Vec<(ModelSource, Arc<OpenModel>)>,
}

impl Runner {
    /// With these limits, or other options, for policies.
    pub fn new(options: impl Into<SandboxOptions>) -> Runner {
        Runner {
            options: options.into(),
            ..Runner::default()
        }
    }

    /// Runs every case of a file. One that cannot be run does not stop the others.
    ///
    /// # Errors
    /// [`CheckError::Cancelled`] when `cancel` was used.
    pub fn run_file(
        &mut self,
        file: &ScenarioFile,
        cancel: &CancelToken,
    ) -> Result<FileReport, CheckError> {
        let cases = file.cases.iter().map(|case| self.run(case, cancel));
        Ok(FileReport {
            cases: cases.collect::<Result<_, _>>()?,
            file: file.path.clone(),
        })
    }

    /// Runs one case.
    ///
    /// # Errors
    /// [`CheckError::Cancelled`] when `cancel` was used.
    pub fn run(&mut self, case: &Case, cancel: &CancelToken) -> Result<CaseReport, CheckError> {
        let start = Instant::now();
        let result = self.findings(case, cancel);
        if cancel.is_cancelled() || matches!(result, Err(RunError::Synth(SynthError::Cancelled))) {
            return Err(CheckError::Cancelled);
        }
        let (status, error, expectations) = match result {
            Err(error) => (CaseStatus::Error, Some(error.to_string()), Vec::new()),
            Ok(findings) if findings.iter().all(|finding| finding.holds) => {
                (CaseStatus::Ok, None, findings)
            }
            Ok(findings) => (CaseStatus::Failed, None, findings),
        };
        Ok(CaseReport {
            name: case.name.clone(),
            policy: case.policy.to_string(),
            settings: case.settings.iter().cloned().collect(),
            status,
            error,
            expectations,
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    fn findings(&mut self, case: &Case, cancel: &CancelToken) -> Result<Vec<Finding>, RunError> {
        // Nothing is reserved on them.
        let devices = planned_devices(&case.devices)?;
        let model = self.model(&case.model, cancel)?;
        let checkpoint = &model.checkpoint;
        let result = match self.policy(&case.policy) {
            Ok(policy) => propose_with(
                checkpoint,
                policy.as_ref(),
                &devices,
                &case.settings,
                &PlanOptions::default().with_cancel(cancel.clone()),
            ),
            Err(error) => Err(ProposeError::Policy(error)),
        };
        match result {
            // What the scenario asks for is not there: nobody can have expected that.
            Err(ProposeError::Policy(
                error @ (PolicyError::Unknown { .. }
                | PolicyError::Unreadable { .. }
                | PolicyError::UnknownSetting { .. }
                | PolicyError::RepeatedSetting { .. }),
            )) => Err(RunError::Policy(error)),
            Err(ProposeError::FormatRule(error)) => Err(RunError::FormatRule(error)),
            result => {
                let outcome = result.as_ref().map(|proposed| &proposed.plan);
                Ok(judge(&case.expect, checkpoint, outcome))
            }
        }
    }

    fn model(
        &mut self,
        source: &ModelSource,
        cancel: &CancelToken,
    ) -> Result<Arc<OpenModel>, RunError> {
        let found = self.models.iter().position(|(known, _)| known == source);
        let entry = match found {
            Some(index) => self.models.remove(index),
            None => {
                if self.models.len() == OPEN_MODELS {
                    self.models.remove(0);
                }
                (source.clone(), Arc::new(source.open(cancel)?))
            }
        };
        let model = Arc::clone(&entry.1);
        self.models.push(entry);
        Ok(model)
    }

    fn policy(&mut self, source: &PolicySource) -> Result<Arc<WasmPolicy>, PolicyError> {
        if let Some(policy) = self.policies.get(source) {
            return Ok(Arc::clone(policy));
        }
        let policy = match source {
            PolicySource::Builtin(name) => WasmPolicy::open(name, self.options.clone())?,
            PolicySource::File(path) => open_file(path, self.options.clone())?,
        };
        let policy = Arc::new(policy);
        self.policies.insert(source.clone(), Arc::clone(&policy));
        Ok(policy)
    }
}

/// A policy in a file. What has neither a file nor a file's ending was meant as a name.
fn open_file(path: &Path, options: SandboxOptions) -> Result<WasmPolicy, PolicyError> {
    if path.extension().is_none() && !path.exists() {
        let name = path.file_name().unwrap_or(path.as_os_str());
        return Err(PolicyError::Unknown {
            name: name.to_string_lossy().into_owned(),
            builtin: BUILTIN_POLICIES.to_vec(),
        });
    }
    let Some(text) = path.to_str() else {
        return Err(PolicyError::Unreadable {
            path: path.into(),
            source: std::io::Error::other("its path is not UTF-8"),
        });
    };
    WasmPolicy::open(text, options)
}

impl std::fmt::Display for PolicySource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            PolicySource::Builtin(name) => f.write_str(name),
            PolicySource::File(path) => write!(f, "{}", path.display()),
        }
    }
}
