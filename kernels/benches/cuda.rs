//! The GPU kernels against the GPU's own copy: bytes read and written per second.
//!
//! ```text
//! cargo bench -p tightfit-kernels --bench cuda
//! ```
//!
//! Prints one line for each kernel: the bytes that it has to read and write once, the median time
//! of its launches, their quotient, and its ratio to what a copy from device memory to device
//! memory reads and writes in the same run. The buffers are much larger than any cache.

// The modules of the test; not all of what they hold is needed here.
#[allow(dead_code)]
#[path = "../tests/cuda/device.rs"]
mod device;
#[allow(dead_code)]
#[path = "../tests/cuda/gpu.rs"]
mod gpu;
#[allow(dead_code)]
#[path = "../tests/cuda/values.rs"]
mod values;

use cudarc::driver::{CudaSlice, sys::CUevent_flags};
use tightfit_kernels::{
    BlockSize, FloatType, QuantType, SourceCodes, blocks,
    cuda::{self, SourceRun},
    packed_bytes,
};

use crate::gpu::{Gpu, address};
use crate::values::{Random, elements};

/// Elements of the tensor: 2 GiB of bf16.
const ELEMENTS: usize = 1 << 30;
/// Elements of a row of codes.
const COLUMNS: usize = 8192;
/// Where scales of codes begin among the bytes of elements.
const SOURCE_SCALES: usize = 2 * ELEMENTS;
const WARM_UP: usize = 3;
const ROUNDS: usize = 15;

fn main() {
    let Some(mut gpu) = Gpu::open() else { return };
    println!(
        "{}, compute capability {:?}",
        gpu.context.name().expect("a name"),
        gpu.context.compute_capability().expect("a capability")
    );
    let mut memory = Memory::new(&gpu);
    let copy = copy_bandwidth(&gpu, &mut memory);
    println!("copy, device to device: {:.0} GB/s", copy / 1e9);
    println!(
        "{:<44} {:>9} {:>9} {:>9} {:>8}",
        "kernel", "MB", "ms", "GB/s", "of copy"
    );
    let report = |what: String, bytes: usize, seconds: f64| {
        let rate = bytes as f64 / seconds;
        println!(
            "{what:<44} {:>9.1} {:>9.4} {:>9.0} {:>7.1}%",
            bytes as f64 / 1e6,
            seconds * 1e3,
            rate / 1e9,
            100.0 * rate / copy
        );
    };
    for float in [FloatType::Bf16, FloatType::F16, FloatType::F32] {
        memory.fill_with_weights(&gpu, float);
        for block_size in [32, 64, 128, 256, 1024, 4096] {
            let block_size = BlockSize::new(block_size).expect("valid");
            let bytes = ELEMENTS * float.bytes()
                + packed_bytes(ELEMENTS)
                + 4 * blocks(ELEMENTS, block_size);
            let seconds = memory.quantize(&mut gpu, float, block_size);
            report(
                format!("quantize {float}, blocks of {block_size}"),
                bytes,
                seconds,
            );
            if block_size.elements() == 64 {
                let seconds = memory.dequantize(&mut gpu, float, block_size, QuantType::Nf4);
                report(
                    format!("dequantize to {float}, blocks of 64"),
                    bytes,
                    seconds,
                );
            }
        }
    }
    let values = blocks(ELEMENTS, BlockSize::DEFAULT);
    let (mean, quantize, dequantize) = memory.double(&mut gpu, values);
    report("mean of absmax".to_owned(), 4 * values, mean);
    report("quantize absmax".to_owned(), 5 * values, quantize);
    report("dequantize absmax".to_owned(), 5 * values, dequantize);
    for (what, codes, tile) in [
        ("fp8, tiles of 128 x 128", SourceCodes::F8E4M3, [128, 128]),
        ("mxfp4", SourceCodes::F4E2M1, [1, 32]),
    ] {
        let run = SourceRun {
            codes,
            row_bytes: codes.bytes(COLUMNS) as u64,
            columns: COLUMNS as u32,
            tile,
            first_row: 0,
            first_column: 0,
        };
        memory.fill_with_codes(&gpu, &run);
        let bytes = run.code_bytes(ELEMENTS)
            + 4 * run.scales(ELEMENTS)
            + packed_bytes(ELEMENTS)
            + 4 * blocks(ELEMENTS, BlockSize::DEFAULT);
        let seconds = memory.quantize_source(&mut gpu, &run);
        report(format!("quantize {what}, blocks of 64"), bytes, seconds);
    }
}

