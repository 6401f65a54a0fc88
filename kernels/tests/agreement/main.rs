//! All instruction sets give the bytes of the definition, which is written out here once more.

mod arguments;
mod convert;
mod quantize;

use tightfit_kernels::{BlockSize, FloatType, Isa, Kernels, QuantType, blocks, packed_bytes};

/// xorshift64*: the same values on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() >> 33) as usize % end
    }

    /// Roughly normal, times `scale`.
    fn weight(&mut self, scale: f32) -> f32 {
        let sum: f32 = (0..6)
            .map(|_| (self.next() >> 40) as f32 / (1 << 24) as f32 - 0.5)
            .sum();
        sum * scale
    }
}

fn all() -> impl Iterator<Item = Kernels> {
    Isa::available().map(|isa| Kernels::new(isa).expect("available"))
}

fn portable() -> Kernels {
    Kernels::new(Isa::Portable).expect("portable")
}

fn cast(source: &[u8], from: FloatType, to: FloatType) -> Vec<u8> {
    let mut out = vec![0; source.len() / from.bytes() * to.bytes()];
    portable()
        .cast(source, from, to, &mut out)
        .expect("lengths");
    out
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect()
}

fn bytes(values: &[f32], float: FloatType) -> Vec<u8> {
    cast(
        &values
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect::<Vec<_>>(),
        FloatType::F32,
        float,
    )
}

struct Quantized {
    packed: Vec<u8>,
    absmax: Vec<f32>,
    nonfinite_blocks: u64,
}

impl Quantized {
    fn absmax_bits(&self) -> Vec<u32> {
        self.absmax.iter().map(|x| x.to_bits()).collect()
    }
}

fn quantize(kernels: Kernels, source: &[u8], float: FloatType, block_size: BlockSize) -> Quantized {
    let elements = source.len() / float.bytes();
    let mut packed = vec![0xee; packed_bytes(elements)];
    let mut absmax = vec![f32::NAN; blocks(elements, block_size)];
    let stats = kernels
        .quantize_nf4(source, float, block_size, &mut packed, &mut absmax)
        .expect("lengths");
    Quantized {
        packed,
        absmax,
        nonfinite_blocks: stats.nonfinite_blocks,
    }
}

fn dequantize(
    kernels: Kernels,
    quant_type: QuantType,
    source: &Quantized,
    block_size: BlockSize,
    elements: usize,
    float: FloatType,
) -> Vec<u8> {
    let mut out = vec![0xee; elements * float.bytes()];
    kernels
        .dequantize(
            quant_type,
            &source.packed,
            &source.absmax,
            block_size,
            elements,
            float,
            &mut out,
        )
        .expect("lengths");
    out
}

/// Every bit pattern of a 16-bit type, with steps between neighbours that put many magnitudes into
/// each block.
fn every_pattern(step: usize) -> Vec<u8> {
    (0..1 << 16)
        .flat_map(|i: usize| ((i * step) as u16).to_le_bytes())
        .collect()
}

/// Equal bytes but for NaN, of which the payload does not matter.
fn assert_same_floats(have: &[u8], need: &[u8], float: FloatType, what: &str) {
    if have != need {
        let (have, need) = (
            floats(&cast(have, float, FloatType::F32)),
            floats(&cast(need, float, FloatType::F32)),
        );
        for (i, (have, need)) in have.iter().zip(&need).enumerate() {
            let same = have.to_bits() == need.to_bits() || have.is_nan() && need.is_nan();
            assert!(
                same,
                "{what}: {float} element {i} is {have:e}, should be {need:e}"
            );
        }
    }
}
