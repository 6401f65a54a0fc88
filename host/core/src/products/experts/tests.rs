//! Layers of experts of loaded models, against what their single matrices give.

use tightfit_kernels::half::bf16;
use tightfit_kernels::{Activation, Choices, FloatType, GateLayout};

use super::super::tests::{loaded, nf4, numbers};
use super::super::{
    ExpertsNames, ExpertsTensors, GateTensors, LinearError, LinearOptions, WorkspaceOptions,
};
use crate::device::{DeviceExpertsOperands, HostExpertsOperands};
use crate::model::Model;
use crate::status::Status;
use crate::testing::{Source, source};
use crate::types::{DType, Format};

const EXPERTS: usize = 4;
const HIDDEN: usize = 96;
const INTERMEDIATE: usize = 64;

fn tensor(name: &str, shape: &[usize]) -> Source {
    let shape: Vec<u64> = shape.iter().map(|length| *length as u64).collect();
    source(String::leak(name.to_owned()), DType::Bf16, &shape)
}

/// Layers of every kind, each with the name of its module.
fn model(format: Format) -> Model {
    let mut tensors = vec![];
    for module in ["fused", "gpt.weights"] {
        let end = if module == "fused" { "" } else { ".weight" };
        tensors.push(tensor(
            &format!("{module}.gate_up_proj{end}"),
            &[EXPERTS, 2 * INTERMEDIATE, HIDDEN],
        ));
        tensors.push(tensor(
            &format!("{module}.down_proj{end}"),
            &[EXPERTS, HIDDEN, INTERMEDIATE],
        ));
    }
    for (module, [gate, up, down]) in [
        ("apart", ["gate_proj", "up_proj", "down_proj"]),
        ("mixtral", ["w1", "w3", "w2"]),
    ] {
        for expert in 0..EXPERTS {
            let name = |name| format!("{module}.{expert}.{name}.weight");
            tensors.push(tensor(&name(gate), &[INTERMEDIATE, HIDDEN]));
            tensors.push(tensor(&name(up), &[INTERMEDIATE, HIDDEN]));
            tensors.push(tensor(&name(down), &[HIDDEN, INTERMEDIATE]));
        }
    }
    let cases: Vec<_> = tensors.into_iter().map(|source| (source, format)).collect();
    loaded(&cases)
}

/// The product of a row with one matrix, and a bias.
fn product(
    model: &Model,
    name: &str,
    index: Option<u64>,
    x: &[f32],
    bias: Option<&[f32]>,
) -> Vec<f32> {
    let linear = super::super::Linear::find(model, name, index).unwrap();
    let mut y = vec![0.0; linear.outputs()];
    linear.forward(x, 1, bias, &mut y).unwrap();
    y
}

/// What the layer gives, from single products.
fn expected(
    model: &Model,
    module: &str,
    activation: Activation,
    x: &[f32],
    choices: &Choices<'_>,
    biases: Option<[&[f32]; 2]>,
) -> Vec<f32> {
    let layer = model.experts(module, activation).unwrap();
    let names = ExpertsNames::find(model, module, activation).unwrap();
    let mut y = vec![];
    for (token, x) in x.chunks_exact(HIDDEN).enumerate() {
        let mut sums = vec![0.0; HIDDEN];
        for pair in token * choices.of_token..(token + 1) * choices.of_token {
            let Some(expert) = usize::try_from(choices.ids[pair])
                .ok()
                .filter(|id| *id < EXPERTS)
            else {
                continue;
            };
            let of = |tensors: &ExpertsTensors, x: &[f32], bias: Option<&[f32]>| match tensors {
                ExpertsTensors::Stack(name) => product(model, name, Some(expert as u64), x, bias),
                ExpertsTensors::Each(names) => product(model, &names[expert], None, x, bias),
            };
            let bias = |which: usize, length| {
                biases.map(|biases| &biases[which][expert * length..][..length])
            };
            let both = match &names.gates {
                GateTensors::Together(both, _) => of(both, x, bias(0, 2 * INTERMEDIATE)),
                GateTensors::Apart { gate, up } => {
                    let (of_gate, of_up) = match bias(0, 2 * INTERMEDIATE) {
                        Some(bias) => (Some(&bias[..INTERMEDIATE]), Some(&bias[INTERMEDIATE..])),
                        None => (None, None),
                    };
                    let mut both = of(gate, x, of_gate);
                    both.extend(of(up, x, of_up));
                    both
                }
            };
            let between: Vec<f32> = (0..INTERMEDIATE)
                .map(|i| match layer.layout() {
                    GateLayout::Halves => activation.apply(both[i], both[INTERMEDIATE + i]),
                    GateLayout::Interleaved => activation.apply(both[2 * i], both[2 * i + 1]),
                })
                .collect();
            let part = of(&names.down, &between, bias(1, HIDDEN));
            for (sum, part) in sums.iter_mut().zip(part) {
                *sum += choices.weights[pair] * part;
            }
        }
        y.extend(sums);
    }
    y
}

