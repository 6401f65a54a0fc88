//! Products of loaded models, against f64 of the dequantized weights.

use tempfile::TempDir;
use tightfit_kernels::half::{bf16, f16};
use tightfit_kernels::{BlockSize, Kernels};

use super::*;
use crate::checkpoint::Checkpoint;
use crate::device::{Device, DeviceOperands, HostDevice};
use crate::load::{LoadOptions, load};
use crate::plan::{Plan, PlanOptions};
use crate::testing::{Source, source, write_checkpoint};
use crate::types::{DType, Format, Placement};

pub(super) const fn nf4(block_size: usize, double_quantized: bool) -> Format {
    let Ok(block_size) = BlockSize::new(block_size) else {
        panic!("it is no block size");
    };
    Format::Nf4 {
        block_size,
        double_quantized,
    }
}

/// Loads tensors onto two simulated devices, in turn.
pub(super) fn loaded(cases: &[(Source, Format)]) -> Model {
    let directory = TempDir::new().unwrap();
    let sources = cases.iter().map(|(source, _)| Source {
        bytes: source.bytes.clone(),
        shape: source.shape.clone(),
        ..*source
    });
    write_checkpoint(directory.path(), &sources.collect::<Vec<_>>());
    let checkpoint = Checkpoint::open(directory.path().join("model.safetensors")).unwrap();
    let devices: Vec<Box<dyn Device>> = vec![
        Box::new(HostDevice::sim(0, 1 << 30)),
        Box::new(HostDevice::cpu(None)),
    ];
    let infos: Vec<_> = devices.iter().map(|device| device.info()).collect();
    let placements: Vec<Placement> = checkpoint
        .tensors()
        .iter()
        .enumerate()
        .map(|(index, tensor)| Placement {
            device: Some(index as u32 % 2),
            format: cases
                .iter()
                .find(|(source, _)| source.name == tensor.name)
                .map(|&(_, format)| format)
                .unwrap(),
        })
        .collect();
    let options = PlanOptions::default().with_rows(8);
    let tensors = checkpoint.tensors();
    let plan = Plan::new_with(tensors, &[], &infos, &placements, &[0, 0], &options).unwrap();
    load(&checkpoint, &plan, &devices, &LoadOptions::default()).unwrap()
}

/// Numbers between -1 and 1, the same in every run.
pub(super) fn numbers<T: FromF32>(count: usize, seed: u64) -> Vec<T> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
        T::from_f32(((state >> 33) as f32) / (1u64 << 30) as f32 - 1.0)
    };
    (0..count).map(next).collect()
}

pub(super) trait FromF32: Float + PartialEq + fmt::Debug {
    /// How much of a result is lost by rounding it, and of each product.
    const LOSSES: (f64, f64);
    fn from_f32(value: f32) -> Self;
    fn to_f64(self) -> f64;
}

macro_rules! from_f32 {
    ($($float:ty: $result:expr, $product:expr, $from:expr, $to:expr;)*) => {
        $(impl FromF32 for $float {
            const LOSSES: (f64, f64) = ($result, $product);
            fn from_f32(value: f32) -> Self {
                $from(value)
            }
            fn to_f64(self) -> f64 {
                $to(self).into()
            }
        })*
    };
}

from_f32! {
    f32: 1e-7, 1e-6, |value| value, |value: f32| value;
    f16: 1.0 / 2048.0, 1.0 / 4096.0, f16::from_f32, f16::to_f32;
    bf16: 1.0 / 256.0, 1.0 / 512.0, bf16::from_f32, bf16::to_f32;
}

