//! Hostile policies on the command line: exit status, and a sentence with the policy and why.

use std::fs;
#[cfg(unix)]
use std::time::Duration;

use serde_json::Value;
use tightfit::text::is_hidden;
use tightfit_tests::command::{Outcome, Scratchpad};
use tightfit_tests::guests::{HOSTILE, Handwritten, hostile_in_describe};
use tightfit_tests::models;

const USAGE: i32 = 2;
const DOES_NOT_FIT: i32 = 4;
const POLICY: i32 = 5;
#[cfg(unix)]
const DEVICE: i32 = 6;

/// With an awkward model and the hostile policy.
fn hostile_place() -> Scratchpad {
    let scratchpad = Scratchpad::new();
    fs::create_dir(scratchpad.path("m")).unwrap();
    models::write_awkward(&scratchpad.path("m"));
    fs::write(scratchpad.path("hostile.wasm"), HOSTILE).unwrap();
    scratchpad
}

fn plan(scratchpad: &Scratchpad, behavior: &str) -> Outcome {
    let behavior = format!("behavior={behavior}");
    let device = ["--device", "sim:64MiB"];
    let policy = ["--policy", "hostile.wasm", "--set", &behavior];
    scratchpad.run(&[&["plan", "m"], &device[..], &policy].concat())
}

#[test]
fn a_policy_that_fails_is_named_with_the_reason() {
    let scratchpad = hostile_place();
    for (behavior, word) in [
        ("loop", "out of fuel"),
        ("recurse", "stack overflowed"),
        ("eat-memory", "at most 256.0 MiB"),
        ("panic", "the policy has lost its head"),
    ] {
        let outcome = plan(&scratchpad, behavior);
        assert_eq!(outcome.status, Some(POLICY), "{outcome:?}");
        let sentence = outcome
            .stderr
            .lines()
            .skip_while(|line| !line.starts_with("tightfit: "));
        let sentence: String = sentence.collect();
        assert!(sentence.contains("hostile.wasm"), "{outcome:?}");
        assert!(sentence.contains(word), "{outcome:?}");
    }
    for (behavior, word) in [
        ("too-few", "placed 3 tensors"),
        ("no-such-device", "device number 1"),
        ("block-48", "power of two"),
        ("torn-tie", "lm_head.weight"),
        ("few-headrooms", "headroom"),
    ] {
        plan(&scratchpad, behavior).fails(POLICY, &["policy 'hostile.wasm'", "bad plan", word]);
    }
    plan(&scratchpad, "honest").succeeds();
}

#[test]
fn what_is_not_loaded_and_patterns_that_match_nothing_are_pointed_out() {
    let scratchpad = hostile_place();
    let warning = "tensors are not loaded, '";
    let outcome = plan(&scratchpad, "load-nothing");
    assert_eq!(outcome.status, Some(0), "{outcome:?}");
    assert!(outcome.stderr.contains(warning), "{outcome:?}");
    let outcome = plan(&scratchpad, "honest");
    assert_eq!(outcome.status, Some(0), "{outcome:?}");
    assert!(!outcome.stderr.contains(warning), "{outcome:?}");
    let behavior = ["--policy", "hostile.wasm", "--set", "behavior=load-nothing"];
    let save = [&["save", "m", "saved"], &behavior[..]].concat();
    let outcome = scratchpad.run(&save);
    assert_eq!(outcome.status, Some(0), "{outcome:?}");
    assert!(outcome.stderr.contains(warning), "{outcome:?}");

    let skip = |policy: &str, skip: &str| {
        let skip = format!("skip={skip}");
        let policy = ["--policy", policy, "--set", &skip, "--set"];
        let map = match policy[1] {
            "map" => r#"device-map={"": 0}"#,
            _ => "experts=nf4",
        };
        let device = ["--device", "sim:64MiB"];
        scratchpad.run(&[&["plan", "m"], &device[..], &policy, &[map]].concat())
    };
    for policy in ["auto", "packed", "huggingface", "map"] {
        let outcome = skip(policy, "nonexistent");
        assert_eq!(outcome.status, Some(0), "{outcome:?}");
        let warning = "setting `skip`: no tensor matches `nonexistent`";
        assert!(outcome.stderr.contains(warning), "{outcome:?}");
        let outcome = skip(policy, "*");
        assert_eq!(outcome.status, Some(0), "{outcome:?}");
        assert!(!outcome.stderr.contains("skip"), "{outcome:?}");
    }
}

