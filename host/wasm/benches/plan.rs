//! Planning a mixture-of-experts model of 100,000 tensors with each built-in policy, sandbox and
//! layout included, against the layout alone, in one run.
//!
//! `cargo bench -p tightfit-wasm --bench plan`

use std::time::{Duration, Instant};

use tightfit::checkpoint::Checkpoint;
use tightfit::device::{DeviceInfo, DeviceKind};
use tightfit::plan::{Plan, propose};
use tightfit::synth::{self, Model, SynthOptions, Tensor};
use tightfit::types::Placement;
use tightfit_wasm::policy::{BUILTIN_POLICIES, WasmPolicy};
use tightfit_wasm::sandbox::Limits;

const REPEATS: usize = 15;

const LAYERS: usize = 64;
const EXPERTS: usize = 519;
const HIDDEN: u64 = 2048;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("model");
    let options = SynthOptions::default()
        .with_headers_only(true)
        .with_shard_bytes(50_000_000_000);
    synth::write_model(&model(), &path, &options)?;
    let checkpoint = Checkpoint::open(&path)?;
    let device = |index: usize| DeviceInfo {
        name: format!("sim:{index}"),
        kind: DeviceKind::Sim,
        capacity: 80 << 30,
        available: 80 << 30,
        granularity: 2 << 20,
    };
    let devices: Vec<DeviceInfo> = (0..4).map(device).collect();
    let count = checkpoint.tensors().len();
    println!(
        "{count} tensors on {} devices, medians of {REPEATS}",
        devices.len()
    );

    let mut policies = Vec::new();
    for name in BUILTIN_POLICIES {
        let start = Instant::now();
        let policy = WasmPolicy::builtin(name, Limits::default()).expect("it is built in")?;
        policies.push((name, policy, start.elapsed()));
    }
    let settings = |name: &str| {
        match name {
        "map" => vec![("device-map".to_owned(), r#"{"":0,"model.layers.60":1,"model.layers.61":1,"model.layers.62":1,"model.layers.63":2,"lm_head":3}"#.to_owned())],
        "huggingface" => vec![("experts".to_owned(), "nf4".to_owned())],
        _ => vec![],
    }
    };
    let first = propose(&checkpoint, &policies[0].1, &devices, &[])?.plan;
    let placements: Vec<Placement> = first.tensors.iter().map(|t| t.placement).collect();
    let headroom = vec![0; devices.len()];

    // Interleaved, so that a noisy neighbor disturbs all of them alike.
    let mut layouts = Vec::new();
    let mut times = vec![Vec::new(); policies.len()];
    let mut fuel = vec![0; policies.len()];
    for _ in 0..REPEATS {
        let start = Instant::now();
        Plan::new(
            checkpoint.tensors(),
            checkpoint.ties(),
            &devices,
            &placements,
            &headroom,
        )?;
        layouts.push(start.elapsed());
        for (index, (name, policy, _)) in policies.iter().enumerate() {
            let start = Instant::now();
            let proposed = propose(&checkpoint, policy, &devices, &settings(name))?;
            times[index].push(start.elapsed());
            fuel[index] = proposed.fuel.unwrap_or(0);
        }
    }
    let layout = median(&mut layouts);
    println!("  {:<12} {:>7.1} ms", "layout", layout * 1e3);
    for (index, (name, _, compiled)) in policies.iter().enumerate() {
        let seconds = median(&mut times[index]);
        println!(
            "  {name:<12} {:>7.1} ms  {:>5.1} x the layout  {:>6} fuel a tensor  (compiled in {:.0} ms)",
            seconds * 1e3,
            seconds / layout,
            fuel[index] / count as u64,
            compiled.as_secs_f64() * 1e3,
        );
    }
    Ok(())
}

/// Every expert's matrices on their own.
fn model() -> Model {
    let mut tensors = vec![Tensor::new("model.embed_tokens.weight", &[100_000, HIDDEN])];
    for layer in 0..LAYERS {
        let layer = format!("model.layers.{layer}");
        for (name, rows) in [("q", 4096), ("k", 512), ("v", 512)] {
            let name = format!("{layer}.self_attn.{name}_proj.weight");
            tensors.push(Tensor::new(name, &[rows, HIDDEN]));
        }
        tensors.push(Tensor::new(
            format!("{layer}.self_attn.o_proj.weight"),
            &[HIDDEN, 4096],
        ));
        tensors.push(Tensor::new(
            format!("{layer}.mlp.gate.weight"),
            &[EXPERTS as u64, HIDDEN],
        ));
        for expert in 0..EXPERTS {
            let expert = format!("{layer}.mlp.experts.{expert}");
            for (name, shape) in [
                ("gate", [768, HIDDEN]),
                ("up", [768, HIDDEN]),
                ("down", [HIDDEN, 768]),
            ] {
                tensors.push(Tensor::new(format!("{expert}.{name}_proj.weight"), &shape));
            }
        }
        for name in ["input", "post_attention"] {
            tensors.push(Tensor::new(
                format!("{layer}.{name}_layernorm.weight"),
                &[HIDDEN],
            ));
        }
    }
    tensors.push(Tensor::new("model.norm.weight", &[HIDDEN]));
    tensors.push(Tensor::new("lm_head.weight", &[100_000, HIDDEN]));
    let config = format!(
        r#"{{"architectures":["Qwen3MoeForCausalLM"],"model_type":"qwen3_moe","hidden_size":{HIDDEN},
        "num_hidden_layers":{LAYERS},"num_attention_heads":32,"num_key_value_heads":4,"head_dim":128,
        "num_experts":{EXPERTS},"moe_intermediate_size":768,"vocab_size":100000,
        "tie_word_embeddings":false}}"#
    );
    Model {
        tensors,
        config_json: config,
    }
}

fn median(times: &mut [Duration]) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64()
}
