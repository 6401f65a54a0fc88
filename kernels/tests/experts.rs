//! Layers of experts on the processor, against f64: with every instruction set.

use std::num::NonZeroUsize;

use tightfit_kernels::{
    Activation, BlockSize, Choices, ExpertsGates, ExpertsLayer, ExpertsMatrices, ExpertsWeights,
    FloatType, GateLayout, Isa, KernelError, Kernels, LinearWeights, QuantType,
};

mod layers;

use layers::{Dice, Format, Layer, Near, Stack, assert_near, losses};

const ACTIVATIONS: [Activation; 4] = [
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Clamped { limit: 2.0 },
];
const LAYOUTS: [GateLayout; 2] = [GateLayout::Halves, GateLayout::Interleaved];

fn all() -> impl Iterator<Item = Kernels> {
    Isa::available().map(|isa| Kernels::new(isa).expect("available"))
}

fn threads(n: usize) -> NonZeroUsize {
    NonZeroUsize::new(n).expect("not 0")
}

fn elements(values: &[f32], float: FloatType) -> Vec<u8> {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut out = vec![0; values.len() * float.bytes()];
    Kernels::detect()
        .cast(&bytes, FloatType::F32, float, &mut out)
        .expect("lengths");
    out
}

fn floats(bytes: &[u8], float: FloatType) -> Vec<f32> {
    let mut out = vec![0; bytes.len() / float.bytes() * 4];
    Kernels::detect()
        .cast(bytes, float, FloatType::F32, &mut out)
        .expect("lengths");
    let (floats, _) = out.as_chunks::<4>();
    floats
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect()
}

/// Values that the type has, with their bytes.
fn of_type(values: Vec<f32>, float: FloatType) -> (Vec<f32>, Vec<u8>) {
    let bytes = elements(&values, float);
    (floats(&bytes, float), bytes)
}

/// A layer with what it is given.
struct Case {
    layer: Layer,
    float: FloatType,
    of_token: usize,
    ids: Vec<i32>,
    weights: Vec<f32>,
    x: (Vec<f32>, Vec<u8>),
    biases: Option<[Vec<u8>; 2]>,
}

impl Case {
    fn random(
        mut layer: Layer,
        float: FloatType,
        [tokens, of_token]: [usize; 2],
        biased: bool,
        dice: &mut Dice,
    ) -> Case {
        let (experts, hidden) = (layer.gate_up.experts, layer.gate_up.inputs);
        let biases = biased.then(|| {
            [&mut layer.gate_up, &mut layer.down].map(|stack| {
                let count = stack.experts * stack.outputs;
                let (values, bytes) = of_type(dice.weights(count, 1.0), float);
                stack.bias = Some(values);
                bytes
            })
        });
        Case {
            float,
            of_token,
            ids: dice.ids(tokens * of_token, experts),
            weights: dice.weights(tokens * of_token, 1.0),
            x: of_type(dice.weights(tokens * hidden, 1.0), float),
            layer,
            biases,
        }
    }

    fn run(&self, kernels: Kernels, tokens: &[usize], count: usize) -> Vec<u8> {
        let row = self.layer.gate_up.inputs * self.float.bytes();
        let of_tokens = |token: &usize| token * self.of_token..(token + 1) * self.of_token;
        let ids: Vec<i32> = tokens
            .iter()
            .flat_map(of_tokens)
            .map(|i| self.ids[i])
            .collect();
        let weights: Vec<f32> = tokens
            .iter()
            .flat_map(of_tokens)
            .map(|i| self.weights[i])
            .collect();
        let x: Vec<u8> = tokens
            .iter()
            .flat_map(|token| &self.x.1[token * row..(token + 1) * row])
            .copied()
            .collect();
        let mut y = vec![0xee; x.len()];
        let choices = Choices {
            of_token: self.of_token,
            ids: &ids,
            weights: &weights,
        };
        let [gate_up_bias, down_bias] = match &self.biases {
            Some([gate_up, down]) => [Some(&gate_up[..]), Some(&down[..])],
            None => [None, None],
        };
        kernels
            .experts_bytes(
                &self.layer.view(),
                &choices,
                self.float,
                &x,
                gate_up_bias,
                down_bias,
                &mut y,
                threads(count),
            )
            .expect("lengths");
        y
    }

    fn tokens(&self) -> usize {
        self.x.0.len() / self.layer.gate_up.inputs.max(1)
    }