#[test]
fn a_refusal_has_the_status_of_its_reason() {
    let scratchpad = hostile_place();
    for (behavior, status, words) in [
        ("refuse-to-fit", DOES_NOT_FIT, "it is all too much"),
        ("refuse-model", DOES_NOT_FIT, "I do not like this model"),
        ("refuse-setting", USAGE, "I do not like this setting"),
        ("unheard-of", USAGE, "unheard-of"),
    ] {
        plan(&scratchpad, behavior).fails(status, &["hostile", "refuses", words]);
    }
}

#[test]
fn a_proposal_that_does_not_fit_names_device_need_have_and_tensor() {
    let scratchpad = hostile_place();
    let arguments = [
        "plan",
        "m",
        "--device",
        "sim:6000B",
        "--policy",
        "hostile.wasm",
    ];
    let tensor = "model.layers.0.mlp.up_proj.weight";
    let words = ["hostile", "sim:0", "12.00 KiB", "5.859 KiB", tensor];
    scratchpad.run(&arguments).fails(DOES_NOT_FIT, &words);
    plan(&scratchpad, "endless-headroom").fails(DOES_NOT_FIT, &["headroom", "sim:0", "64.00 MiB"]);
}

/// Whether a terminal would show it as text.
fn is_tame(text: &str) -> bool {
    !text.chars().any(|c| c != '\n' && is_hidden(c))
}

#[test]
fn a_policy_cannot_write_to_the_terminal() {
    let scratchpad = hostile_place();
    fs::write(
        scratchpad.path("hostile.wasm"),
        hostile_in_describe("escape"),
    )
    .unwrap();
    for behavior in ["refuse-with-escapes", "log-escapes", "too-few", "honest"] {
        let outcome = plan(&scratchpad, behavior);
        assert!(is_tame(&outcome.stdout), "{outcome:?}");
        assert!(is_tame(&outcome.stderr), "{outcome:?}");
        let all = format!("{}{}", outcome.stdout, outcome.stderr);
        // Errors call it as it was asked for, not as it calls itself.
        let named = behavior != "too-few";
        assert_eq!(all.contains("evil\\u{1b}[2J"), named, "{outcome:?}");
    }
    let shown = scratchpad
        .run(&["policy", "show", "hostile.wasm"])
        .succeeds()
        .stdout;
    assert!(is_tame(&shown) && shown.contains("evil"), "{shown:?}");
}

#[test]
fn a_policy_cannot_fill_the_terminal() {
    const MOST: usize = 100 << 10;
    let scratchpad = hostile_place();
    let flood = plan(&scratchpad, "flood-the-log");
    assert_eq!(flood.status, Some(0));
    assert!(
        flood.stderr.contains("policy: warn: flood"),
        "{}",
        flood.stderr
    );
    assert!(flood.stderr.len() < MOST, "{}", flood.stderr.len());
    let refusal = plan(&scratchpad, "refuse-at-length").fails(DOES_NOT_FIT, &["hostile", "xxx"]);
    assert!(refusal.stderr.len() < MOST, "{}", refusal.stderr.len());
    plan(&scratchpad, "refuse-without-end").fails(POLICY, &["hostile.wasm", "`host-call-bytes`"]);
    fs::write(scratchpad.path("hostile.wasm"), hostile_in_describe("long")).unwrap();
    let shown = scratchpad
        .run(&["policy", "show", "hostile.wasm"])
        .succeeds();
    assert!(shown.stdout.len() < MOST, "{}", shown.stdout.len());
}

