//! The laws of a layout.

use proptest::prelude::*;
use proptest::sample::select;
use tightfit_kernels::cuda::experts::{ExpertsProduct, Form, Quantized, Routing, RowsOfX};
use tightfit_kernels::{Activation, FloatType, GateLayout};

use super::*;
use crate::device::DeviceKind;
use crate::testing::{device, tensor};
use crate::types::{BlockSize, DType};

fn on(device: u32, format: Format) -> Placement {
    Placement {
        device: Some(device),
        format,
    }
}

fn with_tail() -> PlanOptions {
    PlanOptions::default().with_reserved_headroom(true)
}

fn formats() -> impl Strategy<Value = Format> {
    prop_oneof![
        Just(Format::Stored),
        Just(Format::Cast(DType::F32)),
        (select(&BlockSize::ALL[..]), any::<bool>()).prop_map(|(block_size, double_quantized)| {
            Format::Nf4 {
                block_size,
                double_quantized,
            }
        }),
    ]
}

proptest! {
    #[test]
    fn parts_are_aligned_disjoint_in_their_arena_and_add_up(
        spec in prop::collection::vec(
            (prop::collection::vec(0u64..70, 0..4), formats(), prop::option::of(0u32..3)),
            0..40,
        ),
        granularity in prop_oneof![Just(1u64), Just(4096), Just(2 << 20)],
    ) {
        let tensors: Vec<TensorInfo> = spec.iter().enumerate()
            .map(|(i, (shape, ..))| tensor(&format!("t{i}"), DType::Bf16, shape))
            .collect();
        let placements: Vec<Placement> = spec.iter()
            .map(|&(_, format, device)| Placement { device, format })
            .collect();
        let devices: Vec<DeviceInfo> =
            (0..3).map(|i| device(&format!("d{i}"), 1 << 40, granularity)).collect();
        let plan = Plan::new(&tensors, &[], &devices, &placements, &[0; 3]).unwrap();
        prop_assert_eq!(&plan, &Plan::new(&tensors, &[], &devices, &placements, &[0; 3]).unwrap());

        for (number, device) in plan.devices.iter().enumerate() {
            let mut parts: Vec<PlannedPart> = plan.tensors.iter()
                .filter(|tensor| tensor.placement.device == Some(number as u32))
                .flat_map(|tensor| tensor.parts.iter().copied())
                .collect();
            parts.sort_by_key(|part| (part.offset, part.bytes));
            let mut end = 0;
            for part in &parts {
                prop_assert_eq!(part.offset % PART_ALIGNMENT, 0);
                prop_assert!(part.offset >= end, "parts overlap");
                end = part.offset + part.bytes;
            }
            prop_assert!(end <= device.size.padded);
            let sum = |f: fn(&PlannedPart) -> u64| parts.iter().map(f).sum::<u64>();
            prop_assert_eq!(device.size.requested, sum(|part| part.bytes));
            prop_assert_eq!(
                device.size.padded,
                sum(|part| part.bytes.next_multiple_of(PART_ALIGNMENT))
            );
            prop_assert_eq!(device.size.reserved, device.size.padded.next_multiple_of(granularity));
            // Plain tensors at the end.
            let first_plain = plan.tensors.iter()
                .filter(|t| t.placement.device == Some(number as u32) && is_plain(t.placement.format))
                .flat_map(|t| t.parts.iter().filter(|part| part.bytes > 0).map(|part| part.offset)).min();
            let last_quantized = plan.tensors.iter()
                .filter(|t| t.placement.device == Some(number as u32) && !is_plain(t.placement.format))
                .flat_map(|t| t.parts.iter().filter(|part| part.bytes > 0).map(|part| part.offset)).max();
            if let (Some(plain), Some(quantized)) = (first_plain, last_quantized) {
                prop_assert!(quantized < plain);
            }
        }
        for (tensor, &(_, _, device)) in plan.tensors.iter().zip(&spec) {
            prop_assert_eq!(tensor.parts.is_empty(), device.is_none());
        }
    }

    #[test]
    fn a_plan_fits_exactly_when_the_reservation_and_the_headroom_do(
        rows in 1u64..200,
        spare in -3000i64..3000,
        headroom in 0u64..5000,
    ) {
        let tensors = [tensor("w", DType::Bf16, &[rows, 64])];
        let need = (rows * 32).next_multiple_of(256) + (rows * 4).next_multiple_of(256);
        let available = (need + headroom).saturating_add_signed(spare);
        let plan = Plan::new(
            &tensors, &[], &[device("d", available, 1)], &[on(0, Format::NF4)], &[headroom],
        );
        prop_assert_eq!(plan.is_ok(), available >= need + headroom);
    }
}

