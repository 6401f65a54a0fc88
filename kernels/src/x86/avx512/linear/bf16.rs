//! Products of bf16 rows, with the instructions for bf16.
//!
//! A lane of a vector is an output: nothing is summed across lanes, and 16 sums are multiplied with
//! their scales at once. The codes of 16 outputs are transposed in groups of eight, which fill a
//! 32-bit lane; shifted by a code at a time, such a lane holds in each half the index of a value.
//! The products of a unit of 32 inputs are summed, multiplied with the scale, and added to the sum
//! of the units before, whatever the number of rows.

use std::{arch::x86_64::*, mem, ops::Range};

use super::super::memory::*;
use crate::{LinearWeights, NESTED_BLOCK_SIZE, QuantType, Scales, float};

/// Outputs of a vector.
const LANES: usize = 16;

/// Inputs that are summed before they are multiplied with their scale: the smallest block.
pub(crate) const UNIT: usize = 32;

/// Rows that are multiplied with codes as they are decoded; weights are kept for more.
const FEW: usize = 8;

/// Rows of a tile, and its outputs in vectors: 16 sums, which stay in registers.
const TILE_ROWS: usize = 4;
const TILE: usize = 4;

/// Units of which decoded weights are kept at a time. TODO
const SLAB: usize = 8;

/// Rows that weights are kept for: their sums stay in the second-level cache.
const MOST_ROWS: usize = 240;

/// A unit of x as [`pairs`] orders it.
pub(crate) type Unit = [u32; UNIT / 2];

/// Codes lose less in bf16 if they are all multiplied with the same number first, which sums are
/// divided by. FP4's become exact; for NF4 it is the number for which the sum of the squares of what
/// rounding loses is least.
const fn code_factor(quant_type: QuantType) -> f32 {
    match quant_type {
        QuantType::Nf4 => 1.437_006,
        QuantType::Fp4 => 3.0,
    }
}

/// Orders x, little-endian bf16, as weights are decoded: of eight inputs the pairs 1 and 5, 0 and 4, 3
/// and 7, 2 and 6. Units come in the order in which they are read: all rows' first ones where weights
/// are kept, else row by row. Returns nothing where the processor or the weights need other code.
pub(crate) fn pairs_if_possible(
    weights: &LinearWeights<'_>,
    rows: usize,
    x: &[u8],
) -> Option<Vec<Unit>> {
    let possible = crate::Isa::Avx512.is_available()
        && is_x86_feature_detected!("avx512bf16")
        && weights.inputs.is_multiple_of(UNIT)
        && weights.inputs > 0;
    // SAFETY: the processor has the instructions.
    possible.then(|| unsafe { pairs(weights.inputs / UNIT, rows, x) })
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
fn pairs(units: usize, rows: usize, x: &[u8]) -> Vec<Unit> {
    const ORDER: [u16; 32] = {
        let (mut order, of_eight) = ([0; 32], [1, 5, 0, 4, 3, 7, 2, 6]);
        let mut i = 0;
        while i < 32 {
            order[i] = (i / 8 * 8) as u16 + of_eight[i % 8];
            i += 1;
        }
        order
    };
    let order = load512_u16(&ORDER);
    let x = x.as_chunks::<64>().0;
    let mut ordered = vec![[0; UNIT / 2]; x.len()];
    for (row, x) in x.chunks_exact(units).enumerate() {
        for (i, x) in x.chunks(SLAB).enumerate() {
            let ordered = &mut ordered[i * SLAB * rows + row * x.len()..][..x.len()];
            for (x, ordered) in x.iter().zip(ordered) {
                let x = _mm512_permutexvar_epi16(order, load512(x));
                store512(bytemuck::cast_mut(ordered), x);
            }
        }
    }
    ordered
}

/// Weights as they are read here.
struct Matrix<'a> {
    weights: &'a LinearWeights<'a>,
    /// At least [`LANES`] rows of codes: those of the weights, or with zeros after them.
    codes: &'a [u8],
    /// The values of codes, twice: of an index the lowest five bits count, and the fifth is not of
    /// the code.
    values: __m512i,
    /// Inputs that one scale is read for, and their units.
    run: usize,
    run_shift: u32,
}

