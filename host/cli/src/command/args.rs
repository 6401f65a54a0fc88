//! What can be typed.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use clap::{Args, ColorChoice, Parser, Subcommand};
use tightfit::checkpoint::Dequantize;
use tightfit::device::{DeviceSpec, RankedSpec};
use tightfit::load::QuantizeOn;
use tightfit::ranks::{Digest, Rendezvous};
use tightfit::synth::Preset;
use tightfit::types::Bytes;
use tightfit_kernels::{Isa, KernelError, Kernels};
use tightfit_wasm::sandbox::{self, Cache, CacheError, Compiler, CompilerProgram, Limits, Wasi};

use crate::command::amount::{parse_bytes, parse_device, parse_ranked_device};
use crate::command::error::CommandError;
use crate::command::session;

/// Loads Hugging Face checkpoints into 4-bit NF4 in exactly the memory the weights need.
///
/// MODEL is a directory, a .safetensors file, or a Hugging Face id (org/name), which is downloaded
/// unless it is in the local cache.
#[derive(Debug, Parser)]
#[command(name = "tightfit", version, max_term_width = 100)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,

    /// Show everything that policies log, not only warnings; and what holds in a check
    #[arg(long, short, global = true)]
    pub(crate) verbose: bool,

    /// When plans, loads and messages are in color: auto (on a terminal, unless NO_COLOR is set), always, or
    /// never
    #[arg(
        long,
        global = true,
        value_name = "WHEN",
        default_value = "auto",
        hide_possible_values = true
    )]
    color: ColorChoice,
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
    ///
    /// What belongs to the model is copied: *.json, *.txt, *.model, *.jinja, *.tiktoken and *.bpe beside the
    /// weights, up to 64 MiB each and 256 MiB in all, and folders (two deep) with such files and no weights of
    /// their own, or that modules.json names, these with their *.safetensors. What is left out of that is named
    /// in a warning. Nothing else is copied: no pickles, no code, nothing hidden, nothing behind links that lead
    /// out. What another method has quantized is written decoded, to 4 or 16 bits, or all as it is
    /// (--dequantize); what no single method would describe is refused.
    Save(SaveCommand),
    /// Run a program in wasm that loads models and works with them, sandboxed
    Run(RunOptions),
    /// Test policies: run scenario files, and judge what comes of them
    Check(CheckOptions),
    /// Look at policies
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// What devices there are
    Devices(DevicesOptions),
    /// Print what completes commands and options in a shell
    ///
    /// For bash: tightfit completions bash > ~/.local/share/bash-completion/completions/tightfit
    Completions(CompletionsOptions),
    /// Write manual pages, one for each command
    Man(ManOptions),
    /// Compile a policy for the process that started this one
    #[command(name = COMPILE, hide = true)]
    CompilePolicy,
}

impl Command {
    /// Whether the result is to be printed as JSON.
    pub(crate) fn json(&self) -> bool {
        match self {
            Command::Demo(options) => options.output.json,
            Command::Synth(options) => options.output.json,
            Command::Inspect(options) => options.output.json,
            Command::Plan(options) => options.output.json,
            Command::Load(options) => options.output.json,
            Command::Save(options) => options.output.json,
            Command::Run(options) => options.output.json,
            Command::Check(options) => options.json,
            Command::Policy(
                PolicyCommand::Show { output, .. } | PolicyCommand::List { output },
            ) => output.json,
            Command::Devices(options) => options.output.json,
            Command::Completions(_) | Command::Man(_) | Command::CompilePolicy => false,
        }
    }
}

/// `tightfit completions`.
#[derive(Debug, Args)]
pub(crate) struct CompletionsOptions {
    /// Which shell
    pub(crate) shell: clap_complete::Shell,
}

/// `tightfit man`.
#[derive(Debug, Args)]
pub(crate) struct ManOptions {
    /// Where to: a directory, made if it is not there
    pub(crate) directory: PathBuf,
}

/// What this program is started with to compile a policy.
const COMPILE: &str = "compile-policy";

