//! Speed of decoding other methods' weights to bf16, on one core, beside quantizing that bf16:
//! `cargo bench -p tightfit-kernels --bench sources`.

use std::hint::black_box;
use std::time::Instant;

use tightfit_kernels::{
    BlockSize, FloatType, Isa, Kernels, SourceCodes, SourceMatrix, SourceRows, SourceScale,
};

/// In the second-level cache, as chunks of a load are.
const ROWS: usize = 16;
const COLUMNS: usize = 7168;
const REPEATS: usize = 200;

fn main() {
    let elements = ROWS * COLUMNS;
    let float = FloatType::Bf16;
    let cases = [
        (
            "fp8, tiles of 128 x 128",
            SourceCodes::F8E4M3,
            [128, 128],
            SourceScale::Float(FloatType::F32),
        ),
        (
            "fp8, one scale",
            SourceCodes::F8E4M3,
            [usize::MAX, usize::MAX],
            SourceScale::Float(FloatType::F32),
        ),
        ("mxfp4", SourceCodes::F4E2M1, [1, 32], SourceScale::E8M0),
        (
            "int4, groups of 32",
            SourceCodes::Int4,
            [1, 32],
            SourceScale::Float(FloatType::Bf16),
        ),
    ];
    println!("GB of bf16 a second");
    for isa in Isa::available() {
        let kernels = Kernels::new(isa).expect("it is available");
        let mut out = vec![0; 2 * elements];
        for (name, codes, tile, scale) in cases {
            let matrix = SourceMatrix {
                codes,
                columns: COLUMNS,
                tile,
                scale,
            };
            let bytes: Vec<u8> = (0..codes.bytes(elements))
                .map(|i| (i * 7 % 113) as u8)
                .collect();
            let scales =
                vec![0x3d; ROWS.div_ceil(tile[0]) * matrix.scale_columns() * scale.bytes()];
            let rate = rate(elements, || {
                let rows = SourceRows {
                    first: 0,
                    codes: black_box(&bytes),
                    scales: &scales,
                    zeros: &[],
                };
                kernels
                    .decode(&matrix, &rows, float, &mut out)
                    .expect("lengths are right");
            });
            println!("{isa:<9} {name:<26} {rate:6.1}");
        }
        let (mut packed, mut absmax) = (vec![0; elements / 2], vec![0.0; elements / 64]);
        let rate = rate(elements, || {
            let size = BlockSize::DEFAULT;
            kernels
                .quantize_nf4(black_box(&out), float, size, &mut packed, &mut absmax)
                .expect("lengths are right");
        });
        println!("{isa:<9} {:<26} {rate:6.1}", "quantize bf16");
    }
}

/// Of the fastest of several runs.
fn rate(elements: usize, mut work: impl FnMut()) -> f64 {
    let fastest = (0..REPEATS)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed()
        })
        .min();
    2.0 * elements as f64 / 1e9 / fastest.unwrap_or_default().as_secs_f64()
}
