//! Step functions as tables.
//!
//! Quantizing is a step function of a float. Over a bucket, a range of consecutive bit patterns
//! that holds at most one step, it is `base` or `base + 1`. The low bits of the pattern are the
//! place in the bucket, so one number per bucket is enough: with `base` in the upper bits, and in
//! the lower bits as much as makes the place of the step carry over, the code is
//! `(entry + place) >> bits`. Both tables are computed when compiling, from the functions they
//! stand for, and compiling fails if a bucket holds two steps.

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use crate::NF4_THRESHOLDS;
use crate::double;
#[cfg(any(test, target_arch = "x86_64", target_arch = "aarch64"))]
use crate::quantize;

/// One entry: `base` and the step of a function over `0..1 << bits`, found by bisection.
macro_rules! entry {
    ($bits:expr, |$place:ident| $code:expr) => {{
        const LAST: u32 = (1 << $bits) - 1;
        let base = {
            let $place = 0;
            ($code) as u32
        };
        let last = {
            let $place = LAST;
            ($code) as u32
        };
        assert!(last == base || last == base + 1, "two steps in a bucket");
        let mut carry = 0;
        if last != base {
            // The code is `base` at `low` and `base + 1` at `high`.
            let (mut low, mut high) = (0, LAST);
            while high - low > 1 {
                let $place = low + (high - low) / 2;
                if ($code) as u32 == base {
                    low = $place
                } else {
                    high = $place
                }
            }
            carry = LAST + 1 - high;
        }
        (base << $bits) + carry
    }};
}

/// NF4 codes of bfloat16 values, from bit patterns alone.
///
/// For absmax between the bounds of [`quantize::PLAIN_ABSMAX`] scaling a block by a power of two
/// changes no code, so that the code of `x` depends on three things: the sign of `x`, the
/// significand of the absmax, and how many patterns lie between `x` and the absmax. The last one is
/// counted from 1023 below the absmax, eight octaves, where every code is 7. `position` runs
/// through 0..1024 for positive `x`; for negative ones through 1024..2048, ascending with `x`, not
/// with its magnitude. A bucket is 32 positions, a quarter of an octave.
#[cfg(any(test, target_arch = "x86_64", target_arch = "aarch64"))]
#[repr(align(64))]
pub(crate) struct Bf16Buckets([[u16; 64]; 128]);

#[cfg(any(test, target_arch = "x86_64", target_arch = "aarch64"))]
impl Bf16Buckets {
    /// How far below the absmax positions begin, in bit patterns.
    pub(crate) const REACH: u16 = 1023;

    /// What complements the position of a negative element, sign included.
    pub(crate) const NEGATIVE: u16 = 0x7ff;

    /// Bits of the position within a bucket.
    pub(crate) const PLACE_BITS: u32 = 5;

    pub(crate) const TABLE: &'static Bf16Buckets = {
        static TABLE: Bf16Buckets = Bf16Buckets::new();
        &TABLE
    };

    /// The entries for an absmax of these bits. The code is `(position + entry) >> 5`, wrapping.
    pub(crate) const fn of_absmax(&self, bits: u16) -> &[u16; 64] {
        &self.0[bits as usize % 128]
    }

    const fn new() -> Bf16Buckets {
        let mut entries = [[0; 64]; 128];
        let mut significand = 0;
        while significand < 128 {
            // The absmax between 1 and 2.
            let absmax = 0x3f80 + significand as u32;
            let reciprocal = quantize::reciprocal(f32::from_bits(absmax << 16));
            let mut bucket = 0;
            while bucket < 64u32 {
                let entry = entry!(Bf16Buckets::PLACE_BITS, |place| {
                    let position = bucket * 32 + place;
                    let x = if position < 1024 {
                        absmax - Bf16Buckets::REACH as u32 + position
                    } else {
                        0x8000 | (absmax - Bf16Buckets::REACH as u32 + (2047 - position))
                    };
                    quantize::code(f32::from_bits(x << 16) * reciprocal)
                });
                // Less the bucket, so that the whole position can be added and not only the place
                // in the bucket.
                entries[significand][bucket as usize] =
                    (entry as u16).wrapping_sub(bucket as u16 * 32);
                bucket += 1;
            }
            significand += 1;
        }
        Bf16Buckets(entries)
    }
}

