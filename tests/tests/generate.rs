//! The program that generates: the golden models' logits, and the tokens that follow from them.

use std::sync::Arc;

use tightfit::device::{Device, HostDevice};
use tightfit_tests::generate::{Generated, generate, logits};
use tightfit_tests::golden::GoldenModel;
use tightfit_tests::tensors::floats;

/// As for the reference: `golden_logits.rs`.
const TOLERANCE: f32 = 2e-4;

/// What their logits are called, with experts quantized where there are some.
const MODELS: [(&str, &str); 5] = [
    ("llama", "logits_nf4_f32"),
    ("qwen2_tied", "logits_nf4_f32"),
    ("qwen2_untied", "logits_nf4_f32"),
    ("qwen3_moe", "logits_nf4_with_experts_f32"),
    ("mixtral", "logits_nf4_with_experts_f32"),
];

fn on(device: impl Device + 'static) -> Arc<[Box<dyn Device>]> {
    Arc::from([Box::new(device) as Box<dyn Device>])
}

/// The texts of a golden model.
fn texts(model: &GoldenModel) -> Vec<Vec<u32>> {
    let expected = model.tensors("expected.safetensors");
    let ids = expected.get("input_ids");
    let (tokens, _) = ids.data.as_chunks::<8>();
    let tokens: Vec<u32> = tokens
        .iter()
        .map(|id| i64::from_le_bytes(*id) as u32)
        .collect();
    tokens.chunks(ids.shape[1]).map(<[u32]>::to_vec).collect()
}

fn run(model: &GoldenModel, devices: &Arc<[Box<dyn Device>]>, arguments: &[&str]) -> Generated {
    generate(&model.path("bf16"), devices, arguments)
}

#[test]
fn golden_models_give_the_logits_of_transformers() {
    for (name, expected) in MODELS {
        let model = GoldenModel::unpack(name);
        let need = floats(model.tensors("expected.safetensors").data(expected));
        for devices in [on(HostDevice::cpu(None)), on(HostDevice::sim(0, 1 << 30))] {
            let mut have = vec![];
            for text in texts(&model) {
                have.extend(logits(&model.path("bf16"), &devices, &text));
            }
            assert_eq!(have.len(), need.len(), "{name}");
            let apart = have.iter().zip(&need).map(|(a, b)| (a - b).abs());
            let apart = apart.fold(
                0f32,
                |most, by| if by.is_nan() { f32::NAN } else { most.max(by) },
            );
            println!("{name}: {apart:.1e}");
            assert!(apart <= TOLERANCE, "{name}: logits differ by {apart}");
        }
    }
}

/// The likeliest tokens, one after the other: those of the logits of all tokens before.
#[test]
fn greedy_tokens_are_those_of_the_largest_logits() {
    for (name, _) in MODELS {
        let model = GoldenModel::unpack(name);
        let devices = on(HostDevice::cpu(None));
        let text = &texts(&model)[0];
        let prompt = text[..6]
            .iter()
            .map(u32::to_string)
            .collect::<Vec<_>>()
            .join(",");
        let arguments = [
            "--tokens", &prompt, "--float", "f32", "--max", "5", "--rows", "4",
        ];
        let tokens = run(&model, &devices, &arguments).tokens;
        let mut known = text[..6].to_vec();
        for token in &tokens {
            let all = logits(&model.path("bf16"), &devices, &known);
            let last = &all[all.len() / known.len() * (known.len() - 1)..];
            let largest = (0..last.len()).max_by(|a, b| last[*a].total_cmp(&last[*b]));
            assert_eq!(Some(*token as usize), largest, "{name}: {known:?}");
            known.push(*token);
        }
        assert_eq!(tokens.len(), 5, "{name}");
        // However many rows are computed together.
        for rows in ["1", "64"] {
            let arguments = [
                "--tokens", &prompt, "--float", "f32", "--max", "5", "--rows", rows,
            ];
            assert_eq!(run(&model, &devices, &arguments).tokens, tokens, "{name}");
        }
    }
}

#[test]
fn a_seed_gives_the_same_tokens_and_another_one_others() {
    let model = GoldenModel::unpack("llama");
    let devices = on(HostDevice::cpu(None));
    let tokens = |seed: &str, temperature: &str| {
        let arguments = [
            "--tokens",
            "1,2,3",
            "--max",
            "12",
            "--seed",
            seed,
            "--temperature",
            temperature,
        ];
        run(&model, &devices, &arguments).tokens
    };
    assert_eq!(tokens("7", "1.5"), tokens("7", "1.5"));
    assert_ne!(tokens("7", "1.5"), tokens("8", "1.5"));
    // As good as greedy.
    assert_eq!(tokens("7", "0.00001"), tokens("8", "0"));
}

#[test]
fn generating_ends_where_it_is_told() {
    let model = GoldenModel::unpack("llama");
    let devices = on(HostDevice::cpu(None));
    let all = run(&model, &devices, &["--tokens", "1,2,3", "--max", "8"]).tokens;
    assert_eq!(all.len(), 8);
    let stop = all[3].to_string();
    let some = run(
        &model,
        &devices,
        &["--tokens", "1,2,3", "--max", "8", "--stop", &stop],
    )
    .tokens;
    let first = all.iter().position(|token| *token == all[3]).unwrap();
    assert_eq!(some, all[..=first]);
}

#[test]
fn every_type_of_activations_gives_tokens_and_says_what_it_takes() {
    let model = GoldenModel::unpack("qwen2_tied");
    for float in ["bf16", "f16", "f32"] {
        let devices = on(HostDevice::sim(0, 1 << 30));
        let generated = run(
            &model,
            &devices,
            &["--tokens", "5,6", "--max", "3", "--float", float],
        );
        assert_eq!(generated.tokens.len(), 3);
        let numbers: Vec<u64> = generated
            .answer
            .split(|c: char| !c.is_ascii_digit())
            .filter_map(|number| number.parse().ok())
            .collect();
        let [tokens, peak, plan, cache, rest] = numbers[..] else {
            panic!("{}", generated.answer);
        };
        assert_eq!(tokens, 3);
        assert_eq!(peak, plan + cache + rest);
        assert_eq!(peak, devices[0].usage().reserved.peak);
        assert_eq!(devices[0].usage().reserved.now, 0);
    }
}

#[test]
fn what_it_cannot_do_it_says() {
    let model = GoldenModel::unpack("llama");
    let devices = on(HostDevice::cpu(None));
    for (arguments, words) in [
        (&["--tokens", "999999"][..], "token 999999"),
        (&[], "--tokens"),
        (&["--tokens", "1", "--device", "3"], "no device 3"),
        (&["--tokens", "1", "--float", "i8"], "bf16|f16|f32"),
        (&["--tokens", "x"], "'x'"),
    ] {
        let error = tightfit_tests::generate::failure(&model.path("bf16"), &devices, arguments);
        assert!(error.contains(words), "{arguments:?}: {error}");
    }
    let other = GoldenModel::unpack("qwen3_5_moe");
    let error =
        tightfit_tests::generate::failure(&other.path("bf16"), &devices, &["--tokens", "1"]);
    assert!(error.contains("not known here"), "{error}");
}
