use std::time::Duration;

use super::*;
use crate::draw::samples::{decoder, device};
use tightfit::status::Status;
use tightfit::types::{Format, Placement};

fn proposed(tensors: &[TensorInfo], matrices: Format, boundary: u32, headroom: u64) -> Proposed {
    let placements: Vec<Placement> = tensors
        .iter()
        .map(|tensor| {
            let layer = tightfit_common::names::layer_of(&tensor.name).map(|(_, layer)| layer);
            Placement {
                device: Some(u32::from(layer.is_some_and(|layer| layer >= boundary))),
                format: match tensor.name.contains("proj") {
                    true => matrices,
                    false => Format::Stored,
                },
            }
        })
        .collect();
    let devices = [device(0, 1 << 20), device(1, 1 << 20)];
    Proposed {
        plan: Plan::new(tensors, &[], &devices, &placements, &[headroom; 2]).unwrap(),
        policy: "some".to_owned(),
        version: "1.0.0".to_owned(),
        settings: Vec::new(),
        fuel: None,
        elapsed: Duration::ZERO,
    }
}

#[test]
fn what_moved_and_what_changed_its_format_is_said() {
    let tensors = decoder(12);
    let a = proposed(&tensors, Format::NF4, 8, 0);
    let b = proposed(&tensors, Format::NF4_DOUBLE, 4, 1000);
    let comparison = Comparison::new(&tensors, ["a", "b"], Ok(&a), Ok(&b));
    assert_eq!(
        comparison.moved.as_deref().unwrap(),
        [Move {
            what: "model.layers 4-7".to_owned(),
            from: Some("sim:0".to_owned()),
            to: Some("sim:1".to_owned()),
        }]
    );
    // 64 scales: 256 bytes in f32; doubly quantized 64 and 4.
    assert_eq!(
        comparison.formats.as_deref().unwrap(),
        [FormatChange {
            kind: "linear layers",
            from: "nf4".to_owned(),
            to: "nf4+double".to_owned(),
            tensors: 12,
            bytes_a: 12 * (2048 + 256),
            bytes_b: 12 * (2048 + 68),
        }]
    );
    let text = comparison.text();
    assert!(
        text.contains("\nmodel.layers 4-7: sim:0 -> sim:1\n"),
        "{text}"
    );
    assert!(text.contains("-2.203 KiB"), "{text}");
    assert!(
        text.lines().any(|line| line.starts_with("in all")),
        "{text}"
    );
}

#[test]
fn differences_of_devices_are_those_of_the_plans() {
    let tensors = decoder(6);
    let (a, b) = (
        proposed(&tensors, Format::NF4, 3, 0),
        proposed(&tensors, Format::NF4, 6, 512),
    );
    let comparison = Comparison::new(&tensors, ["a", "b"], Ok(&a), Ok(&b));
    for (index, change) in comparison.devices.iter().enumerate() {
        let (a, b) = (&a.plan.devices[index], &b.plan.devices[index]);
        assert_eq!(change.reserved_a, Some(a.size.reserved));
        assert_eq!(change.reserved_b, Some(b.size.reserved));
        assert_eq!(change.free_a, Some((1 << 20) - a.size.reserved));
        assert_eq!(change.free_b, Some((1 << 20) - b.size.reserved - 512));
    }
    assert_eq!(comparison.b.totals.unwrap().headroom, 1024);
    assert_eq!(comparison.formats.as_deref(), Some(&[][..]));
}

#[test]
fn a_refusal_stands_beside_the_other_plan() {
    let tensors = decoder(2);
    let plan = proposed(&tensors, Format::NF4, 1, 0);
    let refusal = ErrorReport::new(Status::DoesNotFit, "does-not-fit", &"it is\x1b too much");
    let comparison = Comparison::new(&tensors, ["a", "b"], Err(&refusal), Ok(&plan));
    assert_eq!(comparison.a.error, Some(refusal));
    assert_eq!(comparison.b.error, None);
    assert_eq!((&comparison.moved, &comparison.formats), (&None, &None));
    assert_eq!(comparison.devices[0].reserved_a, None);
    let text = comparison.text();
    assert!(
        text.contains("A: no plan: it is\\u{1b} too much\nB: some 1.0.0, "),
        "{text}"
    );
}

#[test]
fn equal_plans_have_no_differences() {
    let tensors = decoder(2);
    let plan = proposed(&tensors, Format::NF4, 1, 0);
    let text = Comparison::new(&tensors, ["a", "a"], Ok(&plan), Ok(&plan)).text();
    assert!(
        text.contains("the same place and the same format"),
        "{text}"
    );
}
