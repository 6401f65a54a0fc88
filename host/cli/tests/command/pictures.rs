//! What a plan looks like: bars, the map, drawings, and two plans compared.

use std::fs;

use serde_json::{Value, json};
use tightfit_tests::command::Scratchpad;
use tightfit_tests::guests::HOSTILE;
use tightfit_tests::models;

const USAGE: i32 = 2;
const DOES_NOT_FIT: i32 = 4;
const TWO: [&str; 4] = ["--device", "sim:2MiB", "--device", "sim:2MiB"];

fn scratchpad_with_model() -> Scratchpad {
    let scratchpad = Scratchpad::new();
    models::write_decoder(&scratchpad.path("model"), 8, 64);
    fs::write(scratchpad.path("hostile.wasm"), HOSTILE).unwrap();
    scratchpad
}

fn plan(more: &[&str]) -> Vec<String> {
    let all = [&["plan", "model"], &TWO[..], more].concat();
    all.into_iter().map(str::to_owned).collect()
}

#[test]
fn plan_draws_bars_and_a_map() {
    let scratchpad = scratchpad_with_model();
    let text = scratchpad.run(&plan(&[])).succeeds().stdout;
    let bars: Vec<&str> = text.lines().filter(|line| line.starts_with('[')).collect();
    assert_eq!(bars.len(), 2, "{text}");
    for bar in bars {
        assert!(bar.is_ascii() && bar.len() == 60, "{bar}");
        assert!(
            bar.contains('#') && bar.contains('s') && bar.contains('.'),
            "{bar}"
        );
    }
    for line in ["model.embed_tokens ", "model.layers 0-", "lm_head "] {
        assert!(
            text.lines()
                .any(|l| l.starts_with(line) && l.contains("-> sim:")),
            "{text}"
        );
    }
    assert!(text.lines().all(|line| line.len() < 130), "{text}");
}

#[test]
fn what_fills_a_device_adds_up() {
    let scratchpad = scratchpad_with_model();
    let arguments = plan(&["--json", "--set", "reserve=100KiB"]);
    let report = scratchpad.run(&arguments).succeeds().json();
    for device in report["devices"].as_array().unwrap() {
        let fill = device["fill"].as_object().unwrap();
        let sum: u64 = fill.values().map(|bytes| bytes.as_u64().unwrap()).sum();
        assert_eq!(device["capacity"], sum);
        assert_eq!(fill["headroom"], 100 << 10);
        assert!(fill["linear"].as_u64() > Some(0) && fill["scales"].as_u64() > Some(0));
    }
}

#[test]
fn a_timeline_ends_with_what_was_planned() {
    let scratchpad = scratchpad_with_model();
    let arguments = [
        "load",
        "model",
        "--device",
        "sim:1MiB",
        "--device",
        "sim:64MiB",
    ];
    let arguments = [
        &arguments[..],
        &["--threads", "2", "--json", "--timeline", "t.svg"],
    ]
    .concat();
    let report = scratchpad.run(&arguments).succeeds().json();
    let drawing = fs::read_to_string(scratchpad.path("t.svg")).unwrap();
    for device in report["devices"].as_array().unwrap() {
        let (name, reserved) = (device["name"].as_str().unwrap(), &device["reserved"]);
        let lane =
            format!("<g class=\"lane\" data-planned=\"{reserved}\" data-peak=\"{reserved}\">");
        let lane = drawing.split(&lane).nth(1).expect("as planned");
        assert!(lane.contains(&format!(">{name}: ")), "{drawing}");
    }
    assert_eq!(drawing.matches("class=\"lane\"").count(), 3, "{drawing}");
    assert!(drawing.contains("staging: 64.00 MiB planned"), "{drawing}");
}

#[test]
fn a_drawing_is_written_whole_or_not_at_all() {
    let scratchpad = scratchpad_with_model();
    scratchpad.run(&plan(&["--svg", "plan.svg"])).succeeds();
    let drawing = fs::read_to_string(scratchpad.path("plan.svg")).unwrap();
    assert!(drawing.starts_with("<svg ") && drawing.ends_with("</svg>\n"));
    assert!(drawing.contains("model, placed by auto"), "{drawing}");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = |name| {
            fs::metadata(scratchpad.path(name))
                .unwrap()
                .permissions()
                .mode()
        };
        fs::write(scratchpad.path("other"), "").unwrap();
        assert_eq!(mode("plan.svg"), mode("other"));
    }
    scratchpad
        .run(&plan(&["--svg", "no/such/plan.svg"]))
        .fails(1, &["cannot write no/such/plan.svg"]);
    // It is written before it finds out that it cannot have this name.
    scratchpad
        .run(&plan(&["--svg", "model"]))
        .fails(1, &["cannot write model"]);
    let names: Vec<_> = fs::read_dir(scratchpad.path(""))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(names.len(), if cfg!(unix) { 4 } else { 3 }, "{names:?}");
}

