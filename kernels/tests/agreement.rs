//! All instruction sets give the bytes of the definition, which is written out here once more, one
//! element at a time.

use tightfit_kernels::{
    BlockSize, DYNAMIC_MAP, FloatType, Isa, KernelError, Kernels, NESTED_BLOCK_SIZE,
    NF4_THRESHOLDS, QuantType, blocks, packed_bytes,
};

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

fn flush(x: f32) -> f32 {
    if x.is_subnormal() {
        0.0f32.copysign(x)
    } else {
        x
    }
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

/// Every bit pattern of a 16-bit type, with steps between neighbours that put many magnitudes into
/// each block.
fn every_pattern(step: usize) -> Vec<u8> {
    (0..1 << 16)
        .flat_map(|i: usize| ((i * step) as u16).to_le_bytes())
        .collect()
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

#[test]
fn dequantize_is_one_product_and_one_rounding() {
    let mut random = Random(6);
    let special = [
        0.0,
        -0.0,
        1e-45,
        1.3e-38,
        6e-5,
        1e-7,
        65504.0,
        7e4,
        3.4e38,
        f32::INFINITY,
        f32::NAN,
        f32::MIN,
        -1.0,
    ];
    for quant_type in [QuantType::Nf4, QuantType::Fp4] {
        for block_size in BlockSize::ALL {
            for elements in [
                0,
                1,
                2,
                31,
                32,
                33,
                3 * block_size.elements(),
                20 * block_size.elements() + 77,
            ] {
                let source = Quantized {
                    packed: (0..packed_bytes(elements))
                        .map(|_| random.next() as u8)
                        .collect(),
                    absmax: (0..blocks(elements, block_size))
                        .map(|i| {
                            if i % 2 == 0 {
                                random.weight(0.3).abs()
                            } else {
                                special[random.below(special.len())]
                            }
                        })
                        .collect(),
                    nonfinite_blocks: 0,
                };
                let products: Vec<f32> = (0..elements)
                    .map(|i| {
                        let code = source.packed[i / 2] >> (4 - i % 2 * 4) & 15;
                        quant_type.code_values()[usize::from(code)]
                            * source.absmax[i / block_size.elements()]
                    })
                    .collect();
                for float in FloatType::ALL {
                    let need = bytes(&products, float);
                    for kernels in all() {
                        let have =
                            dequantize(kernels, quant_type, &source, block_size, elements, float);
                        assert_same_floats(
                            &have,
                            &need,
                            float,
                            &format!("{quant_type:?} {}", kernels.isa()),
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn absmax_by_every_instruction_set() {
    let mut random = Random(7);
    for round in 0..60 {
        let blocks = [1, 2, 15, 255, 256, 257, 1000, 70_001][round % 8];
        let scale = [0.05, 1e-41, 1e-30, 3.0, 1e38][round % 5];
        let mut absmax: Vec<f32> = (0..blocks).map(|_| random.weight(scale).abs()).collect();
        match round % 6 {
            1 => absmax[random.below(blocks)] = f32::INFINITY,
            2 => absmax[random.below(blocks)] = f32::MIN,
            3 => absmax.fill(scale),
            4 => absmax[random.below(blocks)] = 0.0,
            _ => {}
        }
        let mean = portable().absmax_mean(&absmax);
        // An offset that leaves NaN in some blocks only, as well as the mean.
        for offset in [mean, 0.0, f32::INFINITY, -1.0] {
            let quantize = |kernels: Kernels| {
                let (mut codes, mut nested) = (
                    vec![0xee; blocks],
                    vec![f32::NAN; blocks.div_ceil(NESTED_BLOCK_SIZE)],
                );
                kernels
                    .quantize_absmax(&absmax, offset, &mut codes, &mut nested)
                    .expect("lengths");
                let mut out = vec![0.0; blocks];
                kernels
                    .dequantize_absmax(&codes, &nested, offset, &mut out)
                    .expect("lengths");
                let bits = |floats: &[f32]| {
                    floats
                        .iter()
                        .map(|x| if x.is_nan() { u32::MAX } else { x.to_bits() })
                        .collect::<Vec<_>>()
                };
                (codes, bits(&nested), bits(&out))
            };
            let need = quantize(portable());
            for kernels in all() {
                let same_mean = kernels.absmax_mean(&absmax).to_bits() == mean.to_bits();
                assert!(same_mean || mean.is_nan(), "{} {blocks}", kernels.isa());
                assert!(
                    quantize(kernels) == need,
                    "{} {blocks} {scale} {offset}",
                    kernels.isa()
                );
            }
            // The nearest value of the map, wherever it is clear which one that is.
            for (i, code) in need.0.iter().enumerate() {
                let nested = f32::from_bits(need.1[i / NESTED_BLOCK_SIZE]);
                let x = (absmax[i] - offset) / nested;
                if nested.is_normal() && nested > 1e-30 && nested < 1e37 && x.is_finite() {
                    let have = (DYNAMIC_MAP[usize::from(*code)] - x).abs();
                    let best = DYNAMIC_MAP
                        .iter()
                        .map(|value| (value - x).abs())
                        .fold(f32::MAX, f32::min);
                    assert!(have <= best + 1e-6, "{x} {code}");
                }
            }
        }
    }
}

#[test]
fn casts_by_every_instruction_set() {
    let mut random = Random(8);
    let mut values: Vec<u32> = (0..200_000).map(|_| random.next() as u32).collect();
    // Everything that decides a rounding to 16 bits, and the ends of ranges.
    for exponent in 0..256u32 {
        for low in [
            0, 1, 0xfff, 0x1000, 0x1001, 0x1fff, 0x2fff, 0x3000, 0x7fff, 0x8000, 0x8001, 0x1_8000,
            0x7f_f000,
        ] {
            values.extend([
                exponent << 23 | low,
                1 << 31 | exponent << 23 | low,
                exponent << 23 | (0x7f_ffff ^ low),
            ]);
        }
    }
    let f32s: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    for from in FloatType::ALL {
        let source = if from == FloatType::F32 {
            f32s.clone()
        } else {
            every_pattern(1)
        };
        for to in FloatType::ALL {
            for cut in [0, 1, 5] {
                let source = &source[cut * from.bytes()..];
                let need = cast(source, from, to);
                for kernels in all() {
                    let mut have = vec![0xee; need.len()];
                    kernels.cast(source, from, to, &mut have).expect("lengths");
                    assert!(have == need, "{from} to {to}, {}", kernels.isa());
                }
            }
        }
    }
}

#[test]
fn casts_round_to_nearest_even() {
    let one = |x: f32, to: FloatType| {
        let bytes = cast(&x.to_le_bytes(), FloatType::F32, to);
        u16::from_le_bytes([bytes[0], bytes[1]])
    };
    let bf16 = |x| one(x, FloatType::Bf16);
    assert_eq!(bf16(1.0 + 1.0 / 256.0), 0x3f80);
    assert_eq!(bf16(1.0 + 3.0 / 256.0), 0x3f82);
    assert_eq!(bf16((1.0 + 1.0 / 256.0f32).next_up()), 0x3f81);
    assert_eq!(bf16(f32::MAX), 0x7f80);
    assert_eq!(bf16(f32::from_bits(0x0001_8000)), 0x0002);
    assert_eq!(bf16(f32::from_bits(0x7f80_0001)), 0x7fc0);
    let f16 = |x| one(x, FloatType::F16);
    assert_eq!(f16(65519.996), 0x7bff);
    assert_eq!(f16(65520.0), 0x7c00);
    assert_eq!(f16(2f32.powi(-25)), 0x0000);
    assert_eq!(f16(2f32.powi(-25).next_up()), 0x0001);
    assert_eq!(f16(3.0 * 2f32.powi(-25)), 0x0002);
    assert_eq!(f16(-2f32.powi(-14)), 0x8400);
    assert_eq!(f16(1.0 + 1.0 / 2048.0), 0x3c00);
    assert_eq!(f16(1.0 + 3.0 / 2048.0), 0x3c02);
    // All 16-bit values but signalling NaN survive the way to f32 and back.
    for float in [FloatType::Bf16, FloatType::F16] {
        let all = every_pattern(1);
        let back = cast(&cast(&all, float, FloatType::F32), FloatType::F32, float);
        assert_same_floats(&back, &all, float, "round trip");
    }
}

#[test]
fn wrong_lengths_are_errors_and_name_them() {
    let length = |what, need, have| Err(KernelError::Length { what, need, have });
    for kernels in all() {
        let quantize = |bytes: usize, packed: usize, absmax: usize| {
            let (mut packed, mut absmax) = (vec![0; packed], vec![0.0; absmax]);
            kernels
                .quantize_nf4(
                    &vec![0; bytes],
                    FloatType::Bf16,
                    BlockSize::DEFAULT,
                    &mut packed,
                    &mut absmax,
                )
                .map(|stats| stats.nonfinite_blocks)
        };
        assert_eq!(quantize(130, 33, 2), Ok(0));
        assert_eq!(quantize(0, 0, 0), Ok(0));
        assert_eq!(
            quantize(131, 33, 2),
            Err(KernelError::PartialElement {
                float: FloatType::Bf16,
                need: 2,
                have: 131
            })
        );
        assert_eq!(quantize(130, 32, 2), length("packed", 33, 32).map(|()| 0));
        assert_eq!(quantize(130, 33, 3), length("absmax", 2, 3).map(|()| 0));

        let dequantize = |packed: usize, absmax: usize, elements: usize, out: usize| {
            let (packed, absmax, mut out) = (vec![0; packed], vec![0.0; absmax], vec![0; out]);
            let (size, float) = (BlockSize::DEFAULT, FloatType::F32);
            kernels.dequantize(
                QuantType::Fp4,
                &packed,
                &absmax,
                size,
                elements,
                float,
                &mut out,
            )
        };
        assert_eq!(dequantize(33, 2, 65, 260), Ok(()));
        assert_eq!(dequantize(32, 2, 65, 260), length("packed", 33, 32));
        assert_eq!(dequantize(33, 1, 65, 260), length("absmax", 2, 1));
        assert_eq!(dequantize(33, 2, 65, 259), length("out", 260, 259));
        assert!(dequantize(0, 0, usize::MAX, 0).is_err());

        let mut floats = [0.0; 300];
        assert_eq!(
            kernels.quantize_absmax(&[0.0; 257], 0.0, &mut [0; 257], &mut floats[..2]),
            Ok(())
        );
        let error = kernels.quantize_absmax(&[0.0; 257], 0.0, &mut [0; 256], &mut floats[..2]);
        assert_eq!(error, length("codes", 257, 256));
        let error = kernels.quantize_absmax(&[0.0; 257], 0.0, &mut [0; 257], &mut floats[..1]);
        assert_eq!(error, length("nested_absmax", 2, 1));
        let error = kernels.dequantize_absmax(&[0; 257], &[0.0; 2], 0.0, &mut floats);
        assert_eq!(error, length("out", 257, 300));
        let error = kernels.dequantize_absmax(&[0; 257], &[0.0; 1], 0.0, &mut floats[..257]);
        assert_eq!(error, length("nested_absmax", 2, 1));

        let error = kernels.cast(&[0; 6], FloatType::Bf16, FloatType::F32, &mut [0; 11]);
        assert_eq!(error, length("out", 12, 11));
        assert!(
            kernels
                .cast(&[0; 6], FloatType::F32, FloatType::F32, &mut [0; 6])
                .is_err()
        );
    }
    let text = KernelError::Length {
        what: "packed",
        need: 33,
        have: 32,
    }
    .to_string();
    assert_eq!(text, "`packed` holds 32 elements, 33 are needed");
}

#[test]
fn block_sizes_and_instruction_sets() {
    for elements in 0..10_000 {
        let valid = BlockSize::ALL
            .iter()
            .any(|size| size.elements() == elements);
        assert_eq!(BlockSize::new(elements).is_ok(), valid, "{elements}");
    }
    assert_eq!(
        BlockSize::new(1 << 22),
        Err(KernelError::BlockSize { have: 1 << 22 })
    );
    assert_eq!(BlockSize::default().elements(), 64);

    assert_eq!(Isa::available().next(), Some(Isa::Portable));
    assert_eq!(Kernels::detect().isa(), Isa::detect());
    for isa in Isa::ALL {
        match Kernels::new(isa) {
            Ok(kernels) => assert!(isa.is_available() && kernels.isa() == isa),
            Err(error) => {
                assert!(!isa.is_available() && error == KernelError::IsaUnavailable { isa })
            }
        }
    }
}
