//! Loading onto GPUs against only copying the same bytes there from page-locked memory, in one run.
//!
//! `cargo bench -p tightfit-wasm --bench load_gpu [-- DIR] [--device cuda:0,cuda:1] [--threads 8,16]
//! [--formats nf4,double,stored]`; without DIR it writes a checkpoint of Qwen2.5-7B's shape (15.2 GB) to the temporary
//! directory. Has to fit into the page cache.
//!
//! Every combination of threads and of who quantizes is loaded in turn, seven times. Prints medians, also of the copy,
//! and what the plan has reserved.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use tightfit::checkpoint::Checkpoint;
use tightfit::device::{Device, DeviceSpec, Piece, WRITER_BUFFERS, open_devices};
use tightfit::load::{LoadOptions, QuantizeOn, load};
use tightfit::memory::ReservationSize;
use tightfit::plan::{Plan, propose};
use tightfit::synth::{self, Preset, SynthOptions};
use tightfit_wasm::policy::WasmPolicy;
use tightfit_wasm::sandbox::Limits;

const REPEATS: usize = 7;
const PLACES: [QuantizeOn; 3] = [QuantizeOn::Cpu, QuantizeOn::Gpu, QuantizeOn::Auto];
/// What is copied at once.
const BUFFER: usize = 16 << 20;

type Failure = Box<dyn std::error::Error>;

struct Arguments {
    directory: Option<PathBuf>,
    devices: Vec<DeviceSpec>,
    threads: Vec<usize>,
    formats: Vec<String>,
}

impl Arguments {
    fn parse() -> Result<Arguments, Failure> {
        let mut arguments = Arguments {
            directory: None,
            devices: vec!["cuda:0".parse()?],
            threads: vec![std::thread::available_parallelism()?.get()],
            formats: vec!["nf4".to_owned(), "double".to_owned()],
        };
        let mut given = std::env::args().skip(1);
        while let Some(argument) = given.next() {
            let mut value = || given.next().ok_or(format!("{argument} needs a value"));
            match &argument[..] {
                "--bench" => {}
                "--device" => {
                    let specs = value()?;
                    arguments.devices =
                        specs.split(',').map(str::parse).collect::<Result<_, _>>()?;
                }
                "--threads" => {
                    let counts = value()?;
                    arguments.threads = counts
                        .split(',')
                        .map(str::parse)
                        .collect::<Result<_, _>>()?;
                }
                "--formats" => {
                    arguments.formats = value()?.split(',').map(str::to_owned).collect();
                }
                _ => arguments.directory = Some(argument.into()),
            }
        }
        Ok(arguments)
    }
}

fn main() -> Result<(), Failure> {
    let arguments = Arguments::parse()?;
    let directory = tempfile::tempdir()?;
    let path = match arguments.directory {
        Some(path) => path,
        None => {
            let path = directory.path().join("model");
            let options = SynthOptions::default();
            synth::write(Preset::Qwen25_7b, &path, &options)?;
            path
        }
    };
    let checkpoint = Checkpoint::open(&path)?;
    let devices = match open_devices(&arguments.devices) {
        Ok(devices) => devices,
        Err(error) => {
            println!("not run: {error}");
            return Ok(());
        }
    };
    let infos: Vec<_> = devices.iter().map(|device| device.info()).collect();
    let names: Vec<_> = infos.iter().map(|info| info.name.clone()).collect();
    let policy = WasmPolicy::builtin("auto", Limits::default()).expect("auto is built in")?;
    println!(
        "{}: {:.3} GB onto {}, medians of {REPEATS}",
        path.display(),
        checkpoint.source_bytes() as f64 / 1e9,
        names.join(" and ")
    );
    for format in &arguments.formats {
        let settings = match &format[..] {
            "nf4" => vec![("double-quant".to_owned(), "false".to_owned())],
            "double" => vec![("double-quant".to_owned(), "true".to_owned())],
            "stored" => vec![("skip".to_owned(), "*".to_owned())],
            other => return Err(format!("'{other}' is none of nf4, double and stored").into()),
        };
        let plan = propose(&checkpoint, &policy, &infos, &settings)?.plan;
        println!("\n{format}");
        measure(&checkpoint, &plan, &devices, &arguments.threads)?;
    }
    Ok(())
}

