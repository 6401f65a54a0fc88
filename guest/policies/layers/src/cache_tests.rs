use tightfit_guest::{Dtype, RefusalReason, Tensor};

use super::*;
use crate::fixtures::*;
use crate::units::in_model_order;
use crate::{Arrangement, plan};

/// What is left free for a model of these tensors, without the logits.
fn kept(tensors: &[Tensor], config: &str, settings: &[(&str, &str)]) -> u64 {
    headroom(tensors, config, settings).unwrap()
}

fn headroom(tensors: &[Tensor], config: &str, settings: &[(&str, &str)]) -> Result<u64, Refusal> {
    let mut request = request(tensors.to_vec(), sims(&[1 << 50]));
    request.config_json = config.into();
    let proposal = plan(&with(request, settings), Arrangement::Spread)?;
    Ok(proposal.headroom.iter().sum())
}

/// Matrices of one layer of `model.layers`.
fn layer(index: u64, matrices: &[(&str, [u64; 2])]) -> Vec<Tensor> {
    let named = |(module, shape): &(&str, [u64; 2])| {
        tensor(format!("model.layers.{index}.{module}.weight"), shape)
    };
    matrices.iter().map(named).collect()
}

fn notes(tensors: &[Tensor], config: &str, settings: &[(&str, &str)]) -> Vec<(Level, String)> {
    let mut request = request(tensors.to_vec(), sims(&[1 << 50]));
    request.config_json = config.into();
    let request = with(request, settings);
    let options = Options::read(&request).unwrap();
    let kinds = tightfit_guest::formats::kinds(&request);
    let duplicates = request.duplicates();
    let units = in_model_order(&request, &kinds, &duplicates);
    let mut items = vec![Item::default(); tensors.len()];
    reserve(&request, &options, &kinds, &units, &mut items).unwrap()
}

fn warnings(tensors: &[Tensor], config: &str) -> Vec<String> {
    let notes = notes(tensors, config, &[("context", "100")]).into_iter();
    notes
        .filter(|(level, _)| *level == Level::Warn)
        .map(|(_, note)| note)
        .collect()
}

fn attention_of(prefix: &str, queries: u64, kv: u64, hidden: u64) -> Vec<Tensor> {
    let matrix = |name: &str, shape: &[u64]| tensor(format!("{prefix}{name}.weight"), shape);
    vec![
        matrix("q_proj", &[queries, hidden]),
        matrix("k_proj", &[kv, hidden]),
        matrix("v_proj", &[kv, hidden]),
        matrix("o_proj", &[hidden, queries]),
    ]
}

#[test]
fn the_size_of_a_head_may_have_any_key() {
    // T5-11b: 128 heads of 128, where the size of the model is 1024.
    let (layers, inner, hidden, vocabulary) = (24, 128 * 128, 1024, 32_128);
    let mut tensors = vec![tensor("shared.weight", &[vocabulary, hidden])];
    for (side, attentions) in [
        ("encoder", &["SelfAttention"][..]),
        ("decoder", &["SelfAttention", "EncDecAttention"]),
    ] {
        for i in 0..layers {
            for (n, attention) in attentions.iter().enumerate() {
                let at = format!("{side}.block.{i}.layer.{n}.{attention}");
                for name in ["q", "k", "v"] {
                    tensors.push(tensor(format!("{at}.{name}.weight"), &[inner, hidden]));
                }
                tensors.push(tensor(format!("{at}.o.weight"), &[hidden, inner]));
            }
        }
    }
    let config = r#"{"model_type": "t5", "d_model": 1024, "d_kv": 128, "num_heads": 128, "num_layers": 24,
        "num_decoder_layers": 24, "is_encoder_decoder": true, "vocab_size": 32128}"#;
    let own = layers * 512 * 2 * inner * 2;
    let logits = vocabulary * 4;
    assert_eq!(own + logits, 805_434_880);
    assert_eq!(
        kept(&tensors, config, &[("context", "512")]),
        2 * own + logits
    );
    let longer = [("context", "512"), ("encoder-context", "2048")];
    assert_eq!(kept(&tensors, config, &longer), 5 * own + logits);
    let whisper = config.replace("\"d_kv\"", "\"max_source_positions\": 1024, \"d_kv\"");
    assert_eq!(
        kept(&tensors, &whisper, &[("context", "512")]),
        3 * own + logits
    );
    assert!(warnings(&tensors, config).is_empty());
    let cross = notes(&tensors, config, &[("context", "512")]);
    assert!(
        cross[0].1.contains("512 tokens of the encoder"),
        "{cross:?}"
    );
}

