//! What each subcommand prints when all goes well, and the form of its JSON.

use std::fs;

use serde_json::{Value, json};
use tightfit_tests::command::Scratchpad;
use tightfit_tests::models;

const DEVICE: [&str; 2] = ["--device", "sim:1GiB"];

fn scratchpad_with_model() -> Scratchpad {
    let scratchpad = Scratchpad::new();
    models::write_decoder(&scratchpad.path("model"), 2, 64);
    scratchpad
}

/// The fields of an object in alphabetical order, each with the type of its value.
fn shape(object: &Value) -> Vec<(&str, &str)> {
    let object = object.as_object().expect("an object");
    let mut fields: Vec<(&str, &str)> = object
        .iter()
        .map(|(name, value)| {
            let kind = match value {
                Value::Null => "null",
                Value::Bool(_) => "bool",
                Value::Number(number) if number.is_u64() => "integer",
                Value::Number(_) => "number",
                Value::String(_) => "string",
                Value::Array(_) => "array",
                Value::Object(_) => "object",
            };
            (name.as_str(), kind)
        })
        .collect();
    fields.sort_unstable();
    fields
}

/// What `plan` and `load` have in common.
#[track_caller]
fn has_the_promised_form(report: &Value) {
    assert_eq!(report["schema"], 1);
    assert_eq!(
        shape(&report["model"]),
        [
            ("architecture", "string"),
            ("path", "string"),
            ("quantization", "null"),
            ("source_bytes", "integer"),
            ("tensors", "integer")
        ]
    );
    assert_eq!(
        shape(&report["policy"]),
        [
            ("fuel", "integer"),
            ("name", "string"),
            ("seconds", "number"),
            ("settings", "object"),
            ("version", "string")
        ]
    );
    let settings = report["policy"]["settings"].as_object().unwrap();
    assert!(settings.values().all(Value::is_string), "{settings:?}");
    for device in report["devices"].as_array().unwrap() {
        assert_eq!(
            shape(device),
            [
                ("allocated", "integer"),
                ("capacity", "integer"),
                ("fill", "object"),
                ("headroom", "integer"),
                ("name", "string"),
                ("padded", "integer"),
                ("peak_reserved", "integer"),
                ("reserved", "integer"),
                ("tail", "integer"),
                ("tensors", "integer")
            ]
        );
    }
    let host = shape(&report["host"]);
    assert_eq!(
        host.iter().map(|&(name, _)| name).collect::<Vec<_>>(),
        ["peak_rss_bytes", "scratch_bytes", "staging_bytes"]
    );
}

#[test]
fn plan_says_where_everything_would_go() {
    let scratchpad = scratchpad_with_model();
    let spec = [
        "plan", "model", "--device", "sim:1GiB", "--device", "cpu:2GiB",
    ];
    let text = scratchpad.run(&spec).succeeds().stdout;
    for word in [
        "LlamaForCausalLM",
        "policy auto",
        "sim:0",
        "cpu",
        "2.000 GiB",
    ] {
        assert!(text.contains(word), "it lacks {word}: {text}");
    }
    assert!(!text.contains("loaded in"), "{text}");

    let report = scratchpad
        .run(&[&spec[..], &["--json"]].concat())
        .succeeds()
        .json();
    has_the_promised_form(&report);
    let top: Vec<&str> = shape(&report).into_iter().map(|(name, _)| name).collect();
    assert_eq!(
        top,
        ["devices", "digest", "host", "model", "policy", "schema"]
    );
    assert_eq!(report["model"]["path"], "model");
    assert_eq!(report["model"]["architecture"], "LlamaForCausalLM");
    assert_eq!(report["model"]["tensors"], 18);
    assert_eq!(report["policy"]["name"], "auto");
    let devices = report["devices"].as_array().unwrap();
    assert_eq!(devices.len(), 2);
    assert_eq!(
        (&devices[0]["name"], &devices[0]["capacity"]),
        (&json!("sim:0"), &json!(1 << 30))
    );
    assert_eq!(
        (&devices[1]["name"], &devices[1]["tensors"]),
        (&json!("cpu"), &json!(0))
    );
}

