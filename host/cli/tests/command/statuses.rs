//! What goes wrong, and with which exit status.

use std::fs;

use tightfit_tests::command::Scratchpad;
use tightfit_tests::models;

#[cfg(unix)]
const OUTPUT: i32 = 1;
const USAGE: i32 = 2;
const CHECKPOINT: i32 = 3;
const DOES_NOT_FIT: i32 = 4;
const DEVICE: i32 = 6;

fn scratchpad_with_model() -> Scratchpad {
    let scratchpad = Scratchpad::new();
    models::write_decoder(&scratchpad.path("m"), 1, 64);
    scratchpad
}

#[test]
fn what_cannot_be_understood_is_a_matter_of_usage() {
    let scratchpad = scratchpad_with_model();
    let twice = ["plan", "m", "--set", "batch=1", "--set", "batch=2"];
    for (arguments, words) in [
        (&["plan", "m", "--colour"][..], &["--colour"][..]),
        (&["plan"], &["<MODEL>"]),
        (&["unplan", "m"], &["unplan"]),
        (
            &["plan", "m", "--set", "speed=9"],
            &["auto", "speed", "block-size"],
        ),
        (&["plan", "m", "--set", "speed"], &["KEY=VALUE"]),
        (&twice, &["batch", "twice"]),
        (
            &["plan", "m", "--set", "block-size=48"],
            &["block-size", "48"],
        ),
        (
            &["plan", "m", "--device", "gpu:0"],
            &["gpu:0", "examples: cuda:0"],
        ),
        (&["plan", "m", "--device", "sim"], &["sim", "capacity"]),
        (&["plan", "m", "--device", "sim:9 parsecs"], &["9 parsecs"]),
        (
            &["plan", "m", "--device", "cpu", "--device", "cpu"],
            &["cpu", "twice"],
        ),
        (&["plan", "m", "--staging", "much"], &["much"]),
        (
            &["load", "m", "--staging", "1KiB"],
            &["1.000 KiB", "64.00 KiB"],
        ),
        (&["load", "m", "--threads", "0"], &["--threads"]),
        (&["load", "m", "--isa", "sse9"], &["portable"]),
        (&["plan", "m", "--policy", "clever"], &["clever", "auto"]),
        (&["plan", "m", "--policy", "clever.wasm"], &["clever.wasm"]),
        (&["policy", "show", "clever"], &["clever", "auto"]),
        (&["synth", "gpt-5", "d"], &["gpt-5", "qwen2.5-7b"]),
        (
            &["synth", "demo", "d", "--layers", "0"],
            &["demo", "0", "16"],
        ),
        (&["synth", "demo", "d", "--layers", "17"], &["17", "16"]),
        (&["synth", "demo", "m"], &["m", "not empty"]),
        (&["synth", "demo", "m/config.json"], &["not a directory"]),
    ] {
        scratchpad.run(arguments).fails(USAGE, words);
    }
    assert!(!scratchpad.path("d").exists());
}

#[test]
fn policies_that_are_no_files_are_not_read() {
    let scratchpad = scratchpad_with_model();
    // Windows has no such names for devices.
    let paths = ["m", "/dev/zero"].into_iter();
    for path in paths.filter(|path| !cfg!(windows) || *path == "m") {
        let arguments = ["plan", "m", "--policy", path];
        scratchpad
            .run(&arguments)
            .fails(USAGE, &[path, "not a regular file"]);
    }
}

#[test]
fn a_checkpoint_that_cannot_be_read_is_named() {
    let scratchpad = scratchpad_with_model();
    fs::create_dir(scratchpad.path("empty")).unwrap();
    fs::write(scratchpad.path("short.safetensors"), "1234567").unwrap();
    fs::write(scratchpad.path("text.safetensors"), "once upon a time").unwrap();
    models::write_decoder(&scratchpad.path("configured"), 1, 64);
    fs::write(
        scratchpad.path("configured/config.json"),
        "{ \"architectures\": ",
    )
    .unwrap();
    models::write_decoder(&scratchpad.path("cut"), 1, 64);
    let weights = scratchpad.path("cut/model.safetensors");
    let length = fs::metadata(&weights).unwrap().len();
    fs::File::options()
        .write(true)
        .open(&weights)
        .unwrap()
        .set_len(length - 1)
        .unwrap();
    for command in ["inspect", "plan", "load"] {
        for (model, words) in [
            ("nowhere", &["nowhere"][..]),
            ("./nowhere", &["nowhere", "does not exist"]),
            ("org/nowhere", &["org/nowhere", "cache"]),
            ("empty", &["empty"]),
            ("short.safetensors", &["short.safetensors", "7 bytes"]),
            ("text.safetensors", &["text.safetensors"]),
            ("configured", &["config.json", "line 1"]),
            ("cut", &["model.safetensors", "cut short", "lm_head.weight"]),
        ] {
            scratchpad.run(&[command, model]).fails(CHECKPOINT, words);
        }
    }
}

