//! Checkpoints of kinds that are not like the others: what is loaded and saved of them.

use std::fs;

use tightfit::checkpoint::Checkpoint;
use tightfit_tests::command::Scratchpad;
use tightfit_tests::models;
use tightfit_tests::saving::files;

/// Writes a checkpoint of BF16 matrices, the bytes of each after its name.
fn write(scratchpad: &Scratchpad, model: &str, config: &str, matrices: &[(&str, [u64; 2])]) {
    fs::create_dir(scratchpad.path(model)).unwrap();
    fs::write(scratchpad.path(model).join("config.json"), config).unwrap();
    let data: Vec<Vec<u8>> = matrices
        .iter()
        .map(|(name, [rows, columns])| {
            let seed = name.bytes().map(usize::from).sum::<usize>();
            let values = (0..(rows * columns) as usize).map(|i| ((i * 31 + seed) % 97) as u8);
            // From 2^-4 on, positive.
            values.flat_map(|value| [value, 0x3d]).collect()
        })
        .collect();
    let tensors: Vec<(&str, &str, &[u64], &[u8])> = matrices
        .iter()
        .zip(&data)
        .map(|((name, shape), data)| (*name, "BF16", &shape[..], &data[..]))
        .collect();
    models::write_safetensors(&scratchpad.path(model).join("model.safetensors"), &tensors);
}

/// Names of the tensors in 4 bits in a saved checkpoint.
fn quantized(scratchpad: &Scratchpad, model: &str) -> Vec<String> {
    let checkpoint = Checkpoint::open(scratchpad.path(model)).unwrap();
    let tensors = checkpoint.tensors().iter();
    let quantized = tensors.filter(|tensor| tensor.quantized.is_some());
    quantized.map(|tensor| tensor.name.clone()).collect()
}

fn skipped_modules(scratchpad: &Scratchpad, model: &str) -> serde_json::Value {
    let text = fs::read_to_string(scratchpad.path(model).join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&text).unwrap();
    config["quantization_config"]["llm_int8_skip_modules"].clone()
}

/// All of these modules are among those that config.json has readers leave as they are.
#[track_caller]
fn assert_skipped<'a>(skipped: &serde_json::Value, modules: impl IntoIterator<Item = &'a str>) {
    let listed = skipped.as_array().unwrap();
    for module in modules {
        assert!(
            listed.iter().any(|name| name == module),
            "{module}: {skipped}"
        );
    }
}

#[test]
fn tables_and_heads_stay_as_stored_whatever_they_are_called() {
    let scratchpad = Scratchpad::new();
    let matrices = [
        ("decoder.model.decoder.embed_tokens.1.weight", [128, 64]),
        ("decoder.lm_heads.1.weight", [128, 64]),
        ("language_model.output.weight", [256, 64]),
        ("words.weight", [300, 64]),
        ("decoder.model.decoder.layers.0.fc1.weight", [256, 64]),
    ];
    let config = r#"{"decoder": {"vocab_size": 300}}"#;
    write(&scratchpad, "m", config, &matrices);
    scratchpad.run(&["save", "m", "out", "--quiet"]).succeeds();
    assert_eq!(quantized(&scratchpad, "out"), [matrices[4].0]);
    // Transformers knows of heads with the usual names only.
    let heads = ["words", "language_model.output", "decoder.lm_heads.1"];
    assert_skipped(&skipped_modules(&scratchpad, "out"), heads);
}

#[test]
fn conv1d_is_left_as_stored_and_listed() {
    let scratchpad = Scratchpad::new();
    let matrices = [
        ("decoder.transformer.wte.weight", [256, 64]),
        ("decoder.transformer.h.0.attn.c_attn.weight", [64, 192]),
        ("decoder.transformer.h.0.attn.c_proj.weight", [64, 64]),
        ("decoder.transformer.h.0.mlp.c_fc.weight", [64, 256]),
        ("encoder.layer.0.attention.query.weight", [64, 64]),
    ];
    let config = r#"{"decoder": {"model_type": "gpt2", "vocab_size": 256}}"#;
    write(&scratchpad, "m", config, &matrices);
    let saved = scratchpad.run(&["save", "m", "out", "--quiet"]);
    assert_eq!(saved.status, Some(0), "{saved:#?}");
    assert!(
        saved.stderr.contains("3 matrices stay as stored"),
        "{saved:#?}"
    );
    assert_eq!(quantized(&scratchpad, "out"), [matrices[4].0]);
    let conv1d = matrices[1..4].iter();
    assert_skipped(
        &skipped_modules(&scratchpad, "out"),
        conv1d.map(|(name, _)| name.strip_suffix(".weight").unwrap()),
    );
}

#[test]
fn a_head_with_other_values_than_its_table_is_kept_with_a_warning() {
    let scratchpad = Scratchpad::new();
    models::write_decoder(&scratchpad.path("different"), 2, 64);
    let path = scratchpad.path("different/config.json");
    let config = fs::read_to_string(&path).unwrap();
    let tied = config.replace(
        "\"tie_word_embeddings\":false",
        "\"tie_word_embeddings\":true",
    );
    assert_ne!(config, tied);
    fs::write(path, tied).unwrap();
    let saved = scratchpad.run(&["save", "different", "out", "--quiet"]);
    assert_eq!(saved.status, Some(0), "{saved:#?}");
    let warning = "'lm_head.weight' is stored with other values than 'model.embed_tokens.weight'";
    assert!(saved.stderr.contains(warning), "{saved:#?}");
    let out = Checkpoint::open(scratchpad.path("out")).unwrap();
    assert!(out.find("lm_head.weight").is_some());
    assert_eq!(out.untied().len(), 1);
}

#[test]
fn modules_that_a_4_bit_checkpoint_skipped_are_saved_byte_for_byte() {
    let scratchpad = Scratchpad::new();
    models::write_decoder(&scratchpad.path("full"), 2, 64);
    let skip = "skip=*.down_proj,lm_head";
    let save = ["save", "full", "dynamic", "--set", skip, "--quiet"];
    scratchpad.run(&save).succeeds();
    let quantized = quantized(&scratchpad, "dynamic");
    assert!(!quantized.is_empty());
    assert!(quantized.iter().all(|name| !name.contains("down_proj")));
    for policy in ["auto", "packed", "huggingface"] {
        let save = ["save", "dynamic", policy, "--policy", policy, "--quiet"];
        scratchpad.run(&save).succeeds();
        assert!(
            files(&scratchpad.path(policy)) == files(&scratchpad.path("dynamic")),
            "{policy}"
        );
    }
}
