//! Whole checkpoints, planned by the default policy and loaded, against what bitsandbytes made of
//! the same weights.

use std::collections::{BTreeMap, BTreeSet};

use tempfile::TempDir;
use tightfit::load::LoadOptions;
use tightfit::model::{Model, Stacked, Tensor};
use tightfit::plan::{PartKind, ProposeError};
use tightfit::policy::PolicyError;
use tightfit::types::Format;
use tightfit_kernels::{Isa, Kernels};
use tightfit_tests::double_quant::{Differences, double_quantize};
use tightfit_tests::golden::{GoldenModel, MODELS, MOE_MODELS};
use tightfit_tests::loading::{
    Contents, DOUBLE_QUANT, Planned, contents, load_with_auto, part, tensor,
};
use tightfit_tests::products::check_products;
use tightfit_tests::tensors::floats;

const SIM: &[&str] = &["sim:1GiB"];
const CPU: &[&str] = &["cpu"];
const TWO_SIMS: &[&str] = &["sim:1GiB", "sim:1GiB"];
const DEVICES: [&[&str]; 3] = [SIM, CPU, TWO_SIMS];

/// Calls `check` with every model loaded onto every set of devices.
fn for_each_load(settings: &[(&str, &str)], check: impl Fn(&GoldenModel, &Model, &str)) {
    for name in MODELS {
        let golden = GoldenModel::unpack(name);
        for devices in DEVICES {
            let model = load_with_auto(&golden.path("bf16"), devices, settings);
            check(&golden, &model, &format!("{name} on {devices:?}"));
        }
    }
}

fn quantized_names(model: &Model) -> BTreeSet<String> {
    model
        .tensors()
        .filter(|tensor| matches!(tensor.format(), Format::Nf4 { .. }))
        .map(|tensor| tensor.name().to_owned())
        .collect()
}

#[test]
fn auto_quantizes_what_transformers_quantizes_and_every_expert() {
    for settings in [&[], DOUBLE_QUANT] {
        for_each_load(settings, |golden, model, context| {
            let expected = golden.quantized_weights();
            assert_eq!(quantized_names(model), expected, "{context}");
            assert_eq!(model.stats().quantized, expected.len() as u64, "{context}");
        });
    }
}

#[test]
fn experts_that_are_tensors_of_their_own_are_in_memory_what_stacks_are() {
    for name in ["mixtral", "qwen3_moe"] {
        let golden = GoldenModel::unpack(name);
        let stacked = TempDir::new().unwrap();
        golden.write_with_fused_experts(stacked.path());
        for devices in DEVICES {
            for settings in [&[][..], &[("experts", "stored")]] {
                let each = load_with_auto(&golden.path("bf16"), devices, settings);
                let whole = load_with_auto(stacked.path(), devices, settings);
                let mut slices: BTreeMap<String, Vec<(usize, String)>> = BTreeMap::new();
                for slice in golden.expert_slices() {
                    let of_stack = slices.entry(slice.fused).or_default();
                    of_stack.push((slice.start, slice.name));
                }
                assert!(!slices.is_empty());
                for (fused, mut members) in slices {
                    let context = format!("{fused} of {name} on {devices:?}, {settings:?}");
                    members.sort();
                    let members = members.iter().map(|(_, name)| tensor(&each, name));
                    let members: Vec<_> = members.collect();
                    let on_one = members
                        .iter()
                        .all(|member| member.device() == members[0].device());
                    let stack = Stacked::of(members.clone());
                    assert_eq!(stack.is_some(), on_one, "{context}");
                    let Some(stack) = stack else { continue };
                    let fused = tensor(&whole, &fused);
                    for part in fused.parts() {
                        let shared = stack.shared_part(part.kind).expect("it has it");
                        let expected = fused.part(part.kind);
                        assert!(shared.host() == expected, "{:?} of {context}", part.kind);
                    }
                    // In another order they are not one behind the other.
                    let turned = members.into_iter().rev().collect();
                    assert!(Stacked::of(turned).is_none(), "{context}");
                }
            }
        }
        // A mean each.
        let double = load_with_auto(&golden.path("bf16"), SIM, DOUBLE_QUANT);
        let slices = golden.expert_slices();
        let members = slices.iter().map(|slice| tensor(&double, &slice.name));
        assert!(Stacked::of(members.collect()).is_none());
    }
}

