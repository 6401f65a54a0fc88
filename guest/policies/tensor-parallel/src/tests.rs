//! What becomes of models that are known.

use tightfit_guest::sizing::Sizer;
use tightfit_guest::{
    Dtype, Format, Policy, QuantType, Quantization, Refusal, RefusalReason, Request,
    SlicedProposal, Tensor, Tie,
};

use crate::TensorParallel;
use crate::fixtures::*;
use crate::promise_tests::{Held, held};

fn plan(request: &Request) -> SlicedProposal {
    TensorParallel::plan_slices(request.clone()).unwrap_or_else(|refusal| panic!("{refusal:?}"))
}

fn refused(request: &Request) -> Refusal {
    TensorParallel::plan_slices(request.clone()).expect_err("it is not possible")
}

/// What became of the tensor of this name.
fn of(request: &Request, proposal: &SlicedProposal, name: &str) -> Held {
    let index = request
        .tensors
        .iter()
        .position(|tensor| tensor.name == name);
    held(request, proposal)[index.unwrap_or_else(|| panic!("there is no {name}"))].clone()
}

/// The ranges of a tensor that each device has.
fn ranges(request: &Request, proposal: &SlicedProposal, name: &str) -> Vec<Vec<(u64, u64)>> {
    let index = request
        .tensors
        .iter()
        .position(|tensor| tensor.name == name)
        .unwrap();
    let slices = proposal
        .slices
        .iter()
        .filter(|slice| slice.tensor as usize == index);
    let of_slice = slices.map(|slice| slice.ranges.iter().map(|r| (r.start, r.end)).collect());
    of_slice.collect()
}

/// Padded bytes on each device.
fn loads(request: &Request, proposal: &SlicedProposal) -> Vec<u64> {
    let mut sizer = Sizer::new();
    let mut loads = vec![0; request.devices.len()];
    for slice in &proposal.slices {
        let tensor = &request.tensors[slice.tensor as usize];
        let piece = Tensor {
            shape: slice.shape(&tensor.shape),
            ..tensor.clone()
        };
        let size = sizer.size(&piece, slice.placement.format).unwrap();
        loads[slice.placement.device.unwrap() as usize] += size.padded;
    }
    for (tensor, placement) in request.tensors.iter().zip(&proposal.placements) {
        if let Some(device) = placement.device {
            loads[device as usize] += sizer.size(tensor, placement.format).unwrap().padded;
        }
    }
    loads
}

#[test]
fn llama_is_cut_by_heads_rows_and_columns() {
    for devices in [2, 4, 8] {
        let request = llama(devices);
        let proposal = plan(&request);
        let n = devices as u64;
        let all = |dimension, length: u64| Held::Cut(dimension, vec![length / n; devices]);
        for (name, expected) in [
            ("self_attn.q_proj", all(0, 4096)),
            ("self_attn.k_proj", all(0, 1024)),
            ("self_attn.v_proj", all(0, 1024)),
            ("self_attn.o_proj", all(1, 4096)),
            ("mlp.gate_proj", all(0, 14336)),
            ("mlp.up_proj", all(0, 14336)),
            ("mlp.down_proj", all(1, 14336)),
            ("input_layernorm", Held::Everywhere),
        ] {
            let name = format!("model.layers.17.{name}.weight");
            assert_eq!(of(&request, &proposal, &name), expected, "{name}");
        }
        assert_eq!(of(&request, &proposal, "lm_head.weight"), all(0, 128_256));
        let table = of(&request, &proposal, "model.embed_tokens.weight");
        assert_eq!(table, Held::Everywhere);
        let loads = loads(&request, &proposal);
        assert!(loads.iter().all(|load| *load == loads[0]), "{loads:?}");
        let nf4 = |slice: &&tightfit_guest::Slice| slice.placement.format == Format::NF4;
        assert_eq!(proposal.slices.iter().filter(nf4).count(), 7 * 32 * devices);
    }
}

#[test]
fn one_device_has_all_of_it_and_needs_no_slices() {
    let request = llama(1);
    let proposal = TensorParallel::plan(request.clone()).unwrap();
    assert!(
        proposal
            .placements
            .iter()
            .all(|placement| placement.device == Some(0))
    );
    let refusal = TensorParallel::plan(llama(2)).unwrap_err();
    assert_eq!(refusal.reason, RefusalReason::Unsupported);
    assert!(
        refused(&Request {
            devices: vec![],
            ..request
        })
        .message
        .contains("no device")
    );
}

