//! How fast weights are seen through windows, and read.

use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use crate::checkpoint::Checkpoint;

/// Sums over all of the file: `TIGHTFIT_BENCH_MODEL` is a checkpoint, `TIGHTFIT_BENCH_THREADS` a list.
#[test]
#[ignore = "a benchmark"]
fn benchmark_of_windows_against_reads() {
    let path = std::env::var_os("TIGHTFIT_BENCH_MODEL").expect("a checkpoint");
    let threads = std::env::var("TIGHTFIT_BENCH_THREADS").unwrap_or("1,2".into());
    let checkpoint = Checkpoint::open(Path::new(&path)).unwrap();
    let modes = [(0, 512 << 10), (1, 1 << 20), (1, 2 << 20), (1, 4 << 20)];
    for threads in threads.split(',').map(|count| count.parse().unwrap()) {
        let mut times = vec![Vec::new(); modes.len()];
        for _ in 0..9 {
            for (&(mode, piece), times) in modes.iter().zip(&mut times) {
                times.push(one_pass(&checkpoint, threads, mode, piece));
            }
        }
        for ((mode, piece), mut times) in modes.into_iter().zip(times) {
            times.sort_by(f64::total_cmp);
            let name = ["reads", "windows"][mode];
            let bytes = checkpoint.source_bytes() as f64;
            println!(
                "{threads:2} threads, {name:7} of {:4} KiB: {:.4} s, at least {:.4} s ({:.1} GB/s)",
                piece >> 10,
                times[times.len() / 2],
                times[0],
                bytes / times[times.len() / 2] / 1e9,
            );
        }
    }
    println!("{}", status(&["VmHWM", "RssFile", "VmLck"]));
}

fn one_pass(checkpoint: &Checkpoint, threads: usize, mode: usize, piece: usize) -> f64 {
    let mut pieces = Vec::new();
    for (shard, file) in checkpoint.shards().iter().enumerate() {
        // As weights lie: at no page's beginning.
        let first = 1000.min(file.length());
        for offset in (first..file.length()).step_by(piece) {
            let length = (file.length() - offset).min(piece as u64) as usize;
            pieces.push((shard, offset, length));
        }
    }
    let start = Instant::now();
    let (next, read) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let mappings = checkpoint.map();
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut slot = vec![0; piece];
                while let Some(&(shard, offset, length)) =
                    pieces.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    let window = match mode {
                        0 => None,
                        _ => mappings.window(shard, offset, length),
                    };
                    let Some(window) = window else {
                        let slot = &mut slot[..length];
                        checkpoint.read_at(shard, offset, slot).unwrap();
                        black_box(sum(slot));
                        read.fetch_add(1, Ordering::Relaxed);
                        continue;
                    };
                    {
                        for piece in window.chunks(128 << 10) {
                            black_box(sum(piece));
                        }
                        window.finish().unwrap();
                    }
                }
            });
        }
    });
    if mode == 1 && std::env::var_os("TIGHTFIT_BENCH_STATUS").is_some() {
        println!("{} read {read:?}", status(&["RssFile", "VmLck"]));
    }
    drop(mappings);
    start.elapsed().as_secs_f64()
}

/// In 16 lanes, so that adding takes no time beside reading.
fn sum(bytes: &[u8]) -> u64 {
    let mut lanes = [0_u64; 16];
    for chunk in bytes.as_chunks::<128>().0 {
        for (lane, word) in lanes.iter_mut().zip(chunk.as_chunks::<8>().0) {
            *lane = lane.wrapping_add(u64::from_ne_bytes(*word));
        }
    }
    lanes.into_iter().fold(0, u64::wrapping_add)
}

fn status(names: &[&str]) -> String {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let lines = status
        .lines()
        .filter(|line| names.iter().any(|name| line.starts_with(name)));
    lines.collect::<Vec<_>>().join(" ")
}
