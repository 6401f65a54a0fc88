//! From the text of a scenario file to cases that can be run.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::error::CheckError;
use super::expect::Expect;
use super::model::{ModelKeys, ModelSource};
use super::values::{OneOrMany, Parsed, Settings, TextOr};
use tightfit::device::DeviceSpec;
use tightfit_wasm::policy::BUILTIN_POLICIES;

/// Largest scenario file that is read, in bytes.
pub const MAX_FILE_BYTES: u64 = 4 << 20;
/// Most cases of a file, once scenarios are repeated for policies and settings.
pub const MAX_CASES: usize = 10_000;
/// Most devices of a scenario.
const MAX_DEVICES: usize = 1024;

/// A scenario file that makes sense.
#[derive(Debug, Clone, PartialEq)]
pub struct ScenarioFile {
    /// The file.
    pub path: PathBuf,
    /// What is to be run, in the order of the file.
    pub cases: Vec<Case>,
}

/// One question to one policy, and what shall come of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    /// The scenario's name, and what sets this case apart where it has several.
    pub name: String,
    /// The model to be placed.
    pub model: ModelSource,
    /// The devices to place it on.
    pub devices: Vec<DeviceSpec>,
    /// Who is asked.
    pub policy: PolicySource,
    /// The policy's settings.
    pub settings: Vec<(String, String)>,
    /// What shall come of it.
    pub expect: Expect,
}

/// A policy as a scenario names it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(untagged)]
pub enum PolicySource {
    /// A built-in one.
    Builtin(String),
    /// A file.
    File(PathBuf),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct FileKeys {
    #[serde(default)]
    defaults: Defaults,
    #[serde(default)]
    scenario: Vec<Spanned<ScenarioKeys>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Defaults {
    model: Option<Spanned<ModelKeys>>,
    devices: Option<Vec<TextOr<DeviceKeys>>>,
    policy: Option<OneOrMany<String>>,
    #[serde(default)]
    settings: Settings,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct ScenarioKeys {
    name: String,
    model: Option<Spanned<ModelKeys>>,
    devices: Option<Vec<TextOr<DeviceKeys>>>,
    policy: Option<OneOrMany<String>>,
    settings: Option<OneOrMany<Settings>>,
    expect: Option<Expect>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct DeviceKeys {
    spec: Parsed<DeviceSpec>,
    #[serde(default = "one")]
    count: usize,
}

fn one() -> usize {
    1
}

impl FromStr for DeviceKeys {
    type Err = <DeviceSpec as FromStr>::Err;

    fn from_str(text: &str) -> Result<DeviceKeys, Self::Err> {
        Ok(DeviceKeys {
            spec: Parsed(text.parse()?),
            count: 1,
        })
    }
}

impl ScenarioFile {
    /// Reads a file and checks all that can be checked without asking a policy.
    ///
    /// # Errors
    /// [`CheckError`], with the line where there is one.
    pub fn read(path: &Path) -> Result<ScenarioFile, CheckError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => CheckError::Missing { path: path.into() },
            _ => CheckError::Unreadable {
                path: path.into(),
                source,
            },
        };
        // Opening a pipe would wait for whoever writes to it.
        if !fs::metadata(path).map_err(failed)?.is_file() {
            return Err(CheckError::NotAFile { path: path.into() });
        }
        let mut text = String::new();
        // One byte more than is legal, so that a longer file is seen whatever its size said.
        File::open(path)
            .and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text))
            .map_err(failed)?;
        if text.len() as u64 > MAX_FILE_BYTES {
            return Err(CheckError::TooLarge {
                path: path.into(),
                limit: MAX_FILE_BYTES,
            });
        }
        ScenarioFile::parse(path, &text)
    }

