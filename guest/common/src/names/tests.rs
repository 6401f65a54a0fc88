use super::TensorKind::*;
use super::*;

/// Whether the elements are floating-point numbers.
const FLOAT: bool = true;
const INTEGER: bool = false;

/// `name dims -> kind`, one row each; of floating-point numbers.
fn check(rows: &[(&str, &[u64], TensorKind)]) {
    for &(name, shape, kind) in rows {
        check_as(FLOAT, name, shape, kind);
    }
}

fn check_as(is_float: bool, name: &str, shape: &[u64], kind: TensorKind) {
    assert_eq!(
        kind_of(name, shape.len(), is_float),
        kind,
        "{name} {shape:?} {is_float}"
    );
}

#[test]
fn llama_and_qwen2() {
    check(&[
        ("model.embed_tokens.weight", &[152_064, 3584], Embedding),
        (
            "model.layers.0.self_attn.q_proj.weight",
            &[3584, 3584],
            Linear,
        ),
        ("model.layers.0.self_attn.q_proj.bias", &[3584], Bias),
        (
            "model.layers.0.self_attn.o_proj.weight",
            &[3584, 3584],
            Linear,
        ),
        (
            "model.layers.0.mlp.gate_proj.weight",
            &[18_944, 3584],
            Linear,
        ),
        (
            "model.layers.0.mlp.gate_up_proj.weight",
            &[18_944, 3584],
            Linear,
        ),
        ("model.layers.0.input_layernorm.weight", &[3584], Norm),
        ("model.norm.weight", &[3584], Norm),
        ("lm_head.weight", &[152_064, 3584], OutputHead),
        ("lm_head.bias", &[152_064], Bias),
        ("score.weight", &[2, 3584], OutputHead),
        (
            "language_model.lm_head.weight",
            &[152_064, 3584],
            OutputHead,
        ),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", &[64], Other),
    ]);
}

#[test]
fn mixture_of_experts() {
    check(&[
        (
            "model.layers.0.block_sparse_moe.gate.weight",
            &[8, 4096],
            Router,
        ),
        (
            "model.layers.0.block_sparse_moe.experts.7.w1.weight",
            &[14_336, 4096],
            Expert,
        ),
        ("model.layers.0.mlp.gate.weight", &[128, 2048], Router),
        (
            "model.layers.0.mlp.experts.127.down_proj.weight",
            &[2048, 768],
            Expert,
        ),
        (
            "model.layers.0.mlp.experts.gate_up_proj",
            &[128, 1536, 2048],
            Expert,
        ),
        (
            "model.layers.0.mlp.experts.down_proj",
            &[128, 2048, 768],
            Expert,
        ),
        (
            "model.layers.0.feed_forward.experts.gate_up_proj",
            &[16, 5120, 16_384],
            Expert,
        ),
        (
            "model.layers.0.feed_forward.router.weight",
            &[16, 5120],
            Router,
        ),
        (
            "model.layers.0.block_sparse_moe.input_linear.weight",
            &[40, 1024, 1536],
            Expert,
        ),
        (
            "model.layers.0.block_sparse_moe.router.layer.weight",
            &[40, 1536],
            Router,
        ),
        (
            "model.layers.0.moe.up_proj.weight",
            &[48, 5120, 7168],
            Expert,
        ),
        ("model.layers.0.mlp.gate.wg.weight", &[64, 4096], Router),
        (
            "transformer.blocks.0.ffn.experts.mlp.w1",
            &[172_032, 6144],
            Expert,
        ),
        (
            "transformer.blocks.0.ffn.router.layer.weight",
            &[16, 6144],
            Router,
        ),
        (
            "model.layers.0.mlp.shared_expert.up_proj.weight",
            &[512, 2048],
            Linear,
        ),
        (
            "model.layers.0.mlp.shared_experts.up_proj.weight",
            &[512, 2048],
            Linear,
        ),
        (
            "model.layers.0.mlp.shared_expert_gate.weight",
            &[1, 2048],
            Linear,
        ),
    ]);
}

