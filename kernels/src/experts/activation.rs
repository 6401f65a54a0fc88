//! What becomes of a gate and the other projection beside it.

/// Where the gates and the other projections ("up") are among the outputs of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GateLayout {
    /// All gates, and behind them all others: [2, intermediate, inputs].
    Halves,
    /// Each gate before the other one of the same result, as gpt-oss has them: [intermediate, 2, inputs].
    Interleaved,
}

/// What is made of a gate and the other projection ("up").
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `gate * sigmoid(gate) * up`.
    Silu,
    /// `gate * (1 + erf(gate / sqrt(2))) / 2 * up`.
    Gelu,
    /// `gate * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 * gate^3))) / 2 * up`.
    GeluTanh,
    /// That of gpt-oss: with the gate at most `limit` and the other one within `-limit` and `limit`,
    /// `gate * sigmoid(1.702 * gate) * (up + 1)`.
    Clamped {
        /// Not negative; 7.0 in gpt-oss.
        limit: f32,
    },
}

impl Activation {
    /// Computes it, in f32 and to a few ulps.
    pub fn apply(self, gate: f32, up: f32) -> f32 {
        match self {
            Activation::Silu => gate / (1.0 + (-gate).exp()) * up,
            // Twice the share of the normal distribution below the gate, without the difference from 1.
            Activation::Gelu => {
                let share = erfc(-f64::from(gate) * std::f64::consts::FRAC_1_SQRT_2);
                (0.5 * f64::from(gate) * share) as f32 * up
            }
            Activation::GeluTanh => {
                // (1 + tanh(z)) / 2 is 1 / (1 + exp(-2 z)).
                let z = 0.797_884_6 * (gate + 0.044_715 * gate * gate * gate);
                gate / (1.0 + (-2.0 * z).exp()) * up
            }
            Activation::Clamped { limit } => {
                // NaN is neither above nor below.
                let gate = if gate > limit { limit } else { gate };
                let up = if up > limit { limit } else { up };
                let up = if up < -limit { -limit } else { up };
                (up + 1.0) * (gate / (1.0 + (-1.702 * gate).exp()))
            }
        }
    }
}

/// 1 - erf(x), to 1.2e-7 of it: a Chebyshev fit (Press et al., Numerical Recipes, `erfcc`).
fn erfc(x: f64) -> f64 {
    const FIT: [f64; 10] = [
        -1.265_512_23,
        1.000_023_68,
        0.374_091_96,
        0.096_784_18,
        -0.186_288_06,
        0.278_868_07,
        -1.135_203_98,
        1.488_515_87,
        -0.822_152_23,
        0.170_872_77,
    ];
    let t = 1.0 / (1.0 + 0.5 * x.abs());
    let polynomial = FIT.iter().rev().fold(0.0, |sum, fit| sum * t + fit);
    let above = t * (polynomial - x * x).exp();
    if x < 0.0 { 2.0 - above } else { above }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The series around 0 and the fraction from 3 on, to more than 1e-12 of the result.
    fn exact_erfc(x: f64) -> f64 {
        if x < 0.0 {
            return 2.0 - exact_erfc(-x);
        }
        if x < 3.0 {
            let (mut sum, mut term) = (0.0, x);
            for n in 0..200 {
                sum += term / f64::from(2 * n + 1);
                term *= -x * x / f64::from(n + 1);
            }
            return 1.0 - sum * std::f64::consts::FRAC_2_SQRT_PI;
        }
        let fraction = (1..200)
            .rev()
            .fold(x, |fraction, n| x + f64::from(n) / 2.0 / fraction);
        (-x * x).exp() / fraction * std::f64::consts::FRAC_2_SQRT_PI / 2.0
    }

    #[test]
    fn erfc_is_exact_to_single_precision() {
        for i in -500..1000 {
            let x = f64::from(i) / 100.0;
            let (have, need) = (erfc(x), exact_erfc(x));
            assert!((have - need).abs() <= 1.3e-7 * need, "{x}: {have}, {need}");
        }
    }

    #[test]
    fn values_that_are_known() {
        let near = |have: f32, need: f32| {
            assert!((have - need).abs() <= 2e-6 * need.abs(), "{have}, {need}");
        };
        // As torch's functions give them in f64.
        near(Activation::Silu.apply(1.5, 2.0), 2.452_723_4);
        near(Activation::Silu.apply(-20.0, 1.0), -4.122_307e-8);
        near(Activation::Gelu.apply(1.5, 2.0), 2.799_578_4);
        near(Activation::Gelu.apply(-4.0, 1.0), -1.266_849_7e-4);
        near(Activation::GeluTanh.apply(1.5, 2.0), 2.799_143_2);
        near(Activation::GeluTanh.apply(-3.0, 1.0), -3.637_392e-3);
        let clamped = Activation::Clamped { limit: 7.0 };
        near(clamped.apply(1.5, 2.0), 4.174_986_6);
        near(clamped.apply(100.0, 100.0), 55.999_625);
        near(clamped.apply(100.0, -100.0), -41.999_72);
        near(clamped.apply(-9.0, -7.5), 1.201_906_8e-5);
    }

    #[test]
    fn what_is_not_a_number_stays_so() {
        for activation in [
            Activation::Silu,
            Activation::Gelu,
            Activation::GeluTanh,
            Activation::Clamped { limit: 7.0 },
        ] {
            assert!(activation.apply(f32::NAN, 1.0).is_nan());
            assert!(activation.apply(1.0, f32::NAN).is_nan());
            assert_eq!(activation.apply(-1e30, 1.0), 0.0);
            let need = match activation {
                Activation::Clamped { .. } => 13.999_906,
                _ => 1e30,
            };
            let have = activation.apply(1e30, 1.0);
            assert!((have - need).abs() <= 1e-6 * need, "{have}, {need}");
        }
    }
}
