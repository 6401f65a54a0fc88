//! What the policies promise, held against every possible arrangement of small models.

use std::collections::BTreeSet;

use tightfit_guest::sizing::Sizer;
use tightfit_guest::{DeviceKind, PreviousFailure, Proposal, Refusal, Request};

use crate::Arrangement::{self, Pack, Spread};
use crate::fixtures::*;
use crate::plan;

/// Units in model order, each a list of tensors, in steps of 2 MiB.
type Units = Vec<Vec<u64>>;

const STEP: u64 = 2 * MIB;

/// An embedding, layers and a head.
fn units(random: &mut Random) -> Units {
    let mut units = vec![vec![1 + random.below(9)]];
    for _ in 0..1 + random.below(4) {
        let tensors = 1 + random.below(3);
        units.push((0..tensors).map(|_| 1 + random.below(6)).collect());
    }
    units.push(vec![1 + random.below(9)]);
    units
}

fn model(units: &Units) -> Vec<tightfit_guest::Tensor> {
    let last = units.len() - 1;
    let mut tensors = Vec::new();
    for (u, unit) in units.iter().enumerate() {
        for (t, steps) in unit.iter().enumerate() {
            let name = match u {
                0 => "model.embed_tokens.weight".to_owned(),
                u if u == last => "lm_head.weight".to_owned(),
                u => format!("model.layers.{}.x{t}.bias", u - 1),
            };
            tensors.push(tensor(name, &[steps * STEP / 2]));
        }
    }
    tensors
}

/// Sizes of devices, in steps.
fn sizes(random: &mut Random) -> Vec<u64> {
    let equal = random.below(2) == 0;
    let first = 1 + random.below(30);
    let size = |random: &mut Random| if equal { first } else { 1 + random.below(30) };
    (0..1 + random.below(3)).map(|_| size(random)).collect()
}

fn asked(units: &Units, sizes: &[u64]) -> Request {
    let bytes: Vec<u64> = sizes.iter().map(|size| size * STEP).collect();
    request(model(units), sims(&bytes))
}

/// The load of each device, for every way to cut a sequence that fits.
fn contiguous(sequence: &[u64], sizes: &[u64]) -> Vec<Vec<u64>> {
    let Some((&size, others)) = sizes.split_first() else {
        return if sequence.is_empty() {
            vec![vec![]]
        } else {
            vec![]
        };
    };
    let mut all = Vec::new();
    for count in 0..=sequence.len() {
        let load: u64 = sequence[..count].iter().sum();
        if load <= size {
            for rest in contiguous(&sequence[count..], others) {
                all.push([&[load][..], &rest].concat());
            }
        }
    }
    all
}

fn whole(units: &Units) -> Vec<u64> {
    units.iter().map(|unit| unit.iter().sum()).collect()
}

/// Steps used on each device.
fn loads(request: &Request, proposal: &Proposal) -> Vec<u64> {
    let mut sizer = Sizer::new();
    let mut loads = vec![0; request.devices.len()];
    for (tensor, placement) in request.tensors.iter().zip(&proposal.placements) {
        let size = sizer.size(tensor, placement.format).unwrap();
        loads[placement.device.unwrap() as usize] += size.padded / STEP;
    }
    loads
}

/// Whether every unit lies on one device.
fn is_whole(units: &Units, proposal: &Proposal) -> bool {
    let mut rest = &proposal.placements[..];
    units.iter().all(|unit| {
        let (own, others) = rest.split_at(unit.len());
        rest = others;
        own.iter()
            .all(|placement| placement.device == own[0].device)
    })
}

fn used(loads: &[u64]) -> usize {
    loads.iter().filter(|&&load| load > 0).count()
}