/// The product of a matrix of a tensor, from its dequantized elements.
fn check<T: FromF32>(linear: &Linear<'_>, first: usize, rows: usize, with_bias: bool) {
    let (outputs, inputs) = (linear.outputs(), linear.inputs());
    let x: Vec<T> = numbers(rows * inputs, 1);
    let bias: Vec<T> = numbers(outputs, 2);
    let bias = with_bias.then_some(&bias[..]);
    let mut y = vec![T::from_f32(f32::NAN); rows * outputs];
    linear.forward(&x, rows, bias, &mut y).unwrap();
    let weights: Vec<f32> = linear.tensor().to_floats().unwrap();
    let weights = &weights[first..][..outputs * inputs];
    let (of_result, of_product) = T::LOSSES;
    for row in 0..rows {
        for output in 0..outputs {
            let x = &x[row * inputs..][..inputs];
            let weights = &weights[output * inputs..][..inputs];
            let products = weights.iter().zip(x);
            let products = products.map(|(weight, x)| f64::from(*weight) * x.to_f64());
            let (sum, size) = products.fold((0.0, 0.0), |(sum, size), product| {
                (sum + product, size + f64::abs(product))
            });
            let need = sum + bias.map_or(0.0, |bias| bias[output].to_f64());
            let have = y[row * outputs + output].to_f64();
            let most = of_result * need.abs() + of_product * size + 1e-6;
            assert!(
                (have - need).abs() <= most,
                "{linear:?}: row {row}, output {output}: {have}, should be {need} +- {most}"
            );
        }
    }
}

fn check_all_types(linear: &Linear<'_>, first: usize) {
    for rows in [0, 1, 3, 17] {
        check::<f32>(linear, first, rows, rows % 2 == 1);
        check::<f16>(linear, first, rows, rows % 2 == 1);
        check::<bf16>(linear, first, rows, rows % 2 == 0);
    }
}

#[test]
fn products_are_those_of_the_dequantized_weights() {
    let matrix = |name, shape: &[u64]| source(name, DType::Bf16, shape);
    let model = loaded(&[
        (matrix("blocks of 64", &[72, 448]), nf4(64, false)),
        (matrix("blocks of 32", &[40, 192]), nf4(32, false)),
        (matrix("blocks of 4096", &[65, 192]), nf4(4096, false)),
        (matrix("odd", &[33, 77]), nf4(64, false)),
        (matrix("double", &[130, 320]), nf4(64, true)),
        (matrix("double odd", &[131, 257]), nf4(128, true)),
        (matrix("wide", &[5, 5000]), nf4(64, true)),
        (matrix("of no rows", &[0, 64]), nf4(64, true)),
        (matrix("of no columns", &[3, 0]), nf4(64, false)),
    ]);
    for tensor in model.tensors() {
        let linear = model.linear(tensor.name()).unwrap();
        assert_eq!(linear.outputs() as u64, tensor.shape()[0]);
        assert_eq!(linear.inputs() as u64, tensor.shape()[1]);
        assert_eq!(linear.device(), tensor.device());
        assert_eq!(Some(linear.quantization()), tensor.quantization());
        assert!(!linear.is_on_gpu());
        check_all_types(&linear, 0);
    }
}

#[test]
fn matrices_of_stacks_are_multiplied_one_by_one() {
    let stack = |name, shape: &[u64]| source(name, DType::Bf16, shape);
    let model = loaded(&[
        (stack("plain", &[3, 40, 96]), nf4(64, false)),
        (
            stack("double, at nested scales", &[3, 128, 128]),
            nf4(64, true),
        ),
        (stack("double, between them", &[3, 40, 96]), nf4(64, true)),
        (stack("one", &[1, 7, 9]), nf4(64, true)),
    ]);
    for tensor in model.tensors() {
        for index in 0..tensor.shape()[0] {
            let linear = model.linear_of(tensor.name(), index).unwrap();
            let first = index as usize * linear.outputs() * linear.inputs();
            check_all_types(&linear, first);
        }
    }
}

#[test]
fn what_is_no_matrix_in_4_bits_is_refused_and_named() {
    let model = loaded(&[
        (source("stored", DType::Bf16, &[64, 64]), Format::Stored),
        (
            source("cast", DType::F32, &[64, 64]),
            Format::Cast(DType::Bf16),
        ),
        (source("vector", DType::Bf16, &[128]), nf4(64, false)),
        (source("matrix", DType::Bf16, &[64, 64]), nf4(64, false)),
        (source("stack", DType::Bf16, &[3, 5, 7]), nf4(64, false)),
    ]);
    let refused = |result: Result<Linear<'_>, LinearError>, texts: &[&str]| {
        let error = result.unwrap_err();
        let text = error.to_string();
        assert!(texts.iter().all(|part| text.contains(part)), "{text}");
        assert_eq!(
            crate::status::Status::from(&error),
            crate::status::Status::Usage
        );
    };
    refused(model.linear("nobody"), &["'nobody'", "loaded"]);
    refused(model.linear("stored"), &["'stored'", "bf16", "stored"]);
    refused(model.linear("cast"), &["'cast'", "f32", "cast:bf16"]);
    refused(
        model.linear("vector"),
        &["'vector'", "[128]", "2 dimensions"],
    );
    refused(model.linear("stack"), &["'stack'", "[3, 5, 7]", "a matrix"]);
    refused(model.linear_of("matrix", 0), &["[64, 64]", "3 dimensions"]);
    refused(model.linear_of("stack", 3), &["matrix 3", "has 3"]);
    refused(
        model.linear_of("stack", 1),
        &["element 35", "a block", "a multiple of 64"],
    );
    assert!(model.linear_of("stack", 0).is_ok());
}