#[test]
fn products_with_every_4_bit_weight_are_those_of_its_numbers() {
    for settings in [&[], DOUBLE_QUANT] {
        for_each_load(settings, |golden, model, context| {
            let mut multiplied = BTreeSet::new();
            for tensor in model.tensors() {
                if tensor.quantization().is_some() {
                    assert_eq!(check_products(model, tensor), 1, "{context}");
                    multiplied.insert(tensor.name().to_owned());
                }
            }
            assert_eq!(multiplied, golden.quantized_weights(), "{context}");
        });
    }
    for name in MOE_MODELS {
        let stacked = TempDir::new().unwrap();
        GoldenModel::unpack(name).write_with_fused_experts(stacked.path());
        for settings in [&[], DOUBLE_QUANT] {
            let model = load_with_auto(stacked.path(), SIM, settings);
            let stacks = model
                .tensors()
                .filter(|tensor| tensor.quantization().is_some() && tensor.shape().len() == 3);
            let matrices: usize = stacks.map(|stack| check_products(&model, stack)).sum();
            assert!(matrices > 2, "{name}");
        }
    }
}

#[test]
fn two_accelerators_both_get_a_share() {
    for name in MODELS {
        let golden = GoldenModel::unpack(name);
        let model = load_with_auto(&golden.path("bf16"), TWO_SIMS, &[]);
        for (index, device) in model.plan().devices.iter().enumerate() {
            let held = model.tensors().filter(|tensor| tensor.device() == index);
            assert_eq!(held.count() as u64, device.tensors, "{name}");
            assert!(
                device.tensors > 0,
                "{name}: {} is empty",
                device.device.name
            );
        }
    }
}

#[test]
fn codes_and_scales_of_linear_layers_equal_those_of_bitsandbytes() {
    for_each_load(&[], |golden, model, context| {
        let expected = golden.tensors("nf4");
        for name in golden.linear_weights() {
            let loaded = tensor(model, &name);
            assert!(
                part(loaded, PartKind::Codes) == expected.data(&name),
                "codes of {name}, {context}"
            );
            assert!(
                part(loaded, PartKind::Absmax) == expected.data(&format!("{name}.absmax")),
                "scales of {name}, {context}"
            );
        }
    });
}

#[test]
fn what_is_not_quantized_keeps_every_byte() {
    for settings in [&[], DOUBLE_QUANT] {
        for_each_load(settings, |golden, model, context| {
            let quantized = golden.quantized_weights();
            let source = golden.tensors("bf16");
            assert_eq!(model.tensors().count(), source.0.len(), "{context}");
            for (name, expected) in source
                .0
                .iter()
                .filter(|(name, _)| !quantized.contains(*name))
            {
                let loaded = tensor(model, name);
                assert_eq!(loaded.format(), Format::Stored, "{name}, {context}");
                assert!(
                    part(loaded, PartKind::Data) == expected.data,
                    "{name}, {context}"
                );
            }
        });
    }
}

#[test]
fn codes_and_scales_of_experts_equal_their_slice_of_the_stack_of_bitsandbytes() {
    for name in MOE_MODELS {
        let golden = GoldenModel::unpack(name);
        let expected = golden.tensors("experts_nf4.safetensors");
        for devices in DEVICES {
            let model = load_with_auto(&golden.path("bf16"), devices, &[]);
            for slice in golden.expert_slices() {
                let loaded = tensor(&model, &slice.name);
                // Every expert starts at a block, so its codes and scales are those of the stack.
                let (codes, scales) = (slice.codes(), slice.scales());
                assert!(
                    part(loaded, PartKind::Codes) == &expected.data(&slice.fused)[codes],
                    "codes of {}, {name} on {devices:?}",
                    slice.name
                );
                let absmax = expected.data(&format!("{}.absmax", slice.fused));
                assert!(
                    floats(part(loaded, PartKind::Absmax)) == floats(absmax)[scales],
                    "scales of {}, {name} on {devices:?}",
                    slice.name
                );
            }
        }
    }
}

