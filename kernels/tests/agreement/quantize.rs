//! Quantizing to NF4.

use tightfit_kernels::{BlockSize, FloatType, NF4_THRESHOLDS, QuantType, blocks, packed_bytes};

use crate::{Quantized, Random, all, bytes, cast, dequantize, every_pattern, floats, quantize};

fn flush(x: f32) -> f32 {
    if x.is_subnormal() {
        0.0f32.copysign(x)
    } else {
        x
    }
}

fn definition(source: &[u8], float: FloatType, block_size: BlockSize) -> Quantized {
    let source = floats(&cast(source, float, FloatType::F32));
    let (mut codes, mut absmax, mut nonfinite_blocks) = (vec![], vec![], 0);
    for block in source.chunks(block_size.elements()) {
        nonfinite_blocks += u64::from(block.iter().any(|x| !x.is_finite()));
        let mut padded: Vec<f32> = block.iter().map(|x| flush(*x)).collect();
        padded.resize(block_size.elements(), 0.0);
        let max = padded
            .iter()
            .filter(|x| !x.is_nan())
            .map(|x| x.abs())
            .fold(f32::MIN, f32::max);
        let reciprocal = flush(1.0 / max);
        let code = |x: &f32| {
            NF4_THRESHOLDS
                .iter()
                .filter(|t| flush(x * reciprocal) > **t)
                .count() as u8
        };
        codes.extend(padded[..block.len().next_multiple_of(2)].iter().map(code));
        absmax.push(max);
    }
    Quantized {
        packed: codes.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect(),
        absmax,
        nonfinite_blocks,
    }
}

