use tightfit_guest::{
    Device, Dtype, Format, Policy, Proposal, Refusal, RefusalReason, Request, Tensor, Tie,
};

use crate::Map;
use crate::device_map::DeviceMap;
use crate::places::Places;

const MIB: u64 = 1 << 20;

fn request(names: &[&str], devices: &[&str], map: &str) -> Request {
    let tensors = names
        .iter()
        .map(|&name| Tensor::new(name, Dtype::Bf16, &[64, 64]));
    let devices = devices.iter().map(|&name| Device {
        granularity: 4096,
        ..Device::new(name, MIB)
    });
    Request::new(tensors.collect(), devices.collect()).set("device-map", map)
}

fn devices(names: &[&str], devices: &[&str], map: &str) -> Vec<Option<u32>> {
    let proposal = Map::plan(request(names, devices, map)).unwrap();
    let placements = proposal.placements.iter();
    placements.map(|placement| placement.device).collect()
}

fn refusal(result: Result<Proposal, Refusal>, reason: RefusalReason, words: &[&str]) {
    let refusal = result.unwrap_err();
    assert_eq!(refusal.reason, reason, "{refusal:?}");
    for word in words {
        assert!(refusal.message.contains(word), "{word}: {refusal:?}");
    }
}

fn notes(request: &Request) -> Vec<String> {
    let map = DeviceMap::parse(&request.settings[0].1).unwrap();
    Places::find(request, &map).unwrap().notes
}

#[test]
fn the_longest_entry_counts_on_whole_components() {
    let names = [
        "model.layers.1.a.weight",
        "model.layers.1.b.weight",
        "model.layers.10.a.weight",
        "lm_head.weight",
    ];
    let map = r#"{"": "cpu", "model.layers.1": 0, "model.layers.1.b.weight": 1, "lm": 0}"#;
    let found = devices(&names, &["sim:0", "sim:1", "cpu"], map);
    assert_eq!(found, [Some(0), Some(1), Some(2), Some(2)]);
}

#[test]
fn a_number_is_a_cuda_device_or_else_counts_accelerators() {
    for (there, number, expected) in [
        (&["cpu", "cuda:1", "cuda:0"][..], 0, 2),
        (&["cpu", "cuda:3", "cuda:7"], 0, 1),
        (&["cpu", "cuda:3", "cuda:7"], 7, 2),
        (&["cpu", "sim:0", "sim:1"], 1, 2),
    ] {
        let map = format!("{{\"\": {number}}}");
        assert_eq!(devices(&["a.weight"], there, &map), [Some(expected)]);
    }
    assert_eq!(
        devices(&["a.weight"], &["cuda:0", "cuda:1"], r#"{"a": "cuda:1"}"#),
        [Some(1)]
    );
}

#[test]
fn names_in_memory_are_names_too() {
    let names = [
        "model.layers.0.block_sparse_moe.experts.0.w1.weight",
        "model.layers.0.block_sparse_moe.experts.0.w2.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.input_layernorm.weight",
    ];
    let map = r#"{"model.layers.0.mlp.experts.gate_up_proj": 1, "model.layers.0.mlp.experts": 2,
        "model.layers.0.mlp": 3, "model.layers.0": 0}"#;
    let found = devices(&names, &["sim:0", "sim:1", "sim:2", "sim:3"], map);
    assert_eq!(found, [Some(1), Some(2), Some(3), Some(0)]);
    // The name in the checkpoint still counts where it says more.
    let map = r#"{"model.layers.0": 0, "model.layers.0.block_sparse_moe.experts.0": 1}"#;
    let found = devices(&names, &["sim:0", "sim:1"], map);
    assert_eq!(found, [Some(1), Some(1), Some(0), Some(0)]);
}