#[test]
fn heads_need_not_be_stated() {
    // Gemma-3-4b leaves out what transformers has as defaults.
    let vocabulary = 262_208;
    let mut tensors = vec![tensor(
        "language_model.model.embed_tokens.weight",
        &[vocabulary, 2560],
    )];
    for i in 0..34 {
        let at = format!("language_model.model.layers.{i}.self_attn.");
        tensors.extend(attention_of(&at, 2048, 1024, 2560));
    }
    let config = r#"{"model_type": "gemma3", "text_config": {"hidden_size": 2560, "model_type": "gemma3_text",
        "num_hidden_layers": 34, "sliding_window": 1024}}"#;
    assert_eq!(kept(&tensors, config, &[("context", "32768")]), 793_772_288);
    assert!(warnings(&tensors, config).is_empty());
}

#[test]
fn one_head_of_keys_serves_many_of_queries() {
    // Falcon-7B: `num_kv_heads` says 71, and there is one.
    let mut tensors = vec![tensor("transformer.embed_tokens.weight", &[65_024, 4544])];
    for i in 0..32 {
        let name = format!("transformer.h.{i}.self_attention.query_key_value.weight");
        tensors.push(tensor(name, &[4672, 4544]));
    }
    let config = r#"{"model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32,
        "num_attention_heads": 71, "num_kv_heads": 71, "multi_query": true, "new_decoder_architecture": false,
        "vocab_size": 65024}"#;
    let context = [("context", "2048")];
    assert_eq!(kept(&tensors, config, &context), 17_037_312);
    assert!(warnings(&tensors, config).is_empty());
    for i in 0..32 {
        let name = format!("transformer.h.{i}.self_attention.dense.weight");
        tensors.push(tensor(name, &[4544, 4544]));
    }
    assert_eq!(kept(&tensors, "{}", &context), 17_037_312);
}

#[test]
fn lightning_attention_keeps_no_keys() {
    let kinds: Vec<String> = (1..=80).map(|i| u8::from(i % 8 == 0).to_string()).collect();
    let config = format!(
        r#"{{"model_type": "minimax_text_01", "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "attn_type_list": [{}]}}"#,
        kinds.join(",")
    );
    let mut tensors = vec![tensor("lm_head.weight", &[200_064, 6144])];
    for i in 0..80 {
        tensors.extend(layer(i, &[("self_attn.o_proj", [6144, 8192])]));
    }
    let context = [("context", "32768")];
    assert_eq!(kept(&tensors, &config, &context), 1_342_977_536);
    // As published, with the matrices that make keys and values: the others have a state.
    for i in 0..80 {
        tensors.extend(match i % 8 {
            7 => layer(
                i,
                &[
                    ("self_attn.k_proj", [1024, 6144]),
                    ("self_attn.v_proj", [1024, 6144]),
                ],
            ),
            _ => layer(
                i,
                &[
                    ("self_attn.qkv_proj", [24_576, 6144]),
                    ("self_attn.out_proj", [6144, 8192]),
                ],
            ),
        });
    }
    let states = 70 * 64 * 128 * 128 * 4;
    assert_eq!(kept(&tensors, &config, &context), 1_342_977_536 + states);
}

#[test]
fn a_window_is_only_where_it_is_known_to_be() {
    // Llama 4 Scout: every fourth layer sees everything, though nothing in config.json says so.
    let mut tensors = vec![tensor(
        "language_model.model.embed_tokens.weight",
        &[202_048, 5120],
    )];
    for i in 0..48 {
        let at = format!("language_model.model.layers.{i}.self_attn.");
        tensors.extend(attention_of(&at, 5120, 1024, 5120));
    }
    let config = r#"{"model_type": "llama4", "text_config": {"model_type": "llama4_text", "hidden_size": 5120,
        "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 202048, "attention_chunk_size": 8192, "no_rope_layers": []}}"#;
    assert_eq!(
        kept(&tensors, config, &[("context", "131072")]),
        7_651_218_688
    );
    // A window of a family that is not known is nobody's.
    let unknown = r#"{"model_type": "new", "sliding_window": 10}"#;
    let everything = 48 * 100 * 4096 + 202_048 * 4;
    assert_eq!(kept(&tensors, unknown, &[("context", "100")]), everything);
    let warnings = warnings(&tensors, unknown);
    assert!(warnings[0].contains("window of 10 tokens"), "{warnings:?}");
}

