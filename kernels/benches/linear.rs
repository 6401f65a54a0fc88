//! Products on the processor.
//!
//! ```text
//! cargo bench -p tightfit-kernels --bench linear
//! ```
//!
//! `linear.py` beside this file measures those on a GPU, and asks this program, given `launch` and what
//! a launch depends on, how to launch them. `linear_cpu.py` measures those on the processor beside
//! bitsandbytes: given `serve` this program does products as it is told.
//!
//! Prints one line for each instruction set, type and number of rows: the median time, and the rate
//! at which codes and scales are read. `THREADS` says how many threads to use, 2 if it is not set.

use std::{env, fs, hint::black_box, io, num::NonZeroUsize, path::Path, thread, time::Instant};

use tightfit_kernels::cuda::linear::{Gpu, Linear};
use tightfit_kernels::{
    BlockSize, DYNAMIC_MAP, FloatType, Isa, Kernels, LinearWeights, QuantType, Scales, blocks,
    packed_bytes,
};

/// The down projection of Llama-3-8B.
const OUTPUTS: usize = 4096;
const INPUTS: usize = 14336;

/// Prints a launch: of the compute capability, multiprocessors, rows, outputs, inputs, and whether by
/// row and transposed.
fn print_launch(numbers: &[usize]) {
    let [
        major,
        minor,
        multiprocessors,
        rows,
        outputs,
        inputs,
        by_row,
        transposed,
    ] = *numbers
    else {
        panic!("launch takes eight numbers");
    };
    let linear = Linear {
        float: FloatType::Bf16,
        rows,
        outputs,
        inputs,
        block_size: BlockSize::DEFAULT,
        aligned: true,
        by_row: by_row != 0,
    };
    let gpu = Gpu {
        compute_capability: (major as u32, minor as u32),
        multiprocessors: multiprocessors as u32,
    };
    let launch = if transposed != 0 {
        linear.launch_transposed(gpu)
    } else {
        linear.launch(gpu)
    };
    let launch = launch.expect("possible");
    let maps: Vec<String> = launch
        .maps
        .iter()
        .flatten()
        .map(|map| {
            let [columns, rows] = map.tile;
            format!(
                "[{}, {}, {}, {}, {columns}, {rows}, {}]",
                map.element_bytes, map.columns, map.rows, map.row_bytes, map.swizzle
            )
        })
        .collect();
    println!(
        r#"{{"kernel": "{}", "grid": {}, "threads": {}, "shared": {}, "workspace": {}, "rows": {}, "shares": {}, "maps": [{}]}}"#,
        launch.kernel,
        launch.grid,
        launch.threads,
        launch.shared_bytes,
        launch.workspace_bytes,
        launch.rows,
        launch.shares,
        maps.join(", ")
    );
}

/// The seconds that some threads take to read bytes.
fn read_all(bytes: &[u8], threads: usize) -> f64 {
    let start = Instant::now();
    thread::scope(|scope| {
        for bytes in bytes.chunks(bytes.len().div_ceil(threads)) {
            scope.spawn(|| {
                let (numbers, _) = bytes.as_chunks::<8>();
                let numbers = numbers.iter().map(|bytes| u64::from_le_bytes(*bytes));
                black_box(numbers.fold(0, u64::wrapping_add));
            });
        }
    });
    start.elapsed().as_secs_f64()
}