#[test]
fn load_reports_what_the_plan_said() {
    let scratchpad = scratchpad_with_model();
    let arguments = |command| [&[command, "model", "--json"], &DEVICE[..]].concat();
    let plan = scratchpad.run(&arguments("plan")).succeeds().json();
    let load = scratchpad.run(&arguments("load")).succeeds().json();
    has_the_promised_form(&load);
    assert_eq!(
        shape(&load["load"]),
        [
            ("bytes_read", "integer"),
            ("nonfinite_blocks", "integer"),
            ("quantized", "integer"),
            ("quantized_on", "object"),
            ("seconds", "number"),
            ("stored", "integer")
        ]
    );
    assert_eq!(load["devices"], plan["devices"]);
    assert_eq!(load["policy"]["fuel"], plan["policy"]["fuel"]);
    assert_eq!(load["load"]["bytes_read"], load["model"]["source_bytes"]);
    // Seven matrices in each of two layers.
    assert_eq!(
        (&load["load"]["quantized"], &load["load"]["stored"]),
        (&json!(14), &json!(4))
    );
    assert_eq!(load["load"]["nonfinite_blocks"], 0);

    let text = scratchpad
        .run(&[&["load", "model"], &DEVICE[..]].concat())
        .succeeds()
        .stdout;
    assert!(text.contains("14 tensors quantized, 4 stored"), "{text}");
}

#[test]
fn placements_are_listed_where_asked_for() {
    let scratchpad = scratchpad_with_model();
    for command in ["plan", "load"] {
        let arguments = [&[command, "model", "--placements"], &DEVICE[..]].concat();
        let report = scratchpad
            .run(&[&arguments[..], &["--json"]].concat())
            .succeeds()
            .json();
        let placements = report["placements"].as_array().unwrap();
        assert_eq!(placements.len(), 18);
        for placement in placements {
            assert_eq!(
                shape(placement),
                [
                    ("bytes", "integer"),
                    ("device", "string"),
                    ("format", "string"),
                    ("tensor", "string")
                ]
            );
        }
        let find = |name: &str| placements.iter().find(|p| p["tensor"] == name).unwrap();
        let norm = find("model.layers.1.input_layernorm.weight");
        assert_eq!(
            (&norm["format"], &norm["bytes"]),
            (&json!("stored"), &json!(128))
        );
        let matrix = find("model.layers.1.self_attn.q_proj.weight");
        // 4096 elements: 2048 bytes of codes and 64 scales.
        assert_eq!(
            (&matrix["format"], &matrix["bytes"]),
            (&json!("nf4"), &json!(2304))
        );
        assert_eq!(matrix["device"], "sim:0");
        let sum: u64 = placements
            .iter()
            .map(|p| p["bytes"].as_u64().unwrap())
            .sum();
        assert_eq!(report["devices"][0]["allocated"], sum);
        let text = scratchpad.run(&arguments).succeeds().stdout;
        assert!(
            text.contains("model.layers.1.input_layernorm.weight"),
            "{text}"
        );
    }
    let double = [
        "plan",
        "model",
        "--json",
        "--placements",
        "--set",
        "double-quant=true",
    ];
    let report = scratchpad
        .run(&[&double[..], &DEVICE].concat())
        .succeeds()
        .json();
    assert!(report["host"]["scratch_bytes"].as_u64() > Some(0));
    let formats = report["placements"].as_array().unwrap();
    assert!(formats.iter().any(|p| p["format"] == "nf4+double"));
    assert_eq!(report["policy"]["settings"]["double-quant"], "true");
}

#[test]
fn a_load_takes_no_more_memory_than_it_says() {
    const MIB: u64 = 1 << 20;
    let scratchpad = Scratchpad::new();
    models::write_decoder(&scratchpad.path("model"), 3, 1024);
    let arguments = [&["load", "model", "--json"], &DEVICE[..]].concat();
    let report = scratchpad.run(&arguments).succeeds().json();
    assert!(report["model"]["source_bytes"].as_u64().unwrap() > 96 * MIB);
    let number = |value: &Value| value.as_u64().unwrap();
    let device = &report["devices"][0];
    let reserved = number(&device["peak_reserved"]);
    assert!(number(&device["allocated"]) <= number(&device["padded"]));
    assert_eq!(reserved, number(&device["padded"]).next_multiple_of(4096));
    assert_eq!(number(&device["reserved"]), reserved);
    if cfg!(target_os = "linux") {
        let staging = number(&report["host"]["staging_bytes"]);
        let resident = number(&report["host"]["peak_rss_bytes"]);
        // Besides the program: its policy while that was compiled.
        let allowed = reserved + staging + 64 * MIB;
        assert!(resident <= allowed, "{resident} of {allowed}");
    }
}

