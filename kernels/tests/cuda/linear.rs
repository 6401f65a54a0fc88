//! Products, against f64.

use tightfit_kernels::cuda::{
    self,
    linear::{COUNTERS, Gpu, Linear, LinearLaunch},
};
use tightfit_kernels::{
    BlockSize, DYNAMIC_MAP, FloatType, NESTED_BLOCK_SIZE, QuantType, blocks, packed_bytes,
};

use crate::device::{Argument, Device};
use crate::values::{Random, cast, elements, floats, to_bytes};

/// What is in memory that the kernels have to write.
pub(crate) const UNWRITTEN: u8 = 0xee;

/// A product that is to be computed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Case {
    pub(crate) float: FloatType,
    pub(crate) rows: usize,
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    pub(crate) block_size: usize,
    pub(crate) quant_type: QuantType,
    pub(crate) double_quantized: bool,
    pub(crate) bias: bool,
    pub(crate) aligned: bool,
    pub(crate) by_row: bool,
    pub(crate) multiprocessors: u32,
    /// Whether the kernels for compute capability 8.0 shall do it.
    pub(crate) old: bool,
}

impl Case {
    /// Few rows of bf16, on a GPU so small that tiles belong to several shares.
    pub(crate) const fn new(rows: usize, outputs: usize, inputs: usize) -> Case {
        Case {
            float: FloatType::Bf16,
            rows,
            outputs,
            inputs,
            block_size: 64,
            quant_type: QuantType::Nf4,
            double_quantized: false,
            bias: true,
            aligned: true,
            by_row: false,
            multiprocessors: 2,
            old: false,
        }
    }

    fn block_size(&self) -> BlockSize {
        BlockSize::new(self.block_size).expect("valid")
    }

    pub(crate) fn linear(&self) -> Linear {
        Linear {
            float: self.float,
            rows: self.rows,
            outputs: self.outputs,
            inputs: self.inputs,
            block_size: self.block_size(),
            aligned: self.aligned,
            by_row: self.by_row,
        }
    }

    pub(crate) fn gpu(&self, device: &dyn Device) -> Gpu {
        let capability = device.compute_capability();
        Gpu {
            compute_capability: if self.old {
                capability.min((8, 0))
            } else {
                capability
            },
            multiprocessors: self.multiprocessors,
        }
    }

    fn launch(&self, device: &dyn Device) -> LinearLaunch {
        let launch = self.linear().launch(self.gpu(device));
        launch.expect("not too much")
    }
}

/// Codes, scales, and the scales that kernels recover.
pub(crate) struct Weights {
    pub(crate) codes: Vec<u8>,
    pub(crate) absmax: Vec<f32>,
    pub(crate) nested: Option<(Vec<u8>, Vec<f32>)>,
}

/// What absmax values are offset by with double quantization.
pub(crate) const OFFSET: f32 = 0.04;

impl Weights {
    pub(crate) fn random(case: &Case, random: &mut Random) -> Weights {
        let n = case.outputs * case.inputs;
        let codes = (0..packed_bytes(n)).map(|_| random.next() as u8).collect();
        let count = blocks(n, case.block_size());
        let mut weights = Weights {
            codes,
            absmax: vec![],
            nested: None,
        };
        if case.double_quantized {
            let codes: Vec<u8> = (0..count).map(|_| random.next() as u8).collect();
            let nested: Vec<f32> = (0..count.div_ceil(NESTED_BLOCK_SIZE))
                .map(|_| random.weight(0.05).abs())
                .collect();
            weights.absmax = (0..count)
                .map(|i| {
                    DYNAMIC_MAP[usize::from(codes[i])] * nested[i / NESTED_BLOCK_SIZE] + OFFSET
                })
                .collect();
            weights.nested = Some((codes, nested));
        } else {
            // Some blocks are all zeros, some are a thousand times as large as others.
            weights.absmax = (0..count)
                .map(|_| match random.below(16) {
                    0 => 0.0,
                    1 => 20.0,
                    _ => random.weight(0.05).abs(),
                })
                .collect();
        }
        weights
    }

    pub(crate) fn at(&self, case: &Case, output: usize, input: usize) -> f64 {
        let i = output * case.inputs + input;
        let byte = self.codes[i / 2];
        let code = if i.is_multiple_of(2) {
            byte >> 4
        } else {
            byte & 15
        };
        let value = tightfit_kernels::code_values(case.quant_type)[usize::from(code)];
        f64::from(value) * f64::from(self.absmax[i / case.block_size])
    }
}

