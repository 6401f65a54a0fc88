//! Weights that other methods have quantized: the golden ones, and how any are loaded.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use tightfit::checkpoint::{Checkpoint, Dequantize, OpenOptions, TensorInfo};
use tightfit::device::Device;
use tightfit::load::{LoadOptions, load};
use tightfit::model::Model;
use tightfit::plan::Plan;
use tightfit::policy::Proposal;
use tightfit::types::{Format, Placement};

use crate::tensors::FileTensors;

/// A checkpoint, and what is to be made of it.
#[derive(Debug)]
pub struct GoldenSource {
    /// Its directory.
    pub path: PathBuf,
    /// Weights as their method decodes them, and their parts in NF4.
    pub expected: FileTensors,
}

impl GoldenSource {
    /// All that there are.
    pub fn all() -> Vec<GoldenSource> {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/sources");
        let entries = std::fs::read_dir(directory).expect("the directory can be read");
        let mut paths: Vec<PathBuf> = entries
            .map(|entry| entry.expect("the directory can be read").path())
            .collect();
        paths.sort();
        assert!(paths.len() >= 18, "{paths:?}");
        let read = |path: PathBuf| GoldenSource {
            expected: FileTensors::read(&path.join("expected.safetensors")),
            path,
        };
        paths.into_iter().map(read).collect()
    }

    /// The name of its directory.
    pub fn name(&self) -> String {
        let name = self.path.file_name().expect("it has a name");
        name.to_string_lossy().into_owned()
    }

    /// Opens it without the expectations, which lie beside it.
    pub fn open(&self, dequantize: Dequantize) -> Checkpoint {
        let options = OpenOptions::default().with_dequantize(dequantize);
        Checkpoint::open_with(self.path.join("model.safetensors"), &options)
            .unwrap_or_else(|error| panic!("{error}"))
    }

    /// The names of its weights.
    pub fn weights(&self) -> BTreeSet<&str> {
        let names = self.expected.0.keys();
        let suffixes = [".codes", ".absmax", ".cudaref_codes", ".cudaref_absmax"];
        names
            .map(String::as_str)
            .filter(|name| !suffixes.iter().any(|suffix| name.ends_with(suffix)))
            .collect()
    }

    /// A part of a weight in NF4: what bitsandbytes' CUDA kernel gives, where its CPU path has something
    /// else.
    pub fn nf4(&self, weight: &str, part: &str) -> &[u8] {
        let reference = self.expected.0.get(&format!("{weight}.cudaref_{part}"));
        let other = || &self.expected.0[&format!("{weight}.{part}")];
        &reference.unwrap_or_else(other).data
    }
}

/// Loads these weights in this format, and all else as stored, onto the first device.
pub fn load_as(
    checkpoint: &Checkpoint,
    devices: &[Box<dyn Device>],
    weights: &BTreeSet<&str>,
    format: Format,
    options: &LoadOptions<'_>,
) -> Model {
    let infos: Vec<_> = devices.iter().map(|device| device.info()).collect();
    let place = |tensor: &TensorInfo| Placement {
        device: Some(0),
        format: match weights.contains(&*tensor.name) {
            true => format,
            false => Format::Stored,
        },
    };
    let tensors = checkpoint.tensors();
    let proposal = Proposal {
        placements: tensors.iter().map(place).collect(),
        headroom: vec![0; devices.len()],
        slices: Vec::new(),
    };
    let plan = Plan::of(checkpoint, &infos, &proposal).unwrap_or_else(|error| panic!("{error}"));
    let model = load(checkpoint, &plan, devices, options).unwrap_or_else(|error| panic!("{error}"));
    let source_bytes = tensors.iter().map(TensorInfo::source_bytes);
    assert_eq!(model.stats().bytes_read, source_bytes.sum::<u64>());
    model
}
