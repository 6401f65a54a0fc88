//! Presets against what is published of the real models.

use std::collections::HashSet;
use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::checkpoint::{Config, LayerType};
use crate::types::DType;

fn shape_of(tensors: &[Tensor], name: &str) -> Vec<u64> {
    let tensor = tensors.iter().find(|tensor| tensor.name == name);
    tensor.unwrap_or_else(|| panic!("{name}")).shape.clone()
}

#[test]
fn numbers_of_tensors_and_parameters_are_the_published_ones() {
    for (preset, tensors, parameters) in [
        (Preset::Qwen25_0_5b, 290, 494_032_768),
        (Preset::Qwen25_7b, 339, 7_615_616_512),
        (Preset::Llama31_8b, 291, 8_030_261_248),
        (Preset::Llama31_70b, 723, 70_553_706_496),
        (Preset::Mixtral8x7b, 995, 46_702_792_704),
        (Preset::Qwen3_30bA3b, 18_867, 30_532_122_624),
        // Published as 35 B.
        (Preset::Qwen35_35bA3b, 1026, 35_107_181_936),
        // Published as 671 B.
        (Preset::DeepseekV3, 90_427, 671_026_419_200),
        // Published as 20.91 B and 116.83 B.
        (Preset::GptOss20b, 459, 20_914_757_184),
        (Preset::GptOss120b, 687, 116_829_156_672),
    ] {
        assert_eq!(preset.parameters(), parameters, "{preset}");
        assert_eq!(preset.tensors().len(), tensors, "{preset}");
    }
    let demo = 2 * Preset::Demo.parameters();
    assert!((150_000_000..250_000_000).contains(&demo), "{demo}");
}

#[test]
fn qwen25_7b_has_196_linear_layers() {
    let tensors = Preset::Qwen25_7b.tensors();
    let linear: Vec<&Tensor> = tensors
        .iter()
        .filter(|tensor| tensor.name.ends_with("_proj.weight"))
        .collect();
    let parameters: u64 = linear.iter().filter_map(|tensor| tensor.elements()).sum();
    assert_eq!((linear.len(), parameters), (196, 6_525_288_448));
    assert_eq!(tensors[0].name, "model.embed_tokens.weight");
    assert_eq!(tensors[1].name, "model.layers.0.self_attn.q_proj.weight");
    assert_eq!(tensors[2].name, "model.layers.0.self_attn.q_proj.bias");
    assert_eq!(tensors[338].name, "lm_head.weight");
}

#[test]
fn qwen35_has_the_shapes_of_its_modeling_code() {
    let tensors = Preset::Qwen35_35bA3b.tensors();
    for (name, shape) in [
        ("layers.0.mlp.experts.gate_up_proj", &[256, 1024, 2048][..]),
        ("layers.0.mlp.experts.down_proj", &[256, 2048, 512]),
        ("layers.0.mlp.gate.weight", &[256, 2048]),
        ("layers.0.mlp.shared_expert.down_proj.weight", &[2048, 512]),
        ("layers.0.mlp.shared_expert_gate.weight", &[1, 2048]),
        ("layers.0.linear_attn.in_proj_qkv.weight", &[8192, 2048]),
        ("layers.0.linear_attn.in_proj_z.weight", &[4096, 2048]),
        ("layers.0.linear_attn.in_proj_a.weight", &[32, 2048]),
        ("layers.0.linear_attn.out_proj.weight", &[2048, 4096]),
        ("layers.0.linear_attn.conv1d.weight", &[8192, 1, 4]),
        ("layers.0.linear_attn.A_log", &[32]),
        ("layers.0.linear_attn.norm.weight", &[128]),
        ("layers.3.self_attn.q_proj.weight", &[8192, 2048]),
        ("layers.3.self_attn.k_proj.weight", &[512, 2048]),
        ("layers.3.self_attn.o_proj.weight", &[2048, 4096]),
        ("layers.39.self_attn.q_norm.weight", &[256]),
        ("embed_tokens.weight", &[248_320, 2048]),
    ] {
        let name = format!("model.language_model.{name}");
        assert_eq!(shape_of(&tensors, &name), shape, "{name}");
    }
    for (name, shape) in [
        ("patch_embed.proj.weight", &[1152, 3, 2, 16, 16][..]),
        ("pos_embed.weight", &[2304, 1152]),
        ("blocks.26.attn.qkv.weight", &[3456, 1152]),
        ("blocks.0.mlp.linear_fc1.bias", &[4304]),
        ("merger.norm.weight", &[1152]),
        ("merger.linear_fc1.weight", &[4608, 4608]),
        ("merger.linear_fc2.weight", &[2048, 4608]),
    ] {
        let name = format!("model.visual.{name}");
        assert_eq!(shape_of(&tensors, &name), shape, "{name}");
    }
    assert_eq!(shape_of(&tensors, "lm_head.weight"), [248_320, 2048]);
    let count = |text: &str| tensors.iter().filter(|t| t.name.contains(text)).count();
    assert_eq!(count("linear_attn.A_log"), 30);
    assert_eq!(count("self_attn.q_proj"), 10);
    assert_eq!(count("mtp"), 0);
}