#[test]
fn qwen3_5_moe() {
    check(&[
        (
            "model.language_model.embed_tokens.weight",
            &[248_320, 2048],
            Embedding,
        ),
        (
            "model.language_model.layers.0.linear_attn.in_proj_qkv.weight",
            &[8192, 2048],
            Linear,
        ),
        (
            "model.language_model.layers.0.linear_attn.in_proj_a.weight",
            &[32, 2048],
            Linear,
        ),
        (
            "model.language_model.layers.0.linear_attn.in_proj_b.weight",
            &[32, 2048],
            Linear,
        ),
        (
            "model.language_model.layers.0.linear_attn.conv1d.weight",
            &[8192, 1, 4],
            Convolution,
        ),
        (
            "model.language_model.layers.0.linear_attn.dt_bias",
            &[32],
            Bias,
        ),
        (
            "model.language_model.layers.0.linear_attn.A_log",
            &[32],
            Other,
        ),
        (
            "model.language_model.layers.0.linear_attn.norm.weight",
            &[128],
            Norm,
        ),
        (
            "model.language_model.layers.3.self_attn.q_norm.weight",
            &[256],
            Norm,
        ),
        (
            "model.language_model.layers.0.mlp.experts.gate_up_proj",
            &[256, 1024, 2048],
            Expert,
        ),
        (
            "model.language_model.layers.0.mlp.gate.weight",
            &[256, 2048],
            Router,
        ),
        (
            "model.visual.blocks.0.attn.qkv.weight",
            &[3456, 1152],
            Linear,
        ),
        ("model.visual.blocks.0.attn.qkv.bias", &[3456], Bias),
        (
            "model.visual.blocks.0.mlp.linear_fc1.weight",
            &[4304, 1152],
            Linear,
        ),
        ("model.visual.blocks.0.norm1.weight", &[1152], Norm),
        (
            "model.visual.merger.linear_fc1.weight",
            &[4608, 4608],
            Linear,
        ),
        ("model.visual.merger.norm.weight", &[1152], Norm),
        (
            "model.visual.patch_embed.proj.weight",
            &[1152, 3, 2, 16, 16],
            Convolution,
        ),
        ("model.visual.pos_embed.weight", &[2304, 1152], Embedding),
        ("mtp.fc.weight", &[2048, 4096], Linear),
        (
            "mtp.layers.0.mlp.experts.3.up_proj.weight",
            &[512, 2048],
            Expert,
        ),
    ]);
}

#[test]
fn tables_and_heads_of_several_streams() {
    check(&[
        (
            "decoder.model.decoder.embed_tokens.3.weight",
            &[2049, 1024],
            Embedding,
        ),
        ("decoder.lm_heads.0.weight", &[2048, 1024], OutputHead),
        ("lm_heads.7.weight", &[1024, 1024], OutputHead),
        ("input_embeds_layers.2.weight", &[1056, 1024], Embedding),
        ("position_embeds_layer.weight", &[1024, 1024], Embedding),
        ("model.token_emb.weight", &[1024, 64], Embedding),
        ("time_emb.weight", &[1024, 64], Linear),
        ("emb.4.weight", &[1024, 1024], Embedding),
        ("generator.text_lm_head.weight", &[1024, 64], OutputHead),
        ("time_embed.0.weight", &[1280, 320], Linear),
        ("time_embedding.2.weight", &[1280, 320], Linear),
        ("connector.embedding.0.weight", &[1280, 320], Linear),
        ("blocks.0.lm_heads.0.weight", &[64, 64], Linear),
    ]);
}

#[test]
fn gpt_oss_in_both_forms() {
    check(&[
        (
            "model.layers.0.mlp.experts.gate_up_proj",
            &[32, 2880, 5760],
            Expert,
        ),
        (
            "model.layers.0.mlp.experts.gate_up_proj_bias",
            &[32, 5760],
            Bias,
        ),
        (
            "model.layers.0.mlp.experts.down_proj_bias",
            &[32, 2880],
            Bias,
        ),
        ("model.layers.0.mlp.router.weight", &[32, 2880], Router),
        ("model.layers.0.mlp.router.bias", &[32], Bias),
        ("model.layers.0.self_attn.sinks", &[64], Other),
    ]);
    let blocks = "model.layers.0.mlp.experts.gate_up_proj_blocks";
    check_as(INTEGER, blocks, &[32, 5760, 90, 16], Other);
    let scales = "model.layers.0.mlp.experts.gate_up_proj_scales";
    check_as(INTEGER, scales, &[32, 5760, 90], Other);
}

#[test]
fn deepseek_v3() {
    check_as(
        FLOAT,
        "model.layers.3.mlp.experts.0.up_proj.weight",
        &[2048, 7168],
        Expert,
    );
    check_as(
        FLOAT,
        "model.layers.3.self_attn.kv_b_proj.weight",
        &[32_768, 512],
        Linear,
    );
    let scale = "model.layers.3.mlp.experts.0.up_proj.weight_scale_inv";
    check_as(FLOAT, scale, &[16, 56], Other);
    check_as(
        FLOAT,
        "model.layers.3.mlp.gate.e_score_correction_bias",
        &[256],
        Bias,
    );
    check(&[
        (
            "model.layers.3.self_attn.kv_a_proj_with_mqa.weight",
            &[576, 7168],
            Linear,
        ),
        (
            "model.layers.3.self_attn.kv_a_layernorm.weight",
            &[512],
            Norm,
        ),
        ("model.layers.3.mlp.gate.weight", &[256, 7168], Router),
        (
            "model.layers.61.embed_tokens.weight",
            &[129_280, 7168],
            Embedding,
        ),
        ("model.layers.61.eh_proj.weight", &[7168, 14_336], Linear),
        (
            "model.layers.61.shared_head.head.weight",
            &[129_280, 7168],
            OutputHead,
        ),
        ("model.layers.61.shared_head.norm.weight", &[7168], Norm),
    ]);
}

