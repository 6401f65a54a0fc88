//! Double quantization: absmax values to 8 bits, relative to their mean.
//!
//! The functions are inlined into each instruction set's module, so that they are compiled for it.

use crate::{
    DYNAMIC_MAP, NESTED_BLOCK_SIZE,
    buckets::DynamicBuckets,
    quantize::{self, PLAIN_ABSMAX, flush},
};

/// Width of one group of the sum in [`mean`].
pub(crate) const GROUP: usize = 256;

/// The mean as [`crate::Kernels::absmax_mean`] defines it; 0.0 of nothing.
#[inline(always)]
pub(crate) fn mean(absmax: &[f32], group_sum: impl Fn(&[f32]) -> f64 + Copy) -> f32 {
    if absmax.is_empty() {
        0.0
    } else {
        (tree_sum(absmax, group_sum) / absmax.len() as f64) as f32
    }
}

/// The sum of up to 256^n values, as the sum of one group of sums of up to 256^(n-1) values. A part
/// of the tree that is all padding adds zeros, so it can be left out.
fn tree_sum(values: &[f32], group_sum: impl Fn(&[f32]) -> f64 + Copy) -> f64 {
    if values.len() <= GROUP {
        return group_sum(values);
    }
    let mut part = GROUP;
    while values.len().div_ceil(part) > GROUP {
        part *= GROUP;
    }
    let mut sums = [0.0; GROUP];
    for (sum, part) in sums.iter_mut().zip(values.chunks(part)) {
        *sum = tree_sum(part, group_sum);
    }
    halve(&|sum: f64| sum, &sums)
}

/// The sum of up to 256 values, padded with zeros.
#[inline(always)]
pub(crate) fn group_sum(values: &[f32]) -> f64 {
    match values.try_into() {
        Ok(values) => halve(&f32::into, values),
        Err(_) => {
            let mut padded = [0.0; GROUP];
            padded[..values.len()].copy_from_slice(values);
            halve(&f32::into, &padded)
        }
    }
}

/// The sum of 256 values, by halving: value `i` plus value `i + 128`, and so on.
#[inline(always)]
pub(crate) fn halve<T: Copy>(to_f64: &impl Fn(T) -> f64, values: &[T; GROUP]) -> f64 {
    // One array per step, so that all lengths are known when compiling.
    macro_rules! halve {
        ($sums:ident, $($stride:literal)*) => {
            $(let $sums: [f64; $stride] = std::array::from_fn(|i| $sums[i] + $sums[i + $stride]);)*
        };
    }
    let sums: [f64; 128] = std::array::from_fn(|i| to_f64(values[i]) + to_f64(values[i + 128]));
    halve!(sums, 64 32 16 8 4 2 1);
    sums[0]
}

/// The code that the CUDA kernel's search gives: of the two neighbours the nearer one, by their
/// `f32` midpoint; on the midpoint itself the one at which the search ended. NaN has code 0.
pub(crate) const fn search(x: f32) -> u8 {
    let (mut lower, mut pivot, mut upper) = (0, 127, 255);
    let mut stride = 64;
    while stride > 0 {
        if x > DYNAMIC_MAP[pivot] {
            lower = pivot;
            pivot += stride;
        } else {
            upper = pivot;
            pivot -= stride;
        }
        stride /= 2;
    }
    let value = DYNAMIC_MAP[pivot];
    let nearest = if x > value {
        if x > (DYNAMIC_MAP[upper] + value) * 0.5 {
            upper
        } else {
            pivot
        }
    } else if x < (DYNAMIC_MAP[lower] + value) * 0.5 {
        lower
    } else {
        pivot
    };
    nearest as u8
}