#[test]
fn heads_are_never_cut() {
    let request = qwen2(4);
    let proposal = plan(&request);
    let name = "model.layers.3.self_attn.k_proj.bias";
    assert_eq!(
        ranges(&request, &proposal, name),
        [[(0, 128)], [(128, 256)], [(256, 384)], [(384, 512)]]
    );
    let name = "model.layers.3.self_attn.q_proj.weight";
    assert_eq!(of(&request, &proposal, name), Held::Cut(0, vec![896; 4]));
    // 28 and 4 heads.
    for (devices, says) in [
        (8, "has 28 heads (num_attention_heads), which 8 devices"),
        (7, "has 4 heads (num_key_value_heads), which 7 devices"),
        (3, "has 28 heads"),
    ] {
        let refusal = refused(&qwen2(devices));
        assert_eq!(refusal.reason, RefusalReason::Unsupported);
        assert!(refusal.message.contains(says), "{}", refusal.message);
    }
    // Whoever leaves attention alone can have any number.
    let mlp = r#"{"layers.*.mlp.gate_proj": "colwise", "layers.*.mlp.up_proj": "colwise",
                  "layers.*.mlp.down_proj": "rowwise"}"#;
    let request = qwen2(3).set("plan", mlp);
    let proposal = plan(&request);
    let name = "model.layers.0.mlp.up_proj.weight";
    assert_eq!(
        of(&request, &proposal, name),
        Held::Cut(0, vec![6315, 6315, 6314])
    );
    let name = "model.layers.0.self_attn.q_proj.weight";
    assert_eq!(of(&request, &proposal, name), Held::Everywhere);
}

#[test]
fn each_expert_is_cut_or_whole_on_one_device() {
    let request = qwen3_moe(4);
    let proposal = plan(&request);
    let expert = |name: &str| format!("model.layers.2.mlp.experts.77.{name}_proj.weight");
    let up = of(&request, &proposal, &expert("up"));
    assert_eq!(up, Held::Cut(0, vec![192; 4]));
    let down = of(&request, &proposal, &expert("down"));
    assert_eq!(down, Held::Cut(1, vec![192; 4]));
    for name in ["mlp.gate", "self_attn.q_norm"] {
        let name = format!("model.layers.2.{name}.weight");
        assert_eq!(of(&request, &proposal, &name), Held::Everywhere);
    }
    let request = request.set("expert-parallel", "true");
    let proposal = plan(&request);
    for name in ["up", "down"] {
        assert_eq!(of(&request, &proposal, &expert(name)), Held::One(77 / 32));
    }
    let loads = loads(&request, &proposal);
    assert!(loads.iter().all(|load| *load == loads[0]), "{loads:?}");
    let refusal = refused(&qwen3_moe(1).set("expert-parallel", "perhaps"));
    assert_eq!(refusal.reason, RefusalReason::BadSetting);
}

#[test]
fn stacks_of_gate_and_up_are_cut_in_both_halves() {
    let request = qwen3_5_moe(2);
    let proposal = plan(&request);
    let name = "model.language_model.layers.1.mlp.experts.gate_up_proj";
    assert_eq!(of(&request, &proposal, name), Held::Cut(1, vec![512; 2]));
    assert_eq!(
        ranges(&request, &proposal, name),
        [[(0, 256), (512, 768)], [(256, 512), (768, 1024)]]
    );
    let name = "model.language_model.layers.1.mlp.experts.down_proj";
    assert_eq!(of(&request, &proposal, name), Held::Cut(2, vec![256; 2]));
    // Twice the rows, a gate beside each head.
    let name = "model.language_model.layers.1.self_attn.q_proj.weight";
    assert_eq!(of(&request, &proposal, name), Held::Cut(0, vec![4096; 2]));
    let name = "model.language_model.layers.0.linear_attn.in_proj_a.weight";
    assert_eq!(of(&request, &proposal, name), Held::Cut(0, vec![16; 2]));
    for name in [
        "visual.blocks.0.mlp.up_proj",
        "language_model.layers.0.mlp.shared_expert_gate",
    ] {
        let name = format!("model.{name}.weight");
        assert_eq!(of(&request, &proposal, &name), Held::Everywhere);
    }
    let request = request.set("expert-parallel", "true");
    let name = "model.language_model.layers.1.mlp.experts.gate_up_proj";
    assert_eq!(
        of(&request, &plan(&request), name),
        Held::Cut(0, vec![128; 2])
    );
    let refusal = refused(&qwen3_5_moe(4));
    assert!(refusal.message.contains("2 heads"), "{}", refusal.message);
}