/// What compiles policies of users, where that is not this program.
static COMPILER: OnceLock<CompilerProgram> = OnceLock::new();

/// Has policies of users compiled by another program than this one.
pub(crate) fn compile_with(compiler: CompilerProgram) {
    // The command sets it once, first of all.
    let _ = COMPILER.set(compiler);
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

    /// Weights in FP8, MXFP4, NVFP4 or int4 to be decoded to 16 bits as they are read, to be quantized or
    /// cast from there: auto (those for which NF4 takes less), all, or none (codes and scales are loaded
    /// as they are)
    #[arg(long, value_name = "WHICH", default_value = "auto", value_parser = parse_dequantize)]
    pub(crate) dequantize: Dequantize,
}

fn parse_dequantize(text: &str) -> Result<Dequantize, String> {
    let mut names = Dequantize::NAMES.into_iter();
    names
        .find_map(|(name, dequantize)| (name == text).then_some(dequantize))
        .ok_or_else(|| "it must be auto, all or none".to_owned())
}

/// Where tensors go.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct PlacementOptions {
    /// A device: cuda:0, cuda:0:20GiB, sim:32GiB (simulated, in host memory), cpu, cpu:16GiB.
    /// Repeatable; by default all CUDA devices, else cpu
    #[arg(long = "device", value_name = "SPEC", value_parser = parse_device)]
    pub(crate) devices: Vec<DeviceSpec>,

    #[command(flatten)]
    pub(crate) policy: PolicyOptions,
}

/// Where tensors go, of one process or several.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct RankedPlacementOptions {
    /// A device: cuda:0, cuda:0:20GiB, sim:32GiB (simulated, in host memory), cpu, cpu:16GiB. Among
    /// several processes 1/cuda:0 is of rank 1, cuda:0 one of every rank, and cuda the GPU with the number
    /// that a rank has on its machine. Repeatable; by default all CUDA devices, of a rank that one, else cpu
    #[arg(long = "device", value_name = "SPEC", value_parser = parse_ranked_device)]
    pub(crate) devices: Vec<RankedSpec>,

    #[command(flatten)]
    pub(crate) policy: PolicyOptions,

    #[command(flatten)]
    pub(crate) ranks: RankOptions,
}

/// Several processes that load one model together.
#[derive(Debug, Clone, Args)]
pub(crate) struct RankOptions {
    /// Which of several processes this is, from 0 [default: as torchrun, Slurm, Open MPI or MPICH say]
    #[arg(long, value_name = "R", requires = "world")]
    pub(crate) rank: Option<u32>,

    /// How many processes load the model together, each its share. 1: this one alone, whatever the
    /// environment says
    #[arg(long, value_name = "N")]
    pub(crate) world: Option<u32>,

    /// Where they meet: rank 0 listens there [default: MASTER_ADDR, the port after MASTER_PORT]
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) rendezvous: Option<Rendezvous>,

    /// How long ranks are waited for that do not come or say nothing, as while they download
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 60,
        value_parser = clap::value_parser!(u64).range(1..=86_400),
        hide_short_help = true
    )]
    pub(crate) rendezvous_timeout: u64,

    /// Refuse any other plan than the one with this digest, which plan and load report
    #[arg(long, value_name = "HEX")]
    pub(crate) digest: Option<Digest>,
}

impl Default for RankOptions {
    fn default() -> Self {
        RankOptions {
            rank: None,
            world: None,
            rendezvous: None,
            rendezvous_timeout: 60,
            digest: None,
        }
    }
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
    pub(crate) sandbox: SandboxOptions,
}

