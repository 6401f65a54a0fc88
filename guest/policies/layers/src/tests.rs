use std::collections::BTreeSet;

use tightfit_guest::names::layer_of;
use tightfit_guest::sizing::Sizer;
use tightfit_guest::{
    DeviceKind, Dtype, Format, PreviousFailure, Proposal, Refusal, RefusalReason, Request, Tensor,
    Tie,
};

use crate::fixtures::*;
use crate::{Arrangement, describe, plan as place_all};

fn plan(request: &Request) -> Result<Proposal, Refusal> {
    place_all(request, Arrangement::Spread)
}

/// Plans, and checks what the host would check.
fn placed(request: &Request) -> Proposal {
    let proposal = plan(request).unwrap();
    assert_eq!(proposal.placements.len(), request.tensors.len());
    assert_eq!(proposal.headroom.len(), request.devices.len());
    let used = used(request, &proposal);
    for (d, device) in request.devices.iter().enumerate() {
        let reserved = used[d].next_multiple_of(device.granularity);
        let available = request.available()[d];
        assert!(
            reserved + proposal.headroom[d] <= available,
            "{} {reserved}",
            device.name
        );
    }
    let duplicates = request.duplicates();
    for (t, placement) in proposal.placements.iter().enumerate() {
        assert_eq!(placement.device.is_none(), duplicates[t]);
    }
    proposal
}

fn used(request: &Request, proposal: &Proposal) -> Vec<u64> {
    let mut sizer = Sizer::new();
    let mut used = vec![0; request.devices.len()];
    for (tensor, placement) in request.tensors.iter().zip(&proposal.placements) {
        if let Some(device) = placement.device {
            used[device as usize] += sizer.size(tensor, placement.format).unwrap().padded;
        }
    }
    used
}

/// Names of the quantized tensors.
fn quantized(request: &Request, proposal: &Proposal) -> BTreeSet<String> {
    let both = request.tensors.iter().zip(&proposal.placements);
    let quantized = both.filter(|(_, placement)| matches!(placement.format, Format::Nf4(_)));
    quantized.map(|(tensor, _)| tensor.name.clone()).collect()
}

/// The devices of each layer, in the order of layers.
fn devices_of_layers(request: &Request, proposal: &Proposal) -> Vec<BTreeSet<u32>> {
    let mut layers: Vec<BTreeSet<u32>> = Vec::new();
    for (tensor, placement) in request.tensors.iter().zip(&proposal.placements) {
        if let (Some((_, layer)), Some(device)) = (layer_of(&tensor.name), placement.device) {
            layers.resize_with(layers.len().max(layer as usize + 1), BTreeSet::new);
            layers[layer as usize].insert(device);
        }
    }
    layers
}

fn device_of(request: &Request, proposal: &Proposal, name: &str) -> Option<u32> {
    let found = request
        .tensors
        .iter()
        .position(|tensor| tensor.name == name);
    proposal.placements[found.expect("there is such a tensor")].device
}

fn roomy(tensors: Vec<tightfit_guest::Tensor>) -> Request {
    request(tensors, sims(&[GIB, GIB]))
}

#[test]
fn dense_models_are_quantized_as_transformers_does() {
    let modules = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ];
    let layers = (0..2)
        .flat_map(|layer| modules.map(|module| format!("model.layers.{layer}.{module}.weight")));
    let expected: BTreeSet<String> = layers.collect();
    for tensors in [llama(TINY), qwen2(TINY)] {
        let request = roomy(tensors);
        assert_eq!(quantized(&request, &placed(&request)), expected);
    }
}

