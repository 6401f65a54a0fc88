//! Weights as products of bf16 rows read them.

use std::{arch::x86_64::*, ops::Range};

use super::{LANES, UNIT};
use crate::{
    LinearWeights, NESTED_BLOCK_SIZE, Scales, float, linear::code_factor, x86::avx512::memory::*,
};

/// Weights as they are read here.
pub(super) struct Matrix<'a> {
    weights: &'a LinearWeights<'a>,
    /// At least [`LANES`] rows of codes: those of the weights, or with zeros after them.
    codes: &'a [u8],
    /// The values of codes, twice: of an index the lowest five bits count, and the fifth is not of
    /// the code.
    pub(super) values: __m512i,
    /// Inputs that one scale is read for, and their units.
    run: usize,
    pub(super) run_shift: u32,
}

impl<'a> Matrix<'a> {
    #[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
    pub(super) fn new(weights: &'a LinearWeights<'a>, padded: &'a mut Vec<u8>) -> Matrix<'a> {
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

    pub(super) fn units(&self) -> usize {
        self.weights.inputs / UNIT
    }

    /// The scales of four runs of 16 outputs.
    #[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
    #[inline]
    pub(super) fn scales(&self, output: usize, run: usize) -> [__m512; 4] {
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
    pub(super) fn codes(&self, output: usize, unit: usize) -> [__m512i; 4] {
        let stride = self.weights.inputs / 2;
        transpose(load_rows(
            self.codes,
            stride,
            output * stride + unit * UNIT / 2,
        ))
    }

    /// The same of two units.
    #[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
    #[inline]
    pub(super) fn codes_of_two(&self, output: usize, unit: usize) -> [[__m512i; 4]; 2] {
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
    pub(super) fn prefetch(&self, output: usize, unit: usize) {
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

    /// Has scales of 16 outputs read that lie a little after those of a run, or the first ones of the next 16
    /// outputs.
    #[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
    #[inline]
    pub(super) fn prefetch_scales(&self, output: usize, run: usize) {
        let shift = self.weights.block_size.elements().trailing_zeros();
        let row = self.weights.inputs >> shift;
        let mut at = ((run * self.run) >> shift) + 32;
        if at >= row {
            at += (LANES - 1) * row;
        }
        at += output * row;
        for _ in 0..LANES {
            match self.weights.scales {
                Scales::Absmax(absmax) => prefetch(bytemuck::cast_slice(absmax), 4 * at),
                Scales::Double { codes, .. } => prefetch(codes, at),
            }
            at += row;
        }
    }

    /// Where 16 outputs begin that contain those from `output` on: they are all of these weights.
    pub(super) fn begin(&self, output: usize) -> usize {
        output.min(self.weights.outputs.saturating_sub(LANES))
    }

    /// Writes the results of a row, of outputs from `output` on.
    pub(super) fn write(
        &self,
        output: usize,
        results: &[f32; LANES],
        outputs: &Range<usize>,
        sums: &mut [f32],
    ) {
        let skip = output - self.begin(output);
        let count = (outputs.end - output).min(LANES);
        let sums = &mut sums[output - outputs.start..][..count];
        for (sum, result) in sums.iter_mut().zip(&results[skip..]) {
            *sum = result / code_factor(self.weights.quant_type);
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
