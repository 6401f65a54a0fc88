//! The golden device maps, and the checkpoints that they belong to.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use flate2::read::GzDecoder;
use serde::Deserialize;
use serde_json::Value;
use tightfit::checkpoint::{TensorInfo, Tie};
use tightfit::synth::Preset;
use tightfit::types::DType;

/// Every model that there are maps of.
pub const MODELS: [&str; 6] = [
    "Llama-3.1-70B",
    "Mixtral-8x7B",
    "Qwen2.5-0.5B",
    "Qwen2.5-72B",
    "Qwen2.5-7B",
    "Qwen3-30B-A3B",
];

/// One file.
#[derive(Debug, Deserialize)]
pub struct GoldenMaps {
    /// Its name in [`MODELS`].
    pub model: String,
    /// The model in memory.
    pub tree: MemoryTree,
    /// What was asked and answered.
    pub cases: Vec<Case>,
}

/// A model as transformers holds it.
#[derive(Debug, Deserialize)]
pub struct MemoryTree {
    /// Names, shapes and types.
    pub parameters: Vec<(String, Vec<u64>, String)>,
    /// Second names to first names.
    pub tied: BTreeMap<String, String>,
}

/// Names of modules or parameters, and devices: a number, `cpu` or `disk`.
pub type Map = BTreeMap<String, String>;

/// One question and what the libraries answer.
#[derive(Debug, Deserialize)]
pub struct Case {
    /// Bytes by device.
    pub max_memory: BTreeMap<String, u64>,
    /// `auto`, `balanced_low_0` or `sequential`.
    pub strategy: String,
    accelerate_balanced_memory: BTreeMap<String, f64>,
    transformers_balanced_memory: BTreeMap<String, f64>,
    accelerate_device_map: BTreeMap<String, Value>,
    transformers_device_map: BTreeMap<String, Value>,
    /// Whether `from_pretrained` takes the map.
    pub transformers_accepts: bool,
}

impl Case {
    /// Bytes by device that a library balances out, before a tenth is kept back.
    pub fn balanced(&self, library: &str) -> &BTreeMap<String, f64> {
        match library {
            "accelerate" => &self.accelerate_balanced_memory,
            _ => &self.transformers_balanced_memory,
        }
    }

    /// The map of a library.
    pub fn map(&self, library: &str) -> Map {
        let map = match library {
            "accelerate" => &self.accelerate_device_map,
            _ => &self.transformers_device_map,
        };
        map.iter()
            .map(|(name, device)| (name.clone(), device_name(device)))
            .collect()
    }
}

/// A number or a word, as a word.
pub fn device_name(device: &Value) -> String {
    match device {
        Value::String(name) => name.clone(),
        number => number.to_string(),
    }
}

/// The device of a parameter: that of the longest name in the map that it is or lies in.
pub fn device_of<'m>(map: &'m Map, parameter: &str) -> &'m str {
    let mut name = parameter;
    loop {
        if let Some(device) = map.get(name) {
            return device;
        }
        assert!(!name.is_empty(), "the map has no device for {parameter}");
        name = name.rsplit_once('.').map_or("", |(parent, _)| parent);
    }
}

/// What is on disk, sorted by name.
#[derive(Debug)]
pub struct OnDisk {
    /// The tensors.
    pub tensors: Vec<TensorInfo>,
    /// For each, the parameter in memory that it is, or is a part of.
    pub parameters: Vec<String>,
    /// Second names.
    pub ties: Vec<Tie>,
    /// `config.json`.
    pub config_json: String,
}