/// Checks the scales of a double-quantized tensor against double quantization worked out by hand
/// from the scales that bitsandbytes gives without it.
fn check_double_by_hand(loaded: Tensor<'_>, absmax: &[f32], map: &[f32], context: &str) {
    let expected = double_quantize(absmax, map);
    let name = loaded.name();
    assert_eq!(
        loaded.absmax_mean(),
        Some(expected.offset),
        "offset of {name}, {context}"
    );
    assert!(
        floats(part(loaded, PartKind::NestedAbsmax)) == expected.nested,
        "nested scales of {name}, {context}"
    );
    assert!(
        part(loaded, PartKind::Absmax) == expected.codes,
        "scales of {name}, {context}"
    );
}

#[test]
fn double_quantized_linear_layers_agree_with_bitsandbytes() {
    for_each_load(DOUBLE_QUANT, |golden, model, context| {
        let expected = golden.tensors("nf4_dq");
        let mut differences = Differences::new(&expected);
        for name in golden.linear_weights() {
            differences.add(tensor(model, &name).into(), expected.double(&name), context);
        }
        differences.check(context);
    });
}

#[test]
fn double_quantized_scales_of_linear_layers_are_the_nearest_there_are() {
    for_each_load(DOUBLE_QUANT, |golden, model, context| {
        let plain = golden.tensors("nf4");
        let double = golden.tensors("nf4_dq");
        for name in golden.linear_weights() {
            let absmax = floats(plain.data(&format!("{name}.absmax")));
            let map = floats(double.data(&format!("{name}.nested_quant_map")));
            check_double_by_hand(tensor(model, &name), &absmax, &map, context);
        }
    });
}

#[test]
fn double_quantized_experts_have_the_codes_of_bitsandbytes_and_scales_of_their_own() {
    for name in MOE_MODELS {
        let golden = GoldenModel::unpack(name);
        let plain = golden.tensors("experts_nf4.safetensors");
        let double = golden.tensors("experts_nf4_dq.safetensors");
        let model = load_with_auto(&golden.path("bf16"), SIM, DOUBLE_QUANT);
        for slice in golden.expert_slices() {
            let loaded = tensor(&model, &slice.name);
            assert!(
                part(loaded, PartKind::Codes) == &double.data(&slice.fused)[slice.codes()],
                "codes of {}, {name}",
                slice.name
            );
            // The 8-bit scales of the stack cannot be compared: double quantization works on a
            // tensor as it is on disk, here one expert, and the golden offset is the mean over
            // all of them.
            let absmax = floats(plain.data(&format!("{}.absmax", slice.fused)));
            let map = floats(double.data(&format!("{}.nested_quant_map", slice.fused)));
            check_double_by_hand(loaded, &absmax[slice.scales()], &map, name);
        }
    }
}

#[test]
fn experts_stored_as_stacks_equal_those_of_bitsandbytes() {
    for name in MOE_MODELS {
        let golden = GoldenModel::unpack(name);
        let expected = golden.tensors("experts_nf4.safetensors");
        let directory = TempDir::new().unwrap();
        golden.write_with_fused_experts(directory.path());
        for devices in DEVICES {
            let model = load_with_auto(directory.path(), devices, &[]);
            for (stack, shape) in &golden.expected.fused_expert_params {
                let loaded = tensor(&model, stack);
                let context = format!("{stack}, {name} on {devices:?}");
                let shape: Vec<u64> = shape.iter().map(|&length| length as u64).collect();
                assert_eq!(loaded.shape(), shape, "{context}");
                assert!(
                    part(loaded, PartKind::Codes) == expected.data(stack),
                    "codes of {context}"
                );
                assert!(
                    part(loaded, PartKind::Absmax) == expected.data(&format!("{stack}.absmax")),
                    "scales of {context}"
                );
            }
        }
    }
}

