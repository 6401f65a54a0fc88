//! The golden checkpoints, put together again from `tests/golden/ckpt`, and what is expected of
//! them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use flate2::Crc;
use flate2::read::GzDecoder;
use serde::Deserialize;
use tempfile::TempDir;

use crate::tensors::{FileTensor, FileTensors};

/// Every golden checkpoint.
pub const MODELS: [&str; 6] = [
    "llama",
    "mixtral",
    "qwen2_tied",
    "qwen2_untied",
    "qwen3_5_moe",
    "qwen3_moe",
];

/// Those with experts.
pub const MOE_MODELS: [&str; 3] = ["mixtral", "qwen3_5_moe", "qwen3_moe"];

/// A golden checkpoint in a temporary directory.
#[derive(Debug)]
pub struct GoldenModel {
    /// Its name in [`MODELS`].
    pub name: String,
    /// What is expected of it.
    pub expected: Expected,
    directory: TempDir,
}

/// `expected.json`, as far as it is used.
#[derive(Debug, Deserialize)]
pub struct Expected {
    /// Modules that transformers quantized: every linear layer that it can.
    pub nf4_quantized_modules: BTreeSet<String>,
    /// Names and shapes of the stacks of experts in memory.
    #[serde(default)]
    pub fused_expert_params: BTreeMap<String, Vec<usize>>,
}

/// The weights of one expert on disk, and where they are in the stack of all of them.
#[derive(Debug, Clone)]
pub struct ExpertSlice {
    /// The tensor on disk.
    pub name: String,
    /// The stack.
    pub fused: String,
    /// First element in the flattened stack.
    pub start: usize,
    /// Number of elements.
    pub elements: usize,
}

impl ExpertSlice {
    /// Its bytes of the packed codes of the stack.
    pub fn codes(&self) -> Range<usize> {
        self.start / 2..(self.start + self.elements) / 2
    }

    /// Its scales of those of the stack, at 64 elements a block. It starts and ends at a block.
    pub fn scales(&self) -> Range<usize> {
        assert!(
            self.start.is_multiple_of(64) && self.elements.is_multiple_of(64),
            "{} shares a block with another expert",
            self.name
        );
        self.start / 64..(self.start + self.elements) / 64
    }
}

impl GoldenModel {
    /// Puts a model's files together.
    pub fn unpack(name: &str) -> GoldenModel {
        let packed = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("golden/ckpt")
            .join(name);
        let directory = TempDir::new().expect("a temporary directory can be made");
        unpack(&packed, directory.path()).unwrap_or_else(|error| panic!("{name}: {error}"));
        let expected = fs::read(directory.path().join("expected.json")).expect("it was unpacked");
        GoldenModel {
            name: name.to_owned(),
            expected: serde_json::from_slice(&expected).expect("expected.json is as documented"),
            directory,
        }
    }

    /// A file or directory of the model, for example `bf16`.
    pub fn path(&self, relative: &str) -> PathBuf {
        self.directory.path().join(relative)
    }

    /// The tensors of a file or directory of the model.
    pub fn tensors(&self, relative: &str) -> FileTensors {
        FileTensors::read(&self.path(relative))
    }

    /// Names of the weights that transformers quantized.
    pub fn linear_weights(&self) -> impl Iterator<Item = String> {
        let modules = self.expected.nf4_quantized_modules.iter();
        modules.map(|module| format!("{module}.weight"))
    }

    /// Names of everything that is to be quantized: linear layers and experts.
    pub fn quantized_weights(&self) -> BTreeSet<String> {
        let experts = self.expert_slices().into_iter().map(|slice| slice.name);
        self.linear_weights().chain(experts).collect()
    }

    /// Every expert's tensors on disk.
    pub fn expert_slices(&self) -> Vec<ExpertSlice> {
        let mixtral = self.name == "mixtral";
        let mut slices = Vec::new();
        for (fused, shape) in &self.expected.fused_expert_params {
            let (block, kind) = fused
                .split_once(".mlp.experts.")
                .unwrap_or_else(|| panic!("{fused} is not a stack of experts"));
            // In the order of the rows of the stack.
            let parts: &[&str] = match (kind, mixtral) {
                ("gate_up_proj", false) => &["gate_proj", "up_proj"],
                ("gate_up_proj", true) => &["w1", "w3"],
                ("down_proj", false) => &["down_proj"],
                ("down_proj", true) => &["w2"],
                _ => panic!("{fused} is not a stack of experts"),
            };
            let module = if mixtral { "block_sparse_moe" } else { "mlp" };
            let elements = shape.iter().skip(1).product::<usize>() / parts.len();
            for expert in 0..shape[0] {
                for (index, part) in parts.iter().enumerate() {
                    slices.push(ExpertSlice {
                        name: format!("{block}.{module}.experts.{expert}.{part}.weight"),
                        fused: fused.clone(),
                        start: (expert * parts.len() + index) * elements,
                        elements,
                    });
                }
            }
        }
        slices
    }

