//! Products. Of bf16 rows with the instructions for bf16, of others as f32.

pub(crate) mod bf16;

use std::arch::x86_64::*;

use super::memory::*;
use crate::{
    linear::{self, GROUP},
    transposed::{self, AddScaled},
};

type AddProducts = fn(&[f32], &[&[u8]; GROUP], &mut [f32; GROUP]);

/// The code for AVX-512, to be called where [`crate::Isa::Avx512`] is available.
pub(crate) fn add_products_if_available() -> AddProducts {
    if crate::Isa::Avx512.is_available() {
        // SAFETY: the processor has the instructions.
        |x, weights, sums| unsafe { add_products(x, weights, sums) }
    } else {
        linear::add_products
    }
}

/// The same for products with the transposed weights.
pub(crate) fn add_scaled_if_available() -> AddScaled {
    if crate::Isa::Avx512.is_available() {
        // SAFETY: the processor has the instructions.
        |weights, factors, sums| unsafe { add_scaled(weights, factors, sums) }
    } else {
        transposed::add_scaled
    }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
fn add_scaled(weights: &[f32], factors: [f32; GROUP], sums: &mut [f32]) {
    transposed::add_scaled(weights, factors, sums);
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
fn add_products(x: &[f32], weights: &[&[u8]; GROUP], sums: &mut [f32; GROUP]) {
    let (chunks, rest) = x.as_chunks::<16>();
    let split = weights.map(|weights| weights.as_chunks::<64>());
    let mut lanes = [_mm512_setzero_ps(); GROUP];
    for (i, x) in chunks.iter().enumerate() {
        let x = load512_f32(x);
        for (lanes, (weights, _)) in lanes.iter_mut().zip(&split) {
            let weights = _mm512_castsi512_ps(load512(&weights[i]));
            *lanes = _mm512_fmadd_ps(x, weights, *lanes);
        }
    }
    for ((sum, lanes), (_, weights)) in sums.iter_mut().zip(lanes).zip(split) {
        *sum += _mm512_reduce_add_ps(lanes) + linear::rest_of_products(rest, weights);
    }
}
