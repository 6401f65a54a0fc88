//! Plans a model for a device, loads it as planned, and looks at a weight.
//!
//!     cargo run --release --example first_load -- MODEL DEVICE

// ANCHOR: uses
use std::error::Error;
use std::io::Write;
use std::path::Path;

use tightfit::types::Bytes;
use tightfit::{Checkpoint, LoadOptions, load_reserved, open_devices, reserve};
use tightfit_wasm::{Limits, WasmPolicy};
// ANCHOR_END: uses

// ANCHOR: load
pub(crate) fn run(model: &Path, device: &str, out: &mut dyn Write) -> Result<(), Box<dyn Error>> {
    let checkpoint = Checkpoint::open(model)?;
    let devices = open_devices(&[device.parse()?])?;
    let policy = WasmPolicy::open("auto", Limits::default())?;
    let settings = [("double-quant".to_owned(), "true".to_owned())];

    // The plan is made and its memory taken. No weight has been read.
    let reserved = reserve(&checkpoint, &policy, &devices, &settings)?.reserved;
    let planned = reserved.plan().devices[0].reserved();
    writeln!(out, "planned {planned} bytes ({})", Bytes(planned))?;

    let model = load_reserved(&checkpoint, reserved, &LoadOptions::default())?;
    writeln!(out, "at most {} bytes", devices[0].usage().reserved.peak)?;

    let name = "model.layers.0.mlp.up_proj.weight";
    let weight = model.tensor(name).ok_or("there is no such layer")?;
    let values: Vec<f32> = weight.to_floats()?; // dequantized
    writeln!(
        out,
        "{name} is {:?} in {}, from {}",
        weight.shape(),
        weight.format(),
        values[0]
    )?;
    Ok(())
}
// ANCHOR_END: load

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, device] = &arguments[..] else {
        return Err("usage: first_load MODEL DEVICE".into());
    };
    run(Path::new(model), device, &mut std::io::stdout())
}
