//! Policies that cut tensors, well and badly.

use tightfit::checkpoint::SliceError;
use tightfit::device::open_devices;
use tightfit::load::{LoadOptions, load};
use tightfit::plan::{BadPlan, ProposeError};
use tightfit::policy::{Policy, PolicyError, RefusalReason};
use tightfit::status::Status;
use tightfit::types::Format;
use tightfit_tests::guests::{HOSTILE_SLICES, Handwritten, compile, component, hostile_slices};
use tightfit_wasm::policy::WasmPolicy;
use tightfit_wasm::sandbox::{GuestFailure, Limits, Mismatch};

use super::{Bench, rejection};

const EMBEDDING: &str = "model.embed_tokens.weight";

/// With two devices.
fn bench() -> Bench {
    let sims = ["sim:64MiB", "sim:64MiB"].map(|device| device.parse().unwrap());
    Bench {
        devices: open_devices(&sims).unwrap(),
        ..Bench::new()
    }
}

#[track_caller]
fn bad_slice(behavior: &str) -> SliceError {
    let error = bench().error(hostile_slices(), behavior);
    match error {
        ProposeError::BadPlan {
            bad: BadPlan::Slice(error),
            ..
        } => error,
        other => panic!("{behavior}: {other:?}"),
    }
}

#[test]
fn a_policy_that_cuts_is_asked_for_slices() {
    let bench = bench();
    let module = hostile_slices();
    let as_component = compile(&component(HOSTILE_SLICES), Limits::default());
    for policy in [module, &as_component] {
        let proposed = bench.propose(policy, "").unwrap();
        assert!(proposed.fuel.is_some_and(|fuel| fuel > 0));
        let plan = &proposed.plan;
        // Two of each of the table, the matrix and the ids; the second copy of the table is left out.
        assert_eq!((plan.slices.len(), plan.tensors.len()), (6, 7));
        let model = load(
            &bench.checkpoint,
            plan,
            &bench.devices,
            &LoadOptions::default(),
        )
        .unwrap();
        let up = "model.layers.0.mlp.up_proj.weight";
        for (device, rows) in ["0:32", "32:64"].iter().enumerate() {
            let piece = model.tensor(&format!("{up}[{rows}]")).unwrap();
            assert_eq!((piece.device(), piece.format()), (device, Format::NF4));
            assert_eq!(piece.shape(), [32, 32]);
        }
        assert!(model.tensor("model.position_ids@1").is_some());
    }
    // Its `plan` is for other hosts.
    let error = self::bench().error(module, "plan");
    let ProposeError::Policy(PolicyError::Refused { refusal, .. }) = error else {
        panic!("it did not refuse: {error:?}");
    };
    assert_eq!(refusal.reason, RefusalReason::Unsupported);
}

#[test]
fn a_format_that_the_user_fixes_holds_for_slices() {
    let bench = bench();
    let settings = [("format:*.up_proj.weight".to_owned(), "stored".to_owned())];
    let infos = bench.infos();
    let proposed =
        tightfit::plan::propose(&bench.checkpoint, hostile_slices(), &infos, &settings).unwrap();
    let formats = |tensor: u32| -> Vec<Format> {
        let slices = proposed.plan.slices.iter();
        let slices = slices.filter(|slice| slice.tensor == tensor);
        slices.map(|slice| slice.placement.format).collect()
    };
    let index = |name| bench.checkpoint.find(name).unwrap() as u32;
    assert_eq!(formats(index(EMBEDDING)), [Format::NF4; 2]);
    let up = index("model.layers.0.mlp.up_proj.weight");
    assert_eq!(formats(up), [Format::Stored; 2]);
}