#[test]
fn experts_are_quantized_and_routers_are_not() {
    for (tensors, experts) in [
        (mixtral(TINY, 4), 24),
        (qwen3_moe(TINY, 4), 24),
        (qwen3_5_moe(TINY, 4), 4),
    ] {
        let request = roomy(tensors);
        let names = quantized(&request, &placed(&request));
        assert_eq!(
            names
                .iter()
                .filter(|name| name.contains(".experts."))
                .count(),
            experts
        );
        assert!(!names.iter().any(|name| name.ends_with(".gate.weight")));
        let stored = with(request, &[("experts", "stored")]);
        let without = quantized(&stored, &placed(&stored));
        assert_eq!(without.len() + experts, names.len());
    }
    let request = roomy(qwen3_5_moe(TINY, 4));
    let names = quantized(&request, &placed(&request));
    for name in [
        "model.language_model.layers.0.linear_attn.in_proj_a.weight",
        "model.language_model.layers.0.mlp.shared_expert_gate.weight",
        "model.visual.blocks.0.attn.qkv.weight",
    ] {
        assert!(names.contains(name), "{name}");
    }
    assert!(
        !names
            .iter()
            .any(|name| name.contains("conv1d") || name.contains("embed"))
    );
}

#[test]
fn only_floating_point_of_16_and_32_bits_is_quantized() {
    let name = |expert: u32| format!("model.layers.0.mlp.experts.{expert}.up_proj.weight");
    let shape = [128, 128];
    let request = roomy(vec![
        Tensor::new(name(0), Dtype::F8E4m3, &shape),
        Tensor::new(name(1), Dtype::F16, &shape),
        Tensor::new(name(2), Dtype::F32, &shape),
        Tensor::new(name(3), Dtype::F64, &shape),
        Tensor::new(
            "model.layers.0.mlp.experts.down_proj_blocks",
            Dtype::U8,
            &[4, 128, 2, 16],
        ),
    ]);
    let names = quantized(&request, &placed(&request));
    assert_eq!(names, BTreeSet::from([name(1), name(2)]));
}

#[test]
fn settings_choose_formats() {
    let request = roomy(qwen2(TINY));
    let skipped = with(request.clone(), &[("skip", "layers.1, *.gate_proj")]);
    let names = quantized(&skipped, &placed(&skipped));
    assert_eq!(names.len(), 6);
    assert!(
        names
            .iter()
            .all(|name| name.contains("layers.0") && !name.contains("gate_proj"))
    );

    let request = with(request, &[("double-quant", "true"), ("block-size", "128")]);
    let formats = placed(&request)
        .placements
        .into_iter()
        .map(|placement| placement.format);
    let nf4 = formats.filter_map(|format| match format {
        Format::Nf4(nf4) => Some((nf4.block_size, nf4.double_quantized)),
        _ => None,
    });
    assert_eq!(nf4.collect::<BTreeSet<_>>(), BTreeSet::from([(128, true)]));
}

#[test]
fn bad_settings_are_refused_by_name() {
    for (name, value) in [
        ("block-size", "48"),
        ("block-size", "8192"),
        ("experts", "int8"),
        ("double-quant", "2"),
        ("reserve", "lots"),
        ("context", "-1"),
        ("batch", "0"),
    ] {
        let refusal = plan(&with(roomy(qwen2(TINY)), &[(name, value)])).unwrap_err();
        assert_eq!(refusal.reason, RefusalReason::BadSetting);
        assert!(refusal.message.contains(name) && refusal.message.contains(value));
    }
}

#[test]
fn every_setting_is_described() {
    let description = describe("auto", "1");
    assert_eq!(description.name, "auto");
    for setting in description.settings {
        assert!(setting.help.ends_with('.'), "{}", setting.help);
    }
}

#[test]
fn layers_stay_whole_and_in_order_and_no_accelerator_stays_empty() {
    for count in [1, 2, 3, 4, 8] {
        let request = request(qwen2(QWEN2_7B), sims(&vec![24 * GIB; count]));
        let proposal = placed(&request);
        let layers = devices_of_layers(&request, &proposal);
        assert!(layers.iter().all(|devices| devices.len() == 1));
        assert!(layers.iter().map(|devices| devices.first()).is_sorted());
        assert!(used(&request, &proposal).iter().all(|&bytes| bytes > 0));
        let embedding = device_of(&request, &proposal, "model.embed_tokens.weight");
        let head = device_of(&request, &proposal, "lm_head.weight");
        assert_eq!((embedding, head), (Some(0), Some(count as u32 - 1)));
    }
    // The fullest of eight is hardly fuller than the embedding, which cannot be split.
    let request = request(qwen2(QWEN2_7B), sims(&[24 * GIB; 8]));
    let fullest = used(&request, &placed(&request)).into_iter().max();
    assert_eq!(fullest.unwrap().next_multiple_of(2 * MIB), 1040 * MIB);
}

