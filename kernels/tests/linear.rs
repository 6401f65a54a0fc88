//! Products on the processor, against f64: with every instruction set.

use std::num::NonZeroUsize;

use tightfit_kernels::{
    BlockSize, DYNAMIC_MAP, FloatType, Isa, KernelError, Kernels, LinearWeights, QuantType, Scales,
    blocks, packed_bytes,
};

/// xorshift64*: the same values on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn weight(&mut self, scale: f32) -> f32 {
        let sum: f32 = (0..6)
            .map(|_| (self.next() >> 40) as f32 / (1 << 24) as f32 - 0.5)
            .sum();
        sum * scale
    }
}

/// Quantized weights that own what they are made of.
struct Weights {
    quant_type: QuantType,
    outputs: usize,
    inputs: usize,
    block_size: BlockSize,
    codes: Vec<u8>,
    absmax: Vec<f32>,
    /// Of the absmax values, if they are double-quantized.
    nested: Option<(Vec<u8>, Vec<f32>)>,
}

const OFFSET: f32 = 0.04;

impl Weights {
    fn random(
        quant_type: QuantType,
        outputs: usize,
        inputs: usize,
        block_size: BlockSize,
        double: bool,
        random: &mut Random,
    ) -> Weights {
        let n = outputs * inputs;
        let count = blocks(n, block_size);
        let codes = (0..packed_bytes(n)).map(|_| random.next() as u8).collect();
        let mut absmax: Vec<f32> = (0..count)
            .map(|i| match i % 17 {
                3 => 0.0,
                9 => 20.0,
                _ => random.weight(0.05).abs(),
            })
            .collect();
        let nested = double.then(|| {
            let codes: Vec<u8> = (0..count).map(|_| random.next() as u8).collect();
            let nested: Vec<f32> = (0..count.div_ceil(256))
                .map(|_| random.weight(0.05).abs())
                .collect();
            for (i, absmax) in absmax.iter_mut().enumerate() {
                *absmax = DYNAMIC_MAP[usize::from(codes[i])] * nested[i / 256] + OFFSET;
            }
            (codes, nested)
        });
        Weights {
            quant_type,
            outputs,
            inputs,
            block_size,
            codes,
            absmax,
            nested,
        }
    }

    fn view(&self) -> LinearWeights<'_> {
        LinearWeights {
            quant_type: self.quant_type,
            outputs: self.outputs,
            inputs: self.inputs,
            block_size: self.block_size,
            codes: &self.codes,
            scales: match &self.nested {
                None => Scales::Absmax(&self.absmax),
                Some((codes, nested)) => Scales::Double {
                    codes,
                    nested_absmax: nested,
                    absmax_mean: OFFSET,
                    map: &DYNAMIC_MAP,
                },
            },
        }
    }

    fn at(&self, output: usize, input: usize) -> f64 {
        let i = output * self.inputs + input;
        let byte = self.codes[i / 2];
        let code = if i.is_multiple_of(2) {
            byte >> 4
        } else {
            byte & 15
        };
        let value = tightfit_kernels::code_values(self.quant_type)[usize::from(code)];
        f64::from(value) * f64::from(self.absmax[i / self.block_size.elements()])
    }
}

fn all() -> impl Iterator<Item = Kernels> {
    Isa::available().map(|isa| Kernels::new(isa).expect("available"))
}

fn threads(n: usize) -> NonZeroUsize {
    NonZeroUsize::new(n).expect("not 0")
}

fn elements(values: &[f32], float: FloatType) -> Vec<u8> {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut out = vec![0; values.len() * float.bytes()];
    Kernels::detect()
        .cast(&bytes, FloatType::F32, float, &mut out)
        .expect("lengths");
    out
}

fn floats(bytes: &[u8], float: FloatType) -> Vec<f32> {
    let mut out = vec![0; bytes.len() / float.bytes() * 4];
    Kernels::detect()
        .cast(bytes, float, FloatType::F32, &mut out)
        .expect("lengths");
    let (floats, _) = out.as_chunks::<4>();
    floats
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect()
}

fn random_elements(random: &mut Random, count: usize, float: FloatType) -> Vec<u8> {
    let values: Vec<f32> = (0..count).map(|_| random.weight(1.0)).collect();
    elements(&values, float)
}

