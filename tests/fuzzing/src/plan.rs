//! Plans from anyone's placements.

use arbitrary::{Arbitrary, Result, Unstructured};
use tightfit::checkpoint::{AbsmaxForm, Extent, Nested, Quantized, TensorInfo, Tie};
use tightfit::device::{DeviceInfo, DeviceKind};
use tightfit::plan::{PART_ALIGNMENT, Plan, PlanError, PlanOptions};
use tightfit::types::{BlockSize, DType, Format, Placement, QuantType};

/// Everything that a plan is made of.
#[derive(Debug)]
struct Case {
    tensors: Vec<TensorInfo>,
    ties: Vec<Tie>,
    devices: Vec<DeviceInfo>,
    placements: Vec<Placement>,
    headroom: Vec<u64>,
    tail: bool,
}

/// Sizes as they are, and any other.
fn size(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.int_in_range(0..=3)? {
        0 => u.int_in_range(0..=9)?,
        1 => u.int_in_range(0..=100_000)?,
        2 => 1 << u.int_in_range(0..=63)?,
        _ => u64::arbitrary(u)?,
    })
}

fn tensor(u: &mut Unstructured<'_>, index: usize) -> Result<TensorInfo> {
    let dtype = *u.choose(&DType::ALL)?;
    let mut shape = Vec::new();
    for _ in 0..u.int_in_range(0..=4)? {
        shape.push(size(u)?);
    }
    let extent = Extent {
        shard: 0,
        offset: 0,
        bytes: 0,
    };
    let quantized = match u.ratio(1, 4)? {
        false => None,
        true => Some(Box::new(Quantized {
            quant_type: QuantType::Nf4,
            block_size: *u.choose(&BlockSize::ALL)?,
            absmax: extent,
            absmax_form: AbsmaxForm::default(),
            nested: bool::arbitrary(u)?.then_some(Nested {
                absmax: extent,
                absmax_mean: 0.0,
            }),
        })),
    };
    Ok(TensorInfo {
        name: format!("t{index}"),
        dtype,
        // A plan asks for the type and the shape, not for this.
        bytes: dtype.tensor_bytes(&shape).unwrap_or(0),
        shape,
        shard: 0,
        offset: 0,
        quantized,
        encoded: None,
        piece: None,
    })
}

fn placement(u: &mut Unstructured<'_>, devices: usize) -> Result<Placement> {
    let device = match u.int_in_range(0..=8)? {
        0 => None,
        1 => Some(u32::arbitrary(u)?),
        _ => Some(u.int_in_range(0..=devices.max(1) as u32 - 1)?),
    };
    let format = match u.int_in_range(0..=4)? {
        0 => Format::Cast(*u.choose(&DType::ALL)?),
        1 | 2 => Format::Nf4 {
            block_size: *u.choose(&BlockSize::ALL)?,
            double_quantized: bool::arbitrary(u)?,
        },
        _ => Format::Stored,
    };
    Ok(Placement { device, format })
}

impl Arbitrary<'_> for Case {
    fn arbitrary(u: &mut Unstructured<'_>) -> Result<Case> {
        let mut devices = Vec::new();
        for index in 0..u.int_in_range(0..=3)? {
            devices.push(DeviceInfo {
                name: format!("d{index}"),
                kind: DeviceKind::Sim,
                capacity: size(u)?,
                available: size(u)?,
                granularity: size(u)?,
            });
        }
        let mut tensors = Vec::new();
        for index in 0..u.int_in_range(0..=24)? {
            tensors.push(tensor(u, index)?);
        }
        let mut ties = Vec::new();
        // A tie leads to tensors that are there: checkpoints find them among theirs.
        for _ in 0..u.int_in_range(0..=2)? {
            if let Some(last) = tensors.len().checked_sub(1) {
                let alias_tensor = match bool::arbitrary(u)? {
                    true => Some(u.int_in_range(0..=last)?),
                    false => None,
                };
                ties.push(Tie {
                    tensor: u.int_in_range(0..=last)?,
                    alias: "alias".to_owned(),
                    alias_tensor,
                });
            }
        }
        let wrong = |u: &mut Unstructured<'_>, count: usize| -> Result<usize> {
            match u.ratio(1, 16)? {
                true => u.int_in_range(0..=count + 2),
                false => Ok(count),
            }
        };
        let mut placements = Vec::new();
        for _ in 0..wrong(u, tensors.len())? {
            placements.push(placement(u, devices.len())?);
        }
        let mut headroom = Vec::new();
        for _ in 0..wrong(u, devices.len())? {
            headroom.push(size(u)?);
        }
        Ok(Case {
            tensors,
            ties,
            devices,
            placements,
            headroom,
            tail: bool::arbitrary(u)?,
        })
    }
}

/// Makes a plan, and checks what everything after it relies on.
pub fn plan(data: &[u8]) -> bool {
    let Ok(case) = Case::arbitrary(&mut Unstructured::new(data)) else {
        return false;
    };
    let options = PlanOptions::default().with_reserved_headroom(case.tail);
    let make = || {
        Plan::new_with(
            &case.tensors,
            &case.ties,
            &case.devices,
            &case.placements,
            &case.headroom,
            &options,
        )
    };
    let made = make();
    assert_eq!(made, make(), "the same input gives the same plan");
    match made {
        Ok(plan) => {
            assert_exact(&case, &plan);
            true
        }
        Err(error) => {
            if let PlanError::DoesNotFit {
                need,
                headroom,
                have,
                ..
            } = &error
            {
                let all = need.saturating_add(*headroom);
                assert!(all > *have || all == u64::MAX);
            }
            assert!(!error.to_string().is_empty());
            false
        }
    }
}

fn assert_exact(case: &Case, plan: &Plan) {
    assert_eq!(plan.tensors.len(), case.tensors.len());
    assert_eq!(plan.devices.len(), case.devices.len());
    // Must not overflow.
    let _ = plan.scratch_budget();
    for (index, device) in plan.devices.iter().enumerate() {
        let tensors = plan.tensors.iter();
        let here = tensors.filter(|tensor| tensor.placement.device == Some(index as u32));
        let mut parts: Vec<_> = here.flat_map(|tensor| tensor.parts.iter()).collect();
        parts.sort_by_key(|part| (part.offset, part.bytes));
        let (mut end, mut bytes) = (0, 0);
        for part in parts {
            assert_eq!(part.offset % PART_ALIGNMENT, 0);
            assert!(part.offset >= end, "parts overlap: {plan:?}");
            end = part.offset + part.bytes;
            bytes += part.bytes;
        }
        let size = device.size;
        assert_eq!(size.requested, bytes);
        assert!(bytes <= size.padded && end <= size.padded);
        let end = size.padded + device.tail;
        assert!(end <= size.reserved);
        let granularity = device.device.granularity.max(1);
        assert!(size.reserved.is_multiple_of(granularity));
        assert!(size.reserved - end < granularity);
        if case.tail {
            assert_eq!(device.headroom, 0);
        } else {
            assert_eq!((device.headroom, device.tail), (case.headroom[index], 0));
        }
        let available = device.device.available;
        assert!(size.reserved == 0 || size.reserved.saturating_add(device.headroom) <= available);
    }
    for (planned, placement) in plan.tensors.iter().zip(&case.placements) {
        assert_eq!(planned.placement, *placement);
        assert_eq!(planned.parts.is_empty(), placement.device.is_none());
    }
}