/// What a policy or a program may use, and how it is compiled.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct SandboxOptions {
    /// Give the policy or program more, or less, of something: fuel and fuel-per-tensor (instructions),
    /// deadline and compile-time (seconds), memory, host-call-bytes, component, function,
    /// compile-memory, compiled, log-bytes and text-bytes (bytes, for example 512MiB), memories,
    /// table-elements, tables, instances, modules, imports, handles, resources and settings (counts).
    /// Repeatable
    #[arg(long = "policy-limit", alias = "limit", value_name = "NAME=VALUE", value_parser = limit)]
    limits: Vec<(String, String)>,

    /// What a guest is given that asks for WASI: none (it is turned down), or empty (no files, no
    /// environment, no network, a clock that stands still)
    #[arg(long, value_name = "none|empty", default_value = "none", value_parser = wasi, hide_short_help = true)]
    wasi: Wasi,

    /// Neither use nor keep compiled guests in $XDG_CACHE_HOME/tightfit or ~/.cache/tightfit
    #[arg(long, hide_short_help = true)]
    no_cache: bool,
}

impl SandboxOptions {
    /// The default limits with what was asked for; what is given twice counts as given last. What
    /// users bring is compiled by this program, started once more.
    pub(crate) fn options(&self) -> Result<sandbox::SandboxOptions, CommandError> {
        self.options_from(Limits::default())
    }

    /// The same from other defaults.
    pub(crate) fn options_from(
        &self,
        mut limits: Limits,
    ) -> Result<sandbox::SandboxOptions, CommandError> {
        for (name, value) in &self.limits {
            let set = limits.set(name, value);
            debug_assert!(set.is_ok(), "checked as it was parsed");
        }
        let compiler = match COMPILER.get() {
            Some(compiler) => compiler.clone(),
            None => CompilerProgram::itself([COMPILE]).map_err(CommandError::NoCompiler)?,
        };
        Ok(sandbox::SandboxOptions::default()
            .with_limits(limits)
            .with_compiler(Compiler::Child(compiler))
            .with_cache(self.cache())
            .with_wasi(self.wasi)
            .with_cancel(session::interrupted()))
    }

    /// Without one everything works, and policies are compiled anew.
    fn cache(&self) -> Option<Arc<Cache>> {
        if self.no_cache {
            return None;
        }
        match Cache::open(&Cache::default_path()?, Cache::MOST_BYTES) {
            Ok(cache) => Some(Arc::new(cache)),
            Err(error @ CacheError::NotPrivate { .. }) => {
                tracing::warn!("{error}");
                None
            }
            Err(error) => {
                tracing::debug!("{error}");
                None
            }
        }
    }
}