#[test]
fn operands_of_other_lengths_are_refused_and_nothing_is_written() {
    let model = loaded(&[(source("w", DType::Bf16, &[6, 64]), nf4(64, true))]);
    let linear = model.linear("w").unwrap();
    let (x, bias) = ([1.0; 128], [0.0; 6]);
    let refused = |x: &[f32], rows, bias: Option<&[f32]>, y: usize, what: &str, need, have| {
        let mut y = vec![7.0; y];
        let error = linear.forward(x, rows, bias, &mut y).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("{what} for tensor 'w' has {have} elements, need {need}")
        );
        assert!(y.iter().all(|y| *y == 7.0));
    };
    refused(&x[..127], 2, None, 12, "x", 128, 127);
    refused(&x, 1, None, 6, "x", 64, 128);
    refused(&x, 2, None, 11, "y", 12, 11);
    refused(&x, 2, Some(&bias[..5]), 12, "the bias", 6, 5);
    refused(&x, usize::MAX, None, 12, "x", usize::MAX, 128);
    let operands = HostOperands {
        x: &[0; 255],
        bias: None,
        y: &mut [0; 24],
    };
    let error = linear
        .forward_bytes(FloatType::F32, 1, operands, &LinearOptions::default())
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "x for tensor 'w' has 255 bytes, need 256"
    );
}

#[test]
fn neither_threads_nor_other_rows_nor_alignment_change_a_bit() {
    let model = loaded(&[(source("w", DType::Bf16, &[700, 1000]), nf4(64, true))]);
    let linear = model.linear("w").unwrap();
    let x: Vec<bf16> = numbers(5 * 1000, 3);
    let product = |rows: std::ops::Range<usize>, options: &LinearOptions| {
        let mut y = vec![bf16::ZERO; rows.len() * 700];
        let x = &x[rows.start * 1000..rows.end * 1000];
        linear
            .forward_with(x, rows.len(), None, &mut y, options)
            .unwrap();
        y
    };
    let all = product(0..5, &LinearOptions::default());
    for threads in [0, 1, 2, 3, 7] {
        let options = LinearOptions::default().with_threads(threads);
        assert_eq!(product(0..5, &options), all, "{threads}");
    }
    for row in 0..5 {
        let options = LinearOptions::default().with_by_row(true);
        let alone = product(row..row + 1, &options);
        assert_eq!(alone, all[row * 700..][..700]);
    }
    let mut bytes = vec![0];
    bytes.extend_from_slice(bytemuck::cast_slice(&x));
    let mut y = vec![0; 5 * 700 * 2 + 1];
    let operands = HostOperands {
        x: &bytes[1..],
        bias: None,
        y: &mut y[1..],
    };
    linear
        .forward_bytes(FloatType::Bf16, 5, operands, &LinearOptions::default())
        .unwrap();
    assert_eq!(y[1..], *bytemuck::cast_slice::<bf16, u8>(&all));
}

#[test]
fn portable_kernels_may_be_asked_for() {
    let model = loaded(&[(source("w", DType::F16, &[20, 128]), nf4(64, false))]);
    let linear = model.linear("w").unwrap();
    let x: Vec<f32> = numbers(128, 3);
    let portable = Kernels::new(tightfit_kernels::Isa::Portable).unwrap();
    let (mut one, mut other) = ([0.0; 20], [0.0; 20]);
    let options = LinearOptions::default().with_kernels(portable);
    linear
        .forward_with(&x, 1, None, &mut one, &options)
        .unwrap();
    linear.forward(&x, 1, None, &mut other).unwrap();
    for (one, other) in one.iter().zip(other) {
        assert!((one - other).abs() < 1e-4);
    }
}