fn measure(
    checkpoint: &Checkpoint,
    plan: &Plan,
    devices: &[Box<dyn Device>],
    threads: &[usize],
) -> Result<(), Failure> {
    let bytes = checkpoint.source_bytes();
    // Brings the checkpoint into the page cache.
    run(checkpoint, plan, devices, QuantizeOn::Cpu, threads[0])?;
    let first = run(checkpoint, plan, devices, QuantizeOn::Gpu, threads[0])?;
    println!("  first on gpu {:>8.1} ms", first.seconds * 1e3);
    let ways: Vec<(usize, QuantizeOn)> = threads
        .iter()
        .flat_map(|&threads| PLACES.map(|place| (threads, place)))
        .collect();
    // Interleaved, so that a noisy neighbour disturbs all of them alike.
    let mut copies = Vec::new();
    let mut times = vec![Vec::new(); ways.len()];
    let mut by_device = vec![0.0; ways.len()];
    for _ in 0..REPEATS {
        copies.push(copy(devices, bytes)?.as_secs_f64());
        for (index, &(threads, place)) in ways.iter().enumerate() {
            let run = run(checkpoint, plan, devices, place, threads)?;
            times[index].push(run.seconds);
            by_device[index] = run.by_device;
        }
    }
    let copy = median(&mut copies);
    println!(
        "  {:<15} {:>8.1} ms  {:>6.2} GB/s",
        "copy",
        copy * 1e3,
        bytes as f64 / 1e9 / copy,
    );
    for (((threads, place), times), by_device) in ways.iter().zip(&mut times).zip(by_device) {
        let seconds = median(times);
        println!(
            "  {threads:>2} threads, {place:<4} {:>8.1} ms  {:>6.2} GB/s  {:.2} x the time of the copy ({:.1} to {:.1}), {:.0} % by the GPU",
            seconds * 1e3,
            bytes as f64 / 1e9 / seconds,
            seconds / copy,
            times[0] * 1e3,
            times[times.len() - 1] * 1e3,
            100.0 * by_device,
        );
    }
    for (device, planned) in devices.iter().zip(&plan.devices) {
        let peak = device.usage().reserved.peak;
        println!(
            "  {}: peak reserved so far {peak}, planned {}",
            planned.device.name, planned.size.reserved
        );
    }
    Ok(())
}

struct Loaded {
    seconds: f64,
    /// The GPUs' share of what was quantized.
    by_device: f64,
}

fn run(
    checkpoint: &Checkpoint,
    plan: &Plan,
    devices: &[Box<dyn Device>],
    quantize_on: QuantizeOn,
    threads: usize,
) -> Result<Loaded, Failure> {
    let options = LoadOptions::default()
        .with_quantize_on(quantize_on)
        .with_threads(threads);
    let start = Instant::now();
    let model = load(checkpoint, plan, devices, &options)?;
    let seconds = start.elapsed().as_secs_f64();
    let quantized = &model.stats().quantized_on;
    let by_host: u64 = quantized.iter().map(|bytes| bytes.by_host).sum();
    let by_device: u64 = quantized.iter().map(|bytes| bytes.by_device).sum();
    Ok(Loaded {
        seconds,
        by_device: by_device as f64 / (by_host + by_device).max(1) as f64,
    })
}

/// Copies as many bytes in all from page-locked memory to the devices, each an equal part at the same time,
/// again and again to the same place.
fn copy(devices: &[Box<dyn Device>], bytes: u64) -> Result<Duration, Failure> {
    let mut memory = Vec::new();
    for device in devices {
        let granularity = device.info().granularity;
        memory.push(device.reserve(ReservationSize {
            requested: BUFFER as u64,
            padded: BUFFER as u64,
            reserved: (BUFFER as u64).next_multiple_of(granularity),
        })?);
    }
    let mut writers = Vec::new();
    for memory in &memory {
        let buffers = memory.page_lock(WRITER_BUFFERS * BUFFER)?;
        let writer = buffers.map_or(Ok(None), |buffers| memory.writer(buffers))?;
        writers.push(writer.expect("the processor cannot write it"));
    }
    // Locked pages are there from their first use on.
    for writer in &mut writers {
        for _ in 0..WRITER_BUFFERS {
            writer.stage()?;
            writer.write(&[piece(BUFFER)])?;
        }
        writer.finish()?;
    }
    let start = Instant::now();
    let mut left = bytes;
    while left > 0 {
        for writer in &mut writers {
            let len = left.min(BUFFER as u64) as usize;
            writer.stage()?;
            writer.write(&[piece(len)])?;
            left -= len as u64;
        }
    }
    for writer in &mut writers {
        writer.finish()?;
    }
    Ok(start.elapsed())
}

fn piece(len: usize) -> Piece {
    Piece {
        start: 0,
        len,
        offset: 0,
    }
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
