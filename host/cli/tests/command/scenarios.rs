//! `tightfit check`: the scenarios of the built-in policies, and what is said where one fails.

use std::fs;
use std::path::{Path, PathBuf};

use quick_xml::Reader;
use quick_xml::events::Event;
use tightfit_tests::command::Scratchpad;
use tightfit_tests::guests::HOSTILE;

const FAILED: i32 = 1;
const USAGE: i32 = 2;

/// A model, two devices, and one scenario of each sort.
const MIXED: &str = r#"
[defaults]
model = { preset = "qwen2.5-0.5b" }
devices = [{ spec = "sim:2GiB", count = 2 }]

[[scenario]]
name = "right"
expect = { fits = true, total = { devices = 2 } }

[[scenario]]
name = "wrong <&\u001b>"
[scenario.expect]
total = { requested = { at-most = "400MiB" } }
[scenario.expect.tensors]
"model.layers.3.*" = { device = "sim:0", format = "stored" }
"*.experts.*" = { format = "nf4" }

[[scenario]]
name = "cannot be run"
policy = "nowhere.wasm"
expect = { fits = true }
"#;

fn scratchpad_with(text: &str) -> Scratchpad {
    let scratchpad = Scratchpad::new();
    fs::write(scratchpad.path("s.toml"), text).unwrap();
    scratchpad
}

#[test]
fn the_built_in_policies_keep_their_promises() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios");
    let mut files: Vec<PathBuf> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(files.len() >= 2, "{files:?}");
    let mut arguments = vec![PathBuf::from("check"), "--json".into()];
    arguments.extend(files);
    let scratchpad = Scratchpad::new();
    let outcome = scratchpad.run(&arguments);
    let report = outcome.json();
    assert_eq!(outcome.status, Some(0), "{report:#}");
    assert!(report["ok"].as_u64().unwrap() >= 20, "{report:#}");
    let left = fs::read_dir(scratchpad.temporary()).unwrap().count();
    assert_eq!(left, 0, "models are left behind");
}

#[test]
fn what_was_expected_and_what_was_found_is_printed() {
    let scratchpad = scratchpad_with(MIXED);
    let outcome = scratchpad.run(&["check", "s.toml"]);
    assert_eq!(outcome.status, Some(FAILED), "{outcome:#?}");
    for line in [
        "ok      s.toml: right",
        "FAILED  s.toml: wrong <&\\u{1b}>",
        "expected: in all: requested at most 400.0 MiB (419430400 B)",
        "found:    451.7 MiB (473689856 B)",
        "expected: tensors 'model.layers.3.*' on sim:0",
        "found:    sim:1 for 12 (of 12 in all)",
        "tensors:  model.layers.3.",
        "expected: tensors 'model.layers.3.*' as stored",
        "found:    nf4 for 7 (of 12 in all)",
        "expected: tensors '*.experts.*'",
        "found:    no tensor has such a name",
        "ERROR   s.toml: cannot be run",
        "nowhere.wasm",
        "3 cases: 1 ok, 1 failed, 1 could not be run",
    ] {
        assert!(outcome.stdout.contains(line), "{line}: {outcome:#?}");
    }
    assert!(outcome.stderr.contains("2 of 3 cases"), "{outcome:#?}");
    let quiet = scratchpad.run(&["check", "s.toml", "--quiet"]);
    assert!(!quiet.stdout.contains("right"), "{quiet:#?}");
    assert!(quiet.stdout.contains("FAILED"), "{quiet:#?}");
}

#[test]
fn one_case_is_counted_as_one_and_a_pattern_without_match_has_failed() {
    let scratchpad = scratchpad_with(
        "[[scenario]]\nname = \"x\"\nmodel = { preset = \"demo\" }\ndevices = [\"sim:1GiB\"]\n\
         [scenario.expect.tensors]\n\"*.experts.*\" = { format = \"nf4\" }\n",
    );
    let outcome = scratchpad.run(&["check", "s.toml", "--json"]);
    let words = ["1 of 1 case did not go as expected"];
    let report = outcome.fails_midway(FAILED, &words).json();
    assert_eq!(
        (&report["failed"], &report["errors"]),
        (&1.into(), &0.into())
    );
    assert_eq!(report["files"][0]["cases"][0]["status"], "failed");
}

