//! Quantizing to NF4, and dequantizing.

use tightfit_kernels::{BlockSize, FloatType, NF4_THRESHOLDS, QuantType, blocks, packed_bytes};

use crate::calls::{Misaligned, Quantized, dequantize, quantize};
use crate::device::Device;
use crate::values::{Random, SPECIAL, assert_elements, assert_floats, elements, floats, portable};

pub(crate) fn definition(source: &[u8], float: FloatType, block_size: BlockSize) -> Quantized {
    let elements = source.len() / float.bytes();
    let mut packed = vec![0; packed_bytes(elements)];
    let mut absmax = vec![0.0; blocks(elements, block_size)];
    let stats = portable()
        .quantize_nf4(source, float, block_size, &mut packed, &mut absmax)
        .expect("lengths");
    Quantized {
        packed,
        absmax: crate::values::to_bytes(&absmax),
        nonfinite_blocks: stats.nonfinite_blocks,
    }
}

fn check(
    device: &mut dyn Device,
    source: &[u8],
    float: FloatType,
    block_size: BlockSize,
    misaligned: Misaligned,
) {
    let need = definition(source, float, block_size);
    let have = quantize(device, source, float, block_size, misaligned);
    let what = format!(
        "{float}, block size {block_size}, {} bytes, {misaligned:?}",
        source.len()
    );
    assert_quantized(&have, &need, &what);
}

pub(crate) fn assert_quantized(have: &Quantized, need: &Quantized, what: &str) {
    assert_floats(&floats(&have.absmax), &floats(&need.absmax), what);
    if let Some(i) = (0..need.packed.len()).find(|i| have.packed[*i] != need.packed[*i]) {
        panic!(
            "{what}: byte {i} is {:02x}, should be {:02x}",
            have.packed[i], need.packed[i]
        );
    }
    assert_eq!(
        have.nonfinite_blocks, need.nonfinite_blocks,
        "{what}: non-finite blocks"
    );
}

pub(crate) fn every_16_bit_pattern(device: &mut dyn Device) {
    for float in [FloatType::Bf16, FloatType::F16] {
        // Steps that put neighboring, and very different, magnitudes into one block.
        for (step, block_size) in [(1, 0), (77, 1), (4_099, 1), (40_503, 2), (12_345, 4)] {
            let source: Vec<u8> = (0..1usize << 16)
                .flat_map(|i| ((i * step) as u16).to_le_bytes())
                .collect();
            let block_size = BlockSize::ALL[block_size];
            check(device, &source, float, block_size, Misaligned::default());
        }
    }
}

pub(crate) fn thresholds_and_their_neighbors_at_every_scale(device: &mut dyn Device) {
    let mut random = Random(1);
    let mut values = vec![];
    for exponent in -149..128 {
        let significand = f32::from_bits((random.next() as u32 & 0x007f_ffff) | 0x3f80_0000);
        for significand in [f64::from(significand), 1.0] {
            let scale = (significand * 2f64.powi(exponent)) as f32;
            let first = values.len();
            values.push(scale);
            for threshold in NF4_THRESHOLDS {
                let center = threshold * scale;
                values.extend([center, center.next_up(), center.next_down()]);
                values.push(center * 1.001);
                values.push(center * 0.999);
            }
            values.resize(first + 128, -0.0);
        }
    }
    for float in FloatType::ALL {
        // The second half of each group has an absmax of its own in blocks of 64.
        for block_size in [1, 2] {
            let block_size = BlockSize::ALL[block_size];
            let source = elements(&values, float);
            check(device, &source, float, block_size, Misaligned::default());
        }
    }
}

pub(crate) fn special_values_among_weights(device: &mut dyn Device) {
    let mut random = Random(2);
    for float in FloatType::ALL {
        for block_size in BlockSize::ALL {
            // Blocks without, with a few and with only special values, and a partial one.
            let size = block_size.elements();
            let mut values = vec![];
            for round in 0..(2 * SPECIAL.len()).min(65_536 / size) {
                let scale = random.pick(&[0.0, 1e-44, 1e-39, 1e-30, 0.02, 1e4, 1e38]);
                let first = values.len();
                values.extend((0..size).map(|_| random.weight(scale)));
                match round % 3 {
                    0 => {
                        for _ in 0..=random.below(3) {
                            values[first + random.below(size)] = random.pick(&SPECIAL);
                        }
                    }
                    1 => values[first..].fill(SPECIAL[round / 2 % SPECIAL.len()]),
                    _ => {}
                }
            }
            for tail in [0, 1, 19] {
                values.extend((0..tail).map(|_| random.pick(&SPECIAL)));
                let source = elements(&values, float);
                check(device, &source, float, block_size, Misaligned::default());
            }
            // Nothing but NaN in a partial block.
            let source = elements(&[f32::NAN; 3], float);
            check(device, &source, float, block_size, Misaligned::default());
        }
    }
}