#[test]
fn tables_are_cut_or_copied_as_the_user_says() {
    let table = "model.embed_tokens.weight";
    let cut = Held::Cut(0, vec![32_064; 4]);
    for (how, held) in [
        ("auto", Held::Everywhere),
        ("replicated", Held::Everywhere),
        ("cut", cut),
    ] {
        let request = llama(4).set("embeddings", how);
        assert_eq!(of(&request, &plan(&request), table), held, "{how}");
    }
    let request = gpt_oss(4).set("embeddings", "replicated");
    assert_eq!(of(&request, &plan(&request), table), Held::Everywhere);
    let refusal = refused(&llama(4).set("embeddings", "both"));
    assert_eq!(refusal.reason, RefusalReason::BadSetting);
}

#[test]
fn experts_of_gpt_oss_are_whole_and_its_attention_is_not_cut() {
    let request = gpt_oss(4);
    let proposal = plan(&request);
    let layer = |name: &str| format!("model.layers.9.{name}");
    for name in [
        "gate_up_proj",
        "gate_up_proj_bias",
        "down_proj",
        "down_proj_bias",
    ] {
        let name = layer(&format!("mlp.experts.{name}"));
        assert_eq!(
            of(&request, &proposal, &name),
            Held::Cut(0, vec![8; 4]),
            "{name}"
        );
    }
    for name in [
        "self_attn.q_proj.weight",
        "self_attn.sinks",
        "mlp.router.weight",
    ] {
        assert_eq!(
            of(&request, &proposal, &layer(name)),
            Held::Everywhere,
            "{name}"
        );
    }
    let table = of(&request, &proposal, "model.embed_tokens.weight");
    assert_eq!(table, Held::Cut(0, vec![50272; 4]));
    let refusal = refused(&gpt_oss(5));
    assert!(
        refusal.message.contains("32 experts"),
        "{}",
        refusal.message
    );
    // As the model's plan was before transformers 5.
    let older = r#"{"layers.*.self_attn.q_proj": "colwise", "layers.*.self_attn.o_proj": "rowwise",
                    "layers.*.self_attn.sinks": "local_rowwise"}"#;
    let request = request.set("plan", older);
    let proposal = plan(&request);
    for (name, dimension, share) in [
        ("self_attn.q_proj.weight", 0, 1024),
        ("self_attn.q_proj.bias", 0, 1024),
        ("self_attn.o_proj.weight", 1, 1024),
        ("self_attn.sinks", 0, 16),
    ] {
        let expected = Held::Cut(dimension, vec![share; 4]);
        assert_eq!(of(&request, &proposal, &layer(name)), expected, "{name}");
    }
    let bias = of(&request, &proposal, &layer("self_attn.o_proj.bias"));
    assert_eq!(bias, Held::Everywhere, "it is added to the sum once");
}

