//! CUDA devices, on a stand-in for NVIDIA's driver; with `TIGHTFIT_CUDA=real` what can be is run on
//! the driver and the devices of this machine instead.
#![cfg(target_os = "linux")]

mod command;
mod decoder;
mod experts;
mod faults;
mod gradients;
mod graphs;
mod linear_programs;
mod memory;
mod products;
mod programs;
mod quantize_on;
mod quantizer;
mod queue;
mod same_bytes;
mod sharing;
mod sources;
mod writer;

use std::path::{Path, PathBuf};

use cuda_stand_in::control::{Report, Setup, StandIn};
use tempfile::TempDir;
use tightfit::checkpoint::Checkpoint;
use tightfit::device::{CudaDevice, Device, HostDevice};
use tightfit::load::{LoadError, LoadOptions, QuantizeOn, load};
use tightfit::model::Model;
use tightfit::plan::Plan;
use tightfit::types::{BlockSize, DType, Format, Placement};
use tightfit_tests::loading::{Contents, contents};
use tightfit_tests::models;

const MIB: u64 = 1 << 20;

/// The driver that tests run on.
enum Driver {
    StandIn(StandIn),
    Real,
}

impl Driver {
    /// A driver with `devices` devices; the real one has what it has.
    fn start(devices: usize) -> Driver {
        Driver::start_with(&Setup {
            devices: vec![256 * MIB; devices],
            ..Setup::default()
        })
    }

    fn start_with(setup: &Setup) -> Driver {
        match is_real() {
            true => Driver::Real,
            false => Driver::StandIn(StandIn::start(setup)),
        }
    }

    /// The devices, by name.
    fn devices(&self) -> Vec<String> {
        let count = CudaDevice::count().unwrap_or_else(|error| panic!("{error}"));
        (0..count).map(|index| format!("cuda:{index}")).collect()
    }

    /// What the stand-in has seen, with its books in order and nothing left.
    #[track_caller]
    fn clean_report(&self, context: &str) -> Option<Report> {
        let Driver::StandIn(stand_in) = self else {
            return None;
        };
        let report = stand_in.report();
        report.is_clean(context);
        Some(report)
    }
}

/// Whether this machine's own driver is to be tested.
fn is_real() -> bool {
    std::env::var_os("TIGHTFIT_CUDA").is_some_and(|value| value == "real")
}

/// Whether a test is left out, because it needs what only the stand-in can do. Says so.
fn is_left_out(needs: &str) -> bool {
    if is_real() {
        eprintln!("not run on a real driver: needs {needs}");
    }
    is_real()
}

/// The stand-in for a test that needs what only it can do.
fn stand_in(needs: &str, setup: &Setup) -> Option<StandIn> {
    (!is_left_out(needs)).then(|| StandIn::start(setup))
}

/// Smallest staging for `workers`: most chunks, most copies. On the processor or the GPU
/// the calls of one worker are always the same.
fn in_small_pieces(quantize_on: QuantizeOn, workers: usize) -> LoadOptions<'static> {
    LoadOptions::default()
        .with_threads(workers)
        .with_staging_bytes(3 * (64 << 10) * workers as u64)
        .with_quantize_on(quantize_on)
}

/// Layers of 2.25 MiB in NF4, and 1 MiB outside them.
fn decoder(layers: u64) -> TempDir {
    let directory = TempDir::new().unwrap();
    models::write_decoder(directory.path(), layers, 512);
    directory
}