#[test]
fn describe_can_fail_too() {
    let scratchpad = hostile_place();
    for (behavior, word) in [("loop", "out of fuel"), ("panic", "lost its head")] {
        fs::write(
            scratchpad.path("hostile.wasm"),
            hostile_in_describe(behavior),
        )
        .unwrap();
        for arguments in [
            &["policy", "show", "hostile.wasm"][..],
            &["plan", "m", "--policy", "hostile.wasm"],
            &["inspect", "m", "--policy", "hostile.wasm"],
        ] {
            scratchpad
                .run(arguments)
                .fails(POLICY, &["hostile.wasm", word]);
        }
    }
}

#[test]
fn files_that_are_no_policies_are_turned_down() {
    let scratchpad = hostile_place();
    for (bytes, word) in [
        (&b"(component)"[..], "not a WebAssembly binary"),
        (b"\x7fELF", "not a WebAssembly binary"),
        (&HOSTILE[..HOSTILE.len() / 2], "hostile.wasm"),
    ] {
        fs::write(scratchpad.path("hostile.wasm"), bytes).unwrap();
        plan(&scratchpad, "honest").fails(POLICY, &["hostile.wasm", word]);
    }
    let file = fs::File::create(scratchpad.path("hostile.wasm")).unwrap();
    file.set_len(1 << 40).unwrap();
    plan(&scratchpad, "honest").fails(POLICY, &["hostile.wasm", "1.000 TiB", "32.00 MiB"]);
}

/// A model of real shape without data.
fn scratchpad_with(preset: &str) -> Scratchpad {
    let scratchpad = Scratchpad::new();
    scratchpad
        .run(&["synth", preset, "m", "--headers-only", "--quiet"])
        .succeeds();
    scratchpad
}

fn devices_of(report: &Value) -> Vec<(&str, u64, u64)> {
    let devices = report["devices"].as_array().unwrap().iter();
    let number = |value: &Value| value.as_u64().unwrap();
    devices
        .map(|device| {
            (
                device["name"].as_str().unwrap(),
                number(&device["reserved"]),
                number(&device["headroom"]),
            )
        })
        .collect()
}

#[test]
fn packed_leaves_the_devices_empty_that_it_does_not_need() {
    let scratchpad = scratchpad_with("qwen2.5-7b");
    let device = ["--device", "sim:4GiB"].repeat(4);
    let arguments = [&["plan", "m", "--json"], &device[..]].concat();
    let packed = [&arguments[..], &["--policy", "packed"]].concat();
    let report = scratchpad.run(&packed).succeeds().json();
    let packed: Vec<u64> = devices_of(&report).iter().map(|d| d.1).collect();
    assert!(packed[0] > 3900 << 20 && packed[1] > 0, "{packed:?}");
    assert_eq!(packed[2..], [0, 0]);
    let report = scratchpad.run(&arguments).succeeds().json();
    let spread: Vec<u64> = devices_of(&report).iter().map(|d| d.1).collect();
    assert!(spread.iter().all(|&bytes| bytes > 0), "{spread:?}");
    assert!(spread.iter().max() < packed.iter().max());
}

#[test]
fn a_long_context_of_a_large_model_fits_on_two_cards_with_its_cache() {
    let scratchpad = scratchpad_with("qwen3.5-35b-a3b");
    let device = ["--device", "sim:32GiB"].repeat(2);
    let context = ["--set", "context=262144", "--set", "batch=1", "--json"];
    let arguments = [&["plan", "m"], &device[..], &context].concat();
    let report = scratchpad.run(&arguments).succeeds().json();
    // Ten of forty layers have full attention: two heads of 256 for keys and as many for values.
    let cache = 10 * 262_144 * 2 * 2 * 256 * 2;
    // The others keep a state of 128 by 128 for each of 32 heads, and four columns for a convolution.
    let states = 30 * (32 * 128 * 128 * 4 + 8192 * 4 * 2);
    let logits = 248_320 * 4;
    let headroom: u64 = devices_of(&report).iter().map(|d| d.2).sum();
    assert_eq!(headroom, cache + states + logits);
    for (name, reserved, headroom) in devices_of(&report) {
        assert!(reserved > 0 && headroom > 0, "{name}");
        assert!(reserved + headroom <= 32 << 30, "{name}");
    }
}