fn assert_quantizes(source: &[u8], float: FloatType, block_size: BlockSize, what: &str) {
    let need = definition(source, float, block_size);
    for kernels in all() {
        let have = quantize(kernels, source, float, block_size);
        let what = format!(
            "{what}: {float}, block size {block_size}, {}",
            kernels.isa()
        );
        assert_eq!(have.absmax_bits(), need.absmax_bits(), "{what}: absmax");
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
}

#[test]
fn every_16_bit_pattern() {
    for float in [FloatType::Bf16, FloatType::F16] {
        for step in [1, 77, 4_099, 40_503] {
            assert_quantizes(
                &every_pattern(step),
                float,
                BlockSize::DEFAULT,
                &format!("step {step}"),
            );
        }
        assert_quantizes(
            &every_pattern(12_345),
            float,
            BlockSize::ALL[0],
            "step 12345",
        );
        assert_quantizes(
            &every_pattern(12_345),
            float,
            BlockSize::ALL[3],
            "step 12345",
        );
    }
}

#[test]
fn every_bf16_significand_against_every_absmax_significand() {
    // Three octaves below each absmax in one block of 1024, as 384 magnitudes of both signs.
    let mut source = vec![];
    for absmax in 0x3d00..0x3d80u16 {
        let magnitudes = (absmax - 383..=absmax).flat_map(|x| [x, x | 0x8000]);
        source.extend(
            magnitudes
                .chain(std::iter::repeat(absmax))
                .take(1024)
                .flat_map(u16::to_le_bytes),
        );
    }
    assert_quantizes(
        &source,
        FloatType::Bf16,
        BlockSize::new(1024).expect("1024"),
        "significands",
    );
}

#[test]
fn thresholds_and_their_neighbours_at_every_scale() {
    let mut random = Random(1);
    for exponent in -149..128 {
        let scale = f32::from_bits((random.next() as u32 & 0x007f_ffff) | 0x3f80_0000) as f64
            * 2f64.powi(exponent);
        for scale in [scale as f32, 2f64.powi(exponent) as f32] {
            let mut values = vec![scale];
            for threshold in NF4_THRESHOLDS {
                let centre = threshold * scale;
                values.extend([
                    centre,
                    centre.next_up(),
                    centre.next_down(),
                    centre * 1.001,
                    centre * 0.999,
                ]);
            }
            values.resize(128, -0.0);
            for float in FloatType::ALL {
                // The second block of 64 has an absmax of its own; in the block of 128 it does not.
                assert_quantizes(
                    &bytes(&values, float),
                    float,
                    BlockSize::ALL[1],
                    "thresholds",
                );
                assert_quantizes(
                    &bytes(&values, float),
                    float,
                    BlockSize::ALL[2],
                    "thresholds",
                );
            }
        }
    }
}

#[test]
fn special_values_among_weights() {
    let special = [
        0.0,
        -0.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        -f32::NAN,
        f32::MAX,
        f32::MIN,
        f32::MIN_POSITIVE,
        f32::MIN_POSITIVE.next_down(),
        -f32::MIN_POSITIVE.next_down(),
        f32::from_bits(1),
        2f32.powi(126),
        2f32.powi(126).next_up(),
        -2f32.powi(126).next_down(),
        2f32.powi(-100),
        2f32.powi(-100).next_down(),
        65504.0,
        6e-8,
        1.0,
    ];
    let mut random = Random(2);
    for float in FloatType::ALL {
        for block_size in BlockSize::ALL {
            for scale in [0.0, 1e-44, 1e-39, 1e-30, 0.02, 1e4, 1e38] {
                let elements = 3 * block_size.elements() + 17;
                let mut values: Vec<f32> = (0..elements).map(|_| random.weight(scale)).collect();
                for _ in 0..random.below(6) {
                    values[random.below(elements)] = special[random.below(special.len())];
                }
                assert_quantizes(&bytes(&values, float), float, block_size, "special values");
            }
            // Blocks of one special value, and the same partial.
            let values: Vec<f32> = special
                .iter()
                .flat_map(|x| vec![*x; block_size.elements()])
                .chain(vec![f32::NAN; 3])
                .collect();
            assert_quantizes(&bytes(&values, float), float, block_size, "uniform blocks");
        }
    }
}

#[test]
fn random_bits_and_every_length() {
    let mut random = Random(3);
    let source: Vec<u8> = (0..100_000).map(|_| random.next() as u8).collect();
    for float in FloatType::ALL {
        for block_size in BlockSize::ALL {
            assert_quantizes(&source, float, block_size, "random bits");
        }
        let weights: Vec<f32> = (0..300).map(|_| random.weight(0.05)).collect();
        for elements in 0..300 {
            // Every alignment comes up too.
            let mut misaligned = vec![0; elements % 7];
            misaligned.extend(bytes(&weights[..elements], float));
            let source = &misaligned[elements % 7..];
            assert_quantizes(source, float, BlockSize::ALL[elements % 3], "lengths");
        }
    }
}

#[test]
fn weights_of_many_scales() {
    let mut random = Random(4);
    for float in FloatType::ALL {
        for scale in [1e-20, 1e-6, 0.001, 0.02, 0.7, 30.0, 1e10] {
            let values: Vec<f32> = (0..1 << 15).map(|_| random.weight(scale)).collect();
            assert_quantizes(
                &bytes(&values, float),
                float,
                BlockSize::ALL[random.below(8)],
                "weights",
            );
        }
    }
}

#[test]
fn pieces_equal_the_whole() {
    let mut random = Random(5);
    for float in FloatType::ALL {
        for block_size in BlockSize::ALL {
            let (size, elements) = (block_size.elements(), 7 * block_size.elements() + 21);
            let source = bytes(
                &(0..elements)
                    .map(|_| random.weight(0.1))
                    .collect::<Vec<_>>(),
                float,
            );
            for kernels in all() {
                let whole = quantize(kernels, &source, float, block_size);
                let (mut packed, mut absmax) = (vec![], vec![]);
                let mut dequantized = vec![];
                for first in (0..elements).step_by(2 * size) {
                    let last = elements.min(first + 2 * size);
                    let piece = quantize(
                        kernels,
                        &source[first * float.bytes()..last * float.bytes()],
                        float,
                        block_size,
                    );
                    let mut out = vec![0xee; (last - first) * 2];
                    kernels
                        .dequantize(
                            QuantType::Nf4,
                            &whole.packed[first / 2..packed_bytes(last)],
                            &whole.absmax[first / size..blocks(last, block_size)],
                            block_size,
                            last - first,
                            FloatType::Bf16,
                            &mut out,
                        )
                        .expect("lengths");
                    packed.extend(piece.packed);
                    absmax.extend(piece.absmax);
                    dequantized.extend(out);
                }
                assert!(packed == whole.packed && absmax == whole.absmax);
                assert!(
                    dequantized
                        == dequantize(
                            kernels,
                            QuantType::Nf4,
                            &whole,
                            block_size,
                            elements,
                            FloatType::Bf16
                        )
                );
            }
        }
    }
}