#[test]
fn towers_come_before_the_layers_and_prediction_heads_after() {
    let request = request(
        qwen3_5_moe(Shape { layers: 8, ..TINY }, 4),
        sims(&[8 * MIB; 5]),
    );
    let proposal = placed(&request);
    let of = |name: &str| device_of(&request, &proposal, name);
    let visual = of("model.visual.blocks.0.attn.qkv.weight");
    assert_eq!(visual, of("model.visual.patch_embed.proj.weight"));
    let first = of("model.language_model.layers.0.mlp.gate.weight");
    let last = of("model.language_model.layers.7.mlp.gate.weight");
    assert!(visual <= first && first < last && last <= of("mtp.fc.weight"));
    assert_eq!(
        of("mtp.fc.weight"),
        of("mtp.layers.0.self_attn.q_proj.weight")
    );
}

#[test]
fn a_model_that_is_only_a_tower_is_spread_too() {
    let block = |b: u32| {
        tensor(
            format!("vision_model.encoder.layers.{b}.mlp.fc1.weight"),
            &[1024, 4096],
        )
    };
    let request = request((0..8).map(block).collect(), sims(&[GIB; 4]));
    let proposal = placed(&request);
    assert!(used(&request, &proposal).iter().all(|&bytes| bytes > 0));
}

#[test]
fn the_second_copy_of_a_tied_head_is_not_loaded() {
    for stored in [true, false] {
        let mut request = request(qwen2(QWEN2_7B), sims(&[4 * GIB, 4 * GIB]));
        tie(&mut request, stored);
        let proposal = placed(&request);
        assert_eq!(
            device_of(&request, &proposal, "model.embed_tokens.weight"),
            Some(0)
        );
        if stored {
            assert_eq!(device_of(&request, &proposal, "lm_head.weight"), None);
        }
    }
}

#[test]
fn a_head_that_holds_the_embedding_comes_first() {
    let mut tensors = llama(Shape { layers: 4, ..TINY });
    tensors.retain(|tensor| !tensor.name.contains("embed_tokens"));
    let mut request = request(tensors, sims(&[4 * MIB, 4 * MIB]));
    let alias = "model.embed_tokens.weight".to_owned();
    request.ties.push(Tie {
        tensor: 0,
        alias,
        alias_tensor: None,
    });
    assert_eq!(request.tensors[0].name, "lm_head.weight");
    assert_eq!(
        device_of(&request, &placed(&request), "lm_head.weight"),
        Some(0)
    );
}

#[test]
fn one_that_fits_exactly_is_placed_and_a_byte_less_is_refused_exactly() {
    let fitting = |available| request(qwen2(QWEN2_7B), sims(&[available]));
    let roomy = fitting(24 * GIB);
    let need = used(&roomy, &placed(&roomy))[0].next_multiple_of(2 * MIB);
    // 5.449 GiB, as arithmetic over its parameters says, in steps of 2 MiB.
    assert_eq!(need / MIB, 5582);
    placed(&fitting(need));
    let refusal = plan(&fitting(need - 1)).unwrap_err();
    assert_eq!(refusal.reason, RefusalReason::DoesNotFit);
    assert_eq!(refusal.missing_bytes, Some(1));
    for word in ["5.46 GiB", "another device", "`double-quant=true` (saves"] {
        assert!(
            refusal.message.contains(word),
            "{} lacks {word}",
            refusal.message
        );
    }
    placed(&with(fitting(need - 1), &[("double-quant", "true")]));
}

#[test]
fn layers_are_split_before_anything_is_refused() {
    // Whole layers of 126 MiB leave gaps; together the devices have just enough.
    let whole = request(qwen2(QWEN2_7B), sims(&[24 * GIB]));
    let need = used(&whole, &placed(&whole))[0];
    let each = (need / 5).next_multiple_of(2 * MIB) + 24 * MIB;
    let request = request(qwen2(QWEN2_7B), sims(&[each; 5]));
    let proposal = placed(&request);
    let layers = devices_of_layers(&request, &proposal);
    assert!(layers.iter().any(|devices| devices.len() > 1));
    assert!(layers.iter().map(|devices| devices.first()).is_sorted());
}

