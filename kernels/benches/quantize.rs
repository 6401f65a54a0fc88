//! Speed of every kernel on every instruction set: `cargo bench -p tightfit-kernels [-- WORDS]`,
//! one thread.
//!
//! Each figure is the median of several repeats, in GB (10^9 bytes) per second of the wider side:
//! what is read when quantizing, what is written when dequantizing. Beside it stands the ratio to
//! copying as many bytes in the same run. `cache` works on a buffer that stays in the second-level
//! cache, `memory` on one far larger than any cache. Arguments select the lines that contain all of
//! them.

use std::{hint::black_box, time::Instant};

use tightfit_kernels::{
    BlockSize, FloatType, Isa, Kernels, NESTED_BLOCK_SIZE, QuantType, blocks, packed_bytes,
};

const REPEATS: usize = 9;
const SIZES: [(&str, usize); 2] = [("cache", 192 << 10), ("memory", 192 << 20)];

fn main() {
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| word != "--bench")
        .collect();
    println!("{:44} {:>8} {:>8}", "", "GB/s", "of copy");
    for (place, bytes) in SIZES {
        let source = weights(bytes);
        let mut copied = vec![0; bytes];
        let copy = seconds(bytes, || copied.copy_from_slice(black_box(&source)));
        print(&format!("{place} copy"), bytes, copy, copy);

        for isa in Isa::available() {
            let kernels = Kernels::new(isa).expect("available");
            for float in FloatType::ALL {
                let source = as_type(&source, float);
                for size in [64, 32, 128, 4096] {
                    let name = format!("{place} {isa} quantize {float} block {size}");
                    let selected = words.iter().all(|word| name.contains(word.as_str()));
                    if selected && (size == 64 || place == "cache") {
                        let block_size = BlockSize::new(size).expect("a block size");
                        let elements = bytes / float.bytes();
                        let mut packed = vec![0; packed_bytes(elements)];
                        let mut absmax = vec![0.0; blocks(elements, block_size)];
                        let time = seconds(bytes, || {
                            let source = black_box(&source);
                            kernels
                                .quantize_nf4(source, float, block_size, &mut packed, &mut absmax)
                                .expect("lengths");
                            black_box((&packed, &absmax));
                        });
                        print(&name, bytes, time, copy);
                    }
                }
                let name = format!("{place} {isa} dequantize {float} block 64");
                if words.iter().all(|word| name.contains(word.as_str())) {
                    let (size, elements) = (BlockSize::DEFAULT, bytes / float.bytes());
                    let packed = &source[..packed_bytes(elements)];
                    let absmax = vec![0.05; blocks(elements, size)];
                    let mut out = vec![0; bytes];
                    let time = seconds(bytes, || {
                        let packed = black_box(packed);
                        kernels
                            .dequantize(
                                QuantType::Nf4,
                                packed,
                                &absmax,
                                size,
                                elements,
                                float,
                                &mut out,
                            )
                            .expect("lengths");
                        black_box(&out);
                    });
                    print(&name, bytes, time, copy);
                }
            }
            let absmax: Vec<f32> = source
                .as_chunks::<4>()
                .0
                .iter()
                .map(|x| f32::from_le_bytes(*x).abs())
                .collect();
            let mut codes = vec![0; absmax.len()];
            let mut nested = vec![0.0; absmax.len().div_ceil(NESTED_BLOCK_SIZE)];
            let run = |name: &str, function: &mut dyn FnMut()| {
                let name = format!("{place} {isa} {name}");
                if words.iter().all(|word| name.contains(word.as_str())) {
                    print(&name, bytes, seconds(bytes, function), copy);
                }
            };
            run("mean of absmax", &mut || {
                black_box(kernels.absmax_mean(black_box(&absmax)));
            });
            run("quantize absmax", &mut || {
                kernels
                    .quantize_absmax(black_box(&absmax), 0.02, &mut codes, &mut nested)
                    .expect("lengths");
            });
            let mut out = vec![0.0; absmax.len()];
            run("dequantize absmax", &mut || {
                kernels
                    .dequantize_absmax(black_box(&codes), &nested, 0.02, &mut out)
                    .expect("lengths");
            });
        }
    }
}

/// `f32` weights of the size that models have.
fn weights(bytes: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut uniform = move || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..bytes / 4)
        .flat_map(|_| ((uniform() + uniform() + uniform()) * 0.04).to_le_bytes())
        .collect()
}

/// As many bytes of another type, by converting and repeating.
fn as_type(source: &[u8], float: FloatType) -> Vec<u8> {
    let mut out = vec![0; source.len() / 4 * float.bytes()];
    Kernels::detect()
        .cast(source, FloatType::F32, float, &mut out)
        .expect("lengths");
    out.iter().cycle().take(source.len()).copied().collect()
}

/// The median time of one call, each measurement over enough calls to last some milliseconds.
fn seconds(bytes: usize, mut function: impl FnMut()) -> f64 {
    let calls = (64 << 20) / bytes + 1;
    function();
    let mut times: Vec<f64> = (0..REPEATS)
        .map(|_| {
            let start = Instant::now();
            (0..calls).for_each(|_| function());
            start.elapsed().as_secs_f64() / calls as f64
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[REPEATS / 2]
}

fn print(name: &str, bytes: usize, time: f64, copy: f64) {
    println!(
        "{name:44} {:8.2} {:8.2}",
        bytes as f64 / time / 1e9,
        copy / time
    );
}