fn check(weights: &Weights, float: FloatType, rows: usize, biased: bool, random: &mut Random) {
    let (outputs, inputs) = (weights.outputs, weights.inputs);
    let x = random_elements(random, rows * inputs, float);
    let bias = random_elements(random, outputs, float);
    let bias = biased.then_some(&bias[..]);
    let (x_values, bias_values) = (floats(&x, float), bias.map(|bias| floats(bias, float)));
    // What rounding a result may lose, and what each product may.
    let (of_result, of_product) = match float {
        FloatType::Bf16 => (1.0 / 256.0, 1.0 / 512.0),
        FloatType::F16 => (1.0 / 2048.0, 1e-6),
        FloatType::F32 => (1e-7, 1e-6),
    };
    let mut needs = vec![];
    for row in 0..rows {
        for output in 0..outputs {
            let (mut sum, mut size) = (0.0, 0.0);
            for input in 0..inputs {
                let product = weights.at(output, input) * f64::from(x_values[row * inputs + input]);
                sum += product;
                size += product.abs();
            }
            sum += bias_values
                .as_ref()
                .map_or(0.0, |bias| f64::from(bias[output]));
            needs.push((sum, of_result * sum.abs() + of_product * size + 1e-6));
        }
    }
    for kernels in all() {
        for count in [1, 3] {
            let mut y = vec![0xee; rows * outputs * float.bytes()];
            kernels
                .linear_bytes(
                    &weights.view(),
                    float,
                    rows,
                    &x,
                    bias,
                    &mut y,
                    threads(count),
                )
                .expect("lengths");
            for (i, (have, (need, most))) in floats(&y, float).iter().zip(&needs).enumerate() {
                assert!(
                    (f64::from(*have) - need).abs() <= *most,
                    "{}, {float}, {rows} x {outputs} x {inputs}, blocks of {}, {count} threads: \
                     result {i} is {have}, should be {need} +- {most}",
                    kernels.isa(),
                    weights.block_size
                );
            }
        }
    }
}

#[test]
fn every_format_and_block_size() {
    let mut random = Random(1);
    for quant_type in [QuantType::Nf4, QuantType::Fp4] {
        for block_size in BlockSize::ALL {
            for double in [false, true] {
                let weights = Weights::random(quant_type, 6, 640, block_size, double, &mut random);
                for float in FloatType::ALL {
                    check(&weights, float, 3, double, &mut random);
                }
            }
        }
    }
}

/// Tiles of outputs and rows, and what is left over; scales where blocks begin within rows; sums that are
/// kept for some rows at a time.
#[test]
fn many_outputs_and_rows() {
    let mut random = Random(9);
    for (rows, outputs, inputs, block_size) in [
        (1, 70, 512, 64),
        (8, 33, 352, 32),
        (9, 131, 384, 64),
        (11, 70, 352, 128),
        (14, 117, 672, 32),
        (15, 64, 608, 4096),
        (30, 17, 32, 64),
        (243, 18, 96, 32),
    ] {
        for double in [false, true] {
            let size = BlockSize::new(block_size).expect("valid");
            let weights =
                Weights::random(QuantType::Nf4, outputs, inputs, size, double, &mut random);
            check(&weights, FloatType::Bf16, rows, !double, &mut random);
        }
    }
}

#[test]
fn odd_lengths_and_many_segments() {
    let mut random = Random(2);
    for (rows, outputs, inputs) in [
        (1, 1, 1),
        (2, 3, 33),
        (1, 9, 127),
        (5, 4, 65),
        (2, 13, 2047),
        (1, 5, 2049),
        (3, 7, 4352),
        (4, 2, 6208),
        (7, 30, 64),
        (2, 3, 0),
    ] {
        for double in [false, true] {
            let size = BlockSize::new(if inputs % 3 == 0 { 256 } else { 64 }).expect("valid");
            let weights =
                Weights::random(QuantType::Nf4, outputs, inputs, size, double, &mut random);
            for float in FloatType::ALL {
                check(&weights, float, rows, !double, &mut random);
            }
        }
    }
}