#[test]
fn slices_that_there_cannot_be_are_bad_plans() {
    let embedding = |tensor: &str| tensor == EMBEDDING;
    for behavior in ["backward", "empty", "overlap", "too-long", "endless"] {
        let error = bad_slice(behavior);
        let SliceError::BadRange { tensor, length, .. } = &error else {
            panic!("{behavior}: {error:?}");
        };
        assert!(embedding(tensor) && *length == 64, "{behavior}: {error:?}");
    }
    let error = bad_slice("no-ranges");
    assert!(matches!(error, SliceError::RangeCount { have: 0, .. }));
    let error = bad_slice("too-many-ranges");
    assert!(matches!(error, SliceError::RangeCount { have: 4097, .. }));
    let error = bad_slice("no-such-dimension");
    assert!(matches!(
        error,
        SliceError::NoSuchDimension { dimensions: 2, .. }
    ));
    let error = bad_slice("no-such-tensor");
    assert!(matches!(error, SliceError::NoSuchTensor { tensors: 4, .. }));
    let error = bad_slice("twice");
    assert!(matches!(&error, SliceError::Twice { tensor, device: 0 } if embedding(tensor)));
    let error = bad_slice("whole-too");
    assert!(matches!(&error, SliceError::AlsoWhole { tensor } if embedding(tensor)));
    for (behavior, says) in [
        ("no-such-device", "on device number 4294967295"),
        ("too-few", "placed 3 tensors"),
        ("few-headrooms", "headroom for 0 devices"),
        ("cast-i8", "casts are between"),
    ] {
        let error = bench().error(hostile_slices(), behavior);
        assert_eq!(Status::from(&error), Status::Policy, "{behavior}");
        assert!(error.to_string().contains(says), "{behavior}: {error}");
    }
    let error = bench().error(hostile_slices(), "block-48");
    let ProposeError::Policy(PolicyError::BadAnswer { tensor, .. }) = error else {
        panic!("it is another error: {error:?}");
    };
    assert_eq!(tensor, EMBEDDING);
}

#[test]
fn what_is_cut_need_not_be_all_and_can_be_there_twice() {
    let bench = bench();
    let bytes = |behavior| {
        let plan = bench.propose(hostile_slices(), behavior).unwrap().plan;
        plan.devices
            .iter()
            .map(|device| device.size.requested)
            .sum::<u64>()
    };
    let honest = bytes("honest");
    assert!(bytes("gap") < honest);
    assert!(bytes("nowhere") < honest);
    assert!(bytes("overlap-on-one-device") > honest);
}

#[test]
fn floods_of_slices_and_ranges_are_limits_exceeded() {
    let bench = bench();
    let failure = bench.failure(hostile_slices(), "hundreds-of-thousands-of-ranges");
    let GuestFailure::TooMany { what, limit } = failure else {
        panic!("it is another failure: {failure:?}");
    };
    assert_eq!((what, limit), ("ranges of slices", 1 << 18));
    for behavior in ["millions-of-ranges", "millions-of-slices"] {
        let failure = bench.failure(hostile_slices(), behavior);
        assert!(
            matches!(failure, GuestFailure::HostCall { .. }),
            "{failure:?}"
        );
    }
}

#[test]
fn an_export_that_is_not_the_slicer_is_turned_down() {
    let with = |name: &str| {
        let function = format!("(func (export \"{name}\") (result i32) (i32.const 128))");
        Handwritten {
            extra: function,
            ..Handwritten::default()
        }
        .module()
    };
    let newer = rejection(&with("tightfit:host/slicer@0.2.0#plan-slices"));
    let GuestFailure::WrongWorld(Mismatch::ExportVersion { export, newer, .. }) = newer else {
        panic!("it is another failure: {newer:?}");
    };
    assert_eq!(
        (export.as_str(), newer),
        ("tightfit:host/slicer@0.2.0", true)
    );
    let other = rejection(&with("tightfit:host/slicer@0.1.0#plan-slices"));
    assert!(
        matches!(other, GuestFailure::NotAComponent { .. }),
        "{other:?}"
    );
    // Of another interface's functions nothing is asked.
    let beside = with("something:else/slicer@0.1.0#plan-slices");
    assert!(WasmPolicy::new("test.wasm", &beside, Limits::default()).is_ok());
}

#[test]
fn the_policy_tensor_parallel_cuts_through_the_sandbox() {
    let bench = bench();
    let policy = WasmPolicy::builtin("tensor-parallel", Limits::default())
        .unwrap()
        .unwrap();
    assert_eq!(policy.describe().unwrap().name, "tensor-parallel");
    let infos = bench.infos();
    let proposed = tightfit::plan::propose(&bench.checkpoint, &policy, &infos, &[]).unwrap();
    let plan = &proposed.plan;
    let up = bench
        .checkpoint
        .find("model.layers.0.mlp.up_proj.weight")
        .unwrap() as u32;
    let rows: Vec<_> = plan
        .slices
        .iter()
        .filter(|slice| slice.tensor == up)
        .collect();
    assert_eq!(rows.len(), 2);
    assert_eq!(
        (rows[0].ranges[0].clone(), rows[1].ranges[0].clone()),
        (0..32, 32..64)
    );
    let model = load(
        &bench.checkpoint,
        plan,
        &bench.devices,
        &LoadOptions::default(),
    )
    .unwrap();
    assert_eq!(model.stats().quantized, 2);
}
