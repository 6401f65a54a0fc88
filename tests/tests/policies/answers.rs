//! Answers that contradict the question, and refusals.

use tightfit::plan::{BadPlan, PlanError, ProposeError, SizeError};
use tightfit::policy::{PolicyError, RefusalReason};
use tightfit::status::Status;
use tightfit::types::{DType, Format};
use tightfit_tests::guests::hostile;

use super::Bench;

const EMBEDDING: &str = "model.embed_tokens.weight";

#[track_caller]
fn bad_plan(behavior: &str) -> BadPlan {
    let error = Bench::new().error(hostile(), behavior);
    let ProposeError::BadPlan { policy, bad } = error else {
        panic!("it is no bad plan: {error:?}");
    };
    assert_eq!(policy, "test.wasm");
    bad
}

#[test]
fn there_is_one_placement_for_each_tensor() {
    for (behavior, have) in [("too-few", 3), ("too-many", 5)] {
        let need = 4;
        assert_eq!(bad_plan(behavior), BadPlan::PlacementCount { need, have });
    }
}

#[test]
fn a_device_that_is_not_there_is_named_with_the_tensor() {
    assert_eq!(
        bad_plan("no-such-device"),
        BadPlan::NoSuchDevice {
            tensor: "model.position_ids".to_owned(),
            device: 1,
            devices: 1
        }
    );
}

#[test]
fn a_format_must_be_able_to_hold_the_tensor() {
    for (behavior, tensor, expected_format, expected_dtype) in [
        ("nf4", "model.position_ids", Format::NF4, DType::I64),
        ("cast-i8", EMBEDDING, Format::Cast(DType::I8), DType::Bf16),
    ] {
        let bad = bad_plan(behavior);
        assert!(
            matches!(
                &bad,
                BadPlan::IllegalFormat {
                    tensor: named,
                    source: SizeError::IllegalFormat { format, dtype, .. },
                } if named == tensor && *format == expected_format && *dtype == expected_dtype
            ),
            "{bad:?}"
        );
    }
}

#[test]
fn a_block_must_have_a_size_that_there_is() {
    let error = Bench::new().error(hostile(), "block-48");
    assert_eq!(
        error.to_string(),
        format!(
            "policy 'test.wasm' gave a bad plan: tensor '{EMBEDDING}': block size 48 is not a \
             power of two from 32 to 4096"
        )
    );
    assert_eq!(Status::from(&error), Status::Policy);
    let ProposeError::Policy(PolicyError::BadAnswer { tensor, .. }) = error else {
        panic!("it is no bad answer: {error:?}");
    };
    assert_eq!(tensor, EMBEDDING);
}

#[test]
fn one_parameter_is_not_torn_apart() {
    // On the same device, in another format.
    assert_eq!(
        bad_plan("torn-tie"),
        BadPlan::TornTie {
            tensor: EMBEDDING.to_owned(),
            alias: "lm_head.weight".to_owned()
        }
    );
}

#[test]
fn there_is_one_headroom_for_each_device() {
    for (behavior, have) in [("few-headrooms", 0), ("many-headrooms", 2)] {
        let need = 1;
        assert_eq!(bad_plan(behavior), BadPlan::HeadroomCount { need, have });
    }
}

#[track_caller]
fn what_does_not_fit(bench: &Bench, behavior: &str) -> (u64, u64, u64, String) {
    let error = bench.error(hostile(), behavior);
    let message = error.to_string();
    let ProposeError::DoesNotFit {
        policy,
        source:
            PlanError::DoesNotFit {
                device,
                tensor,
                need,
                headroom,
                have,
                ..
            },
    } = error
    else {
        panic!("it fits: {error:?}");
    };
    assert_eq!((policy.as_str(), device.as_str()), ("test.wasm", "sim:0"));
    for part in ["test.wasm", "sim:0", tensor.as_str()] {
        assert!(message.contains(part), "{message}");
    }
    (need, headroom, have, tensor)
}

#[test]
fn headroom_without_end_does_not_fit() {
    let bench = Bench::new();
    let (need, headroom, have, tensor) = what_does_not_fit(&bench, "endless-headroom");
    assert_eq!((headroom, have), (u64::MAX, 64 << 20));
    assert!(need > 0);
    assert_eq!(tensor, EMBEDDING);
}

#[test]
fn a_proposal_beyond_the_device_does_not_fit() {
    let bench = Bench::with_device("sim:6000");
    let (need, headroom, have, tensor) = what_does_not_fit(&bench, "honest");
    // Two matrices of 4096 bytes and 128 bytes of positions, in whole pages.
    assert_eq!((need, headroom, have), (3 * 4096, 0, 6000));
    assert_eq!(tensor, "model.layers.0.mlp.up_proj.weight");
}

#[test]
fn every_reason_to_refuse_arrives_with_its_words() {
    for (behavior, reason, message, missing) in [
        (
            "refuse-to-fit",
            RefusalReason::DoesNotFit,
            "it is all too much",
            Some(12_345),
        ),
        (
            "refuse-setting",
            RefusalReason::BadSetting,
            "I do not like this setting",
            None,
        ),
        (
            "refuse-model",
            RefusalReason::Unsupported,
            "I do not like this model",
            None,
        ),
    ] {
        let refusal = Bench::new().refusal(behavior);
        assert_eq!(refusal.reason, reason);
        assert_eq!(refusal.message, message);
        assert_eq!(refusal.missing_bytes, missing);
    }
}

#[test]
fn settings_are_checked_before_the_policy_sees_them() {
    let bench = Bench::new();
    let set = |names: &[&str]| {
        let settings: Vec<_> = names
            .iter()
            .map(|&name| (name.to_owned(), "honest".to_owned()))
            .collect();
        let infos = bench.infos();
        match tightfit::plan::propose(&bench.checkpoint, hostile(), &infos, &settings) {
            Err(ProposeError::Policy(error)) => error,
            other => panic!("{other:?}"),
        }
    };
    assert!(matches!(
        set(&["behaviour"]),
        PolicyError::UnknownSetting { name, known, .. }
            if name == "behaviour" && known == ["behavior"]
    ));
    assert!(matches!(
        set(&["behavior", "behavior"]),
        PolicyError::RepeatedSetting { name } if name == "behavior"
    ));
}