#[test]
#[allow(unsafe_code)]
fn in_host_memory_nothing_is_given_to_a_stream() {
    let model = loaded(&[(source("w", DType::Bf16, &[20, 128]), nf4(64, true))]);
    let linear = model.linear("w").unwrap();
    assert_eq!(linear.workspace_bytes(64, FloatType::Bf16, false), 0);
    for device in [0, 1, 7] {
        let workspace = model.linear_workspace(device, 64).unwrap();
        assert_eq!((workspace.bytes(), workspace.address()), (0, None));
    }
    let operands = DeviceOperands::new(16, 32, std::ptr::null_mut());
    // SAFETY: refused before anything is done with the pointers.
    let error = unsafe { linear.forward_on_device(FloatType::Bf16, 1, &operands, false) };
    let text = error.unwrap_err().to_string();
    assert!(
        text.contains("'w'") && text.contains("host memory"),
        "{text}"
    );
}

/// dx = dy * W, from the dequantized elements.
fn check_gradient<T: FromF32>(linear: &Linear<'_>, first: usize, rows: usize) {
    let (outputs, inputs) = (linear.outputs(), linear.inputs());
    let dy: Vec<T> = numbers(rows * outputs, 5);
    let mut dx = vec![T::from_f32(f32::NAN); rows * inputs];
    linear.input_gradient(&dy, rows, &mut dx).unwrap();
    let weights: Vec<f32> = linear.tensor().to_floats().unwrap();
    let weights = &weights[first..][..outputs * inputs];
    let (of_result, _) = T::LOSSES;
    for row in 0..rows {
        for input in 0..inputs {
            let (mut need, mut size) = (0.0, 0.0);
            for output in 0..outputs {
                let weight = f64::from(weights[output * inputs + input]);
                let product = weight * dy[row * outputs + output].to_f64();
                need += product;
                size += f64::abs(product);
            }
            let have = dx[row * inputs + input].to_f64();
            let most = of_result * f64::abs(need) + 1e-6 * size + 1e-6;
            assert!(
                (have - need).abs() <= most,
                "{linear:?}: row {row}, input {input}: {have}, should be {need} +- {most}"
            );
        }
    }
}

#[test]
fn gradients_are_products_with_the_dequantized_weights() {
    let matrix = |name, shape: &[u64]| source(name, DType::Bf16, shape);
    let model = loaded(&[
        (matrix("plain", &[72, 448]), nf4(64, false)),
        (matrix("double", &[33, 1037]), nf4(64, true)),
        (matrix("of no rows", &[0, 64]), nf4(64, true)),
        (matrix("of no columns", &[3, 0]), nf4(64, false)),
        (matrix("stack", &[3, 40, 96]), nf4(64, true)),
    ]);
    for tensor in model.tensors() {
        let matrices = match *tensor.shape() {
            [matrices, _, _] => (0..matrices).map(Some).collect(),
            _ => vec![None],
        };
        for index in matrices {
            let linear = Linear::find(&model, tensor.name(), index).unwrap();
            let first = index.unwrap_or(0) as usize * linear.outputs() * linear.inputs();
            for rows in [0, 1, 9] {
                check_gradient::<f32>(&linear, first, rows);
                check_gradient::<f16>(&linear, first, rows);
                check_gradient::<bf16>(&linear, first, rows);
            }
        }
    }
    let linear = model.linear("plain").unwrap();
    let mut dx = [7f32; 448];
    let error = linear.input_gradient(&[0.0; 71], 1, &mut dx).unwrap_err();
    let text = "dy for tensor 'plain' has 71 elements, need 72";
    assert_eq!(error.to_string(), text);
    let error = linear.input_gradient(&[0.0; 144], 2, &mut dx).unwrap_err();
    let text = "dx for tensor 'plain' has 448 elements, need 896";
    assert_eq!(error.to_string(), text);
    assert_eq!(dx, [7.0; 448]);
    assert_eq!(
        linear.input_gradient_workspace_bytes(64, FloatType::Bf16, false),
        0
    );
}
