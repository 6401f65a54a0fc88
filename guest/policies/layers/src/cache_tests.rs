use tightfit_guest::RefusalReason;

use super::*;
use crate::fixtures::*;
use crate::{Arrangement, plan};

fn cache(config: &str, context: u32, batch: u32) -> Cache {
    let request = with(
        request(vec![], vec![]),
        &[
            ("context", &context.to_string()),
            ("batch", &batch.to_string()),
        ],
    );
    Cache::read(config, &Options::read(&request).unwrap()).unwrap()
}

fn tokens(config: &str, layers: u64) -> Vec<u64> {
    let cache = cache(config, 1000, 1);
    (0..layers)
        .map(|layer| cache.layer_bytes(layer) / cache.token)
        .collect()
}

const HEADS: &str = r#""num_attention_heads": 4, "head_dim": 8"#;

#[test]
fn a_token_takes_keys_and_values_of_the_kv_heads() {
    for (config, bytes) in [
        (
            r#"{"num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584}"#,
            2048,
        ),
        (
            r#"{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}"#,
            2048,
        ),
        (r#"{"n_head": 12, "n_embd": 768}"#, 3072),
        (
            r#"{"num_attention_heads": 71, "multi_query": true, "hidden_size": 4544}"#,
            256,
        ),
        (
            r#"{"vision_config": {}, "text_config": {"num_attention_heads": 2, "head_dim": 8}}"#,
            64,
        ),
        (
            r#"{"num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512,
                "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}"#,
            128 * (192 + 128) * 2,
        ),
    ] {
        assert_eq!(cache(config, 1, 1).token, bytes, "{config}");
    }
    assert_eq!(
        cache(&format!("{{{HEADS}}}"), 1000, 3).layer_bytes(7),
        3000 * 128
    );
}

#[test]
fn only_full_attention_grows_without_end() {
    for (rest, expected) in [
        (r#""x": 0"#, vec![1000, 1000, 1000, 1000]),
        (r#""full_attention_interval": 4"#, vec![0, 0, 0, 1000]),
        (
            r#""layer_types": ["linear_attention", "full_attention", "sliding_attention"],
               "sliding_window": 100"#,
            vec![0, 1000, 100, 100],
        ),
        (
            r#""layer_types": ["chunked_attention"], "attention_chunk_size": 8192"#,
            vec![1000],
        ),
        (
            r#""layers_block_type": ["mamba", "attention"]"#,
            vec![0, 1000],
        ),
        (
            r#""attn_layer_period": 3, "attn_layer_offset": 1"#,
            vec![0, 1000, 0, 0, 1000],
        ),
        (r#""hybrid_override_pattern": "M*-""#, vec![0, 1000, 0, 0]),
        (r#""sliding_window": 64"#, vec![64, 64]),
        (r#""sliding_window": null"#, vec![1000, 1000]),
        (
            r#""sliding_window": 64, "use_sliding_window": false"#,
            vec![1000, 1000],
        ),
        (
            r#""sliding_window": 64, "use_sliding_window": true, "max_window_layers": 1"#,
            vec![1000, 64],
        ),
        (
            r#""sliding_window": 64, "sliding_window_pattern": 3"#,
            vec![64, 64, 1000, 64],
        ),
        (
            r#""sliding_window": 64, "sliding_window_pattern": "LLG""#,
            vec![64, 64, 1000, 64],
        ),
        (
            r#""sliding_window": 64, "model_type": "gemma2""#,
            vec![64, 1000, 64],
        ),
        (r#""num_hidden_layers": 1"#, vec![1000, 0]),
    ] {
        let config = format!("{{{HEADS}, {rest}}}");
        assert_eq!(tokens(&config, expected.len() as u64), expected, "{config}");
    }
}

#[test]
fn headroom_is_where_the_layers_are_and_logits_where_the_head_is() {
    let mut request = request(
        llama(Shape { layers: 4, ..TINY }),
        sims(&[8 * MIB, 8 * MIB]),
    );
    request.config_json = format!("{{{HEADS}, \"num_hidden_layers\": 4, \"vocab_size\": 256}}");
    let request = with(
        request,
        &[("context", "100"), ("batch", "2"), ("reserve", "1000")],
    );
    let proposal = plan(&request, Arrangement::Spread).unwrap();
    let logits = 256 * 2 * 4;
    let layer = 128 * 100 * 2;
    assert_eq!(
        proposal.headroom.iter().sum::<u64>(),
        2000 + 4 * layer + logits
    );
    assert_eq!(proposal.headroom[0], 1000 + 2 * layer);
}

#[test]
fn logits_of_a_tied_head_are_where_the_embedding_is() {
    let mut request = request(
        llama(Shape { layers: 4, ..TINY }),
        sims(&[8 * MIB, 8 * MIB]),
    );
    request.config_json =
        format!("{{{HEADS}, \"layer_types\": [\"conv\", \"conv\", \"conv\", \"conv\"]}}");
    tie(&mut request, true);
    let proposal = plan(&with(request, &[("context", "1")]), Arrangement::Spread).unwrap();
    assert_eq!(proposal.headroom, [256 * 4, 0]);
}

#[test]
fn towers_and_prediction_heads_keep_no_cache() {
    let mut request = request(
        qwen3_5_moe(Shape { layers: 4, ..TINY }, 2),
        sims(&[64 * MIB]),
    );
    request.config_json = format!(
        "{{\"text_config\": {{{HEADS}, \"full_attention_interval\": 4, \"vocab_size\": 1}}}}"
    );
    let proposal = plan(&with(request, &[("context", "10")]), Arrangement::Spread).unwrap();
    assert_eq!(proposal.headroom, [10 * 128 + 4]);
}

#[test]
fn a_cache_takes_part_in_the_balance() {
    // The cache of the one full layer outweighs everything else.
    let mut request = request(
        llama(Shape { layers: 4, ..TINY }),
        sims(&[64 * MIB, 64 * MIB]),
    );
    request.config_json =
        format!("{{{HEADS}, \"layer_types\": [\"full_attention\", \"conv\", \"conv\", \"conv\"]}}");
    let names: Vec<String> = request
        .tensors
        .iter()
        .map(|tensor| tensor.name.clone())
        .collect();
    let proposal = plan(
        &with(request, &[("context", "300000")]),
        Arrangement::Spread,
    )
    .unwrap();
    for (name, placement) in names.iter().zip(proposal.placements) {
        let alone = name.contains("layers.0") || name.contains("embed");
        assert_eq!(placement.device, Some(u32::from(!alone)), "{name}");
    }
}

#[test]
fn without_geometry_the_context_is_refused_and_the_rest_goes_on() {
    for config in [
        "{}",
        "",
        "[]",
        "null",
        "{\"num_attention_heads\": -1}",
        "{\"x\": 1e999}",
    ] {
        let mut request = request(llama(TINY), sims(&[GIB]));
        request.config_json = config.into();
        assert!(plan(&request, Arrangement::Spread).is_ok(), "{config}");
        let refusal = plan(&with(request, &[("context", "1")]), Arrangement::Spread).unwrap_err();
        assert_eq!(refusal.reason, RefusalReason::Unsupported);
        assert!(refusal.message.contains("`reserve`"), "{}", refusal.message);
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
        &format!("{{{HEADS}, \"full_attention_interval\": 0, \"attn_layer_period\": 0}}"),
        &format!("{{{HEADS}, \"sliding_window\": 1, \"sliding_window_pattern\": 0}}"),
        &format!("{{{HEADS}, \"sliding_window\": 1, \"sliding_window_pattern\": \"\"}}"),
        &format!("{{{HEADS}, \"sliding_window\": -1, \"layer_types\": 7}}"),
        &format!("{{{HEADS}, \"layer_types\": [1, null, {{}}], \"vocab_size\": {max}}}"),
        &format!("{{{HEADS}, \"text_config\": [], \"thinker_config\": {{}}}}"),
        "{\"x\": \"\\\"Infinity\\ud800\"}",
    ] {
        let mut request = request(llama(TINY), sims(&[GIB]));
        request.config_json = config.into();
        let most = &[("context", "4294967295"), ("batch", "4294967295")];
        let _ = plan(&with(request, most), Arrangement::Spread);
    }
}

#[test]
fn pythons_constants_are_read_as_null() {
    for (json, expected) in [
        ("[NaN, Infinity, -Infinity, -1]", "[null, null, null, -1]"),
        (
            r#"{"NaN": "Infinity", "\"": NaN}"#,
            r#"{"NaN": "Infinity", "\"": null}"#,
        ),
        (r#"["\\", NaN]"#, r#"["\\", null]"#),
        ("\"é\u{1F600}", "\"é\u{1F600}"),
    ] {
        assert_eq!(without_python_constants(json), expected);
    }
    let config = format!("{{{HEADS}, \"time_step_limit\": [0.0, Infinity]}}");
    assert_eq!(tokens(&config, 1), [1000]);
}