proptest! {
    #[test]
    fn a_tail_takes_the_headrooms_place_behind_the_same_weights(
        rows in prop::collection::vec(0u64..200, 1..5),
        headroom in prop::collection::vec(0u64..100_000, 3),
        granularity in prop_oneof![Just(1u64), Just(4096), Just(2 << 20)],
    ) {
        let tensors: Vec<TensorInfo> = rows.iter().enumerate()
            .map(|(i, &rows)| tensor(&format!("t{i}"), DType::Bf16, &[rows, 64]))
            .collect();
        let placements: Vec<Placement> = (0..rows.len() as u32).map(|i| on(i % 2, Format::NF4)).collect();
        let devices: Vec<DeviceInfo> =
            (0..3).map(|i| device(&format!("d{i}"), 1 << 40, granularity)).collect();
        let without = Plan::new(&tensors, &[], &devices, &placements, &headroom).unwrap();
        let plan = Plan::new_with(&tensors, &[], &devices, &placements, &headroom, &with_tail()).unwrap();
        prop_assert_eq!(&plan.tensors, &without.tensors);
        for ((device, before), &headroom) in plan.devices.iter().zip(&without.devices).zip(&headroom) {
            prop_assert_eq!(device.headroom, 0);
            prop_assert_eq!(device.size.requested, before.size.requested);
            prop_assert_eq!(device.size.padded, before.size.padded);
            // A device that holds nothing is left alone.
            let tail = if device.size.padded == 0 { 0 } else { headroom.next_multiple_of(256) };
            prop_assert_eq!(device.tail, tail);
            let end = device.size.padded + tail;
            prop_assert_eq!(device.size.reserved, end.next_multiple_of(granularity));
            prop_assert_eq!(before.tail, 0);
        }
    }

    #[test]
    fn a_plan_with_a_tail_fits_exactly_when_the_reservation_does(
        units in 0u64..8,
        rest in 0u64..4096,
        headroom in 0u64..20_000,
    ) {
        let tensors = [tensor("w", DType::Bf16, &[100, 64])];
        // 3200 bytes of codes and 400 of scales, each in 256s.
        let need = (3328 + 512 + headroom.next_multiple_of(256)).next_multiple_of(4096);
        let available = 4096 * units + rest;
        let devices = [device("d", available, 4096)];
        let plan = Plan::new_with(
            &tensors, &[], &devices, &[on(0, Format::NF4)], &[headroom], &with_tail(),
        );
        prop_assert_eq!(plan.is_ok(), need <= available);
        if let Ok(plan) = plan {
            prop_assert_eq!(plan.devices[0].size.reserved, need);
        }
    }
}

#[test]
fn what_exceeds_64_bits_does_not_fit_whatever_a_device_has() {
    let tensors: Vec<TensorInfo> = (0..17)
        .map(|i| tensor(&format!("t{i}"), DType::U8, &[1 << 60]))
        .collect();
    let devices = [device("d", u64::MAX, 1)];
    let placements = [on(0, Format::Stored); 17];
    assert!(Plan::new(&tensors[..15], &[], &devices, &placements[..15], &[0]).is_ok());
    for (count, headroom) in [(17, 0), (16, 0), (15, u64::MAX)] {
        let plan = Plan::new(
            &tensors[..count],
            &[],
            &devices,
            &placements[..count],
            &[headroom],
        );
        assert!(matches!(plan, Err(PlanError::DoesNotFit { .. })), "{count}");
    }
}

