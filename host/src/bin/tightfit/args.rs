//! What can be typed.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use tightfit::device::DeviceSpec;
use tightfit::load::QuantizeOn;
use tightfit::policy::Limits;
use tightfit::types::{Bytes, parse_bytes};
use tightfit_kernels::{Isa, KernelError, Kernels};

/// Loads Hugging Face checkpoints into 4-bit NF4 in exactly the memory the weights need.
///
/// MODEL is a directory, a .safetensors file, or a Hugging Face id (org/name), which is downloaded
/// unless it is in the local cache. Exit status: 0 done, 2 usage, 3 checkpoint invalid, unreadable or not to be had, 4 does not fit or
/// refused by the policy, 5 the policy itself failed, 6 device failure, 130 interrupted.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,

    /// Show everything that policies log, not only warnings; and what holds in a check
    #[arg(long, short, global = true)]
    pub(crate) verbose: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// A whole run on a model that it makes itself, in under a minute
    Demo(DemoOptions),
    /// Write a checkpoint of real shape with seeded random weights
    Synth(SynthOptions),
    /// What is in a checkpoint, and what would be quantized
    Inspect(InspectOptions),
    /// Where everything would go, to the byte, for devices you need not have
    Plan(PlanOptions),
    /// Load a checkpoint and report
    Load(LoadOptions),
    /// Quantize a checkpoint and write it, as bitsandbytes and transformers read it
    Save(SaveCommand),
    /// Test policies: run scenario files, and judge what comes of them
    ///
    /// Exit status: 0 every expectation holds, 1 some do not or a scenario could not be run,
    /// 2 usage or a scenario file that makes no sense (nothing is run then), 130 interrupted.
    Check(CheckOptions),
    /// Look at policies
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// What devices there are
    Devices(DevicesOptions),
}

/// What to open.
#[derive(Debug, Clone, Args)]
pub(crate) struct ModelOptions {
    /// A directory, a .safetensors file, or a Hugging Face id
    pub(crate) model: String,

    /// Branch, tag or commit of a Hugging Face id [default: main]
    #[arg(long, value_name = "REV")]
    pub(crate) revision: Option<String>,

    /// Download nothing, as with HF_HUB_OFFLINE=1
    #[arg(long)]
    pub(crate) offline: bool,
}

/// Where tensors go.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct PlacementOptions {
    /// A device: cuda:0, cuda:0:20GiB, sim:32GiB (simulated, in host memory), cpu, cpu:16GiB.
    /// Repeatable; by default all CUDA devices, else cpu
    #[arg(long = "device", value_name = "SPEC")]
    pub(crate) devices: Vec<DeviceSpec>,

    #[command(flatten)]
    pub(crate) policy: PolicyOptions,
}

/// Who decides.
#[derive(Debug, Clone, Args)]
pub(crate) struct PolicyOptions {
    /// A built-in policy, or a wasm file
    #[arg(long, value_name = "NAME|FILE.wasm", default_value = "auto")]
    pub(crate) policy: String,

    /// A setting of the policy, as `tightfit policy show` lists them. With KEY=@FILE the value is
    /// what the file holds; a value that begins with @ is written @@. Repeatable
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = key_value)]
    pub(crate) settings: Vec<(String, String)>,

    #[command(flatten)]
    pub(crate) limits: LimitOptions,
}

/// How much a policy may use.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct LimitOptions {
    /// Give the policy more, or less, of something: fuel and fuel-per-tensor (instructions),
    /// deadline (seconds), memory, host-call-bytes, component, function (bytes, for example
    /// 512MiB), table-elements. Repeatable
    #[arg(long = "policy-limit", value_name = "NAME=VALUE", value_parser = limit)]
    limits: Vec<(String, String)>,
}

impl LimitOptions {
    /// The default limits with what was asked for; what is given twice counts as given last.
    pub(crate) fn limits(&self) -> Limits {
        let mut limits = Limits::default();
        for (name, value) in &self.limits {
            let set = limits.set(name, value);
            debug_assert!(set.is_ok(), "checked as it was parsed");
        }
        limits
    }
}

