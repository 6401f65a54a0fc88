//! Loading against only reading the same bytes, with the same threads and chunk size, in one run.
//!
//! `cargo bench -p tightfit-wasm --bench load [-- DIR]`; without DIR it writes a checkpoint of
//! Qwen2.5-0.5B's shape (1 GB) to the temporary directory.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tightfit::checkpoint::Checkpoint;
use tightfit::device::{Device, HostDevice};
use tightfit::load::{LoadOptions, load};
use tightfit::memory::{DEFAULT_STAGING, StagingRing};
use tightfit::plan::{Plan, propose};
use tightfit::synth::{self, Preset, SynthOptions};
use tightfit_wasm::policy::WasmPolicy;
use tightfit_wasm::sandbox::Limits;

const REPEATS: usize = 15;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let given = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with('-'));
    let directory = tempfile::tempdir()?;
    let path = match given {
        Some(path) => PathBuf::from(path),
        None => {
            let path = directory.path().join("model");
            synth::write(Preset::Qwen25_0_5b, &path, &SynthOptions::default())?;
            path
        }
    };
    let checkpoint = Checkpoint::open(&path)?;
    let devices: Vec<Box<dyn Device>> = vec![Box::new(HostDevice::cpu(None))];
    let infos: Vec<_> = devices.iter().map(|device| device.info()).collect();
    let policy = WasmPolicy::builtin("auto", Limits::default()).expect("auto is built in")?;
    let settings = |double: bool| vec![("double-quant".to_owned(), double.to_string())];
    let plans: Vec<(&str, Plan)> = vec![
        (
            "nf4",
            propose(&checkpoint, &policy, &infos, &settings(false))?.plan,
        ),
        (
            "nf4+double",
            propose(&checkpoint, &policy, &infos, &settings(true))?.plan,
        ),
    ];
    let bytes = checkpoint.source_bytes();
    println!(
        "{}: {:.3} GB, medians of {REPEATS}",
        path.display(),
        bytes as f64 / 1e9
    );
    let cores = std::thread::available_parallelism()?.get();
    for threads in [1, cores] {
        // Interleaved, so that a noisy neighbour disturbs all of them alike.
        let mut times = vec![Vec::new(); plans.len() + 1];
        for _ in 0..REPEATS {
            times[0].push(read_only(&checkpoint, threads)?);
            for (index, (_, plan)) in plans.iter().enumerate() {
                let options = LoadOptions::default().with_threads(threads);
                let start = Instant::now();
                let model = load(&checkpoint, plan, &devices, &options)?;
                times[index + 1].push(start.elapsed());
                drop(model);
            }
        }
        let medians: Vec<f64> = times.iter_mut().map(|times| median(times)).collect();
        println!("\n{threads} threads");
        for (name, seconds) in ["read only", "nf4", "nf4+double"].iter().zip(&medians) {
            println!(
                "  {name:<12} {:>8.1} ms  {:>6.2} GB/s  {:.2} x the time of only reading",
                seconds * 1e3,
                bytes as f64 / 1e9 / seconds,
                seconds / medians[0],
            );
        }
    }
    Ok(())
}

fn median(times: &mut [Duration]) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64()
}

/// Reads every tensor into the staging ring and does nothing with it.
fn read_only(
    checkpoint: &Checkpoint,
    threads: usize,
) -> Result<Duration, Box<dyn std::error::Error>> {
    let mut ring = StagingRing::new(DEFAULT_STAGING, threads, 0)?;
    let chunk = ring.slot_bytes() as u64;
    let chunks: Vec<(usize, u64, usize)> = checkpoint
        .tensors()
        .iter()
        .enumerate()
        .flat_map(|(index, tensor)| {
            (0..tensor.bytes.div_ceil(chunk)).map(move |number| {
                let start = number * chunk;
                (index, start, (tensor.bytes - start).min(chunk) as usize)
            })
        })
        .collect();
    let next = AtomicUsize::new(0);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for slot in ring.slots() {
            scope.spawn(|| {
                while let Some(&(tensor, start, bytes)) =
                    chunks.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    checkpoint
                        .read_tensor(tensor, start, &mut slot[..bytes])
                        .expect("the checkpoint can be read");
                }
            });
        }
    });
    Ok(start.elapsed())
}
