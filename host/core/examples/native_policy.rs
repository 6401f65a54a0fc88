//! An application with its own placement rules in Rust: no wasm, no default features.
//!
//!     cargo run --release --no-default-features --example native_policy -- MODEL

use std::error::Error;
use std::path::Path;

use tightfit::policy::{Answer, Description, PolicyError, Proposal, Request};
use tightfit::{
    Checkpoint, Device, Format, HostDevice, LoadOptions, Model, Placement, Policy, load_reserved,
    reserve,
};

/// Everything on the first device; matrices of the decoder's layers in NF4.
struct LayersInNf4;

impl Policy for LayersInNf4 {
    fn describe(&self) -> Result<Description, PolicyError> {
        Ok(Description {
            name: "layers-in-nf4".to_owned(),
            version: "1".to_owned(),
            settings: Vec::new(),
        })
    }

    fn plan(&self, request: &Request<'_>) -> Result<Answer, PolicyError> {
        let placements = request.tensors.iter().map(|tensor| {
            let quantize = tensor.name.contains(".layers.")
                && tensor.shape.len() == 2
                && tensor.dtype.is_quantizable();
            Placement {
                device: Some(0),
                format: match quantize {
                    true => Format::NF4,
                    false => Format::Stored,
                },
            }
        });
        Ok(Answer {
            proposal: Proposal {
                placements: placements.collect(),
                headroom: vec![0; request.devices.len()],
                slices: Vec::new(),
            },
            fuel: None,
        })
    }
}

pub(crate) fn load(model: &Path) -> Result<Model, Box<dyn Error>> {
    let checkpoint = Checkpoint::open(model)?;
    let devices: Vec<Box<dyn Device>> = vec![Box::new(HostDevice::cpu(None))];
    let placed = reserve(&checkpoint, &LayersInNf4, &devices, &[])?;
    Ok(load_reserved(
        &checkpoint,
        placed.reserved,
        &LoadOptions::default(),
    )?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let model = std::env::args()
        .nth(1)
        .ok_or("usage: native_policy MODEL")?;
    let model = load(Path::new(&model))?;
    for tensor in model.tensors() {
        println!("{} {}", tensor.name(), tensor.format());
    }
    Ok(())
}