#[test]
fn a_device_map_places_what_it_names_by_either_name() {
    let scratchpad = scratchpad_with("mixtral-8x7b");
    let map = r#"{"": 0, "model.layers.31.mlp.experts.gate_up_proj": "cpu", "model.layers.9": 1}"#;
    fs::write(scratchpad.path("map.json"), format!("{map}\n")).unwrap();
    let arguments = [
        "plan",
        "m",
        "--policy",
        "map",
        "--set",
        "device-map=@map.json",
        "--set",
        "reserve=1GiB",
        "--device",
        "sim:32GiB",
        "--device",
        "sim:8GiB",
        "--device",
        "cpu:8GiB",
        "--json",
        "--placements",
    ];
    let report = scratchpad.run(&arguments).succeeds().json();
    let placements = report["placements"].as_array().unwrap();
    assert_eq!(placements.len(), 995);
    for placement in placements {
        let name = placement["tensor"].as_str().unwrap();
        let is_gate_or_up = name.ends_with(".w1.weight") || name.ends_with(".w3.weight");
        let expected = if name.starts_with("model.layers.31.") && is_gate_or_up {
            "cpu"
        } else if name.starts_with("model.layers.9.") {
            "sim:1"
        } else {
            "sim:0"
        };
        assert_eq!(placement["device"], expected, "{name}");
    }
    assert!(devices_of(&report).iter().all(|device| device.2 == 1 << 30));
}

#[test]
fn a_map_that_cannot_be_followed_is_refused() {
    let scratchpad = scratchpad_with("qwen2.5-0.5b");
    let map = |map: &str| {
        let setting = format!("device-map={map}");
        let policy = ["--policy", "map", "--set", &setting];
        let device = ["--device", "sim:100MiB", "--device", "sim:8GiB"];
        scratchpad.run(&[&["plan", "m"], &policy[..], &device].concat())
    };
    map("{\"model\": 7}").fails(USAGE, &["`model` on 7", "sim:0, sim:1"]);
    map("{\"model.layers\": 1}").fails(USAGE, &["no entry for `model.embed_tokens.weight`"]);
    map("{").fails(USAGE, &["no device map", "line 1"]);
    map("{\"\": 0}").fails(
        DOES_NOT_FIT,
        &["sim:0", "missing", "moving modules to sim:1"],
    );
    let outcome = map("{\"\": 1, \"model.layer.3\": 0}");
    assert_eq!(outcome.status, Some(0), "{outcome:?}");
    let warning = "no tensor begins with `model.layer.3`";
    assert!(outcome.stderr.contains(warning), "{outcome:?}");
}

#[test]
fn a_setting_is_read_from_a_file() {
    let scratchpad = hostile_place();
    let set = |setting: &str| {
        let arguments = ["plan", "m", "--device", "sim:64MiB", "--json", "--set"];
        scratchpad.run(&[&arguments[..], &[setting]].concat())
    };
    fs::write(scratchpad.path("value"), "lm_head, *.up_proj\n").unwrap();
    let report = set("skip=@value").succeeds().json();
    assert_eq!(report["policy"]["settings"]["skip"], "lm_head, *.up_proj\n");
    let outcome = set("skip=@@value");
    assert_eq!(outcome.json()["policy"]["settings"]["skip"], "@value");
    assert!(
        outcome.stderr.contains("no tensor matches `@value`"),
        "{outcome:?}"
    );
    set("skip=@nothing").fails(USAGE, &["skip=@nothing", "'nothing'", "os error 2"]);
    let of_directory = if cfg!(windows) {
        "os error"
    } else {
        "directory"
    };
    set("skip=@m").fails(USAGE, &["'m'", of_directory]);
    set("skip=@").fails(USAGE, &["''"]);
    fs::write(scratchpad.path("value"), b"\xff").unwrap();
    set("skip=@value").fails(USAGE, &["'value'", "UTF-8"]);
    let file = fs::File::create(scratchpad.path("value")).unwrap();
    file.set_len((16 << 20) + 1).unwrap();
    set("skip=@value").fails(USAGE, &["'value'", "longer than 16.00 MiB"]);
}