#[test]
fn order_is_given_up_before_anything_is_refused() {
    let linear = |layer: u32, rows: u64| {
        tensor(
            format!("model.layers.{layer}.mlp.up_proj.bias"),
            &[rows * MIB / 2],
        )
    };
    let tensors = vec![linear(0, 12), linear(1, 10), linear(2, 8), linear(3, 10)];
    let request = request(tensors, sims(&[20 * MIB, 20 * MIB]));
    let proposal = placed(&request);
    assert_eq!(used(&request, &proposal), [20 * MIB, 20 * MIB]);
}

#[test]
fn the_end_of_the_model_spills_and_only_when_accelerators_are_full() {
    let mut devices = sims(&[2 * GIB, 2 * GIB]);
    devices.insert(0, device(DeviceKind::Cpu, 64 * GIB));
    let spilling = request(qwen2(QWEN2_7B), devices);
    let proposal = placed(&spilling);
    let layers = devices_of_layers(&spilling, &proposal);
    let order = |devices: &BTreeSet<u32>| match devices.first() {
        Some(0) => 3,
        other => *other.unwrap(),
    };
    assert!(layers.iter().map(order).is_sorted());
    assert_eq!(layers.last(), Some(&BTreeSet::from([0])));
    assert_eq!(device_of(&spilling, &proposal, "lm_head.weight"), Some(0));
    let used = used(&spilling, &proposal);
    // Less than one more layer would fit.
    assert!(4 * GIB - used[1] - used[2] < 126 * MIB, "{used:?}");

    let mut devices = sims(&[4 * GIB, 4 * GIB]);
    devices.push(device(DeviceKind::Cpu, 64 * GIB));
    let fitting = request(qwen2(QWEN2_7B), devices);
    assert_eq!(self::used(&fitting, &placed(&fitting))[2], 0);
}

#[test]
fn what_is_too_large_for_any_accelerator_does_not_keep_the_rest_off() {
    let mut devices = sims(&[512 * MIB, 512 * MIB]);
    devices.push(device(DeviceKind::Cpu, 64 * GIB));
    let request = request(qwen2(QWEN2_7B), devices);
    let proposal = placed(&request);
    assert_eq!(
        device_of(&request, &proposal, "model.embed_tokens.weight"),
        Some(2)
    );
    let used = used(&request, &proposal);
    assert!(used[0] > 400 * MIB && used[1] > 400 * MIB, "{used:?}");
}

#[test]
fn host_memory_alone_is_filled_in_order() {
    let cpus = vec![
        device(DeviceKind::Cpu, 3 * GIB),
        device(DeviceKind::Cpu, 8 * GIB),
    ];
    let request = request(qwen2(QWEN2_7B), cpus);
    let proposal = placed(&request);
    assert_eq!(
        device_of(&request, &proposal, "model.embed_tokens.weight"),
        Some(0)
    );
    assert_eq!(device_of(&request, &proposal, "lm_head.weight"), Some(1));
}

#[test]
fn the_reserve_is_left_free_everywhere() {
    let request = request(qwen2(QWEN2_7B), sims(&[4 * GIB, 4 * GIB, MIB]));
    let request = with(request, &[("reserve", "1GiB")]);
    let proposal = placed(&request);
    assert_eq!(proposal.headroom, [GIB, GIB, MIB]);
    let refusal = plan(&with(request, &[("reserve", "2GiB")])).unwrap_err();
    assert!(
        refusal.message.contains("a smaller `reserve`"),
        "{}",
        refusal.message
    );
}

#[test]
fn a_failure_lowers_what_a_device_has() {
    let mut request = request(qwen2(QWEN2_7B), sims(&[4 * GIB, 4 * GIB]));
    request.failure = Some(PreviousFailure {
        device: 0,
        needed: 3 * GIB,
        available: 2 * GIB,
    });
    let proposal = placed(&request);
    assert!(used(&request, &proposal)[0] <= 2 * GIB);
    // It never raises it.
    request.failure = Some(PreviousFailure {
        device: 0,
        needed: 3 * GIB,
        available: 80 * GIB,
    });
    assert_eq!(request.available()[0], 4 * GIB);
}

