//! Products of f32.

use std::arch::x86_64::*;

use super::memory::*;
use crate::linear::{self, GROUP};
use crate::transposed::{self, AddScaled};

type AddProducts = fn(&[f32], &[&[u8]; GROUP], &mut [f32; GROUP]);

/// The code for AVX2 if this processor has what it needs.
pub(crate) fn add_products_if_available() -> AddProducts {
    if is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("f16c")
        && is_x86_feature_detected!("fma")
    {
        // SAFETY: the processor has the instructions.
        |x, weights, sums| unsafe { add_products(x, weights, sums) }
    } else {
        linear::add_products
    }
}

/// The same for products with the transposed weights.
pub(crate) fn add_scaled_if_available() -> AddScaled {
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the processor has the instructions.
        |weights, factors, sums| unsafe { add_scaled(weights, factors, sums) }
    } else {
        transposed::add_scaled
    }
}

#[target_feature(enable = "avx2,fma")]
fn add_scaled(weights: &[f32], factors: [f32; GROUP], sums: &mut [f32]) {
    transposed::add_scaled(weights, factors, sums);
}

#[target_feature(enable = "avx2,f16c,fma")]
fn add_products(x: &[f32], weights: &[&[u8]; GROUP], sums: &mut [f32; GROUP]) {
    let (chunks, rest) = x.as_chunks::<8>();
    let split = weights.map(|weights| weights.as_chunks::<32>());
    let mut lanes = [[_mm256_setzero_ps(); 2]; GROUP];
    for (i, pair) in chunks.chunks(2).enumerate() {
        for (half, x) in pair.iter().enumerate() {
            let x = load256_f32(x);
            for (lanes, (weights, _)) in lanes.iter_mut().zip(&split) {
                let weights = _mm256_castsi256_ps(load256(&weights[2 * i + half]));
                lanes[half] = _mm256_fmadd_ps(x, weights, lanes[half]);
            }
        }
    }
    for ((sum, lanes), (_, weights)) in sums.iter_mut().zip(lanes).zip(split) {
        let [a, b] = lanes;
        let sum8 = _mm256_add_ps(a, b);
        let sum4 = _mm_add_ps(
            _mm256_castps256_ps128(sum8),
            _mm256_extractf128_ps::<1>(sum8),
        );
        let sum2 = _mm_add_ps(sum4, _mm_movehl_ps(sum4, sum4));
        let sum1 = _mm_add_ss(sum2, _mm_movehdup_ps(sum2));
        *sum += _mm_cvtss_f32(sum1) + linear::rest_of_products(rest, weights);
    }
}
