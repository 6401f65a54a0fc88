//! The models of scenarios: checkpoints that are there, or that are written for the purpose.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::{Map, Value};
use tempfile::TempDir;

use super::error::RunError;
use super::values::{DTypeName, Parsed};
use tightfit::cancel::CancelToken;
use tightfit::checkpoint::{Checkpoint, MAX_TENSORS, OpenOptions};
use tightfit::synth::{self, Model, Preset, SynthOptions, Tensor};
use tightfit::types::DType;

/// Where a scenario's model comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum ModelSource {
    /// A directory or a file.
    Path(PathBuf),
    /// The shape of a known model.
    Preset(Preset),
    /// Tensors given one by one.
    Tensors {
        /// Their names, types and shapes.
        tensors: Vec<TensorEntry>,
        /// How often those with `{}` in their names are repeated.
        layers: Option<u64>,
        /// `config.json`; ties follow from it, as in any checkpoint.
        config: Map<String, Value>,
    },
}

/// A tensor of a model that is given tensor by tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Its name; `{}` stands for the number of its layer.
    pub name: String,
    /// Type of its elements.
    pub dtype: DType,
    /// Row-major.
    pub shape: Vec<u64>,
}

/// The keys of a model.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct ModelKeys {
    path: Option<PathBuf>,
    preset: Option<Parsed<Preset>>,
    tensors: Option<Vec<TensorKeys>>,
    layers: Option<u64>,
    config: Option<Map<String, Value>>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct TensorKeys {
    name: String,
    shape: Vec<u64>,
    dtype: Option<DTypeName>,
}

impl TryFrom<ModelKeys> for ModelSource {
    type Error = String;

    fn try_from(keys: ModelKeys) -> Result<ModelSource, String> {
        let inline = keys.layers.is_some() || keys.config.is_some();
        match (keys.path, keys.preset, keys.tensors) {
            (Some(path), None, None) if !inline => Ok(ModelSource::Path(path)),
            (None, Some(Parsed(preset)), None) if !inline => Ok(ModelSource::Preset(preset)),
            (None, None, Some(tensors)) => {
                check_layers(&tensors, keys.layers)?;
                let entry = |keys: TensorKeys| TensorEntry {
                    name: keys.name,
                    dtype: keys.dtype.map_or(DType::Bf16, |dtype| dtype.0),
                    shape: keys.shape,
                };
                Ok(ModelSource::Tensors {
                    tensors: tensors.into_iter().map(entry).collect(),
                    layers: keys.layers,
                    config: keys.config.unwrap_or_default(),
                })
            }
            _ => Err(
                "a model has one of path, preset and tensors; only tensors go with layers and config"
                    .to_owned(),
            ),
        }
    }
}

/// Numbered names need a number of layers, and the other way round; and the product is no more
/// than a checkpoint can hold.
fn check_layers(tensors: &[TensorKeys], layers: Option<u64>) -> Result<(), String> {
    if tensors.is_empty() {
        return Err("the model has no tensors".to_owned());
    }
    let numbered = tensors
        .iter()
        .filter(|tensor| tensor.name.contains("{}"))
        .count();
    match layers {
        None if numbered > 0 => Err("a name with {} needs layers".to_owned()),
        Some(_) if numbered == 0 => Err("layers needs names with {}".to_owned()),
        Some(layers) if layers.saturating_mul(numbered as u64) > MAX_TENSORS as u64 => Err(
            format!("{layers} layers of {numbered} tensors are more than {MAX_TENSORS} tensors"),
        ),
        _ => Ok(()),
    }
}

/// A model that is open, with the directory that holds it where it was written for a scenario.
#[derive(Debug)]
pub(super) struct OpenModel {
    pub(super) checkpoint: Checkpoint,
    _directory: Option<TempDir>,
}

impl ModelSource {
    /// Opens the model; one that is only described is written first, without weights.
    pub(super) fn open(&self, cancel: &CancelToken) -> Result<OpenModel, RunError> {
        let model = match self {
            ModelSource::Path(path) => {
                return Ok(OpenModel {
                    checkpoint: Checkpoint::open_with(
                        path,
                        &OpenOptions::default().with_cancel(cancel.clone()),
                    )?,
                    _directory: None,
                });
            }
            ModelSource::Preset(preset) => Model::from(*preset),
            ModelSource::Tensors {
                tensors,
                layers,
                config,
            } => Model {
                tensors: expand(tensors, layers.unwrap_or(1)),
                config_json: Value::Object(config.clone()).to_string(),
            },
        };
        let directory = tempfile::Builder::new()
            .prefix("tightfit-check-")
            .tempdir()
            .map_err(RunError::TemporaryDirectory)?;
        let options = SynthOptions::default()
            .with_headers_only(true)
            .with_cancel(cancel.clone());
        synth::write_model(&model, directory.path(), &options)?;
        Ok(OpenModel {
            checkpoint: Checkpoint::open_with(
                directory.path(),
                &OpenOptions::default().with_cancel(cancel.clone()),
            )?,
            _directory: Some(directory),
        })
    }
}

/// The tensors in the order of a checkpoint: neighbors with numbered names layer by layer.
fn expand(entries: &[TensorEntry], layers: u64) -> Vec<Tensor> {
    let is_numbered = |entry: &TensorEntry| entry.name.contains("{}");
    let mut tensors = Vec::new();
    for run in entries.chunk_by(|a, b| is_numbered(a) == is_numbered(b)) {
        let times = if is_numbered(&run[0]) { layers } else { 1 };
        for layer in 0..times {
            tensors.extend(run.iter().map(|entry| Tensor {
                dtype: entry.dtype,
                ..Tensor::new(entry.name.replace("{}", &layer.to_string()), &entry.shape)
            }));
        }
    }
    tensors
}