pub(crate) fn buffer(bytes: &mut [u8], aligned: bool, element: usize) -> Argument<'_> {
    Argument::Buffer {
        misalignment: if aligned { 0 } else { 16 - element },
        bytes,
    }
}

pub(crate) fn number(value: usize) -> Argument<'static> {
    Argument::Number(value as u64)
}

/// y, with the workspace left as it was found.
fn multiply(
    device: &mut dyn Device,
    case: &Case,
    weights: &Weights,
    x: &[u8],
    bias: Option<&[u8]>,
    workspace: &mut Vec<u8>,
) -> Vec<u8> {
    let launch = case.launch(device);
    if workspace.len() < launch.workspace_bytes {
        // Only the counters have to be zero.
        workspace.resize(COUNTERS, 0);
        workspace.resize(launch.workspace_bytes, 0xff);
    }
    let size = case.float.bytes();
    let mut y = vec![UNWRITTEN; case.rows * case.outputs * size];
    let mut codes = weights.codes.clone();
    let mut absmax = to_bytes(&weights.absmax);
    let mut map = to_bytes(&DYNAMIC_MAP);
    let mut offset = OFFSET.to_le_bytes();
    let (mut nested_codes, mut nested) = match &weights.nested {
        Some((codes, nested)) => (codes.clone(), to_bytes(nested)),
        None => (vec![], vec![]),
    };
    let mut bias = bias.map(<[u8]>::to_vec);
    let mut row = 0;
    while row < case.rows {
        let rows = launch.rows.min(case.rows - row);
        let mut x = x[row * case.inputs * size..(row + rows) * case.inputs * size].to_vec();
        let y = &mut y[row * case.outputs * size..(row + rows) * case.outputs * size];
        let aligned = case.aligned;
        let mut arguments = vec![buffer(&mut codes, aligned, 1)];
        if weights.nested.is_some() {
            arguments.extend([
                buffer(&mut nested_codes, aligned, 1),
                buffer(&mut nested, aligned, 4),
                buffer(&mut offset, aligned, 4),
                buffer(&mut map, aligned, 4),
            ]);
        } else {
            arguments.extend([
                buffer(&mut absmax, aligned, 4),
                number(0),
                number(0),
                number(0),
            ]);
        }
        arguments.push(buffer(&mut x, aligned, size));
        arguments.push(match &mut bias {
            Some(bias) => buffer(bias, aligned, size),
            None => number(0),
        });
        arguments.push(buffer(y, aligned, size));
        arguments.push(match launch.workspace_bytes {
            0 => number(0),
            bytes => buffer(&mut workspace[..bytes], true, 1),
        });
        arguments.extend([
            number(rows),
            number(case.outputs),
            number(case.inputs),
            number(case.block_size),
            Argument::Number(cuda::quant_type_argument(case.quant_type).into()),
            Argument::Number(launch.shares.into()),
        ]);
        device.multiply(launch, &mut arguments);
        row += rows;
    }
    if launch.workspace_bytes > 0 {
        assert!(
            workspace[..COUNTERS].iter().all(|byte| *byte == 0),
            "{case:?}: the counters are not zero again"
        );
    }
    y
}

pub(crate) fn random_elements(
    random: &mut Random,
    count: usize,
    scale: f32,
    float: FloatType,
) -> Vec<u8> {
    let values: Vec<f32> = (0..count).map(|_| random.weight(scale)).collect();
    elements(&values, float)
}

/// How much may be lost of a result by rounding it, and of each product.
pub(crate) fn losses(float: FloatType) -> (f64, f64) {
    match float {
        FloatType::Bf16 => (1.0 / 256.0, 1.0 / 512.0),
        FloatType::F16 => (1.0 / 2048.0, 1.0 / 4096.0),
        FloatType::F32 => (1e-7, 1e-6),
    }
}

