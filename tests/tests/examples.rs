//! The examples for applications do what they say.

#[path = "../../host/wasm/examples/background_load.rs"]
#[allow(dead_code, reason = "its main is not called")]
mod background_load;
#[path = "../../host/wasm/examples/first_load.rs"]
#[allow(dead_code, reason = "its main is not called")]
mod first_load;
#[path = "../../host/core/examples/native_policy.rs"]
#[allow(dead_code, reason = "its main is not called")]
mod native_policy;
#[path = "../../host/wasm/examples/own_limits.rs"]
#[allow(dead_code, reason = "its main is not called")]
mod own_limits;

use tightfit::checkpoint::Checkpoint;
use tightfit::plan::ProposeError;
use tightfit::status::Status;
use tightfit_tests::failures::failure_of;
use tightfit_tests::golden::GoldenModel;

#[test]
fn a_native_policy_places_every_tensor() {
    let golden = GoldenModel::unpack("llama");
    let checkpoint = Checkpoint::open(golden.path("bf16")).unwrap();
    let model = native_policy::load(&golden.path("bf16")).unwrap();
    assert_eq!(model.tensors().count(), checkpoint.tensors().len());
    let format = |name| model.tensor(name).unwrap().format().to_string();
    assert_eq!(format("model.layers.0.mlp.up_proj.weight"), "nf4");
    assert_eq!(format("model.norm.weight"), "stored");
}

#[test]
fn an_application_with_its_own_limits_learns_which_one_was_in_the_way() {
    let golden = GoldenModel::unpack("llama");
    let checkpoint = Checkpoint::open(golden.path("bf16")).unwrap();
    let proposed = own_limits::plan(&checkpoint, "auto", own_limits::limits()).unwrap();
    assert!(proposed.fuel.is_some_and(|fuel| fuel > 0));
    let none = own_limits::limits().with_fuel(1).with_fuel_per_tensor(0);
    let error = own_limits::plan(&checkpoint, "auto", none).unwrap_err();
    let ProposeError::Policy(error) = error else {
        panic!("{error}");
    };
    let (_, failure) = failure_of(error);
    assert_eq!(failure.limit(), Some("fuel"));
}

#[test]
fn the_first_load_takes_what_was_planned() {
    let golden = GoldenModel::unpack("llama");
    let mut printed = Vec::new();
    first_load::run(&golden.path("bf16"), "sim:64MiB", &mut printed).unwrap();
    let printed = String::from_utf8(printed).unwrap();
    let lines: Vec<&str> = printed.lines().collect();
    let bytes = |line: &str| line.split(' ').find_map(|word| word.parse::<u64>().ok());
    assert!(bytes(lines[0]).is_some_and(|bytes| bytes > 0), "{printed}");
    assert_eq!(bytes(lines[0]), bytes(lines[1]), "{printed}");
    assert!(lines[2].contains("in nf4+double, from"), "{printed}");
    let error = first_load::run(&golden.path("bf16"), "sim:1KiB", &mut Vec::new()).unwrap_err();
    assert!(error.to_string().contains("are missing"), "{error}");
}

#[test]
fn a_load_in_the_background_ends_with_a_model_a_reason_or_when_it_is_cancelled() {
    let golden = GoldenModel::unpack("llama");
    let start = |device: &str| {
        background_load::start(
            golden.path("bf16"),
            "auto".to_owned(),
            device.parse().unwrap(),
        )
    };
    let loading = start("sim:64MiB");
    let model = loading.result.join().unwrap().unwrap();
    let done = loading.done.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(done, model.stats().bytes_read);

    let failure = start("sim:1KiB").result.join().unwrap().unwrap_err();
    assert_eq!(failure.status, Status::DoesNotFit, "{failure:?}");

    let loading = start("sim:64MiB");
    loading.cancel.cancel();
    // Unless it was done already.
    if let Err(failure) = loading.result.join().unwrap() {
        assert_eq!(failure.status, Status::Interrupted, "{failure:?}");
    }
}