/// Quantizes absmax values. Lengths have been checked. `plain_codes` quantizes one block whose
/// reciprocal is given and for which flushing makes no difference.
#[inline(always)]
pub(crate) fn quantize(
    absmax: &[f32],
    offset: f32,
    codes: &mut [u8],
    nested_absmax: &mut [f32],
    plain_codes: impl Fn(&[f32], f32, f32, &mut [u8]),
) {
    let blocks = absmax
        .chunks(NESTED_BLOCK_SIZE)
        .zip(codes.chunks_mut(NESTED_BLOCK_SIZE));
    for ((absmax, codes), nested) in blocks.zip(nested_absmax) {
        // Infinities and NaN have the largest magnitudes as integers, so one maximum finds them
        // too.
        let bits = absmax
            .iter()
            .fold(0, |max, x| max.max((x - offset).to_bits() & 0x7fff_ffff));
        if PLAIN_ABSMAX.contains(&bits) {
            *nested = f32::from_bits(bits);
            plain_codes(absmax, offset, 1.0 / *nested, codes);
        } else {
            let centred = || absmax.iter().map(|x| x - offset);
            *nested = quantize::absmax(centred(), absmax.len() < NESTED_BLOCK_SIZE);
            let reciprocal = quantize::reciprocal(*nested);
            for (code, x) in codes.iter_mut().zip(centred()) {
                *code = search(flush(x) * reciprocal);
            }
        }
    }
}

/// The codes of finite values not above the reciprocal's absmax, by table.
#[inline(always)]
pub(crate) fn plain_codes(absmax: &[f32], offset: f32, reciprocal: f32, codes: &mut [u8]) {
    for (code, x) in codes.iter_mut().zip(absmax) {
        *code = DynamicBuckets::TABLE.code((x - offset) * reciprocal);
    }
}

/// Dequantizes absmax values. Lengths have been checked.
#[inline(always)]
pub(crate) fn dequantize(codes: &[u8], nested_absmax: &[f32], offset: f32, out: &mut [f32]) {
    let blocks = codes
        .chunks(NESTED_BLOCK_SIZE)
        .zip(out.chunks_mut(NESTED_BLOCK_SIZE));
    for ((codes, out), nested) in blocks.zip(nested_absmax) {
        for (code, out) in codes.iter().zip(out) {
            // Two roundings, as two kernels do it; Rust never fuses them.
            *out = DYNAMIC_MAP[usize::from(*code)] * nested + offset;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn search_finds_every_value_itself() {
        for (i, value) in DYNAMIC_MAP.iter().enumerate() {
            assert_eq!(usize::from(search(*value)), i);
        }
        assert_eq!(
            (search(f32::NAN), search(2.0), search(-2.0), search(-0.0)),
            (0, 255, 0, 127)
        );
    }

    #[test]
    fn search_decides_at_the_midpoint_and_ends_at_even_codes() {
        // From 127, strides of 64 to 1 end at an even code, whichever way they go.
        for (i, pair) in DYNAMIC_MAP.windows(2).enumerate() {
            let midpoint = (pair[0] + pair[1]) * 0.5;
            assert!(pair[0] < midpoint && midpoint < pair[1]);
            assert_eq!(usize::from(search(midpoint.next_down())), i);
            assert_eq!(usize::from(search(midpoint)), i.next_multiple_of(2));
            assert_eq!(usize::from(search(midpoint.next_up())), i + 1);
        }
    }

    #[test]
    fn sum_is_the_tree_of_the_definition() {
        // The definition, list by list.
        fn sum(mut list: Vec<f64>) -> f64 {
            loop {
                list.resize(list.len().next_multiple_of(256), 0.0);
                list = list
                    .chunks(256)
                    .map(|group| {
                        let mut group = group.to_vec();
                        for stride in [128, 64, 32, 16, 8, 4, 2, 1] {
                            for i in 0..stride {
                                group[i] += group[i + stride];
                            }
                        }
                        group[0]
                    })
                    .collect();
                if list.len() == 1 {
                    return list[0];
                }
            }
        }
        // Values of very different size, so that any other order of additions shows.
        let values: Vec<f32> = (0..200_000u32)
            .map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9) >> 1 & 0x5fff_ffff))
            .collect();
        for n in [
            1, 2, 255, 256, 257, 511, 512, 65_535, 65_536, 65_537, 65_793, 131_072, 200_000,
        ] {
            let list = values[..n].iter().map(|x| f64::from(*x)).collect();
            assert_eq!(
                tree_sum(&values[..n], group_sum).to_bits(),
                sum(list).to_bits(),
                "{n}"
            );
        }
        assert_eq!(mean(&[], group_sum), 0.0);
    }
}