fn check(device: &mut dyn Device, case: &Case, workspace: &mut Vec<u8>) {
    let seed = case.rows * 31 + case.outputs * 7 + case.inputs;
    let mut random = Random(seed as u64 + 1);
    let weights = Weights::random(case, &mut random);
    let x = random_elements(&mut random, case.rows * case.inputs, 1.0, case.float);
    let bias = random_elements(&mut random, case.outputs, 1.0, case.float);
    let bias = case.bias.then_some(&bias[..]);
    let y = multiply(device, case, &weights, &x, bias, workspace);

    let widen = |bytes: &[u8]| floats(&cast(bytes, case.float, FloatType::F32));
    let (x, y, bias) = (widen(&x), widen(&y), bias.map(widen));
    let (of_result, of_product) = losses(case.float);
    let (mut wrong, mut all) = (0.0, 0.0);
    for output in 0..case.outputs {
        let row_of_w: Vec<f64> = (0..case.inputs)
            .map(|input| weights.at(case, output, input))
            .collect();
        for row in 0..case.rows {
            let x = &x[row * case.inputs..][..case.inputs];
            let products = row_of_w.iter().zip(x).map(|(w, x)| w * f64::from(*x));
            let (sum, size) = products.fold((0.0, 0.0), |(sum, size), product| {
                (sum + product, size + product.abs())
            });
            let need = sum + bias.as_ref().map_or(0.0, |bias| f64::from(bias[output]));
            let have = f64::from(y[row * case.outputs + output]);
            let most = of_result * need.abs() + of_product * size + 1e-6;
            assert!(
                (have - need).abs() <= most,
                "{case:?}: row {row}, output {output}: {have}, should be {need} +- {most}"
            );
            wrong += (have - need).powi(2);
            all += need.powi(2);
        }
    }
    if case.float == FloatType::Bf16 && all > 0.0 {
        assert!(
            (wrong / all).sqrt() <= 1.0 / 256.0,
            "{case:?}: {}",
            (wrong / all).sqrt()
        );
    }
}

pub(crate) fn few_and_some_rows(device: &mut dyn Device) {
    // One workspace for all of them: each has to leave it as it needs it itself.
    let mut workspace = vec![];
    for rows in [1, 3, 8, 9, 16, 17, 32, 33, 64, 70] {
        // Scales of rows begin at multiples of 4, of 8, and at others.
        for (outputs, inputs) in [(128, 256), (130, 640), (300, 192), (20, 1792), (140, 1024)] {
            for (double_quantized, old) in [(false, false), (true, false), (true, true)] {
                if old && rows <= 16 {
                    continue;
                }
                let case = Case {
                    old,
                    double_quantized,
                    bias: rows % 2 == 1,
                    ..Case::new(rows, outputs, inputs)
                };
                check(device, &case, &mut workspace);
            }
        }
    }
    // A tile of many shares, and shares of many tiles.
    for (outputs, inputs, multiprocessors) in [(16, 4096, 8), (1200, 256, 2), (700, 1024, 1)] {
        let case = Case {
            multiprocessors,
            ..Case::new(2, outputs, inputs)
        };
        check(device, &case, &mut workspace);
    }
}

pub(crate) fn many_rows(device: &mut dyn Device) {
    let mut workspace = vec![];
    for (rows, outputs, inputs, multiprocessors) in [
        // One step, one tile; tiles that are not whole, and several for a thread block.
        (65, 128, 64, 2),
        (256, 250, 192, 2),
        (310, 513, 320, 4),
        (200, 255, 256, 3),
        // In parts, of which each has its own groups of steps, and the last one not a whole one.
        (100, 120, 832, 6),
        (140, 40, 1088, 132),
        // One pair of tiles for each cluster, and two parts of the last one.
        (80, 600, 1344, 4),
    ] {
        for double_quantized in [false, true] {
            let case = Case {
                double_quantized,
                multiprocessors,
                bias: rows % 4 == 0,
                ..Case::new(rows, outputs, inputs)
            };
            if device.compute_capability() == (9, 0) {
                let launch = case.launch(device);
                assert!(launch.kernel.contains("many"), "{case:?}");
                let in_parts = [832, 1088, 1344].contains(&inputs);
                assert_eq!(launch.shares > 1, in_parts, "{case:?}");
            }
            check(device, &case, &mut workspace);
        }
    }
    for (float, quant_type, block_size) in [
        (FloatType::F16, QuantType::Nf4, 64),
        (FloatType::F16, QuantType::Fp4, 128),
        (FloatType::Bf16, QuantType::Fp4, 4096),
    ] {
        for double_quantized in [false, true] {
            let case = Case {
                float,
                quant_type,
                block_size,
                double_quantized,
                multiprocessors: 1,
                ..Case::new(129, 127, 576)
            };
            check(device, &case, &mut workspace);
        }
    }
}

pub(crate) fn every_format_and_block_size(device: &mut dyn Device) {
    let mut workspace = vec![];
    for float in FloatType::ALL {
        for quant_type in [QuantType::Nf4, QuantType::Fp4] {
            for block_size in BlockSize::ALL {
                for double_quantized in [false, true] {
                    let case = Case {
                        float,
                        quant_type,
                        block_size: block_size.elements(),
                        double_quantized,
                        ..Case::new(5, 72, 448)
                    };
                    check(device, &case, &mut workspace);
                }
            }
        }
    }
}