#[test]
fn deepseek_v3_has_its_linear_layers_in_fp8() {
    let tensors = Preset::DeepseekV3.tensors();
    for (name, shape, scales) in [
        ("0.self_attn.q_a_proj", [1536, 7168], [12, 56]),
        ("0.self_attn.q_b_proj", [24_576, 1536], [192, 12]),
        // The last tiles have 64 rows.
        ("0.self_attn.kv_a_proj_with_mqa", [576, 7168], [5, 56]),
        ("0.self_attn.kv_b_proj", [32_768, 512], [256, 4]),
        ("0.self_attn.o_proj", [7168, 16_384], [56, 128]),
        ("2.mlp.gate_proj", [18_432, 7168], [144, 56]),
        ("2.mlp.down_proj", [7168, 18_432], [56, 144]),
        ("3.mlp.experts.0.up_proj", [2048, 7168], [16, 56]),
        ("60.mlp.experts.255.down_proj", [7168, 2048], [56, 16]),
        ("60.mlp.shared_experts.gate_proj", [2048, 7168], [16, 56]),
    ] {
        let name = format!("model.layers.{name}.weight");
        let at = tensors.iter().position(|t| t.name == name).unwrap();
        let (weight, scale) = (&tensors[at], &tensors[at + 1]);
        assert_eq!(weight.dtype, DType::F8E4M3, "{name}");
        assert_eq!(weight.shape, shape, "{name}");
        assert_eq!(scale.name, format!("{name}_scale_inv"));
        assert_eq!(scale.dtype, DType::F32, "{name}");
        assert_eq!(scale.shape, scales, "{name}");
        assert_eq!(scale.parameters(), Some(0));
    }
    let of = |dtype| tensors.iter().filter(move |t| t.dtype == dtype);
    assert_eq!(of(DType::F8E4M3).count(), 45_032);
    // A bias of the router in every layer with experts.
    assert_eq!(of(DType::F32).count(), 45_032 + 58);
    let not_fp8 = ["norm.weight", "mlp.gate.weight", "embed_tokens.weight"];
    let is_left =
        |name: &str| name == "lm_head.weight" || not_fp8.iter().any(|end| name.ends_with(end));
    assert!(of(DType::Bf16).all(|tensor| is_left(&tensor.name)));
    assert!(!tensors.iter().any(|t| t.name.contains("layers.61.")));
}

