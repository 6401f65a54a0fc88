//! Values to test with, and comparing.

use tightfit_kernels::{FloatType, Isa, Kernels};

/// xorshift64*: the same values on every machine.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() >> 33) as usize % end
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// Roughly normal, times `scale`.
    pub(crate) fn weight(&mut self, scale: f32) -> f32 {
        let sum: f32 = (0..6)
            .map(|_| (self.next() >> 40) as f32 / (1 << 24) as f32 - 0.5)
            .sum();
        sum * scale
    }
}

/// Values at which something changes.
pub(crate) const SPECIAL: [f32; 25] = [
    0.0,
    -0.0,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
    // What GPUs give for NaN: rounded like a number it would become zero.
    f32::from_bits(0x7fff_ffff),
    f32::MAX,
    f32::MIN,
    f32::MIN_POSITIVE,
    -f32::MIN_POSITIVE,
    // The largest and the smallest subnormals.
    f32::from_bits(0x007f_ffff),
    f32::from_bits(0x807f_ffff),
    f32::from_bits(0x0000_0001),
    // 2^126 and its neighbours: beyond it reciprocals are subnormal.
    f32::from_bits(0x7e80_0000),
    f32::from_bits(0x7e80_0001),
    f32::from_bits(0xfe7f_ffff),
    // 2^-98 and its neighbours: below it the fast path of the kernels ends.
    f32::from_bits(0x0e80_0000),
    f32::from_bits(0x0e7f_ffff),
    f32::from_bits(0x0e80_0001),
    // The largest, the smallest normal and the smallest of binary16.
    65504.0,
    6.103_515_6e-5,
    5.960_464_5e-8,
    1.0,
    -1.0,
    1e-40,
];

/// The definition.
pub(crate) fn portable() -> Kernels {
    Kernels::new(Isa::Portable).expect("portable")
}

pub(crate) fn floats(bytes: &[u8]) -> Vec<f32> {
    let (floats, rest) = bytes.as_chunks::<4>();
    assert!(rest.is_empty());
    floats
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect()
}

pub(crate) fn to_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

pub(crate) fn cast(source: &[u8], from: FloatType, to: FloatType) -> Vec<u8> {
    let mut out = vec![0; source.len() / from.bytes() * to.bytes()];
    portable()
        .cast(source, from, to, &mut out)
        .expect("lengths");
    out
}

/// Values as elements of a type.
pub(crate) fn elements(values: &[f32], float: FloatType) -> Vec<u8> {
    cast(&to_bytes(values), FloatType::F32, float)
}

/// Equal bits, or both NaN.
pub(crate) fn assert_floats(have: &[f32], need: &[f32], what: &str) {
    assert_eq!(have.len(), need.len(), "{what}");
    for (i, (have, need)) in have.iter().zip(need).enumerate() {
        let same = have.to_bits() == need.to_bits() || have.is_nan() && need.is_nan();
        assert!(same, "{what}: element {i} is {have:e}, should be {need:e}");
    }
}

/// The same of elements of a type.
pub(crate) fn assert_elements(have: &[u8], need: &[u8], float: FloatType, what: &str) {
    if have != need {
        let widen = |bytes| floats(&cast(bytes, float, FloatType::F32));
        assert_floats(&widen(have), &widen(need), what);
    }
}