#[test]
fn older_families() {
    check(&[
        ("transformer.wte.weight", &[50_257, 768], Embedding),
        ("wpe.weight", &[1024, 768], Embedding),
        ("h.0.attn.c_attn.weight", &[768, 2304], Linear),
        ("h.0.ln_1.weight", &[768], Norm),
        ("transformer.ln_f.weight", &[768], Norm),
        ("gpt_neox.embed_in.weight", &[50_432, 768], Embedding),
        (
            "gpt_neox.layers.0.attention.query_key_value.weight",
            &[2304, 768],
            Linear,
        ),
        ("embed_out.weight", &[50_432, 768], OutputHead),
        (
            "model.layers.0.self_attn.qkv_proj.weight",
            &[9216, 3072],
            Linear,
        ),
        (
            "model.layers.0.self_attn.dense.weight",
            &[2560, 2560],
            Linear,
        ),
        (
            "model.decoder.embed_positions.weight",
            &[2050, 768],
            Embedding,
        ),
        ("model.decoder.project_in.weight", &[1024, 512], Linear),
        ("shared.weight", &[32_128, 512], Embedding),
        (
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            &[32, 8],
            Embedding,
        ),
        (
            "encoder.block.0.layer.0.SelfAttention.q.weight",
            &[512, 512],
            Linear,
        ),
        (
            "bert.embeddings.word_embeddings.weight",
            &[30_522, 768],
            Embedding,
        ),
        ("bert.embeddings.LayerNorm.weight", &[768], Norm),
        ("classifier.weight", &[2, 768], OutputHead),
        (
            "transformer.embedding.word_embeddings.weight",
            &[65_024, 4096],
            Embedding,
        ),
        (
            "transformer.output_layer.weight",
            &[65_024, 4096],
            OutputHead,
        ),
        ("output.weight", &[32_000, 4096], OutputHead),
        ("language_model.output.weight", &[92_553, 4096], OutputHead),
        (
            "language_model.model.layers.0.attention.output.weight",
            &[64, 64],
            Linear,
        ),
        ("encoder.layer.0.output.dense.weight", &[768, 3072], Linear),
        ("backbone.layers.0.mixer.A_log", &[1536, 16], Other),
        ("backbone.layers.0.mixer.x_proj.weight", &[80, 1536], Linear),
        (
            "vision_model.embeddings.patch_embedding.weight",
            &[768, 3, 16, 16],
            Convolution,
        ),
        ("vision_model.embeddings.class_embedding", &[768], Embedding),
        (
            "model.embed_vision.embedding_projection.weight",
            &[2048, 2048],
            Linear,
        ),
    ]);
}

#[test]
fn quantized_checkpoints_are_left_alone() {
    let q = "model.layers.0.self_attn.q_proj";
    check_as(INTEGER, &format!("{q}.weight"), &[6_422_528, 1], Other);
    check_as(FLOAT, &format!("{q}.weight.absmax"), &[200_704], Other);
    check_as(INTEGER, &format!("{q}.qweight"), &[448, 3584], Other);
    check_as(FLOAT, &format!("{q}.scales"), &[28, 3584], Other);
    check_as(FLOAT, &format!("{q}.weight_scale"), &[3584, 1], Other);
}

#[test]
fn layers_are_found_in_every_family() {
    for (name, layer) in [
        (
            "model.layers.7.mlp.up_proj.weight",
            Some(("model.layers", 7)),
        ),
        (
            "model.language_model.layers.12.x",
            Some(("model.language_model.layers", 12)),
        ),
        ("transformer.h.0.ln_1.weight", Some(("transformer.h", 0))),
        ("h.11.ln_1.weight", Some(("h", 11))),
        ("gpt_neox.layers.3.x", Some(("gpt_neox.layers", 3))),
        (
            "model.visual.blocks.26.x",
            Some(("model.visual.blocks", 26)),
        ),
        ("encoder.block.1.layer.0.x", Some(("encoder.block", 1))),
        (
            "model.layers.3.mlp.experts.5.up_proj.weight",
            Some(("model.layers", 3)),
        ),
        ("model.embed_tokens.weight", None),
        ("experts.3.w1", None),
        ("layers", None),
        ("layers.", None),
        ("layers.+1.x", None),
        ("layers.99999999999999999999.x", None),
        ("layers..0", None),
        ("", None),
    ] {
        assert_eq!(layer_of(name), layer, "{name}");
    }
}

#[test]
fn side_branches_end_at_the_branch() {
    for (name, branch) in [
        ("model.visual.blocks.0.x", Some("model.visual")),
        (
            "vision_tower.vision_model.encoder.layers.0.x",
            Some("vision_tower"),
        ),
        (
            "multi_modal_projector.linear_1.weight",
            Some("multi_modal_projector"),
        ),
        (
            "thinker.audio_tower.layers.0.x",
            Some("thinker.audio_tower"),
        ),
        ("mtp.layers.0.x", Some("mtp")),
        ("model.layers.0.visual.x", None),
        ("model.layers.0.mlp.up_proj.weight", None),
        ("lm_head.weight", None),
    ] {
        assert_eq!(side_branch_of(name), branch, "{name}");
    }
}

#[test]
fn modules_are_names_without_their_parameter() {
    assert_eq!(module_of("a.b.weight"), "a.b");
    assert_eq!(module_of("a.b.bias"), "a.b");
    assert_eq!(module_of("a.experts.down_proj"), "a.experts.down_proj");
}
