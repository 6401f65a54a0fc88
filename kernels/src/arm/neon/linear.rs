//! Products. Of bf16 rows with the instruction for bf16 where there is one, of others as f32.

pub(crate) mod bf16;

use std::arch::aarch64::*;

use super::memory::*;
use crate::linear::{self, GROUP};

/// [`linear::add_products`] with instructions that multiply and add. Every 64-bit Arm processor has
/// them.
pub(crate) fn add_products(x: &[f32], weights: &[&[u8]; GROUP], sums: &mut [f32; GROUP]) {
    // SAFETY: what this module is compiled for has NEON.
    unsafe { add_products_with_neon(x, weights, sums) }
}

#[target_feature(enable = "neon")]
fn add_products_with_neon(x: &[f32], weights: &[&[u8]; GROUP], sums: &mut [f32; GROUP]) {
    let (chunks, rest) = x.as_chunks::<16>();
    let split = weights.map(|weights| weights.as_chunks::<64>());
    // 16 sums in registers, four for each output.
    let mut lanes = [[vdupq_n_f32(0.0); 4]; GROUP];
    for (i, x) in chunks.iter().enumerate() {
        let (x, _) = x.as_chunks::<4>();
        for (lanes, (weights, _)) in lanes.iter_mut().zip(&split) {
            let (weights, _) = weights[i].as_chunks::<16>();
            for ((lane, x), weights) in lanes.iter_mut().zip(x).zip(weights) {
                let weights = vreinterpretq_f32_u8(load(weights));
                *lane = vfmaq_f32(*lane, load_f32(x), weights);
            }
        }
    }
    for ((sum, [a, b, c, d]), (_, weights)) in sums.iter_mut().zip(lanes).zip(split) {
        let lanes = vaddq_f32(vaddq_f32(a, b), vaddq_f32(c, d));
        *sum += vaddvq_f32(lanes) + linear::rest_of_products(rest, weights);
    }
}