#[test]
fn weights_that_are_no_numbers_are_counted_or_with_strict_refused() {
    let scratchpad = Scratchpad::new();
    fs::create_dir(scratchpad.path("m")).unwrap();
    // bf16: of 64 x 64 zeros one NaN and, in another block, one infinity.
    let mut data = vec![0; 2 * 64 * 64];
    data[2..4].copy_from_slice(&0x7fc0u16.to_le_bytes());
    data[1000..1002].copy_from_slice(&0x7f80u16.to_le_bytes());
    let name = "model.layers.0.mlp.up_proj.weight";
    let tensors = [(name, "BF16", &[64, 64][..], &data[..])];
    models::write_safetensors(&scratchpad.path("m/model.safetensors"), &tensors);
    let device = ["--device", "sim:1MiB"];
    let load = |more: &[&str]| scratchpad.run(&[&["load", "m"], &device[..], more].concat());
    load(&["--strict"]).fails(CHECKPOINT, &[name, "infinities or NaN"]);
    let text = load(&[]).succeeds().stdout;
    assert!(text.contains("2 blocks with infinities or NaN"), "{text}");
    let report = load(&["--json"]).succeeds().json();
    assert_eq!(report["load"]["nonfinite_blocks"], 2);
    assert_eq!(report["load"]["nonfinite"][name], 2);
}

#[test]
fn what_does_not_fit_says_what_is_missing() {
    let scratchpad = scratchpad_with_model();
    for command in ["plan", "load"] {
        scratchpad
            .run(&[command, "m", "--device", "sim:64KiB"])
            .fails(
                DOES_NOT_FIT,
                &["policy 'auto' refuses", "needs", "can take"],
            );
    }
    scratchpad
        .run(&["plan", "m", "--device", "sim:0"])
        .fails(DOES_NOT_FIT, &["policy 'auto' refuses"]);
    scratchpad
        .run(&["demo", "--device", "sim:1MiB"])
        .fails_midway(DOES_NOT_FIT, &["policy 'auto' refuses"]);
    assert_eq!(fs::read_dir(scratchpad.temporary()).unwrap().count(), 0);
}

#[test]
fn a_device_that_is_not_there_is_a_failure_of_the_device() {
    let scratchpad = scratchpad_with_model();
    for command in ["plan", "load"] {
        scratchpad
            .run(&[command, "m", "--device", "cuda:7"])
            .fails(DEVICE, &["cuda:7"]);
    }
    scratchpad
        .run(&["devices", "--device", "cuda:7"])
        .fails(DEVICE, &["cuda:7"]);
}

#[cfg(unix)]
#[test]
fn a_synthetic_model_on_a_full_disk_is_an_output_that_cannot_be_written() {
    let scratchpad = Scratchpad::new();
    scratchpad
        .run_limited(20 << 10, true, &["synth", "demo", "new/d"])
        .fails(OUTPUT, &["cannot write", "model.safetensors"]);
    assert!(!scratchpad.path("new").exists());
    fs::write(scratchpad.path("file"), "").unwrap();
    scratchpad
        .run(&["synth", "demo", "file/d/e"])
        .fails(USAGE, &["not a directory"]);
}

#[test]
fn a_plan_is_for_devices_that_need_not_be_there() {
    let scratchpad = scratchpad_with_model();
    for (device, kind) in [("cpu:4096GiB", "cpu"), ("cuda:3:4096GiB", "cuda:3")] {
        let report = scratchpad
            .run(&["plan", "m", "--json", "--device", device])
            .succeeds()
            .json();
        assert_eq!(report["devices"][0]["name"], kind);
        assert_eq!(report["devices"][0]["capacity"], 4096u64 << 30);
        // A reserve that no machine that runs tests has.
        let reserve = ["plan", "m", "--device", device, "--set", "reserve=4000GiB"];
        scratchpad.run(&reserve).succeeds();
    }
    // Where it is loaded, it has to be there.
    scratchpad
        .run(&["load", "m", "--device", "cuda:3:4096GiB"])
        .fails(DEVICE, &["cuda:3"]);
    let reserve = "--set=reserve=4000GiB";
    scratchpad
        .run(&["load", "m", "--device", "cpu:4096GiB", reserve])
        .fails(DOES_NOT_FIT, &["missing"]);
}