impl GoldenMaps {
    /// Reads a file.
    pub fn read(model: &str) -> GoldenMaps {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join(format!("golden/device_map/{model}.json.gz"));
        let file = File::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        serde_json::from_reader(GzDecoder::new(file))
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// The checkpoint that transformers would have read: without second names, every expert's
    /// matrices on their own.
    pub fn on_disk(&self) -> OnDisk {
        let mut found: Vec<(TensorInfo, String)> = Vec::new();
        for (name, shape, dtype) in &self.tree.parameters {
            assert_eq!(dtype, "bfloat16", "{name}");
            if self.tree.tied.contains_key(name) {
                continue;
            }
            for (tensor, shape) in self.parts(name, shape) {
                let bytes = 2 * shape.iter().product::<u64>();
                let tensor = TensorInfo {
                    name: tensor,
                    dtype: DType::Bf16,
                    shape,
                    bytes,
                    shard: 0,
                    offset: 0,
                    quantized: None,
                    encoded: None,
                    piece: None,
                };
                found.push((tensor, name.clone()));
            }
        }
        found.sort_by(|a, b| a.0.name.cmp(&b.0.name));
        let (tensors, parameters): (Vec<TensorInfo>, Vec<String>) = found.into_iter().unzip();
        let tie = |(alias, name): (&String, &String)| Tie {
            tensor: tensors
                .iter()
                .position(|tensor| tensor.name == *name)
                .expect("the tied parameter is on disk"),
            alias: alias.clone(),
            alias_tensor: None,
        };
        OnDisk {
            ties: self.tree.tied.iter().map(tie).collect(),
            config_json: self.config_json(),
            tensors,
            parameters,
        }
    }

    /// The tensors on disk that make a parameter in memory.
    fn parts(&self, name: &str, shape: &[u64]) -> Vec<(String, Vec<u64>)> {
        let mixtral = self.model.starts_with("Mixtral");
        let block = |name: &str| {
            if mixtral {
                name.replace(".mlp.", ".block_sparse_moe.")
            } else {
                name.to_owned()
            }
        };
        let Some((module, stack)) = name.split_once(".experts.") else {
            return vec![(block(name), shape.to_vec())];
        };
        let names: &[&str] = match (stack, mixtral) {
            ("gate_up_proj", false) => &["gate_proj", "up_proj"],
            ("gate_up_proj", true) => &["w1", "w3"],
            ("down_proj", false) => &["down_proj"],
            ("down_proj", true) => &["w2"],
            _ => panic!("{name} is not a stack of experts"),
        };
        let module = block(&format!("{module}."));
        let [experts, rows, columns] = shape else {
            panic!("{name} has not three dimensions");
        };
        let part = vec![rows / names.len() as u64, *columns];
        let expert = |expert: u64| {
            let (module, part) = (module.clone(), part.clone());
            names.iter().map(move |name| {
                let name = format!("{module}experts.{expert}.{name}.weight");
                (name, part.clone())
            })
        };
        (0..*experts).flat_map(expert).collect()
    }

    /// The preset of this model, if there is one.
    pub fn preset(&self) -> Option<Preset> {
        self.model.parse().ok()
    }

    fn config_json(&self) -> String {
        match self.preset() {
            Some(preset) => preset.config_json(),
            None => {
                assert_eq!(self.model, "Qwen2.5-72B");
                // What differs from the smaller one, as published.
                let mut config: Value =
                    serde_json::from_str(&Preset::Qwen25_7b.config_json()).expect("it is JSON");
                for (key, value) in [
                    ("hidden_size", 8192),
                    ("intermediate_size", 29_568),
                    ("num_attention_heads", 64),
                    ("num_hidden_layers", 80),
                    ("num_key_value_heads", 8),
                ] {
                    config[key] = value.into();
                }
                config.to_string()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_are_those_of_the_presets() {
        for model in MODELS {
            let maps = GoldenMaps::read(model);
            assert_eq!(maps.cases.len(), 48, "{model}");
            let Some(preset) = maps.preset() else {
                continue;
            };
            let mut expected: Vec<(String, Vec<u64>)> = preset
                .tensors()
                .into_iter()
                .map(|tensor| (tensor.name, tensor.shape))
                .collect();
            expected.sort();
            let found: Vec<(String, Vec<u64>)> = maps
                .on_disk()
                .tensors
                .into_iter()
                .map(|tensor| (tensor.name, tensor.shape))
                .collect();
            assert!(found == expected, "{model}");
        }
    }
}