#[test]
fn the_fullest_device_is_as_empty_as_whole_layers_in_order_allow() {
    let mut random = Random(1);
    let mut placed = 0;
    for _ in 0..3000 {
        let (units, sizes) = (units(&mut random), sizes(&mut random));
        let request = asked(&units, &sizes);
        // The fullest device of a partition, as a fraction over the product of all sizes.
        let product: u64 = sizes.iter().product();
        let level = |loads: &Vec<u64>| {
            let levels = loads.iter().zip(&sizes);
            levels.map(|(load, size)| load * (product / size)).max()
        };
        let partitions = contiguous(&whole(&units), &sizes);
        let Some(best) = partitions.iter().map(level).min() else {
            continue;
        };
        placed += 1;
        let proposal = plan(&request, Spread).unwrap();
        let loads = loads(&request, &proposal);
        assert!(is_whole(&units, &proposal), "{units:?} {sizes:?}");
        assert!(level(&loads) <= best, "{units:?} {sizes:?} {loads:?}");
        // No accelerator is empty while another is above the mean.
        let equal = sizes.iter().all(|&size| size == sizes[0]);
        if equal && units.len() >= sizes.len() {
            assert_eq!(used(&loads), sizes.len(), "{units:?} {sizes:?} {loads:?}");
        }
    }
    assert!(placed > 1000, "{placed}");
}

#[test]
fn what_fits_in_order_is_never_refused_and_host_memory_not_touched() {
    let mut random = Random(2);
    let mut split = 0;
    for _ in 0..3000 {
        let (units, sizes) = (units(&mut random), sizes(&mut random));
        let mut request = asked(&units, &sizes);
        request.devices.push(device(DeviceKind::Cpu, GIB));
        if contiguous(&units.concat(), &sizes).is_empty() {
            continue;
        }
        split += usize::from(contiguous(&whole(&units), &sizes).is_empty());
        for arrangement in [Spread, Pack] {
            let proposal = plan(&request, arrangement).unwrap();
            let loads = loads(&request, &proposal);
            assert_eq!(loads[sizes.len()], 0, "{units:?} {sizes:?}");
            let fit = loads.iter().zip(&sizes).all(|(load, size)| load <= size);
            assert!(fit, "{units:?} {sizes:?} {loads:?}");
        }
    }
    assert!(split > 50, "{split}");
}

#[test]
fn packed_uses_the_fewest_devices_and_whole_layers_where_they_take_no_more() {
    let mut random = Random(3);
    let (mut spared, mut cut) = (0, 0);
    for _ in 0..3000 {
        let (units, sizes) = (units(&mut random), sizes(&mut random));
        let request = asked(&units, &sizes);
        let fewest = |sequence: &[u64]| {
            let partitions = contiguous(sequence, &sizes);
            partitions.iter().map(|loads| used(loads)).min()
        };
        let Some(expected) = fewest(&units.concat()) else {
            continue;
        };
        let proposal = plan(&request, Pack).unwrap();
        assert_eq!(
            used(&loads(&request, &proposal)),
            expected,
            "{units:?} {sizes:?}"
        );
        let may_be_whole = fewest(&whole(&units)) == Some(expected);
        assert_eq!(
            is_whole(&units, &proposal),
            may_be_whole,
            "{units:?} {sizes:?}"
        );
        spared += usize::from(expected < sizes.len());
        cut += usize::from(!may_be_whole);
    }
    assert!(spared > 100 && cut > 50, "{spared} {cut}");
}

#[test]
fn packed_fills_the_first_devices_and_leaves_the_others_empty() {
    let request = request(qwen2(QWEN2_7B), sims(&[4 * GIB; 4]));
    let proposal = plan(&request, Pack).unwrap();
    let devices: BTreeSet<_> = proposal.placements.iter().map(|p| p.device).collect();
    assert_eq!(devices, BTreeSet::from([Some(0), Some(1)]));
    let mut sizer = Sizer::new();
    let both = request.tensors.iter().zip(&proposal.placements);
    let on_first = both.filter(|(_, placement)| placement.device == Some(0));
    let first: u64 = on_first
        .map(|(tensor, placement)| sizer.size(tensor, placement.format).unwrap().padded)
        .sum();
    // Another layer does not fit.
    assert!(4 * GIB - first < 126 * MIB, "{first}");
}

#[test]
fn a_device_too_small_for_the_embedding_is_still_filled_before_host_memory() {
    let mut devices = sims(&[900 * MIB, 2 * GIB]);
    devices.push(device(DeviceKind::Cpu, 64 * GIB));
    let request = request(qwen2(QWEN2_7B), devices);
    for arrangement in [Spread, Pack] {
        let proposal = plan(&request, arrangement).unwrap();
        let loads = loads(&request, &proposal);
        let full = |d: usize, bytes: u64| bytes - loads[d] * STEP < 160 * MIB;
        assert!(full(0, 900 * MIB) && full(1, 2 * GIB), "{loads:?}");
    }
}