pub(crate) fn odd_lengths_and_alignments(device: &mut dyn Device) {
    let mut workspace = vec![];
    for float in FloatType::ALL {
        for (rows, outputs, inputs) in [
            (1, 1, 1),
            (1, 7, 33),
            (2, 9, 127),
            (9, 5, 65),
            (3, 17, 300),
            (17, 3, 1),
            (4, 6, 0),
        ] {
            for double_quantized in [false, true] {
                let case = Case {
                    float,
                    double_quantized,
                    ..Case::new(rows, outputs, inputs)
                };
                check(device, &case, &mut workspace);
            }
        }
        for (rows, inputs) in [(1, 256), (20, 64)] {
            let case = Case {
                float,
                aligned: false,
                ..Case::new(rows, 40, inputs)
            };
            check(device, &case, &mut workspace);
        }
    }
    for (rows, outputs) in [(0, 5), (5, 0)] {
        check(device, &Case::new(rows, outputs, 64), &mut workspace);
    }
}

/// Not only is a row's result right: it is the same whatever is beside it.
pub(crate) fn rows_by_themselves(device: &mut dyn Device) {
    let mut workspace = vec![];
    for (outputs, inputs, float) in [
        (200, 1216, FloatType::Bf16),
        (24, 320, FloatType::F16),
        (24, 77, FloatType::Bf16),
    ] {
        let all = Case {
            by_row: true,
            float,
            ..Case::new(131, outputs, inputs)
        };
        let mut random = Random(9);
        let weights = Weights::random(&all, &mut random);
        let x = random_elements(&mut random, all.rows * inputs, 1.0, float);
        let bias = random_elements(&mut random, outputs, 1.0, float);
        let size = float.bytes();
        let mut product = |rows: &[usize], multiprocessors| {
            let x: Vec<u8> = rows
                .iter()
                .flat_map(|row| &x[row * inputs * size..(row + 1) * inputs * size])
                .copied()
                .collect();
            let case = Case {
                rows: rows.len(),
                multiprocessors,
                ..all
            };
            let bias = Some(&bias[..]);
            multiply(device, &case, &weights, &x, bias, &mut workspace)
        };
        let whole = product(&(0..all.rows).collect::<Vec<_>>(), 132);
        let row_of =
            |y: &[u8], row: usize| y[row * outputs * size..(row + 1) * outputs * size].to_vec();
        for rows in [1usize, 8, 13, 32, 50, 64] {
            let chosen: Vec<usize> = (0..rows).map(|i| (i * 37 + rows) % all.rows).collect();
            let y = product(&chosen, 40 + rows as u32);
            for (i, row) in chosen.iter().enumerate() {
                assert!(
                    row_of(&y, i) == row_of(&whole, *row),
                    "{float}, {outputs} x {inputs}: row {row} among {rows} is not the same"
                );
            }
        }
    }
}

/// Scales that cannot be multiplied with codes first, and infinite ones.
pub(crate) fn huge_blocks(device: &mut dyn Device) {
    let mut workspace = vec![];
    for inputs in [256, 100] {
        let case = Case {
            bias: false,
            ..Case::new(2, 130, inputs)
        };
        let mut random = Random(5);
        let mut weights = Weights::random(&case, &mut random);
        weights.absmax.fill(3e38);
        let x = random_elements(&mut random, 2 * inputs, 1e-30, case.float);
        let y = multiply(device, &case, &weights, &x, None, &mut workspace);
        let y = floats(&cast(&y, case.float, FloatType::F32));
        assert!(
            y.iter().all(|y| y.is_finite() && y.abs() < 1e12),
            "{inputs}"
        );
        assert!(y.iter().any(|y| y.abs() > 1e6), "{inputs}");
        // An infinite block makes its own output's results infinite or NaN, and no others.
        weights.absmax.fill(1.0);
        weights.absmax[0] = f32::INFINITY;
        let x = random_elements(&mut random, 2 * inputs, 1.0, case.float);
        let y = multiply(device, &case, &weights, &x, None, &mut workspace);
        let y = floats(&cast(&y, case.float, FloatType::F32));
        for (i, y) in y.iter().enumerate() {
            assert_eq!(y.is_finite(), i % case.outputs != 0, "{inputs}: {i}");
        }
    }
}