impl Default for PolicyOptions {
    fn default() -> Self {
        PolicyOptions {
            policy: "auto".to_owned(),
            settings: Vec::new(),
            limits: LimitOptions::default(),
        }
    }
}

/// How results are printed.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct OutputOptions {
    /// Print the result as JSON, sizes in bytes
    #[arg(long)]
    pub(crate) json: bool,

    /// No progress, no table: only errors and what --json prints
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

/// How loading is done.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct EngineOptions {
    /// Worker threads; by default one per core
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,

    /// Host memory for staging in all, for example 64MiB
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub(crate) staging: Option<u64>,

    /// Fail when a tensor to be quantized has infinities or NaN
    #[arg(long)]
    pub(crate) strict: bool,

    /// Quantize with this instruction set (portable, avx2, avx512) instead of the best one
    #[arg(long, value_name = "ISA", value_parser = isa, hide_short_help = true)]
    pub(crate) isa: Option<Isa>,
}

impl EngineOptions {
    /// The kernels that were asked for, or the best ones.
    pub(crate) fn kernels(&self) -> Result<Kernels, KernelError> {
        self.isa.map_or_else(|| Ok(Kernels::detect()), Kernels::new)
    }
}

#[derive(Debug, Args)]
pub(crate) struct DemoOptions {
    #[command(flatten)]
    pub(crate) placement: PlacementOptions,
    #[command(flatten)]
    pub(crate) engine: EngineOptions,
    /// Where weights for GPUs are quantized: cpu, gpu, or auto, by what is measured while loading
    #[arg(long, value_name = "WHERE", default_value_t)]
    pub(crate) quantize_on: QuantizeOn,
    #[command(flatten)]
    pub(crate) output: OutputOptions,
}

#[derive(Debug, Args)]
pub(crate) struct SynthOptions {
    /// Which model's shape
    pub(crate) preset: String,
    /// Where to: an empty directory, or one that does not exist yet
    pub(crate) directory: PathBuf,
    /// Sparse files of full length that cost no disk; every weight reads as zero
    #[arg(long)]
    pub(crate) headers_only: bool,
    /// Seed of the weights
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// No progress, no summary
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct InspectOptions {
    #[command(flatten)]
    pub(crate) model: ModelOptions,
    #[command(flatten)]
    pub(crate) policy: PolicyOptions,
    #[command(flatten)]
    pub(crate) output: OutputOptions,
}

#[derive(Debug, Args)]
pub(crate) struct PlanOptions {
    #[command(flatten)]
    pub(crate) model: ModelOptions,
    #[command(flatten)]
    pub(crate) placement: PlacementOptions,
    #[command(flatten)]
    pub(crate) output: OutputOptions,
    /// List every tensor's device, format and bytes
    #[arg(long)]
    pub(crate) placements: bool,
    /// Draw the plan into this file
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
    /// Compare what two policies do. --set goes to those that have the setting, --set A.KEY=VALUE
    /// or B.KEY=VALUE to one of them
    #[arg(
        long,
        num_args = 2,
        value_names = ["A", "B"],
        conflicts_with_all = ["policy", "placements", "svg"]
    )]
    pub(crate) diff: Option<Vec<String>>,
    /// Host memory for staging in all, for example 64MiB
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub(crate) staging: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct LoadOptions {
    #[command(flatten)]
    pub(crate) model: ModelOptions,
    #[command(flatten)]
    pub(crate) placement: PlacementOptions,
    #[command(flatten)]
    pub(crate) engine: EngineOptions,
    /// Where weights for GPUs are quantized: cpu, gpu, or auto, by what is measured while loading
    #[arg(long, value_name = "WHERE", default_value_t)]
    pub(crate) quantize_on: QuantizeOn,
    #[command(flatten)]
    pub(crate) output: OutputOptions,
    /// List every tensor's device, format and bytes
    #[arg(long)]
    pub(crate) placements: bool,
    /// Write the quantized checkpoint too, to this directory
    #[arg(long, value_name = "DIR")]
    pub(crate) save: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) write: WriteOptions,
}