#[test]
fn what_does_not_fit_is_named_with_need_have_and_every_total() {
    let tensors = [
        tensor("a", DType::Bf16, &[1024]),
        tensor("b", DType::Bf16, &[1024]),
        tensor("c", DType::Bf16, &[1024]),
    ];
    let devices = [device("sim:0", 1 << 20, 1), device("sim:1", 3000, 1)];
    let placements = [
        on(0, Format::Stored),
        on(1, Format::Stored),
        on(1, Format::Stored),
    ];
    let error = Plan::new(&tensors, &[], &devices, &placements, &[0, 0]).unwrap_err();
    match &error {
        PlanError::DoesNotFit {
            device,
            tensor,
            need,
            have,
            totals,
            ..
        } => {
            assert_eq!((device.as_str(), tensor.as_str()), ("sim:1", "c"));
            assert_eq!((*need, *have), (4096, 3000));
            assert_eq!(totals.len(), 2);
        }
        other => panic!("{other}"),
    }
    let text = error.to_string();
    for part in ["sim:1", "'c'", "4.000 KiB", "2.930 KiB", "sim:0 2.000 KiB"] {
        assert!(text.contains(part), "{part} not in: {text}");
    }
}

#[test]
fn rounding_to_the_granularity_counts() {
    let tensors = [tensor("a", DType::Bf16, &[128])];
    let placements = [on(0, Format::Stored)];
    assert!(Plan::new(&tensors, &[], &[device("d", 4096, 4096)], &placements, &[0]).is_ok());
    let error = Plan::new(&tensors, &[], &[device("d", 4095, 4096)], &placements, &[0]);
    assert!(
        matches!(error, Err(PlanError::DoesNotFit { need: 4096, ref tensor, .. }) if tensor == "a"),
        "{error:?}"
    );
}

#[test]
fn an_unused_device_costs_nothing_whatever_its_headroom() {
    let tensors = [tensor("a", DType::Bf16, &[128])];
    let devices = [device("d", 4096, 4096), device("full", 0, 4096)];
    let plan = Plan::new(
        &tensors,
        &[],
        &devices,
        &[on(0, Format::Stored)],
        &[0, 1 << 30],
    )
    .unwrap();
    assert_eq!(plan.devices[1].size, ReservationSize::default());
}

#[test]
fn contradictions_are_the_placements_fault() {
    let tensors = [
        tensor("embed", DType::Bf16, &[4, 64]),
        tensor("head", DType::Bf16, &[4, 64]),
        tensor("ids", DType::I64, &[4]),
    ];
    let devices = [device("d", 1 << 20, 1), device("e", 1 << 20, 1)];
    let tie = [Tie {
        tensor: 0,
        alias: "head".to_owned(),
        alias_tensor: Some(1),
    }];
    let stored = on(0, Format::Stored);
    let make = |placements: &[Placement], headroom: &[u64]| match Plan::new(
        &tensors, &tie, &devices, placements, headroom,
    ) {
        Err(PlanError::Bad(bad)) => Some(bad),
        Err(other) => panic!("{other}"),
        Ok(_) => None,
    };
    assert!(matches!(
        make(&[stored; 2], &[0; 2]),
        Some(BadPlan::PlacementCount { need: 3, have: 2 })
    ));
    assert!(matches!(
        make(&[stored; 3], &[0]),
        Some(BadPlan::HeadroomCount { need: 2, have: 1 })
    ));
    assert!(matches!(
        make(&[stored, stored, on(2, Format::Stored)], &[0; 2]),
        Some(BadPlan::NoSuchDevice {
            device: 2,
            devices: 2,
            ..
        })
    ));
    assert!(matches!(
        make(&[stored, stored, on(0, Format::NF4)], &[0; 2]),
        Some(BadPlan::IllegalFormat { ref tensor, .. }) if tensor == "ids"
    ));
    for torn in [on(1, Format::Stored), on(0, Format::NF4)] {
        assert!(matches!(
            make(&[stored, torn, stored], &[0; 2]),
            Some(BadPlan::TornTie { ref alias, .. }) if alias == "head"
        ));
    }
    let left_out = Placement {
        device: None,
        format: Format::Stored,
    };
    assert_eq!(make(&[stored, left_out, stored], &[0; 2]), None);
}

