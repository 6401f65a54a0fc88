//! What a checkpoint holds, without loading it.

use std::collections::BTreeMap;

use serde::Serialize;
use tightfit_common::names::TensorKind;

use super::{MethodReport, purpose};
use crate::checkpoint::{Checkpoint, Config, TensorInfo};
use crate::plan::Plan;
use crate::types::{Format, elements};

/// What a checkpoint holds, and what would become of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inspection {
    /// Version of this form.
    pub schema: u32,
    /// Where it is.
    pub path: String,
    /// As config.json names it.
    pub architecture: Option<String>,
    /// Files that hold its tensors.
    pub shards: usize,
    /// Tensors.
    pub tensors: usize,
    /// Elements of all tensors.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub source_bytes: u64,
    /// Decoder layers, as config.json counts them.
    pub layers: Option<u32>,
    /// Experts in a layer, as config.json counts them; of a mixture-of-experts model.
    pub experts_per_layer: Option<u64>,
    /// The weights of experts: tensors, elements, bytes in the files.
    pub experts: Share,
    /// By element type, or 4-bit format of what is quantized already: tensors, elements, bytes.
    pub dtypes: BTreeMap<String, Share>,
    /// By the format that the policy chooses: tensors, elements, bytes as stored in that format.
    pub formats: BTreeMap<String, Share>,
    /// Elements that are in a 4-bit format as stored.
    pub quantized_elements: u64,
    /// Bytes that would be stored.
    pub stored_bytes: u64,
    /// Pairs of names for one parameter.
    pub ties: Vec<(String, String)>,
    /// The method by which it has been quantized already, if it has.
    pub quantization: Option<MethodReport>,
}

/// A part of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Share {
    /// Tensors.
    pub tensors: u64,
    /// Their elements.
    pub elements: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Share {
    fn add(&mut self, elements: u64, bytes: u64) {
        self.tensors += 1;
        self.elements = self.elements.saturating_add(elements);
        self.bytes = self.bytes.saturating_add(bytes);
    }
}

impl Inspection {
    /// Returns what `checkpoint` holds, with the formats that `plan` gives its tensors.
    pub fn new(checkpoint: &Checkpoint, plan: &Plan) -> Inspection {
        let mut dtypes: BTreeMap<String, Share> = BTreeMap::new();
        let mut formats: BTreeMap<String, Share> = BTreeMap::new();
        let mut experts = Share::default();
        let mut parameters: u64 = 0;
        let mut quantized_elements: u64 = 0;
        // A plan that is not for it has been refused before.
        let cut = plan.cut(checkpoint).unwrap_or(None);
        let tensors = cut.as_ref().unwrap_or(checkpoint).tensors();
        for (tensor, planned) in tensors.iter().zip(&plan.tensors) {
            let n = elements(&tensor.shape).unwrap_or(u64::MAX);
            parameters = parameters.saturating_add(n);
            let bytes = tensor.source_bytes();
            dtypes
                .entry(source_format(tensor))
                .or_default()
                .add(n, bytes);
            if purpose(tensor) == TensorKind::Expert {
                experts.add(n, bytes);
            }
            let loaded = planned.placement.device.is_some();
            let format = match planned.placement.format {
                _ if !loaded => "not loaded".to_owned(),
                Format::Stored if tensor.quantized.is_some() => {
                    format!("stored:{}", source_format(tensor))
                }
                format => format.to_string(),
            };
            formats
                .entry(format)
                .or_default()
                .add(n, planned.requested());
            let quantized = tensor.quantized.is_some()
                || matches!(planned.placement.format, Format::Nf4 { .. });
            if loaded && quantized {
                quantized_elements = quantized_elements.saturating_add(n);
            }
        }
        // What is not decoded counts with the elements that it has, not with those of its tensors.
        let counts = checkpoint.encoded();
        parameters = parameters
            .saturating_sub(counts.left_stored_elements)
            .saturating_add(counts.left_elements);
        Inspection {
            schema: 1,
            path: checkpoint.path().display().to_string(),
            architecture: checkpoint
                .config()
                .and_then(|config| config.architecture.clone()),
            shards: checkpoint.shards().len(),
            tensors: checkpoint.tensors().len(),
            parameters,
            source_bytes: checkpoint.source_bytes(),
            layers: checkpoint
                .config()
                .and_then(|config| config.num_hidden_layers),
            experts_per_layer: checkpoint.config().and_then(experts_per_layer),
            experts,
            dtypes,
            quantized_elements,
            stored_bytes: formats.values().map(|share| share.bytes).sum(),
            formats,
            ties: checkpoint
                .ties()
                .iter()
                .map(|tie| {
                    let tensor = &checkpoint.tensors()[tie.tensor];
                    (tensor.name.clone(), tie.alias.clone())
                })
                .collect(),
            quantization: MethodReport::of(checkpoint),
        }
    }
}

/// How the file holds a tensor: its element type, or its 4-bit format.
fn source_format(tensor: &TensorInfo) -> String {
    match (&tensor.quantized, &tensor.encoded) {
        (None, Some(encoded)) => encoded.name().to_owned(),
        (None, None) => tensor.dtype.to_string(),
        (Some(quantized), _) => {
            let double = if quantized.nested.is_some() {
                "+double"
            } else {
                ""
            };
            format!("{}{double}", quantized.quant_type.name())
        }
    }
}

/// As the configurations of the field name it.
fn experts_per_layer(config: &Config) -> Option<u64> {
    let nested = ["text_config", "llm_config"];
    let models = nested.iter().filter_map(|key| config.json.get(key));
    models.chain([&config.json]).find_map(|model| {
        ["num_experts", "num_local_experts", "n_routed_experts"]
            .iter()
            .find_map(|key| model.get(key)?.as_u64())
    })
}
