//! What the samples are like, and that they stay what they are.

use super::*;

/// Every distribution, in each of its types.
const ALL: [(DType, Values); 8] = [
    (DType::Bf16, Values::AroundZero),
    (DType::F32, Values::AroundZero),
    (DType::Bf16, Values::AroundOne),
    (DType::F32, Values::AroundOne),
    (DType::F8E4M3, Values::Fp8Codes),
    (DType::F32, Values::Fp8Scales),
    (DType::U8, Values::Mxfp4Codes),
    (DType::U8, Values::Mxfp4Scales),
];

fn bytes_of(dtype: DType, values: Values, key: u64, elements: usize) -> Vec<u8> {
    let tables = Tables::new();
    let source = tables.source(dtype, values).unwrap();
    let mut bytes = vec![0; elements * source.width() as usize];
    source.fill(key, 0, &mut bytes);
    bytes
}

/// Codes and scales are tensors of different names.
fn key_of(values: Values) -> u64 {
    key(0, &format!("{values:?}"))
}

fn numbers(dtype: DType, values: Values, count: usize) -> Vec<f64> {
    let bytes = bytes_of(dtype, values, key_of(values), count);
    match dtype {
        DType::Bf16 => {
            let (pairs, _) = bytes.as_chunks::<2>();
            let bits = |&pair| u32::from(u16::from_le_bytes(pair)) << 16;
            let float = |pair| f64::from(f32::from_bits(bits(pair)));
            pairs.iter().map(float).collect()
        }
        DType::F32 => {
            let (fours, _) = bytes.as_chunks::<4>();
            let float = |&four| f64::from(f32::from_le_bytes(four));
            fours.iter().map(float).collect()
        }
        DType::F8E4M3 => bytes.iter().map(|&code| decoded(code)).collect(),
        _ => bytes.iter().map(|&byte| f64::from(byte)).collect(),
    }
}

/// The number that an FP8 code stands for.
fn decoded(code: u8) -> f64 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let magnitude = match exponent {
        0 => fraction / 8.0 * 2f64.powi(-6),
        _ => (1.0 + fraction / 8.0) * 2f64.powi(exponent - 7),
    };
    if code < 0x80 { magnitude } else { -magnitude }
}

fn mean_and_deviation(sample: &[f64]) -> (f64, f64) {
    let n = sample.len() as f64;
    let mean = sample.iter().sum::<f64>() / n;
    let variance = sample.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    (mean, variance.sqrt())
}

#[test]
fn the_distributions_are_normal() {
    // bf16 is coarse around one and FP8 everywhere, which shows in the share within a deviation.
    for (dtype, values, mean, deviation, coarse) in [
        (DType::Bf16, Values::AroundZero, 0.0, 0.02, 0.01),
        (DType::F32, Values::AroundZero, 0.0, 0.02, 0.01),
        (DType::Bf16, Values::AroundOne, 1.0, 0.02, 0.1),
        (DType::F32, Values::AroundOne, 1.0, 0.02, 0.01),
        (DType::F8E4M3, Values::Fp8Codes, 0.0, 112.0, 0.05),
        (
            DType::F32,
            Values::Fp8Scales,
            0.02 / 112.0,
            4e-4 / 112.0,
            0.01,
        ),
    ] {
        let sample = numbers(dtype, values, 1_000_000);
        let (measured, spread) = mean_and_deviation(&sample);
        assert!((measured - mean).abs() < deviation / 20.0, "{measured}");
        assert!((spread / deviation - 1.0).abs() < 0.025, "{spread}");
        let within = |x: &&f64| (**x - mean).abs() < deviation;
        let within = sample.iter().filter(within).count() as f64 / 1e6;
        assert!((within - 0.6827).abs() < coarse, "{values:?}: {within}");
    }
}

