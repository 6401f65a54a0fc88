//! Double quantization.

use tightfit_kernels::{DYNAMIC_MAP, NESTED_BLOCK_SIZE};

use crate::calls;
use crate::device::Device;
use crate::values::{Random, SPECIAL, assert_floats, portable};

/// Counts around the width of a group, and around that of a group of groups.
const COUNTS: [usize; 13] = [
    0, 1, 2, 31, 255, 256, 257, 511, 2_049, 65_535, 65_536, 65_537, 70_001,
];

pub(crate) fn means(device: &mut dyn Device) {
    let mut random = Random(7);
    // Values of very different size, so that any other order of additions shows.
    let mixed: Vec<f32> = (0..70_001)
        .map(|_| f32::from_bits(random.next() as u32 >> 1 & 0x5fff_ffff))
        .collect();
    let usual: Vec<f32> = (0..70_001).map(|_| random.weight(0.1).abs()).collect();
    for count in COUNTS {
        for values in [&mixed[..count], &usual[..count], &vec![-0.0; count]] {
            let (have, need) = (
                calls::absmax_mean(device, values),
                portable().absmax_mean(values),
            );
            assert_eq!(have.to_bits(), need.to_bits(), "{count}: {have} {need}");
        }
    }
    for special in SPECIAL {
        let mut values = usual[..1000].to_vec();
        values[random.below(1000)] = special;
        let (have, need) = (
            calls::absmax_mean(device, &values),
            portable().absmax_mean(&values),
        );
        assert_floats(&[have], &[need], "mean");
    }
}

fn check(device: &mut dyn Device, absmax: &[f32], offset: f32) {
    let mut codes = vec![0; absmax.len()];
    let mut nested = vec![0.0; absmax.len().div_ceil(NESTED_BLOCK_SIZE)];
    portable()
        .quantize_absmax(absmax, offset, &mut codes, &mut nested)
        .expect("lengths");
    let what = format!("{} absmax values, offset {offset:e}", absmax.len());
    let (have_codes, have_nested) = calls::quantize_absmax(device, absmax, offset);
    assert_floats(&have_nested, &nested, &what);
    if let Some(i) = (0..codes.len()).find(|i| have_codes[*i] != codes[*i]) {
        panic!(
            "{what}: code {i} is {}, should be {}",
            have_codes[i], codes[i]
        );
    }
    let mut out = vec![0.0; codes.len()];
    portable()
        .dequantize_absmax(&codes, &nested, offset, &mut out)
        .expect("lengths");
    let have = calls::dequantize_absmax(device, &codes, &nested, offset);
    assert_floats(&have, &out, &what);
}

pub(crate) fn absmax_to_codes_and_back(device: &mut dyn Device) {
    let mut random = Random(8);
    for (round, count) in COUNTS.into_iter().cycle().take(39).enumerate() {
        // The large ones take their time.
        if count > 60_000 && round > 13 {
            continue;
        }
        let scale = [0.05, 1e-41, 1e-30, 3.0, 1e38][round % 5];
        let mut absmax: Vec<f32> = (0..count).map(|_| random.weight(scale).abs()).collect();
        if count > 0 {
            match round % 4 {
                1 => {
                    for _ in 0..=count / 500 {
                        absmax[random.below(count)] = random.pick(&SPECIAL);
                    }
                }
                // All differences are zero.
                2 => absmax.fill(scale),
                _ => {}
            }
        }
        let mean = portable().absmax_mean(&absmax);
        // Offsets that leave NaN in some blocks only, as well as the mean.
        for offset in [mean, 0.0, f32::INFINITY, -1.0] {
            check(device, &absmax, offset);
        }
    }
    // Only NaN, in a whole block and in a partial one.
    check(device, &vec![f32::NAN; 300], 0.0);
}

pub(crate) fn every_code_and_every_midpoint(device: &mut dyn Device) {
    // With the largest value at 1.0 in each block, products are the values themselves.
    let mut absmax = vec![];
    for pair in DYNAMIC_MAP.windows(2) {
        let midpoint = (pair[0] + pair[1]) * 0.5;
        for value in [midpoint, midpoint.next_up(), midpoint.next_down(), pair[0]] {
            if absmax.len() % NESTED_BLOCK_SIZE == 0 {
                absmax.push(1.0);
            }
            absmax.push(value);
        }
    }
    for offset in [0.0, -0.0] {
        check(device, &absmax, offset);
    }
    // Every code, with every kind of nested absmax.
    let codes: Vec<u8> = (0..SPECIAL.len() * 256).map(|i| i as u8).collect();
    for offset in [0.0, 0.035, f32::INFINITY] {
        let mut out = vec![0.0; codes.len()];
        portable()
            .dequantize_absmax(&codes, &SPECIAL, offset, &mut out)
            .expect("lengths");
        let have = calls::dequantize_absmax(device, &codes, &SPECIAL, offset);
        assert_floats(&have, &out, "every code");
    }
}