#[test]
fn a_limit_that_is_hit_is_named_and_can_be_set() {
    let scratchpad = hostile_place();
    // What is kept need not be compiled.
    let show = |limit: &str| {
        let limit = ["--policy-limit", limit];
        scratchpad.run(
            &[
                &["policy", "show", "hostile.wasm", "--no-cache"],
                &limit[..],
            ]
            .concat(),
        )
    };
    show("memory=1GiB").succeeds();
    for (limit, name) in [
        ("memory=64KiB", "memory"),
        ("fuel=10", "fuel"),
        ("component=1KiB", "component"),
        ("function=16", "function"),
        ("memories=0", "memories"),
        ("tables=0", "tables"),
        ("instances=1", "instances"),
        ("modules=0", "modules"),
        ("imports=0", "imports"),
        ("table-elements=0", "table-elements"),
        ("settings=0", "settings"),
        ("host-call-bytes=1", "host-call-bytes"),
        ("compile-time=0", "compile-time"),
        ("compile-memory=1MiB", "compile-memory"),
        ("compiled=1KiB", "compiled"),
    ] {
        if cfg!(windows) && name == "compile-memory" {
            // Wine has such limits set and does not enforce them.
            continue;
        }
        let hint = format!("--policy-limit {name}=VALUE");
        show(limit).fails(POLICY, &["hostile.wasm", &format!("`{name}`"), &hint]);
    }
    // What is said is cut, not refused.
    let brief = scratchpad.run(&[
        "policy",
        "show",
        "hostile.wasm",
        "--policy-limit",
        "text-bytes=3",
    ]);
    assert!(brief.succeeds().stdout.starts_with("hos… 1.0…"));
    for limit in ["memory=much", "deadline=-1", "stack=1MiB", "fuel", "=1"] {
        show(limit).fails(USAGE, &["--policy-limit"]);
    }
}