#[test]
fn two_plans_are_compared() {
    let scratchpad = scratchpad_with_model();
    let arguments = plan(&["--diff", "auto", "auto", "--set", "B.double-quant=true"]);
    let text = scratchpad.run(&arguments).succeeds().stdout;
    assert!(
        text.contains("in another format") && text.contains("nf4+double"),
        "{text}"
    );
    let report = scratchpad
        .run(&[&arguments[..], &["--json".to_owned()]].concat())
        .succeeds()
        .json();
    assert_eq!(report["schema"], 1);
    let change = &report["formats"][0];
    assert_eq!(
        (
            &change["kind"],
            &change["from"],
            &change["to"],
            &change["tensors"]
        ),
        (
            &json!("linear layers"),
            &json!("nf4"),
            &json!("nf4+double"),
            &json!(56)
        )
    );
    // The same figures as the plans have by themselves.
    for (side, setting) in [("a", "double-quant=false"), ("b", "double-quant=true")] {
        let alone = scratchpad
            .run(&plan(&["--json", "--set", setting]))
            .succeeds()
            .json();
        for (device, compared) in alone["devices"]
            .as_array()
            .unwrap()
            .iter()
            .zip(report["devices"].as_array().unwrap())
        {
            assert_eq!(compared[format!("reserved_{side}")], device["reserved"]);
            assert_eq!(compared[format!("free_{side}")], device["fill"]["free"]);
        }
        assert_eq!(
            report[side]["policy"]["settings"]["double-quant"],
            alone["policy"]["settings"]["double-quant"]
        );
    }
    let same = scratchpad
        .run(&plan(&["--diff", "auto", "auto"]))
        .succeeds()
        .stdout;
    assert!(
        same.contains("the same place and the same format"),
        "{same}"
    );
    assert_eq!(
        scratchpad
            .run(&plan(&["--diff", "auto", "auto", "-q"]))
            .succeeds()
            .stdout,
        ""
    );
}

#[test]
fn a_policy_that_refuses_is_shown_beside_the_other() {
    let scratchpad = scratchpad_with_model();
    let refuses = plan(&[
        "--diff",
        "auto",
        "hostile.wasm",
        "--set",
        "behavior=refuse-to-fit",
    ]);
    let text = scratchpad.run(&refuses).succeeds().stdout;
    assert!(
        text.contains("A: auto") && text.contains("B: no plan: policy 'hostile.wasm' refuses"),
        "{text}"
    );
    let report = scratchpad
        .run(&[&refuses[..], &["--json".to_owned()]].concat())
        .succeeds()
        .json();
    assert_eq!(
        (&report["moved"], &report["b"]["policy"]),
        (&Value::Null, &Value::Null)
    );
    assert!(
        report["b"]["refusal"]
            .as_str()
            .unwrap()
            .contains("it is all too much")
    );
    assert_eq!(report["b"]["error"]["kind"], "does-not-fit");
    assert_eq!(report["b"]["error"]["guest"], "hostile.wasm");
    assert_eq!(report["a"]["error"], Value::Null);
    let both = [
        "plan", "model", "--device", "sim:1KiB", "--diff", "auto", "packed",
    ];
    let words = ["A: policy 'auto' refuses", "B: policy 'packed' refuses"];
    scratchpad.run(&both).fails(DOES_NOT_FIT, &words);
    let both = scratchpad.run(&[&both[..], &["--json"]].concat());
    let report = both.fails_midway(DOES_NOT_FIT, &words).json();
    for (error, guest) in [
        (&report["error"], "auto"),
        (&report["a"]["error"], "auto"),
        (&report["b"]["error"], "packed"),
    ] {
        assert_eq!(
            (&error["status"], &error["guest"]),
            (&json!(4), &json!(guest))
        );
        assert!(error["missing_bytes"].as_u64() > Some(0), "{error}");
    }
    for side in ["a", "b"] {
        assert!(report[side]["refusal"].is_string(), "{report}");
    }
    // A fault is no refusal.
    scratchpad
        .run(&plan(&[
            "--diff",
            "auto",
            "hostile.wasm",
            "--set",
            "behavior=panic",
        ]))
        .fails(5, &["lost its head"]);
}

#[test]
fn what_cannot_be_compared_is_a_usage_error() {
    let scratchpad = scratchpad_with_model();
    for (more, words) in [
        (
            &["--diff", "auto", "auto", "--policy", "auto"][..],
            "--policy",
        ),
        (&["--diff", "auto", "auto", "--svg", "x"], "--svg"),
        (&["--diff", "auto"], "2 values required"),
        (&["--diff", "auto", "nonesuch"], "nonesuch"),
        (
            &["--diff", "auto", "auto", "--set", "no-such=1"],
            "neither 'auto' nor 'auto'",
        ),
        (
            &["--diff", "auto", "auto", "--set", "A.no-such=1"],
            "A.no-such",
        ),
    ] {
        scratchpad.run(&plan(more)).fails(USAGE, &[words]);
    }
}

#[test]
fn parts_of_tensors_count_as_what_they_are_of() {
    let scratchpad = Scratchpad::new();
    models::write_decoder(&scratchpad.path("m"), 2, 64);
    let fills = |more: &[&str]| {
        let outcome = scratchpad.run(&[&["plan", "m", "--json"], more].concat());
        outcome.succeeds().json()["devices"].clone()
    };
    let whole = fills(&["--device", "sim:1GiB"]);
    let cut = fills(&[
        "--world=2",
        "--device=cuda:1GiB",
        "--policy=tensor-parallel",
    ]);
    for content in ["linear", "scales"] {
        let of = |devices: &Value, index: usize| devices[index]["fill"][content].as_u64().unwrap();
        assert!(of(&whole, 0) > 0);
        assert_eq!(of(&cut, 0) + of(&cut, 1), of(&whole, 0), "{content}: {cut}");
    }
}
