//! Random layers of experts, and what they compute in f64.

// Each test that has this module uses a part of it.
#![allow(dead_code)]

use tightfit_kernels::{
    Activation, BlockSize, DYNAMIC_MAP, ExpertsWeights, FloatType, GateLayout, LinearWeights,
    NESTED_BLOCK_SIZE, QuantType, Scales, blocks, code_values, packed_bytes,
};

/// xorshift64*: the same values on every machine.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() >> 33) as usize % end
    }

    /// Roughly normal, times `scale`.
    pub(crate) fn weight(&mut self, scale: f32) -> f32 {
        let sum: f32 = (0..6)
            .map(|_| (self.next() >> 40) as f32 / (1 << 24) as f32 - 0.5)
            .sum();
        sum * scale
    }

    pub(crate) fn weights(&mut self, count: usize, scale: f32) -> Vec<f32> {
        (0..count).map(|_| self.weight(scale)).collect()
    }

    /// Ids of which some are no number of an expert; the first expert is chosen more often.
    pub(crate) fn ids(&mut self, count: usize, experts: usize) -> Vec<i32> {
        let wrong = [-1, experts as i32, i32::MIN, i32::MAX];
        (0..count)
            .map(|_| match self.below(9) {
                0 => wrong[self.below(4)],
                1 | 2 => 0,
                _ => self.below(experts.max(1)) as i32,
            })
            .collect()
    }
}

/// How the tests' weights are quantized.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Format {
    pub(crate) quant_type: QuantType,
    pub(crate) block_size: usize,
    pub(crate) double: bool,
}

impl Format {
    pub(crate) const NF4: Format = Format {
        quant_type: QuantType::Nf4,
        block_size: 64,
        double: false,
    };

    pub(crate) fn block_size(&self) -> BlockSize {
        BlockSize::new(self.block_size).expect("valid")
    }
}

/// What absmax values are offset by with double quantization.
pub(crate) const OFFSET: f32 = 0.1;

/// That of a tensor of a stack.
fn mean(tensor: usize) -> f32 {
    OFFSET + 0.03 * tensor as f32
}

/// W [experts, outputs, inputs] and its bias.
pub(crate) struct Stack {
    pub(crate) format: Format,
    pub(crate) experts: usize,
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    pub(crate) codes: Vec<u8>,
    pub(crate) absmax: Vec<f32>,
    /// Of the absmax values, if they are double-quantized.
    pub(crate) nested: Option<(Vec<u8>, Vec<f32>)>,
    /// Tensors of each expert that have been quantized by themselves, and have a mean each; 0 if all is one.
    pub(crate) apart: usize,
    /// Values of the type of x.
    pub(crate) bias: Option<Vec<f32>>,
}

impl Stack {
    pub(crate) fn random(
        format: Format,
        [experts, outputs, inputs]: [usize; 3],
        dice: &mut Dice,
    ) -> Stack {
        let n = experts * outputs * inputs;
        let count = blocks(n, format.block_size());
        let codes = (0..packed_bytes(n)).map(|_| dice.next() as u8).collect();
        // Some blocks are all zeros, some are larger than others.
        let mut absmax: Vec<f32> = (0..count)
            .map(|i| match i % 17 {
                3 => 0.0,
                9 => 1.0,
                _ => dice.weight(0.3).abs(),
            })
            .collect();
        let nested = format.double.then(|| {
            let codes: Vec<u8> = (0..count).map(|_| dice.next() as u8).collect();
            let nested: Vec<f32> = (0..count.div_ceil(NESTED_BLOCK_SIZE))
                .map(|_| dice.weight(0.3).abs())
                .collect();
            for (i, absmax) in absmax.iter_mut().enumerate() {
                let value = DYNAMIC_MAP[usize::from(codes[i])];
                *absmax = value * nested[i / NESTED_BLOCK_SIZE] + OFFSET;
            }
            (codes, nested)
        });
        Stack {
            format,
            experts,
            outputs,
            inputs,
            codes,
            absmax,
            nested,
            apart: 0,
            bias: None,
        }
    }

    /// Makes each expert so many tensors.
    pub(crate) fn quantize_apart(&mut self, tensors: usize) {
        self.apart = tensors;
        let Some((codes, nested)) = &self.nested else {
            return;
        };
        let of_tensor = self.absmax.len() / (self.experts * tensors).max(1);
        assert!(of_tensor.is_multiple_of(NESTED_BLOCK_SIZE));
        for (i, absmax) in self.absmax.iter_mut().enumerate() {
            let value = DYNAMIC_MAP[usize::from(codes[i])];
            *absmax = value * nested[i / NESTED_BLOCK_SIZE] + mean(i / of_tensor);
        }
    }