    fn check(&self, what: &str) {
        let layer = &self.layer;
        let need = layer.expected(self.float, &self.x.0, &self.ids, &self.weights);
        let tokens: Vec<usize> = (0..self.tokens()).collect();
        for kernels in all() {
            for count in [1, 3] {
                let y = floats(&self.run(kernels, &tokens, count), self.float);
                let what = format!(
                    "{}, {}, {what}, {:?}, {:?}, {count} threads",
                    kernels.isa(),
                    self.float,
                    layer.layout,
                    layer.activation
                );
                assert_near(&y, &need, self.float, &what);
            }
        }
    }
}

#[test]
fn every_activation_and_layout() {
    let mut dice = Dice(1);
    for activation in ACTIVATIONS {
        for layout in LAYOUTS {
            for float in FloatType::ALL {
                let layer = Layer::random(Format::NF4, [4, 128, 64], layout, activation, &mut dice);
                let biased = layout == GateLayout::Interleaved;
                Case::random(layer, float, [5, 3], biased, &mut dice).check("4 experts");
            }
        }
    }
}

#[test]
fn every_format_and_number_of_choices() {
    let mut dice = Dice(2);
    let mut of_token = 0;
    for quant_type in [QuantType::Nf4, QuantType::Fp4] {
        for block_size in BlockSize::ALL {
            for double in [false, true] {
                let format = Format {
                    quant_type,
                    block_size: block_size.elements(),
                    double,
                };
                of_token = of_token % 8 + 1;
                for float in FloatType::ALL {
                    let [layout, _] = LAYOUTS;
                    let lengths = [3, 64, 192];
                    let layer = Layer::random(format, lengths, layout, Activation::Silu, &mut dice);
                    let case = Case::random(layer, float, [4, of_token], double, &mut dice);
                    case.check(&format!("{format:?}, {of_token} choices"));
                }
            }
        }
    }
}

/// Slices of experts that begin in the middle of blocks and bytes, and no tokens, choices or lengths.
#[test]
fn odd_lengths() {
    let mut dice = Dice(3);
    for (lengths, tokens) in [
        ([3, 5, 7], [4, 2]),
        ([5, 33, 9], [2, 8]),
        ([2, 1, 1], [3, 1]),
        ([1, 2112, 3], [2, 1]),
        ([7, 65, 130], [1, 4]),
        ([3, 64, 64], [0, 2]),
        ([3, 64, 64], [4, 0]),
        ([3, 64, 0], [4, 2]),
        ([3, 0, 64], [0, 2]),
    ] {
        for layout in LAYOUTS {
            for float in FloatType::ALL {
                let clamped = Activation::Clamped { limit: 7.0 };
                let layer = Layer::random(Format::NF4, lengths, layout, clamped, &mut dice);
                let case = Case::random(layer, float, tokens, true, &mut dice);
                case.check(&format!("{lengths:?}, {tokens:?}"));
            }
        }
    }
}

/// A token's result is the same bits alone, among others and in another order, on any number of threads.
#[test]
fn tokens_by_themselves() {
    let mut dice = Dice(4);
    for (lengths, float) in [
        ([4, 320, 192], FloatType::Bf16),
        ([4, 99, 31], FloatType::Bf16),
        ([4, 128, 64], FloatType::F16),
        ([4, 2112, 40], FloatType::F32),
    ] {
        let layer = Layer::random(
            Format::NF4,
            lengths,
            GateLayout::Halves,
            Activation::Silu,
            &mut dice,
        );
        let case = Case::random(layer, float, [13, 3], true, &mut dice);
        let row = lengths[1] * float.bytes();
        for kernels in all() {
            let whole = case.run(kernels, &(0..13).collect::<Vec<_>>(), 1);
            for count in [1, 2, 5, 13] {
                let tokens: Vec<usize> = (0..count).map(|i| (i * 5 + count) % 13).collect();
                let y = case.run(kernels, &tokens, count);
                for (y, token) in y.chunks_exact(row).zip(&tokens) {
                    assert!(
                        *y == whole[token * row..(token + 1) * row],
                        "{}, {float}, {lengths:?}: token {token} among {count}",
                        kernels.isa()
                    );
                }
            }
        }
    }
}

/// More tokens than are in memory at a time.
#[test]
fn many_tokens() {
    let mut dice = Dice(5);
    let [layout, _] = LAYOUTS;
    let layer = Layer::random(Format::NF4, [2, 8, 4], layout, Activation::Gelu, &mut dice);
    let case = Case::random(layer, FloatType::Bf16, [2500, 2], true, &mut dice);
    case.check("2500 tokens");
}

