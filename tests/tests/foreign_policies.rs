//! The example policy in other languages, built as its recipes say and held to its twin in Rust.
//!
//! A recipe whose tool cannot be installed here is skipped, and says so; with
//! `TIGHTFIT_REQUIRE_FOREIGN=1` that is a failure. Tools stay in `target/foreign/`.
#![cfg(unix)]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tightfit::checkpoint::Checkpoint;
use tightfit::device::{DeviceInfo, open_devices};
use tightfit::policy::{Answer, Policy, PolicyError, Refusal, RefusalReason, Request};
use tightfit::synth::{self, Model, Preset, SynthOptions, Tensor};
use tightfit::types::Format;
use tightfit_tests::foreign::{build, kept, repository, run};
use tightfit_wasm::policy::WasmPolicy;
use tightfit_wasm::sandbox::Limits;

fn open(component: &Path) -> WasmPolicy {
    let start = Instant::now();
    // A busy machine is not the policy's fault; all other limits are the default ones.
    let limits = Limits::default().with_deadline(Duration::from_secs(120));
    let policy = WasmPolicy::open(component.to_str().unwrap(), limits);
    let policy = policy.unwrap_or_else(|error| panic!("{error}"));
    println!(
        "{}: compiled in {:.1?}",
        component.display(),
        start.elapsed()
    );
    policy
}

/// The policy in Rust, compiled once.
fn twin() -> &'static WasmPolicy {
    static TWIN: LazyLock<WasmPolicy> = LazyLock::new(|| {
        let out = kept().join("rust");
        fs::create_dir_all(&out).unwrap();
        let mut cargo = Command::new(option_env!("CARGO").unwrap_or("cargo"));
        cargo
            .args(["build", "--release", "--locked", "-p", "pin-layer"])
            .args(["--target", "wasm32-unknown-unknown", "--target-dir"])
            .arg(&out)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env_remove("RUSTFLAGS");
        let (status, said) = run(cargo, &out.join("log"));
        assert_eq!(status, Some(0), "{said}");
        open(&out.join("wasm32-unknown-unknown/release/pin_layer.wasm"))
    });
    &TWIN
}

/// A checkpoint without weights.
fn headers(model: &Model) -> (Checkpoint, TempDir) {
    let directory = TempDir::new().unwrap();
    let options = SynthOptions::default().with_headers_only(true);
    synth::write_model(model, directory.path(), &options).unwrap_or_else(|error| panic!("{error}"));
    (Checkpoint::open(directory.path()).unwrap(), directory)
}

/// As many tensors as the largest models have.
fn large(tensors: u64) -> Model {
    let tensor = |n| {
        let name = format!(
            "model.layers.{}.mlp.experts.{}.up_proj.weight",
            n / 1000,
            n % 1000
        );
        Tensor::new(name, &[768, 2048])
    };
    Model {
        tensors: (0..tensors).map(tensor).collect(),
        config_json: "{}".to_owned(),
    }
}

