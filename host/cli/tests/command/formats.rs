//! `--set format:"PATTERN"=FORMAT` and `--set rows=N` on the command line, which are for no policy.

use std::fs;

use tightfit_tests::command::Scratchpad;
use tightfit_tests::models;

const USAGE: i32 = 2;

fn scratchpad() -> Scratchpad {
    let scratchpad = Scratchpad::new();
    fs::create_dir(scratchpad.path("m")).unwrap();
    models::write_decoder(&scratchpad.path("m"), 2, 64);
    scratchpad
}

#[test]
fn formats_are_fixed_by_pattern_and_the_last_rule_counts() {
    let scratchpad = scratchpad();
    let arguments = ["m", "--device", "sim:64MiB", "--json", "--placements"];
    let rules = [
        "--set",
        "format:*.mlp.*=nf4+double/128",
        "--set",
        "format:layers.1.mlp.up_proj=f32",
        "--set",
        "format:lm_head=nf4",
    ];
    for command in ["plan", "load"] {
        let report = scratchpad
            .run(&[&[command], &arguments[..], &rules].concat())
            .json();
        let format = |name: &str| {
            let placements = report["placements"].as_array().unwrap();
            let placement = placements.iter().find(|p| p["tensor"] == name).unwrap();
            placement["format"].as_str().unwrap().to_owned()
        };
        for (name, expected) in [
            ("model.layers.0.mlp.up_proj.weight", "nf4+double/128"),
            ("model.layers.1.mlp.down_proj.weight", "nf4+double/128"),
            ("model.layers.1.mlp.up_proj.weight", "cast:f32"),
            ("model.layers.1.self_attn.q_proj.weight", "nf4"),
            ("lm_head.weight", "nf4"),
            ("model.embed_tokens.weight", "stored"),
        ] {
            assert_eq!(format(name), expected, "{command}: {name}");
        }
        assert_eq!(report["policy"]["settings"]["format:lm_head"], "nf4");
    }
}

#[test]
fn a_rule_that_cannot_be_used_is_a_usage_error() {
    let scratchpad = scratchpad();
    for (rule, words) in [
        (
            "format:*.nothing=nf4",
            &["format:*.nothing", "matches none"][..],
        ),
        ("format:norm=int8", &["'int8' is not a format", "nf4"]),
        ("format:=nf4", &["names no tensors"]),
    ] {
        scratchpad
            .run(&["plan", "m", "--device", "sim:64MiB", "--set", rule])
            .fails(USAGE, words);
    }
}

#[test]
fn room_for_products_is_planned_and_shown_whatever_the_policy() {
    let scratchpad = scratchpad();
    for policy in ["auto", "packed", "huggingface"] {
        let arguments = ["m", "--device", "sim:64MiB", "--policy", policy, "--json"];
        for command in ["plan", "load"] {
            let report = |rows| {
                let setting = format!("rows={rows}");
                let all = [&[command], &arguments[..], &["--set", &setting]].concat();
                scratchpad.run(&all).json()
            };
            let (without, with) = (report(0), report(8));
            let device = |report: &serde_json::Value, key: &str| {
                let device = &report["devices"][0];
                let value = key.split('.').fold(device, |value, key| &value[key]);
                value.as_u64().unwrap()
            };
            let tail = device(&with, "tail");
            assert!(tail > 16 << 10 && device(&without, "tail") == 0, "{policy}");
            let more = device(&with, "fill.headroom") - device(&without, "fill.headroom");
            assert_eq!(more, tail, "{policy}");
            assert_eq!(device(&with, "reserved"), device(&with, "peak_reserved"));
            assert!(device(&with, "reserved") >= device(&with, "padded") + tail);
            assert_eq!(with["policy"]["settings"]["rows"], "8");
        }
    }
    let both = [
        "plan",
        "m",
        "--device",
        "sim:64MiB",
        "--diff",
        "auto",
        "packed",
    ];
    scratchpad
        .run(&[&both[..], &["--set", "rows=8"]].concat())
        .succeeds();
    scratchpad
        .run(&["plan", "m", "--device", "sim:64MiB", "--set", "rows=many"])
        .fails(USAGE, &["rows", "'many'"]);
}
