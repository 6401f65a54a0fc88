//! Products. Of bf16 rows with the instructions for bf16, of others as f32.

use std::{arch::x86_64::*, mem, ops::Range};

use super::memory::*;
use crate::{
    LinearWeights, QuantType, float,
    linear::{self, GROUP, SEGMENT},
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

/// Codes lose less in bf16 if they are all multiplied with the same number first, which sums are
/// divided by. FP4's become exact; for NF4 it is the number for which the sum of the squares of what
/// rounding loses is least.
const fn code_factor(quant_type: QuantType) -> f32 {
    match quant_type {
        QuantType::Nf4 => 1.437_006,
        QuantType::Fp4 => 3.0,
    }
}

/// 64 weights: those at even places, and those at odd ones.
type Pair = [__m512i; 2];

/// Blocks of 64 in a segment.
const BLOCKS: usize = SEGMENT / 64;

/// Rows that are multiplied with kept weights together.
const STEP: usize = 4;

/// Rows from which on decoded weights are kept for the next rows.
const KEEP: usize = 3;

/// Decodes 64 weights. Of an index only the lowest five bits count, and the table is there twice, so
/// that the fifth does not.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
fn decode(codes: &[u8; 32], table: __m512i) -> Pair {
    let bytes = _mm512_cvtepu8_epi16(load256(codes));
    [
        _mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(bytes), table),
        _mm512_permutexvar_epi16(bytes, table),
    ]
}

#[target_feature(enable = "avx512bf16")]
#[inline]
fn multiply_add(sum: __m512, weights: __m512i, x: __m512i) -> __m512 {
    // SAFETY: vectors of 64 bytes, of which every bit pattern is valid.
    let (weights, x) = unsafe {
        (
            mem::transmute::<__m512i, __m512bh>(weights),
            mem::transmute::<__m512i, __m512bh>(x),
        )
    };
    _mm512_dpbf16_ps(sum, weights, x)
}

/// Sums of a segment, of four outputs and some rows.
type Sums<const ROWS: usize> = [[f32; ROWS]; GROUP];

// Loops instead of closures from here on: closures are not compiled into their callers where those
// have other instructions than the functions of the standard library that call them.

