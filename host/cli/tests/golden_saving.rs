//! Checkpoints that are written: what transformers and bitsandbytes write of the same models.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use safetensors::Dtype;
use tempfile::TempDir;
use tightfit_tests::command::Scratchpad;
use tightfit_tests::double_quant::Differences;
use tightfit_tests::golden::{GoldenModel, MODELS, MOE_MODELS};
use tightfit_tests::loading::{Contents, DOUBLE_QUANT, contents, load_with_auto};
use tightfit_tests::saving::{
    assert_same_tensors, files, index, names, save_with, save_with_auto, small_shards, written,
};
use tightfit_tests::tensors::FileTensors;

const SIM: &[&str] = &["sim:1GiB"];

/// What transformers does: it leaves experts alone.
const LIKE_TRANSFORMERS: &[(&str, &str)] = &[("experts", "stored")];
const LIKE_TRANSFORMERS_DOUBLE: &[(&str, &str)] =
    &[("experts", "stored"), ("double-quant", "true")];

/// Everything but weights is the same file; the index, which says where they are, has the same
/// totals.
fn assert_same_companions(found: &Path, golden: &Path, totals: &[&str], context: &str) {
    let others = |directory: &Path| -> BTreeMap<String, Vec<u8>> {
        let files = files(directory).into_iter();
        files
            .filter(|(name, _)| !name.contains("safetensors"))
            .collect()
    };
    let (ours, theirs) = (others(found), others(golden));
    for (name, text) in &theirs {
        assert_eq!(
            ours.get(name).map(|text| String::from_utf8_lossy(text)),
            Some(String::from_utf8_lossy(text)),
            "{name}, {context}"
        );
    }
    assert_eq!(ours.len(), theirs.len(), "{context}");
    let (ours, theirs) = (index(found).expect("it is small"), index(golden));
    // A golden model in one file has none.
    if let Some(theirs) = theirs {
        for total in totals {
            assert_eq!(
                ours["metadata"][total], theirs["metadata"][total],
                "{context}"
            );
        }
    }
}

#[test]
fn a_saved_model_is_the_one_that_transformers_saves() {
    for name in MODELS {
        let golden = GoldenModel::unpack(name);
        let expected = golden.tensors("nf4");
        // Quantized here, and quantized before.
        for source in ["bf16", "nf4"] {
            let context = format!("{name}/{source}");
            let target = golden.path("saved").join(source);
            let source = golden.path(source);
            save_with(&source, &target, LIKE_TRANSFORMERS, &small_shards()).unwrap();
            assert_same_tensors(&written(&target), &expected, &context);
            let totals = ["total_size", "total_parameters"];
            assert_same_companions(&target, &golden.path("nf4"), &totals, &context);
        }
    }
}

#[test]
fn a_saved_model_with_double_quantization_agrees_with_that_of_transformers() {
    for name in MODELS {
        let golden = GoldenModel::unpack(name);
        let expected = golden.tensors("nf4_dq");
        let target = golden.path("saved");
        let source = golden.path("bf16");
        save_with(&source, &target, LIKE_TRANSFORMERS_DOUBLE, &small_shards()).unwrap();
        let found = written(&target);
        // An offset that differs in its last bit may have more digits or fewer.
        let totals = ["total_parameters"];
        assert_same_companions(&target, &golden.path("nf4_dq"), &totals, name);

        let keys = |tensors: &FileTensors| tensors.0.keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&found), keys(&expected), "{name}");
        let linear: BTreeSet<String> = golden.linear_weights().collect();
        let mut differences = Differences::new(&expected);
        for weight in &linear {
            differences.add(found.double(weight), expected.double(weight), name);
            let mut states = [found.quant_state(weight), expected.quant_state(weight)];
            for state in &mut states {
                state["nested_offset"].take();
            }
            assert_eq!(states[0], states[1], "{weight}, {name}");
        }
        differences.check(name);
        let may_differ = [
            ".absmax",
            ".nested_absmax",
            ".quant_state.bitsandbytes__nf4",
        ];
        for (key, tensor) in &found.0 {
            let theirs = expected.get(key);
            assert_eq!(tensor.dtype, theirs.dtype, "{key}, {name}");
            if !may_differ.iter().any(|suffix| key.ends_with(suffix)) {
                assert!(tensor == theirs, "{key}, {name}");
            }
        }
    }
}

#[test]
fn a_double_quantized_model_is_saved_as_it_is() {
    for name in MODELS {
        let golden = GoldenModel::unpack(name);
        let (source, target) = (golden.path("nf4_dq"), golden.path("saved"));
        // That weights are to be double-quantized does not concern those that are quantized.
        for settings in [LIKE_TRANSFORMERS, LIKE_TRANSFORMERS_DOUBLE] {
            let options = small_shards().with_force(true);
            save_with(&source, &target, settings, &options).unwrap();
            assert_same_tensors(&written(&target), &golden.tensors("nf4_dq"), name);
            assert_same_companions(&target, &source, &["total_size", "total_parameters"], name);
        }
    }
}