#[test]
fn double_quantized_stacks_of_experts_agree_with_bitsandbytes() {
    for name in MOE_MODELS {
        let golden = GoldenModel::unpack(name);
        let expected = golden.tensors("experts_nf4_dq.safetensors");
        let directory = TempDir::new().unwrap();
        golden.write_with_fused_experts(directory.path());
        let model = load_with_auto(directory.path(), SIM, DOUBLE_QUANT);
        let plain = golden.tensors("experts_nf4.safetensors");
        let mut differences = Differences::new(&expected);
        for stack in golden.expected.fused_expert_params.keys() {
            differences.add(tensor(&model, stack).into(), expected.double(stack), name);
            let absmax = floats(plain.data(&format!("{stack}.absmax")));
            let map = floats(expected.data(&format!("{stack}.nested_quant_map")));
            check_double_by_hand(tensor(&model, stack), &absmax, &map, name);
        }
        differences.check(name);
    }
}

#[test]
fn stacking_the_experts_changes_nothing_else() {
    for name in MOE_MODELS {
        let golden = GoldenModel::unpack(name);
        let directory = TempDir::new().unwrap();
        golden.write_with_fused_experts(directory.path());
        for settings in [&[], DOUBLE_QUANT] {
            let separate = contents(&load_with_auto(&golden.path("bf16"), SIM, settings));
            let stacked = contents(&load_with_auto(directory.path(), SIM, settings));
            let without_experts = |contents: Contents| -> Contents {
                let kept = contents.into_iter();
                kept.filter(|(name, _)| !name.contains(".experts."))
                    .collect()
            };
            assert!(
                without_experts(separate) == without_experts(stacked),
                "{name} with {settings:?}"
            );
        }
    }
}

/// Bytes of the parts of a tensor of `elements` elements of two bytes, worked out by hand.
fn parts_by_hand(elements: u64, quantized: bool, double: bool) -> Vec<u64> {
    let blocks = elements.div_ceil(64);
    match (quantized, double) {
        (false, _) => vec![2 * elements],
        (true, false) => vec![elements.div_ceil(2), 4 * blocks],
        (true, true) => vec![elements.div_ceil(2), blocks, 4 * blocks.div_ceil(256)],
    }
}

#[test]
fn the_plan_is_exact_and_loading_reserves_no_more() {
    for name in MODELS {
        let golden = GoldenModel::unpack(name);
        let quantized = golden.quantized_weights();
        let source = golden.tensors("bf16");
        for settings in [&[], DOUBLE_QUANT] {
            for devices in DEVICES {
                let context = format!("{name} on {devices:?} with {settings:?}");
                let planned = Planned::new(&golden.path("bf16"), devices, settings);
                let model = planned.load(&LoadOptions::default());
                let mut requested = vec![0; devices.len()];
                let mut padded = vec![0; devices.len()];
                for (name, tensor) in &source.0 {
                    assert_eq!(tensor.data.len(), 2 * tensor.elements(), "{name} is bf16");
                    let device = model.tensor(name).expect("it was loaded").device();
                    let parts = parts_by_hand(
                        tensor.elements() as u64,
                        quantized.contains(name),
                        !settings.is_empty(),
                    );
                    for bytes in parts {
                        requested[device] += bytes;
                        padded[device] += bytes.next_multiple_of(256);
                    }
                }
                for (index, device) in planned.devices.iter().enumerate() {
                    let size = planned.plan.devices[index].size;
                    assert_eq!(size.requested, requested[index], "{context}");
                    assert_eq!(size.padded, padded[index], "{context}");
                    let reserved = padded[index].next_multiple_of(4096);
                    assert_eq!(size.reserved, reserved, "{context}");

                    let usage = device.usage();
                    assert_eq!(usage.requested.now, size.requested, "{context}");
                    assert_eq!(usage.reserved.now, size.reserved, "{context}");
                    assert_eq!(usage.reserved.peak, size.reserved, "{context}");
                }
                let source_bytes = planned.checkpoint.source_bytes();
                assert_eq!(model.stats().bytes_read, source_bytes, "{context}");

                drop(model);
                for device in &planned.devices {
                    let usage = device.usage();
                    assert_eq!(usage.requested.now, 0, "{context}");
                    assert_eq!(usage.reserved.now, 0, "{context}");
                }
            }
        }
    }
}