#[test]
fn products_without_activation() {
    let mut dice = Dice(6);
    for (lengths, float) in [
        ([3, 20, 128], FloatType::Bf16),
        ([3, 7, 33], FloatType::F32),
    ] {
        let [experts, outputs, inputs] = lengths;
        let (tokens, of_token) = (6, 2);
        let mut stack = Stack::random(Format::NF4, lengths, &mut dice);
        let (bias, _) = of_type(dice.weights(experts * outputs, 1.0), float);
        stack.bias = Some(bias);
        let mut ids = dice.ids(tokens * of_token, experts);
        ids[3] = -1;
        let (x, _) = of_type(dice.weights(tokens * inputs, 1.0), float);
        for kernels in all() {
            let y = match float {
                FloatType::F32 => product(kernels, &stack, &ids, &x),
                _ => {
                    let narrow = |x: &[f32]| -> Vec<tightfit_kernels::half::bf16> {
                        x.iter()
                            .map(|x| tightfit_kernels::half::bf16::from_f32(*x))
                            .collect()
                    };
                    let y = product_of(
                        kernels,
                        &stack,
                        &ids,
                        &narrow(&x),
                        &narrow(stack.bias.as_deref().expect("biased")),
                        tightfit_kernels::half::bf16::from_f32(UNTOUCHED),
                    );
                    y.iter().map(|y| y.to_f32()).collect()
                }
            };
            let (of_result, of_product) = losses(float);
            for (pair, id) in ids.iter().enumerate() {
                let y = &y[pair * outputs..][..outputs];
                if !(0..experts as i32).contains(id) {
                    assert!(y.iter().all(|y| *y == UNTOUCHED), "pair {pair}");
                    continue;
                }
                let x: Vec<Near> = x[pair / of_token * inputs..][..inputs]
                    .iter()
                    .map(|x| Near::exactly(*x))
                    .collect();
                let mut need = stack.product(*id as usize, &x, of_product);
                for need in &mut need {
                    need.by += of_result * need.value.abs() + 1e-6;
                }
                let what = format!("{}, {float}, pair {pair}", kernels.isa());
                assert_near(y, &need, float, &what);
            }
        }
    }
}

const UNTOUCHED: f32 = -77.0;

fn product(kernels: Kernels, stack: &Stack, ids: &[i32], x: &[f32]) -> Vec<f32> {
    let bias = stack.bias.as_deref().expect("biased");
    product_of(kernels, stack, ids, x, bias, UNTOUCHED)
}

fn product_of<T: tightfit_kernels::Float>(
    kernels: Kernels,
    stack: &Stack,
    ids: &[i32],
    x: &[T],
    bias: &[T],
    untouched: T,
) -> Vec<T> {
    let choices = Choices {
        of_token: 2,
        ids,
        weights: &[],
    };
    let mut y = vec![untouched; ids.len() * stack.outputs];
    let (experts, view) = (stack.experts, stack.view());
    kernels
        .experts_linear(&view, experts, &choices, x, Some(bias), &mut y, threads(2))
        .expect("lengths");
    y
}

#[test]
fn lengths_that_do_not_belong_together() {
    let mut dice = Dice(7);
    let layer = Layer::random(
        Format::NF4,
        [3, 64, 32],
        GateLayout::Halves,
        Activation::Silu,
        &mut dice,
    );
    let run = |layer: ExpertsWeights<'_>, lengths: [usize; 6]| {
        let [ids, weights, x, gate_up_bias, down_bias, y] = lengths;
        let choices = Choices {
            of_token: 2,
            ids: &vec![0; ids],
            weights: &vec![0.0; weights],
        };
        Kernels::detect().experts(
            &layer,
            &choices,
            &vec![0f32; x],
            Some(&vec![0f32; gate_up_bias]),
            Some(&vec![0f32; down_bias]),
            &mut vec![0f32; y],
            threads(1),
        )
    };
    let wrong = |what, need, have| Err(KernelError::Length { what, need, have });
    let right = [4, 4, 128, 192, 192, 128];
    let with = |i: usize, length| {
        let mut lengths = right;
        lengths[i] = length;
        run(layer.view(), lengths)
    };
    assert_eq!(run(layer.view(), right), Ok(()));
    assert_eq!(with(0, 5), wrong("ids", 4, 5));
    assert_eq!(with(0, 6), wrong("x", 768, 512));
    assert_eq!(with(1, 3), wrong("weights", 4, 3));
    assert_eq!(with(2, 129), wrong("x", 512, 516));
    assert_eq!(with(3, 191), wrong("gate_up_bias", 768, 764));
    assert_eq!(with(4, 0), wrong("down_bias", 768, 0));
    assert_eq!(with(5, 127), wrong("y", 512, 508));
    let four = ExpertsWeights {
        experts: 4,
        ..layer.view()
    };
    assert_eq!(run(four, right), wrong("gate_up", 256, 192));
    let short = ExpertsWeights {
        down: LinearWeights {
            outputs: 128,
            codes: &layer.down.codes[..2048],
            ..layer.view().down
        },
        ..layer.view()
    };
    assert_eq!(run(short, right), wrong("absmax", 64, 96));
    let other = ExpertsWeights {
        gate_up: layer.view().down,
        ..layer.view()
    };
    assert_eq!(run(other, right), wrong("down", 96, 192));
}

