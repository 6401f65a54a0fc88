//! What `--json` prints: always one object of the documented form, result or error, with nothing in
//! it that a terminal obeys.

use std::fs;

use serde_json::{Value, json};
use tightfit::text::is_hidden;
use tightfit_tests::command::{Outcome, Scratchpad};
use tightfit_tests::guests::{HOSTILE, hostile_in_describe};
use tightfit_tests::json_schema::Schema;
use tightfit_tests::models;
use tightfit_tests::programs::{HOSTILE as HOSTILE_PROGRAM, LOAD_AND_CHECK};

/// Characters that terminals obey, or that hide.
const ESCAPES: &str = "\x7f\u{80}\u{9b}31m\u{9d}0;x\u{ad}\u{61c}\u{200b}\u{200e}\u{2028}\u{202e}\u{2066}\u{feff}\u{fff9}\u{e0041}";

fn schema() -> Schema {
    Schema::new(include_str!("../../output.schema.json"))
}

fn scratchpad() -> Scratchpad {
    let scratchpad = Scratchpad::new();
    models::write_decoder(&scratchpad.path("m"), 2, 64);
    fs::write(scratchpad.path("hostile.wasm"), HOSTILE).unwrap();
    fs::write(scratchpad.path("check.wasm"), LOAD_AND_CHECK).unwrap();
    fs::write(scratchpad.path("program.wasm"), HOSTILE_PROGRAM).unwrap();
    let scenarios = "[defaults]\nmodel = { path = \"m\" }\ndevices = [\"sim:1GiB\"]\n\
        [[scenario]]\nname = \"a\"\nexpect = { fits = true }\n\
        [[scenario]]\nname = \"b\"\nexpect = { fits = false }\n\
        [[scenario]]\nname = \"c\"\npolicy = \"none\"\nexpect = { fits = true }\n\
        [[scenario]]\nname = \"d\"\nexpect = { tensors.\"*\" = { format = \"f32\" } }\n";
    fs::write(scratchpad.path("s.toml"), scenarios).unwrap();
    scratchpad
}

#[track_caller]
fn is_tame(text: &str) {
    let hidden = text.chars().find(|&c| c != '\n' && is_hidden(c));
    assert_eq!(hidden, None, "{text}");
}

#[track_caller]
fn checked(outcome: &Outcome, schema: &Schema, definition: &str) -> Value {
    let value = outcome.json();
    let errors = schema.errors(definition, &value);
    assert!(errors.is_empty(), "{errors:#?} in {outcome:#?}");
    is_tame(&outcome.stdout);
    is_tame(&outcome.stderr);
    value
}

#[test]
fn every_result_has_the_documented_form() {
    let (scratchpad, schema) = (scratchpad(), schema());
    fs::create_dir(scratchpad.path("nan")).unwrap();
    let name = "model.layers.0.mlp.up_proj.weight";
    let matrix = [(name, "BF16", &[1, 64][..], &[0xff; 2 * 64][..])];
    models::write_safetensors(&scratchpad.path("nan/model.safetensors"), &matrix);
    let device = "--device=sim:1GiB";
    let hostile = [
        "--diff",
        "auto",
        "hostile.wasm",
        "--set",
        "behavior=refuse-to-fit",
    ];
    let mut used = vec!["error"];
    for (definition, arguments) in [
        ("report", &["plan", "m", device][..]),
        (
            "report",
            &["plan", "m", device, "--placements", "--set", "reserve=1MiB"],
        ),
        (
            "report",
            &[
                "plan",
                "m",
                "--world=2",
                "--device=cuda:1GiB",
                "--policy=tensor-parallel",
                "--placements",
            ],
        ),
        ("report", &["load", "m", device, "--placements"]),
        ("report", &["load", "nan", device]),
        ("report", &["demo"]),
        (
            "comparison",
            &["plan", "m", device, "--diff", "auto", "packed"],
        ),
        (
            "comparison",
            &[
                "plan",
                "m",
                device,
                "--diff",
                "auto",
                "auto",
                "--set",
                "B.double-quant=true",
            ],
        ),
        (
            "comparison",
            &[&["plan", "m", device], &hostile[..]].concat(),
        ),
        ("inspection", &["inspect", "m"]),
        ("inspection", &["inspect", "m/model.safetensors"]),
        ("saved", &["save", "m", "saved"]),
        ("synthesized", &["synth", "demo", "d", "--headers-only"]),
        ("ran", &["run", "check.wasm", "x", "--grant", "x=m", device]),
        ("checked", &["check", "s.toml"]),
        ("devices", &["devices", "--device", "cpu", device]),
        ("policy", &["policy", "show", "auto"]),
        ("policies", &["policy", "list"]),
    ] {
        let outcome = scratchpad.run(&[arguments, &["--json"]].concat());
        assert_eq!(
            outcome.status,
            Some(i32::from(definition == "checked")),
            "{outcome:#?}"
        );
        let value = checked(&outcome, &schema, definition);
        assert_eq!((&value["schema"], value.get("error")), (&json!(1), None));
        used.push(definition);
    }
    // Every definition of something that is printed has been held against it.
    let text = include_str!("../../output.schema.json");
    let printed: Value = serde_json::from_str(text).unwrap();
    for choice in printed["anyOf"].as_array().unwrap() {
        let name = choice["$ref"]
            .as_str()
            .unwrap()
            .trim_start_matches("#/$defs/");
        assert!(used.contains(&name), "{name}");
    }
}

