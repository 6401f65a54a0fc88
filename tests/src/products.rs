//! Products with the 4-bit weights of loaded models, against f64 of the dequantized weights.

use tightfit::model::{Model, Tensor};
use tightfit::products::{Linear, LinearError};
use tightfit_kernels::Float;
use tightfit_kernels::half::{bf16, f16};

/// A type of operands, with how much is lost of a result by rounding it, and of each product.
trait Number: Float {
    const LOSSES: (f64, f64);
    const LARGEST: f64;
    fn of(value: f32) -> Self;
    fn value(self) -> f64;
}

macro_rules! numbers {
    ($($float:ty: $losses:expr, $largest:expr, $of:expr, $value:expr;)*) => {
        $(impl Number for $float {
            const LOSSES: (f64, f64) = $losses;
            const LARGEST: f64 = $largest;
            fn of(value: f32) -> Self {
                $of(value)
            }
            fn value(self) -> f64 {
                f64::from($value(self))
            }
        })*
    };
}

numbers! {
    f32: (1e-7, 1e-6), 1e38, |value| value, |value: f32| value;
    f16: (1.0 / 2048.0, 1.0 / 4096.0), 6e4, f16::from_f32, f16::to_f32;
    bf16: (1.0 / 256.0, 1.0 / 512.0), 1e38, bf16::from_f32, bf16::to_f32;
}

/// Checks the products with a weight, or with each matrix of a stack that begins with a block, in every
/// type. Gives how many were checked.
pub fn check_products(model: &Model, tensor: Tensor<'_>) -> usize {
    let name = tensor.name();
    let weights: Vec<f32> = tensor.to_floats().unwrap_or_else(|error| panic!("{error}"));
    let linears: Vec<Result<Linear<'_>, LinearError>> = match *tensor.shape() {
        [_, _] => vec![model.linear(name)],
        [matrices, _, _] => (0..matrices)
            .map(|index| model.linear_of(name, index))
            .collect(),
        _ => return 0,
    };
    let elements = (weights.len() / linears.len().max(1)).max(1);
    let mut checked = 0;
    for (linear, weights) in linears.iter().zip(weights.chunks(elements)) {
        match linear {
            Ok(linear) => {
                check::<f32>(linear, weights);
                check::<f16>(linear, weights);
                check::<bf16>(linear, weights);
                checked += 1;
            }
            Err(LinearError::Inside { index, .. }) if *index > 0 => {}
            Err(error) => panic!("{error}"),
        }
    }
    checked
}

fn check<T: Number>(linear: &Linear<'_>, weights: &[f32]) {
    const ROWS: usize = 2;
    let (outputs, inputs) = (linear.outputs(), linear.inputs());
    let mut state = 1u64;
    let x: Vec<T> = (0..ROWS * inputs)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
            T::of(((state >> 33) as f32) / (1u64 << 30) as f32 - 1.0)
        })
        .collect();
    let mut y = vec![T::of(f32::NAN); ROWS * outputs];
    linear
        .forward(&x, ROWS, None, &mut y)
        .unwrap_or_else(|error| panic!("{error}"));
    let (of_result, of_product) = T::LOSSES;
    for (row, x) in x.chunks(inputs.max(1)).enumerate() {
        for (output, weights) in weights.chunks(inputs.max(1)).enumerate() {
            let products = weights.iter().zip(x);
            let products = products.map(|(weight, x)| f64::from(*weight) * x.value());
            let (need, size) = products.fold((0.0, 0.0), |(sum, size), product| {
                (sum + product, size + f64::abs(product))
            });
            // A weight that is no number, or too large for a type, gives a result that is none.
            if !size.is_finite() || size > T::LARGEST {
                continue;
            }
            let have = y[row * outputs + output].value();
            let most = of_result * need.abs() + of_product * size + 1e-6;
            assert!(
                (have - need).abs() <= most,
                "{linear:?} of {}: row {row}, output {output}: {have}, should be {need} +- {most}",
                T::TYPE
            );
        }
    }
}
