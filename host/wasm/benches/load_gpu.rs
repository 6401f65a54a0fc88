//! Loading onto a GPU against only copying the same bytes there from page-locked memory, in one run.
//!
//! `cargo bench -p tightfit-wasm --bench load_gpu [-- DIR]`; without DIR it writes a checkpoint of
//! Qwen2.5-7B's shape (15.2 GB) to the temporary directory. Has to fit into the page cache.
//!
//! Prints the time of the first load that the GPU quantizes, in which the driver compiles the kernels
//! unless it remembers them, and then medians of loads that are interleaved.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use tightfit::checkpoint::Checkpoint;
use tightfit::device::{Device, Piece, WRITER_BUFFERS, open_devices};
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

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let given = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with('-'));
    let directory = tempfile::tempdir()?;
    let path = match given {
        Some(path) => PathBuf::from(path),
        None => {
            let path = directory.path().join("model");
            let options = SynthOptions::default();
            synth::write(Preset::Qwen25_7b, &path, &options)?;
            path
        }
    };
    let checkpoint = Checkpoint::open(&path)?;
    let devices = match open_devices(&["cuda:0".parse()?]) {
        Ok(devices) => devices,
        Err(error) => {
            println!("not run: {error}");
            return Ok(());
        }
    };
    let infos: Vec<_> = devices.iter().map(|device| device.info()).collect();
    let policy = WasmPolicy::builtin("auto", Limits::default()).expect("auto is built in")?;
    let bytes = checkpoint.source_bytes();
    let threads = std::thread::available_parallelism()?.get();
    println!(
        "{}: {:.3} GB, {threads} threads, medians of {REPEATS}",
        path.display(),
        bytes as f64 / 1e9
    );
    for double in [false, true] {
        let settings = [("double-quant".to_owned(), double.to_string())];
        let plan = propose(&checkpoint, &policy, &infos, &settings)?.plan;
        measure(&checkpoint, &plan, &devices, bytes)?;
    }
    Ok(())
}

fn measure(
    checkpoint: &Checkpoint,
    plan: &Plan,
    devices: &[Box<dyn Device>],
    bytes: u64,
) -> Result<(), Box<dyn std::error::Error>> {
    let planned = plan.devices[0].size.reserved;
    println!(
        "\n{}",
        if plan.scratch_budget() > 0 {
            "nf4+double"
        } else {
            "nf4"
        }
    );
    // Brings the checkpoint into the page cache.
    run(checkpoint, plan, devices, QuantizeOn::Cpu)?;
    let first = run(checkpoint, plan, devices, QuantizeOn::Gpu)?;
    println!("  first on gpu {:>8.1} ms", first.seconds * 1e3);
    // Interleaved, so that a noisy neighbour disturbs all of them alike.
    let mut times = vec![Vec::new(); PLACES.len() + 1];
    let mut by_device = [0.0; PLACES.len()];
    for _ in 0..REPEATS {
        times[0].push(copy(&*devices[0], bytes)?.as_secs_f64());
        for (index, place) in PLACES.into_iter().enumerate() {
            let run = run(checkpoint, plan, devices, place)?;
            times[index + 1].push(run.seconds);
            by_device[index] = run.by_device;
        }
    }
    let medians: Vec<f64> = times.iter_mut().map(|times| median(times)).collect();
    println!(
        "  {:<12} {:>8.1} ms  {:>6.2} GB/s",
        "copy",
        medians[0] * 1e3,
        bytes as f64 / 1e9 / medians[0],
    );
    for ((place, seconds), by_device) in PLACES.iter().zip(&medians[1..]).zip(by_device) {
        println!(
            "  {:<12} {:>8.1} ms  {:>6.2} GB/s  {:.2} x the time of the copy, {:.0} % by the GPU",
            place.to_string(),
            seconds * 1e3,
            bytes as f64 / 1e9 / seconds,
            seconds / medians[0],
            100.0 * by_device,
        );
    }
    let peak = devices[0].usage().reserved.peak;
    println!("  peak reserved so far {peak}, planned {planned}");
    Ok(())
}

struct Loaded {
    seconds: f64,
    /// The GPU's share of what was quantized.
    by_device: f64,
}

fn run(
    checkpoint: &Checkpoint,
    plan: &Plan,
    devices: &[Box<dyn Device>],
    quantize_on: QuantizeOn,
) -> Result<Loaded, Box<dyn std::error::Error>> {
    let options = LoadOptions::default().with_quantize_on(quantize_on);
    let start = Instant::now();
    let model = load(checkpoint, plan, devices, &options)?;
    let seconds = start.elapsed().as_secs_f64();
    let quantized = model.stats().quantized_on[0];
    let all = quantized.by_host + quantized.by_device;
    Ok(Loaded {
        seconds,
        by_device: quantized.by_device as f64 / all.max(1) as f64,
    })
}

/// Copies as many bytes from page-locked memory to the device, again and again to the same place.
fn copy(device: &dyn Device, bytes: u64) -> Result<Duration, Box<dyn std::error::Error>> {
    let granularity = device.info().granularity;
    let reserved = (BUFFER as u64).next_multiple_of(granularity);
    let memory = device.reserve(ReservationSize {
        requested: BUFFER as u64,
        padded: BUFFER as u64,
        reserved,
    })?;
    let buffers = memory.page_lock(WRITER_BUFFERS * BUFFER)?;
    let writer = buffers.map_or(Ok(None), |buffers| memory.writer(buffers))?;
    let mut writer = writer.expect("the processor cannot write it");
    let start = Instant::now();
    let mut left = bytes;
    while left > 0 {
        let len = left.min(BUFFER as u64);
        writer.stage()?;
        writer.write(&[Piece {
            start: 0,
            len: len as usize,
            offset: 0,
        }])?;
        left -= len;
    }
    writer.finish()?;
    Ok(start.elapsed())
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