#[test]
fn fused_matrices_of_phi3_are_cut_anywhere_and_gathered() {
    let request = phi3(4);
    let proposal = plan(&request);
    for (name, dimension, share) in [
        ("self_attn.qkv_proj", 0, 2304),
        ("self_attn.o_proj", 1, 768),
        ("mlp.gate_up_proj", 0, 4096),
        ("mlp.down_proj", 1, 2048),
    ] {
        let name = format!("model.layers.31.{name}.weight");
        let expected = Held::Cut(dimension, vec![share; 4]);
        assert_eq!(of(&request, &proposal, &name), expected, "{name}");
    }
    // One matrix behind the other.
    let name = "model.layers.0.mlp.gate_up_proj.weight";
    let request = request.set("plan", r#"{"mlp.gate_up_proj": "packed_colwise"}"#);
    let found = ranges(&request, &plan(&request), name);
    assert_eq!(found[1], [(2048, 4096), (10240, 12288)]);
}

#[test]
fn a_tied_head_goes_with_the_table() {
    let mut request = llama(2);
    request
        .tensors
        .retain(|tensor| tensor.name != "lm_head.weight");
    request.ties = vec![Tie {
        tensor: 0,
        alias: "lm_head.weight".into(),
        alias_tensor: None,
    }];
    let name = "model.embed_tokens.weight";
    assert_eq!(of(&request, &plan(&request), name), Held::Everywhere);
    // Stored under the head's name it is the table as well.
    request.tensors[0].name = "lm_head.weight".into();
    request.ties[0].alias = name.into();
    let head = of(&request, &plan(&request), "lm_head.weight");
    assert_eq!(head, Held::Everywhere);
    let plan_of_table =
        r#"{"embed_tokens": "embedding_rowwise", "layers.*.mlp.up_proj": "colwise"}"#;
    let request = request.set("plan", plan_of_table);
    let head = of(&request, &plan(&request), "lm_head.weight");
    assert_eq!(head, Held::Cut(0, vec![64128; 2]));
}

#[test]
fn a_second_copy_is_not_loaded() {
    let mut request = llama(2);
    let head = request
        .tensors
        .iter()
        .position(|tensor| tensor.name == "lm_head.weight");
    request.ties = vec![Tie {
        tensor: 0,
        alias: "lm_head.weight".into(),
        alias_tensor: head.map(|head| head as u32),
    }];
    let proposal = plan(&request);
    let head = head.unwrap();
    assert_eq!(proposal.placements[head].device, None);
    assert!(
        proposal
            .slices
            .iter()
            .all(|slice| slice.tensor as usize != head)
    );
}

fn quantized(mut request: Request, double_quantized: bool) -> Request {
    for tensor in &mut request.tensors {
        if tensor.name.contains("_proj.weight") {
            tensor.quantized = Some(Quantization {
                quant_type: QuantType::Nf4,
                block_size: 64,
                double_quantized,
            });
        }
    }
    request
}

#[test]
fn what_is_quantized_is_cut_between_blocks_only() {
    let request = quantized(llama(8), true);
    let down = of(
        &request,
        &plan(&request),
        "model.layers.0.mlp.down_proj.weight",
    );
    assert_eq!(down, Held::Cut(1, vec![1792; 8]));
    // 768 columns over 8 devices are 96 each.
    let request = quantized(qwen3_moe(4), false);
    plan(&request);
    let shape = Shape {
        inner: 14336 + 64,
        ..LLAMA
    };
    let request = quantized(self::request(dense(shape, 1), 2, LLAMA_CONFIG), false);
    let refusal = refused(&request);
    assert_eq!(refusal.reason, RefusalReason::Unsupported);
    assert!(
        refusal.message.contains("within them"),
        "{}",
        refusal.message
    );
}

#[test]
fn what_does_not_fit_is_refused_with_what_is_missing() {
    let roomy = llama(2);
    let need = loads(&roomy, &plan(&roomy))[0];
    let with = |bytes: u64, reserve: u64| {
        let mut request = roomy.clone().set("reserve", &reserve.to_string());
        for device in &mut request.devices {
            device.available = bytes;
        }
        request
    };
    let reserved = need.next_multiple_of(4096);
    assert_eq!(plan(&with(reserved + 7, 7)).headroom, [7, 7]);
    let refusal = refused(&with(reserved + 7, 4096));
    assert_eq!(refusal.missing_bytes, Some(4096 - 7));
    assert_eq!(refusal.reason, RefusalReason::DoesNotFit);
    let mut second = with(reserved, 0);
    second.devices[1].available = reserved - 1;
    assert_eq!(refused(&second).missing_bytes, Some(1));
}

#[test]
fn what_cannot_be_cut_is_refused_with_a_reason() {
    let with = |name: &str, dtype, shape: &[u64]| {
        let mut request = llama(2);
        request.tensors.push(Tensor::new(name, dtype, shape));
        request
    };
    let scales = with("model.layers.0.mlp.up_proj.weight_scale", Dtype::F32, &[2]);
    assert!(
        refused(&scales)
            .message
            .contains("of another method has to be decoded")
    );
    let name = "model.layers.0.mlp.experts.0.up_proj.weight_scale";
    let scales = with(name, Dtype::F32, &[2]);
    assert!(
        refused(&scales)
            .message
            .contains("of another method has to be decoded")
    );
    let halves = with("model.layers.40.mlp.up_proj.weight", Dtype::F4, &[64, 64]);
    assert!(refused(&halves).message.contains("whole bytes"));
    let few = with("model.layers.40.mlp.up_proj.weight", Dtype::Bf16, &[1, 64]);
    assert!(refused(&few).message.contains("too few"));
    let odd = with(
        "model.layers.40.mlp.experts.gate_up_proj",
        Dtype::Bf16,
        &[2, 3, 64],
    );
    assert!(refused(&odd).message.contains("of two matrices"));
    let nothing = Request {
        config_json: "{}".into(),
        ..Request::new(vec![tensor("a.weight", &[8, 8])], sims(2))
    };
    assert!(
        refused(&nothing)
            .message
            .contains("no tensor of this model")
    );
    let bad = llama(2).set("plan", "{");
    assert_eq!(refused(&bad).reason, RefusalReason::BadSetting);
}

#[test]
fn a_scalar_is_on_the_first_device() {
    let mut request = llama(2);
    request.tensors.push(tensor("logit_scale", &[]));
    assert_eq!(of(&request, &plan(&request), "logit_scale"), Held::One(0));
}