#[test]
fn gpt_oss_has_its_experts_in_mxfp4() {
    use DType::{Bf16, U8};
    let tensors = Preset::GptOss120b.tensors();
    for (name, dtype, shape) in [
        ("self_attn.sinks", Bf16, &[64][..]),
        ("self_attn.q_proj.weight", Bf16, &[4096, 2880]),
        ("self_attn.q_proj.bias", Bf16, &[4096]),
        ("self_attn.k_proj.bias", Bf16, &[512]),
        ("self_attn.v_proj.weight", Bf16, &[512, 2880]),
        ("self_attn.o_proj.weight", Bf16, &[2880, 4096]),
        ("self_attn.o_proj.bias", Bf16, &[2880]),
        ("mlp.router.weight", Bf16, &[128, 2880]),
        ("mlp.router.bias", Bf16, &[128]),
        ("mlp.experts.gate_up_proj_blocks", U8, &[128, 5760, 90, 16]),
        ("mlp.experts.gate_up_proj_scales", U8, &[128, 5760, 90]),
        ("mlp.experts.gate_up_proj_bias", Bf16, &[128, 5760]),
        ("mlp.experts.down_proj_blocks", U8, &[128, 2880, 90, 16]),
        ("mlp.experts.down_proj_scales", U8, &[128, 2880, 90]),
        ("mlp.experts.down_proj_bias", Bf16, &[128, 2880]),
        ("input_layernorm.weight", Bf16, &[2880]),
    ] {
        let name = format!("model.layers.35.{name}");
        let tensor = tensors.iter().find(|t| t.name == name).unwrap();
        assert_eq!((tensor.dtype, &tensor.shape[..]), (dtype, shape), "{name}");
    }
    assert_eq!(shape_of(&tensors, "lm_head.weight"), [201_088, 2880]);
    let small = Preset::GptOss20b.tensors();
    let router = shape_of(&small, "model.layers.23.mlp.router.weight");
    assert_eq!(router, [32, 2880]);
    let text = Preset::GptOss120b.config_json();
    let config = Config::parse(Path::new("config.json"), text).unwrap();
    assert_eq!(config.sliding_window, Some(128));
    assert_eq!(config.layer_types.len(), 36);
    assert_eq!(config.layer_types[0], LayerType::SlidingAttention);
    assert_eq!(config.layer_types[35], LayerType::FullAttention);
}

#[test]
fn names_are_unique_and_types_are_the_published_ones() {
    for &preset in Preset::all() {
        let tensors = preset.tensors();
        let names: HashSet<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names.len(), tensors.len(), "{preset}");
        let types: HashSet<DType> = tensors.iter().map(|t| t.dtype).collect();
        let expected: &[DType] = match preset {
            Preset::DeepseekV3 => &[DType::Bf16, DType::F8E4M3, DType::F32],
            Preset::GptOss20b | Preset::GptOss120b => &[DType::Bf16, DType::U8],
            _ => &[DType::Bf16],
        };
        assert_eq!(types, expected.iter().copied().collect(), "{preset}");
    }
}

#[test]
fn a_cut_is_the_beginning_of_the_model() {
    for &preset in Preset::all() {
        let all = Model::from(preset);
        let json = |model: &Model| -> Value { serde_json::from_str(&model.config_json).unwrap() };
        let Model { tensors, .. } = preset.first_layers(3).unwrap();
        let kept = all.tensors.iter().filter(|tensor| {
            let (_, rest) = tensor.name.split_once(".layers.").unwrap_or(("", "0."));
            let (layer, _) = rest.split_once('.').unwrap();
            layer.parse::<u64>().unwrap() < 3
        });
        assert!(tensors.iter().eq(kept), "{preset}");

        let cut = preset.first_layers(5).unwrap();
        let config = Config::parse(Path::new("config.json"), cut.config_json.clone()).unwrap();
        assert_eq!(config.num_hidden_layers, Some(5), "{preset}");
        let whole = Config::parse(Path::new("config.json"), all.config_json.clone()).unwrap();
        let types = whole.layer_types.len().min(5);
        assert_eq!(config.layer_types, whole.layer_types[..types], "{preset}");

        let layers = u64::from(whole.num_hidden_layers.unwrap());
        let same = preset.first_layers(layers).unwrap();
        assert_eq!((&same.tensors, json(&same)), (&all.tensors, json(&all)));
        for need in [0, layers + 1, u64::MAX] {
            let error = preset.first_layers(need).unwrap_err();
            let SynthError::Layers { have, .. } = error else {
                panic!("{error:?}");
            };
            assert_eq!(have, layers);
            let text = error.to_string();
            assert!(text.contains(&format!("to {need} layers")), "{text}");
            assert!(text.contains(&format!("has {layers},")), "{text}");
        }
    }
}

