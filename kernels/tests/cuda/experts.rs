//! Layers of experts, against f64.

use tightfit_kernels::cuda::{
    experts::{ExpertsProduct, Form, Quantized, Routing, RowsOfX},
    linear::Gpu,
};
use tightfit_kernels::{Activation, BlockSize, FloatType, GateLayout, QuantType};

use crate::device::Device;
use crate::expert_calls::{Case, Memory, Product, route, values_of};
use crate::layers::{Dice, Format, Layer, Near, Stack, assert_near, losses};
use crate::linear::UNWRITTEN;
use crate::values::elements;

const SILU: Activation = Activation::Silu;

/// Every activation, layout and tile, with tiles of one and of several shares.
pub(crate) fn layers_of_experts(device: &mut dyn Device) {
    let mut dice = Dice(1);
    // One workspace for all of them: each has to leave it as it needs it itself.
    let mut memory = Memory::default();
    let clamped = Activation::Clamped { limit: 2.0 };
    let halves = GateLayout::Halves;
    for (lengths, tokens, layout, activation, multiprocessors) in [
        // One token, and tiles of 8, 16 and 64 rows.
        ([6, 576, 320], [1, 4], GateLayout::Interleaved, clamped, 9),
        ([6, 320, 192], [1, 1], halves, SILU, 3),
        ([5, 320, 192], [4, 3], halves, Activation::Gelu, 2),
        ([4, 256, 128], [9, 4], GateLayout::Interleaved, SILU, 40),
        ([3, 192, 64], [40, 2], halves, Activation::GeluTanh, 1),
        ([2, 384, 320], [19, 2], GateLayout::Interleaved, clamped, 7),
        // Segments of two slices.
        ([2, 64, 2304], [2, 1], halves, SILU, 20),
    ] {
        for float in [FloatType::Bf16, FloatType::F16] {
            let layer = Layer::random(Format::NF4, lengths, layout, activation, &mut dice);
            let biased = float == FloatType::Bf16;
            let case = Case {
                multiprocessors,
                ..Case::random(layer, float, tokens, biased, &mut dice)
            };
            case.check(device, &mut memory);
        }
    }
}

pub(crate) fn every_format(device: &mut dyn Device) {
    let mut dice = Dice(2);
    let mut memory = Memory::default();
    for quant_type in [QuantType::Nf4, QuantType::Fp4] {
        for block_size in BlockSize::ALL {
            for double in [false, true] {
                let format = Format {
                    quant_type,
                    block_size: block_size.elements(),
                    double,
                };
                for (float, hidden) in [
                    (FloatType::Bf16, 256),
                    (FloatType::Bf16, 192),
                    (FloatType::F32, 64),
                ] {
                    let lengths = [3, hidden, 64];
                    let layer = Layer::random(format, lengths, GateLayout::Halves, SILU, &mut dice);
                    let case = Case::random(layer, float, [3, 2], double, &mut dice);
                    case.check(device, &mut memory);
                }
            }
        }
    }
    // Scales that come as vectors of 8 and of 4 granules, in tiles of more rows.
    for (hidden, tokens, double) in [
        (512, 9, true),
        (768, 9, true),
        (512, 40, true),
        (768, 40, false),
    ] {
        let format = Format {
            double,
            ..Format::NF4
        };
        let lengths = [2, hidden, 64];
        let layer = Layer::random(format, lengths, GateLayout::Halves, SILU, &mut dice);
        Case::random(layer, FloatType::Bf16, [tokens, 1], true, &mut dice)
            .check(device, &mut memory);
    }
}

/// Tensors of their own, each with its mean and nested scales, of which some do not end at 256 bytes.
pub(crate) fn experts_that_are_quantized_apart(device: &mut dyn Device) {
    let mut dice = Dice(8);
    let mut memory = Memory::default();
    let double = Format {
        double: true,
        ..Format::NF4
    };
    for (block_size, lengths, tokens, float, old) in [
        // One token, and tiles of 8, 16 and 64 rows; scales as vectors of 8 and of 4.
        (64, [5, 512, 96], [1, 4], FloatType::Bf16, false),
        (64, [4, 512, 128], [6, 2], FloatType::F16, false),
        (64, [3, 256, 320], [20, 2], FloatType::Bf16, false),
        (64, [2, 768, 64], [40, 2], FloatType::Bf16, false),
        // Rows of other lengths, other blocks, and the general kernels.
        (64, [3, 320, 256], [5, 2], FloatType::Bf16, false),
        (128, [3, 256, 256], [9, 2], FloatType::Bf16, false),
        (64, [3, 512, 64], [7, 2], FloatType::F32, false),
        (64, [3, 512, 64], [1, 3], FloatType::Bf16, true),
        // Nested scales of more than 256 bytes.
        (64, [2, 2304, 512], [3, 1], FloatType::Bf16, false),
    ] {
        let format = Format {
            block_size,
            ..double
        };
        let layout = GateLayout::Halves;
        let mut layer = Layer::random(format, lengths, layout, SILU, &mut dice);
        layer.gate_up.quantize_apart(2);
        layer.down.quantize_apart(1);
        let case = Case {
            multiprocessors: 3,
            old,
            ..Case::random(layer, float, tokens, true, &mut dice)
        };
        case.check(device, &mut memory);
    }
}

