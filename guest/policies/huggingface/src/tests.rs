//! Whole requests.

use tightfit_guest::{
    Device, DeviceKind, Format, Policy, Proposal, Refusal, RefusalReason, Request, RequiredFormat,
};

use crate::HuggingFace;
use crate::fixtures::{MIXTRAL, QWEN2_7B, Shape, decoder, device, request, set, sims, tensor, tie};

const ROPE: &str = r#"{"rope_theta": 1e6, "head_dim": 128, "num_hidden_layers": 4}"#;

const SMALL: Shape = Shape {
    layers: 4,
    vocabulary: 32_000,
    ..QWEN2_7B
};

fn plan(request: &Request) -> Result<Proposal, Refusal> {
    HuggingFace::plan(request.clone())
}

fn with_cpu(count: usize, gib: f64) -> Vec<Device> {
    let mut devices = vec![device(DeviceKind::Cpu, 64.0)];
    devices.extend(sims(count, gib));
    devices
}

fn device_of(request: &Request, proposal: &Proposal, name: &str) -> Option<u32> {
    let at = request
        .tensors
        .iter()
        .position(|tensor| tensor.name == name);
    proposal.placements[at.unwrap_or_else(|| panic!("{name}"))].device
}

fn format_of(request: &Request, proposal: &Proposal, name: &str) -> Format {
    let at = request
        .tensors
        .iter()
        .position(|tensor| tensor.name == name);
    proposal.placements[at.unwrap_or_else(|| panic!("{name}"))].format
}

#[test]
fn accelerators_are_numbered_among_themselves() {
    // The host's memory is the first device here.
    let request = request(decoder(SMALL, true), with_cpu(2, 24.0), ROPE);
    let proposal = plan(&request).unwrap();
    let of = |name| device_of(&request, &proposal, name);
    assert_eq!(of("model.embed_tokens.weight"), Some(1));
    assert_eq!(of("model.layers.0.mlp.up_proj.weight"), Some(1));
    assert_eq!(of("lm_head.weight"), Some(2));
    assert_eq!(proposal.headroom, [0, 0, 0]);
}