#[test]
fn products_have_their_room_behind_the_weights_and_it_is_planned() {
    let matrix = |name, shape: &[u64]| tensor(name, DType::Bf16, shape);
    let tensors = [
        matrix("small", &[512, 512]),
        matrix("large", &[4096, 4096]),
        matrix("experts", &[8, 1024, 512]),
        matrix("stored", &[4096, 8192]),
        matrix("norm", &[4096]),
    ];
    let sims = [
        device("sim:0", 1 << 30, 2 << 20),
        device("sim:1", 1 << 30, 4096),
        DeviceInfo {
            kind: DeviceKind::Cpu,
            ..device("cpu", 1 << 30, 4096)
        },
    ];
    let plan = |formats: [Format; 5], devices: [u32; 5], options: &PlanOptions| {
        let placements: Vec<_> = formats
            .iter()
            .zip(devices)
            .map(|(&f, d)| on(d, f))
            .collect();
        Plan::new_with(&tensors, &[], &sims, &placements, &[5000; 3], options).unwrap()
    };
    let products =
        |plan: &Plan| -> Vec<u64> { plan.devices.iter().map(|device| device.products).collect() };
    let rows = |rows| PlanOptions::default().with_rows(rows);
    let stored = Format::Stored;
    let all = [Format::NF4, Format::NF4, Format::NF4, stored, stored];
    // Without rows, and without weights in 4 bits on an accelerator, there is none.
    assert_eq!(products(&plan(all, [0; 5], &rows(0))), [0; 3]);
    assert_eq!(products(&plan([stored; 5], [0; 5], &rows(64))), [0; 3]);
    assert_eq!(products(&plan(all, [2; 5], &rows(64))), [0; 3]);

    // Of the weight that needs most, as the kernels say; it grows with rows up to a bound.
    let most = |outputs, inputs, rows| {
        let of = |by_row| {
            let linear = tightfit_kernels::cuda::linear::Linear {
                float: tightfit_kernels::FloatType::Bf16,
                rows,
                outputs,
                inputs,
                block_size: BlockSize::DEFAULT,
                aligned: true,
                by_row,
            };
            linear.most_workspace_bytes(None) as u64
        };
        of(false).max(of(true))
    };
    // Of a stack with an expert for each row: what its kernels work in, and the sorted rows.
    let of_stack = |[experts, outputs, inputs]: [usize; 3], rows| {
        let product = experts_product([rows, 1, experts], outputs, inputs, Form::Plain);
        let work = product.most_workspace_bytes(None).next_multiple_of(256);
        (work + product.routing.most_bytes().next_multiple_of(256)) as u64
    };
    let mut before = 0;
    for count in [1, 8, 9, 64, 65, 100_000] {
        let plan = plan(all, [0, 0, 1, 0, 0], &rows(count));
        let expected = [
            most(4096, 4096, count as usize),
            most(1024, 512, count as usize).max(of_stack([8, 1024, 512], count as usize)),
            0,
        ];
        assert_eq!(products(&plan), expected, "{count}");
        assert!((before..26 << 20).contains(&expected[0]));
        before = expected[0];
        for device in &plan.devices {
            assert_eq!((device.tail, device.headroom), (device.products, 5000));
            let granularity = device.device.granularity;
            let padded = device.size.padded + device.tail;
            assert_eq!(device.size.reserved, padded.next_multiple_of(granularity));
        }
    }
    // Double quantization adds the values of codes, and a mean for each weight.
    let double = [
        Format::NF4_DOUBLE,
        Format::NF4,
        Format::NF4_DOUBLE,
        stored,
        stored,
    ];
    let plan_of_double = plan(double, [0; 5], &rows(8));
    let constants = (1024u64 + 2 * 16).next_multiple_of(256);
    assert_eq!(
        products(&plan_of_double)[0],
        most(4096, 4096, 8) + constants
    );
    // A vector in 4 bits is not multiplied.
    let vector = [stored, stored, stored, stored, Format::NF4_DOUBLE];
    assert_eq!(products(&plan(vector, [0; 5], &rows(8))), [0; 3]);

    // With headroom in the same tail.
    let both = plan(all, [0; 5], &rows(8).with_reserved_headroom(true));
    let device = &both.devices[0];
    assert_eq!(device.products, most(4096, 4096, 8));
    assert_eq!((device.tail, device.headroom), (5120 + device.products, 0));

    // It counts when a device is too small.
    let free = plan(all, [0; 5], &rows(0)).devices[0].size.reserved;
    let mut small = sims.clone();
    small[0].available = free + 5000;
    let placements: Vec<_> = all.iter().map(|&format| on(0, format)).collect();
    let ask = |options| Plan::new_with(&tensors, &[], &small, &placements, &[5000; 3], &options);
    assert!(ask(rows(0)).is_ok());
    let error = ask(rows(64)).unwrap_err();
    assert!(
        matches!(error, PlanError::DoesNotFit { need, .. } if need > free),
        "{error}"
    );
}

