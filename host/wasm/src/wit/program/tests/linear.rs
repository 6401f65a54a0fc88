use tightfit_kernels::{
    BlockSize, Choices, ExpertsMatrices, FloatType, LinearWeights, QuantType, Scales, blocks,
    packed_bytes,
};

use super::*;
use linear::{Product, Rounding};
use types::{Format, Nf4Format, Placement};
use wit_linear::{Host as _, HostWeight as _};
use wit_models::HostModel as _;

use super::super::bindings::tightfit::host::linear;

const ONE: std::num::NonZeroUsize = std::num::NonZeroUsize::MIN;

fn numbers(count: usize, step: usize) -> Vec<f32> {
    let number = |index: usize| ((index * step) % 1009) as f32 / 500.0 - 1.0;
    (0..count).map(number).collect()
}

fn bytes_of(numbers: &[f32]) -> Vec<u8> {
    numbers
        .iter()
        .flat_map(|number| number.to_le_bytes())
        .collect()
}

/// Codes and scales, as kernels and in buffers.
struct Quantized {
    size: BlockSize,
    codes: Vec<u8>,
    scales: Vec<f32>,
}

impl Quantized {
    fn new(elements: usize, block_size: usize) -> Quantized {
        let size = BlockSize::new(block_size).unwrap();
        let mut codes = vec![0; packed_bytes(elements)];
        let mut scales = vec![0.0; blocks(elements, size)];
        let source = bytes_of(&numbers(elements, 7919));
        Kernels::detect()
            .quantize_nf4(&source, FloatType::F32, size, &mut codes, &mut scales)
            .unwrap();
        Quantized {
            size,
            codes,
            scales,
        }
    }

    fn weights(&self, outputs: usize, inputs: usize) -> LinearWeights<'_> {
        LinearWeights {
            quant_type: QuantType::Nf4,
            outputs,
            inputs,
            block_size: self.size,
            codes: &self.codes,
            scales: Scales::Absmax(&self.scales),
        }
    }

    /// In buffers, behind some bytes that are not theirs.
    fn weight(&self, program: &mut Program, shape: &[u64]) -> Resource<Weight> {
        let codes = program.buffer_of(&[&[9; 3][..], &self.codes].concat());
        let absmax = program.buffer_of(&[&[9; 4][..], bytemuck::cast_slice(&self.scales)].concat());
        let nf4 = types::QuantType::Nf4;
        let block = self.size.elements() as u32;
        let (codes, absmax) = (place(&codes, 3), place(&absmax, 4));
        let call = &mut program.call();
        done(call.from_codes(nf4, shape.to_vec(), block, codes, absmax))
    }
}

fn product(
    weight: &Resource<Weight>,
    x: &Resource<Buffer>,
    rows: u32,
    y: &Resource<Buffer>,
) -> Product {
    Product {
        weight: again(weight),
        input: place(x, 0),
        rows,
        float: types::Dtype::F32,
        bias: None,
        output: place(y, 0),
        experts: None,
        rounding: Rounding::Fastest,
    }
}

#[track_caller]
fn assert_close(have: &[u8], need: &[f32]) {
    let (have, _) = have.as_chunks::<4>();
    assert_eq!(have.len(), need.len());
    for (index, (have, need)) in have.iter().zip(need).enumerate() {
        let have = f32::from_le_bytes(*have);
        assert!((have - need).abs() < 1e-4, "{index}: {have} {need}");
    }
}

