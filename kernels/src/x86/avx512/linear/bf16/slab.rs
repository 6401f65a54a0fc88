//! Products with a slab of weights: while it is decoded, and of weights that have been kept.

use std::{arch::x86_64::*, mem, ops::Range};

use super::{LANES, SLAB, UNIT, Unit, matrix::Matrix};
use crate::x86::avx512::memory::*;

/// Four weights of each lane's eight, as pairs.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
fn decode(codes: __m512i, values: __m512i) -> [__m512i; 4] {
    [
        _mm512_permutexvar_epi16(codes, values),
        _mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(codes), values),
        _mm512_permutexvar_epi16(_mm512_srli_epi16::<8>(codes), values),
        _mm512_permutexvar_epi16(_mm512_srli_epi16::<12>(codes), values),
    ]
}

#[target_feature(enable = "avx512bf16")]
#[inline]
fn multiply_add(sum: __m512, weights: __m512i, pair: u32) -> __m512 {
    let x = _mm512_set1_epi32(pair as i32);
    // SAFETY: vectors of 64 bytes, of which every bit pattern is valid.
    let (weights, x) = unsafe {
        (
            mem::transmute::<__m512i, __m512bh>(weights),
            mem::transmute::<__m512i, __m512bh>(x),
        )
    };
    _mm512_dpbf16_ps(sum, weights, x)
}

// Loops instead of closures from here on: closures are not compiled into their callers where those
// have other instructions than the functions of the standard library that call them.

/// Adds the products of eight inputs of some units, of which `unit` is the first one.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512bf16")]
#[inline]
fn add_eight<const EIGHT: usize, const ROWS: usize, const UNITS: usize>(
    codes: &[[__m512i; 4]; UNITS],
    values: __m512i,
    x: &[&[Unit; UNITS]; ROWS],
    products: &mut [[__m512; UNITS]; ROWS],
    unit: usize,
    keep: &mut impl Keep,
) {
    let mut weights = [[_mm512_setzero_si512(); 4]; UNITS];
    for unit in 0..UNITS {
        weights[unit] = decode(codes[unit][EIGHT], values);
    }
    for pair in 0..4 {
        for row in 0..ROWS {
            for unit in 0..UNITS {
                let x = x[row][unit][4 * EIGHT + pair];
                products[row][unit] = multiply_add(products[row][unit], weights[unit][pair], x);
            }
        }
    }
    keep.weights(unit, EIGHT, &weights);
}

/// What becomes of decoded weights and their scales.
trait Keep {
    fn weights<const UNITS: usize>(
        &mut self,
        unit: usize,
        eight: usize,
        weights: &[[__m512i; 4]; UNITS],
    );
    fn scales<const UNITS: usize>(&mut self, unit: usize, scales: &[__m512; UNITS]);
}

/// Nothing.
impl Keep for () {
    fn weights<const UNITS: usize>(&mut self, _: usize, _: usize, _: &[[__m512i; 4]; UNITS]) {}
    fn scales<const UNITS: usize>(&mut self, _: usize, _: &[__m512; UNITS]) {}
}

/// They are kept as those of a vector.
impl<const VECTORS: usize> Keep for (&mut [Kept<VECTORS>], usize) {
    #[inline(always)]
    fn weights<const UNITS: usize>(
        &mut self,
        unit: usize,
        eight: usize,
        weights: &[[__m512i; 4]; UNITS],
    ) {
        let (kept, vector) = self;
        for (kept, weights) in kept[unit..unit + UNITS].iter_mut().zip(weights) {
            for (pair, weights) in weights.iter().enumerate() {
                kept.weights[4 * eight + pair][*vector] = *weights;
            }
        }
    }

    #[inline(always)]
    fn scales<const UNITS: usize>(&mut self, unit: usize, scales: &[__m512; UNITS]) {
        let (kept, vector) = self;
        for (kept, scale) in kept[unit..unit + UNITS].iter_mut().zip(scales) {
            kept.scales[*vector] = *scale;
        }
    }
}

/// Adds the products of some units of 16 outputs with some rows to their sums. Units are taken together:
/// each product waits for the one before of its unit.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512bf16")]
#[inline]
fn add_units<const ROWS: usize, const UNITS: usize>(
    codes: &[[__m512i; 4]; UNITS],
    values: __m512i,
    scales: [__m512; UNITS],
    rows: &[&[Unit]; ROWS],
    unit: usize,
    sums: &mut [__m512; ROWS],
    keep: &mut impl Keep,
) {
    let mut x = [&[[0; UNIT / 2]; UNITS]; ROWS];
    for row in 0..ROWS {
        x[row] = rows[row][unit..unit + UNITS].try_into().expect("as many");
    }
    let mut products = [[_mm512_setzero_ps(); UNITS]; ROWS];
    // Not a loop, so that codes stay in registers.
    add_eight::<0, _, _>(codes, values, &x, &mut products, unit, keep);
    add_eight::<1, _, _>(codes, values, &x, &mut products, unit, keep);
    add_eight::<2, _, _>(codes, values, &x, &mut products, unit, keep);
    add_eight::<3, _, _>(codes, values, &x, &mut products, unit, keep);
    keep.scales(unit, &scales);
    for i in 0..UNITS {
        for row in 0..ROWS {
            sums[row] = _mm512_fmadd_ps(scales[i], products[row][i], sums[row]);
        }
    }
}