#[test]
fn programs_get_json_and_junit() {
    let scratchpad = scratchpad_with(MIXED);
    let outcome = scratchpad.run(&["check", "s.toml", "--json", "--junit", "report.xml"]);
    let report = outcome.json();
    assert_eq!(report["schema"], 1);
    let counts = [&report["ok"], &report["failed"], &report["errors"]];
    assert_eq!(counts.map(|count| count.as_u64().unwrap()), [1, 1, 1]);
    let wrong = &report["files"][0]["cases"][1];
    assert_eq!(wrong["status"], "failed");
    let findings = wrong["expectations"].as_array().unwrap();
    assert!(findings.iter().all(|finding| finding["holds"] == false));
    assert_eq!(findings.len(), 4, "{wrong:#}");

    let xml = fs::read_to_string(scratchpad.path("report.xml")).unwrap();
    let mut reader = Reader::from_str(&xml);
    let (mut cases, mut failures, mut errors) = (0, 0, 0);
    loop {
        match reader.read_event().unwrap() {
            Event::Eof => break,
            Event::Start(tag) | Event::Empty(tag) => match tag.name().as_ref() {
                "testcase" => cases += 1,
                "failure" => failures += 1,
                "error" => errors += 1,
                _ => {}
            },
            _ => {}
        }
    }
    assert_eq!((cases, errors), (3, 1), "{xml}");
    assert!(failures >= 1, "{xml}");
    assert!(!xml.contains('\u{1b}'), "{xml}");
}

#[test]
fn ways_to_fail_can_be_expected() {
    let scratchpad = scratchpad_with(
        r#"
        [defaults]
        policy = "hostile.wasm"
        devices = ["sim:64MiB"]
        [defaults.model]
        tensors = [{ name = "lm_head.weight", shape = [64, 64] }]

        [[scenario]]
        name = "it runs out of fuel"
        settings = { behavior = "loop" }
        expect = { fails = "out-of-fuel" }

        [[scenario]]
        name = "it gives too little"
        settings = { behavior = "too-few" }
        expect = { fails = { kind = "bad-plan", message = "placed 0 tensors" } }

        [[scenario]]
        name = "it refuses"
        settings = [{ behavior = "refuse-to-fit" }, { behavior = "refuse-setting" }]
        expect = { fits = false }

        [[scenario]]
        name = "it does not panic"
        settings = { behavior = "honest" }
        expect = { fails = "panic" }
        "#,
    );
    fs::write(scratchpad.path("hostile.wasm"), HOSTILE).unwrap();
    let outcome = scratchpad.run(&["check", "s.toml"]);
    assert_eq!(outcome.status, Some(FAILED), "{outcome:#?}");
    assert!(
        outcome.stdout.contains("5 cases: 3 ok, 2 failed"),
        "{outcome:#?}"
    );
    // A bad setting is no sign of too little memory.
    for case in ["it refuses [behavior=refuse-setting]", "it does not panic"] {
        let line = format!("FAILED  s.toml: {case}");
        assert!(outcome.stdout.contains(&line), "{outcome:#?}");
    }
}