/// A row's result is the same bits among others, and with any number of threads.
#[test]
fn rows_by_themselves() {
    let mut random = Random(3);
    for (outputs, inputs, float) in [
        (11, 4288, FloatType::Bf16),
        (139, 1312, FloatType::Bf16),
        (11, 1000, FloatType::Bf16),
        (11, 2112, FloatType::F32),
        (11, 320, FloatType::F16),
    ] {
        let rows = 13;
        let weights = Weights::random(
            QuantType::Nf4,
            outputs,
            inputs,
            BlockSize::DEFAULT,
            false,
            &mut random,
        );
        let x = random_elements(&mut random, rows * inputs, float);
        for kernels in all() {
            let product = |rows: usize, x: &[u8], count: usize| {
                let mut y = vec![0; rows * outputs * float.bytes()];
                kernels
                    .linear_bytes(
                        &weights.view(),
                        float,
                        rows,
                        x,
                        None,
                        &mut y,
                        threads(count),
                    )
                    .expect("lengths");
                y
            };
            let whole = product(rows, &x, 1);
            let (of_x, of_y) = (inputs * float.bytes(), outputs * float.bytes());
            for count in 1..=rows {
                for begin in [0, rows - count] {
                    let x = &x[begin * of_x..(begin + count) * of_x];
                    assert!(
                        product(count, x, count) == whole[begin * of_y..(begin + count) * of_y],
                        "{}, {float}, {outputs} x {inputs}: {count} rows from {begin}",
                        kernels.isa()
                    );
                }
            }
        }
    }
}

#[test]
fn huge_and_infinite_scales() {
    let mut random = Random(4);
    for inputs in [128, 100] {
        let mut weights = Weights::random(
            QuantType::Nf4,
            6,
            inputs,
            BlockSize::DEFAULT,
            false,
            &mut random,
        );
        weights.absmax.fill(3e38);
        let values: Vec<f32> = (0..inputs).map(|_| random.weight(1e-30)).collect();
        for kernels in all() {
            let x = elements(&values, FloatType::Bf16);
            let mut y = vec![0; 12];
            kernels
                .linear_bytes(
                    &weights.view(),
                    FloatType::Bf16,
                    1,
                    &x,
                    None,
                    &mut y,
                    threads(1),
                )
                .expect("lengths");
            let y = floats(&y, FloatType::Bf16);
            assert!(y.iter().all(|y| y.is_finite() && y.abs() < 1e12));
            assert!(y.iter().any(|y| y.abs() > 1e6));
        }
        weights.absmax.fill(1.0);
        weights.absmax[0] = f32::INFINITY;
        for kernels in all() {
            let x = elements(&vec![1.0; inputs], FloatType::Bf16);
            let mut y = vec![0; 12];
            kernels
                .linear_bytes(
                    &weights.view(),
                    FloatType::Bf16,
                    1,
                    &x,
                    None,
                    &mut y,
                    threads(2),
                )
                .expect("lengths");
            for (i, y) in floats(&y, FloatType::Bf16).iter().enumerate() {
                assert_eq!(y.is_finite(), i != 0, "{}: {i}", kernels.isa());
            }
        }
    }
}

#[test]
fn lengths_that_do_not_belong_together() {
    let mut random = Random(5);
    let weights = Weights::random(QuantType::Nf4, 4, 64, BlockSize::DEFAULT, true, &mut random);
    let run = |weights: LinearWeights<'_>, x: usize, bias: usize, y: usize| {
        let (x, bias, mut y) = (vec![0; x], vec![0; bias], vec![0; y]);
        let kernels = Kernels::detect();
        kernels.linear_bytes(
            &weights,
            FloatType::Bf16,
            2,
            &x,
            Some(&bias),
            &mut y,
            threads(1),
        )
    };
    let wrong = |what, need, have| Err(KernelError::Length { what, need, have });
    assert_eq!(run(weights.view(), 256, 8, 16), Ok(()));
    assert_eq!(run(weights.view(), 254, 8, 16), wrong("x", 256, 254));
    assert_eq!(run(weights.view(), 256, 6, 16), wrong("bias", 8, 6));
    assert_eq!(run(weights.view(), 256, 8, 17), wrong("y", 16, 17));
    let short = LinearWeights {
        codes: &weights.codes[1..],
        ..weights.view()
    };
    assert_eq!(run(short, 256, 8, 16), wrong("codes", 128, 127));
    let short = LinearWeights {
        scales: Scales::Absmax(&[0.0; 5]),
        ..weights.view()
    };
    assert_eq!(run(short, 256, 8, 16), wrong("absmax", 4, 5));
    let short = LinearWeights {
        scales: Scales::Double {
            codes: &[0; 4],
            nested_absmax: &[],
            absmax_mean: 0.0,
            map: &DYNAMIC_MAP,
        },
        ..weights.view()
    };
    assert_eq!(run(short, 256, 8, 16), wrong("nested_absmax", 1, 0));
    // Lengths whose product is no number.
    let endless = LinearWeights {
        outputs: usize::MAX,
        inputs: usize::MAX,
        ..weights.view()
    };
    assert!(matches!(
        run(endless, 256, 8, 16),
        Err(KernelError::Length { what: "codes", .. })
    ));
}