/// Slices of experts that begin in the middle of blocks and bytes, and old GPUs.
pub(crate) fn whatever_lengths_and_alignments(device: &mut dyn Device) {
    let mut dice = Dice(3);
    let mut memory = Memory::default();
    for float in FloatType::ALL {
        for (lengths, tokens) in [
            ([3, 5, 7], [4, 2]),
            ([5, 33, 9], [2, 8]),
            ([2, 1, 1], [3, 1]),
            ([3, 65, 130], [1, 4]),
            ([2, 127, 3], [20, 1]),
            ([3, 64, 64], [0, 2]),
            ([0, 64, 64], [2, 2]),
            ([3, 64, 0], [2, 2]),
            // Routing threads have several experts each.
            ([2500, 2, 1], [700, 8]),
        ] {
            for layout in [GateLayout::Halves, GateLayout::Interleaved] {
                let clamped = Activation::Clamped { limit: 7.0 };
                let layer = Layer::random(Format::NF4, lengths, layout, clamped, &mut dice);
                Case::random(layer, float, tokens, true, &mut dice).check(device, &mut memory);
            }
        }
        for (aligned, old) in [(false, false), (true, true)] {
            let lengths = [3, 64, 128];
            let layer = Layer::random(Format::NF4, lengths, GateLayout::Halves, SILU, &mut dice);
            let case = Case {
                aligned,
                old,
                ..Case::random(layer, float, [11, 2], false, &mut dice)
            };
            case.check(device, &mut memory);
        }
    }
}

/// The same launches with other ids, as a graph has them: right, and nothing was cleared in between.
pub(crate) fn replays_with_other_ids(device: &mut dyn Device) {
    let mut dice = Dice(4);
    // Tiles of 8, 16 and 64 rows, of which an expert that everyone chooses has more than one.
    for tokens in [1, 7, 20, 40] {
        let mut memory = Memory::default();
        let lengths = [4, 320, 64];
        let layer = Layer::random(Format::NF4, lengths, GateLayout::Halves, SILU, &mut dice);
        let case = Case {
            multiprocessors: 5,
            ..Case::random(layer, FloatType::Bf16, [tokens, 2], true, &mut dice)
        };
        let launches = case.launches(device, tokens);
        let pairs = tokens * 2;
        for ids in [
            dice.ids(pairs, 4),
            // All the same expert, none, all of them in turn, and others.
            vec![3; pairs],
            vec![-1; pairs],
            (0..pairs as i32).map(|i| i % 4).collect(),
            dice.ids(pairs, 4),
        ] {
            let y = case.run(device, &launches, &case.x, &ids, &case.weights, &mut memory);
            memory.check(&case.what());
            case.compare(&y, &ids);
        }
    }
}

/// A token's result is the same bits alone, among others, in another order, in tiles of every size and
/// however the work is dealt out.
pub(crate) fn tokens_by_themselves(device: &mut dyn Device) {
    let mut dice = Dice(5);
    for (lengths, float) in [
        ([3, 576, 320], FloatType::Bf16),
        ([3, 128, 64], FloatType::F16),
        ([3, 45, 31], FloatType::Bf16),
    ] {
        let layer = Layer::random(
            Format::NF4,
            lengths,
            GateLayout::Interleaved,
            SILU,
            &mut dice,
        );
        let all = 33;
        let mut case = Case::random(layer, float, [all, 2], true, &mut dice);
        let row = lengths[1] * float.bytes();
        let mut memory = Memory::default();
        let mut run = |tokens: &[usize], multiprocessors| {
            case.multiprocessors = multiprocessors;
            let of_tokens = |token: &usize| token * 2..(token + 1) * 2;
            let pairs: Vec<usize> = tokens.iter().flat_map(of_tokens).collect();
            let ids: Vec<i32> = pairs.iter().map(|i| case.ids[*i]).collect();
            let weights: Vec<f32> = pairs.iter().map(|i| case.weights[*i]).collect();
            let rows = tokens
                .iter()
                .map(|token| &case.x[token * row..(token + 1) * row]);
            let x = rows.flatten().copied().collect::<Vec<u8>>();
            let launches = case.launches(device, tokens.len());
            case.run(device, &launches, &x, &ids, &weights, &mut memory)
        };
        let whole = run(&(0..all).collect::<Vec<_>>(), 1);
        for (count, multiprocessors) in [(1, 30), (1, 2), (5, 1), (15, 10), (32, 50)] {
            let tokens: Vec<usize> = (0..count).map(|i| (i * 7 + count) % all).collect();
            let y = run(&tokens, multiprocessors);
            for (y, token) in y.chunks_exact(row).zip(&tokens) {
                assert!(
                    *y == whole[token * row..(token + 1) * row],
                    "{float}, {lengths:?}: token {token} among {count}"
                );
            }
        }
    }
}