/// Device memory for everything.
struct Memory {
    /// Elements of any type.
    elements: CudaSlice<u8>,
    packed: CudaSlice<u8>,
    absmax: CudaSlice<u8>,
    /// Sums, mean, codes and the count of non-finite blocks, each in a part of its own.
    other: CudaSlice<u8>,
}

impl Memory {
    fn new(gpu: &Gpu) -> Memory {
        let new = |bytes| gpu.stream.alloc_zeros(bytes).expect("enough device memory");
        Memory {
            elements: new(4 * ELEMENTS),
            packed: new(packed_bytes(ELEMENTS)),
            absmax: new(4 * ELEMENTS / 32),
            other: new(ELEMENTS / 8),
        }
    }

    /// Normal weights: some millions, again and again.
    fn fill_with_weights(&mut self, gpu: &Gpu, float: FloatType) {
        let mut random = Random(1);
        let weights: Vec<f32> = (0..1 << 22).map(|_| random.weight(0.02)).collect();
        let weights = elements(&weights, float);
        self.fill(gpu, &weights, 0, ELEMENTS * float.bytes());
    }

    /// Codes that are numbers, and scales.
    fn fill_with_codes(&mut self, gpu: &Gpu, run: &SourceRun) {
        let codes: Vec<u8> = (0..1 << 20).map(|i| (i * 7 % 113) as u8).collect();
        self.fill(gpu, &codes, 0, run.code_bytes(ELEMENTS));
        let mut random = Random(2);
        let scales: Vec<f32> = (0..1 << 16).map(|_| random.weight(0.02)).collect();
        let scales = elements(&scales, FloatType::F32);
        self.fill(gpu, &scales, SOURCE_SCALES, 4 * run.scales(ELEMENTS));
    }

    /// The same bytes again and again.
    fn fill(&mut self, gpu: &Gpu, with: &[u8], start: usize, len: usize) {
        let with = gpu.stream.clone_htod(with).expect("copied to the GPU");
        for first in (0..len).step_by(with.len()) {
            let count = with.len().min(len - first);
            let mut part = self
                .elements
                .slice_mut(start + first..start + first + count);
            let with = with.slice(..count);
            gpu.stream.memcpy_dtod(&with, &mut part).expect("copied");
        }
    }

    fn quantize(&mut self, gpu: &mut Gpu, float: FloatType, block_size: BlockSize) -> f64 {
        let launch = cuda::quantize_nf4(float, ELEMENTS).expect("not too many");
        let stream = gpu.stream.clone();
        let arguments = [
            address(&mut self.elements, &stream),
            ELEMENTS as u64,
            block_size.elements() as u64,
            address(&mut self.packed, &stream),
            address(&mut self.absmax, &stream),
            address(&mut self.other, &stream),
        ];
        // SAFETY: every buffer is as long as the largest type and the smallest blocks need.
        median(gpu, |gpu| unsafe { gpu.queue(launch, 0, &arguments) })
    }

    fn quantize_source(&mut self, gpu: &mut Gpu, run: &SourceRun) -> f64 {
        let launch = cuda::quantize_source(FloatType::Bf16, run, ELEMENTS).expect("it is a run");
        let stream = gpu.stream.clone();
        let codes = address(&mut self.elements, &stream);
        let mut arguments = vec![codes, codes + SOURCE_SCALES as u64];
        arguments.extend(run.arguments());
        arguments.extend([
            ELEMENTS as u64,
            BlockSize::DEFAULT.elements() as u64,
            address(&mut self.packed, &stream),
            address(&mut self.absmax, &stream),
            address(&mut self.other, &stream),
        ]);
        // SAFETY: codes take at most a byte for each element, and scales less; the rest is as above.
        median(gpu, |gpu| unsafe { gpu.queue(launch, 0, &arguments) })
    }