#[test]
fn a_file_that_makes_no_sense_is_refused_with_its_line() {
    let model = "model = { preset = \"demo\" }\ndevices = [\"sim:1GiB\"]\n";
    for (text, words) in [
        ("", &["s.toml:1:1", "no [[scenario]]"][..]),
        ("[[scenario]]\nname = 3", &["s.toml:2:8", "integer"]),
        ("nonsense", &["s.toml:1:9"]),
        (
            "[[scenario]]\nname = \"x\"\nmodle = 1",
            &["s.toml:3:1", "modle"],
        ),
        (
            &format!("[[scenario]]\nname = \"x\"\n{model}"),
            &["s.toml:1", "'x'", "expects nothing"],
        ),
        (
            &format!("[[scenario]]\nname = \"x\"\n{model}expect = {{}}"),
            &["s.toml:5", "expects nothing"],
        ),
        (
            &format!(
                "[[scenario]]\nname = \"x\"\n{model}expect = {{ fits = true, fails = \"trap\" }}"
            ),
            &["s.toml:5", "exclude each other"],
        ),
        (
            &format!(
                "[[scenario]]\nname = \"x\"\n{model}[scenario.expect.tensors]\na = {{ format = \"int8\" }}"
            ),
            &["s.toml:6", "'int8' is not a format"],
        ),
        (
            "[[scenario]]\nname = \"x\"\nmodel = { preset = \"demo\" }\nexpect = { fits = true }",
            &["'x'", "no devices"],
        ),
        (
            "[[scenario]]\nname = \"x\"\ndevices = [{ spec = \"sim:1GiB\", count = 99999 }]\n\
             model = { preset = \"demo\" }\nexpect = { fits = true }",
            &["'x'", "1024 devices"],
        ),
        (
            "[[scenario]]\nname = \"x\"\ndevices = [\"sim:1GiB\"]\nexpect = { fits = true }\n\
             [scenario.model]\nlayers = 18446744073709551615\ntensors = [{ name = \"{}\", shape = [1] }]",
            &["s.toml:5", "more than 1000000 tensors"],
        ),
    ] {
        let scratchpad = scratchpad_with(text);
        scratchpad.run(&["check", "s.toml"]).fails(USAGE, words);
    }
    let scratchpad = Scratchpad::new();
    scratchpad
        .run(&["check", "none.toml"])
        .fails(USAGE, &["none.toml"]);
    scratchpad.run(&["check"]).fails(USAGE, &["SCENARIO.toml"]);
}

#[test]
fn a_broken_file_stops_all_before_anything_is_run() {
    let scratchpad = scratchpad_with(MIXED);
    fs::write(scratchpad.path("broken.toml"), "[[scenario]]").unwrap();
    scratchpad
        .run(&["check", "s.toml", "broken.toml"])
        .fails(USAGE, &["broken.toml:1:1", "name"]);
}

#[test]
fn every_broken_file_is_named() {
    let scratchpad = scratchpad_with(MIXED);
    fs::write(scratchpad.path("broken.toml"), "x").unwrap();
    scratchpad
        .run(&["check", "broken.toml", "s.toml", "none.toml", "."])
        .fails(
            USAGE,
            &["broken.toml:1:", "none.toml", "not a regular file"],
        );
}