fn ask(
    policy: &WasmPolicy,
    checkpoint: &Checkpoint,
    devices: &[DeviceInfo],
    settings: &[(&str, &str)],
) -> Result<Answer, Refusal> {
    let settings: Vec<_> = settings
        .iter()
        .map(|&(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let request = Request {
        config_json: checkpoint.config_json(),
        tensors: checkpoint.tensors(),
        ties: checkpoint.ties(),
        devices,
        settings: &settings,
        required_formats: &[],
        failure: None,
    };
    match policy.plan(&request) {
        Ok(answer) => Ok(answer),
        Err(PolicyError::Refused { refusal, .. }) => Err(refusal),
        Err(error) => panic!("{error}"),
    }
}

fn devices(specs: &[&str]) -> Vec<DeviceInfo> {
    let specs: Vec<_> = specs.iter().map(|spec| spec.parse().unwrap()).collect();
    let devices = open_devices(&specs).unwrap();
    devices.iter().map(|device| device.info()).collect()
}

/// Names and values.
type Settings = &'static [(&'static str, &'static str)];

/// Settings, and the reason to refuse them on two devices of which the second is tiny.
const QUESTIONS: &[(Settings, Option<RefusalReason>)] = &[
    (&[], None),
    (&[("layer", "3")], None),
    (&[("layer", " 1 "), ("device", "sim:0")], None),
    (&[("device", "2")], None),
    (&[("device", "sim:2"), ("layer", "2")], None),
    (&[("device", "1")], Some(RefusalReason::DoesNotFit)),
    (&[("device", "3")], Some(RefusalReason::BadSetting)),
    (&[("device", "cuda:0")], Some(RefusalReason::BadSetting)),
    (&[("device", "")], Some(RefusalReason::BadSetting)),
    (&[("device", "-1")], Some(RefusalReason::BadSetting)),
    (&[("layer", "4711")], Some(RefusalReason::BadSetting)),
    (&[("layer", "10000")], Some(RefusalReason::BadSetting)),
    (&[("layer", "first")], Some(RefusalReason::BadSetting)),
    (&[("layer", "1.5")], Some(RefusalReason::BadSetting)),
    (&[("layer", "\u{663}")], Some(RefusalReason::BadSetting)),
];

fn answers_like_the_twin(language: &str) {
    let Some(component) = build(&repository(), language, "pin_layer.wasm") else {
        return;
    };
    let policy = open(&component);
    assert_eq!(policy.describe().unwrap(), twin().describe().unwrap());
    for import in policy.imports() {
        assert!(import.starts_with("tightfit:host/"), "{import}");
    }
    let infos = devices(&["sim:900GiB", "sim:1MiB", "sim:900GiB"]);
    for preset in [
        Preset::Demo,
        Preset::Qwen25_0_5b,
        Preset::Mixtral8x7b,
        Preset::Qwen35_35bA3b,
    ] {
        let (checkpoint, _directory) = headers(&preset.into());
        for &(settings, reason) in QUESTIONS {
            let expected = ask(twin(), &checkpoint, &infos, settings);
            let answer = ask(&policy, &checkpoint, &infos, settings);
            let refused = expected.as_ref().err().map(|refusal| refusal.reason);
            assert_eq!(refused, reason, "{preset} {settings:?}: {expected:?}");
            let proposals = [&answer, &expected].map(|a| a.as_ref().map(|a| &a.proposal));
            assert_eq!(proposals[0], proposals[1], "{preset} {settings:?}");
        }
        // The agreement is about something.
        let answer = ask(&policy, &checkpoint, &infos, &[("device", "2")]).unwrap();
        let placements = &answer.proposal.placements;
        assert!(placements.iter().any(|p| p.device == Some(2)));
        assert!(placements.iter().any(|p| p.device == Some(0)));
        assert!(placements.iter().any(|p| p.format == Format::Stored));
        assert!(placements.iter().any(|p| p.format != Format::Stored));
    }
    for tensors in [1_000, 100_000] {
        let (checkpoint, _directory) = headers(&large(tensors));
        let start = Instant::now();
        let answer = ask(&policy, &checkpoint, &infos, &[("device", "2")]).unwrap();
        let (took, fuel) = (start.elapsed(), answer.fuel.unwrap());
        println!("{language}: {tensors} tensors in {took:.1?}, {fuel} units of fuel");
        let expected = ask(twin(), &checkpoint, &infos, &[("device", "2")]).unwrap();
        assert_eq!(answer.proposal, expected.proposal);
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}

/// An exception of the policy's, here of a line that follows `head` in its source, is told.
fn exceptions_are_told(language: &str, source: &str, head: &str, line: &str) {
    let broken = TempDir::new().unwrap();
    let example = Path::new("guest/examples").join(language);
    for folder in [Path::new("wit"), &example] {
        copy(&repository().join(folder), &broken.path().join(folder));
    }
    let source = broken.path().join(example).join(source);
    let text = fs::read_to_string(&source).unwrap();
    let edited = text.replacen(head, &format!("{head}\n{line}"), 1);
    assert_ne!(edited, text);
    fs::write(source, edited).unwrap();
    let Some(component) = build(broken.path(), language, "pin_layer.wasm") else {
        return;
    };
    let request = Request {
        config_json: "{}",
        tensors: &[],
        ties: &[],
        devices: &[],
        settings: &[],
        required_formats: &[],
        failure: None,
    };
    let error = open(&component).plan(&request).unwrap_err().to_string();
    assert!(error.contains("it panicked: "), "{error}");
    assert!(error.contains("nothing"), "{error}");
}

#[test]
fn c_answers_like_rust() {
    answers_like_the_twin("c");
}

#[test]
fn javascript_answers_like_rust() {
    answers_like_the_twin("javascript");
    let head = "function place(request) {";
    exceptions_are_told("javascript", "pin-layer.js", head, "  request.nothing.x;");
}

#[test]
fn python_answers_like_rust() {
    answers_like_the_twin("python");
    let head = "def place(request: Request) -> Proposal:";
    exceptions_are_told("python", "pin_layer.py", head, "    request.nothing");
}