#[test]
fn what_is_scaled_becomes_weights_of_the_usual_size() {
    let scaled = |codes: Vec<f64>, scales: Vec<f64>| -> Vec<f64> {
        codes
            .iter()
            .zip(scales)
            .map(|(x, scale)| x * scale)
            .collect()
    };
    let codes = numbers(DType::F8E4M3, Values::Fp8Codes, 100_000);
    let scales = numbers(DType::F32, Values::Fp8Scales, 100_000);
    assert!(scales.iter().all(|&scale| scale > 0.0));
    let (mean, deviation) = mean_and_deviation(&scaled(codes, scales));
    assert!(mean.abs() < 1e-3, "{mean}");
    assert!((deviation - 0.02).abs() < 1e-3, "{deviation}");

    const MAGNITUDES: [f64; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let codes = bytes_of(
        DType::U8,
        Values::Mxfp4Codes,
        key_of(Values::Mxfp4Codes),
        100_000,
    );
    let low = codes.iter().map(|code| match code & 15 {
        code @ 0..8 => MAGNITUDES[usize::from(code)],
        code => -MAGNITUDES[usize::from(code & 7)],
    });
    let exponents = numbers(DType::U8, Values::Mxfp4Scales, 100_000);
    let scales = exponents.iter().map(|x| 2f64.powi(*x as i32 - 127));
    let (mean, deviation) = mean_and_deviation(&scaled(low.collect(), scales.collect()));
    assert!(mean.abs() < 1e-3, "{mean}");
    assert!((deviation - 0.0226).abs() < 1e-3, "{deviation}");
}

#[test]
fn codes_are_what_they_may_be() {
    let count = |dtype, values| {
        let mut count = [0u32; 256];
        for byte in bytes_of(dtype, values, 3, 1 << 20) {
            count[usize::from(byte)] += 1;
        }
        count
    };
    let fp8 = count(DType::F8E4M3, Values::Fp8Codes);
    assert_eq!((fp8[0x7f], fp8[0xff]), (0, 0), "NaN");
    assert!(fp8[0x7e] > 0 && fp8[0xfe] > 0, "the largest");
    let any = count(DType::U8, Values::Mxfp4Codes);
    assert!(
        any.iter().all(|count| (3700..4500).contains(count)),
        "{any:?}"
    );
    let exponents = count(DType::U8, Values::Mxfp4Scales);
    let used = |&at: &usize| exponents[at] > 0;
    assert!((0..256).filter(used).eq(118..122), "{exponents:?}");
}

#[test]
fn fp8_codes_are_the_nearest() {
    // Every code is its own, and halfway between two is the even one.
    for code in 0..=0x7e {
        assert_eq!(e4m3(decoded(code) as f32), code);
        assert_eq!(e4m3(-decoded(code) as f32), code | 0x80);
    }
    for code in 0..0x7e {
        let (below, above) = (decoded(code), decoded(code + 1));
        let half = (below + above) as f32 / 2.0;
        assert_eq!(e4m3(half), code + (code & 1), "{code:#x}");
        assert_eq!(e4m3(half.next_down()), code, "{code:#x}");
        assert_eq!(e4m3(half.next_up()), code + 1, "{code:#x}");
    }
    assert_eq!(e4m3(464.0), 0x7e);
    assert_eq!(e4m3(-1e9), 0xfe);
}

#[test]
fn any_part_of_a_tensor_is_the_same_as_in_the_whole() {
    let tables = Tables::new();
    for (dtype, values) in ALL {
        let source = tables.source(dtype, values).unwrap();
        let width = source.width() as usize;
        let whole = bytes_of(dtype, values, 7, 32);
        for first in 0..32 {
            for last in first..=32 {
                let mut part = vec![0; width * (last - first)];
                source.fill(7, first as u64, &mut part);
                assert_eq!(part, whole[width * first..width * last], "{first}..{last}");
            }
        }
    }
}

#[test]
fn names_and_seeds_give_other_numbers() {
    let keys = [key(0, "a"), key(0, "b"), key(1, "a"), key(1, "b")];
    for (i, a) in keys.iter().enumerate() {
        assert!(!keys[i + 1..].contains(a));
    }
}

#[test]
fn numbers_are_the_same_on_every_machine_and_for_ever() {
    let tables = Tables::new();
    for ((dtype, values), pinned) in ALL.into_iter().zip(PINNED) {
        let mut bytes = [0; 16];
        let source = tables.source(dtype, values).unwrap();
        source.fill(key(1, "model.norm.weight"), 5, &mut bytes);
        assert_eq!(bytes, pinned, "{values:?} in {dtype}");
    }
}

const PINNED: [[u8; 16]; 8] = [
    [
        212, 60, 137, 59, 206, 187, 236, 59, 17, 189, 106, 59, 190, 58, 235, 60,
    ],
    [
        158, 180, 211, 60, 219, 79, 137, 59, 0, 208, 205, 187, 244, 21, 236, 59,
    ],
    [
        131, 63, 129, 63, 126, 63, 129, 63, 119, 63, 128, 63, 128, 63, 132, 63,
    ],
    [
        210, 78, 131, 63, 80, 137, 128, 63, 96, 100, 126, 63, 22, 236, 128, 63,
    ],
    [
        113, 92, 225, 98, 244, 90, 80, 114, 119, 83, 108, 90, 243, 235, 231, 104,
    ],
    [
        175, 21, 64, 57, 197, 7, 60, 57, 212, 17, 58, 57, 67, 152, 60, 57,
    ],
    [
        213, 59, 187, 154, 160, 7, 174, 198, 165, 146, 155, 218, 216, 241, 5, 182,
    ],
    [
        120, 120, 120, 119, 118, 121, 120, 120, 120, 119, 120, 119, 118, 119, 120, 120,
    ],
];