pub(crate) fn random_bits_in_every_block_size(device: &mut dyn Device) {
    let mut random = Random(3);
    for float in FloatType::ALL {
        let bits: Vec<u8> = (0..40_001 * float.bytes())
            .map(|_| random.next() as u8)
            .collect();
        let weights: Vec<f32> = (0..40_001).map(|_| random.weight(0.02)).collect();
        for block_size in BlockSize::ALL {
            check(device, &bits, float, block_size, Misaligned::default());
            let source = elements(&weights, float);
            check(device, &source, float, block_size, Misaligned::default());
        }
    }
}

pub(crate) fn lengths_and_alignments(device: &mut dyn Device) {
    let mut random = Random(4);
    let around = [128, 256, 1024, 4096, 8192, 16_384];
    let lengths: Vec<usize> = (0..=66)
        .chain(around.iter().flat_map(|n| n - 1..=n + 2))
        .collect();
    for float in FloatType::ALL {
        for (round, length) in lengths.iter().enumerate() {
            let weights: Vec<f32> = (0..*length).map(|_| random.weight(0.05)).collect();
            let source = elements(&weights, float);
            let block_size = BlockSize::ALL[round % BlockSize::ALL.len()];
            let quantized = definition(&source, float, block_size);
            let absmax = floats(&quantized.absmax);
            // Nothing, everything, or only the packed codes begin at an odd place.
            let packed = 1 + round % 15;
            let only_packed = Misaligned {
                packed,
                ..Misaligned::default()
            };
            for misaligned in [
                Misaligned::default(),
                Misaligned::nth(round, float),
                only_packed,
            ] {
                check(device, &source, float, block_size, misaligned);
                check_dequantize(
                    device,
                    QuantType::Nf4,
                    &quantized.packed,
                    &absmax,
                    block_size,
                    *length,
                    float,
                    misaligned,
                );
            }
        }
    }
}

/// A chunk of a tensor is quantized by itself; so is one that begins in the middle of memory.
pub(crate) fn pieces_equal_the_whole(device: &mut dyn Device) {
    let mut random = Random(5);
    for float in FloatType::ALL {
        for block_size in [32, 64, 4096].map(|n| BlockSize::new(n).expect("valid")) {
            let (size, length) = (block_size.elements(), 7 * block_size.elements() + 21);
            let weights: Vec<f32> = (0..length).map(|_| random.weight(0.1)).collect();
            let source = elements(&weights, float);
            let whole = quantize(device, &source, float, block_size, Misaligned::default());
            let (mut packed, mut absmax) = (vec![], vec![]);
            for (round, piece) in source.chunks(2 * size * float.bytes()).enumerate() {
                let misaligned = Misaligned::nth(round, float);
                let piece = quantize(device, piece, float, block_size, misaligned);
                packed.extend(piece.packed);
                absmax.extend(piece.absmax);
            }
            assert!(packed == whole.packed && absmax == whole.absmax);
        }
    }
}

#[expect(clippy::too_many_arguments, reason = "what the kernel takes")]
fn check_dequantize(
    device: &mut dyn Device,
    quant_type: QuantType,
    packed: &[u8],
    absmax: &[f32],
    block_size: BlockSize,
    elements: usize,
    float: FloatType,
    misaligned: Misaligned,
) {
    let mut need = vec![0; elements * float.bytes()];
    portable()
        .dequantize(
            quant_type, packed, absmax, block_size, elements, float, &mut need,
        )
        .expect("lengths");
    let have = dequantize(
        device, quant_type, packed, absmax, block_size, elements, float, misaligned,
    );
    let what = format!(
        "{quant_type:?} to {float}, block size {block_size}, {elements} elements, {misaligned:?}"
    );
    assert_elements(&have, &need, float, &what);
}

pub(crate) fn dequantizing(device: &mut dyn Device) {
    let mut random = Random(6);
    for quant_type in [QuantType::Nf4, QuantType::Fp4] {
        for float in FloatType::ALL {
            for (round, block_size) in BlockSize::ALL.into_iter().enumerate() {
                let length = 3 * block_size.elements() + 8_000 + random.below(500);
                let packed: Vec<u8> = (0..packed_bytes(length))
                    .map(|_| random.next() as u8)
                    .collect();
                // Products that are rounded in every way: subnormal in each type, too large for
                // binary16, of any bits, and of what is not a number.
                let absmax: Vec<f32> = (0..blocks(length, block_size))
                    .map(|i| match i % 4 {
                        0 => random.weight(0.3).abs(),
                        1 => random.pick(&SPECIAL),
                        2 => f32::from_bits(random.next() as u32),
                        _ => random.weight(1.0) * random.pick(&[1e-44, 1e-38, 1e-6, 7e4, 3e38]),
                    })
                    .collect();
                for misaligned in [Misaligned::default(), Misaligned::nth(1 + round, float)] {
                    check_dequantize(
                        device, quant_type, &packed, &absmax, block_size, length, float, misaligned,
                    );
                }
            }
        }
    }
}