const IDS: [i32; 12] = [1, 3, 0, 0, -1, 2, 3, 4, 1, 2, i32::MIN, i32::MAX];

#[test]
fn layers_are_what_their_matrices_give() {
    for double in [false, true] {
        let model = model(nf4(64, double));
        let weights: Vec<f32> = numbers(IDS.len(), 4);
        let choices = Choices {
            of_token: 2,
            ids: &IDS,
            weights: &weights,
        };
        let x: Vec<f32> = numbers(6 * HIDDEN, 5);
        let gate_up_bias: Vec<f32> = numbers(EXPERTS * 2 * INTERMEDIATE, 6);
        let down_bias: Vec<f32> = numbers(EXPERTS * HIDDEN, 7);
        for (module, activation) in [
            ("fused", Activation::Silu),
            ("gpt.weights", Activation::Clamped { limit: 1.0 }),
            ("apart", Activation::Gelu),
            ("mixtral", Activation::GeluTanh),
        ] {
            let layer = model.experts(module, activation).unwrap();
            assert_eq!(
                (layer.experts(), layer.hidden(), layer.intermediate()),
                (EXPERTS, HIDDEN, INTERMEDIATE)
            );
            assert!(!layer.is_on_gpu());
            for biases in [None, Some([&gate_up_bias[..], &down_bias[..]])] {
                let need = expected(&model, module, activation, &x, &choices, biases);
                let [gate_up, down] = match biases {
                    Some(biases) => biases.map(Some),
                    None => [None, None],
                };
                let mut y = vec![f32::NAN; x.len()];
                layer.forward(&x, &choices, gate_up, down, &mut y).unwrap();
                for (i, (have, need)) in y.iter().zip(&need).enumerate() {
                    let most = 1e-5 + 1e-5 * need.abs();
                    assert!((have - need).abs() <= most, "{module}, {i}: {have}, {need}");
                }
                // The last token has no expert.
                assert!(y[5 * HIDDEN..].iter().all(|y| *y == 0.0));
                // As bytes at any alignment, and with any threads.
                for threads in [1, 3] {
                    let options = LinearOptions::default().with_threads(threads);
                    let mut bytes = vec![0u8; 4 * y.len() + 1];
                    let operands = HostExpertsOperands {
                        x: bytemuck::cast_slice(&x),
                        choices,
                        bias: gate_up.map(bytemuck::cast_slice),
                        down_bias: down.map(bytemuck::cast_slice),
                        y: &mut bytes[1..],
                    };
                    layer
                        .forward_bytes(FloatType::F32, operands, &options)
                        .unwrap();
                    assert_eq!(bytes[1..], *bytemuck::cast_slice::<f32, u8>(&y));
                }
                // A token by itself.
                let mut alone = vec![f32::NAN; HIDDEN];
                let own = Choices {
                    of_token: 2,
                    ids: &IDS[4..6],
                    weights: &weights[4..6],
                };
                let x = &x[2 * HIDDEN..3 * HIDDEN];
                layer.forward(x, &own, gate_up, down, &mut alone).unwrap();
                assert_eq!(alone, y[2 * HIDDEN..3 * HIDDEN]);
            }
        }
    }
}

