//! Products of bf16 rows, with the instruction that multiplies matrices of bf16.
//!
//! It takes four numbers of two rows and of two outputs, and adds their products to four sums. So
//! rows of x, and outputs, come in pairs; of a row without another the other one is zeros. The products
//! of a unit of 32 inputs are summed, multiplied with the scale, and added to the sum of the units
//! before, whatever the number of rows.

use std::{
    arch::{aarch64::*, asm, is_aarch64_feature_detected},
    ops::Range,
};

use super::super::memory::*;
use crate::{
    LinearWeights, float,
    linear::{GROUP, SEGMENT, code_factor},
};

/// Inputs that are summed before they are multiplied with their scale: the smallest block.
const UNIT: usize = 32;

/// Pairs of rows that are multiplied together: their sums stay in registers.
const TILE: usize = 4;

/// A unit of two rows, or of two outputs' weights: eight times four numbers of the one, then four of
/// the other. Inputs are in the order of [`input`].
pub(crate) type Unit = [[u16; 8]; 8];

/// Which input of a unit comes at a place: first those of the high halves of bytes.
const fn input(place: usize) -> usize {
    place % 16 * 2 + place / 16
}

/// Orders x, little-endian bf16: the units of each pair of rows. Returns nothing where the processor
/// or the weights need other code.
pub(crate) fn pairs_if_possible(
    weights: &LinearWeights<'_>,
    rows: usize,
    x: &[u8],
) -> Option<Vec<Unit>> {
    let inputs = weights.inputs;
    if !is_aarch64_feature_detected!("bf16") || inputs == 0 || !inputs.is_multiple_of(UNIT) {
        return None;
    }
    let (x, _) = x.as_chunks::<2>();
    let mut units = vec![[[0; 8]; 8]; rows.div_ceil(2) * (inputs / UNIT)];
    for (row, x) in x.chunks_exact(inputs).enumerate() {
        let units = &mut units[row / 2 * (inputs / UNIT)..];
        for (x, unit) in x.as_chunks::<UNIT>().0.iter().zip(units) {
            for place in 0..UNIT {
                unit[place / 4][row % 2 * 4 + place % 4] = u16::from_le_bytes(x[input(place)]);
            }
        }
    }
    Some(units)
}

/// The weights of a unit, of two pairs of outputs.
#[derive(Clone, Copy)]
struct Kept {
    weights: [Unit; GROUP / 2],
    /// The scales of each pair, twice.
    scales: [[f32; 4]; GROUP / 2],
}

/// The sums of some outputs, for each row those of all of these outputs.
#[target_feature(enable = "neon,bf16")]
pub(crate) fn sums_of_pairs(
    weights: &LinearWeights<'_>,
    rows: usize,
    x: &[Unit],
    outputs: Range<usize>,
    sums: &mut [f32],
) {
    let (units, count) = (weights.inputs / UNIT, outputs.len());
    let values = Values::new(weights);
    let zero = Kept {
        weights: [[[0; 8]; 8]; GROUP / 2],
        scales: [[0.0; 4]; GROUP / 2],
    };
    let mut kept = vec![zero; units.min(SEGMENT / UNIT)];
    for begin in (0..units).step_by(SEGMENT / UNIT) {
        let segment = begin..units.min(begin + SEGMENT / UNIT);
        let kept = &mut kept[..segment.len()];
        for first in (0..count).step_by(GROUP) {
            // Where there are less than four, the last one comes more than once.
            let last = count - 1;
            let group = std::array::from_fn(|i| outputs.start + last.min(first + i));
            values.decode(weights, group, segment.start, kept);
            for (tile, pairs) in (0..rows.div_ceil(2))
                .step_by(TILE)
                .zip(x.chunks(TILE * units))
            {
                let mut results = [[[0.0; 4]; GROUP / 2]; TILE];
                let pair = |i: usize| &pairs[i * units..][segment.clone()];
                match pairs.len() / units {
                    1 => multiply(kept, [pair(0)], &mut results),
                    2 => multiply(kept, [pair(0), pair(1)], &mut results),
                    3 => multiply(kept, [pair(0), pair(1), pair(2)], &mut results),
                    _ => multiply(kept, [pair(0), pair(1), pair(2), pair(3)], &mut results),
                }
                for row in 2 * tile..rows.min(2 * (tile + TILE)) {
                    let results = results[row / 2 - tile];
                    let sums = &mut sums[row * count + first..(row + 1) * count];
                    for (i, sum) in sums.iter_mut().take(GROUP).enumerate() {
                        *sum += results[i / 2][row % 2 * 2 + i % 2];
                    }
                }
            }
        }
    }
    for sum in sums {
        *sum /= code_factor(weights.quant_type);
    }
}