#[test]
fn what_was_saved_is_loaded_as_it_would_have_been_without_and_saved_again_to_the_byte() {
    for name in MODELS {
        let golden = GoldenModel::unpack(name);
        for settings in [&[], DOUBLE_QUANT] {
            let context = format!("{name} with {settings:?}");
            let directory = TempDir::new().unwrap();
            let first = directory.path().join("first");
            let saved = save_with_auto(&golden.path("bf16"), &first, settings);
            assert_eq!(saved.quantized, golden.quantized_weights().len() as u64);
            written(&first);

            // Formats differ: these are stored as they are.
            let values = |contents: Contents| -> Vec<_> {
                let contents = contents.into_iter();
                contents
                    .map(|(name, stored)| (name, stored.parts, stored.absmax_mean))
                    .collect()
            };
            let loaded = values(contents(&load_with_auto(&first, SIM, settings)));
            let direct = load_with_auto(&golden.path("bf16"), SIM, settings);
            assert!(loaded == values(contents(&direct)), "{context}");

            let second = directory.path().join("second");
            let again = save_with_auto(&first, &second, settings);
            assert_eq!(again, saved, "{context}");
            let (first, second) = (files(&first), files(&second));
            assert!(first == second, "{context}");
        }
    }
}

#[test]
fn stacks_of_experts_are_written_expert_by_expert() {
    for name in MOE_MODELS {
        let golden = GoldenModel::unpack(name);
        let stacked = TempDir::new().unwrap();
        golden.write_with_fused_experts(stacked.path());
        for settings in [&[], DOUBLE_QUANT] {
            let target = golden.path("from-stacks");
            save_with(stacked.path(), &target, settings, &small_shards()).unwrap();
            let found = written(&target);
            let separate = golden.path("from-experts");
            save_with(&golden.path("bf16"), &separate, settings, &small_shards()).unwrap();
            let mut expected = FileTensors::default();
            for (key, tensor) in written(&separate).0 {
                expected.0.insert(in_words_of_transformers(&key), tensor);
            }
            let square = |shape: &Vec<usize>| shape[1] == shape[2];
            let stacks = &golden.expected.fused_expert_params;
            // Which way round a square one lies cannot be told: it stays a stack.
            for (stack, shape) in stacks.iter().filter(|(_, shape)| square(shape)) {
                assert_eq!(found.get(stack).dtype, Dtype::U8, "{stack}, {name}");
                assert_eq!(
                    found.quant_state(stack)["shape"],
                    serde_json::json!(shape),
                    "{stack}, {name}"
                );
            }
            let is_split = |key: &String| {
                !stacks
                    .iter()
                    .any(|(stack, shape)| square(shape) && belongs_to(key, stack))
            };
            let split = |tensors: &FileTensors| {
                let mut split = tensors.clone();
                split.0.retain(|key, _| is_split(key));
                split
            };
            assert_same_tensors(&split(&found), &split(&expected), name);
            for directory in [target, separate] {
                fs::remove_dir_all(directory).unwrap();
            }
        }
    }
}

/// The key of a tensor of an expert, as transformers 5 would spell it: Mixtral has its own words.
fn in_words_of_transformers(key: &str) -> String {
    key.replace(".block_sparse_moe.experts.", ".mlp.experts.")
        .replace(".w1.", ".gate_proj.")
        .replace(".w2.", ".down_proj.")
        .replace(".w3.", ".up_proj.")
}

/// Whether a key is that of a stack or of one expert of it, or of a part of these.
fn belongs_to(key: &str, stack: &str) -> bool {
    let (experts, projection) = stack.rsplit_once('.').expect("experts and a projection");
    let Some(rest) = key.strip_prefix(experts) else {
        return false;
    };
    let words: &[&str] = match projection {
        "gate_up_proj" => &["gate_up_proj", "gate_proj", "up_proj"],
        _ => &["down_proj"],
    };
    rest.split('.').any(|word| words.contains(&word))
}

#[test]
fn the_command_writes_the_same_files_as_the_library() {
    let golden = GoldenModel::unpack("qwen3_moe");
    let scratchpad = Scratchpad::new();
    let model = golden.path("bf16");
    let model = model.to_str().expect("its name is text");
    for (name, settings) in [
        ("plain", LIKE_TRANSFORMERS),
        ("double", LIKE_TRANSFORMERS_DOUBLE),
        ("experts", DOUBLE_QUANT),
    ] {
        let sets: Vec<String> = settings
            .iter()
            .map(|(key, value)| format!("--set={key}={value}"))
            .collect();
        let loaded = format!("{name}-loaded");
        let shards = "--max-shard-size=100000B";
        let mut save = vec!["save", model, name, shards, "--quiet"];
        let mut load = vec!["load", model, "--save", &loaded, shards, "--quiet"];
        load.extend(["--device", "sim:1GiB"]);
        for arguments in [&mut save, &mut load] {
            arguments.extend(sets.iter().map(String::as_str));
            scratchpad.run(arguments).succeeds();
        }
        let by_library = golden.path(name);
        save_with(&golden.path("bf16"), &by_library, settings, &small_shards()).unwrap();
        let expected = files(&by_library);
        assert!(files(&scratchpad.path(name)) == expected, "{name}");
        assert!(files(&scratchpad.path(&loaded)) == expected, "{loaded}");
    }
    let all = [
        "double",
        "double-loaded",
        "experts",
        "experts-loaded",
        "plain",
        "plain-loaded",
    ];
    assert_eq!(names(&scratchpad.path("")), all.map(str::to_owned).into());
}
