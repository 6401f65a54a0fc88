use tightfit_kernels::{BlockSize, FloatType, blocks, packed_bytes};

use super::*;
use wit_nf4::Host as _;

/// Numbers in several pieces, the last of which ends inside a block.
fn numbers() -> Source {
    source("numbers", DType::Bf16, &[3, 262_147])
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let (chunks, _) = bytes.as_chunks::<4>();
    chunks.iter().copied().map(f32::from_le_bytes).collect()
}

#[test]
fn buffers_are_quantized_as_the_kernels_quantize_the_whole() {
    let numbers = numbers();
    let kernels = Kernels::detect();
    let elements = numbers.bytes.len() / 2;
    for block_size in [32, 64, 4096] {
        let size = BlockSize::new(block_size).unwrap();
        let mut packed = vec![0; packed_bytes(elements)];
        let mut scales = vec![0.0; blocks(elements, size)];
        let float = FloatType::Bf16;
        let source = &numbers.bytes;
        kernels
            .quantize_nf4(source, float, size, &mut packed, &mut scales)
            .unwrap();

        let mut program = Program::new(16 * MIB);
        let source = program.buffer_of(source);
        let codes = program.allocate(0, packed.len() as u64 + 7);
        let absmax = program.allocate(0, 4 * scales.len() as u64);
        let nonfinite = done(program.call().quantize(
            place(&source, 0),
            types::Dtype::Bf16,
            elements as u64,
            block_size as u32,
            place(&codes, 7),
            place(&absmax, 0),
        ));
        assert_eq!(nonfinite, 0);
        assert_eq!(program.bytes(&codes)[7..], packed);
        assert_eq!(floats(&program.bytes(&absmax)), scales);

        for (dtype, to) in [
            (types::Dtype::F32, FloatType::F32),
            (types::Dtype::F16, FloatType::F16),
        ] {
            let mut expected = vec![0; elements * to.bytes()];
            let nf4 = tightfit_kernels::QuantType::Nf4;
            kernels
                .dequantize(nf4, &packed, &scales, size, elements, to, &mut expected)
                .unwrap();
            let out = program.allocate(0, expected.len() as u64);
            done(program.call().dequantize(
                types::QuantType::Nf4,
                place(&codes, 7),
                place(&absmax, 0),
                elements as u64,
                block_size as u32,
                dtype,
                place(&out, 0),
            ));
            assert_eq!(program.bytes(&out), expected, "{block_size} {to:?}");
        }
    }
}

#[test]
fn a_programs_own_numbers_are_quantized_the_same() {
    let numbers = numbers();
    let elements = (numbers.bytes.len() / 2) as u64;
    let mut program = Program::new(16 * MIB);
    let source = program.buffer_of(&numbers.bytes);
    let outputs: Vec<[Resource<Buffer>; 2]> = (0..2)
        .map(|_| {
            [
                program.allocate(0, elements / 2 + 1),
                program.allocate(0, elements / 16 + 4),
            ]
        })
        .collect();
    let [first, second] = [&outputs[0], &outputs[1]];
    done(program.call().quantize(
        place(&source, 0),
        types::Dtype::Bf16,
        elements,
        64,
        place(&first[0], 0),
        place(&first[1], 0),
    ));
    done(program.call().quantize_bytes(
        numbers.bytes,
        types::Dtype::Bf16,
        64,
        place(&second[0], 0),
        place(&second[1], 0),
    ));
    for (first, second) in first.iter().zip(second) {
        assert_eq!(program.bytes(first), program.bytes(second));
    }
}