/// Multiplies pairs of rows with the weights of a segment.
#[target_feature(enable = "neon,bf16")]
fn multiply<const PAIRS: usize>(
    kept: &[Kept],
    x: [&[Unit]; PAIRS],
    results: &mut [[[f32; 4]; GROUP / 2]; TILE],
) {
    let mut sums = [[vdupq_n_f32(0.0); GROUP / 2]; PAIRS];
    for (unit, kept) in kept.iter().enumerate() {
        let mut products = [[vdupq_n_f32(0.0); GROUP / 2]; PAIRS];
        for four in 0..UNIT / 4 {
            for pair in 0..PAIRS {
                let x = load_numbers(&x[pair][unit][four]);
                for (product, weights) in products[pair].iter_mut().zip(&kept.weights) {
                    *product = multiply_add(*product, x, load_numbers(&weights[four]));
                }
            }
        }
        for pair in 0..PAIRS {
            for of in 0..GROUP / 2 {
                let scales = load_f32(&kept.scales[of]);
                sums[pair][of] = vfmaq_f32(sums[pair][of], products[pair][of], scales);
            }
        }
    }
    for (sums, results) in sums.iter().zip(results) {
        for (sum, result) in sums.iter().zip(results) {
            store_f32(result, *sum);
        }
    }
}

/// Adds the products of two rows, four numbers each, with two outputs' weights.
#[target_feature(enable = "neon,bf16")]
#[inline]
fn multiply_add(sum: float32x4_t, x: uint16x8_t, weights: uint16x8_t) -> float32x4_t {
    let mut result = sum;
    // SAFETY: the processor has the instruction, which reads and writes these registers only. There is
    // no function for it yet.
    unsafe {
        asm!(
            "bfmmla {result:v}.4s, {x:v}.8h, {weights:v}.8h",
            result = inout(vreg) result,
            x = in(vreg) x,
            weights = in(vreg) weights,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    result
}

/// The values of codes as bf16: their low bytes, and their high bytes.
struct Values {
    low: uint8x16_t,
    high: uint8x16_t,
}

impl Values {
    #[target_feature(enable = "neon")]
    fn new(weights: &LinearWeights<'_>) -> Values {
        let factor = code_factor(weights.quant_type);
        let values = crate::code_values(weights.quant_type);
        let values = values.map(|value| float::f32_to_bf16(value * factor));
        let uint8x16x2_t(low, high) = load_halves(&values);
        Values { low, high }
    }

    /// Decodes units of four outputs, from unit `first` on.
    #[target_feature(enable = "neon")]
    fn decode(
        &self,
        weights: &LinearWeights<'_>,
        group: [usize; GROUP],
        first: usize,
        kept: &mut [Kept],
    ) {
        let units = kept.len();
        // Where rows are whole pairs of units, so are blocks.
        let pairs = weights.inputs.is_multiple_of(2 * UNIT) && units.is_multiple_of(2);
        let shift = usize::from(pairs && weights.block_size.elements() > UNIT);
        let mut scales = [0.0; SEGMENT / UNIT];
        for (i, outputs) in group.as_chunks::<2>().0.iter().enumerate() {
            for (j, output) in outputs.iter().enumerate() {
                let begin = output * weights.inputs + first * UNIT;
                let scales = &mut scales[..units >> shift];
                weights.read_scales(begin, UNIT << shift, scales);
                for (unit, kept) in kept.iter_mut().enumerate() {
                    kept.scales[i][j] = scales[unit >> shift];
                    kept.scales[i][j + 2] = scales[unit >> shift];
                }
            }
            let codes = outputs.map(|output| {
                let begin = (output * weights.inputs + first * UNIT) / 2;
                weights.codes[begin..].as_chunks::<{ UNIT / 2 }>().0
            });
            for (kept, (a, b)) in kept.iter_mut().zip(codes[0].iter().zip(codes[1])) {
                let (a, b) = (self.of_codes(load(a)), self.of_codes(load(b)));
                for ((a, b), out) in a
                    .into_iter()
                    .zip(b)
                    .zip(kept.weights[i].as_chunks_mut::<2>().0)
                {
                    store_numbers(&mut out[0], vzip1q_u64(a, b));
                    store_numbers(&mut out[1], vzip2q_u64(a, b));
                }
            }
        }
    }

    /// The values of 32 codes, in the order of [`input`].
    #[target_feature(enable = "neon")]
    #[inline]
    fn of_codes(&self, bytes: uint8x16_t) -> [uint64x2_t; 4] {
        let (even, odd) = (vshrq_n_u8::<4>(bytes), vandq_u8(bytes, vdupq_n_u8(0x0f)));
        let (low, high) = (vqtbl1q_u8(self.low, even), vqtbl1q_u8(self.high, even));
        let (odd_low, odd_high) = (vqtbl1q_u8(self.low, odd), vqtbl1q_u8(self.high, odd));
        [
            vreinterpretq_u64_u8(vzip1q_u8(low, high)),
            vreinterpretq_u64_u8(vzip2q_u8(low, high)),
            vreinterpretq_u64_u8(vzip1q_u8(odd_low, odd_high)),
            vreinterpretq_u64_u8(vzip2q_u8(odd_low, odd_high)),
        ]
    }
}