#[test]
fn the_same_request_has_the_same_answer() {
    let mut devices = sims(&[200 * MIB, 90 * MIB, 60 * MIB]);
    devices.push(device(DeviceKind::Cpu, GIB));
    let shape = Shape {
        layers: 12,
        hidden: 2048,
        ..TINY
    };
    let request = request(qwen3_5_moe(shape, 16), devices);
    assert_eq!(plan(&request), plan(&request));
}

/// Whatever the sizes: what has room to spare for the largest tensor on every device is placed.
#[test]
fn what_fits_in_total_is_never_refused() {
    let mut seed = 1u64;
    let mut random = |bound: u64| {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % bound
    };
    for _ in 0..300 {
        let tensors: Vec<_> = (0..1 + random(60))
            .map(|t| {
                let name = match random(4) {
                    0 => format!("model.layers.{}.x{t}.weight", random(9)),
                    1 => format!("model.visual.x{t}.weight"),
                    2 => format!("model.embed_tokens{t}.weight"),
                    _ => format!("lm_head.x{t}.weight"),
                };
                tensor(name, &[1 + random(2000), 1 + random(2000)])
            })
            .collect();
        let roomy = request(tensors.clone(), sims(&[64 * GIB]));
        let proposal = placed(&roomy);
        let mut sizer = Sizer::new();
        let sizes = tensors.iter().zip(&proposal.placements);
        let sizes: Vec<u64> = sizes
            .map(|(tensor, placement)| sizer.size(tensor, placement.format).unwrap().padded)
            .collect();
        let (total, largest) = (sizes.iter().sum::<u64>(), *sizes.iter().max().unwrap());
        // With this much a largest-first assignment cannot fail.
        let count = 1 + random(6);
        let each = total.div_ceil(count) + largest + 2 * MIB;
        let mut devices = sims(&vec![each; count as usize]);
        if random(2) == 0 {
            devices[0].kind = DeviceKind::Cpu;
        }
        placed(&request(tensors, devices));
    }
}

#[test]
fn nonsense_is_answered_not_crashed_on() {
    let refusal = plan(&request(qwen2(TINY), vec![])).unwrap_err();
    assert_eq!(refusal.reason, RefusalReason::Unsupported);
    assert!(placed(&request(vec![], sims(&[GIB]))).placements.is_empty());
    assert!(plan(&request(qwen2(TINY), sims(&[0, 0]))).is_err());

    let mut odd = request(vec![], sims(&[GIB]));
    odd.devices[0].granularity = 0;
    for name in [
        "",
        ".",
        "..",
        "a..b",
        "layers.4294967296.x",
        "layers.1",
        "é.layers.0.ü.weight",
    ] {
        odd.tensors.push(Tensor::new(name, Dtype::Bf16, &[0, 7]));
        odd.tensors.push(Tensor::new(name, Dtype::U8, &[]));
    }
    odd.ties.push(Tie {
        tensor: 99,
        alias: String::new(),
        alias_tensor: Some(77),
    });
    odd.ties.push(Tie {
        tensor: 1,
        alias: "x".into(),
        alias_tensor: Some(1),
    });
    odd.failure = Some(PreviousFailure {
        device: 9,
        needed: 0,
        available: 0,
    });
    assert!(plan(&odd).is_ok());

    let mut huge = request(vec![], sims(&[u64::MAX]));
    for t in 0..20 {
        let mut tensor = tensor(format!("a{t}.weight"), &[1]);
        tensor.shape = vec![1 << 59];
        huge.tensors.push(tensor);
    }
    let refusal = plan(&huge).unwrap_err();
    assert_eq!(refusal.reason, RefusalReason::DoesNotFit);
    huge.tensors[0].shape = vec![u64::MAX, 2];
    assert_eq!(plan(&huge).unwrap_err().reason, RefusalReason::Unsupported);
}