#[test]
fn inspect_says_what_is_in_a_checkpoint() {
    let scratchpad = scratchpad_with_model();
    let text = scratchpad.run(&["inspect", "model"]).succeeds().stdout;
    for word in ["LlamaForCausalLM", "18 tensors", "bf16", "nf4", "stored"] {
        assert!(text.contains(word), "it lacks {word}: {text}");
    }
    let report = scratchpad
        .run(&["inspect", "model", "--json"])
        .succeeds()
        .json();
    assert_eq!(report["schema"], 1);
    assert_eq!(
        (&report["tensors"], &report["layers"]),
        (&json!(18), &json!(2))
    );
    assert_eq!(report["dtypes"]["bf16"]["tensors"], 18);
    assert_eq!(report["formats"]["nf4"]["tensors"], 14);
    assert_eq!(report["formats"]["stored"]["tensors"], 4);
    let sum: u64 = ["nf4", "stored"]
        .iter()
        .map(|format| report["formats"][format]["bytes"].as_u64().unwrap())
        .sum();
    assert_eq!(report["stored_bytes"], sum);
}

#[test]
fn a_file_and_a_cached_id_are_models_too() {
    let scratchpad = scratchpad_with_model();
    let file = scratchpad
        .run(&["inspect", "model/model.safetensors", "--json"])
        .succeeds()
        .json();
    assert_eq!(file["tensors"], 18);
    // As the Hugging Face hub lays out its cache.
    let cached = scratchpad.path("../home/.cache/huggingface/hub/models--org--name");
    fs::create_dir_all(cached.join("snapshots")).unwrap();
    fs::create_dir_all(cached.join("refs")).unwrap();
    fs::write(cached.join("refs/main"), "abc123").unwrap();
    fs::rename(scratchpad.path("model"), cached.join("snapshots/abc123")).unwrap();
    let id = scratchpad
        .run(&["inspect", "org/name", "--json"])
        .succeeds()
        .json();
    assert_eq!(id["parameters"], file["parameters"]);
}

#[test]
fn synth_writes_what_inspect_reads() {
    let scratchpad = Scratchpad::new();
    let text = scratchpad
        .run(&["synth", "demo", "d", "--headers-only"])
        .succeeds()
        .stdout;
    assert!(text.starts_with("d: 195 tensors"), "{text}");
    let report = scratchpad
        .run(&["inspect", "d", "--json"])
        .succeeds()
        .json();
    assert_eq!(
        (&report["tensors"], &report["layers"]),
        (&json!(195), &json!(16))
    );
    assert_eq!(report["architecture"], "Qwen2ForCausalLM");
}

#[test]
fn synth_writes_the_first_layers_of_a_big_model() {
    let scratchpad = Scratchpad::new();
    let report = scratchpad
        .run(&[
            "synth",
            "deepseek-v3",
            "d",
            "--layers",
            "4",
            "--headers-only",
            "--json",
        ])
        .succeeds()
        .json();
    assert_eq!(report["tensors"], 1621);
    let inspect = ["inspect", "d", "--json"];
    let stored = scratchpad
        .run(&[&inspect[..], &["--dequantize", "none"]].concat())
        .succeeds()
        .json();
    assert_eq!(
        (&stored["tensors"], &stored["layers"]),
        (&json!(1621), &json!(4))
    );
    // A weight and its scales are one that is decoded.
    let report = scratchpad.run(&inspect).succeeds().json();
    let method = &report["quantization"];
    assert_eq!(
        (&method["method"], &method["left"]),
        (&json!("fp8"), &json!(0))
    );
    let decoded = method["decoded"].as_u64().unwrap();
    assert_eq!(stored["quantization"]["left"], decoded);
    assert_eq!(report["tensors"], 1621 - decoded);
}

