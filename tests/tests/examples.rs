//! The examples for applications do what they say.

#[path = "../../host/core/examples/native_policy.rs"]
#[allow(dead_code, reason = "its main is not called")]
mod native_policy;
#[path = "../../host/wasm/examples/own_limits.rs"]
#[allow(dead_code, reason = "its main is not called")]
mod own_limits;

use tightfit::checkpoint::Checkpoint;
use tightfit::plan::ProposeError;
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