/// What 64 weights of each output and some rows add to their sums.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512bf16")]
#[inline]
fn add_block<const ROWS: usize>(
    sums: &mut [[__m512; ROWS]; GROUP],
    weights: &[Pair; GROUP],
    scales: &[&[f32]; GROUP],
    rows: &[&[[u16; 64]]; ROWS],
    block: usize,
) {
    for row in 0..ROWS {
        let x = &rows[row][block];
        let x = [load512_u16(&x[..32]), load512_u16(&x[32..])];
        for i in 0..GROUP {
            let product = multiply_add(_mm512_setzero_ps(), weights[i][0], x[0]);
            let product = multiply_add(product, weights[i][1], x[1]);
            sums[i][row] = _mm512_fmadd_ps(_mm512_set1_ps(scales[i][block]), product, sums[i][row]);
        }
    }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
fn reduce<const ROWS: usize>(sums: &[[__m512; ROWS]; GROUP]) -> Sums<ROWS> {
    let mut reduced = [[0.0; ROWS]; GROUP];
    for i in 0..GROUP {
        for row in 0..ROWS {
            reduced[i][row] = _mm512_reduce_add_ps(sums[i][row]);
        }
    }
    reduced
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
fn decode_block(codes: &[&[[u8; 32]]; GROUP], block: usize, table: __m512i) -> [Pair; GROUP] {
    let mut weights = [[_mm512_setzero_si512(); 2]; GROUP];
    for i in 0..GROUP {
        weights[i] = decode(&codes[i][block], table);
    }
    weights
}

/// With weights decoded on the way.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512bf16")]
fn decode_and_multiply<const ROWS: usize>(
    rows: [&[[u16; 64]]; ROWS],
    codes: &[&[[u8; 32]]; GROUP],
    table: __m512i,
    scales: &[&[f32]; GROUP],
) -> Sums<ROWS> {
    let mut sums = [[_mm512_setzero_ps(); ROWS]; GROUP];
    for block in 0..scales[0].len() {
        let weights = decode_block(codes, block, table);
        add_block(&mut sums, &weights, scales, &rows, block);
    }
    reduce(&sums)
}

/// With weights that have been decoded.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512bf16")]
fn multiply<const ROWS: usize>(
    rows: [&[[u16; 64]]; ROWS],
    weights: &[[Pair; GROUP]],
    scales: &[&[f32]; GROUP],
) -> Sums<ROWS> {
    let mut sums = [[_mm512_setzero_ps(); ROWS]; GROUP];
    for (block, weights) in weights.iter().enumerate() {
        add_block(&mut sums, weights, scales, &rows, block);
    }
    reduce(&sums)
}

/// Copies the sums of some rows; returns how many.
fn widen<const ROWS: usize>(sums: &Sums<ROWS>, to: &mut Sums<STEP>) -> usize {
    for (sums, to) in sums.iter().zip(to) {
        to[..ROWS].copy_from_slice(sums);
    }
    ROWS
}

/// The sums of some outputs, for each row those of all of these outputs. Inputs are a multiple of
/// 64, and so are blocks. `x`: of each 64 elements those at even places first.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(crate) fn sums_of_bf16(
    weights: &LinearWeights<'_>,
    rows: usize,
    x: &[[u16; 64]],
    outputs: Range<usize>,
    sums: &mut [f32],
) {
    let factor = code_factor(weights.quant_type);
    let mut table = [0; 32];
    for (i, value) in table.iter_mut().enumerate() {
        *value = float::f32_to_bf16(crate::code_values(weights.quant_type)[i % 16] * factor);
    }
    let table = load512_u16(&table);
    let (inputs, count) = (weights.inputs, outputs.len());
    let blocks = inputs / 64;
    let zero = [[_mm512_setzero_si512(); 2]; GROUP];
    let mut kept = vec![zero; if rows < KEEP { 0 } else { BLOCKS }];
    for begin in (0..blocks).step_by(BLOCKS) {
        let end = blocks.min(begin + BLOCKS);
        let len = end - begin;
        for first in (0..count).step_by(GROUP) {
            let group = (count - first).min(GROUP);
            let mut codes: [&[[u8; 32]]; GROUP] = [&[]; GROUP];
            let mut scales: [&[f32]; GROUP] = [&[]; GROUP];
            let mut buffers = [[0.0; BLOCKS]; GROUP];
            for (i, buffer) in buffers.iter_mut().enumerate() {
                // Where there are less than four, the last one comes more than once.
                let output = outputs.start + first + i.min(group - 1);
                let at = output * inputs / 2 + begin * 32;
                codes[i] = weights.codes[at..at + len * 32].as_chunks::<32>().0;
                scales[i] = weights.scales_of_64(output, begin * 64..end * 64, buffer);
            }
            for (block, kept) in kept.iter_mut().take(len).enumerate() {
                *kept = decode_block(&codes, block, table);
            }
            let row_of_x = |row: usize| &x[row * blocks..][begin..end];
            let mut row = 0;
            while row < rows {
                let mut results = [[0.0; STEP]; GROUP];
                let x0 = row_of_x(row);
                let step = if kept.is_empty() {
                    if rows - row >= 2 {
                        let two = [x0, row_of_x(row + 1)];
                        widen(
                            &decode_and_multiply(two, &codes, table, &scales),
                            &mut results,
                        )
                    } else {
                        widen(
                            &decode_and_multiply([x0], &codes, table, &scales),
                            &mut results,
                        )
                    }
                } else if rows - row >= STEP {
                    let all = [x0, row_of_x(row + 1), row_of_x(row + 2), row_of_x(row + 3)];
                    widen(&multiply(all, &kept[..len], &scales), &mut results)
                } else {
                    widen(&multiply([x0], &kept[..len], &scales), &mut results)
                };
                for (i, results) in results.iter().enumerate().take(group) {
                    for (row_of_step, result) in results.iter().enumerate().take(step) {
                        sums[(row + row_of_step) * count + first + i] += result;
                    }
                }
                row += step;
            }
        }
    }
    for sum in sums {
        *sum /= factor;
    }
}