#[test]
fn scales_are_quantized_as_the_kernels_do_and_recovered() {
    let kernels = Kernels::detect();
    // Several pieces, and a nested block that is not full.
    let scales: Vec<f32> = (0..600_001)
        .map(|i| 1.0 + (i % 977) as f32 / 977.0)
        .collect();
    let bytes: &[u8] = bytemuck::cast_slice(&scales);
    let mean = kernels.absmax_mean(&scales);
    let groups = scales.len().div_ceil(256);
    let (mut codes, mut nested) = (vec![0; scales.len()], vec![0.0; groups]);
    kernels
        .quantize_absmax(&scales, mean, &mut codes, &mut nested)
        .unwrap();
    let mut recovered = vec![0.0; scales.len()];
    kernels
        .dequantize_absmax(&codes, &nested, mean, &mut recovered)
        .unwrap();

    let mut program = Program::new(16 * MIB);
    let count = scales.len() as u64;
    let absmax = program.buffer_of(bytes);
    let code_buffer = program.allocate(0, count);
    let nested_buffer = program.allocate(0, 4 * groups as u64);
    let given = done(program.call().quantize_absmax(
        place(&absmax, 0),
        count,
        place(&code_buffer, 0),
        place(&nested_buffer, 0),
    ));
    assert_eq!(given.to_bits(), mean.to_bits());
    assert_eq!(program.bytes(&code_buffer), codes);
    assert_eq!(floats(&program.bytes(&nested_buffer)), nested);
    done(program.call().dequantize_absmax(
        place(&code_buffer, 0),
        place(&nested_buffer, 0),
        mean,
        count,
        place(&absmax, 0),
    ));
    assert_eq!(floats(&program.bytes(&absmax)), recovered);
}

#[test]
fn numbers_that_nf4_cannot_hold_are_counted() {
    let mut program = Program::new(MIB);
    let mut numbers = vec![1f32; 256];
    numbers[3] = f32::NAN;
    numbers[200] = f32::INFINITY;
    let (codes, absmax) = (program.allocate(0, 128), program.allocate(0, 16));
    let bytes = bytemuck::cast_slice(&numbers).to_vec();
    let quantize = |program: &mut Program, bytes, dtype, block| {
        let (codes, absmax) = (place(&codes, 0), place(&absmax, 0));
        program
            .call()
            .quantize_bytes(bytes, dtype, block, codes, absmax)
    };
    let f32 = types::Dtype::F32;
    assert_eq!(done(quantize(&mut program, bytes, f32, 64)), 2);
    for block in [0, 1, 31, 48, 8192, u32::MAX] {
        let message = invalid(quantize(&mut program, vec![0; 4], f32, block));
        assert!(
            message.contains("not a power of two from 32 to 4096"),
            "{message}"
        );
    }
    let message = invalid(quantize(&mut program, vec![0; 5], f32, 64));
    assert!(message.contains("no whole number"), "{message}");
    assert!(matches!(
        told(quantize(&mut program, vec![0; 8], types::Dtype::I64, 64)),
        errors::Error::Unsupported(message) if message.contains("i64")
    ));
}

#[test]
fn places_are_checked_before_anything_is_written() {
    let mut program = Program::new(2 * MIB);
    let source = program.buffer_of(&[1; 256]);
    let codes = program.allocate(0, 64);
    let absmax = program.allocate(0, 4);
    let elsewhere = program.allocate(1, 64);
    let quantize = |program: &mut Program, from: u64, elements, codes, absmax| {
        let bf16 = types::Dtype::Bf16;
        let call = &mut program.call();
        call.quantize(place(&source, from), bf16, elements, 64, codes, absmax)
    };
    let good = [place(&codes, 0), place(&absmax, 0)];
    let [c, a] = good;
    done(quantize(&mut program, 0, 64, c, a));
    let before = program.bytes(&codes);
    let at = |offset| place(&codes, offset);
    for (from, elements, codes, scales) in [
        (0, 129, at(0), 0),
        (200, 64, at(0), 0),
        (u64::MAX, 1, at(0), 0),
        (0, u64::MAX, at(0), 0),
        (0, 1 << 63, at(0), 0),
        (0, 64, at(33), 0),
        (0, 64, at(u64::MAX), 0),
        (0, 64, at(0), 1),
        (0, 128, at(0), 0),
    ] {
        invalid(quantize(
            &mut program,
            from,
            elements,
            codes,
            place(&absmax, scales),
        ));
    }
    let message = invalid(quantize(
        &mut program,
        0,
        64,
        place(&elsewhere, 0),
        place(&absmax, 0),
    ));
    assert!(
        message.contains("on devices 0 and 1, not on one"),
        "{message}"
    );
    assert_eq!(program.bytes(&codes), before);
    for count in [2, u64::MAX, 1 << 62] {
        let scales = [place(&absmax, 0), place(&codes, 0), place(&source, 0)];
        let [a, c, n] = scales;
        invalid(program.call().quantize_absmax(a, count, c, n));
        let scales = [place(&codes, 0), place(&source, 0), place(&absmax, 0)];
        let [c, n, a] = scales;
        invalid(program.call().dequantize_absmax(c, n, 0.0, count, a));
    }
}
