//! The program that generates: the golden models' logits, and the tokens that follow from them.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use tempfile::TempDir;
use tightfit::device::{Device, HostDevice};
use tightfit_tests::generate::{Generated, failure, generate, logits, text};
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

/// The experts of a layer in one tensor are the same experts, to the bit; also many rows at a time.
#[test]
fn stacks_of_experts_give_what_single_ones_give() {
    for name in ["qwen3_moe", "mixtral"] {
        let model = GoldenModel::unpack(name);
        let fused = TempDir::new().unwrap();
        model.write_with_fused_experts(fused.path());
        let devices = on(HostDevice::cpu(None));
        let tokens = &texts(&model)[0];
        let single = logits(&model.path("bf16"), &devices, tokens);
        assert!(single.iter().any(|logit| *logit != 0.0));
        assert_eq!(logits(fused.path(), &devices, tokens), single, "{name}");
        let prompt: Vec<String> = tokens.iter().map(u32::to_string).collect();
        let arguments = [
            "--tokens",
            &prompt.join(","),
            "--float",
            "f32",
            "--max",
            "4",
        ];
        let generated = generate(fused.path(), &devices, &arguments).tokens;
        assert_eq!(
            generated,
            run(&model, &devices, &arguments).tokens,
            "{name}"
        );
    }
}

/// A model with a tokenizer of its 256 first tokens, which are bytes.
fn with_tokenizer(tokenizer: &[u8]) -> TempDir {
    let model = GoldenModel::unpack("llama");
    let directory = TempDir::new().unwrap();
    for file in std::fs::read_dir(model.path("bf16")).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), directory.path().join(file.file_name())).unwrap();
    }
    std::fs::write(directory.path().join("tokenizer.json"), tokenizer).unwrap();
    directory
}

/// Of all bytes, by their numbers, as sentencepiece's are written that have no character for a byte.
fn tokenizer_of_bytes() -> Value {
    let byte = |byte: u32| (format!("<0x{byte:02X}>"), Value::from(byte));
    json!({
        "added_tokens": [],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": true,
            "vocab": (0..256).map(byte).collect::<serde_json::Map<_, _>>(), "merges": []},
    })
}

/// What bytes are as text: those of no character, and what is no byte, as those who stream tell it.
fn as_text(tokens: &[u32]) -> String {
    let bytes = tokens.iter().filter_map(|token| u8::try_from(*token).ok());
    String::from_utf8_lossy(&bytes.collect::<Vec<u8>>()).into_owned()
}

#[test]
fn text_goes_in_and_comes_out() {
    let directory = with_tokenizer(tokenizer_of_bytes().to_string().as_bytes());
    let devices = on(HostDevice::cpu(None));
    let prompt = "h\u{e9}\u{1f642} ";
    let bytes: Vec<String> = prompt.bytes().map(|byte| byte.to_string()).collect();
    let bytes = bytes.join(",");
    for more in [&["--temperature", "3", "--seed", "5"][..], &[]] {
        let tokens = |first: &[&str]| {
            let arguments = [first, &["--max", "40"], more].concat();
            generate(directory.path(), &devices, &arguments).tokens
        };
        let text = |first: &[&str]| {
            let arguments = [first, &["--max", "40"], more].concat();
            text(directory.path(), &devices, &arguments)
        };
        let expected = tokens(&["--tokens", &bytes]);
        assert_eq!(tokens(&["--text", prompt, "--as", "tokens"]), expected);
        assert_eq!(text(&["--text", prompt]), as_text(&expected));
        assert_eq!(
            text(&["--tokens", &bytes, "--as", "text"]),
            as_text(&expected)
        );
    }
}

#[test]
fn a_text_ends_where_the_checkpoint_says() {
    let directory = with_tokenizer(tokenizer_of_bytes().to_string().as_bytes());
    let devices = on(HostDevice::cpu(None));
    let arguments = ["--text", "hello", "--max", "12", "--temperature", "3"];
    let as_tokens = [&arguments[..], &["--as", "tokens", "--stop", "4000000000"]].concat();
    let all = generate(directory.path(), &devices, &as_tokens).tokens;
    assert_eq!(all.len(), 12);
    let end = all[7];
    let first = all.iter().position(|token| *token == end).unwrap();
    for settings in [
        json!({"eos_token_id": end}),
        json!({"eos_token_id": [4, end]}),
    ] {
        let path = directory.path().join("generation_config.json");
        std::fs::write(path, settings.to_string()).unwrap();
        let some = text(directory.path(), &devices, &arguments);
        // 4 is no token of this text.
        assert!(!all.contains(&4));
        assert_eq!(some, as_text(&all[..first]));
    }
}

#[test]
fn a_tokenizer_that_is_none_is_told() {
    let devices = on(HostDevice::cpu(None));
    let model = GoldenModel::unpack("llama");
    let fails = |path: &Path, words: &str| {
        let error = failure(path, &devices, &["--text", "hello"]);
        assert!(error.contains(words), "{error}");
    };
    fails(&model.path("bf16"), "has no tokenizer.json");
    fails(with_tokenizer(b"{\"model\": 3}").path(), "tokenizer.json");
    fails(with_tokenizer(b"\xff\xfe").path(), "tokenizer.json");
    let large = with_tokenizer(b"");
    let file = std::fs::File::create(large.path().join("tokenizer.json")).unwrap();
    file.set_len((40 << 20) + 1).unwrap();
    fails(large.path(), "at most 41943040");
    // Tokens that the model does not have.
    let mut far = tokenizer_of_bytes();
    far["model"]["vocab"]["<0x68>"] = 4_000_000.into();
    fails(
        with_tokenizer(far.to_string().as_bytes()).path(),
        "token 4000000",
    );
    // What has no end for who looks for one: it costs the program its own time.
    let mut deep = tokenizer_of_bytes().to_string();
    deep.insert_str(1, &format!("\"x\": {}", "[".repeat(100_000)));
    fails(with_tokenizer(deep.as_bytes()).path(), "tokenizer.json");
}