    /// The means, and the nested scales, as kernels take them.
    pub(crate) fn means_and_nested(&self) -> (Vec<f32>, Vec<f32>) {
        let nested = match &self.nested {
            Some((_, nested)) => nested.clone(),
            None => vec![],
        };
        let tensors = self.experts * self.apart;
        if tensors == 0 {
            return (vec![OFFSET], nested);
        }
        let means = (0..tensors).flat_map(|tensor| [mean(tensor), f32::NAN, f32::NAN, f32::NAN]);
        let mut padded = vec![];
        for nested in nested.chunks(nested.len() / tensors) {
            padded.extend_from_slice(nested);
            padded.resize(padded.len().next_multiple_of(64), f32::NAN);
        }
        (means.collect(), padded)
    }

    pub(crate) fn view(&self) -> LinearWeights<'_> {
        LinearWeights {
            quant_type: self.format.quant_type,
            outputs: self.experts * self.outputs,
            inputs: self.inputs,
            block_size: self.format.block_size(),
            codes: &self.codes,
            scales: match &self.nested {
                None => Scales::Absmax(&self.absmax),
                Some((codes, nested)) => Scales::Double {
                    codes,
                    nested_absmax: nested,
                    absmax_mean: OFFSET,
                    map: &DYNAMIC_MAP,
                },
            },
        }
    }

    fn at(&self, expert: usize, output: usize, input: usize) -> f64 {
        let i = (expert * self.outputs + output) * self.inputs + input;
        let byte = self.codes[i / 2];
        let code = if i.is_multiple_of(2) {
            byte >> 4
        } else {
            byte & 15
        };
        let value = code_values(self.format.quant_type)[usize::from(code)];
        f64::from(value) * f64::from(self.absmax[i / self.format.block_size])
    }

    /// An expert's product with a row and what it may differ by, given what the row may differ by and
    /// how much each product may lose.
    pub(crate) fn product(&self, expert: usize, x: &[Near], loss: f64) -> Vec<Near> {
        (0..self.outputs)
            .map(|output| {
                let mut sum = Near::default();
                for (input, x) in x.iter().enumerate() {
                    let weight = self.at(expert, output, input);
                    sum.value += weight * x.value;
                    sum.by += weight.abs() * (x.by + loss * x.value.abs());
                }
                if let Some(bias) = &self.bias {
                    sum.value += f64::from(bias[expert * self.outputs + output]);
                }
                sum
            })
            .collect()
    }
}

/// A value, and by how much a result may differ from it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Near {
    pub(crate) value: f64,
    pub(crate) by: f64,
}

impl Near {
    pub(crate) fn exactly(value: f32) -> Near {
        Near {
            value: f64::from(value),
            by: 0.0,
        }
    }

    fn rounded(self, loss: f64) -> Near {
        Near {
            by: self.by + loss * self.value.abs() + 1e-6,
            ..self
        }
    }
}

/// What may be lost of a result by rounding it, and of each product.
pub(crate) fn losses(float: FloatType) -> (f64, f64) {
    match float {
        FloatType::Bf16 => (1.0 / 256.0, 1.0 / 512.0),
        FloatType::F16 => (1.0 / 2048.0, 1.0 / 4096.0),
        FloatType::F32 => (1e-6, 1e-6),
    }
}

/// In f64, from its definition.
pub(crate) fn activate(activation: Activation, gate: f64, up: f64) -> f64 {
    let logistic = |x: f64| 1.0 / (1.0 + (-x).exp());
    match activation {
        Activation::Silu => gate * logistic(gate) * up,
        Activation::Gelu => {
            // The normal distribution's density, summed up from 0 by Simpson's rule.
            let (end, steps) = (gate.abs().min(9.0), 600);
            let density = |i: usize| {
                let x = end * i as f64 / f64::from(steps);
                let weight = match i {
                    0 | 600 => 1.0,
                    _ => f64::from(2 + 2 * (i as u32 % 2)),
                };
                weight * (-x * x / 2.0).exp()
            };
            let sum: f64 = (0..=600).map(density).sum();
            let half = sum * end / f64::from(steps) / 3.0 / (2.0 * std::f64::consts::PI).sqrt();
            gate * (0.5 + half * gate.signum()) * up
        }
        Activation::GeluTanh => {
            let z = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044715 * gate.powi(3));
            0.5 * gate * (1.0 + z.tanh()) * up
        }
        Activation::Clamped { limit } => {
            let limit = f64::from(limit);
            let (gate, up) = (gate.min(limit), up.clamp(-limit, limit));
            gate * logistic(1.702 * gate) * (up + 1.0)
        }
    }
}