#[test]
fn products_are_those_of_the_kernels_in_one_piece_and_in_many() {
    // Some rows at once, one row at a time, and weights that are cut up: between blocks of every size.
    for (outputs, inputs, block_size) in [
        (33, 64, 64),
        (96, 128, 64),
        (517, 65, 32),
        (300, 257, 64),
        (4200, 9, 4096),
        (1, 40_000, 64),
    ] {
        let quantized = Quantized::new(outputs * inputs, block_size);
        let rows = 11;
        let (x, bias) = (numbers(rows * inputs, 31), numbers(outputs, 17));
        let mut y = vec![0.0; rows * outputs];
        let kernels = Kernels::detect();
        let weights = quantized.weights(outputs, inputs);
        kernels
            .linear(&weights, rows, &x, Some(&bias), &mut y, ONE)
            .unwrap();

        let mut program = Program::new(16 * MIB);
        let weight = quantized.weight(&mut program, &[outputs as u64, inputs as u64]);
        let (x, bias) = (
            program.buffer_of(&bytes_of(&x)),
            program.buffer_of(&bytes_of(&bias)),
        );
        let out = program.allocate(0, 4 * y.len() as u64);
        let given = Product {
            bias: Some(place(&bias, 0)),
            ..product(&weight, &x, rows as u32, &out)
        };
        done(program.call().multiply(vec![given]));
        done(program.call().finish());
        let what = program.bytes(&out);
        assert_close(&what, &y);
        assert_eq!(
            done(
                program
                    .call()
                    .shape(again(&weight))
                    .map_err(CallError::Trap)
            ),
            [outputs as u64, inputs as u64]
        );
    }
}

#[test]
fn experts_are_those_of_the_kernels_also_where_their_matrices_begin_inside_of_blocks() {
    for (experts, outputs, inputs) in [(5, 33, 65), (3, 70, 600), (2, 64, 64)] {
        let quantized = Quantized::new(experts * outputs * inputs, 64);
        let rows = 23;
        let x = numbers(rows * inputs, 31);
        let ids: Vec<i32> = (0..rows as i32)
            .map(|row| (row * 7) % (experts as i32 + 1))
            .collect();
        let mut y = vec![0.5; rows * outputs];
        let matrices = ExpertsMatrices::Stack {
            experts,
            weights: quantized.weights(experts * outputs, inputs),
        };
        let choices = Choices {
            of_token: 1,
            ids: &ids,
            weights: &[],
        };
        let bytes = bytemuck::cast_slice_mut(&mut y);
        let (float, x) = (FloatType::F32, bytes_of(&x));
        Kernels::detect()
            .experts_linear_bytes(&matrices, &choices, float, &x, None, bytes, ONE)
            .unwrap();

        let mut program = Program::new(16 * MIB);
        let shape = [experts, outputs, inputs].map(|length| length as u64);
        let weight = quantized.weight(&mut program, &shape);
        let x = program.buffer_of(&x);
        let ids = program.buffer_of(bytemuck::cast_slice(&ids));
        let out = program.buffer_of(&bytes_of(&vec![0.5; rows * outputs]));
        let given = Product {
            experts: Some(place(&ids, 0)),
            ..product(&weight, &x, rows as u32, &out)
        };
        done(program.call().multiply(vec![given]));
        assert_close(&program.bytes(&out), &y);
    }
}

#[test]
fn weights_of_models_are_multiplied_as_they_lie_in_every_format() {
    let directory = checkpoint();
    for double_quantized in [false, true] {
        let mut program = with_model(directory.path(), 64 * MIB);
        let open = program.open("model");
        let nf4 = Format::Nf4(Nf4Format {
            block_size: 64,
            double_quantized,
        });
        let stored = sources();
        let placements = stored.iter().map(|source| Placement {
            device: Some(0),
            format: match source.dtype {
                DType::I64 => Format::Stored,
                _ => nf4,
            },
        });
        let placements = placements.collect();
        let call = &mut program.call();
        let model = done(call.load(again(&open), placements, vec![0, 0]));
        for (number, outputs, inputs) in [(0, 517, 331), (1, 64, 1031), (3, 1031, 2049)] {
            let weight = done(program.call().of(again(&model), number));
            let values = {
                let model = program.table.get(&model).unwrap().model();
                model
                    .tensor_at(number as usize)
                    .unwrap()
                    .to_floats::<f32>()
                    .unwrap()
            };
            let x = numbers(2 * inputs, 31);
            let expected: Vec<f32> = (0..2 * outputs)
                .map(|index| {
                    let (row, output) = (index / outputs, index % outputs);
                    let x = &x[row * inputs..][..inputs];
                    let w = &values[output * inputs..][..inputs];
                    let products = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
                    products.sum::<f64>() as f32
                })
                .collect();
            let x = program.buffer_of(&bytes_of(&x));
            let y = program.allocate(0, 8 * outputs as u64);
            done(program.call().multiply(vec![product(&weight, &x, 2, &y)]));
            let bytes = program.bytes(&y);
            let (have, _) = bytes.as_chunks::<4>();
            for (have, need) in have.iter().zip(&expected) {
                let have = f32::from_le_bytes(*have);
                assert!(
                    (have - need).abs() < 1e-3 * (1.0 + need.abs()),
                    "{have} {need}"
                );
            }
        }
        assert!(matches!(
            told(program.call().of(again(&model), 2)),
            errors::Error::Unsupported(message) if message.contains("4 bits")
        ));
    }
}

