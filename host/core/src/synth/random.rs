//! Random numbers of every type that presets have, fast and the same on every machine.
//!
//! Two bytes of a counter-based generator choose one of 65,536 samples of the distribution. The
//! samples are sums of 12 uniform numbers, which needs nothing whose rounding differs between
//! machines, and any element of a tensor can be made without those before it.

use super::error::SynthError;
use super::model::{Tensor, Values};
use crate::types::DType;

/// Samples in a table: as many as there are values of the two bytes that choose one.
const SAMPLES: usize = 1 << 16;
const STANDARD_DEVIATION: f64 = 0.02;
/// Of codes of FP8: the largest there is, 448, is four of it out, as the largest of the 16,384
/// weights of a tile is, which is what real scales are made from.
const FP8_DEVIATION: f64 = 112.0;
const FP8_SCALE: f64 = STANDARD_DEVIATION / FP8_DEVIATION;
/// Least of the four exponents of MXFP4, with which weights deviate by 0.0226: any codes do by 2.9.
const LEAST_EXPONENT: u32 = 118;

/// Little-endian elements of `N` bytes.
type Samples<const N: usize> = Box<[[u8; N]; SAMPLES]>;

/// Samples of every distribution, in each of its types.
pub(super) struct Tables {
    around_zero: Samples<2>,
    around_zero_f32: Samples<4>,
    around_one: Samples<2>,
    around_one_f32: Samples<4>,
    fp8_codes: Samples<1>,
    fp8_scales: Samples<4>,
    any: Samples<1>,
    exponents: Samples<1>,
}

impl Tables {
    pub(super) fn new() -> Tables {
        let mut tables = Tables {
            around_zero: zeros(),
            around_zero_f32: zeros(),
            around_one: zeros(),
            around_one_f32: zeros(),
            fp8_codes: zeros(),
            fp8_scales: zeros(),
            any: zeros(),
            exponents: zeros(),
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
            tables.set(2 * pair, sum);
            tables.set(2 * pair + 1, -sum);
        }
        tables
    }

    /// Sets the samples of this number from a normal one of mean 0 and standard deviation 1.
    fn set(&mut self, at: usize, normal: f64) {
        let zero = normal * STANDARD_DEVIATION;
        let one = 1.0 + zero;
        self.around_zero[at] = bf16(zero as f32).to_le_bytes();
        self.around_zero_f32[at] = (zero as f32).to_le_bytes();
        self.around_one[at] = bf16(one as f32).to_le_bytes();
        self.around_one_f32[at] = (one as f32).to_le_bytes();
        self.fp8_codes[at] = [e4m3((normal * FP8_DEVIATION) as f32)];
        self.fp8_scales[at] = ((one * FP8_SCALE) as f32).to_le_bytes();
        self.any[at] = [at as u8];
        // Three coins: those in the middle are three times as frequent.
        self.exponents[at] = [(LEAST_EXPONENT + (at & 7).count_ones()) as u8];
    }

    /// Where every tensor's elements come from.
    pub(super) fn sources(&self, tensors: &[Tensor]) -> Result<Vec<Source<'_>>, SynthError> {
        let source = |tensor: &Tensor| {
            self.source(tensor.dtype, tensor.values)
                .ok_or_else(|| SynthError::Unsupported {
                    problem: format!(
                        "weights like those of '{}' cannot be made in {}",
                        tensor.name, tensor.dtype
                    ),
                })
        };
        tensors.iter().map(source).collect()
    }

    /// Where elements of this type come from, if there are such.
    pub(super) fn source(&self, dtype: DType, values: Values) -> Option<Source<'_>> {
        Some(match (values, dtype) {
            (Values::AroundZero, DType::Bf16) => Source::Two(&self.around_zero),
            (Values::AroundZero, DType::F32) => Source::Four(&self.around_zero_f32),
            (Values::AroundOne, DType::Bf16) => Source::Two(&self.around_one),
            (Values::AroundOne, DType::F32) => Source::Four(&self.around_one_f32),
            (Values::Fp8Codes, DType::F8E4M3) => Source::One(&self.fp8_codes),
            (Values::Fp8Scales, DType::F32) => Source::Four(&self.fp8_scales),
            (Values::Mxfp4Codes, DType::U8) => Source::One(&self.any),
            (Values::Mxfp4Scales, DType::U8) => Source::One(&self.exponents),
            _ => return None,
        })
    }
}

/// The samples of a tensor, by the bytes of one.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    One(&'a [[u8; 1]; SAMPLES]),
    Two(&'a [[u8; 2]; SAMPLES]),
    Four(&'a [[u8; 4]; SAMPLES]),
}

impl Source<'_> {
    /// Bytes of an element.
    pub(super) fn width(self) -> u64 {
        match self {
            Source::One(_) => 1,
            Source::Two(_) => 2,
            Source::Four(_) => 4,
        }
    }

    /// Fills the bytes with elements of the tensor with this key, from its element `first` on. They
    /// must be whole elements.
    pub(super) fn fill(self, key: u64, first: u64, out: &mut [u8]) {
        match self {
            Source::One(samples) => fill(samples, key, first, out),
            Source::Two(samples) => fill(samples, key, first, out),
            Source::Four(samples) => fill(samples, key, first, out),
        }
    }
}

fn fill<const N: usize>(samples: &[[u8; N]; SAMPLES], key: u64, first: u64, out: &mut [u8]) {
    let (out, _) = out.as_chunks_mut::<N>();
    // The generator gives four elements at a time; a start in the middle gets its rest first.
    let within = (first % 4) as usize;
    let head = ((4 - within) % 4).min(out.len());
    let (head, rest) = out.split_at_mut(head);
    head.copy_from_slice(&four(samples, key, first / 4)[within..within + head.len()]);
    let mut block = first.div_ceil(4);
    let (blocks, tail) = rest.as_chunks_mut::<4>();
    for out in blocks {
        *out = four(samples, key, block);
        block += 1;
    }
    tail.copy_from_slice(&four(samples, key, block)[..tail.len()]);
}

fn zeros<const N: usize>() -> Samples<N> {
    let zeros = vec![[0; N]; SAMPLES].into_boxed_slice();
    match zeros.try_into() {
        Ok(array) => array,
        Err(_) => unreachable!("the length is that of the array"),
    }
}

/// Elements `4 * block ..` of a tensor.
#[inline]
fn four<const N: usize>(samples: &[[u8; N]; SAMPLES], key: u64, block: u64) -> [[u8; N]; 4] {
    let random = wyrand(key, block);
    [0, 16, 32, 48].map(|shift: u32| samples[usize::from((random >> shift) as u16)])
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

/// Rounds to the nearest FP8 code, ties to even; what is larger than 448 becomes that, never NaN.
/// For finite numbers.
fn e4m3(value: f32) -> u8 {
    const LARGEST: u32 = 0x7e;
    let magnitude = value.abs();
    let code = if magnitude < 1.0 / 64.0 {
        // Subnormal: multiples of 2^-9. The eighth is the code of the smallest normal number.
        (magnitude * 512.0).round_ties_even() as u32
    } else {
        let bits = magnitude.to_bits();
        ((bits + 0x7_ffff + (bits >> 20 & 1)) >> 20) - ((127 - 7) << 3)
    };
    let sign = u8::from(value.is_sign_negative()) << 7;
    sign | code.min(LARGEST) as u8
}

#[cfg(test)]
mod tests;