pub(crate) fn products_without_activation(device: &mut dyn Device) {
    let mut dice = Dice(6);
    let mut memory = Memory::default();
    for (lengths, tokens, x_of, float) in [
        ([3, 200, 320], 6, RowsOfX::Tokens, FloatType::Bf16),
        ([3, 24, 64], 20, RowsOfX::Pairs, FloatType::F16),
        ([3, 7, 33], 5, RowsOfX::Pairs, FloatType::F32),
    ] {
        let [experts, outputs, inputs] = lengths;
        let choices = 2;
        let mut stack = Stack::random(Format::NF4, lengths, &mut dice);
        let bias = elements(&dice.weights(experts * outputs, 1.0), float);
        stack.bias = Some(values_of(&bias, float));
        let mut ids = dice.ids(tokens * choices, experts);
        ids[3] = experts as i32;
        let pairs_of_row = match x_of {
            RowsOfX::Tokens => choices,
            RowsOfX::Pairs => 1,
        };
        let rows = ids.len() / pairs_of_row;
        let x = elements(&dice.weights(rows * inputs, 1.0), float);
        let routing = Routing {
            tokens,
            choices,
            experts,
        };
        let product = ExpertsProduct {
            routing,
            float,
            x: x_of,
            results: outputs,
            inputs,
            block_size: BlockSize::DEFAULT,
            form: Form::Plain,
            quantized: Quantized::Whole,
            aligned: true,
            follows: false,
        };
        let gpu = Gpu {
            compute_capability: device.compute_capability(),
            multiprocessors: 4,
        };
        let launch = product.launch(gpu).expect("not too much");
        memory.grow(routing.bytes(), launch.workspace_bytes);
        route(
            device,
            routing.launch().expect("not too much"),
            routing,
            &ids,
            &mut memory,
        );
        let size = float.bytes();
        let mut y = vec![UNWRITTEN; ids.len() * outputs * size];
        let call = Product {
            launch,
            stack: &stack,
            float,
            aligned: true,
            routing,
            pairs_of_row,
            x: &x,
            ids: &ids,
        };
        call.run(device, &mut y, size, &mut memory);
        memory.check("a product");
        let x = values_of(&x, float);
        let (of_result, of_product) = losses(float);
        for (pair, id) in ids.iter().enumerate() {
            let y = &y[pair * outputs * size..][..outputs * size];
            if !(0..experts as i32).contains(id) {
                assert!(y.iter().all(|byte| *byte == UNWRITTEN), "pair {pair}");
                continue;
            }
            let x: Vec<Near> = x[pair / pairs_of_row * inputs..][..inputs]
                .iter()
                .map(|x| Near::exactly(*x))
                .collect();
            let mut need = stack.product(*id as usize, &x, of_product);
            for need in &mut need {
                need.by += of_result * need.value.abs() + 1e-6;
            }
            let what = format!("{float}, {lengths:?}, pair {pair}");
            assert_near(&values_of(y, float), &need, float, &what);
        }
    }
}

/// An infinite scale spoils what is computed with it, and nothing beside it.
pub(crate) fn huge_blocks_stay_in_their_rows(device: &mut dyn Device) {
    let mut dice = Dice(7);
    let mut memory = Memory::default();
    for inputs in [256, 100] {
        let mut stack = Stack::random(Format::NF4, [2, 140, inputs], &mut dice);
        stack.absmax.fill(1.0);
        // Of the second expert, whose first output begins in this block or within it.
        stack.absmax[140 * inputs / 64] = f32::INFINITY;
        let routing = Routing {
            tokens: 3,
            choices: 1,
            experts: 2,
        };
        let product = ExpertsProduct {
            routing,
            float: FloatType::Bf16,
            x: RowsOfX::Tokens,
            results: 140,
            inputs,
            block_size: BlockSize::DEFAULT,
            form: Form::Plain,
            quantized: Quantized::Whole,
            aligned: true,
            follows: false,
        };
        let gpu = Gpu {
            compute_capability: device.compute_capability(),
            multiprocessors: 3,
        };
        let launch = product.launch(gpu).expect("not too much");
        let ids = [0, 1, 0];
        memory.grow(routing.bytes(), launch.workspace_bytes);
        let routes = routing.launch().expect("not too much");
        route(device, routes, routing, &ids, &mut memory);
        let x = elements(&dice.weights(3 * inputs, 1.0), FloatType::Bf16);
        let mut y = vec![UNWRITTEN; 3 * 140 * 2];
        let call = Product {
            launch,
            stack: &stack,
            float: FloatType::Bf16,
            aligned: true,
            routing,
            pairs_of_row: 1,
            x: &x,
            ids: &ids,
        };
        call.run(device, &mut y, 2, &mut memory);
        let spoiled: Vec<usize> = values_of(&y, FloatType::Bf16)
            .iter()
            .enumerate()
            .filter(|(_, y)| !y.is_finite())
            .map(|(i, _)| i)
            .collect();
        // Where the block begins before the expert, it has the end of the first one's last output, too.
        let need: &[usize] = match inputs {
            256 => &[140],
            _ => &[139, 140, 419],
        };
        assert_eq!(spoiled, need, "{inputs} inputs");
    }
}