    /// Writes the model with its experts as stacks, the way transformers holds them in memory and
    /// newer checkpoints hold them on disk.
    pub fn write_with_fused_experts(&self, directory: &Path) {
        let mut tensors = self.tensors("bf16");
        let mut stacks: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        for slice in self.expert_slices() {
            let part = tensors.0.remove(&slice.name).expect("the expert is there");
            assert_eq!(part.elements(), slice.elements, "{}", slice.name);
            let stack = stacks.entry(slice.fused).or_default();
            // Two bytes an element.
            assert_eq!(stack.len(), 2 * slice.start, "{}", slice.name);
            stack.extend(part.data);
        }
        for (name, data) in stacks {
            let stack = FileTensor {
                dtype: safetensors::Dtype::BF16,
                shape: self.expected.fused_expert_params[&name].clone(),
                data,
            };
            tensors.0.insert(name, stack);
        }
        tensors.write(&directory.join("model.safetensors"));
        fs::copy(self.path("bf16/config.json"), directory.join("config.json"))
            .expect("the configuration can be copied");
    }
}

/// What one file was made of, as `pack_checkpoints.py` wrote it.
#[derive(Deserialize)]
struct PackedFile {
    length: usize,
    crc32: u32,
    #[serde(flatten)]
    content: Content,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text {
        text: String,
    },
    Tensors {
        header: String,
        payloads: Vec<(usize, usize)>,
    },
}

#[derive(Deserialize)]
struct Packed {
    files: BTreeMap<String, PackedFile>,
}

/// Writes every file that was packed into `packed` under `target`.
fn unpack(packed: &Path, target: &Path) -> Result<(), String> {
    let read = |name: &str| {
        let path = packed.join(name);
        fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))
    };
    let mut index = Vec::new();
    GzDecoder::new(&read("files.json.gz")?[..])
        .read_to_end(&mut index)
        .map_err(|error| format!("files.json.gz: {error}"))?;
    let index: Packed =
        serde_json::from_slice(&index).map_err(|error| format!("files.json.gz: {error}"))?;
    let tensors = read("tensors.bin")?;
    for (name, file) in &index.files {
        let bytes = file.content.assemble(&tensors)?;
        let mut crc = Crc::new();
        crc.update(&bytes);
        if (bytes.len(), crc.sum()) != (file.length, file.crc32) {
            return Err(format!("{name} is not what was packed"));
        }
        let path = target.join(name);
        let written = match path.parent() {
            Some(parent) => fs::create_dir_all(parent).and_then(|()| fs::write(&path, bytes)),
            None => fs::write(&path, bytes),
        };
        written.map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(())
}

impl Content {
    fn assemble(&self, tensors: &[u8]) -> Result<Vec<u8>, String> {
        match self {
            Content::Text { text } => Ok(text.clone().into_bytes()),
            Content::Tensors { header, payloads } => {
                let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
                bytes.extend(header.as_bytes());
                for &(offset, length) in payloads {
                    let payload = tensors.get(offset..offset + length).ok_or_else(|| {
                        format!("tensors.bin ends before byte {}", offset + length)
                    })?;
                    bytes.extend(payload);
                }
                Ok(bytes)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_golden_model_is_listed_and_unpacks() {
        let packed = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/ckpt");
        let found: BTreeSet<String> = fs::read_dir(packed)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        assert_eq!(found, MODELS.map(str::to_owned).into());
        for name in MODELS {
            let model = GoldenModel::unpack(name);
            for relative in ["bf16", "nf4", "nf4_dq", "expected.safetensors"] {
                assert!(!model.tensors(relative).0.is_empty(), "{name}/{relative}");
            }
            let experts = MOE_MODELS.contains(&name);
            assert_eq!(!model.expert_slices().is_empty(), experts, "{name}");
        }
    }

    #[test]
    fn a_changed_byte_or_a_missing_end_is_noticed() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/ckpt/llama");
        let copy = TempDir::new().unwrap();
        let target = TempDir::new().unwrap();
        let index = copy.path().join("files.json.gz");
        fs::copy(golden.join("files.json.gz"), index).unwrap();
        let tensors = fs::read(golden.join("tensors.bin")).unwrap();
        let unpack_with = |tensors: &[u8]| {
            fs::write(copy.path().join("tensors.bin"), tensors).unwrap();
            unpack(copy.path(), target.path())
        };
        unpack_with(&tensors).unwrap();
        let error = unpack_with(&tensors[..tensors.len() - 1]).unwrap_err();
        assert!(error.contains("ends before"), "{error}");
        let mut changed = tensors;
        let middle = changed.len() / 2;
        changed[middle] ^= 1;
        let error = unpack_with(&changed).unwrap_err();
        assert!(error.contains("not what was packed"), "{error}");
    }
}