#[test]
fn a_device_one_page_too_small_is_refused_and_one_that_just_fits_is_not() {
    for name in MODELS {
        let golden = GoldenModel::unpack(name);
        let reserved = Planned::new(&golden.path("bf16"), SIM, &[]).plan.devices[0]
            .size
            .reserved;
        let exact = format!("sim:{reserved}");
        let model = load_with_auto(&golden.path("bf16"), &[&exact], &[]);
        assert_eq!(model.plan().devices[0].size.reserved, reserved, "{name}");
        let small = format!("sim:{}", reserved - 4096);
        let refusal = Planned::try_new(&golden.path("bf16"), &[&small], &[]);
        assert!(
            matches!(
                refusal,
                Err(ProposeError::Policy(PolicyError::Refused { .. }))
            ),
            "{name}: {refusal:?}"
        );
    }
}

#[test]
fn the_bytes_are_the_same_for_every_instruction_set_thread_count_staging_and_device() {
    for name in ["llama", "qwen3_5_moe"] {
        let golden = GoldenModel::unpack(name);
        let path = golden.path("bf16");
        for settings in [&[], DOUBLE_QUANT] {
            let reference = contents(
                &Planned::new(&path, SIM, settings).load(
                    &LoadOptions::default()
                        .with_threads(1)
                        .with_kernels(Kernels::new(Isa::Portable).unwrap()),
                ),
            );
            for devices in DEVICES {
                let planned = Planned::new(&path, devices, settings);
                for isa in Isa::available() {
                    for threads in [1, 2, 5] {
                        for staging_bytes in [64 << 10, 1 << 20, 64 << 20] {
                            let model = planned.load(
                                &LoadOptions::default()
                                    .with_threads(threads)
                                    .with_staging_bytes(staging_bytes)
                                    .with_kernels(Kernels::new(isa).unwrap()),
                            );
                            assert!(
                                contents(&model) == reference,
                                "{name} on {devices:?} with {settings:?}: {isa}, {threads} \
                                 threads, {staging_bytes} bytes of staging"
                            );
                            assert!(model.stats().staging_bytes <= staging_bytes);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn the_output_head_of_a_tied_model_is_its_embedding() {
    let golden = GoldenModel::unpack("qwen2_tied");
    let source = golden.tensors("bf16");
    assert!(!source.0.contains_key("lm_head.weight"));
    for devices in DEVICES {
        let model = load_with_auto(&golden.path("bf16"), devices, &[]);
        let head = tensor(&model, "lm_head.weight");
        assert_eq!(head.name(), "model.embed_tokens.weight");
        assert_eq!(head.format(), Format::Stored);
        assert!(part(head, PartKind::Data) == source.data("model.embed_tokens.weight"));
    }
}

#[test]
fn the_output_head_of_an_untied_model_is_its_own() {
    for name in MODELS.into_iter().filter(|&name| name != "qwen2_tied") {
        let golden = GoldenModel::unpack(name);
        let source = golden.tensors("bf16");
        let model = load_with_auto(&golden.path("bf16"), SIM, &[]);
        let head = tensor(&model, "lm_head.weight");
        assert_eq!(head.name(), "lm_head.weight", "{name}");
        assert!(
            part(head, PartKind::Data) == source.data("lm_head.weight"),
            "{name}"
        );
    }
}