/// Buckets of elements that have been divided by the absmax: from -1 to 1 there are 31 of width 1/15,
/// each centred on a multiple of it, and no two NF4 thresholds fall in the same one. No threshold is
/// within 1e-3 of the border of a bucket, so that rounding does not matter in finding it.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) struct LinearBuckets {
    /// The threshold in each, or infinity.
    pub(crate) thresholds: [f32; 32],
    /// How many thresholds lie below each.
    pub(crate) bases: [i32; 32],
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
impl LinearBuckets {
    pub(crate) const PER_ONE: f32 = 15.0;

    /// Adding this leaves the number of the bucket, plus 16, in the low bits of the sum.
    pub(crate) const ROUND: f32 = 12_582_912.0 + 16.0;

    pub(crate) const TABLE: LinearBuckets = LinearBuckets::new();

    const fn new() -> LinearBuckets {
        let (mut thresholds, mut bases) = ([f32::INFINITY; 32], [0; 32]);
        let mut code = 0;
        let mut bucket = 0;
        while bucket < 32 {
            bases[bucket] = code;
            let end = (bucket as f32 - 16.0 + 0.5) / Self::PER_ONE;
            if (code as usize) < NF4_THRESHOLDS.len() && NF4_THRESHOLDS[code as usize] < end {
                let threshold = NF4_THRESHOLDS[code as usize];
                let begin = (bucket as f32 - 16.0 - 0.5) / Self::PER_ONE;
                assert!(
                    threshold > begin + 1e-3 && threshold < end - 1e-3,
                    "a threshold on the border of a bucket"
                );
                thresholds[bucket] = threshold;
                code += 1;
            }
            bucket += 1;
        }
        assert!(code == 15, "two thresholds in a bucket");
        LinearBuckets { thresholds, bases }
    }

    #[cfg(target_arch = "aarch64")]
    pub(crate) const fn bases_as_bytes(&self) -> [u8; 32] {
        let mut bytes = [0; 32];
        let mut bucket = 0;
        while bucket < 32 {
            bytes[bucket] = self.bases[bucket] as u8;
            bucket += 1;
        }
        bytes
    }

    /// The first bytes of all thresholds, little-endian, then their second bytes, and so on.
    #[cfg(target_arch = "aarch64")]
    pub(crate) const fn thresholds_by_byte(&self) -> [[u8; 32]; 4] {
        let mut bytes = [[0; 32]; 4];
        let mut bucket = 0;
        while bucket < 32 {
            let threshold = self.thresholds[bucket].to_le_bytes();
            let mut byte = 0;
            while byte < 4 {
                bytes[byte][bucket] = threshold[byte];
                byte += 1;
            }
            bucket += 1;
        }
        bytes
    }
}

/// Codes of the dynamic 8-bit map of `f32` values from -1 to 1: 64 buckets per octave.
#[repr(align(64))]
pub(crate) struct DynamicBuckets([u32; 2 * DynamicBuckets::SIDE]);

impl DynamicBuckets {
    /// Bits of the place within a bucket.
    pub(crate) const PLACE_BITS: u32 = 17;
    pub(crate) const PLACE: u32 = (1 << Self::PLACE_BITS) - 1;

    /// The first bucket, beginning at 2^-23: with everything below it has the code of zero.
    pub(crate) const FIRST: u32 = 0x3400_0000 >> Self::PLACE_BITS;
    /// The last bucket, beginning at 1.
    pub(crate) const LAST: u32 = 0x3f80_0000 >> Self::PLACE_BITS;

    /// Entries for positive values, then as many for negative ones.
    pub(crate) const SIDE: usize = (Self::LAST - Self::FIRST + 1) as usize;