/// One matrix of a stack, quantized by itself: it begins with a block and, with double quantization, with a
/// nested scale.
fn matrix(stack: &Stack, expert: usize, rows: std::ops::Range<usize>) -> Stack {
    let block = stack.format.block_size;
    let first = (expert * stack.outputs + rows.start) * stack.inputs;
    let count = rows.len() * stack.inputs;
    assert!(first.is_multiple_of(256 * block) && count.is_multiple_of(256 * block));
    let scales = first / block..(first + count) / block;
    Stack {
        format: stack.format,
        experts: 1,
        outputs: rows.len(),
        inputs: stack.inputs,
        codes: stack.codes[first / 2..(first + count) / 2].to_vec(),
        absmax: stack.absmax[scales.clone()].to_vec(),
        nested: stack.nested.as_ref().map(|(codes, nested)| {
            let of_nested = scales.start / 256..scales.end / 256;
            (codes[scales.clone()].to_vec(), nested[of_nested].to_vec())
        }),
        apart: 0,
        bias: None,
    }
}

/// Experts that are apart give the bits of those in stacks.
#[test]
fn experts_apart() {
    let mut dice = Dice(11);
    for double in [false, true] {
        let format = Format {
            block_size: 32,
            double,
            ..Format::NF4
        };
        let (experts, hidden, intermediate) = (5, 128, 64);
        let sizes = [experts, hidden, intermediate];
        let layer = Layer::random(
            format,
            sizes,
            GateLayout::Halves,
            Activation::Silu,
            &mut dice,
        );
        let case = Case::random(layer, FloatType::Bf16, [9, 3], true, &mut dice);
        let layer = &case.layer;
        let of = |stack: &Stack, rows: std::ops::Range<usize>| -> Vec<Stack> {
            (0..experts)
                .map(|expert| matrix(stack, expert, rows.clone()))
                .collect()
        };
        let gates = of(&layer.gate_up, 0..intermediate);
        let ups = of(&layer.gate_up, intermediate..2 * intermediate);
        let both = of(&layer.gate_up, 0..2 * intermediate);
        let downs = of(&layer.down, 0..hidden);
        let [gates, ups, both, downs] = [&gates, &ups, &both, &downs]
            .map(|stacks| stacks.iter().map(Stack::view).collect::<Vec<_>>());
        let choices = Choices {
            of_token: case.of_token,
            ids: &case.ids,
            weights: &case.weights,
        };
        let Some([gate_up_bias, down_bias]) = &case.biases else {
            panic!("it is biased");
        };
        let run = |kernels: Kernels, gates: ExpertsGates<'_>| {
            let layer = ExpertsLayer {
                gates,
                down: ExpertsMatrices::Each(&downs),
                activation: layer.activation,
            };
            let mut y = vec![0xee; case.x.1.len()];
            kernels
                .experts_layer_bytes(
                    &layer,
                    &choices,
                    case.float,
                    &case.x.1,
                    Some(gate_up_bias),
                    Some(down_bias),
                    &mut y,
                    threads(2),
                )
                .map(|()| y)
        };
        let apart = ExpertsGates::Apart {
            gate: ExpertsMatrices::Each(&gates),
            up: ExpertsMatrices::Each(&ups),
        };
        let together = ExpertsGates::Together(ExpertsMatrices::Each(&both), GateLayout::Halves);
        let tokens: Vec<usize> = (0..case.tokens()).collect();
        for kernels in all() {
            let need = case.run(kernels, &tokens, 2);
            assert!(
                run(kernels, apart).as_ref() == Ok(&need),
                "{}",
                kernels.isa()
            );
            assert!(
                run(kernels, together).as_ref() == Ok(&need),
                "{}",
                kernels.isa()
            );
        }
        let fewer = ExpertsGates::Apart {
            gate: ExpertsMatrices::Each(&gates[1..]),
            up: ExpertsMatrices::Each(&ups),
        };
        let error = KernelError::Length {
            what: "gate",
            need: 5,
            have: 4,
        };
        assert_eq!(run(Kernels::detect(), fewer), Err(error));
    }
}