    /// Of what was quantized last, with the same block size.
    fn dequantize(
        &mut self,
        gpu: &mut Gpu,
        float: FloatType,
        block_size: BlockSize,
        quant_type: QuantType,
    ) -> f64 {
        let launch = cuda::dequantize(float, ELEMENTS).expect("not too many");
        let stream = gpu.stream.clone();
        let arguments = [
            address(&mut self.packed, &stream),
            address(&mut self.absmax, &stream),
            ELEMENTS as u64,
            block_size.elements() as u64,
            cuda::quant_type_argument(quant_type).into(),
            address(&mut self.elements, &stream),
        ];
        // SAFETY: as above.
        let seconds = median(gpu, |gpu| unsafe { gpu.queue(launch, 0, &arguments) });
        self.fill_with_weights(gpu, float);
        seconds
    }

    /// The mean, quantizing and dequantizing of absmax values.
    fn double(&mut self, gpu: &mut Gpu, values: usize) -> (f64, f64, f64) {
        self.quantize(gpu, FloatType::F32, BlockSize::DEFAULT);
        let stream = gpu.stream.clone();
        let absmax = address(&mut self.absmax, &stream);
        let n = values as u64;
        // Parts of 16 MiB: sums, sums of sums, mean, nested absmax; codes go to `packed`.
        let part = |index: u64| address(&mut self.other, &stream) + (index << 24);
        let [sums, sums_of_sums, mean, nested] = [0, 1, 2, 3].map(part);
        let codes = address(&mut self.packed, &stream);
        let (groups, rest) = (cuda::sums(values), cuda::sums(cuda::sums(values)));
        let launches = [
            cuda::sum_absmax(values).expect("not too many"),
            cuda::sum_sums(groups).expect("not too many"),
        ];
        assert!(groups > 256 && rest <= 256, "two levels, then the mean");
        // SAFETY: the sums fit into their parts.
        let mean_seconds = median(gpu, |gpu| unsafe {
            gpu.queue(launches[0], 0, &[absmax, n, sums]);
            gpu.queue(launches[1], 0, &[sums, groups as u64, sums_of_sums]);
            gpu.queue(cuda::mean(), 0, &[sums_of_sums, rest as u64, n, mean]);
        });
        let launch = cuda::quantize_absmax(values).expect("not too many");
        // SAFETY: as above; there are more packed bytes than codes.
        let quantize = median(gpu, |gpu| unsafe {
            gpu.queue(launch, 0, &[absmax, n, mean, codes, nested]);
        });
        let launch = cuda::dequantize_absmax(values).expect("not too many");
        // SAFETY: as above.
        let dequantize = median(gpu, |gpu| unsafe {
            gpu.queue(launch, 0, &[codes, n, nested, mean, absmax]);
        });
        (mean_seconds, quantize, dequantize)
    }
}

/// Bytes per second, read and written.
fn copy_bandwidth(gpu: &Gpu, memory: &mut Memory) -> f64 {
    let half = memory.elements.len() / 2;
    let (from, mut to) = memory.elements.split_at_mut(half);
    let stream = gpu.stream.clone();
    let seconds = median_of(|| {
        let begin = stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        stream.memcpy_dtod(&from, &mut to).expect("copied");
        let end = stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        elapsed(begin, end)
    });
    2.0 * half as f64 / seconds
}

/// The median time of what the function queues.
fn median(gpu: &mut Gpu, mut queue: impl FnMut(&mut Gpu)) -> f64 {
    median_of(|| {
        let begin = gpu
            .stream
            .record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        queue(gpu);
        let end = gpu
            .stream
            .record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        elapsed(begin, end)
    })
}

fn median_of(mut seconds: impl FnMut() -> f64) -> f64 {
    let mut times: Vec<f64> = (0..WARM_UP + ROUNDS).map(|_| seconds()).collect();
    times.drain(..WARM_UP);
    times.sort_by(f64::total_cmp);
    times[ROUNDS / 2]
}

type Event = Result<cudarc::driver::CudaEvent, cudarc::driver::DriverError>;

fn elapsed(begin: Event, end: Event) -> f64 {
    let (begin, end) = (begin.expect("an event"), end.expect("an event"));
    f64::from(begin.elapsed_ms(&end).expect("the kernels ran")) / 1e3
}