#[test]
fn demo_shows_a_plan_kept_to_the_byte_and_cleans_up() {
    let scratchpad = Scratchpad::new();
    let text = scratchpad.run(&["demo"]).succeeds().stdout;
    for word in ["exactly the plan", "Unloaded: 0 B still reserved"] {
        assert!(text.contains(word), "it lacks `{word}`: {text}");
    }
    assert_eq!(fs::read_dir(scratchpad.temporary()).unwrap().count(), 0);
    let report = scratchpad.run(&["demo", "--json"]).succeeds().json();
    has_the_promised_form(&report);
    assert_eq!(report["load"]["quantized"], 112);
}

#[test]
fn devices_are_listed() {
    let scratchpad = Scratchpad::new();
    let text = scratchpad.run(&["devices"]).succeeds().stdout;
    assert!(text.contains("cpu"), "{text}");
    let arguments = [
        "devices", "--json", "--device", "sim:3GiB", "--device", "cpu:1GiB",
    ];
    let listed = scratchpad.run(&arguments).succeeds().json();
    assert_eq!(listed["schema"], 1);
    let devices = &listed["devices"];
    assert_eq!(devices.as_array().unwrap().len(), 2);
    assert_eq!(
        shape(&devices[0]),
        [
            ("available", "integer"),
            ("capacity", "integer"),
            ("granularity", "integer"),
            ("kind", "string"),
            ("name", "string")
        ]
    );
    assert_eq!(
        (&devices[0]["name"], &devices[0]["kind"]),
        (&json!("sim:0"), &json!("sim"))
    );
    assert_eq!(devices[0]["capacity"], 3u64 << 30);
    assert_eq!(devices[1]["capacity"], 1 << 30);
}

#[test]
fn policies_are_listed_and_shown() {
    let scratchpad = Scratchpad::new();
    let list = scratchpad.run(&["policy", "list"]).succeeds().stdout;
    assert!(list.lines().any(|line| line == "auto"), "{list}");
    let policies = scratchpad
        .run(&["policy", "list", "--json"])
        .succeeds()
        .json();
    let names = policies["policies"].as_array().unwrap().iter();
    let names: Vec<&str> = names
        .map(|policy| policy["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, list.lines().collect::<Vec<_>>());
    let text = scratchpad
        .run(&["policy", "show", "auto"])
        .succeeds()
        .stdout;
    assert!(text.contains("double-quant (default: false)"), "{text}");
    let shown = scratchpad
        .run(&["policy", "show", "auto", "--json"])
        .succeeds()
        .json();
    assert_eq!(
        shape(&shown),
        [
            ("imports", "array"),
            ("name", "string"),
            ("schema", "integer"),
            ("settings", "array"),
            ("version", "string")
        ]
    );
    let imports = shown["imports"].as_array().unwrap();
    assert!(
        imports
            .iter()
            .all(|import| import.as_str().unwrap().starts_with("tightfit:host/")),
        "a policy imports nothing else: {imports:?}"
    );
    assert_eq!(
        shape(&shown["settings"][0]),
        [
            ("default", "string"),
            ("help", "string"),
            ("name", "string")
        ]
    );
}

#[test]
fn quiet_prints_nothing() {
    let scratchpad = scratchpad_with_model();
    for arguments in [
        &["synth", "demo", "d", "--headers-only", "--quiet"][..],
        &["inspect", "model", "--quiet"],
        &["plan", "model", "--quiet", "--placements"],
        &["load", "model", "--quiet"],
        &["policy", "show", "auto", "--quiet"],
        &["devices", "--quiet"],
    ] {
        assert_eq!(
            scratchpad.run(arguments).succeeds().stdout,
            "",
            "{arguments:?}"
        );
    }
    let both = scratchpad
        .run(&["plan", "model", "--quiet", "--json"])
        .succeeds();
    has_the_promised_form(&both.json());
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let scratchpad = Scratchpad::new();
    // More text than a pipe holds.
    scratchpad
        .run(&["synth", "llama-3.1-70b", "d", "--headers-only"])
        .succeeds();
    let device = ["--device", "sim:80GiB"];
    let arguments = [&["plan", "d", "--placements", "--json"], &device[..]].concat();
    assert!(scratchpad.run(&arguments).succeeds().stdout.len() > 64 << 10);
    scratchpad.run_unheard(&arguments).succeeds();
    scratchpad
        .run_unheard(&["policy", "show", "auto"])
        .succeeds();
    scratchpad.run_unheard(&["--help"]).succeeds();
}