#[test]
fn a_weight_keeps_what_it_is_made_of() {
    let quantized = Quantized::new(64 * 64, 64);
    let mut program = Program::new(4 * MIB);
    let codes = program.buffer_of(&quantized.codes);
    let absmax = program.buffer_of(bytemuck::cast_slice(&quantized.scales));
    let (c, a) = (place(&codes, 0), place(&absmax, 0));
    let nf4 = types::QuantType::Nf4;
    let weight = done(program.call().from_codes(nf4, vec![64, 64], 64, c, a));
    let before = program.usage().requested.now;
    program.free(codes);
    program.free(absmax);
    assert_eq!(program.usage().requested.now, before);
    let taken: Vec<_> = (0..8).map(|_| program.buffer_of(&[0xff; 4096])).collect();
    let x = program.buffer_of(&bytes_of(&numbers(64, 31)));
    let y = program.allocate(0, 256);
    done(program.call().multiply(vec![product(&weight, &x, 1, &y)]));
    let mut expected = vec![0.0; 64];
    let weights = quantized.weights(64, 64);
    Kernels::detect()
        .linear(&weights, 1, &numbers(64, 31), None, &mut expected, ONE)
        .unwrap();
    assert_close(&program.bytes(&y), &expected);
    linear::HostWeight::drop(&mut program.call(), weight).unwrap();
    let after = before - 2048 - 256 + 8 * 4096 + 2 * 256;
    assert_eq!(program.usage().requested.now, after);
    drop(taken);
}

#[test]
fn after_the_deadline_nothing_of_products_is_done() {
    let quantized = Quantized::new(64, 64);
    let mut program = Program::new(4 * MIB);
    let weight = quantized.weight(&mut program, &[1, 64]);
    let x = program.buffer_of(&[0; 256]);
    let y = program.buffer_of(&[7; 4]);
    program.context.set_deadline(Instant::now());
    let stopped = |result: Result<(), CallError>| {
        let Err(CallError::Trap(trap)) = result else {
            panic!("it did not trap: {result:?}");
        };
        assert_eq!(trap.downcast_ref::<Stopped>(), Some(&Stopped::Deadline));
    };
    let given = product(&weight, &x, 1, &y);
    let nf4 = types::QuantType::Nf4;
    let (c, a) = (place(&x, 0), place(&x, 0));
    let view = &mut program.call();
    stopped(view.multiply(vec![given]));
    stopped(view.finish());
    stopped(view.from_codes(nf4, vec![1, 64], 64, c, a).map(|_| ()));
    stopped(
        view.shape(again(&weight))
            .map(|_| ())
            .map_err(CallError::Trap),
    );
    stopped(
        linear::HostWeight::device(view, again(&weight))
            .map(|_| ())
            .map_err(CallError::Trap),
    );
    let bytes = view.scratch_bytes(again(&weight), 1);
    stopped(bytes.map(|_| ()).map_err(CallError::Trap));
    linear::HostWeight::drop(view, weight).unwrap();
}
