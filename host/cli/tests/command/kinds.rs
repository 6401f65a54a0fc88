//! Checkpoints of kinds that are not like the others: what is loaded and saved of them.

use std::fs;

use tightfit::checkpoint::Checkpoint;
use tightfit_tests::command::Place;
use tightfit_tests::models;
use tightfit_tests::saving::files;

/// Writes a checkpoint of BF16 matrices, the bytes of each after its name.
fn write(place: &Place, model: &str, config: &str, matrices: &[(&str, [u64; 2])]) {
    fs::create_dir(place.path(model)).unwrap();
    fs::write(place.path(model).join("config.json"), config).unwrap();
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
    models::write_safetensors(&place.path(model).join("model.safetensors"), &tensors);
}

/// Names of the tensors in 4 bits in a saved checkpoint.
fn quantized(place: &Place, model: &str) -> Vec<String> {
    let checkpoint = Checkpoint::open(place.path(model)).unwrap();
    let tensors = checkpoint.tensors().iter();
    let quantized = tensors.filter(|tensor| tensor.quantized.is_some());
    quantized.map(|tensor| tensor.name.clone()).collect()
}

fn skipped_modules(place: &Place, model: &str) -> serde_json::Value {
    let text = fs::read_to_string(place.path(model).join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&text).unwrap();
    config["quantization_config"]["llm_int8_skip_modules"].clone()
}

#[test]
fn tables_and_heads_stay_as_stored_whatever_they_are_called() {
    let place = Place::new();
    let matrices = [
        ("decoder.model.decoder.embed_tokens.1.weight", [128, 64]),
        ("decoder.lm_heads.1.weight", [128, 64]),
        ("language_model.output.weight", [256, 64]),
        ("words.weight", [300, 64]),
        ("decoder.model.decoder.layers.0.fc1.weight", [256, 64]),
    ];
    let config = r#"{"decoder": {"vocab_size": 300}}"#;
    write(&place, "m", config, &matrices);
    place.run(&["save", "m", "out", "--quiet"]).succeeds();
    assert_eq!(quantized(&place, "out"), [matrices[4].0]);
    // Transformers knows of heads with the usual names only.
    let skipped = skipped_modules(&place, "out");
    for module in ["words", "language_model.output", "decoder.lm_heads.1"] {
        assert!(
            skipped
                .as_array()
                .unwrap()
                .iter()
                .any(|name| name == module),
            "{module}: {skipped}"
        );
    }
}

#[test]
fn conv1d_is_left_as_stored_and_listed() {
    let place = Place::new();
    let matrices = [
        ("decoder.transformer.wte.weight", [256, 64]),
        ("decoder.transformer.h.0.attn.c_attn.weight", [64, 192]),
        ("decoder.transformer.h.0.attn.c_proj.weight", [64, 64]),
        ("decoder.transformer.h.0.mlp.c_fc.weight", [64, 256]),
        ("encoder.layer.0.attention.query.weight", [64, 64]),
    ];
    let config = r#"{"decoder": {"model_type": "gpt2", "vocab_size": 256}}"#;
    write(&place, "m", config, &matrices);
    let saved = place.run(&["save", "m", "out", "--quiet"]);
    assert_eq!(saved.status, Some(0), "{saved:#?}");
    assert!(
        saved.stderr.contains("3 matrices stay as stored"),
        "{saved:#?}"
    );
    assert_eq!(quantized(&place, "out"), [matrices[4].0]);
    let skipped = skipped_modules(&place, "out");
    for (name, _) in &matrices[1..4] {
        let module = name.strip_suffix(".weight").unwrap();
        assert!(
            skipped
                .as_array()
                .unwrap()
                .iter()
                .any(|name| name == module),
            "{module}: {skipped}"
        );
    }
}

#[test]
fn a_head_with_other_values_than_its_table_is_kept_with_a_warning() {
    let place = Place::new();
    models::write_decoder(&place.path("different"), 2, 64);
    let path = place.path("different/config.json");
    let config = fs::read_to_string(&path).unwrap();
    let tied = config.replace(
        "\"tie_word_embeddings\":false",
        "\"tie_word_embeddings\":true",
    );
    assert_ne!(config, tied);
    fs::write(path, tied).unwrap();
    let saved = place.run(&["save", "different", "out", "--quiet"]);
    assert_eq!(saved.status, Some(0), "{saved:#?}");
    let warning = "'lm_head.weight' is stored with other values than 'model.embed_tokens.weight'";
    assert!(saved.stderr.contains(warning), "{saved:#?}");
    let out = Checkpoint::open(place.path("out")).unwrap();
    assert!(out.find("lm_head.weight").is_some());
    assert_eq!(out.untied().len(), 1);
}

#[test]
fn modules_that_a_4_bit_checkpoint_skipped_are_saved_byte_for_byte() {
    let place = Place::new();
    models::write_decoder(&place.path("full"), 2, 64);
    let skip = "skip=*.down_proj,lm_head";
    let save = ["save", "full", "dynamic", "--set", skip, "--quiet"];
    place.run(&save).succeeds();
    let quantized = quantized(&place, "dynamic");
    assert!(!quantized.is_empty());
    assert!(quantized.iter().all(|name| !name.contains("down_proj")));
    for policy in ["auto", "packed", "huggingface"] {
        let save = ["save", "dynamic", policy, "--policy", policy, "--quiet"];
        place.run(&save).succeeds();
        assert!(
            files(&place.path(policy)) == files(&place.path("dynamic")),
            "{policy}"
        );
    }
}
