//! The policy `huggingface` against the device maps of accelerate and transformers: every tensor of
//! every case, also of maps that are refused.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use tightfit::checkpoint::TensorInfo;
use tightfit::device::{DeviceInfo, DeviceKind};
use tightfit::plan::{Plan, PlanError};
use tightfit::policy::{Answer, Policy, PolicyError, Request};
use tightfit::synth::Preset;
use tightfit_tests::device_maps::{Case, GoldenMaps, MODELS, Map, OnDisk, device_name, device_of};
use tightfit_wasm::policy::WasmPolicy;
use tightfit_wasm::sandbox::Limits;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

const LIBRARIES: [&str; 2] = ["accelerate", "transformers"];

/// Keeps what policies log.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "tightfit::guest"
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        event.record(&mut Message(&self.0));
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

struct Message<'l>(&'l Mutex<Vec<String>>);

impl Visit for Message<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.0.lock().unwrap().push(format!("{value:?}"));
        }
    }
}

/// Accelerators and host memory that are larger than any budget: what decides is `max-memory`.
fn devices(accelerators: usize) -> Vec<DeviceInfo> {
    let device = |name: String, kind| DeviceInfo {
        name,
        kind,
        capacity: 1 << 42,
        available: 1 << 42,
        granularity: 4096,
    };
    let mut devices: Vec<DeviceInfo> = (0..accelerators)
        .map(|i| device(format!("sim:{i}"), DeviceKind::Sim))
        .collect();
    devices.push(device("cpu".into(), DeviceKind::Cpu));
    devices
}