/// Does products with weights that lie in files, as the standard input says. Given the number of outputs,
/// of inputs, of elements of a block, of threads and of copies of the weights, and a folder with `codes`
/// and `absmax`, or `absmax`, `nested_absmax` and `mean` if scales are double-quantized. Each line is a
/// type and the number of rows of `x` in the folder: prints the seconds that the product with the next
/// copy took, and leaves it in `y`. Or it is `read`: prints the seconds that only reading the codes took.
fn serve(arguments: &[String]) {
    let [outputs, inputs, block_size, threads, copies, folder] = arguments else {
        panic!("serve takes five numbers and a folder");
    };
    let [outputs, inputs, block_size, threads, copies] =
        [outputs, inputs, block_size, threads, copies]
            .map(|number| number.parse::<usize>().expect("a number"));
    let read = |name: &str| fs::read(Path::new(folder).join(name)).expect(name);
    let floats = |bytes: Vec<u8>| -> Vec<f32> {
        let (floats, _) = bytes.as_chunks::<4>();
        floats.iter().map(|x| f32::from_le_bytes(*x)).collect()
    };
    let codes = vec![read("codes"); copies];
    let double = Path::new(folder).join("nested_absmax").exists();
    let (absmax, nested, mean) = if double {
        (
            vec![],
            floats(read("nested_absmax")),
            floats(read("mean"))[0],
        )
    } else {
        (floats(read("absmax")), vec![], 0.0)
    };
    let absmax = vec![absmax; copies];
    let absmax_codes = vec![if double { read("absmax") } else { vec![] }; copies];
    let block_size = BlockSize::new(block_size).expect("a block size");
    let threads = NonZeroUsize::new(threads).expect("threads");
    let kernels = Kernels::detect();
    let mut last = (String::new(), vec![], vec![]);
    for (i, line) in io::stdin().lines().enumerate() {
        let line = line.expect("a line");
        if line == "read" {
            println!("{}", read_all(&codes[i % copies], threads.get()));
            continue;
        }
        let (float, rows) = line.split_once(' ').expect("a type and rows");
        let rows: usize = rows.parse().expect("rows");
        let float = FloatType::ALL
            .into_iter()
            .find(|of| of.to_string() == float);
        let float = float.expect("a type");
        if line != last.0 {
            let y = vec![0; rows * outputs * float.bytes()];
            last = (line, read("x"), y);
        }
        let (_, x, y) = &mut last;
        let scales = if double {
            Scales::Double {
                codes: &absmax_codes[i % copies],
                nested_absmax: &nested,
                absmax_mean: mean,
                map: &DYNAMIC_MAP,
            }
        } else {
            Scales::Absmax(&absmax[i % copies])
        };
        let weights = LinearWeights {
            quant_type: QuantType::Nf4,
            outputs,
            inputs,
            block_size,
            codes: &codes[i % copies],
            scales,
        };
        let x = &x[..rows * inputs * float.bytes()];
        let start = Instant::now();
        let done = kernels.linear_bytes(&weights, float, rows, x, None, y, threads);
        let seconds = start.elapsed().as_secs_f64();
        done.expect("lengths");
        fs::write(Path::new(folder).join("y"), &y[..]).expect("y");
        println!("{seconds}");
    }
}

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if let Some(("launch", numbers)) = arguments
        .split_first()
        .map(|(first, rest)| (first.as_str(), rest))
    {
        let numbers: Result<Vec<usize>, _> = numbers.iter().map(|text| text.parse()).collect();
        return print_launch(&numbers.expect("numbers"));
    }
    if let Some((first, rest)) = arguments.split_first()
        && first == "serve"
    {
        return serve(rest);
    }
    let threads = env::var("THREADS").ok().and_then(|text| text.parse().ok());
    let threads = threads.unwrap_or(NonZeroUsize::MIN.saturating_add(1));
    let elements = OUTPUTS * INPUTS;
    let mut state = 1u64;
    let mut random = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as u32
    };
    let codes: Vec<u8> = (0..packed_bytes(elements))
        .map(|_| random() as u8)
        .collect();
    let absmax: Vec<f32> = (0..blocks(elements, BlockSize::DEFAULT))
        .map(|_| random() as f32 / 1e12)
        .collect();
    let weights = LinearWeights {
        quant_type: QuantType::Nf4,
        outputs: OUTPUTS,
        inputs: INPUTS,
        block_size: BlockSize::DEFAULT,
        codes: &codes,
        scales: Scales::Absmax(&absmax),
    };
    println!("{OUTPUTS} x {INPUTS}, {threads} threads");
    for isa in Isa::available() {
        let kernels = Kernels::new(isa).expect("available");
        for float in [FloatType::Bf16, FloatType::F32] {
            for rows in [1, 2, 8, 64] {
                if isa == Isa::Portable && rows > 1 {
                    continue;
                }
                let x: Vec<u8> = (0..rows * INPUTS)
                    .flat_map(|_| match float {
                        FloatType::F32 => (random() as f32 / 1e9).to_le_bytes().to_vec(),
                        _ => ((random() as f32 / 1e9).to_bits() >> 16).to_le_bytes()[..2].to_vec(),
                    })
                    .collect();
                let mut y = vec![0; rows * OUTPUTS * float.bytes()];
                let mut times: Vec<f64> = (0..if rows > 8 { 5 } else { 21 })
                    .map(|_| {
                        let start = Instant::now();
                        kernels
                            .linear_bytes(&weights, float, rows, &x, None, &mut y, threads)
                            .expect("lengths");
                        start.elapsed().as_secs_f64()
                    })
                    .collect();
                times.sort_by(f64::total_cmp);
                let seconds = times[times.len() / 2];
                let bytes = codes.len() + 4 * absmax.len();
                println!(
                    "{isa:<9} {float:<5} {rows:>4} rows {:>8.2} ms, best {:>8.2} {:>7.1} GB/s",
                    seconds * 1e3,
                    times[0] * 1e3,
                    bytes as f64 / seconds / 1e9
                );
            }
        }
    }
}