fn activate_near(activation: Activation, gate: Near, up: Near) -> Near {
    let value = activate(activation, gate.value, up.value);
    let mut by: f64 = 0.0;
    for sign in [(-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0)] {
        let gate = gate.value + 1.5 * sign.0 * gate.by;
        let up = up.value + 1.5 * sign.1 * up.by;
        by = by.max((activate(activation, gate, up) - value).abs());
    }
    Near { value, by }
}

pub(crate) struct Layer {
    pub(crate) gate_up: Stack,
    pub(crate) down: Stack,
    pub(crate) layout: GateLayout,
    pub(crate) activation: Activation,
}

impl Layer {
    pub(crate) fn random(
        format: Format,
        [experts, hidden, intermediate]: [usize; 3],
        layout: GateLayout,
        activation: Activation,
        dice: &mut Dice,
    ) -> Layer {
        Layer {
            gate_up: Stack::random(format, [experts, 2 * intermediate, hidden], dice),
            down: Stack::random(format, [experts, hidden, intermediate], dice),
            layout,
            activation,
        }
    }

    pub(crate) fn view(&self) -> ExpertsWeights<'_> {
        ExpertsWeights {
            experts: self.gate_up.experts,
            gate_up: self.gate_up.view(),
            down: self.down.view(),
            layout: self.layout,
            activation: self.activation,
        }
    }

    /// What the activation gives for an expert and a row.
    pub(crate) fn between(&self, expert: usize, x: &[Near], float: FloatType) -> Vec<Near> {
        let (of_result, of_product) = losses(float);
        let both = self.gate_up.product(expert, x, of_product);
        let intermediate = self.down.inputs;
        (0..intermediate)
            .map(|i| {
                let (gate, up) = match self.layout {
                    GateLayout::Halves => (both[i], both[intermediate + i]),
                    GateLayout::Interleaved => (both[2 * i], both[2 * i + 1]),
                };
                activate_near(self.activation, gate, up).rounded(of_result)
            })
            .collect()
    }

    /// y, of all tokens.
    pub(crate) fn expected(
        &self,
        float: FloatType,
        x: &[f32],
        ids: &[i32],
        weights: &[f32],
    ) -> Vec<Near> {
        let (of_result, of_product) = losses(float);
        let hidden = self.gate_up.inputs;
        let tokens = x.len() / hidden.max(1);
        let choices = ids.len() / tokens.max(1);
        let mut all = vec![];
        for token in 0..tokens {
            let x: Vec<Near> = x[token * hidden..][..hidden]
                .iter()
                .map(|x| Near::exactly(*x))
                .collect();
            let mut sums = vec![Near::default(); hidden];
            for pair in token * choices..(token + 1) * choices {
                if ids[pair] < 0 || ids[pair] >= self.gate_up.experts as i32 {
                    continue;
                }
                let expert = ids[pair] as usize;
                let between = self.between(expert, &x, float);
                let part = self.down.product(expert, &between, of_product);
                for (sum, part) in sums.iter_mut().zip(part) {
                    sum.value += f64::from(weights[pair]) * part.value;
                    sum.by += f64::from(weights[pair]).abs() * part.by;
                }
            }
            all.extend(sums.iter().map(|sum| sum.rounded(of_result)));
        }
        all
    }
}

/// Compares each result, and the size of what all differ by.
pub(crate) fn assert_near(have: &[f32], need: &[Near], float: FloatType, what: &str) {
    assert_eq!(have.len(), need.len(), "{what}");
    let (mut wrong, mut all) = (0.0, 0.0);
    for (i, (have, need)) in have.iter().zip(need).enumerate() {
        let have = f64::from(*have);
        assert!(
            (have - need.value).abs() <= need.by,
            "{what}: result {i} is {have}, should be {} +- {}",
            need.value,
            need.by
        );
        wrong += (have - need.value).powi(2);
        all += need.value.powi(2);
    }
    let most = match float {
        FloatType::Bf16 => 1.0 / 150.0,
        FloatType::F16 => 1.0 / 1200.0,
        FloatType::F32 => 1e-5,
    };
    let error = if all > 0.0 { (wrong / all).sqrt() } else { 0.0 };
    assert!(error <= most, "{what}: an error of {error}");
}