/// Adds the products of a slab of 16 outputs with some rows to their sums.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512bf16")]
#[inline]
fn add_slab<const ROWS: usize>(
    matrix: &Matrix<'_>,
    output: usize,
    units: Range<usize>,
    rows: &[&[Unit]; ROWS],
    sums: &mut [__m512; ROWS],
    keep: &mut impl Keep,
) {
    let (values, shift) = (matrix.values, matrix.run_shift);
    let mut scales = [_mm512_setzero_ps(); 4];
    for i in (0..units.len()).step_by(2) {
        let unit = units.start + i;
        if i.is_multiple_of(4) {
            matrix.prefetch(output, unit);
        }
        if i.is_multiple_of(4 << shift) {
            scales = matrix.scales(output, unit >> shift);
            if unit.is_multiple_of(16 << shift) {
                matrix.prefetch_scales(output, unit >> shift);
            }
        }
        let scale = scales[(i >> shift) % 4];
        if i + 2 > units.len() {
            let codes = [matrix.codes(output, unit)];
            add_units(&codes, values, [scale], rows, i, sums, keep);
            continue;
        }
        let scales = [scale, scales[((i + 1) >> shift) % 4]];
        let codes = matrix.codes_of_two(output, unit);
        if ROWS <= 4 {
            add_units(&codes, values, scales, rows, i, sums, keep);
        } else {
            // There are not enough registers for two.
            add_units(&[codes[0]], values, [scales[0]], rows, i, sums, keep);
            add_units(&[codes[1]], values, [scales[1]], rows, i + 1, sums, keep);
        }
    }
}

/// The sums of 16 outputs and all rows, with weights decoded on the way.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn decode_and_multiply<const ROWS: usize>(
    matrix: &Matrix<'_>,
    output: usize,
    x: &[Unit],
) -> [[f32; LANES]; ROWS] {
    let mut sums = [_mm512_setzero_ps(); ROWS];
    let units = matrix.units();
    for begin in (0..units).step_by(SLAB) {
        let range = begin..units.min(begin + SLAB);
        let slab = &x[begin * ROWS..range.end * ROWS];
        let mut rows = [slab; ROWS];
        for row in 0..ROWS {
            rows[row] = &slab[row * range.len()..][..range.len()];
        }
        add_slab(matrix, output, range, &rows, &mut sums, &mut ());
    }
    let mut results = [[0.0; LANES]; ROWS];
    for row in 0..ROWS {
        store512(
            bytemuck::cast_mut(&mut results[row]),
            _mm512_castps_si512(sums[row]),
        );
    }
    results
}

/// Weights of a unit of some vectors of outputs.
#[derive(Clone, Copy)]
pub(super) struct Kept<const VECTORS: usize> {
    pub(super) weights: [[__m512i; VECTORS]; UNIT / 2],
    pub(super) scales: [__m512; VECTORS],
}

impl<const VECTORS: usize> Kept<VECTORS> {
    /// Decodes some units of outputs that begin at these, and adds the products with some rows to their
    /// sums: these are computed while codes are waited for.
    #[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) fn decode_and_multiply<const ROWS: usize>(
        matrix: &Matrix<'_>,
        outputs: &[usize; VECTORS],
        units: Range<usize>,
        kept: &mut [Self],
        rows: [&[Unit]; ROWS],
        all_sums: &mut [[[f32; LANES]; VECTORS]],
    ) {
        let all_sums: &mut [[[f32; LANES]; VECTORS]; ROWS] =
            all_sums.try_into().expect("as many rows");
        for vector in 0..VECTORS {
            let mut sums = [_mm512_setzero_ps(); ROWS];
            for row in 0..ROWS {
                sums[row] = load512_f32(&all_sums[row][vector]);
            }
            let keep = &mut (&mut *kept, vector);
            add_slab(
                matrix,
                outputs[vector],
                units.clone(),
                &rows,
                &mut sums,
                keep,
            );
            for row in 0..ROWS {
                let sum = bytemuck::cast_mut(&mut all_sums[row][vector]);
                store512(sum, _mm512_castps_si512(sums[row]));
            }
        }
    }

    /// Adds the products with some rows to their sums.
    #[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) fn multiply<const ROWS: usize>(
        kept: &[Self],
        rows: [&[Unit]; ROWS],
        sums: &mut [[[f32; LANES]; VECTORS]],
    ) {
        let sums: &mut [[[f32; LANES]; VECTORS]; ROWS] = sums.try_into().expect("as many rows");
        for (unit, kept) in kept.iter().enumerate() {
            let mut products = [[_mm512_setzero_ps(); VECTORS]; ROWS];
            for (pair, weights) in kept.weights.iter().enumerate() {
                for row in 0..ROWS {
                    let x = rows[row][unit][pair];
                    for vector in 0..VECTORS {
                        products[row][vector] =
                            multiply_add(products[row][vector], weights[vector], x);
                    }
                }
            }
            for row in 0..ROWS {
                for vector in 0..VECTORS {
                    let sum = &mut sums[row][vector];
                    let scaled = _mm512_fmadd_ps(
                        kept.scales[vector],
                        products[row][vector],
                        load512_f32(sum),
                    );
                    store512(bytemuck::cast_mut(sum), _mm512_castps_si512(scaled));
                }
            }
        }
    }
}