#[test]
fn what_cannot_be_run_says_why_and_stops_nothing() {
    let scratchpad = scratchpad_with(
        r#"
        [defaults]
        model = { preset = "qwen2.5-0.5b" }
        devices = ["sim:2GiB"]

        [[scenario]]
        name = "model"
        model = { path = "nowhere" }
        expect = { fits = true }

        [[scenario]]
        name = "policy"
        policy = "clever"
        expect = { fits = false }

        [[scenario]]
        name = "setting"
        settings = { speed = 9 }
        expect = { refused = {} }

        [[scenario]]
        name = "rule"
        settings = { "format:experts" = "nf4" }
        expect = { refused = {} }

        [[scenario]]
        name = "device"
        devices = ["cuda:99"]
        expect = { fits = true }

        [[scenario]]
        name = "names"
        model = { tensors = [{ name = "a", shape = [1] }, { name = "a", shape = [1] }] }
        expect = { fits = true }

        [[scenario]]
        name = "size"
        model = { tensors = [{ name = "a", shape = [4294967296, 4294967296] }] }
        expect = { fits = true }

        [[scenario]]
        name = "last"
        expect = { fits = true }
        "#,
    );
    let outcome = scratchpad.run(&["check", "s.toml"]);
    assert_eq!(outcome.status, Some(FAILED), "{outcome:#?}");
    let lines: Vec<&str> = outcome.stdout.lines().collect();
    for (case, word) in [
        ("model", "nowhere"),
        ("policy", "there is no policy 'clever'"),
        ("setting", "'speed'"),
        ("rule", "matches none of the"),
        ("device", "cuda:99"),
        ("names", "two tensors are called \"a\""),
        ("size", "64 bits"),
    ] {
        let head = format!("ERROR   s.toml: {case}");
        let at = lines.iter().position(|line| *line == head);
        let why = at.and_then(|at| lines.get(at + 1));
        let told = why.is_some_and(|why| why.contains("could not be run: ") && why.contains(word));
        assert!(told, "{case}: {outcome:#?}");
    }
    assert!(lines.contains(&"ok      s.toml: last"), "{outcome:#?}");
    assert_eq!(lines.last(), Some(&"8 cases: 1 ok, 7 could not be run"));
    let left = fs::read_dir(scratchpad.temporary()).unwrap().count();
    assert_eq!(left, 0, "models are left behind");
}

#[test]
fn a_report_that_cannot_be_written_is_a_failure() {
    let scratchpad = scratchpad_with(MIXED);
    scratchpad
        .run(&["check", "s.toml", "--quiet", "--junit", "no/where.xml"])
        .fails(FAILED, &["no/where.xml"]);
}

#[test]
fn every_expectation_can_fail() {
    let scratchpad = scratchpad_with(
        r#"
        [[scenario]]
        name = "all wrong"
        model = { preset = "qwen2.5-0.5b" }
        devices = ["sim:300MiB", "sim:600MiB", "cpu:8GiB"]
        policy = "map"
        settings = { device-map = '{"": 1, "model.layers.0.mlp": 0}' }
        [scenario.expect]
        together = ["model.layers.*", "vision.*"]
        balance = { ratio = 1.01, within = 1 }
        total = { devices = 3, tensors = 1, requested = 1, reserved = 1, headroom = 1 }
        [scenario.expect.devices]
        "sim:*" = { used = false, tensors = 1, requested = 1, reserved = 1, headroom = 1, free = 1 }
        "cpu" = { used = true }
        "cuda:*" = { used = true }
        [scenario.expect.tensors]
        "model.layers.0" = { device = "same", loaded = true, count = 1 }
        "model.layers.1" = { device = ["cpu", "cuda:*"], format = ["stored", "cast:f32"] }
        "model.norm" = { loaded = false }
        "#,
    );
    let report = scratchpad.run(&["check", "s.toml", "--json"]).json();
    let case = &report["files"][0]["cases"][0];
    let findings = case["expectations"].as_array().unwrap();
    let held: Vec<_> = findings.iter().filter(|f| f["holds"] == true).collect();
    // That layer 0 is loaded.
    assert_eq!(held.len(), 1, "{held:#?}");
    assert_eq!(
        findings.len(),
        1 + 2 + 2 + 5 + 12 + 2 + 2 + 2 + 1,
        "{case:#}"
    );
    for finding in findings {
        assert_ne!(finding["found"], "", "{finding}");
    }
}

#[test]
fn the_examples_of_the_reference_make_sense() {
    let reference = include_str!("../../../../guest/SCENARIOS.md");
    let blocks: Vec<&str> = reference
        .split("```toml\n")
        .skip(1)
        .filter_map(|rest| rest.split("```").next())
        .collect();
    assert_eq!(blocks.len(), 2);
    let own = format!(
        "[[scenario]]\nname = \"x\"\ndevices = [\"sim:1GiB\"]\nexpect = {{ fits = true }}\n{}",
        blocks[1]
    );
    // The policy of the first one is the reader's.
    let first = blocks[0].replace(
        "target/wasm32-unknown-unknown/release/my_policy.wasm",
        "auto",
    );
    for (text, cases) in [(first.as_str(), 2), (&own, 1)] {
        let scratchpad = scratchpad_with(text);
        let report = scratchpad.run(&["check", "s.toml", "--json"]).json();
        assert_eq!(report["ok"], cases, "{report:#}");
    }
}