/// The answer, and the budgets and the map as they were logged.
fn ask(
    policy: &WasmPolicy,
    model: &OnDisk,
    devices: &[DeviceInfo],
    settings: &[(&str, &str)],
) -> (Result<Answer, PolicyError>, BTreeMap<String, f64>, Map) {
    let settings: Vec<(String, String)> = settings
        .iter()
        .map(|&(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let request = Request {
        config_json: &model.config_json,
        tensors: &model.tensors,
        ties: &model.ties,
        devices,
        settings: &settings,
        required_formats: &[],
        failure: None,
    };
    let log = Log::default();
    let answer = tracing::subscriber::with_default(log.clone(), || policy.plan(&request));
    let messages = log.0.lock().unwrap();
    let mut budgets = None;
    let mut map = Map::new();
    for message in messages.iter() {
        if let Some(object) = message.strip_prefix("budgets: ") {
            budgets = Some(serde_json::from_str(object).expect("budgets are JSON"));
        }
        let Some(object) = message.strip_prefix("device map: ") else {
            continue;
        };
        let object: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(object).expect("the map is JSON");
        for (name, device) in &object {
            map.insert(name.clone(), device_name(device));
        }
    }
    (answer, budgets.expect("budgets are logged"), map)
}

fn hold(policy: &WasmPolicy, model: &OnDisk, case: &Case, library: &str, strategy: &str) {
    let accelerators = case.max_memory.keys().filter(|key| *key != "cpu").count();
    let devices = devices(accelerators);
    let max_memory = serde_json::to_string(&case.max_memory).unwrap();
    let settings = [
        ("library", library),
        ("strategy", strategy),
        ("max-memory", &max_memory),
    ];
    let context = format!("{library} {strategy} {max_memory}");
    let (answer, budgets, map) = ask(policy, model, &devices, &settings);
    let balanced = case.balanced(library);
    assert!(budgets.keys().eq(balanced.keys()), "{context}");
    for (device, bytes) in balanced {
        let difference = budgets[device] - 0.9 * bytes;
        assert!(difference.abs() <= 1.0, "{context}: {device} {difference}");
    }
    let expected = case.map(library);
    for (tensor, parameter) in model.tensors.iter().zip(&model.parameters) {
        assert_eq!(
            device_of(&map, parameter),
            device_of(&expected, parameter),
            "{context}: {}",
            tensor.name
        );
    }
    for tie in &model.ties {
        let (alias, tensor) = (&tie.alias, &model.parameters[tie.tensor]);
        assert_eq!(
            device_of(&map, alias),
            device_of(&expected, alias),
            "{context}: {alias}"
        );
        assert_eq!(
            device_of(&map, alias),
            device_of(&map, tensor),
            "{context}: {alias}"
        );
    }

    let accepted = if library == "transformers" {
        case.transformers_accepts
    } else {
        expected
            .values()
            .all(|device| device != "cpu" && device != "disk")
            || expected.values().all(|device| device == "cpu")
    };
    match answer {
        Ok(answer) => {
            assert!(accepted, "{context}: the library refuses");
            let placements = answer.proposal.placements.iter().zip(&model.parameters);
            for (placement, parameter) in placements {
                let index = placement.device.expect("everything is placed") as usize;
                let name = devices[index].name.trim_start_matches("sim:");
                assert_eq!(
                    name,
                    device_of(&expected, parameter),
                    "{context}: {parameter}"
                );
            }
        }
        Err(PolicyError::Refused { refusal, .. }) => {
            assert!(!accepted, "{context}: {refusal:?}");
            let disk = expected.values().any(|device| device == "disk");
            let word = if disk { "on the disk" } else { "on the cpu" };
            assert!(refusal.message.contains(word), "{context}: {refusal:?}");
            assert!(refusal.message.contains(library), "{context}: {refusal:?}");
        }
        Err(error) => panic!("{context}: {error}"),
    }
}

/// All cases of a model, with both libraries.
fn hold_all(name: &str) {
    assert!(MODELS.contains(&name));
    let policy = WasmPolicy::open("huggingface", Limits::default()).unwrap();
    let maps = GoldenMaps::read(name);
    let model = maps.on_disk();
    assert!(!maps.cases.is_empty());
    for case in &maps.cases {
        for library in LIBRARIES {
            hold(&policy, &model, case, library, &case.strategy);
            if case.strategy == "auto" && model.tensors.len() < 1000 {
                hold(&policy, &model, case, library, "balanced");
            }
        }
    }
}

#[test]
fn llama_70b() {
    hold_all("Llama-3.1-70B");
}

#[test]
fn mixtral_8x7b() {
    hold_all("Mixtral-8x7B");
}

#[test]
fn qwen2_0_5b_tied() {
    hold_all("Qwen2.5-0.5B");
}

#[test]
fn qwen2_72b() {
    hold_all("Qwen2.5-72B");
}

#[test]
fn qwen2_7b() {
    hold_all("Qwen2.5-7B");
}

#[test]
fn qwen3_30b_a3b() {
    hold_all("Qwen3-30B-A3B");
}

/// A vision tower, experts as stacks on disk, layers of two kinds: worked out by hand.
#[test]
fn qwen35_35b_a3b_does_not_fit_on_two_cards_without_its_experts_in_4_bits() {
    let policy = WasmPolicy::open("huggingface", Limits::default()).unwrap();
    let model = of_preset(Preset::Qwen35_35bA3b);
    let budgets = r#"{"0": "31GiB", "1": "31GiB", "cpu": "100GiB"}"#;
    let settings = [("max-memory", budgets)];
    let (answer, budgets, map) = ask(&policy, &model, &devices(2), &settings);
    assert_eq!(budgets["0"], (0.9 * f64::from(31 << 20) * 1024.0).round());
    let layer = |n: u32| device_of(&map, &format!("model.language_model.layers.{n}.x"));
    assert_eq!((layer(33), layer(34)), ("1", "cpu"));
    assert!(matches!(answer, Err(PolicyError::Refused { .. })));

    let settings = [settings[0], ("experts", "nf4")];
    let (answer, _, map) = ask(&policy, &model, &devices(2), &settings);
    assert!(map.values().all(|device| device != "cpu"));
    assert!(answer.is_ok());
}

#[test]
fn what_their_sizes_leave_out_is_found_by_the_plan() {
    let policy = WasmPolicy::open("huggingface", Limits::default()).unwrap();
    let model = of_preset(Preset::Llama31_70b);
    let mut devices = devices(1);
    // Enough for codes without scales.
    devices[0].available = 38 << 30;
    let strategy = [
        ("strategy", "sequential"),
        ("max-memory", r#"{"0": "46GiB"}"#),
    ];
    let accelerate = [&strategy[..], &[("library", "accelerate")]].concat();
    let (answer, _, map) = ask(&policy, &model, &devices, &accelerate);
    assert_eq!(
        map.into_iter().collect::<Vec<_>>(),
        [(String::new(), "0".to_owned())]
    );
    let proposal = answer.unwrap().proposal;
    let plan = Plan::new(
        &model.tensors,
        &model.ties,
        &devices,
        &proposal.placements,
        &proposal.headroom,
    );
    let error = plan.unwrap_err();
    assert!(matches!(error, PlanError::DoesNotFit { .. }), "{error}");
}

fn of_preset(preset: Preset) -> OnDisk {
    let tensors: Vec<TensorInfo> = preset
        .tensors()
        .into_iter()
        .map(|tensor| TensorInfo {
            bytes: 2 * tensor.shape.iter().product::<u64>(),
            name: tensor.name,
            dtype: tensor.dtype,
            shape: tensor.shape,
            shard: 0,
            offset: 0,
            quantized: None,
            encoded: None,
            piece: None,
        })
        .collect();
    OnDisk {
        parameters: tensors.iter().map(|tensor| tensor.name.clone()).collect(),
        tensors,
        ties: Vec::new(),
        config_json: preset.config_json(),
    }
}
