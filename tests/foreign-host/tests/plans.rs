//! A policy gives a foreign host the plan that it gives Tightfit's own runner.

use std::path::Path;

use tightfit::device::DeviceInfo;
use tightfit::plan::{Plan, propose};
use tightfit::policy::{Policy, Request};
use tightfit_foreign_host::Host;
use tightfit_tests::golden::GoldenModel;
use tightfit_tests::loading::Planned;

/// The default policy, a core module.
fn policy() -> Vec<u8> {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../host/wasm/src/policy/builtin/auto.wasm");
    std::fs::read(path).unwrap()
}

fn planned() -> (GoldenModel, Planned) {
    let golden = GoldenModel::unpack("qwen3_moe");
    let planned = Planned::new(&golden.path("bf16"), &["sim:1GiB", "sim:1GiB"], &[]);
    (golden, planned)
}

fn infos(planned: &Planned) -> Vec<DeviceInfo> {
    planned.devices.iter().map(|device| device.info()).collect()
}

#[test]
fn a_foreign_host_with_wasi_gets_the_same_plan() {
    let (_golden, planned) = planned();
    let host = Host::new(&policy(), false).unwrap();
    assert_eq!(host.describe().unwrap().name, "auto");
    let proposed = propose(&planned.checkpoint, &host, &infos(&planned), &[]).unwrap();
    assert_eq!(proposed.plan, planned.plan);
}

#[tokio::test]
async fn an_asynchronous_host_gets_the_same_plan() {
    let (_golden, planned) = planned();
    let devices = infos(&planned);
    let host = Host::new(&policy(), true).unwrap();
    let (mut store, planner) = host.planner_async().await.unwrap();
    let description = planner.describe_async(&mut store).await.unwrap();
    assert_eq!(description.name, "auto");
    let request = Request {
        config_json: &planned.checkpoint.config().unwrap().text,
        tensors: planned.checkpoint.tensors(),
        ties: planned.checkpoint.ties(),
        devices: &devices,
        settings: &[],
        required_formats: &[],
        failure: None,
    };
    let (mut store, planner) = host.planner_async().await.unwrap();
    let proposal = planner
        .plan_async(&mut store, &request)
        .await
        .unwrap()
        .unwrap();
    let plan = Plan::new(
        planned.checkpoint.tensors(),
        planned.checkpoint.ties(),
        &devices,
        &proposal.placements,
        &proposal.headroom,
    );
    assert_eq!(plan.unwrap(), planned.plan);
    // In such a store the synchronous call is an error, not a hang.
    assert!(planner.plan(&mut store, &request).is_err());
}