    /// Returns the same from its text. Paths in it are relative to the directory of `path`.
    ///
    /// # Errors
    /// [`CheckError::Invalid`].
    pub fn parse(path: &Path, text: &str) -> Result<ScenarioFile, CheckError> {
        let invalid = |at: usize, problem: String| {
            let (line, column) = position(text, at);
            CheckError::Invalid {
                path: path.into(),
                line,
                column,
                problem,
            }
        };
        let keys: FileKeys = toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            // What toml found is several lines where it lists alternatives.
            invalid(at, error.message().replace('\n', ", "))
        })?;
        if keys.scenario.is_empty() {
            return Err(invalid(0, "it has no [[scenario]]".to_owned()));
        }
        let base = path.parent().unwrap_or(Path::new(""));
        let mut names = HashSet::new();
        let mut cases = Vec::new();
        for scenario in &keys.scenario {
            let at = scenario.span().start;
            let scenario = scenario.get_ref();
            if !names.insert(scenario.name.as_str()) {
                let problem = format!("there are two scenarios named '{}'", scenario.name);
                return Err(invalid(at, problem));
            }
            let named = |problem: &str| format!("scenario '{}': {problem}", scenario.name);
            let model = scenario.model.as_ref().or(keys.defaults.model.as_ref());
            let Some(model) = model else {
                return Err(invalid(at, named("it has no model")));
            };
            let model = ModelSource::try_from(model.get_ref().clone())
                .map_err(|problem| invalid(model.span().start, problem))?;
            let more = scenario
                .cases(&keys.defaults, model, base)
                .map_err(|problem| invalid(at, named(&problem)))?;
            if cases.len() + more.len() > MAX_CASES {
                return Err(invalid(
                    at,
                    format!("there are more than {MAX_CASES} cases"),
                ));
            }
            cases.extend(more);
        }
        Ok(ScenarioFile {
            path: path.into(),
            cases,
        })
    }
}

impl ScenarioKeys {
    /// One case for each policy and each table of settings.
    fn cases(
        &self,
        defaults: &Defaults,
        model: ModelSource,
        base: &Path,
    ) -> Result<Vec<Case>, String> {
        let Some(expect) = &self.expect else {
            return Err("it expects nothing; it needs [scenario.expect]".to_owned());
        };
        let model = match model {
            ModelSource::Path(path) => ModelSource::Path(base.join(path)),
            other => other,
        };
        let devices = self.devices.as_ref().or(defaults.devices.as_ref());
        let devices = device_specs(devices.map_or(&[], Vec::as_slice))?;
        let default_policy = OneOrMany(vec!["auto".to_owned()]);
        let OneOrMany(policies) = self
            .policy
            .as_ref()
            .or(defaults.policy.as_ref())
            .unwrap_or(&default_policy);
        let no_settings = OneOrMany(vec![Settings::default()]);
        let OneOrMany(variants) = self.settings.as_ref().unwrap_or(&no_settings);
        if policies.len().saturating_mul(variants.len()) > MAX_CASES {
            return Err(format!("it makes more than {MAX_CASES} cases"));
        }
        let mut cases = Vec::new();
        for policy in policies {
            for own in variants {
                let mut parts = Vec::new();
                if policies.len() > 1 {
                    parts.push(policy.clone());
                }
                if variants.len() > 1 {
                    parts.extend(own.0.iter().map(|(name, value)| format!("{name}={value}")));
                }
                let name = match parts.as_slice() {
                    [] if variants.len() > 1 => format!("{} [default settings]", self.name),
                    [] => self.name.clone(),
                    parts => format!("{} [{}]", self.name, parts.join(", ")),
                };
                cases.push(Case {
                    name,
                    model: model.clone(),
                    devices: devices.clone(),
                    policy: policy_source(policy, base),
                    settings: defaults.settings.overridden_by(own),
                    expect: expect.clone(),
                });
            }
        }
        let mut names = HashSet::new();
        if let Some(twice) = cases.iter().find(|case| !names.insert(&case.name)) {
            return Err(format!("case '{}' is there twice", twice.name));
        }
        Ok(cases)
    }
}

/// The devices, each as often as it is counted. A machine's own memory is no basis for a test that
/// is to give the same everywhere, so they have to be stated.
fn device_specs(keys: &[TextOr<DeviceKeys>]) -> Result<Vec<DeviceSpec>, String> {
    let mut specs = Vec::new();
    for TextOr(device) in keys {
        if device.count == 0 || device.count > MAX_DEVICES - specs.len() {
            return Err(format!("it has from 1 to {MAX_DEVICES} devices"));
        }
        specs.extend(std::iter::repeat_n(device.spec.0.clone(), device.count));
    }
    if specs.is_empty() {
        return Err("it has no devices".to_owned());
    }
    Ok(specs)
}

fn policy_source(name: &str, base: &Path) -> PolicySource {
    if BUILTIN_POLICIES.contains(&name) {
        PolicySource::Builtin(name.to_owned())
    } else {
        PolicySource::File(base.join(name))
    }
}

/// Line and column of a byte, both from 1.
fn position(text: &str, at: usize) -> (usize, usize) {
    let before = text.get(..at).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|&c| c != '\n').count() + 1;
    (line, column)
}
