//! Products with transposed weights, against f64.

use tightfit_kernels::cuda::{self, linear::COUNTERS};
use tightfit_kernels::{DYNAMIC_MAP, FloatType, QuantType};

use crate::device::{Argument, Device};
use crate::linear::{Case, OFFSET, UNWRITTEN, Weights, buffer, losses, number, random_elements};
use crate::values::{Random, cast, floats, to_bytes};

/// dx = dy * W.
fn check_transposed(device: &mut dyn Device, case: &Case, workspace: &mut Vec<u8>) {
    let mut random = Random((case.rows * 31 + case.outputs * 7 + case.inputs) as u64 + 1);
    let weights = Weights::random(case, &mut random);
    let mut dy = random_elements(&mut random, case.rows * case.outputs, 1.0, case.float);
    let launch = case
        .linear()
        .launch_transposed(case.gpu(device))
        .expect("not too much");
    if workspace.len() < launch.workspace_bytes {
        workspace.resize(COUNTERS, 0);
        workspace.resize(launch.workspace_bytes, 0xff);
    }
    let mut dx = vec![UNWRITTEN; case.rows * case.inputs * case.float.bytes()];
    let mut codes = weights.codes.clone();
    let mut scales = to_bytes(&weights.absmax);
    let mut map = to_bytes(&DYNAMIC_MAP);
    let mut offset = OFFSET.to_le_bytes();
    let mut nested = vec![];
    if let Some((codes, absmax)) = &weights.nested {
        (scales, nested) = (codes.clone(), to_bytes(absmax));
    }
    let double = weights.nested.is_some();
    let (aligned, size) = (case.aligned, case.float.bytes());
    let mut arguments = vec![
        buffer(&mut codes, aligned, 1),
        buffer(&mut scales, aligned, if double { 1 } else { 4 }),
    ];
    if double {
        arguments.extend([
            buffer(&mut nested, aligned, 4),
            buffer(&mut offset, aligned, 4),
            buffer(&mut map, aligned, 4),
        ]);
    } else {
        arguments.extend([number(0), number(0), number(0)]);
    }
    arguments.extend([
        buffer(&mut dy, aligned, size),
        number(0),
        buffer(&mut dx, aligned, size),
        match launch.workspace_bytes {
            0 => number(0),
            _ => buffer(workspace, true, 1),
        },
        number(case.rows),
        number(case.outputs),
        number(case.inputs),
        number(case.block_size),
        Argument::Number(cuda::quant_type_argument(case.quant_type).into()),
        Argument::Number(launch.shares.into()),
    ]);
    device.multiply(launch, &mut arguments);
    let mut counters = workspace.iter().take(COUNTERS);
    assert!(counters.all(|byte| *byte == 0), "{case:?}: counters");

    let widen = |bytes: &[u8]| floats(&cast(bytes, case.float, FloatType::F32));
    let (dy, dx) = (widen(&dy), widen(&dx));
    let (of_result, of_product) = losses(case.float);
    for row in 0..case.rows {
        for input in 0..case.inputs {
            let (mut need, mut size) = (0.0, 0.0);
            for output in 0..case.outputs {
                let dy = f64::from(dy[row * case.outputs + output]);
                let product = weights.at(case, output, input) * dy;
                need += product;
                size += product.abs();
            }
            let have = f64::from(dx[row * case.inputs + input]);
            // Weights are rounded to the type, too.
            let most = of_result * need.abs() + 2.0 * of_product * size + 1e-6;
            assert!(
                (have - need).abs() <= most,
                "{case:?}, transposed: row {row}, input {input}: {have}, should be {need} +- {most}"
            );
        }
    }
}

/// By the kernels for many rows.
pub(crate) fn many_rows_transposed(device: &mut dyn Device) {
    let mut workspace = vec![];
    for (rows, outputs, inputs, multiprocessors) in [
        (1, 64, 64, 2),
        // Inputs of half a tile, outputs that are no whole step, several tiles for a thread block.
        (130, 200, 320, 2),
        (300, 72, 128, 6),
        // In parts.
        (70, 840, 192, 10),
        (129, 1096, 64, 132),
    ] {
        for (double_quantized, float, block_size) in [
            (false, FloatType::Bf16, 64),
            (true, FloatType::Bf16, 128),
            (true, FloatType::F16, 64),
        ] {
            for by_row in [false, true] {
                let case = Case {
                    double_quantized,
                    float,
                    block_size,
                    by_row,
                    multiprocessors,
                    ..Case::new(rows, outputs, inputs)
                };
                if device.compute_capability() == (9, 0) {
                    let launch = case.linear().launch_transposed(case.gpu(device));
                    let launch = launch.expect("not too much");
                    assert!(launch.kernel.contains("many"), "{case:?}");
                    let in_parts = outputs > 800 && !by_row;
                    assert_eq!(launch.shares > 1, in_parts, "{case:?}");
                }
                check_transposed(device, &case, &mut workspace);
            }
        }
    }
}

pub(crate) fn transposed(device: &mut dyn Device) {
    let mut workspace = vec![];
    for float in FloatType::ALL {
        for (rows, outputs, inputs) in [
            (1, 8, 32),
            (3, 64, 128),
            (64, 72, 160),
            (65, 200, 96),
            // Outputs in three shares, and in one.
            (5, 840, 64),
            (70, 840, 160),
            (130, 520, 96),
            (9, 7, 64),
            (2, 33, 45),
            (1, 1, 1),
            (4, 0, 32),
            (3, 16, 0),
        ] {
            for (block_size, double_quantized) in [(64, false), (32, true), (4096, false)] {
                let case = Case {
                    by_row: block_size == 4096,
                    float,
                    block_size,
                    double_quantized,
                    ..Case::new(rows, outputs, inputs)
                };
                check_transposed(device, &case, &mut workspace);
            }
        }
        let unaligned = Case {
            float,
            aligned: false,
            quant_type: QuantType::Fp4,
            ..Case::new(5, 16, 64)
        };
        check_transposed(device, &unaligned, &mut workspace);
    }
}