/// How a checkpoint is written.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct WriteOptions {
    /// Close a file when the next weight would make it larger than this [default: 5GB]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub(crate) max_shard_size: Option<u64>,

    /// Replace what is there
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SaveCommand {
    #[command(flatten)]
    pub(crate) model: ModelOptions,
    /// Where to: appears when it is complete
    pub(crate) directory: PathBuf,
    #[command(flatten)]
    pub(crate) policy: PolicyOptions,
    #[command(flatten)]
    pub(crate) engine: EngineOptions,
    #[command(flatten)]
    pub(crate) write: WriteOptions,
    #[command(flatten)]
    pub(crate) output: OutputOptions,
}

#[derive(Debug, Args)]
pub(crate) struct CheckOptions {
    /// Scenario files (TOML); paths in them are relative to the file
    #[arg(required = true, value_name = "SCENARIO.toml")]
    pub(crate) files: Vec<PathBuf>,
    /// Write a JUnit report too, to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) junit: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) limits: LimitOptions,
    /// Print the result as JSON, sizes in bytes
    #[arg(long)]
    pub(crate) json: bool,
    /// Print only what does not hold
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Name, version, settings and imports of a policy
    Show {
        /// A built-in policy, or a wasm file
        policy: String,
        #[command(flatten)]
        limits: LimitOptions,
        #[command(flatten)]
        output: OutputOptions,
    },
    /// The built-in policies
    List,
}

#[derive(Debug, Args)]
pub(crate) struct DevicesOptions {
    /// Devices to look at; by default all there are
    #[arg(long = "device", value_name = "SPEC")]
    pub(crate) devices: Vec<DeviceSpec>,
    #[command(flatten)]
    pub(crate) output: OutputOptions,
}

/// Bytes of a file that holds a setting: a device map of 100,000 tensors fits several times.
const MOST_SETTING_BYTES: u64 = 16 << 20;

/// A setting, whose value may be in a file.
fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = pair(text).ok_or("expected KEY=VALUE or KEY=@FILE")?;
    let value = match value.strip_prefix('@') {
        None => value.to_owned(),
        Some(literal) if literal.starts_with('@') => literal.to_owned(),
        Some(file) => {
            setting_in(file).map_err(|why| format!("cannot take it from '{file}': {why}"))?
        }
    };
    Ok((key.to_owned(), value))
}

/// What a file holds. It may be a pipe, so only reading tells how long it is.
fn setting_in(file: &str) -> Result<String, String> {
    let mut bytes = Vec::new();
    File::open(file)
        .and_then(|file| file.take(MOST_SETTING_BYTES + 1).read_to_end(&mut bytes))
        .map_err(|error| error.to_string())?;
    if bytes.len() as u64 > MOST_SETTING_BYTES {
        return Err(format!("it is longer than {}", Bytes(MOST_SETTING_BYTES)));
    }
    String::from_utf8(bytes).map_err(|error| format!("it is not UTF-8 text ({error})"))
}

fn limit(text: &str) -> Result<(String, String), String> {
    let (name, value) = pair(text).ok_or("expected NAME=VALUE")?;
    let checked = Limits::default().set(name, value);
    checked.map_err(|error| error.to_string())?;
    Ok((name.to_owned(), value.to_owned()))
}

fn pair(text: &str) -> Option<(&str, &str)> {
    text.split_once('=').filter(|(key, _)| !key.is_empty())
}

fn isa(text: &str) -> Result<Isa, String> {
    [Isa::Portable, Isa::Avx2, Isa::Avx512]
        .into_iter()
        .find(|isa| isa.to_string() == text)
        .ok_or_else(|| "it is portable, avx2 or avx512".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definitions_are_consistent() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }
}