#[test]
fn seven_billion_parameters_use_four_and_eight_devices_evenly() {
    let layer = 126 * MIB / STEP;
    for count in [4, 8] {
        let request = request(qwen2(QWEN2_7B), sims(&vec![47 * GIB / 2; count]));
        let mut loads = loads(&request, &plan(&request, Spread).unwrap());
        assert_eq!(used(&loads), count);
        if count == 8 {
            // Embedding and head are larger than an eighth of the model, and alone.
            assert_eq!((loads.remove(0), loads.pop()), (519, Some(519)));
        }
        let spread = loads.iter().max().unwrap() - loads.iter().min().unwrap();
        assert!(spread <= layer, "{loads:?}");
    }
}

fn refused(request: &Request, arrangement: Arrangement) -> Refusal {
    plan(request, arrangement).unwrap_err()
}

#[test]
fn every_refusal_says_what_is_missing_and_that_much_is_enough() {
    let mut random = Random(4);
    let (mut refusals, mut fragmented) = (0, 0);
    for _ in 0..2000 {
        let (units, sizes) = (units(&mut random), sizes(&mut random));
        let request = asked(&units, &sizes);
        let Err(refusal) = plan(&request, Spread) else {
            continue;
        };
        refusals += 1;
        assert_eq!(refused(&request, Pack), refusal);
        let missing = refusal.missing_bytes.unwrap();
        assert!(refusal.message.contains("would help"), "{refusal:?}");
        let total: u64 = units.concat().iter().sum();
        if refusal.message.contains("no arrangement") {
            fragmented += 1;
            assert!(total <= sizes.iter().sum(), "{refusal:?}");
            let mut roomier = request.clone();
            for device in &mut roomier.devices {
                device.available += missing;
            }
            assert!(plan(&roomier, Spread).is_ok(), "{refusal:?}");
        } else if total > sizes.iter().sum() {
            assert_eq!(missing, (total - sizes.iter().sum::<u64>()) * STEP);
        }
    }
    assert!(refusals > 300 && fragmented > 5, "{refusals} {fragmented}");
}

#[test]
fn a_hint_about_experts_is_given_only_where_there_are_some() {
    for (tensors, has_experts) in [(qwen2(TINY), false), (mixtral(TINY, 4), true)] {
        let request = with(request(tensors, sims(&[0])), &[("experts", "stored")]);
        let message = refused(&request, Spread).message;
        assert_eq!(message.contains("`experts=nf4`"), has_experts, "{message}");
    }
}

#[test]
fn a_refusal_after_a_failure_says_what_was_found() {
    let mut request = request(qwen2(QWEN2_7B), sims(&[3 * GIB, 3 * GIB]));
    request.failure = Some(PreviousFailure {
        device: 1,
        needed: 3 * GIB,
        available: 2 * GIB,
    });
    let refusal = refused(&request, Spread);
    // 5582 MiB on 5 GiB.
    assert_eq!(refusal.missing_bytes, Some(462 * MIB));
    for words in ["can take 5.00 GiB", "Sim has 2.00 GiB", "needed 3.00 GiB"] {
        assert!(refusal.message.contains(words), "{}", refusal.message);
    }
}

#[test]
fn a_fixed_format_counts_in_the_balance() {
    use tightfit_guest::{Format, RequiredFormat};
    // Stored, the first layer is nearly as large as the other three together.
    let shape = Shape { layers: 4, ..TINY };
    let mut request = request(llama(shape), sims(&[GIB, GIB]));
    let first = |name: &str| name.contains("layers.0.") && name.contains("proj");
    for (t, tensor) in request.tensors.iter().enumerate() {
        if first(&tensor.name) {
            let format = Format::Stored;
            let tensor = t as u32;
            request
                .required_formats
                .push(RequiredFormat { tensor, format });
        }
    }
    let proposal = plan(&request, Spread).unwrap();
    for (tensor, placement) in request.tensors.iter().zip(&proposal.placements) {
        if first(&tensor.name) {
            assert_eq!(placement.format, Format::Stored);
        }
        if tensor.name.contains("layers.") {
            let on_first = tensor.name.contains("layers.0.");
            assert_eq!(placement.device == Some(0), on_first, "{}", tensor.name);
        }
    }
}