/// Experts of one layer, the tensors of each in this order.
fn experts(count: usize, names: [&str; 3], [rows, columns]: [u64; 2]) -> Vec<TensorInfo> {
    let of = |expert: usize| {
        names.map(|name| {
            let down = matches!(name, "w2" | "down_proj");
            let shape = if down {
                [columns, rows]
            } else {
                [rows, columns]
            };
            let name = format!("l.0.experts.{expert}.{name}.weight");
            tensor(&name, DType::Bf16, &shape)
        })
    };
    (0..count).flat_map(of).collect()
}

proptest! {
    #[test]
    fn experts_of_a_layer_lie_as_stacks(
        count in 1usize..9,
        is_mixtral in any::<bool>(),
        rows in 1u64..5,
        columns in 1u64..5,
        format in formats(),
        order in any::<u64>(),
        other in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let names = match is_mixtral {
            true => ["w1", "w2", "w3"],
            false => ["down_proj", "gate_proj", "up_proj"],
        };
        let (gates, down) = match is_mixtral {
            true => (["w1", "w3"], "w2"),
            false => (["gate_proj", "up_proj"], "down_proj"),
        };
        let mut tensors = experts(count, names, [32 * rows, 64 * columns]);
        tensors.push(tensor("l.0.norm.weight", DType::Bf16, &[64]));
        tensors.insert(0, tensor("l.0.experts.gate.weight", DType::Bf16, &[64, 64]));
        // In any order of the files.
        let key = |tensor: &TensorInfo| tensor.name.bytes().fold(order, |sum, byte| sum.wrapping_mul(31) ^ u64::from(byte));
        tensors.sort_by_key(key);
        let mut placements = vec![on(0, format); tensors.len()];
        let other = other.map(|other| other.index(tensors.len()));
        if let Some(other) = other {
            placements[other] = on(1, format);
        }
        let devices = [device("d0", 1 << 40, 1), device("d1", 1 << 40, 1)];
        let plan = Plan::new(&tensors, &[], &devices, &placements, &[0; 2]).unwrap();
        let place = |name: String| {
            let index = tensors.iter().position(|tensor| tensor.name == name).unwrap();
            (index, &plan.tensors[index])
        };
        for leaves in [&gates[..], &[down]] {
            let members: Vec<_> = (0..count)
                .flat_map(|expert| leaves.iter().map(move |leaf| format!("l.0.experts.{expert}.{leaf}.weight")))
                .map(place)
                .collect();
            let is_torn = members.iter().any(|&(index, _)| Some(index) == other) && members.len() > 1;
            let parts = &members[0].1.parts;
            let is_whole = parts
                .iter()
                .all(|part| part.kind == PartKind::NestedAbsmax || part.bytes.is_multiple_of(PART_ALIGNMENT));
            if is_torn || !is_whole {
                continue;
            }
            for (number, (_, member)) in members.iter().enumerate() {
                for (part, first) in member.parts.iter().zip(parts) {
                    let apart = first.bytes.next_multiple_of(PART_ALIGNMENT);
                    prop_assert_eq!(part.offset, first.offset + number as u64 * apart);
                }
            }
        }
        // Nothing takes more or less for it.
        for (number, device) in plan.devices.iter().enumerate() {
            let here = plan.tensors.iter().filter(|t| t.placement.device == Some(number as u32));
            let parts: Vec<_> = here.clone().flat_map(|tensor| tensor.parts.iter()).collect();
            let padded = parts.iter().map(|part| part.bytes.next_multiple_of(PART_ALIGNMENT)).sum::<u64>();
            prop_assert_eq!(device.size.padded, padded);
            prop_assert_eq!(device.tensors, here.count() as u64);
            let mut places: Vec<_> = parts.iter().map(|part| (part.offset, part.bytes)).collect();
            places.sort_unstable();
            for pair in places.windows(2) {
                prop_assert!(pair[0].0 + pair[0].1 <= pair[1].0);
            }
        }
    }
}