#[test]
fn slices_that_are_not_as_expected_are_named() {
    let scratchpad = scratchpad_with(
        r#"
[defaults]
policy = "tensor-parallel"
devices = [{ spec = "sim:1GiB", count = 2 }]
[defaults.model]
layers = 3
tensors = [
    { name = "model.layers.{}.mlp.up_proj.weight", shape = [256, 128] },
    { name = "model.layers.{}.mlp.down_proj.weight", shape = [128, 256] },
    { name = "model.norm.weight", shape = [128] },
]

[[scenario]]
name = "wrong"
[scenario.expect.slices]
"mlp.up_proj" = { count = 4, parts = 3, dimension = 1, complete = false, copies = true, ranges = { "sim:1" = "0:128" } }
"mlp.down_proj" = { ranges = { "sim:2" = "0:128" } }
"model.norm" = { complete = true, copies = false }
"nowhere" = { parts = 0 }

[[scenario]]
name = "right"
[scenario.expect]
balance = { within = 0 }
[scenario.expect.tensors]
"mlp.up_proj" = { count = 6, format = "nf4" }
[scenario.expect.slices]
"mlp.up_proj" = { count = 3, parts = 2, dimension = 0, complete = true, copies = false, ranges = { "sim:1" = "128:256" } }
"model.norm" = { parts = 2, complete = false, copies = true, ranges = { "*" = ["0:128"] } }
"#,
    );
    let outcome = scratchpad.run(&["check", "s.toml"]);
    assert_eq!(outcome.status, Some(FAILED), "{outcome:#?}");
    let up = "model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight, \
              model.layers.2.mlp.up_proj.weight";
    for line in [
        "expected: slices of 'mlp.up_proj' are of 4 tensors",
        "expected: slices of 'mlp.up_proj' are 3 of each",
        "found:    2 slices for 3 (of 3 in all)",
        "expected: slices of 'mlp.up_proj' are along dimension 1",
        "found:    dimension 0 for 3 (of 3 in all)",
        "expected: slices of 'mlp.up_proj' do not have each element once",
        "found:    each once for 3 (of 3 in all)",
        "expected: slices of 'mlp.up_proj' are a whole copy on each device",
        "expected: slices of 'mlp.up_proj' are 0:128 on sim:1",
        "found:    0:128 on sim:0, 128:256 on sim:1 for 3 (of 3 in all)",
        "expected: slices of 'mlp.down_proj' are 0:128 on sim:2",
        "expected: slices of 'model.norm' have each element once",
        "found:    some in several slices for 1 (of 1 in all)",
        "expected: slices of 'model.norm' are not a whole copy on each device",
        "expected: slices of 'nowhere' are there",
        up,
        "ok      s.toml: right",
    ] {
        assert!(outcome.stdout.contains(line), "{line}: {outcome:#?}");
    }
    for (wrong, says) in [
        ("{ }", "it expects nothing"),
        (
            "{ ranges = { \"sim:0\" = \"8:8\" } }",
            "'8:8' is not a range",
        ),
        ("{ part = 2 }", "unknown field `part`"),
    ] {
        let text = format!(
            "[[scenario]]\nname = \"x\"\nmodel = {{ preset = \"demo\" }}\ndevices = [\"sim:1GiB\"]\n\
             [scenario.expect.slices]\n\"mlp\" = {wrong}\n"
        );
        let outcome = scratchpad_with(&text).run(&["check", "s.toml"]);
        outcome.fails(USAGE, &[says]);
    }
}
