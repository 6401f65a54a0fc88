//! Random bf16 numbers, fast and the same on every machine.
//!
//! Two bytes of a counter-based generator choose one of 65,536 samples of the distribution. The
//! samples are sums of 12 uniform numbers, which needs nothing whose rounding differs between
//! machines, and any element of a tensor can be made without those before it.

use super::layout::Values;

/// Samples in a table: as many as there are values of the two bytes that choose one.
const SAMPLES: usize = 1 << 16;
const STANDARD_DEVIATION: f64 = 0.02;

/// Samples of both distributions as bf16 bits.
pub(super) struct Tables {
    around_zero: Box<[u16; SAMPLES]>,
    around_one: Box<[u16; SAMPLES]>,
}

impl Tables {
    pub(super) fn new() -> Tables {
        let mut tables = Tables {
            around_zero: zeros(),
            around_one: zeros(),
        };
        let mut state = 0;
        for pair in 0..SAMPLES / 2 {
            // Variance 1/12 each, so that 12 of them have a standard deviation of 1.
            let mut sum = -6.0;
            for _ in 0..12 {
                state += 1;
                sum += (wyrand(0x7469_6768_7466_6974, state) >> 11) as f64 / (1u64 << 53) as f64;
            }
            // Every sample with its negative: the mean is exact.
            for (at, sample) in [(2 * pair, sum), (2 * pair + 1, -sum)] {
                let sample = sample * STANDARD_DEVIATION;
                tables.around_zero[at] = bf16(sample as f32);
                tables.around_one[at] = bf16((1.0 + sample) as f32);
            }
        }
        tables
    }

    /// Fills the bytes with little-endian bf16 elements of the tensor with this key, from its
    /// element `first` on. The length must be even.
    pub(super) fn fill(&self, values: Values, key: u64, first: u64, out: &mut [u8]) {
        let table = match values {
            Values::AroundZero => &self.around_zero,
            Values::AroundOne => &self.around_one,
        };
        // The generator gives four elements at a time; a start in the middle gets its rest first.
        let within = (first % 4) as usize;
        let head = ((4 - within) % 4 * 2).min(out.len());
        let (head, rest) = out.split_at_mut(head);
        if !head.is_empty() {
            let four = four(table, key, first / 4).to_le_bytes();
            head.copy_from_slice(&four[2 * within..2 * within + head.len()]);
        }
        let mut block = first.div_ceil(4);
        let (blocks, tail) = rest.as_chunks_mut::<8>();
        for out in blocks {
            *out = four(table, key, block).to_le_bytes();
            block += 1;
        }
        let four = four(table, key, block).to_le_bytes();
        tail.copy_from_slice(&four[..tail.len()]);
    }
}

fn zeros() -> Box<[u16; SAMPLES]> {
    let zeros = vec![0; SAMPLES].into_boxed_slice();
    match zeros.try_into() {
        Ok(array) => array,
        Err(_) => unreachable!("the length is that of the array"),
    }
}

/// Elements `4 * block ..` of a tensor.
#[inline]
fn four(table: &[u16; SAMPLES], key: u64, block: u64) -> u64 {
    let random = wyrand(key, block);
    let at = |shift: u32| u64::from(table[usize::from((random >> shift) as u16)]);
    at(0) | at(16) << 16 | at(32) << 32 | at(48) << 48
}

/// The `n`th number of the wyrand generator that starts at `key`.
/// <https://github.com/wangyi-fudan/wyhash>
#[inline]
fn wyrand(key: u64, n: u64) -> u64 {
    let state = key.wrapping_add(n.wrapping_add(1).wrapping_mul(0xa076_1d64_78bd_642f));
    let product = u128::from(state) * u128::from(state ^ 0xe703_7ed1_a0b4_28db);
    (product >> 64) as u64 ^ product as u64
}

/// Where a tensor's numbers start: from its name, so that they do not depend on its place.
pub(super) fn key(seed: u64, name: &str) -> u64 {
    // FNV-1a, then the finalizer of splitmix64 because FNV's high bits change slowly.
    let mut hash = wyrand(seed, 0) ^ 0xcbf2_9ce4_8422_2325;
    for byte in name.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

/// Rounds to the nearest bf16, ties to even. For finite numbers.
fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elements(values: Values, name: &str, count: usize) -> Vec<f64> {
        let mut bytes = vec![0; 2 * count];
        Tables::new().fill(values, key(0, name), 0, &mut bytes);
        let (pairs, _) = bytes.as_chunks::<2>();
        pairs
            .iter()
            .map(|&pair| f64::from(f32::from_bits(u32::from(u16::from_le_bytes(pair)) << 16)))
            .collect()
    }

    #[test]
    fn the_distributions_are_normal() {
        // bf16 is coarse around one, which shows in the share within a deviation.
        for (values, mean, coarse) in [
            (Values::AroundZero, 0.0, 0.01),
            (Values::AroundOne, 1.0, 0.1),
        ] {
            let sample = elements(values, "a", 1_000_000);
            let n = sample.len() as f64;
            let measured = sample.iter().sum::<f64>() / n;
            assert!((measured - mean).abs() < 1e-3, "{measured}");
            let variance = sample.iter().map(|x| (x - measured).powi(2)).sum::<f64>() / n;
            assert!((variance.sqrt() - 0.02).abs() < 5e-4, "{variance}");
            let within = sample.iter().filter(|x| (*x - mean).abs() < 0.02).count();
            assert!((within as f64 / n - 0.6827).abs() < coarse, "{within}");
        }
    }

    #[test]
    fn any_part_of_a_tensor_is_the_same_as_in_the_whole() {
        let tables = Tables::new();
        let mut whole = [0; 64];
        tables.fill(Values::AroundZero, 7, 0, &mut whole);
        for first in 0..32 {
            for last in first..=32 {
                let mut part = vec![0; 2 * (last - first)];
                tables.fill(Values::AroundZero, 7, first as u64, &mut part);
                assert_eq!(part, whole[2 * first..2 * last], "{first}..{last}");
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
        let mut bytes = [0; 16];
        Tables::new().fill(
            Values::AroundZero,
            key(1, "model.norm.weight"),
            5,
            &mut bytes,
        );
        assert_eq!(bytes, PINNED);
    }

    const PINNED: [u8; 16] = [
        212, 60, 137, 59, 206, 187, 236, 59, 17, 189, 106, 59, 190, 58, 235, 60,
    ];
}