#[test]
fn each_row_is_multiplied_with_its_own_expert() {
    for double in [false, true] {
        let model = model(nf4(64, double));
        let names = |module: &str, name: &str| -> Vec<String> {
            let of = |expert| format!("{module}.{expert}.{name}.weight");
            (0..EXPERTS).map(of).collect()
        };
        for tensors in [
            ExpertsTensors::Stack("fused.gate_up_proj".to_owned()),
            ExpertsTensors::Each(names("apart", "up_proj")),
        ] {
            let linear = model.experts_linear(&tensors).unwrap();
            let outputs = linear.outputs();
            let x: Vec<bf16> = numbers(IDS.len() * HIDDEN, 8);
            let bias: Vec<bf16> = numbers(EXPERTS * outputs, 9);
            let mut y = vec![bf16::from_f32(7.0); IDS.len() * outputs];
            linear.forward(&x, &IDS, Some(&bias), &mut y).unwrap();
            for (row, id) in IDS.iter().enumerate() {
                let have = &y[row * outputs..][..outputs];
                let Some(id) = usize::try_from(*id).ok().filter(|id| *id < EXPERTS) else {
                    // It stays as it is.
                    assert!(have.iter().all(|y| y.to_f32() == 7.0));
                    continue;
                };
                let matrix = match &tensors {
                    ExpertsTensors::Stack(name) => model.linear_of(name, id as u64),
                    ExpertsTensors::Each(names) => model.linear(&names[id]),
                };
                let mut need = vec![bf16::ZERO; outputs];
                let x = &x[row * HIDDEN..][..HIDDEN];
                let bias = &bias[id * outputs..][..outputs];
                matrix
                    .unwrap()
                    .forward(x, 1, Some(bias), &mut need)
                    .unwrap();
                assert_eq!(have, need, "{double}, row {row}");
            }
        }
    }
}

#[test]
fn explicit_names_are_the_same_layer() {
    let model = model(nf4(64, true));
    let stack = |name: &str| ExpertsTensors::Stack(format!("fused.{name}"));
    let names = ExpertsNames {
        gates: GateTensors::Together(stack("gate_up_proj"), GateLayout::Halves),
        down: stack("down_proj"),
    };
    let one = model.experts("fused", Activation::Silu).unwrap();
    let other = model.experts_of(&names, Activation::Silu).unwrap();
    let tensors = other.tensors().into_iter().map(|tensor| tensor.name());
    assert_eq!(
        tensors.collect::<Vec<_>>(),
        ["fused.gate_up_proj", "fused.down_proj"]
    );
    let choices = Choices {
        of_token: 1,
        ids: &[2],
        weights: &[0.5],
    };
    let x: Vec<f32> = numbers(HIDDEN, 3);
    let result = |layer: &super::Experts<'_>| {
        let mut y = vec![0.0; HIDDEN];
        layer.forward(&x, &choices, None, None, &mut y).unwrap();
        y
    };
    assert_eq!(result(&one), result(&other));
}