/// Name, type, bytes of an element, shape, format.
type Kind = (&'static str, &'static str, usize, &'static [u64], Format);

/// Tensors of several formats, most of them in several pieces. Those whose name another one continues
/// with `_scale` are codes of another method.
struct Kinds {
    directory: TempDir,
    checkpoint: Checkpoint,
    kinds: &'static [Kind],
}

impl Kinds {
    /// Every type and format.
    const ALL: &[Kind] = &[
        ("bf16", "BF16", 2, &[300, 570], Format::Stored),
        ("ids", "I64", 8, &[13], Format::Stored),
        ("narrower", "F32", 4, &[123, 457], Format::Cast(DType::Bf16)),
        ("wider", "F16", 2, &[123, 457], Format::Cast(DType::F32)),
        ("blocks of 64", "BF16", 2, &[517, 331], nf4(64, false)),
        ("blocks of 32", "F32", 4, &[64, 1031], nf4(32, false)),
        ("blocks of 4096", "F16", 2, &[257, 513], nf4(4096, false)),
        ("double", "BF16", 2, &[1025, 257], nf4(64, true)),
        ("many scales", "BF16", 2, &[4099, 1031], nf4(32, true)),
        ("empty", "BF16", 2, &[0, 64], nf4(64, true)),
        ("tiles", "F8_E4M3", 1, &[517, 331], nf4(64, false)),
        ("tiles_scale_inv", "F32", 4, &[5, 3], Format::Stored),
        ("rows", "F8_E5M2", 1, &[300, 1031], nf4(32, true)),
        ("rows_scale", "BF16", 2, &[300], Format::Stored),
    ];

    /// Everything that goes different ways, and little of it.
    const FEW: &[Kind] = &[
        ("bf16", "BF16", 2, &[300, 170], Format::Stored),
        ("blocks of 64", "BF16", 2, &[300, 330], nf4(64, false)),
        ("double", "BF16", 2, &[257, 257], nf4(64, true)),
        ("tiles", "F8_E4M3", 1, &[130, 330], nf4(64, false)),
        ("tiles_scale_inv", "F32", 4, &[2, 3], Format::Stored),
    ];

    fn new(kinds: &'static [Kind]) -> Kinds {
        Kinds::edited(kinds, |_, _| {})
    }

    /// With bytes of tensors changed by `edit`, which is given their names.
    fn edited(kinds: &'static [Kind], edit: impl Fn(&str, &mut [u8])) -> Kinds {
        let directory = TempDir::new().unwrap();
        let mut state = 1u64;
        let mut tensors = Vec::new();
        for &(name, dtype, width, shape, _) in kinds {
            let elements = shape.iter().product::<u64>() as usize;
            let mut bytes: Vec<u8> = (0..elements * width)
                .map(|index| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
                    let byte = (state >> 56) as u8;
                    // The last byte of a number has its sign and exponent: below 2, and finite.
                    if index % width == width - 1 {
                        byte & 0xbf
                    } else {
                        byte
                    }
                })
                .collect();
            edit(name, &mut bytes);
            tensors.push((name, dtype, shape, bytes));
        }
        let tensors: Vec<_> = tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| (*name, *dtype, *shape, &bytes[..]))
            .collect();
        let path = directory.path().join("model.safetensors");
        models::write_safetensors(&path, &tensors);
        Kinds {
            checkpoint: Checkpoint::open(directory.path()).unwrap(),
            directory,
            kinds,
        }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("model.safetensors")
    }

    /// Tensors go to the devices in turn.
    fn plan(&self, devices: &[Box<dyn Device>]) -> Plan {
        let infos: Vec<_> = devices.iter().map(|device| device.info()).collect();
        let tensors = self.checkpoint.tensors();
        let placements: Vec<Placement> = tensors
            .iter()
            .enumerate()
            .map(|(index, tensor)| Placement {
                device: Some((index % devices.len()) as u32),
                format: self
                    .kinds
                    .iter()
                    .find(|(name, ..)| *name == tensor.name)
                    .map(|&(.., format)| format)
                    .unwrap(),
            })
            .collect();
        Plan::new(tensors, &[], &infos, &placements, &vec![0; devices.len()])
            .unwrap_or_else(|error| panic!("{error}"))
    }

    /// Plans and loads, in the smallest pieces.
    fn load(
        &self,
        devices: &[Box<dyn Device>],
        quantize_on: QuantizeOn,
        workers: usize,
    ) -> Result<Model, LoadError> {
        let options = in_small_pieces(quantize_on, workers);
        self.load_with(devices, &options)
    }

    /// What the processor makes of them.
    fn on_the_processor(&self) -> Contents {
        let devices: [Box<dyn Device>; 1] = [Box::new(HostDevice::cpu(None))];
        contents(&self.load(&devices, QuantizeOn::Cpu, 1).unwrap())
    }

    fn load_with(
        &self,
        devices: &[Box<dyn Device>],
        options: &LoadOptions<'_>,
    ) -> Result<Model, LoadError> {
        load(&self.checkpoint, &self.plan(devices), devices, options)
    }
}

const fn nf4(block_size: usize, double_quantized: bool) -> Format {
    let Ok(block_size) = BlockSize::new(block_size) else {
        panic!("it is no block size");
    };
    Format::Nf4 {
        block_size,
        double_quantized,
    }
}

fn slices(names: &[String]) -> Vec<&str> {
    names.iter().map(String::as_str).collect()
}

/// A path that is there.
fn existing(path: &Path) -> &Path {
    assert!(path.exists(), "{}", path.display());
    path
}