#[test]
fn what_no_entry_covers_is_named_and_counted() {
    let plan = |map| Map::plan(request(&["a.x", "b.x", "b.y", "c.x"], &["sim:0"], map));
    let bad = RefusalReason::BadSetting;
    refusal(plan(r#"{"a": 0}"#), bad, &["`b.x`", "2 other tensors"]);
    refusal(plan("{}"), bad, &["`a.x`", "3 other tensors"]);
    refusal(plan(""), bad, &["`device-map` is missing"]);
}

#[test]
fn a_device_that_is_not_there_is_refused_with_those_that_are() {
    let bad = RefusalReason::BadSetting;
    for (map, word) in [
        (r#"{"a": 2}"#, " on 2"),
        (r#"{"a": "cuda:0"}"#, "\"cuda:0\""),
        (r#"{"a": 18446744073709551615}"#, "1844"),
    ] {
        let plan = Map::plan(request(&["a.x"], &["sim:0", "sim:1", "cpu"], map));
        refusal(plan, bad, &[word, "`a`", "sim:0, sim:1, cpu"]);
    }
    let plan = Map::plan(request(&["a.x"], &["sim:0"], r#"{"a": "disk"}"#));
    refusal(plan, bad, &["`a` on disk", "memory"]);
}

#[test]
fn text_that_is_no_map_is_refused_where_it_is_wrong() {
    let deep = format!("{{\"a\": {}", "[".repeat(100_000));
    let wide = format!("[{}0]", "0,".repeat(100_000));
    for map in [
        "[",
        "7",
        "{\"a\": null}",
        "{\"a\": -1}",
        "{\"a\": 1.5}",
        "{\"a\": true}",
        "{\"a\": {}}",
        "{\"a\": 0, \"a\": 0}",
        "{\"a\": 0} {}",
        "{1: 0}",
        deep.as_str(),
        wide.as_str(),
    ] {
        let plan = Map::plan(request(&["a.x"], &["sim:0"], map));
        refusal(plan, RefusalReason::BadSetting, &["`device-map`", "line 1"]);
    }
}

#[test]
fn both_names_of_a_tied_parameter_are_in_one_place() {
    for stored in [true, false] {
        let names = ["model.embed_tokens.weight", "lm_head.weight"];
        let names = if stored { &names[..] } else { &names[..1] };
        let mut tied = request(
            names,
            &["sim:0", "sim:1"],
            r#"{"model.embed_tokens": 0, "lm_head": 1}"#,
        );
        tied.ties.push(Tie {
            tensor: 0,
            alias: "lm_head.weight".into(),
            alias_tensor: stored.then_some(1),
        });
        let placed = Map::plan(tied.clone()).unwrap().placements;
        let expected = [Some(0), None];
        let found: Vec<_> = placed.iter().map(|p| p.device).collect();
        assert_eq!(found, expected[..names.len()]);
        let notes = notes(&tied);
        assert_eq!(notes.len(), 1, "{notes:?}");
        assert!(notes[0].contains("on sim:0, not on sim:1"), "{notes:?}");
        // One entry is enough.
        tied.settings[0].1 = r#"{"lm_head": 1}"#.into();
        assert_eq!(Map::plan(tied).unwrap().placements[0].device, Some(1));
    }
}

#[test]
fn entries_without_a_tensor_are_pointed_out() {
    let map = r#"{"": 0, "a": 0, "b": 0, "model.rotary_emb": 0, "a.x.weight": 0}"#;
    let found = notes(&request(&["a.x.weight"], &["sim:0"], map));
    assert_eq!(found, ["device-map: no tensor begins with `b`"]);
    let many: Vec<String> = (0..100).map(|i| format!("\"x{i}\": 0")).collect();
    let map = format!("{{\"\": 0, {}}}", many.join(", "));
    let found = notes(&request(&["a.x"], &["sim:0"], &map));
    assert_eq!(found.len(), 9);
    assert!(found[8].contains("92 other"), "{found:?}");
}

#[test]
fn formats_and_reserve_are_those_of_the_other_policies() {
    let mut request = request(&["a.up_proj.weight", "b.weight"], &["sim:0"], r#"{"": 0}"#);
    request.settings.push(("skip".into(), "b".into()));
    request.settings.push(("reserve".into(), "1000000".into()));
    let proposal = Map::plan(request.clone()).unwrap();
    assert!(matches!(proposal.placements[0].format, Format::Nf4(_)));
    assert_eq!(proposal.placements[1].format, Format::Stored);
    assert_eq!(proposal.headroom, [1_000_000]);
    // 2304 and 8192 bytes, in steps of 4096.
    request.devices[0].available = 1_000_000 + 12_288;
    assert!(Map::plan(request.clone()).is_ok());
    request.devices[0].available -= 1;
    let plan = Map::plan(request);
    assert_eq!(plan.as_ref().unwrap_err().missing_bytes, Some(1));
    refusal(
        plan,
        RefusalReason::DoesNotFit,
        &["sim:0", "another device", "0.01 MiB are missing"],
    );
}