#[test]
fn layers_see_what_config_json_says() {
    const ALL: u64 = 1000;
    const STATE: u64 = 0;
    for (config, expected) in [
        (r#""x": 0"#, vec![ALL, ALL, ALL, ALL]),
        (
            r#""full_attention_interval": 4"#,
            vec![STATE, STATE, STATE, ALL],
        ),
        (
            r#""layer_types": ["linear_attention", "full_attention", "sliding_attention"], "sliding_window": 100"#,
            vec![STATE, ALL, 100],
        ),
        (
            r#""layer_types": ["chunked_attention"], "attention_chunk_size": 8192"#,
            vec![8192],
        ),
        (r#""layer_types": ["sliding_attention"]"#, vec![ALL]),
        (
            r#""layers_block_type": ["mamba", "attention"]"#,
            vec![STATE, ALL],
        ),
        (
            r#""block_types": ["recurrent", "recurrent", "attention"], "attention_window_size": 10"#,
            vec![STATE, STATE, ALL, STATE],
        ),
        (
            r#""attn_layer_period": 3, "attn_layer_offset": 1"#,
            vec![STATE, ALL, STATE, STATE, ALL],
        ),
        (
            r#""hybrid_override_pattern": "M*-""#,
            vec![STATE, ALL, STATE, STATE],
        ),
        (
            r#""sliding_window": 64, "model_type": "mistral""#,
            vec![64, 64],
        ),
        (r#""sliding_window": 64"#, vec![ALL, ALL]),
        (
            r#""sliding_window": null, "model_type": "mistral""#,
            vec![ALL, ALL],
        ),
        (
            r#""sliding_window": 64, "use_sliding_window": false"#,
            vec![ALL, ALL],
        ),
        (
            r#""sliding_window": 64, "model_type": "qwen2", "max_window_layers": 1"#,
            vec![ALL, ALL],
        ),
        (
            r#""sliding_window": 64, "use_sliding_window": true, "max_window_layers": 1"#,
            vec![ALL, 64],
        ),
        (
            r#""sliding_window": 64, "sliding_window_pattern": 3"#,
            vec![64, 64, ALL, 64],
        ),
        (
            r#""sliding_window": 64, "_sliding_window_pattern": 2"#,
            vec![64, ALL],
        ),
        (
            r#""sliding_window": 64, "sliding_window_pattern": "LLG""#,
            vec![64, 64, ALL, 64],
        ),
        (
            r#""sliding_window": 64, "model_type": "gemma2""#,
            vec![64, ALL, 64],
        ),
        (
            r#""sliding_window": 64, "hybrid_layer_pattern": [0, 1, 1]"#,
            vec![ALL, 64, 64],
        ),
        (
            r#""sliding_window": [null, 64, 32]"#,
            vec![ALL, 64, 32, ALL],
        ),
        (
            r#""sliding_window": 64, "global_attn_idx": [1]"#,
            vec![64, ALL, 64],
        ),
        (
            r#""sliding_window": 64, "swa_layers": [1]"#,
            vec![ALL, 64, ALL],
        ),
        (
            r#""sliding_window": 64, "global_attn_every_n_layers": 2"#,
            vec![64, ALL, 64],
        ),
        (
            r#""attention_chunk_size": 64, "no_rope_layers": [1, 0]"#,
            vec![64, ALL, ALL],
        ),
        (
            r#""attention_chunk_size": 64, "no_rope_layer_interval": 2"#,
            vec![64, ALL, 64],
        ),
        (
            r#""attention_types": [[["global", "local"], 2]], "window_size": 256"#,
            vec![ALL, 256, ALL, 256],
        ),
        (r#""attn_type_list": [0, 1]"#, vec![STATE, ALL]),
        (r#""full_attn_idxs": [1]"#, vec![STATE, ALL]),
        (
            r#""linear_attn_config": {"full_attn_layers": [2]}"#,
            vec![STATE, ALL],
        ),
        (
            r#""num_hidden_layers": 3, "num_kv_shared_layers": 1"#,
            vec![ALL, ALL, 1],
        ),
        (
            r#""model_type": "recurrent_gemma", "block_types": ["recurrent", "attention"], "attention_window_size": 64"#,
            vec![STATE, 64, STATE, 64],
        ),
        (
            r#""layer_group_size": 2, "num_hidden_layers": 5"#,
            vec![STATE, ALL, STATE, ALL, ALL],
        ),
        (
            r#""model_type": "gla", "attn": {"layers": [1]}"#,
            vec![STATE, ALL, STATE],
        ),
        (r#""model_type": "retnet", "attn": null"#, vec![STATE]),
        (r#""attn_config": {"sliding_window_size": 10}"#, vec![ALL]),
    ] {
        let root = config::parse(&format!("{{{config}}}"));
        let windows = Windows::of(&root);
        let sights = (0..expected.len() as u64).map(|layer| match windows.sight(layer) {
            Sight::Everything => ALL,
            Sight::Window(10) => ALL,
            Sight::Window(tokens) => tokens,
            Sight::State => STATE,
            Sight::Shared => 1,
        });
        assert_eq!(sights.collect::<Vec<u64>>(), expected, "{config}");
    }
}

#[test]
fn keys_and_values_are_found_in_every_arrangement() {
    let hidden = 96;
    // Three heads of 32 and one of keys: 32 elements of keys and as many of values.
    let kv = 64;
    for (matrices, elements) in [
        (
            vec![
                ("self_attn.k_proj", [32, hidden]),
                ("self_attn.v_proj", [32, hidden]),
            ],
            kv,
        ),
        (
            vec![
                ("self_attn.k_proj", [48, hidden]),
                ("self_attn.v_proj", [16, hidden]),
            ],
            kv,
        ),
        // Queries alone: the keys are those of another layer.
        (
            vec![("attn.Wqkv", [96, hidden]), ("attn.out_proj", [hidden, 96])],
            0,
        ),
        // Keys are values too.
        (
            vec![
                ("self_attn.q_proj", [96, hidden]),
                ("self_attn.k_proj", [32, hidden]),
            ],
            kv,
        ),
        (
            vec![
                ("attn.qkv_proj", [160, hidden]),
                ("attn.out_proj", [hidden, 96]),
            ],
            kv,
        ),
        (
            vec![
                ("attn.Wqkv", [160, hidden]),
                ("attn.out_proj", [hidden, 96]),
            ],
            kv,
        ),
        (
            vec![
                ("attention.wqkv", [160, hidden]),
                ("attention.wo", [hidden, 96]),
            ],
            kv,
        ),
        (
            vec![
                ("self_attn.W_pack", [288, hidden]),
                ("self_attn.o_proj", [hidden, 96]),
            ],
            192,
        ),
        (vec![("attention.query_key_value", [288, hidden])], 192),
        (
            vec![
                ("attn.c_attn", [160, hidden]),
                ("attn.c_proj", [hidden, 96]),
            ],
            kv,
        ),
        // Conv1D: rows are inputs.
        (
            vec![
                ("attn.c_attn", [hidden, 288]),
                ("attn.c_proj", [96, hidden]),
            ],
            192,
        ),
        (
            vec![
                ("attention.self.key", [32, hidden]),
                ("attention.self.value", [32, hidden]),
            ],
            kv,
        ),
        (
            vec![
                ("attn.kv_proj", [64, hidden]),
                ("attn.q_proj", [96, hidden]),
            ],
            kv,
        ),
        // Two in one layer.
        (
            vec![
                ("self_attn.0.k_proj", [32, hidden]),
                ("self_attn.0.v_proj", [32, hidden]),
                ("self_attn.1.k_proj", [32, hidden]),
                ("self_attn.1.v_proj", [32, hidden]),
            ],
            2 * kv,
        ),
        // The keys of another layer are used, or there is no attention.
        (
            vec![
                ("self_attn.q_proj", [96, hidden]),
                ("self_attn.o_proj", [hidden, 96]),
            ],
            0,
        ),
        (vec![("mlp.up_proj", [96, hidden])], 0),
        (
            vec![("ffn.key", [96, hidden]), ("ffn.value", [96, hidden])],
            0,
        ),
    ] {
        let tensors = layer(0, &matrices);
        let bytes = kept(&tensors, "{}", &[("context", "10"), ("batch", "3")]);
        assert_eq!(bytes, elements * 2 * 10 * 3, "{matrices:?}");
    }
}

#[test]
fn latent_attention_is_counted_expanded_or_compressed() {
    // 4 heads of 12 + 8 for keys, 16 for values.
    let tensors = layer(
        0,
        &[
            ("self_attn.q_a_proj", [48, 64]),
            ("self_attn.q_b_proj", [80, 48]),
            ("self_attn.kv_a_proj_with_mqa", [40, 64]),
            ("self_attn.kv_b_proj", [4 * 28, 32]),
            ("self_attn.o_proj", [64, 64]),
        ],
    );
    let config = r#"{"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32,
        "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16}"#;
    for config in [config, "{}"] {
        assert_eq!(
            kept(&tensors, config, &[("context", "10")]),
            (80 + 64) * 2 * 10
        );
        let compressed = [("context", "10"), ("latent-cache", "compressed")];
        assert_eq!(kept(&tensors, config, &compressed), 40 * 2 * 10);
        assert!(warnings(&tensors, config).is_empty());
    }
    let notes = notes(&tensors, config, &[("context", "10")]);
    assert!(notes[0].1.contains("counted expanded"), "{notes:?}");
}

#[test]
fn recurrent_states_are_counted_for_each_sequence() {
    let named = |name: &str, shape: &[u64]| tensor(format!("model.layers.0.{name}"), shape);
    for (tensors, config, state) in [
        // Mamba.
        (
            vec![
                named("mixer.A_log", &[128, 16]),
                named("mixer.D", &[128]),
                named("mixer.conv1d.weight", &[128, 1, 4]),
                named("mixer.in_proj.weight", &[256, 64]),
                named("mixer.out_proj.weight", &[64, 128]),
            ],
            "{}",
            128 * 16 * 4 + 128 * 4 * 2,
        ),
        // Mamba 2: 8 heads of 16 with 32 states in two groups.
        (
            vec![
                named("mamba.A_log", &[8]),
                named("mamba.D", &[8]),
                named("mamba.conv1d.weight", &[128 + 2 * 2 * 32, 1, 4]),
                named("mamba.in_proj.weight", &[2 * 128 + 2 * 2 * 32 + 8, 64]),
                named("mamba.out_proj.weight", &[64, 128]),
            ],
            r#"{"mamba_n_groups": 2}"#,
            128 * 32 * 4 + 256 * 4 * 2,
        ),
        // Gated delta net: 4 heads of values of 16, 2 of keys.
        (
            vec![
                named("linear_attn.A_log", &[4]),
                named("linear_attn.conv1d.weight", &[128, 1, 4]),
                named("linear_attn.in_proj_qkvz.weight", &[192, 64]),
                named("linear_attn.out_proj.weight", &[64, 64]),
            ],
            r#"{"linear_key_head_dim": 16}"#,
            4 * 16 * 16 * 4 + 128 * 4 * 2,
        ),
        // Kimi's: keys and values by themselves.
        (
            vec![
                named("self_attn.A_log", &[1, 1, 4, 1]),
                named("self_attn.q_conv1d.weight", &[64, 1, 4]),
                named("self_attn.k_conv1d.weight", &[64, 1, 4]),
                named("self_attn.v_conv1d.weight", &[64, 1, 4]),
                named("self_attn.q_proj.weight", &[64, 64]),
                named("self_attn.k_proj.weight", &[64, 64]),
                named("self_attn.v_proj.weight", &[64, 64]),
                named("self_attn.o_proj.weight", &[64, 64]),
            ],
            "{}",
            4 * 16 * 16 * 4 + 3 * 64 * 4 * 2,
        ),
        // LFM2: a short convolution.
        (
            vec![
                named("conv.conv.weight", &[64, 1, 3]),
                named("conv.in_proj.weight", &[192, 64]),
                named("conv.out_proj.weight", &[64, 64]),
            ],
            "{}",
            64 * 3 * 2,
        ),
    ] {
        for (context, batch) in [("1", 1), ("100000", 3)] {
            let settings = [("context", context), ("batch", &batch.to_string())];
            assert_eq!(
                kept(&tensors, config, &settings),
                state * batch,
                "{tensors:?}"
            );
        }
    }
}

#[test]
fn a_model_without_attention_needs_no_cache() {
    let tensors = layer(0, &[("mlp.up_proj", [64, 64]), ("mlp.down_proj", [64, 64])]);
    for config in ["{}", "", "[]", "null", r#"{"model_type": "mlp"}"#] {
        assert_eq!(kept(&tensors, config, &[("context", "100")]), 0, "{config}");
    }
    let without_layers = [tensor("a.weight", &[64, 64])];
    assert_eq!(kept(&without_layers, "{}", &[("context", "100")]), 0);
}

#[test]
fn attention_of_unknown_width_is_refused() {
    let tensors = layer(0, &[("self_attn.o_proj", [64, 64])]);
    for config in [
        "{}",
        r#"{"num_attention_heads": -1}"#,
        r#"{"num_attention_heads": 0, "hidden_size": 64}"#,
    ] {
        assert!(headroom(&tensors, config, &[]).is_ok());
        let refusal = headroom(&tensors, config, &[("context", "1")]).unwrap_err();
        assert_eq!(refusal.reason, RefusalReason::Unsupported);
        assert!(refusal.message.contains("`reserve`"), "{}", refusal.message);
        assert!(
            refusal.message.contains("model.layers.0.self_attn"),
            "{}",
            refusal.message
        );
    }
    let config = r#"{"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}"#;
    assert_eq!(kept(&tensors, config, &[("context", "1")]), 2 * 2 * 16 * 2);
}

#[test]
fn packed_matrices_tell_by_their_rows_scales_or_biases() {
    let name = |leaf: &str| format!("model.layers.0.self_attn.k_proj.{leaf}");
    let packed = |leaf: &str, shape: &[u64]| Tensor::new(name(leaf), Dtype::I32, shape);
    for tensors in [
        vec![packed("weight_packed", &[32, 8])],
        vec![
            packed("qweight", &[8, 32]),
            tensor(name("scales"), &[1, 32]),
        ],
        vec![packed("qweight", &[64, 4]), tensor(name("bias"), &[32])],
    ] {
        assert_eq!(
            kept(&tensors, "{}", &[("context", "1")]),
            2 * 32 * 2,
            "{tensors:?}"
        );
    }
}

#[test]
fn shapes_win_over_config_json() {
    let tensors = layer(
        0,
        &[
            ("self_attn.k_proj", [32, 64]),
            ("self_attn.v_proj", [32, 64]),
        ],
    );
    let config = |heads: u64| format!(r#"{{"num_attention_heads": {heads}, "head_dim": 8}}"#);
    assert_eq!(kept(&tensors, &config(8), &[("context", "1")]), 128);
    assert!(warnings(&tensors, &config(4)).is_empty());
    let warnings = warnings(&tensors, &config(8));
    assert!(
        warnings[0].contains("128 bytes for a token in layer 0: config.json would make it 256"),
        "{warnings:?}"
    );
}

#[test]
fn layers_of_a_kind_that_is_not_known_see_everything() {
    let tensors = layer(0, &[("self_attn.k_proj", [32, 64])]);
    let config = r#"{"layer_types": ["wavy"], "sliding_window": 5}"#;
    assert_eq!(
        kept(&tensors, config, &[("context", "100")]),
        2 * 32 * 2 * 100
    );
    let warnings = warnings(&tensors, config);
    assert!(warnings[0].contains("\"wavy\""), "{warnings:?}");
}

#[test]
fn encoders_towers_and_prediction_heads_keep_no_cache() {
    let mut tensors = qwen3_5_moe(Shape { layers: 4, ..TINY }, 2);
    let config = r#"{"text_config": {"full_attention_interval": 4, "vocab_size": 1, "num_hidden_layers": 4}}"#;
    // Three gated delta nets: 4 heads of 32 by 32, and what a convolution looks back at.
    let state = 4 * 32 * 32 * 4 + 256 * 4 * 2;
    let bytes = kept(&tensors, config, &[("context", "10")]);
    assert_eq!(bytes, 3 * state + 10 * 2 * 64 * 2 + 4);
    // DeepSeek has the layers for multi-token prediction behind its own.
    tensors = (0..5)
        .flat_map(|i| layer(i, &[("self_attn.k_proj", [8, 8])]))
        .collect();
    let config = r#"{"num_hidden_layers": 4}"#;
    assert_eq!(
        kept(&tensors, config, &[("context", "10")]),
        4 * 10 * 2 * 8 * 2
    );
    // distil-whisper: more layers in the encoder than in the decoder.
    tensors.clear();
    for (side, layers) in [("encoder", 5), ("decoder", 2)] {
        for i in 0..layers {
            tensors.extend(attention_of(
                &format!("model.{side}.layers.{i}.self_attn."),
                8,
                8,
                8,
            ));
        }
    }
    let config = r#"{"num_hidden_layers": 1, "encoder_layers": 5, "decoder_layers": 2}"#;
    assert_eq!(
        kept(&tensors, config, &[("context", "10")]),
        2 * 10 * 2 * 8 * 2
    );
}

#[test]
fn shared_layers_keep_nothing_and_borrowed_ones_their_own() {
    let all: Vec<Tensor> = (0..4)
        .flat_map(|i| layer(i, &[("self_attn.k_proj", [8, 8])]))
        .collect();
    let config = r#"{"num_hidden_layers": 4, "num_kv_shared_layers": 3}"#;
    assert_eq!(kept(&all, config, &[("context", "10")]), 10 * 2 * 8 * 2);
    // Zamba: one attention that several layers use, each with a cache of its own.
    let mut tensors = layer(0, &[("shared.self_attn.k_proj", [8, 8])]);
    tensors.extend((1..4).flat_map(|i| layer(i, &[("up", [8, 8])])));
    let config = r#"{"layers_block_type": ["hybrid", "mamba", "hybrid", "mamba"]}"#;
    assert_eq!(
        kept(&tensors, config, &[("context", "10")]),
        2 * 10 * 2 * 8 * 2
    );
}

#[test]
fn headroom_is_where_the_layers_are_and_logits_where_the_head_is() {
    let mut request = request(
        llama(Shape { layers: 4, ..TINY }),
        sims(&[8 * MIB, 8 * MIB]),
    );
    request.config_json = r#"{"num_hidden_layers": 4, "vocab_size": 256}"#.into();
    let request = with(
        request,
        &[("context", "100"), ("batch", "2"), ("reserve", "1000")],
    );
    let proposal = plan(&request, Arrangement::Spread).unwrap();
    let logits = 256 * 2 * 4;
    let layer = 256 * 100 * 2;
    assert_eq!(
        proposal.headroom.iter().sum::<u64>(),
        2000 + 4 * layer + logits
    );
    assert_eq!(proposal.headroom[0], 1000 + 2 * layer);
}

#[test]
fn logits_of_a_tied_head_are_where_the_embedding_is() {
    let mut request = request(vec![], sims(&[8 * MIB, 8 * MIB]));
    request.tensors = llama(Shape { layers: 4, ..TINY });
    request
        .tensors
        .retain(|tensor| !tensor.name.contains("attn"));
    tie(&mut request, true);
    let proposal = plan(&with(request, &[("context", "1")]), Arrangement::Spread).unwrap();
    assert_eq!(proposal.headroom, [256 * 4, 0]);
}

#[test]
fn a_cache_takes_part_in_the_balance() {
    // The cache of the one layer with attention outweighs everything else.
    let mut request = request(
        llama(Shape { layers: 4, ..TINY }),
        sims(&[64 * MIB, 64 * MIB]),
    );
    let has_attention = |name: &str| name.contains("layers.0") || !name.contains("attn");
    request.tensors.retain(|tensor| has_attention(&tensor.name));
    let names: Vec<String> = request
        .tensors
        .iter()
        .map(|tensor| tensor.name.clone())
        .collect();
    let proposal = plan(
        &with(request, &[("context", "150000")]),
        Arrangement::Spread,
    )
    .unwrap();
    for (name, placement) in names.iter().zip(proposal.placements) {
        let alone = name.contains("layers.0") || name.contains("embed");
        assert_eq!(placement.device, Some(u32::from(!alone)), "{name}");
    }
}

#[test]
fn hostile_configurations_do_not_crash() {
    let deep = "[".repeat(100_000);
    let max = u64::MAX;
    for config in [
        deep.as_str(),
        &format!("{{\"num_attention_heads\": {max}, \"head_dim\": {max}}}"),
        r#"{"num_attention_heads": 0, "hidden_size": 64}"#,
        r#"{"full_attention_interval": 0, "attn_layer_period": 0}"#,
        r#"{"sliding_window": 1, "sliding_window_pattern": 0}"#,
        r#"{"sliding_window": 1, "sliding_window_pattern": ""}"#,
        r#"{"sliding_window": -1, "layer_types": 7}"#,
        r#"{"sliding_window": [], "layer_types": []}"#,
        &format!(r#"{{"layer_types": [1, null, {{}}], "vocab_size": {max}}}"#),
        &format!(
            r#"{{"attention_types": [[["a"], {max}], 3, [], [[], {max}]], "window_size": 4}}"#
        ),
        &format!(r#"{{"linear_attn_config": {{"full_attn_layers": [{max}, -1, "x"]}}}}"#),
        &format!(r#"{{"num_kv_shared_layers": {max}, "num_hidden_layers": {max}}}"#),
        r#"{"attn_config": [], "text_config": [], "thinker_config": {}, "decoder": {}}"#,
        "{\"x\": \"\\\"Infinity\\ud800\"}",
    ] {
        let mut request = request(llama(TINY), sims(&[GIB]));
        request.config_json = config.into();
        let most = &[("context", "4294967295"), ("batch", "4294967295")];
        let _ = plan(&with(request, most), Arrangement::Spread);
    }
    let shapes: [&[u64]; 5] = [&[], &[0, 0], &[max, 0], &[1, max], &[0, 1, max]];
    let names = [
        "self_attn.k_proj.weight",
        "attn.c_attn.weight",
        "mixer.A_log",
        "mixer.D",
        "mixer.conv1d.weight",
        "a.kv_a_proj_with_mqa.weight",
    ];
    for shape in shapes {
        let mut tensors: Vec<Tensor> = Vec::new();
        for name in names {
            tensors.push(Tensor {
                name: format!("model.layers.0.{name}"),
                dtype: Dtype::Bf16,
                shape: shape.into(),
                bytes: 0,
                quantized: None,
            });
        }
        let _ = headroom(
            &tensors,
            "{}",
            &[("context", "4294967295"), ("batch", "4294967295")],
        );
    }
}

/// Attention as its inventors describe it: heads, not matrices.
struct Heads {
    queries: u64,
    keys: u64,
    size: u64,
}

#[test]
fn random_geometries_are_counted_as_heads_are() {
    for seed in 0..500 {
        let mut random = Random(seed);
        let layers = 1 + random.below(6);
        let hidden = 64 * (1 + random.below(4));
        let (context, batch) = (1 + random.below(5000), 1 + random.below(4));
        let window = 1 + random.below(6000);
        let mut tensors = vec![];
        let mut kinds = vec![];
        let mut expected = 0u64;
        for i in 0..layers {
            // Layers need not be alike.
            let keys = random.one_of(&[1, 2, 4, 8]);
            let heads = Heads {
                queries: keys * random.one_of(&[1, 2, 4]),
                keys,
                size: random.one_of(&[16, 64, 80, 128]),
            };
            let (q, kv) = (heads.queries * heads.size, heads.keys * heads.size);
            let kind = random.one_of(&["full_attention", "sliding_attention", "none"]);
            kinds.push(format!("{kind:?}"));
            if kind != "none" {
                let all = q + 2 * kv;
                let matrices: Vec<(&str, [u64; 2])> = match random.below(6) {
                    0 => vec![("attn.Wqkv", [all, hidden]), ("attn.out_proj", [hidden, q])],
                    1 => vec![
                        ("self_attention.query_key_value", [all, hidden]),
                        ("self_attention.dense", [hidden, q]),
                    ],
                    2 => vec![
                        ("self_attn.qkv_proj", [all, hidden]),
                        ("self_attn.o_proj", [hidden, q]),
                    ],
                    3 => vec![
                        ("attention.wq", [q, hidden]),
                        ("attention.wk", [kv, hidden]),
                        ("attention.wv", [kv, hidden]),
                    ],
                    4 => vec![
                        ("attn.kv_proj", [2 * kv, hidden]),
                        ("attn.q_proj", [q, hidden]),
                    ],
                    _ => vec![
                        ("self_attn.q_proj", [q, hidden]),
                        ("self_attn.k_proj", [kv, hidden]),
                        ("self_attn.v_proj", [kv, hidden]),
                        ("self_attn.o_proj", [hidden, q]),
                    ],
                };
                tensors.extend(layer(i, &matrices));
                let remembered = match kind {
                    "sliding_attention" => (1..=context)
                        .filter(|token| *token + window > context)
                        .count() as u64,
                    _ => context,
                };
                for _sequence in 0..batch {
                    for _head in 0..heads.keys {
                        // A key and a value, of two bytes an element.
                        expected += remembered * (2 * heads.size + 2 * heads.size);
                    }
                }
            }
            tensors.extend(layer(i, &[("mlp.up_proj", [hidden, hidden])]));
        }
        let config = format!(
            r#"{{"layer_types": [{}], "sliding_window": {window}}}"#,
            kinds.join(", ")
        );
        let settings = [
            ("context", &*context.to_string()),
            ("batch", &*batch.to_string()),
        ];
        assert_eq!(
            kept(&tensors, &config, &settings),
            expected,
            "{seed}: {config} {tensors:?}"
        );
    }
}