#[test]
fn host_memory_beside_accelerators_needs_permission() {
    let mut request = request(decoder(SMALL, true), with_cpu(1, 24.0), ROPE);
    set(
        &mut request,
        "max-memory",
        r#"{"0": "700MiB", "cpu": "40GiB"}"#,
    );
    let refusal = plan(&request).unwrap_err();
    assert_eq!(refusal.reason, RefusalReason::DoesNotFit);
    for word in ["lm_head", "model.layers.", "on the cpu", "offload=true"] {
        assert!(refusal.message.contains(word), "{refusal:?}");
    }
    set(&mut request, "offload", "true");
    let proposal = plan(&request).unwrap();
    assert_eq!(device_of(&request, &proposal, "lm_head.weight"), Some(0));
    let embedding = device_of(&request, &proposal, "model.embed_tokens.weight");
    assert_eq!(embedding, Some(1));

    // Without a budget for it everything goes to the disk, which is never there.
    set(&mut request, "max-memory", r#"{"0": "700MiB"}"#);
    let refusal = plan(&request).unwrap_err();
    assert!(refusal.message.contains("on the disk"), "{refusal:?}");
    // And with one, but without the device.
    set(
        &mut request,
        "max-memory",
        r#"{"0": "700MiB", "cpu": "40GiB"}"#,
    );
    request.devices.remove(0);
    let refusal = plan(&request).unwrap_err();
    assert!(refusal.message.contains("--device cpu"), "{refusal:?}");
}

#[test]
fn host_memory_alone_is_fine() {
    let request = request(decoder(SMALL, true), with_cpu(0, 0.0), ROPE);
    let proposal = plan(&request).unwrap();
    assert!(
        proposal
            .placements
            .iter()
            .all(|placed| placed.device == Some(0))
    );
}

#[test]
fn formats_are_those_of_the_library() {
    let one_layer = Shape {
        layers: 1,
        ..MIXTRAL
    };
    let mut request = request(decoder(one_layer, true), sims(1, 60.0), ROPE);
    let expert = "model.layers.0.block_sparse_moe.experts.3.w2.weight";
    let router = "model.layers.0.block_sparse_moe.gate.weight";
    let linear = "model.layers.0.self_attn.q_proj.weight";
    for (library, experts, is_nf4) in [
        ("transformers", "as-library", [false, false, true]),
        ("transformers", "nf4", [true, false, true]),
        ("accelerate", "as-library", [true, true, true]),
        ("accelerate", "stored", [false, true, true]),
    ] {
        set(&mut request, "library", library);
        set(&mut request, "experts", experts);
        let proposal = plan(&request).unwrap();
        let found = [expert, router, linear]
            .map(|name| matches!(format_of(&request, &proposal, name), Format::Nf4(_)));
        assert_eq!(found, is_nf4, "{library} {experts}");
        let head = format_of(&request, &proposal, "lm_head.weight");
        assert_eq!(head, Format::Stored);
    }
}

#[test]
fn a_second_copy_of_a_tied_head_is_left_out() {
    let mut request = request(decoder(SMALL, true), sims(2, 24.0), ROPE);
    tie(&mut request);
    let head = request
        .tensors
        .iter()
        .position(|tensor| tensor.name == "lm_head.weight");
    request.ties[0].alias_tensor = head.map(|head| head as u32);
    let proposal = plan(&request).unwrap();
    let unplaced: Vec<usize> = (0..request.tensors.len())
        .filter(|&t| proposal.placements[t].device.is_none())
        .collect();
    assert_eq!(unplaced, [head.unwrap()]);
}

#[test]
fn draft_layers_are_loaded_but_do_not_count() {
    let plain = request(decoder(SMALL, true), sims(2, 24.0), ROPE);
    let mut tensors = decoder(SMALL, true);
    tensors.push(tensor("mtp.layers.0.mlp.up_proj.weight", &[18_944, 3584]));
    tensors.push(tensor("model.layers.4.mlp.up_proj.weight", &[18_944, 3584]));
    let config = ROPE.replace('{', r#"{"num_nextn_predict_layers": 1, "#);
    let drafting = request(tensors, sims(2, 24.0), &config);
    let (without, with) = (plan(&plain).unwrap(), plan(&drafting).unwrap());
    for tensor in &plain.tensors {
        let name = &tensor.name;
        let before = device_of(&plain, &without, name);
        assert_eq!(device_of(&drafting, &with, name), before, "{name}");
    }
    let last = device_of(&drafting, &with, "lm_head.weight");
    for name in [
        "mtp.layers.0.mlp.up_proj.weight",
        "model.layers.4.mlp.up_proj.weight",
    ] {
        assert_eq!(device_of(&drafting, &with, name), last);
    }
}

#[test]
fn names_of_an_unknown_architecture_have_a_map_too() {
    let mut tensors = vec![
        tensor("backbone.stem.weight", &[4096, 4096]),
        tensor("scale", &[4096]),
        tensor("classifier.weight", &[1000, 4096]),
    ];
    for part in 0..12 {
        tensors.push(tensor(
            format!("backbone.piece{part}.left.weight"),
            &[4096, 4096],
        ));
        tensors.push(tensor(
            format!("backbone.piece{part}.right.weight"),
            &[4096, 4096],
        ));
    }
    let request = request(tensors, sims(2, 24.0), "not JSON");
    let proposal = plan(&request).unwrap();
    let used = |device| {
        proposal
            .placements
            .iter()
            .filter(|p| p.device == Some(device))
            .count()
    };
    assert!(used(0) > 8 && used(1) > 8, "{} {}", used(0), used(1));
    assert_eq!(device_of(&request, &proposal, "scale"), Some(0));
    assert_eq!(device_of(&request, &proposal, "classifier.weight"), Some(1));
}

#[test]
fn sizes_in_max_memory_are_read_as_accelerate_reads_them() {
    let mut request = request(decoder(SMALL, true), with_cpu(2, 24.0), ROPE);
    set(&mut request, "strategy", "sequential");
    for value in ["20GiB", "20 gib", "20000MB", "160000000000b", "160000Mb"] {
        set(
            &mut request,
            "max-memory",
            &format!(r#"{{"1": "{value}"}}"#),
        );
        match plan(&request) {
            // Only the second accelerator is used.
            Ok(proposal) => assert!(proposal.placements.iter().all(|p| p.device == Some(2))),
            Err(refusal) => {
                assert_eq!(value, "160000000000b", "{refusal:?}");
                assert_eq!(refusal.reason, RefusalReason::BadSetting);
            }
        }
    }
    for value in [
        "20GiB",
        "[]",
        "{",
        r#"{"0": "20"}"#,
        r#"{"0": -1}"#,
        r#"{"0": 1.5}"#,
        r#"{"0": "-1GiB"}"#,
        r#"{"0": "nanGiB"}"#,
        r#"{"0": "infGB"}"#,
        r#"{"0": "1e999GB"}"#,
        r#"{"2": "1GiB"}"#,
        r#"{"mps": "1GiB"}"#,
        r#"{"0": "1GiB", "00": "1GiB"}"#,
        r#"{"0": "½GiB"}"#,
        r#"{"0": null}"#,
    ] {
        set(&mut request, "max-memory", value);
        let refusal = plan(&request).unwrap_err();
        assert_eq!(refusal.reason, RefusalReason::BadSetting, "{value}");
        assert!(refusal.message.contains("max-memory"), "{refusal:?}");
    }
}

#[test]
fn balanced_low_0_needs_numbers_without_gaps() {
    let mut request = request(decoder(SMALL, true), sims(3, 24.0), ROPE);
    set(&mut request, "strategy", "balanced_low_0");
    set(
        &mut request,
        "max-memory",
        r#"{"0": "20GiB", "2": "20GiB"}"#,
    );
    let refusal = plan(&request).unwrap_err();
    assert_eq!(refusal.reason, RefusalReason::BadSetting);
    set(
        &mut request,
        "max-memory",
        r#"{"0": "20GiB", "1": "20GiB"}"#,
    );
    let proposal = plan(&request).unwrap();
    // All of it fits beside the first.
    assert!(
        proposal
            .placements
            .iter()
            .all(|placed| placed.device == Some(1))
    );
}

#[test]
fn odd_requests_are_no_problem() {
    let none = request(vec![], sims(2, 1.0), "{}");
    assert_eq!(plan(&none).unwrap().placements, []);
    let nowhere = request(decoder(SMALL, true), vec![], "{}");
    assert_eq!(
        plan(&nowhere).unwrap_err().reason,
        RefusalReason::Unsupported
    );
    let names = [
        "",
        ".",
        "..",
        "experts",
        "experts.1",
        "model..weight",
        "layers.99999999999.weight",
    ];
    let odd = names.map(|name| tensor(name, &[8, 0])).to_vec();
    let plan = plan(&request(
        odd,
        sims(1, 1.0),
        r#"{"rope_theta": 1, "head_dim": -5}"#,
    ))
    .unwrap();
    assert!(
        plan.placements
            .iter()
            .all(|placed| placed.device == Some(0))
    );
}

#[test]
fn what_the_host_requires_is_counted() {
    let mut request = request(decoder(SMALL, true), sims(2, 24.0), ROPE);
    set(&mut request, "strategy", "sequential");
    set(
        &mut request,
        "max-memory",
        r#"{"0": "700MiB", "1": "20GiB"}"#,
    );
    let before = plan(&request).unwrap();
    let on = |proposal: &Proposal, device| {
        let placed = proposal.placements.iter();
        placed
            .filter(|placed| placed.device == Some(device))
            .count()
    };
    // With the head and the embedding in 4 bits there is room for more layers on the first.
    let tables = ["model.embed_tokens.weight", "lm_head.weight"];
    for t in 0..request.tensors.len() {
        if tables.contains(&request.tensors[t].name.as_str()) {
            let format = format_of(&request, &before, "model.layers.0.mlp.up_proj.weight");
            request.required_formats.push(RequiredFormat {
                tensor: t as u32,
                format,
            });
        }
    }
    let after = plan(&request).unwrap();
    assert!(on(&before, 0) < on(&after, 0));
    for name in tables {
        assert!(matches!(format_of(&request, &after, name), Format::Nf4(_)));
    }
}
