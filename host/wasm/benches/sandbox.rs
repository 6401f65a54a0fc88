//! What the sandbox costs: a call from guest to host, a call on a new instance, and the first plan
//! of a process, with compiling and out of the cache.
//!
//! `cargo bench -p tightfit-wasm --bench sandbox`

use std::error::Error;
use std::hint::black_box;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tightfit::checkpoint::Checkpoint;
use tightfit::device::{DeviceInfo, DeviceKind};
use tightfit::plan::{part_sizes, propose};
use tightfit::policy::{Policy, PolicyError, Request};
use tightfit::synth::{self, Preset};
use tightfit::types::{DType, Format};
use tightfit_wasm::policy::{BUILTIN_POLICIES, WasmPolicy};
use tightfit_wasm::sandbox::{Cache, SandboxOptions};

const REPEATS: usize = 301;
const PROCESSES: usize = 15;
/// Few enough that a run of them is mostly not interrupted.
const CALLS: u64 = 2_000;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, first, cache, model] = &arguments[..]
        && first == "first"
    {
        return first_plans(Path::new(cache), Path::new(model));
    }
    let directory = tempfile::tempdir()?;
    let (cache, model) = (
        directory.path().join("cache"),
        directory.path().join("model"),
    );
    let options = synth::SynthOptions::default().with_headers_only(true);
    let preset = "qwen2.5-7b".parse::<Preset>()?;
    synth::write(preset, &model, &options)?;

    let [idle, calling] = [0, CALLS].map(|calls| {
        let policy = WasmPolicy::new("bench", &calling_host(calls), SandboxOptions::default());
        policy.unwrap_or_else(|error| panic!("{error}"))
    });
    let request = Request {
        config_json: "{}",
        tensors: &[],
        ties: &[],
        devices: &[],
        settings: &[],
        required_formats: &[],
        failure: None,
    };
    let plan = |policy: &WasmPolicy| -> Result<f64, PolicyError> {
        let mut times = Vec::new();
        for _ in 0..REPEATS {
            let start = Instant::now();
            policy.plan(&request)?;
            times.push(start.elapsed());
        }
        Ok(median(&mut times))
    };
    let shape = [4096, 4096];
    let format = Format::NF4;
    let mut arithmetic = Vec::new();
    for _ in 0..REPEATS {
        let start = Instant::now();
        for _ in 0..CALLS {
            black_box(part_sizes(DType::Bf16, black_box(&shape), format))?;
        }
        arithmetic.push(start.elapsed());
    }
    let (without, with) = (plan(&idle)?, plan(&calling)?);
    let call = (with - without) / CALLS as f64;
    let arithmetic = median(&mut arithmetic) / CALLS as f64;
    println!("medians of {REPEATS}");
    let what = "a call from guest to host (sizing)";
    println!("  {what:<44} {:>9.3} us", call * 1e6);
    let what = "  of it the arithmetic";
    println!("  {what:<44} {:>9.3} us", arithmetic * 1e6);
    let what = "an empty plan on a new instance, by hand";
    println!("  {what:<44} {:>9.1} us", without * 1e6);
    for name in BUILTIN_POLICIES {
        let policy =
            WasmPolicy::builtin(name, SandboxOptions::default()).expect("it is built in")?;
        let mut times = Vec::new();
        for _ in 0..REPEATS {
            let start = Instant::now();
            policy.describe()?;
            times.push(start.elapsed());
        }
        let new = format!("describe on a new instance, {name}");
        println!("  {new:<44} {:>9.1} us", median(&mut times) * 1e6);
    }

    // Each of them in processes of their own; the first of all compiles and fills the cache.
    let mut firsts = vec![Vec::new(); BUILTIN_POLICIES.len()];
    let mut compiled = Vec::new();
    for process in 0..=PROCESSES {
        let output = Command::new(std::env::current_exe()?)
            .arg("first")
            .args([&cache, &model])
            .output()?;
        let text = String::from_utf8(output.stdout)?;
        let seconds = text
            .lines()
            .map(str::parse)
            .collect::<Result<Vec<f64>, _>>()?;
        if seconds.len() != firsts.len() {
            return Err(String::from_utf8_lossy(&output.stderr).into());
        }
        match process {
            0 => compiled = seconds,
            _ => (firsts.iter_mut().zip(seconds))
                .for_each(|(first, seconds)| first.push(Duration::from_secs_f64(seconds))),
        }
    }
    for ((name, first), compiled) in BUILTIN_POLICIES.iter().zip(&mut firsts).zip(compiled) {
        println!(
            "  {:<44} {:>9.2} ms  (compiled: {:.0} ms)",
            format!("first plan, cached, {name}"),
            median(first) * 1e3,
            compiled * 1e3
        );
    }
    Ok(())
}

/// Opens each built-in policy and has it plan, once. Prints the seconds that takes.
fn first_plans(cache: &Path, model: &Path) -> Result<(), Box<dyn Error>> {
    let checkpoint = Checkpoint::open(model)?;
    let device = DeviceInfo {
        name: "sim:0".to_owned(),
        kind: DeviceKind::Sim,
        capacity: 80 << 30,
        available: 80 << 30,
        granularity: 2 << 20,
    };
    for name in BUILTIN_POLICIES {
        let settings = match name {
            "map" => vec![("device-map".to_owned(), r#"{"":0}"#.to_owned())],
            _ => Vec::new(),
        };
        let start = Instant::now();
        let options = SandboxOptions::default()
            .with_cache(Some(Arc::new(Cache::open(cache, Cache::MOST_BYTES)?)));
        let policy = WasmPolicy::builtin(name, options).expect("it is built in")?;
        propose(
            &checkpoint,
            &policy,
            std::slice::from_ref(&device),
            &settings,
        )?;
        println!("{}", start.elapsed().as_secs_f64());
    }
    Ok(())
}

/// A policy that asks the host so often for the size of a matrix, and then proposes nothing.
fn calling_host(calls: u64) -> Vec<u8> {
    let text = format!(
        r#"(module
            (import "tightfit:host/sizing@0.1.0" "stored-bytes"
                (func $size (param i32 i32 i32 i32 i32 i32 i32)))
            (memory (export "memory") 1)
            (data (i32.const 64) "\00\10\00\00\00\00\00\00\00\10\00\00\00\00\00\00")
            (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) (i32.const 4096))
            (func (export "tightfit:host/planner@0.1.0#describe") (result i32) (i32.const 1024))
            (func (export "tightfit:host/planner@0.1.0#plan")
                (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i64 i64)
                (result i32) (local i64)
                (local.set 16 (i64.const {calls}))
                (block $done
                    (loop $next
                        (br_if $done (i64.eqz (local.get 16)))
                        (local.set 16 (i64.sub (local.get 16) (i64.const 1)))
                        (call $size (i32.const 16) (i32.const 64) (i32.const 2) (i32.const 2)
                            (i32.const 64) (i32.const 0) (i32.const 256))
                        (br $next)))
                (i32.const 128)))"#
    );
    wat::parse_str(&text).unwrap_or_else(|error| panic!("{error}"))
}

fn median(times: &mut [Duration]) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64()
}