#[test]
fn what_is_no_layer_in_4_bits_is_refused_and_named() {
    let model = loaded(&[
        (tensor("stored.gate_up_proj", &[4, 128, 96]), Format::Stored),
        (tensor("stored.down_proj", &[4, 96, 64]), Format::Stored),
        (tensor("bad.gate_up_proj", &[4, 128, 96]), nf4(64, false)),
        (tensor("bad.down_proj", &[4, 96, 63]), nf4(64, false)),
        (tensor("few.0.w1.weight", &[64, 96]), nf4(64, false)),
        (tensor("few.0.w3.weight", &[64, 96]), nf4(64, false)),
        (tensor("few.0.w2.weight", &[96, 64]), nf4(64, false)),
        (tensor("few.1.w1.weight", &[64, 128]), nf4(64, false)),
        (tensor("few.1.w3.weight", &[64, 96]), nf4(64, false)),
        (tensor("few.1.w2.weight", &[96, 64]), nf4(64, false)),
    ]);
    let refused = |module: &str, texts: &[&str]| {
        let error = model.experts(module, Activation::Silu).unwrap_err();
        let text = error.to_string();
        assert!(texts.iter().all(|part| text.contains(part)), "{text}");
        assert_eq!(Status::from(&error), Status::Usage);
    };
    refused("nobody", &["'nobody'", "'nobody.0.gate_proj.weight'"]);
    refused("stored", &["'stored.down_proj'", "bf16", "stored"]);
    refused(
        "bad",
        &["'bad.gate_up_proj'", "[4, 128, 96]", "[4, 126, 96]"],
    );
    refused("few", &["'few.1.w1.weight'", "[64, 128]", "[64, 96]"]);
    let none = ExpertsTensors::Each(vec![]);
    assert!(matches!(
        model.experts_linear(&none),
        Err(LinearError::NoExperts { .. })
    ));
    let matrix = ExpertsTensors::Stack("few.0.w1.weight".to_owned());
    assert!(matches!(
        model.experts_linear(&matrix),
        Err(LinearError::NotMatrix { need: 3, .. })
    ));
}

#[test]
fn operands_of_other_lengths_are_refused_and_nothing_is_written() {
    let model = model(nf4(64, false));
    let layer = model.experts("fused", Activation::Silu).unwrap();
    let x = vec![1f32; 2 * HIDDEN];
    let (gate_up, down) = (vec![0f32; EXPERTS * 128], vec![0f32; EXPERTS * HIDDEN]);
    let refused = |x: &[f32], ids: usize, weights: usize, biases: [&[f32]; 2], y: usize, what| {
        let choices = Choices {
            of_token: 2,
            ids: &IDS[..ids],
            weights: &[0.5; 12][..weights],
        };
        let mut y = vec![7f32; y];
        let [gate_up, down] = biases.map(Some);
        let error = layer
            .forward(x, &choices, gate_up, down, &mut y)
            .unwrap_err();
        assert_eq!(error.to_string(), what);
        assert!(y.iter().all(|y| *y == 7.0));
    };
    let both = [&gate_up[..], &down[..]];
    refused(
        &x[..191],
        4,
        4,
        both,
        192,
        "x for tensor 'fused' has 191 elements, need 96",
    );
    refused(
        &x,
        4,
        4,
        both,
        191,
        "y for tensor 'fused' has 191 elements, need 192",
    );
    refused(
        &x,
        3,
        4,
        both,
        192,
        "the ids for tensor 'fused' has 3 elements, need 4",
    );
    let weights = "the weights of the ids for tensor 'fused' has 5 elements, need 4";
    refused(&x, 4, 5, both, 192, weights);
    let bias = "the bias of gate and up for tensor 'fused' has 511 elements, need 512";
    refused(&x, 4, 4, [&gate_up[1..], &down], 192, bias);
    let bias = "the bias of down for tensor 'fused' has 383 elements, need 384";
    refused(&x, 4, 4, [&gate_up, &down[1..]], 192, bias);
}

#[test]
#[allow(unsafe_code)]
fn in_host_memory_nothing_is_given_to_a_stream() {
    let model = model(nf4(64, true));
    let layer = model.experts("apart", Activation::Silu).unwrap();
    assert_eq!(layer.workspace_bytes(64, 2, FloatType::Bf16), 0);
    let options = WorkspaceOptions::rows(64).with_gradients(true);
    assert_eq!(model.product_workspace(0, &options).unwrap().bytes(), 0);
    let operands = DeviceExpertsOperands::new(16, 32, 48, 64, std::ptr::null_mut());
    // SAFETY: refused before anything is done with the pointers.
    let error = unsafe { layer.forward_on_device(FloatType::Bf16, 1, 2, &operands) };
    assert!(error.unwrap_err().to_string().contains("host memory"));
}