impl Default for PolicyOptions {
    fn default() -> Self {
        PolicyOptions {
            policy: "auto".to_owned(),
            settings: Vec::new(),
            sandbox: SandboxOptions::default(),
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

    /// Quantize with this instruction set (portable, avx2, avx512, neon) instead of the best one
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
    /// Where weights for GPUs are quantized: cpu, gpu, or auto: 16 and 32 bits by the processor where there are
    /// eight threads or more, else by what is measured while loading
    #[arg(long, value_name = "WHERE", default_value_t)]
    pub(crate) quantize_on: QuantizeOn,
    #[command(flatten)]
    pub(crate) output: OutputOptions,
}

#[derive(Debug, Args)]
pub(crate) struct SynthOptions {
    /// Which model's shape
    #[arg(value_parser = presets())]
    pub(crate) preset: Preset,
    /// Where to: an empty directory, or one that does not exist yet
    pub(crate) directory: PathBuf,
    /// Sparse files of full length that cost no disk; every weight reads as zero
    #[arg(long)]
    pub(crate) headers_only: bool,
    /// Only the first N layers, to try what is too large as a whole [default: all]
    #[arg(long, value_name = "N")]
    pub(crate) layers: Option<u64>,
    /// Seed of the weights
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    #[command(flatten)]
    pub(crate) output: OutputOptions,
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
    pub(crate) placement: RankedPlacementOptions,
    #[command(flatten)]
    pub(crate) output: OutputOptions,
    /// List every tensor's device, format and bytes
    #[arg(long)]
    pub(crate) placements: bool,
    /// Draw the plan into this file, as SVG; - is standard output, in place of the report
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
    pub(crate) placement: RankedPlacementOptions,
    #[command(flatten)]
    pub(crate) engine: EngineOptions,
    /// Where weights for GPUs are quantized: cpu, gpu, or auto: 16 and 32 bits by the processor where there are
    /// eight threads or more, else by what is measured while loading
    #[arg(long, value_name = "WHERE", default_value_t)]
    pub(crate) quantize_on: QuantizeOn,
    #[command(flatten)]
    pub(crate) output: OutputOptions,
    /// List every tensor's device, format and bytes
    #[arg(long)]
    pub(crate) placements: bool,
    /// Draw what was reserved and written on each device over time, with the plan as a line
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) timeline: Option<PathBuf>,
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
pub(crate) struct RunOptions {
    /// The program, a wasm file
    #[arg(value_name = "PROGRAM.wasm")]
    pub(crate) program: PathBuf,
    /// What the program is given, as it is
    pub(crate) arguments: Vec<String>,

    /// Let the program open the checkpoint at PATH (a directory, a .safetensors file or an index) under
    /// this name; it has no other files. Repeatable
    #[arg(long = "grant", value_name = "NAME=PATH", value_parser = grant)]
    pub(crate) grants: Vec<(String, PathBuf)>,

    /// A device that the program may use, as for `tightfit plan`. Repeatable; by default all CUDA
    /// devices, else cpu
    #[arg(long = "device", value_name = "SPEC", value_parser = parse_device)]
    pub(crate) devices: Vec<DeviceSpec>,

    /// The most that the program may reserve on all devices together, for example 8GiB [default: all
    /// that is free on them]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub(crate) quota: Option<u64>,

    #[command(flatten)]
    pub(crate) sandbox: SandboxOptions,

    /// Worker threads for loading; by default one per core
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,

    /// Host memory for staging in all while loading, for example 64MiB
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub(crate) staging: Option<u64>,

    #[command(flatten)]
    pub(crate) output: OutputOptions,
}

#[derive(Debug, Args)]
pub(crate) struct CheckOptions {
    /// Scenario files (TOML); paths in them are relative to the file
    #[arg(required = true, value_name = "SCENARIO.toml")]
    pub(crate) files: Vec<PathBuf>,
    /// Write a JUnit report too, to this file; - is standard output, in place of the report
    #[arg(long, value_name = "FILE")]
    pub(crate) junit: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) sandbox: SandboxOptions,
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
        sandbox: SandboxOptions,
        #[command(flatten)]
        output: OutputOptions,
    },
    /// The built-in policies
    List {
        #[command(flatten)]
        output: OutputOptions,
    },
}

#[derive(Debug, Args)]
pub(crate) struct DevicesOptions {
    /// Devices to look at; by default all there are
    #[arg(long = "device", value_name = "SPEC", value_parser = parse_device)]
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

fn grant(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = pair(text).ok_or("expected NAME=PATH")?;
    Ok((name.to_owned(), path.into()))
}

fn limit(text: &str) -> Result<(String, String), String> {
    let (name, value) = pair(text).ok_or("expected NAME=VALUE")?;
    let checked = Limits::default().set(name, value);
    checked.map_err(|error| error.to_string())?;
    Ok((name.to_owned(), value.to_owned()))
}

fn wasi(text: &str) -> Result<Wasi, String> {
    match text {
        "none" => Ok(Wasi::None),
        "empty" => Ok(Wasi::Empty),
        _ => Err("it is none or empty".to_owned()),
    }
}

fn pair(text: &str) -> Option<(&str, &str)> {
    text.split_once('=').filter(|(key, _)| !key.is_empty())
}

/// The names of all presets, which help lists.
fn presets() -> impl clap::builder::TypedValueParser<Value = Preset> {
    use clap::builder::{PossibleValuesParser, TypedValueParser};
    let names = Preset::all().iter().map(|preset| preset.name());
    PossibleValuesParser::new(names).try_map(|name| name.parse::<Preset>())
}

fn isa(text: &str) -> Result<Isa, String> {
    Isa::ALL
        .into_iter()
        .find(|isa| isa.to_string() == text)
        .ok_or_else(|| "it is portable, avx2, avx512 or neon".to_owned())
}