    pub(crate) const TABLE: &'static DynamicBuckets = {
        static TABLE: DynamicBuckets = DynamicBuckets::new();
        &TABLE
    };

    /// The entries, for gathering.
    #[cfg(target_arch = "x86_64")]
    pub(crate) const fn entries(&self) -> &[u32; 2 * Self::SIDE] {
        &self.0
    }

    /// The code that [`double::search`] gives to a value that is not NaN and, rounding aside, from
    /// -1 to 1.
    #[inline(always)]
    pub(crate) fn code(&self, x: f32) -> u8 {
        let magnitude = x.to_bits() & 0x7fff_ffff;
        let bucket = (magnitude >> Self::PLACE_BITS).clamp(Self::FIRST, Self::LAST) - Self::FIRST;
        let (side, flip) = if x.is_sign_negative() {
            (Self::SIDE, Self::PLACE)
        } else {
            (0, 0)
        };
        let place = (magnitude & Self::PLACE) ^ flip;
        ((self.0[side + bucket as usize] + place) >> Self::PLACE_BITS) as u8
    }

    const fn new() -> DynamicBuckets {
        let mut entries = [0; 2 * Self::SIDE];
        let mut bucket = 0;
        while bucket < Self::SIDE {
            let first = (Self::FIRST + bucket as u32) << Self::PLACE_BITS;
            entries[bucket] = entry!(DynamicBuckets::PLACE_BITS, |place| double::search(
                f32::from_bits(first | place)
            ));
            entries[Self::SIDE + bucket] = entry!(DynamicBuckets::PLACE_BITS, |place| {
                double::search(-f32::from_bits(first | (DynamicBuckets::PLACE - place)))
            });
            bucket += 1;
        }
        let zero = 127 << Self::PLACE_BITS;
        assert!(
            entries[0] == zero && entries[Self::SIDE] == zero,
            "the first buckets are not all zero"
        );
        DynamicBuckets(entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_dynamic(x: f32) {
        assert_eq!(
            DynamicBuckets::TABLE.code(x),
            double::search(x),
            "{x:e} ({:08x})",
            x.to_bits()
        );
    }

    #[test]
    fn dynamic_buckets_equal_the_search_around_every_step() {
        for pair in crate::DYNAMIC_MAP.windows(2) {
            // Everything that could decide: the midpoint, however rounded, and the values
            // themselves.
            for centre in [(pair[0] + pair[1]) * 0.5, pair[0], pair[1]] {
                let (mut below, mut above) = (centre, centre);
                for _ in 0..64 {
                    assert_dynamic(below.max(-1.0));
                    assert_dynamic(above.min(1.0));
                    (below, above) = (below.next_down(), above.next_up());
                }
            }
        }
    }

    #[test]
    fn dynamic_buckets_equal_the_search_at_their_ends_and_between() {
        // Both ends of every bucket, and an odd stride through all magnitudes.
        let ends = (0..=DynamicBuckets::LAST).map(|bucket| bucket << DynamicBuckets::PLACE_BITS);
        let ends = ends.flat_map(|first| [first.saturating_sub(1), first]);
        for magnitude in ends.chain((0..=1f32.to_bits()).step_by(2_003)) {
            assert_dynamic(f32::from_bits(magnitude));
            assert_dynamic(-f32::from_bits(magnitude));
        }
    }

    #[test]
    #[ignore = "all 2.1 thousand million values; a minute in a release build"]
    fn dynamic_buckets_equal_the_search_everywhere() {
        for magnitude in 0..=1f32.to_bits() {
            assert_dynamic(f32::from_bits(magnitude));
            assert_dynamic(-f32::from_bits(magnitude));
        }
    }

    #[test]
    fn bf16_buckets_equal_the_definition_for_every_pair() {
        // Every significand of the absmax, at both ends of the range and in its middle, against
        // every magnitude.
        let plain = (quantize::PLAIN_ABSMAX.start() >> 16) as u16
            ..=(quantize::PLAIN_ABSMAX.end() >> 16) as u16;
        let low = *plain.start()..plain.start() + 128;
        let high = plain.end() - 127..=*plain.end();
        for absmax in low.chain(high).chain(0x3f80..0x4000) {
            let reciprocal = quantize::reciprocal(f32::from_bits(u32::from(absmax) << 16));
            let entries = Bf16Buckets::TABLE.of_absmax(absmax);
            for magnitude in 0..=absmax {
                let above = magnitude.saturating_sub(absmax - Bf16Buckets::REACH);
                for (x, position) in [
                    (magnitude, above),
                    (magnitude | 0x8000, above ^ Bf16Buckets::NEGATIVE),
                ] {
                    let entry = entries[usize::from(position >> Bf16Buckets::PLACE_BITS)];
                    let code = position.wrapping_add(entry) >> Bf16Buckets::PLACE_BITS;
                    let x = f32::from_bits(u32::from(x) << 16);
                    assert_eq!(
                        code,
                        u16::from(quantize::code(quantize::flush(x) * reciprocal)),
                        "{x:e} {absmax:04x}"
                    );
                }
            }
        }
    }
}