impl<'a> Matrix<'a> {
    #[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
    fn new(weights: &'a LinearWeights<'a>, padded: &'a mut Vec<u8>) -> Matrix<'a> {
        let factor = code_factor(weights.quant_type);
        let mut values = [0; 32];
        for (i, value) in values.iter_mut().enumerate() {
            let code = crate::code_values(weights.quant_type)[i % 16];
            *value = float::f32_to_bf16(code * factor);
        }
        let mut codes = weights.codes;
        if weights.outputs < LANES {
            padded.extend(codes);
            padded.resize(LANES * weights.inputs / 2, 0);
            codes = padded;
        }
        // Where rows are whole pairs of units, so are blocks.
        let pairs = weights.inputs.is_multiple_of(2 * UNIT);
        let run_shift = u32::from(pairs && weights.block_size.elements() > UNIT);
        Matrix {
            weights,
            codes,
            values: load512_u16(&values),
            run: UNIT << run_shift,
            run_shift,
        }
    }

    fn units(&self) -> usize {
        self.weights.inputs / UNIT
    }

    /// The scales of four runs of 16 outputs.
    #[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
    #[inline]
    fn scales(&self, output: usize, run: usize) -> [__m512; 4] {
        let weights = self.weights;
        let runs = weights.inputs / self.run;
        let rows = match weights.scales {
            Scales::Absmax(absmax)
                if weights.block_size.elements() == self.run
                    && (output + LANES - 1) * runs + run + 4 <= absmax.len() =>
            {
                let bytes = bytemuck::cast_slice(absmax);
                load_rows(bytes, 4 * runs, 4 * (output * runs + run))
            }
            Scales::Double {
                codes,
                nested_absmax,
                absmax_mean,
                map,
            } if weights.block_size.elements() == self.run
                && runs.is_multiple_of(4)
                && weights.outputs >= LANES
                && codes.len() <= i32::MAX as usize =>
            {
                // Four runs never lie in two nested blocks.
                let (mut of_rows, mut blocks) = ([0u32; LANES], [0i32; LANES]);
                for lane in 0..LANES {
                    let first = (output + lane) * runs + run;
                    let four = codes[first..].first_chunk().expect("four runs");
                    of_rows[lane] = u32::from_le_bytes(*four);
                    blocks[lane] = (first / NESTED_BLOCK_SIZE) as i32;
                }
                let codes = load512(bytemuck::cast_ref(&of_rows));
                let nested = gather(nested_absmax, load512_i32(&blocks));
                let mean = _mm512_set1_ps(absmax_mean);
                let byte = _mm512_set1_epi32(0xff);
                let codes = [
                    _mm512_and_si512(codes, byte),
                    _mm512_and_si512(_mm512_srli_epi32::<8>(codes), byte),
                    _mm512_and_si512(_mm512_srli_epi32::<16>(codes), byte),
                    _mm512_srli_epi32::<24>(codes),
                ];
                let mut scales = [_mm512_setzero_ps(); 4];
                for (scale, code) in scales.iter_mut().zip(codes) {
                    let value = gather(map, code);
                    *scale = _mm512_add_ps(_mm512_mul_ps(value, nested), mean);
                }
                return scales;
            }
            _ => {
                let mut buffer = [[0.0f32; 4]; LANES];
                let count = (runs - run).min(4);
                let lanes = buffer.iter_mut().take(weights.outputs - output);
                for (lane, buffer) in lanes.enumerate() {
                    let first = (output + lane) * weights.inputs + run * self.run;
                    weights.read_scales(first, self.run, &mut buffer[..count]);
                }
                load_rows(bytemuck::cast_slice(&buffer), 16, 0)
            }
        };
        let mut scales = [_mm512_setzero_ps(); 4];
        for (scale, row) in scales.iter_mut().zip(transpose(rows)) {
            *scale = _mm512_castsi512_ps(row);
        }
        scales
    }

    /// The codes of a unit of 16 outputs: those of eight inputs in each vector.
    #[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
    #[inline]
    fn codes(&self, output: usize, unit: usize) -> [__m512i; 4] {
        let stride = self.weights.inputs / 2;
        transpose(load_rows(self.codes, stride, output * stride + unit * UNIT / 2))
    }

    /// The same of two units.
    #[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
    #[inline]
    fn codes_of_two(&self, output: usize, unit: usize) -> [[__m512i; 4]; 2] {
        let stride = self.weights.inputs / 2;
        let at = output * stride + unit * UNIT / 2;
        let [a, b, c, d, e, f, g, h] = load_wide_rows(self.codes, stride, at);
        let (low, high) = (transpose([a, b, c, d]), transpose([e, f, g, h]));
        let mut units = [[_mm512_setzero_si512(); 4]; 2];
        for i in 0..4 {
            units[0][i] = _mm512_shuffle_i32x4::<0x88>(low[i], high[i]);
            units[1][i] = _mm512_shuffle_i32x4::<0xdd>(low[i], high[i]);
        }
        units
    }

    /// Has codes of 16 outputs read that lie a little after a unit's, or the first ones of the next 16
    /// outputs.
    #[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
    #[inline]
    fn prefetch(&self, output: usize, unit: usize) {
        let stride = self.weights.inputs / 2;
        let mut at = unit * UNIT / 2 + 512;
        if at >= stride {
            at += (LANES - 1) * stride;
        }
        at += output * stride;
        for _ in 0..LANES {
            prefetch(self.codes, at);
            at += stride;
        }
    }
    #[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
    #[inline]
    fn prefetch_scales(&self, output: usize, run: usize) {
        let shift = self.weights.block_size.elements().trailing_zeros();
        let row = self.weights.inputs >> shift;
        let mut at = (run * self.run >> shift) + 32;
        if at >= row {
            at += (LANES - 1) * row;
        }
        match self.weights.scales {
            Scales::Absmax(absmax) => 
        for lane in 0..LANES {
            prefetch(bytemuck::cast_slice(absmax), 4 * ((output + lane) * row + at));
        },
            Scales::Double{codes, ..} => 
        for lane in 0..LANES {
            prefetch(codes, (output + lane) * row + at);
        },
        }
    }
}

/// Of vectors that hold four rows' four lanes each, rows 0, 4, 8 and 12 in the first, those that hold
/// a lane of 16 rows each.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
fn transpose(rows: [__m512i; 4]) -> [__m512i; 4] {
    let [a, b, c, d] = rows;
    let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
    let (ab_high, cd_high) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
    [
        _mm512_unpacklo_epi64(ab, cd),
        _mm512_unpackhi_epi64(ab, cd),
        _mm512_unpacklo_epi64(ab_high, cd_high),
        _mm512_unpackhi_epi64(ab_high, cd_high),
    ]
}

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

/// Adds the products of eight inputs of some units; returns their weights.
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
            for pair in 0..4 {
                kept.weights[4 * eight + pair][*vector] = weights[pair];
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
fn decode_and_multiply<const ROWS: usize>(
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
        store512(bytemuck::cast_mut(&mut results[row]), _mm512_castps_si512(sums[row]));
    }
    results
}

/// Weights of a unit of some vectors of outputs.
#[derive(Clone, Copy)]
struct Kept<const VECTORS: usize> {
    weights: [[__m512i; VECTORS]; UNIT / 2],
    scales: [__m512; VECTORS],
}

impl<const VECTORS: usize> Kept<VECTORS> {
    /// Decodes some units of outputs that begin at these, and adds the products with some rows to their
    /// sums: these are computed while codes are waited for.
    #[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn decode_and_multiply<const ROWS: usize>(
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
            add_slab(matrix, outputs[vector], units.clone(), &rows, &mut sums, keep);
            for row in 0..ROWS {
                let sum = bytemuck::cast_mut(&mut all_sums[row][vector]);
                store512(sum, _mm512_castps_si512(sums[row]));
            }
        }
    }

    /// Adds the products with some rows to their sums.
    #[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn multiply<const ROWS: usize>(
        kept: &[Self],
        rows: [&[Unit]; ROWS],
        sums: &mut [[[f32; LANES]; VECTORS]],
    ) {
        let sums: &mut [[[f32; LANES]; VECTORS]; ROWS] = sums.try_into().expect("as many rows");
        for (unit, kept) in kept.iter().enumerate() {
            let mut products = [[_mm512_setzero_ps(); VECTORS]; ROWS];
            for pair in 0..UNIT / 2 {
                let weights = &kept.weights[pair];
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

/// Evaluates an expression with the number of rows as a constant.
macro_rules! with_rows {
    ($count:expr, $rows:ident => $result:expr) => {
        with_rows!(@ $count, $rows => $result; 1 2 3 4 5 6 7, 8)
    };
    (@ $count:expr, $rows:ident => $result:expr; $($less:literal)*, $most:literal) => {
        match $count {
            $($less => {
                const $rows: usize = $less;
                $result
            })*
            _ => {
                const $rows: usize = $most;
                $result
            }
        }
    };
}

/// The sums of some outputs, for each row those of all of these outputs.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(crate) fn sums_of_pairs(
    weights: &LinearWeights<'_>,
    rows: usize,
    x: &[Unit],
    outputs: Range<usize>,
    sums: &mut [f32],
) {
    let mut padded = vec![];
    let matrix = Matrix::new(weights, &mut padded);
    let begins: Vec<usize> = outputs.clone().step_by(LANES).collect();
    if rows <= FEW {
        for begin in begins {
            few(&matrix, rows, x, begin, &outputs, sums);
        }
        return;
    }
    let (tiles, rest) = begins.as_chunks::<TILE>();
    for tile in tiles {
        many(&matrix, rows, x, tile, &outputs, sums);
    }
    let (pairs, rest) = rest.as_chunks::<2>();
    for pair in pairs {
        many(&matrix, rows, x, pair, &outputs, sums);
    }
    for begin in rest {
        many(&matrix, rows, x, &[*begin], &outputs, sums);
    }
}

impl Matrix<'_> {
    /// Where 16 outputs begin that contain those from `output` on: they are all of these weights.
    fn begin(&self, output: usize) -> usize {
        output.min(self.weights.outputs.saturating_sub(LANES))
    }

    /// Writes the results of a row, of outputs from `output` on.
    fn write(&self, output: usize, results: &[f32; LANES], outputs: &Range<usize>, sums: &mut [f32]) {
        let skip = output - self.begin(output);
        let count = (outputs.end - output).min(LANES);
        let sums = &mut sums[output - outputs.start..][..count];
        for (sum, result) in sums.iter_mut().zip(&results[skip..]) {
            *sum = result / code_factor(self.weights.quant_type);
        }
    }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512bf16")]
fn few(
    matrix: &Matrix<'_>,
    rows: usize,
    x: &[Unit],
    output: usize,
    outputs: &Range<usize>,
    sums: &mut [f32],
) {
    let begin = matrix.begin(output);
    let mut results = [[0.0; LANES]; FEW];
    with_rows!(rows, ROWS => {
        let sums = decode_and_multiply::<ROWS>(matrix, begin, x);
        results[..ROWS].copy_from_slice(&sums);
    });
    for (results, sums) in results.iter().zip(sums.chunks_exact_mut(outputs.len())) {
        matrix.write(output, results, outputs, sums);
    }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512bf16")]
fn many<const VECTORS: usize>(
    matrix: &Matrix<'_>,
    rows: usize,
    x: &[Unit],
    tile: &[usize; VECTORS],
    outputs: &Range<usize>,
    sums: &mut [f32],
) {
    let units = matrix.units();
    let begins = tile.map(|output| matrix.begin(output));
    let zero = Kept {
        weights: [[_mm512_setzero_si512(); VECTORS]; UNIT / 2],
        scales: [_mm512_setzero_ps(); VECTORS],
    };
    let mut kept = vec![zero; units.min(SLAB)];
    let mut products = vec![[[0.0; LANES]; VECTORS]; rows.min(MOST_ROWS)];
    for first in (0..rows).step_by(MOST_ROWS) {
        let end = rows.min(first + MOST_ROWS);
        products.fill([[0.0; LANES]; VECTORS]);
        for unit in (0..units).step_by(SLAB) {
            let range = unit..units.min(unit + SLAB);
            let kept = &mut kept[..range.len()];
            let mut row = first;
            while row < end {
                // Tiles of about the same size.
                let count = (end - row).div_ceil((end - row).div_ceil(TILE_ROWS));
                let at = range.start * rows + row * range.len();
                let row_of = |i: usize| &x[at + i * range.len()..][..range.len()];
                let products = &mut products[row - first..][..count];
                with_rows!(count, ROWS => {
                    let rows: [_; ROWS] = std::array::from_fn(row_of);
                    if row == first {
                        let range = range.clone();
                        Kept::decode_and_multiply(matrix, &begins, range, kept, rows, products);
                    } else {
                        Kept::multiply(kept, rows, products);
                    }
                });
                row += count;
            }
        }
        for (row, products) in (first..end).zip(&products) {
            let sums = &mut sums[row * outputs.len()..][..outputs.len()];
            for (output, results) in tile.iter().zip(products) {
                matrix.write(*output, results, outputs, sums);
            }
        }
    }
}