#[test]
fn experts_that_lie_as_stacks_have_room_for_layers() {
    let stacks = [
        tensor("l.0.experts.gate_up_proj", DType::Bf16, &[8, 256, 512]),
        tensor("l.0.experts.down_proj", DType::Bf16, &[8, 512, 128]),
    ];
    let each = experts(8, ["gate_proj", "up_proj", "down_proj"], [128, 512]);
    let devices = [device("sim:0", 1 << 30, 4096)];
    for rows in [1, 20, 600] {
        let options = PlanOptions::default()
            .with_rows(rows)
            .with_experts_per_token(2);
        let products = |tensors: &[TensorInfo], format| {
            let placements = vec![on(0, format); tensors.len()];
            let plan = Plan::new_with(tensors, &[], &devices, &placements, &[0], &options);
            plan.unwrap().devices[0].products
        };
        let (of_each, of_stacks) = (products(&each, Format::NF4), products(&stacks, Format::NF4));
        assert!(of_each >= of_stacks, "{rows} rows: {of_each}, {of_stacks}");
        // With a mean each too, for which there is room beside the map.
        let of_double = products(&each, Format::NF4_DOUBLE);
        let constants = 1024 + 16 * each.len() as u64;
        let need = of_each + constants.next_multiple_of(256);
        assert_eq!(of_double, need, "{rows} rows");
        let most = products::most_bytes(&each, &options.wanted(), &mut Watch::new(&options.cancel));
        assert!(most.unwrap() >= of_each);
    }
}

fn experts_product(
    [tokens, choices, experts]: [usize; 3],
    results: usize,
    inputs: usize,
    form: Form,
) -> ExpertsProduct {
    ExpertsProduct {
        routing: Routing {
            tokens,
            choices,
            experts,
        },
        float: FloatType::Bf16,
        x: RowsOfX::Tokens,
        results,
        inputs,
        block_size: BlockSize::DEFAULT,
        form,
        quantized: Quantized::Whole,
        aligned: true,
        follows: false,
    }
}

#[test]
fn layers_of_experts_and_gradients_have_room() {
    let matrix = |name, shape: &[u64]| tensor(name, DType::Bf16, shape);
    let tensors = [
        matrix("l.mlp.experts.gate_up_proj", &[8, 1024, 512]),
        matrix("l.mlp.experts.down_proj", &[8, 512, 512]),
    ];
    let devices = [device("sim:0", 1 << 30, 4096)];
    let products = |options: &PlanOptions| {
        let placements = [on(0, Format::NF4), on(0, Format::NF4)];
        let plan = Plan::new_with(&tensors, &[], &devices, &placements, &[0], options);
        plan.unwrap().devices[0].products
    };
    let gates = Form::Gated {
        layout: GateLayout::Halves,
        activation: Activation::Silu,
    };
    for (tokens, choices) in [(1, 8), (20, 2), (600, 8)] {
        let options = PlanOptions::default()
            .with_rows(tokens as u64)
            .with_experts_per_token(choices as u64);
        let of = |form| {
            let product = experts_product([tokens, choices, 8], 512, 512, form);
            product.most_workspace_bytes(None)
        };
        let routing = experts_product([tokens, choices, 8], 512, 512, gates).routing;
        let pairs = tokens * choices;
        // What the kernels work in and the routing, and of each pair what the activation gives in bf16
        // (in f32, where the kernels need nothing) and a part in f32.
        let pieces = |work: usize, element| {
            [
                work,
                routing.most_bytes(),
                pairs * 512 * element,
                pairs * 512 * 4,
            ]
            .map(|bytes: usize| bytes.next_multiple_of(256))
        };
        let bf16 = pieces(of(gates).max(of(Form::Parts)), 2)
            .iter()
            .sum::<usize>();
        let f32 = pieces(0, 4).iter().sum::<usize>();
        assert_eq!(products(&options), bf16.max(f32) as u64, "{tokens}");
        // Where nobody says how many experts a token has, there are 8.
        let unsaid = PlanOptions::default().with_rows(tokens as u64);
        assert_eq!(products(&unsaid) == products(&options), choices == 8);
        let gradients = products(&options.clone().with_gradients(true));
        assert!(gradients >= products(&options));
        assert!(gradients <= products(&options).max((16 << 20) + 256));
    }
    // From some number of tokens on they are computed in parts.
    let many = |rows| products(&PlanOptions::default().with_rows(rows));
    assert!(many(1_000_000) < (64 << 20) + (8 << 20) + 16 * 1_000_000);
}