/// dx = dy * W, against f64, with every instruction set.
fn check_transposed(weights: &Weights, float: FloatType, rows: usize, random: &mut Random) {
    let (outputs, inputs) = (weights.outputs, weights.inputs);
    let dy = random_elements(random, rows * outputs, float);
    let dy_values = floats(&dy, float);
    let of_result = match float {
        FloatType::Bf16 => 1.0 / 256.0,
        FloatType::F16 => 1.0 / 2048.0,
        FloatType::F32 => 1e-7,
    };
    for kernels in all() {
        let transposed = |count| {
            let mut dx = vec![0xee; rows * inputs * float.bytes()];
            let view = weights.view();
            kernels
                .linear_transposed_bytes(&view, float, rows, &dy, &mut dx, threads(count))
                .expect("lengths");
            dx
        };
        let dx = transposed(1);
        assert!(dx == transposed(3), "threads change bits");
        let dx = floats(&dx, float);
        for row in 0..rows {
            for input in 0..inputs {
                let (mut sum, mut size) = (0.0, 0.0);
                for output in 0..outputs {
                    let dy = f64::from(dy_values[row * outputs + output]);
                    let product = weights.at(output, input) * dy;
                    sum += product;
                    size += product.abs();
                }
                let most = of_result * sum.abs() + 1e-6 * size + 1e-6;
                let have = f64::from(dx[row * inputs + input]);
                assert!(
                    (have - sum).abs() <= most,
                    "{}, {float}, {rows} x {outputs} x {inputs}: {have}, should be {sum} +- {most}",
                    kernels.isa()
                );
            }
        }
    }
}

#[test]
fn transposed_weights() {
    let mut random = Random(6);
    for (rows, outputs, inputs) in [
        (1, 1, 1),
        (2, 3, 33),
        (3, 35, 127),
        (5, 100, 513),
        (2, 31, 1024),
        (4, 64, 1100),
        (3, 0, 7),
        (3, 7, 0),
        (0, 7, 7),
    ] {
        for double in [false, true] {
            let size = BlockSize::new(if inputs % 3 == 0 { 256 } else { 64 }).expect("valid");
            let weights =
                Weights::random(QuantType::Nf4, outputs, inputs, size, double, &mut random);
            for float in FloatType::ALL {
                check_transposed(&weights, float, rows, &mut random);
            }
        }
    }
}

/// A row's result is the same bits among others.
#[test]
fn transposed_rows_by_themselves() {
    let mut random = Random(7);
    let block_size = BlockSize::DEFAULT;
    let weights = Weights::random(QuantType::Nf4, 77, 600, block_size, true, &mut random);
    let dy = random_elements(&mut random, 5 * 77, FloatType::Bf16);
    for kernels in all() {
        let of = |rows: std::ops::Range<usize>| {
            let mut dx = vec![0; rows.len() * 600 * 2];
            let dy = &dy[rows.start * 77 * 2..rows.end * 77 * 2];
            let (view, bf16) = (weights.view(), FloatType::Bf16);
            kernels
                .linear_transposed_bytes(&view, bf16, rows.len(), dy, &mut dx, threads(2))
                .expect("lengths");
            dx
        };
        let all = of(0..5);
        for row in 0..5 {
            assert!(of(row..row + 1) == all[row * 1200..][..1200]);
        }
    }
}

#[test]
fn transposed_lengths_that_do_not_belong_together() {
    let mut random = Random(8);
    let block_size = BlockSize::DEFAULT;
    let weights = Weights::random(QuantType::Nf4, 4, 64, block_size, false, &mut random);
    let kernels = Kernels::detect();
    for (what, rows, dy, dx, need, have) in [
        ("dy", 2, 7, 128, 32, 28),
        ("dx", 2, 8, 127, 512, 508),
        ("dx", 1, 4, 128, 256, 512),
    ] {
        let (dy, mut dx) = (vec![0f32; dy], vec![7f32; dx]);
        let result = kernels.linear_transposed(&weights.view(), rows, &dy, &mut dx, threads(1));
        assert_eq!(result, Err(KernelError::Length { what, need, have }));
        assert!(dx.iter().all(|dx| *dx == 7.0));
    }
}