#[test]
fn four_layers_of_deepseek_v3_have_experts_in_one() {
    let model = Preset::DeepseekV3.first_layers(4).unwrap();
    let count = |text: &str| {
        model
            .tensors
            .iter()
            .filter(|t| t.name.contains(text))
            .count()
    };
    assert_eq!(count("self_attn.o_proj.weight_scale_inv"), 4);
    assert_eq!(count(".mlp.gate_proj.weight_scale_inv"), 3);
    assert_eq!(count("layers.3.mlp.experts."), 2 * 3 * 256);
    assert_eq!(count("layers.4."), 0);
}

#[test]
fn configurations_describe_the_tensors() {
    for &preset in Preset::all() {
        let text = preset.config_json();
        let config = Config::parse(Path::new("config.json"), text).unwrap();
        let tensors = preset.tensors();
        let embedding = tensors
            .iter()
            .find(|tensor| tensor.name.ends_with("embed_tokens.weight"))
            .unwrap();
        assert_eq!(config.vocab_size, Some(embedding.shape[0]), "{preset}");
        assert_eq!(config.hidden_size, Some(embedding.shape[1]), "{preset}");
        let norms = tensors
            .iter()
            .filter(|tensor| tensor.name.ends_with("input_layernorm.weight"));
        assert_eq!(config.num_hidden_layers, Some(norms.count() as u32));
        let head = tensors.iter().any(|tensor| tensor.name == "lm_head.weight");
        assert_eq!(config.tie_word_embeddings, Some(!head), "{preset}");
        let k = tensors
            .iter()
            .find(|tensor| tensor.name.ends_with("self_attn.k_proj.weight"));
        // Latent attention has none.
        if let Some(k) = k {
            let (heads, size) = (config.num_key_value_heads, config.head_dim);
            assert_eq!(u64::from(heads.unwrap() * size.unwrap()), k.shape[0]);
        }
        assert!(config.has_language_head(), "{preset}");
    }
    for (preset, method, settings) in [
        (
            Preset::DeepseekV3,
            "fp8",
            json!({ "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128] }),
        ),
        (
            Preset::GptOss120b,
            "mxfp4",
            json!({ "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ] }),
        ),
    ] {
        let config: Value = serde_json::from_str(&preset.config_json()).unwrap();
        let mut expected = settings;
        expected["quant_method"] = method.into();
        assert_eq!(config["quantization_config"], expected, "{preset}");
    }
    let text = Preset::Qwen35_35bA3b.config_json();
    let config = Config::parse(Path::new("config.json"), text).unwrap();
    assert_eq!(config.model_type.as_deref(), Some("qwen3_5_moe"));
    assert_eq!(config.text_model_type.as_deref(), Some("qwen3_5_moe_text"));
    assert_eq!(config.layer_types.len(), 40);
    assert_eq!(config.layer_types[2], LayerType::LinearAttention);
    assert_eq!(config.layer_types[39], LayerType::FullAttention);
}

#[test]
fn presets_are_found_by_name() {
    for &preset in Preset::all() {
        assert_eq!(preset.name().parse::<Preset>().unwrap(), preset);
    }
    assert_eq!("Qwen2.5-7B".parse::<Preset>().unwrap(), Preset::Qwen25_7b);
    let error = "gpt-5".parse::<Preset>().unwrap_err().to_string();
    assert!(error.contains("mixtral-8x7b"), "{error}");
}
