//! Dequantizing, double quantization and casting.

use tightfit_kernels::{
    BlockSize, DYNAMIC_MAP, FloatType, Kernels, NESTED_BLOCK_SIZE, QuantType, blocks, packed_bytes,
};

use crate::{
    Quantized, Random, all, assert_same_floats, bytes, cast, dequantize, every_pattern, portable,
};

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
                        tightfit_kernels::code_values(quant_type)[usize::from(code)]
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
