//! What a checkpoint holds, without loading it.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::checkpoint::Checkpoint;
use crate::plan::Plan;
use crate::types::{DType, elements};

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
    /// By element type: tensors, elements, bytes.
    pub dtypes: BTreeMap<String, Share>,
    /// By the format that the policy chooses: tensors, elements, bytes as stored in that format.
    pub formats: BTreeMap<String, Share>,
    /// Bytes that would be stored.
    pub stored_bytes: u64,
    /// Pairs of names for one parameter.
    pub ties: Vec<(String, String)>,
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
    /// What `checkpoint` holds, with the formats that `plan` gives its tensors.
    pub fn new(checkpoint: &Checkpoint, plan: &Plan) -> Inspection {
        let mut dtypes: BTreeMap<DType, Share> = BTreeMap::new();
        let mut formats: BTreeMap<String, Share> = BTreeMap::new();
        let mut parameters: u64 = 0;
        for (tensor, planned) in checkpoint.tensors().iter().zip(&plan.tensors) {
            let n = elements(&tensor.shape).unwrap_or(u64::MAX);
            parameters = parameters.saturating_add(n);
            dtypes.entry(tensor.dtype).or_default().add(n, tensor.bytes);
            let format = match planned.placement {
                placement if placement.device.is_none() => "not loaded".to_owned(),
                placement => placement.format.to_string(),
            };
            formats
                .entry(format)
                .or_default()
                .add(n, planned.requested());
        }
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
            dtypes: dtypes
                .into_iter()
                .map(|(dtype, share)| (dtype.to_string(), share))
                .collect(),
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
        }
    }

    /// Elements that would be quantized.
    pub fn quantized_elements(&self) -> u64 {
        let nf4 = |name: &str| name.starts_with("nf4");
        self.formats
            .iter()
            .filter(|(name, _)| nf4(name))
            .map(|(_, share)| share.elements)
            .sum()
    }
}
