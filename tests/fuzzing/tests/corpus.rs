//! Every fuzz target over what is committed in `fuzz/`: `seeds`, to start a fuzzer from, and
//! `regressions`, inputs that once broke something.

use std::path::{Path, PathBuf};

use tightfit_fuzzing::{TARGETS, Target, program_seeds};
use tightfit_tests::guests::Handwritten;
use tightfit_wasm::policy::precheck_component;
use tightfit_wasm::sandbox::Limits;

/// Set to write the seeds before they are run.
const WRITE: &str = "TIGHTFIT_WRITE_SEEDS";

fn directory(kind: &str, target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz")
        .join(kind)
        .join(target)
}

/// Runs the inputs of one kind and gives how many were accepted.
fn run(kind: &str, name: &str, target: Target) -> (usize, usize) {
    let directory = directory(kind, name);
    let mut paths: Vec<PathBuf> = match std::fs::read_dir(&directory) {
        Ok(entries) => entries.map(|entry| entry.unwrap().path()).collect(),
        Err(_) => return (0, 0),
    };
    paths.sort();
    let accept = |path: &&PathBuf| {
        // Shown where the target panics.
        println!("{}", path.display());
        target(&std::fs::read(path).unwrap())
    };
    (paths.len(), paths.iter().filter(accept).count())
}

#[test]
fn every_target_bears_its_seeds_and_what_once_broke_it() {
    if std::env::var_os(WRITE).is_some() {
        write_seeds();
    }
    for &(name, target) in TARGETS {
        let (seeds, accepted) = run("seeds", name, target);
        // Some are well-formed, so that a fuzzer gets past the first check, and some are not.
        assert!(
            accepted > 0 && accepted < seeds,
            "{name}: {accepted} of {seeds}"
        );
        run("regressions", name, target);
    }
}

fn write_seeds() {
    for (target, name, bytes) in seeds() {
        let directory = directory("seeds", target);
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join(name), bytes).unwrap();
    }
}

fn seeds() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let mut seeds = Vec::new();
    for (name, header, data) in [
        (
            "plain",
            r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[3,1],"data_offsets":[0,6]},"b":{"dtype":"F32","shape":[],"data_offsets":[6,10]},"e":{"dtype":"U8","shape":[0,9],"data_offsets":[10,10]}}"#,
            10,
        ),
        (
            "overlapping",
            r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#,
            6,
        ),
        (
            "incomplete-set",
            r#"{"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"w.absmax":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}"#,
            6,
        ),
        (
            "fp8",
            r#"{"w":{"dtype":"F8_E4M3","shape":[3,6],"data_offsets":[0,18]},"w_scale_inv":{"dtype":"F32","shape":[3,2],"data_offsets":[18,42]}}"#,
            42,
        ),
        (
            "mxfp4",
            r#"{"e_blocks":{"dtype":"U8","shape":[1,2,1,16],"data_offsets":[0,32]},"e_scales":{"dtype":"U8","shape":[1,2,1],"data_offsets":[32,34]}}"#,
            34,
        ),
        (
            "int4",
            r#"{"w.weight_packed":{"dtype":"I32","shape":[2,2],"data_offsets":[0,16]},"w.weight_scale":{"dtype":"F16","shape":[2,2],"data_offsets":[16,24]},"w.weight_zero_point":{"dtype":"I32","shape":[1,2],"data_offsets":[24,32]}}"#,
            32,
        ),
        (
            "nvfp4",
            r#"{"w.weight":{"dtype":"U8","shape":[2,8],"data_offsets":[0,16]},"w.weight_scale":{"dtype":"F8_E4M3","shape":[2,1],"data_offsets":[16,18]},"w.weight_scale_2":{"dtype":"F32","shape":[],"data_offsets":[18,22]}}"#,
            22,
        ),
    ] {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend(0..data);
        seeds.push(("checkpoint", name, bytes));
    }
    for (name, index) in [
        (
            "index",
            r#"{"metadata":{"total_size":4},"weight_map":{"a":"a.safetensors","b":"b.safetensors"}}"#,
        ),
        (
            "index-outside",
            r#"{"weight_map":{"a":"../../a.safetensors"}}"#,
        ),
    ] {
        seeds.push(("checkpoint", name, index.as_bytes().to_vec()));
    }

    let state = |kind: &str, nested: &str| {
        format!(
            r#"{{"quant_type":"{kind}","blocksize":64,"dtype":"bfloat16","shape":[8,16]{nested}}}"#
        )
    };
    let nested =
        r#","nested_blocksize":256,"nested_dtype":"float32","nested_offset":0.04313725605607033"#;
    for (name, layout, text) in [
        ("nf4", [0, 64, 2], state("nf4", "")),
        ("nf4-nested", [1, 64, 2], state("nf4", nested)),
        ("fp4", [2, 64, 2], state("fp4", "")),
        ("other-table", [2, 64, 2], state("nf4", "")),
        ("too-few-scales", [0, 64, 1], state("nf4", "")),
    ] {
        let mut bytes = layout.to_vec();
        bytes.extend_from_slice(text.as_bytes());
        seeds.push(("quant_state", name, bytes));
    }

    // A layout and the shape of a stack; kind, name, place and what belongs to the kind.
    for (name, bytes) in [
        (
            "files",
            &[0, 1, 2, 3, 7, 3, 2, 40, 255, 7, 4, 2, 3, 40, 7, 9, 2, 9, 0][..],
        ),
        ("experts-of-no-rows", &[0, 5, 0, 3]),
        (
            "snapshot",
            &[
                1, 1, 2, 3, 7, 3, 0, 5, 6, 3, 3, 2, 1, 4, 1, 0, 1, 0, 1, 4, 0, 3,
            ],
        ),
        ("links-out", &[0, 1, 2, 3, 3, 4, 2, 1, 3, 1, 0, 1, 3, 0, 4]),
        ("config-out", &[0, 1, 2, 3, 3, 0, 2, 0, 2, 1, 3, 0, 0]),
        (
            "odd-kinds",
            &[
                0, 1, 2, 3, 0, 3, 2, 1, 4, 2, 2, 5, 2, 9, 7, 10, 2, 9, 9, 7, 252, 2, 255, 8, 2, 9,
                9,
            ],
        ),
        ("pipe-for-weights", &[0, 1, 2, 3, 1, 1, 2]),
    ] {
        seeds.push(("save", name, bytes.to_vec()));
    }

    let module = Handwritten::default().module();
    let component = precheck_component(&module, &Limits::default()).unwrap();
    let long = Handwritten {
        extra: format!("(func {})", "nop ".repeat(2000)),
        ..Handwritten::default()
    };
    seeds.push(("component", "module", module));
    seeds.push(("component", "component", component));
    seeds.push(("component", "long-function", long.module()));

    let sequences = program_seeds().into_iter();
    seeds.extend(sequences.map(|(name, bytes, _)| ("program", name, bytes)));

    // Sources of choices: their bytes mean nothing by themselves.
    let mut state = 1u64;
    for (name, length) in [
        ("short", 48),
        ("medium", 256),
        ("long", 1024),
        ("other", 1024),
    ] {
        let bytes = (0..length).map(|_| {
            // Marsaglia's xorshift.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[4]
        });
        let bytes: Vec<u8> = bytes.collect();
        seeds.push(("program", name, bytes.clone()));
        seeds.push(("plan", name, bytes));
    }
    seeds
}
