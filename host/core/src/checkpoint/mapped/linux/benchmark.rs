//! How fast weights are seen through windows, and read.

use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use tightfit_kernels::{BlockSize, FloatType, Kernels};

use super::Mappings;
use crate::checkpoint::Checkpoint;

/// All of a checkpoint, in 16-bit elements, by this many threads: seen in windows, and read in pieces of
/// 512 KiB. `TIGHTFIT_BENCH_MODEL` is the checkpoint, `TIGHTFIT_BENCH_THREADS` a list of numbers.
#[test]
#[ignore = "a benchmark"]
fn benchmark_of_windows_against_reads() {
    let path = std::env::var_os("TIGHTFIT_BENCH_MODEL").expect("a checkpoint");
    let threads = std::env::var("TIGHTFIT_BENCH_THREADS").unwrap_or("1,2".into());
    let checkpoint = Checkpoint::open(Path::new(&path)).unwrap();
    let bytes = checkpoint.source_bytes() as f64;
    let mut cases = Vec::new();
    for work in [Work::Sum, Work::Quantize] {
        cases.push((work, Way::Read, 512 << 10));
        for way in [Way::See, Way::SeeLocked] {
            cases.extend([1 << 20, 2 << 20, 4 << 20].map(|piece| (work, way, piece)));
        }
    }
    for threads in threads.split(',').map(|count| count.parse().unwrap()) {
        let mut passes = vec![Vec::new(); cases.len()];
        for _ in 0..9 {
            for (&(work, way, piece), passes) in cases.iter().zip(&mut passes) {
                passes.push(one_pass(&checkpoint, threads, work, way, piece));
            }
        }
        for ((work, way, piece), mut passes) in cases.iter().zip(passes) {
            passes.sort_by(|a, b| a.0.total_cmp(&b.0));
            let (median, _) = passes[passes.len() / 2];
            let read: usize = passes.iter().map(|(_, read)| read).sum();
            println!(
                "{threads:2} threads, {work:?} {way:?} {:4} KiB: {median:.4} s, at least {:.4} s \
                 ({:.1} GB/s), {read} read",
                piece >> 10,
                passes[0].0,
                bytes / median / 1e9,
            );
        }
    }
    let status = fs::read_to_string("/proc/self/status").unwrap();
    for line in status.lines() {
        if ["VmHWM", "RssFile", "VmLck"]
            .iter()
            .any(|name| line.starts_with(name))
        {
            println!("{line}");
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Work {
    Sum,
    Quantize,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    Read,
    See,
    SeeLocked,
}

/// Seconds, and how many pieces were read.
fn one_pass(
    checkpoint: &Checkpoint,
    threads: usize,
    work: Work,
    way: Way,
    piece: usize,
) -> (f64, usize) {
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
    let mappings = Mappings::new(checkpoint.shards.clone(), way == Way::SeeLocked);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut slot = vec![0; piece];
                let mut worker = Worker::new(work);
                while let Some(&(shard, offset, length)) =
                    pieces.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    let window = match way {
                        Way::Read => None,
                        Way::See | Way::SeeLocked => mappings.window(shard, offset, length),
                    };
                    if let Some(window) = window {
                        worker.run(&window);
                        window.finish().unwrap();
                    } else {
                        let slot = &mut slot[..length];
                        checkpoint.read_at(shard, offset, slot).unwrap();
                        worker.run(slot);
                        read.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    drop(mappings);
    (start.elapsed().as_secs_f64(), read.into_inner())
}

/// What is done with a piece, in parts that a processor's cache has room for.
struct Worker {
    work: Work,
    kernels: Kernels,
    packed: Vec<u8>,
    absmax: Vec<f32>,
}

const PART: usize = 128 << 10;

impl Worker {
    fn new(work: Work) -> Worker {
        Worker {
            work,
            kernels: Kernels::detect(),
            packed: vec![0; PART / 4],
            absmax: vec![0.0; PART / 128],
        }
    }

    fn run(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(PART) {
            match self.work {
                Work::Sum => {
                    black_box(sum(part));
                }
                Work::Quantize => {
                    let part = &part[..part.len() / 128 * 128];
                    let packed = &mut self.packed[..part.len() / 4];
                    let absmax = &mut self.absmax[..part.len() / 128];
                    let kernels = self.kernels;
                    kernels
                        .quantize_nf4(part, FloatType::Bf16, BlockSize::DEFAULT, packed, absmax)
                        .unwrap();
                    black_box((packed, absmax));
                }
            }
        }
    }
}

/// In 16 lanes, so that adding takes little beside reading.
fn sum(bytes: &[u8]) -> u64 {
    let mut lanes = [0_u64; 16];
    for chunk in bytes.as_chunks::<128>().0 {
        for (lane, word) in lanes.iter_mut().zip(chunk.as_chunks::<8>().0) {
            *lane = lane.wrapping_add(u64::from_ne_bytes(*word));
        }
    }
    lanes.into_iter().fold(0, u64::wrapping_add)
}