#[test]
fn a_policy_for_another_host_is_told_apart_in_a_sentence() {
    let scratchpad = hostile_place();
    let show = |interface: &str, more: &[&str]| {
        let text =
            format!(r#"(component (import "{interface}" (instance (export "now" (func)))))"#);
        fs::write(scratchpad.path("other.wasm"), wat::parse_str(text).unwrap()).unwrap();
        scratchpad.run(&[&["policy", "show", "other.wasm"], more].concat())
    };
    let newer =
        "it imports tightfit:host/log@0.2.0, this host has 0.1.0: it is for a newer release";
    show("tightfit:host/log@0.2.0", &[]).fails(POLICY, &["other.wasm", newer]);
    let wasi = "wasi:clocks/wall-clock@0.2.0";
    show(wasi, &[]).fails(POLICY, &[wasi, "no WASI here", "--wasi empty"]);
    show(wasi, &["--wasi", "empty"])
        .fails(POLICY, &["does not export tightfit:host/planner@0.1.0"]);
    show(wasi, &["--wasi", "full"]).fails(USAGE, &["none or empty"]);
}

#[test]
fn what_is_logged_is_bounded_by_a_limit() {
    let scratchpad = hostile_place();
    let behavior = [
        "--policy",
        "hostile.wasm",
        "--set",
        "behavior=flood-the-log",
    ];
    let flood = |limit: &str| {
        let limit = ["--policy-limit", limit];
        let arguments = [
            &["plan", "m", "--device", "sim:64MiB"],
            &behavior[..],
            &limit,
        ]
        .concat();
        scratchpad
            .run(&arguments)
            .stderr
            .matches("policy: warn: flood")
            .count()
    };
    assert_eq!(flood("log-bytes=0"), 0);
    assert_eq!(flood("log-bytes=3KiB"), 4);
}

#[test]
fn names_are_cut_as_all_that_a_policy_says() {
    // Texts of 4 KiB, some with a second one, and what is said around them.
    const MOST: usize = 9 << 10;
    let scratchpad = hostile_place();
    let long = "x".repeat(100_000);
    let control = "\\1b".repeat(50_000);
    let component = |parts: &str| wat::parse_str(format!("(component {parts})")).unwrap();
    let module = |parts: &str| Handwritten {
        imports: parts.to_owned(),
        ..Handwritten::default()
    };
    let planner = r#"(instance $n) (export "tightfit:host/planner@0.1.0" (instance $n))"#;
    for policy in [
        component(&format!(r#"(import "{long}" (func))"#)),
        component(&format!(
            r#"(import "acme:{long}/{long}@1.0.0" (instance))"#
        )),
        component(&format!(r#"(import "wasi:{long}/x@0.2.0" (instance))"#)),
        component(&format!(
            r#"(import "tightfit:host/log@0.2.0+{long}" (instance)) {planner}"#
        )),
        component(&format!(
            r#"(import "tightfit:host/log@0.1.0" (instance (export "{long}" (func)))) {planner}"#
        )),
        component(&format!(
            r#"(import "tightfit:host/log@0.1.0+{long}" (instance (export "write" (func)))) {planner}"#
        )),
        component(&format!(
            r#"(instance $n) (export "tightfit:host/planner@9.1.0+{long}" (instance $n))"#
        )),
        component(&format!(
            r#"(core module $m (import "{long}" "{long}" (func)))
            (core instance (instantiate $m)) {planner}"#
        )),
        module(&format!(r#"(import "{long}" "{long}" (func))"#)).module(),
        module(&format!(r#"(import "{control}" "{control}" (func))"#)).module(),
        module(&format!(
            r#"(import "tightfit:host/log@0.1.0" "{control}" (func))"#
        ))
        .module(),
    ] {
        fs::write(scratchpad.path("long.wasm"), &policy).unwrap();
        for wasi in ["none", "empty"] {
            let arguments = ["policy", "show", "long.wasm", "--no-cache", "--wasi", wasi];
            let outcome = scratchpad.run(&arguments);
            let shown = outcome.stderr.len() + outcome.stdout.len();
            assert_eq!(outcome.status, Some(POLICY), "{:.300}", outcome.stderr);
            assert!(shown < MOST, "{shown} bytes: {:.300}", outcome.stderr);
            let brief = [&arguments[..], &["--policy-limit", "text-bytes=20"]].concat();
            let outcome = scratchpad.run(&brief);
            assert!(outcome.stderr.len() < 400, "{:.500}", outcome.stderr);
        }
    }
    // What a policy that works imports is listed.
    let interface = format!("tightfit:host/log@0.1.0+{}", "x".repeat(100_000));
    let import = format!(r#"(import "{interface}" "write" (func (param i32 i32 i32)))"#);
    fs::write(scratchpad.path("long.wasm"), module(&import).module()).unwrap();
    let outcome = scratchpad.run(&["policy", "show", "long.wasm"]);
    assert!(
        outcome.stdout.len() + outcome.stderr.len() < MOST,
        "{:.300}",
        outcome.stdout
    );
}

#[test]
fn settings_are_listed_as_far_as_one_text_goes() {
    let scratchpad = hostile_place();
    fs::write(
        scratchpad.path("hostile.wasm"),
        hostile_in_describe("many-settings"),
    )
    .unwrap();
    let limit = ["--policy-limit", "settings=100000"];
    let arguments = [
        &["plan", "m", "--policy", "hostile.wasm", "--set", "none=1"],
        &limit[..],
    ]
    .concat();
    let outcome = scratchpad
        .run(&arguments)
        .fails(USAGE, &["no setting 'none'"]);
    assert!(outcome.stderr.len() < 5000, "{}", outcome.stderr.len());
}

// Elsewhere nobody asks whether somebody reads.
#[cfg(unix)]
#[test]
fn a_policy_whose_messages_nobody_reads_does_not_outstay_its_deadline() {
    let scratchpad = hostile_place();
    // Empty messages, and such that are escaped.
    for (message, length) in [(0, 0), (1000, 4000), (65, 1)] {
        let policy = Handwritten {
            imports:
                r#"(import "tightfit:host/log@0.1.0" "write" (func $log (param i32 i32 i32)))"#
                    .to_owned(),
            describe: format!(
                "(loop (call $log (i32.const 0) (i32.const {message}) (i32.const {length})) (br 0))
                (unreachable)"
            ),
            ..Handwritten::default()
        };
        fs::write(scratchpad.path("test.wasm"), policy.module()).unwrap();
        fs::write(
            scratchpad.path("s.toml"),
            "[[scenario]]\nname = \"it\"\npolicy = \"test.wasm\"\nmodel = { preset = \"demo\" }\n\
             devices = [\"sim:1GiB\"]\nexpect = { fails = \"deadline\" }\n",
        )
        .unwrap();
        let commands = [
            &["policy", "show", "test.wasm"][..],
            &["plan", "m", "--policy", "test.wasm"],
            &["check", "s.toml"],
        ];
        // Each waits for a reader for a while.
        let commands = &commands[..if length == 1 { 3 } else { 1 }];
        for arguments in commands {
            let limits = [
                "--policy-limit",
                "deadline=0.2",
                "--policy-limit",
                "log-bytes=1MiB",
            ];
            let mut running = scratchpad.start(&[*arguments, &limits].concat());
            assert!(
                running.ends_unread(Duration::from_secs(120)),
                "{arguments:?}"
            );
            // What was said before is there for who reads it now.
            let said = running.finish().stderr;
            assert!(said.contains("policy: error: "), "{said:.300}");
        }
        // Within the default limit nothing is lost.
        let limits = ["--policy-limit", "deadline=0.2"];
        let outcome = scratchpad.run(&[&["policy", "show", "test.wasm"], &limits[..]].concat());
        let outcome = outcome.fails(POLICY, &["longer than 0.2 s"]);
        let most = (68 << 10) + 200;
        assert!(outcome.stderr.len() < most, "{}", outcome.stderr.len());
    }
}

#[cfg(unix)]
#[test]
fn a_policy_makes_do_with_little_address_space_and_says_what_is_missing() {
    let scratchpad = hostile_place();
    let arguments = ["plan", "m", "--device", "sim:64MiB", "--json"];
    let usual = scratchpad.run(&arguments).succeeds().json();
    let scarce = scratchpad
        .run_in_space(400_000, &arguments)
        .succeeds()
        .json();
    assert_eq!(scarce["fuel"], usual["fuel"]);
    assert_eq!(scarce["devices"], usual["devices"]);
    // One that is compiled by another process.
    let show = ["policy", "show", "hostile.wasm"];
    scratchpad.run_in_space(400_000, &show).succeeds();
    // The guest may have what the process has not.
    let greedy = Handwritten {
        describe: "(drop (memory.grow (i32.const 4000))) (i32.const 16)".to_owned(),
        ..Handwritten::default()
    };
    fs::write(scratchpad.path("greedy.wasm"), greedy.module()).unwrap();
    scratchpad
        .run(&["policy", "show", "greedy.wasm"])
        .succeeds();
    let outcome = scratchpad.run_in_space(200_000, &["policy", "show", "greedy.wasm"]);
    outcome.fails(DEVICE, &["could not be run", "address space", "ulimit -v"]);
    // A limit is a limit all the same.
    let limits = ["--policy-limit", "memory=1MiB"];
    let arguments = [&["policy", "show", "greedy.wasm"], &limits[..]].concat();
    let outcome = scratchpad.run_in_space(200_000, &arguments);
    outcome.fails(POLICY, &["`memory`"]);
}
