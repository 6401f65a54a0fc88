//! Formats that the user fixes hold for every policy, whether it has heard of them or not.

use tightfit::checkpoint::Checkpoint;
use tightfit::device::{DeviceInfo, DeviceKind};
use tightfit::plan::{FormatRuleError, ProposeError, Proposed, propose};
use tightfit::policy::Policy;
use tightfit::types::Format;
use tightfit_tests::guests::hostile;
use tightfit_tests::loading::auto;
use tightfit_tests::models;

use super::Bench;

fn propose_with(
    bench: &Bench,
    policy: &dyn Policy,
    settings: &[(&str, &str)],
) -> Result<Proposed, ProposeError> {
    let settings: Vec<_> = settings
        .iter()
        .map(|&(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    propose(&bench.checkpoint, policy, &bench.infos(), &settings)
}

fn formats(proposed: &Proposed) -> Vec<Format> {
    let tensors = proposed.plan.tensors.iter();
    tensors.map(|tensor| tensor.placement.format).collect()
}

#[test]
fn a_policy_that_ignores_them_is_overruled() {
    let bench = Bench::new();
    let rules = [("format:up_proj", "nf4"), ("behavior", "honest")];
    let before = propose_with(&bench, hostile(), &rules[1..]).unwrap();
    assert_eq!(formats(&before), [Format::Stored; 4]);
    let after = propose_with(&bench, hostile(), &rules).unwrap();
    let stored = Format::Stored;
    assert_eq!(formats(&after), [stored, stored, Format::NF4, stored]);
    // The sizes are those of the fixed format: 64 x 32 elements, half a byte each, 32 scales.
    assert_eq!(after.plan.tensors[2].requested(), 1024 + 4 * 32);
    assert!(
        after
            .settings
            .contains(&("format:up_proj".to_owned(), "nf4".to_owned())),
        "{:?}",
        after.settings
    );
    // One that answers with too little is found out all the same.
    let rules = [("format:up_proj", "nf4"), ("behavior", "too-few")];
    let error = propose_with(&bench, hostile(), &rules).unwrap_err();
    assert!(matches!(error, ProposeError::BadPlan { .. }), "{error:?}");
}

#[test]
fn the_default_policy_counts_with_them() {
    let directory = tempfile::TempDir::new().unwrap();
    models::write_decoder(directory.path(), 8, 256);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let device = |index: usize| DeviceInfo {
        name: format!("sim:{index}"),
        kind: DeviceKind::Sim,
        capacity: 1 << 30,
        available: 1 << 30,
        granularity: 4096,
    };
    let devices = [device(0), device(1)];
    // The first two layers stay in 16 bits and weigh as much as seven in 4.
    let settings =
        ["layers.0", "layers.1"].map(|layer| (format!("format:{layer}"), "stored".to_owned()));
    let proposed = propose(&checkpoint, auto(), &devices, &settings).unwrap();
    let reserved = proposed
        .plan
        .devices
        .iter()
        .map(|device| device.size.reserved);
    let reserved: Vec<u64> = reserved.collect();
    let largest_unit = 2 * 16 * 256 * 256;
    assert!(
        reserved[0].abs_diff(reserved[1]) <= largest_unit,
        "{reserved:?}"
    );
    let plain = propose(&checkpoint, auto(), &devices, &[]).unwrap();
    assert!(proposed.plan.tensors != plain.plan.tensors);
    let on_first = |proposed: &Proposed| {
        let tensors = proposed.plan.tensors.iter();
        tensors
            .filter(|tensor| tensor.placement.device == Some(0))
            .count()
    };
    assert!(on_first(&proposed) < on_first(&plain));
}

#[test]
fn a_rule_that_cannot_be_used_is_an_error_before_the_policy_is_asked() {
    let bench = Bench::new();
    for (name, value, word) in [
        ("format:*.nothing", "nf4", "matches none of the 4 tensors"),
        ("format:*", "nf4", "model.position_ids"),
        ("format:up_proj", "fp8", "'fp8' is not a format"),
        ("format:", "nf4", "names no tensors"),
    ] {
        // It would never return.
        let error = propose_with(&bench, hostile(), &[(name, value), ("behavior", "loop")]);
        let error = error.unwrap_err();
        assert!(matches!(error, ProposeError::FormatRule(_)), "{error:?}");
        assert!(error.to_string().contains(word), "{error}");
    }
    let error = propose_with(&bench, auto(), &[("format:*.nothing", "nf4")]).unwrap_err();
    assert!(matches!(
        error,
        ProposeError::FormatRule(FormatRuleError::NoMatch { tensors: 4, .. })
    ));
}