#[test]
fn every_error_has_the_documented_form() {
    let (scratchpad, schema) = (scratchpad(), schema());
    fs::write(scratchpad.path("text.safetensors"), "once upon a time").unwrap();
    fs::write(scratchpad.path("bad.toml"), "x").unwrap();
    fs::create_dir(scratchpad.path("full")).unwrap();
    fs::write(scratchpad.path("full/mine"), "").unwrap();
    let small = "--device=sim:64KiB";
    let hostile = |behavior| ["--policy", "hostile.wasm", "--set", behavior];
    let plan = |more: &[&'static str]| [&["plan", "m"], more].concat();
    for (arguments, status, kind, fields) in [
        (plan(&["--colour"]), 2, "usage", json!({})),
        (plan(&["--device", "gpu:0"]), 2, "usage", json!({})),
        (vec!["synth", "gpt-5", "d"], 2, "usage", json!({})),
        (
            vec!["plan", "m", "--staging", "1KiB"],
            2,
            "usage",
            json!({}),
        ),
        (
            plan(&["--set", "speed=9"]),
            2,
            "bad-setting",
            json!({ "guest": "auto", "setting": "speed" }),
        ),
        (
            plan(&["--set", "format:x=nf4"]),
            2,
            "bad-setting",
            json!({ "setting": "format:x" }),
        ),
        (
            plan(&["--policy", "clever"]),
            2,
            "no-policy",
            json!({ "guest": "clever" }),
        ),
        (
            vec!["run", "none.wasm"],
            2,
            "no-program",
            json!({ "path": "none.wasm" }),
        ),
        (
            vec!["check", "bad.toml"],
            2,
            "scenario",
            json!({ "path": "bad.toml" }),
        ),
        (
            vec!["check", "none.toml"],
            2,
            "scenario",
            json!({ "path": "none.toml" }),
        ),
        (
            vec!["save", "m", "full"],
            2,
            "exists",
            json!({ "path": "full" }),
        ),
        (
            vec!["synth", "demo", "full"],
            2,
            "exists",
            json!({ "path": "full" }),
        ),
        (
            vec!["inspect", "./none"],
            3,
            "checkpoint",
            json!({ "path": "./none" }),
        ),
        (
            vec!["inspect", "text.safetensors"],
            3,
            "checkpoint",
            json!({ "path": "text.safetensors" }),
        ),
        (
            plan(&[small]),
            4,
            "does-not-fit",
            json!({ "guest": "auto", "device": null, "need_bytes": null }),
        ),
        (
            vec!["demo", "--device=sim:1MiB"],
            4,
            "does-not-fit",
            json!({ "guest": "auto" }),
        ),
        (
            vec!["load", "m", small],
            4,
            "does-not-fit",
            json!({ "guest": "auto" }),
        ),
        (
            plan(&[&[small], &hostile("behavior=honest")[..]].concat()),
            4,
            "does-not-fit",
            json!({ "guest": "hostile.wasm", "device": "sim:0", "have_bytes": 65536 }),
        ),
        (
            plan(&hostile("behavior=refuse-model")),
            4,
            "unsupported",
            json!({}),
        ),
        (
            plan(&hostile("behavior=too-few")),
            5,
            "bad-plan",
            json!({ "guest": "hostile.wasm" }),
        ),
        (
            plan(&hostile("behavior=loop")),
            5,
            "out-of-fuel",
            json!({ "guest": "hostile.wasm", "limit": "fuel" }),
        ),
        (
            plan(&hostile("behavior=panic")),
            5,
            "panic",
            json!({ "limit": null }),
        ),
        (
            plan(&["--policy", "m/config.json"]),
            5,
            "not-a-policy",
            json!({}),
        ),
        (
            vec!["run", "program.wasm", "panic", small],
            5,
            "panic",
            json!({ "guest": "program.wasm" }),
        ),
        (
            vec!["run", "check.wasm", small],
            5,
            "gave-up",
            json!({ "guest": "check.wasm" }),
        ),
        (
            vec!["devices", "--device=cuda:7"],
            6,
            "no-device",
            json!({ "device": "cuda:7" }),
        ),
        (
            plan(&["--svg", "no/file"]),
            1,
            "output",
            json!({ "path": "no/file" }),
        ),
        (
            vec!["check", "s.toml", "--junit", "no/file"],
            1,
            "output",
            json!({ "path": "no/file" }),
        ),
        (vec!["save", "m", "s.toml/out"], 1, "output", json!({})),
        (
            vec!["synth", "demo", "s.toml/out"],
            2,
            "usage",
            json!({ "path": "s.toml/out" }),
        ),
    ] {
        let outcome = scratchpad.run(&[&arguments[..], &["--json"]].concat());
        assert_eq!(outcome.status, Some(status), "{outcome:#?}");
        let value = checked(&outcome, &schema, "error");
        let error = &value["error"];
        assert_eq!(
            (&error["status"], &error["kind"]),
            (&json!(status), &json!(kind)),
            "{outcome:#?}"
        );
        for (name, expected) in fields.as_object().unwrap() {
            assert_eq!(&error[name], expected, "{name} of {outcome:#?}");
        }
        if kind == "does-not-fit" {
            assert!(error["missing_bytes"].as_u64() > Some(0), "{outcome:#?}");
        }
        // The same sentence for people, and nothing on stdout where nobody asked for JSON.
        let message = error["message"].as_str().unwrap();
        assert!(
            outcome.stderr.contains(message.lines().next().unwrap()),
            "{outcome:#?}"
        );
        let text = scratchpad.run(&arguments).fails_midway(status, &[]);
        assert!(!text.stdout.contains('{'), "{text:#?}");
        // But for the names of temporary files.
        let said = |outcome: &Outcome| outcome.stderr.split(" at path ").next().unwrap().to_owned();
        assert_eq!(said(&text), said(&outcome));
    }
}

#[test]
fn what_is_missing_is_said_once() {
    let scratchpad = scratchpad();
    let plan = |policy: &[&str]| {
        let arguments = [&["plan", "m", "--device=sim:64KiB"], policy].concat();
        scratchpad
            .run(&arguments)
            .fails(4, &["refuses", "missing"])
            .stderr
    };
    assert_eq!(plan(&[]).matches("missing").count(), 1);
    let hostile = [
        "--policy",
        "hostile.wasm",
        "--set",
        "behavior=refuse-to-fit",
    ];
    let text = plan(&hostile);
    assert!(text.contains("it is all too much; "), "{text}");
    assert!(text.trim_end().ends_with(" are missing"), "{text}");
}

#[test]
fn nothing_that_is_printed_can_control_a_terminal() {
    let (scratchpad, schema) = (scratchpad(), schema());
    // In names of tensors, files and directories, in config.json, in settings and scenarios.
    let model = format!("m{ESCAPES}");
    fs::create_dir(scratchpad.path(&model)).unwrap();
    // Controls are turned down in names of tensors; not all that hides is one.
    let hides: String = ESCAPES.chars().filter(|c| !c.is_control()).collect();
    let name = format!("model.layers.0.mlp.{hides}.up_proj.weight");
    let tensors = [
        (
            name.as_str(),
            "BF16",
            &[64, 64][..],
            &[0xff; 2 * 64 * 64][..],
        ),
        (
            "lm_head.weight",
            "BF16",
            &[64, 64][..],
            &[0; 2 * 64 * 64][..],
        ),
    ];
    models::write_safetensors(&scratchpad.path(&model).join("model.safetensors"), &tensors);
    let config = json!({ "architectures": [ESCAPES], "model_type": ESCAPES });
    fs::write(
        scratchpad.path(&model).join("config.json"),
        config.to_string(),
    )
    .unwrap();
    fs::write(
        scratchpad.path("hostile.wasm"),
        hostile_in_describe("escape"),
    )
    .unwrap();
    let device = "--device=sim:1GiB";
    let refuse = [
        "--policy=hostile.wasm",
        "--set=behavior=refuse-with-escapes",
    ];
    let log = ["--policy=hostile.wasm", "--set=behavior=log-escapes", "-v"];
    let skip = format!("--set=skip={ESCAPES}");
    let scenario = format!("s{ESCAPES}.toml");
    let text = format!(
        "[[scenario]]\nname = {0}\nmodel = {{ tensors = [{{ name = {1}, shape = [64, 64] }}] }}\n\
         devices = [\"sim:1GiB\"]\n[scenario.expect.tensors]\n{0} = {{ format = \"nf4\" }}\n\
         \"*\" = {{ format = \"f32\" }}\n",
        json!(format!("x{}", &ESCAPES[1..])),
        json!(format!("y{}", &ESCAPES[1..])),
    );
    fs::write(scratchpad.path(&scenario), text).unwrap();
    let out = format!("out{ESCAPES}");
    for (definition, arguments) in [
        ("inspection", vec!["inspect", &model]),
        ("report", vec!["plan", &model, device, "--placements"]),
        ("report", vec!["plan", &model, device, &skip]),
        ("report", [&["plan", "m", device][..], &log].concat()),
        ("report", vec!["load", &model, device, "--placements"]),
        (
            "comparison",
            vec!["plan", &model, device, "--diff", "auto", "hostile.wasm"],
        ),
        ("error", [&["plan", &model, device][..], &refuse].concat()),
        ("error", vec!["load", &model, device, "--strict"]),
        ("error", vec!["plan", &out, device]),
        ("error", vec!["plan", "m", device, "--set", ESCAPES]),
        ("error", vec!["save", &model, &scenario]),
        ("saved", vec!["save", &model, &out]),
        ("policy", vec!["policy", "show", "hostile.wasm"]),
        ("ran", vec!["run", "program.wasm", "escape", device]),
        (
            "error",
            vec!["run", "program.wasm", "give-up-with-escapes", device],
        ),
        ("checked", vec!["check", &scenario]),
        ("error", vec!["check", &out]),
    ] {
        let json = scratchpad.run(&[&arguments[..], &["--json"]].concat());
        checked(&json, &schema, definition);
        let text = scratchpad.run(&arguments);
        is_tame(&text.stdout);
        is_tame(&text.stderr);
        if definition == "saved" {
            fs::remove_dir_all(scratchpad.path(&out)).unwrap();
        }
    }
    // A parser gets what was there.
    let report = scratchpad
        .run(&["inspect", &model, "--json"])
        .succeeds()
        .json();
    assert_eq!(
        (&report["path"], &report["architecture"]),
        (&json!(model), &json!(ESCAPES))
    );
    let report = scratchpad.run(&["plan", &model, device, "--json", "--placements"]);
    let report = report.succeeds().json();
    let mut placements = report["placements"].as_array().unwrap().iter();
    assert!(placements.any(|placement| placement["tensor"] == json!(name)));
    for (option, command) in [
        ("--svg", vec!["plan", &model, device]),
        ("--timeline", vec!["load", &model, device]),
        ("--junit", vec!["check", &scenario]),
    ] {
        let outcome = scratchpad.run(&[&command[..], &[option, "file"]].concat());
        is_tame(&outcome.stderr);
        is_tame(&fs::read_to_string(scratchpad.path("file")).unwrap());
        is_tame(
            &scratchpad
                .run(&[&command[..], &[option, "-"]].concat())
                .stdout,
        );
    }
}
