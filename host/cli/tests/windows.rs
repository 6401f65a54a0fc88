//! What the command does on Windows as it does elsewhere, by other means. Ctrl-C is tried where there is a
//! terminal: in `.ci/run windows`.
#![cfg(windows)]

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use tightfit_tests::command::{Scratchpad, tightfit};
use tightfit_tests::guests::HOSTILE;

#[test]
fn no_driver_is_taken_from_where_anybody_may_have_put_it() {
    let scratchpad = Scratchpad::new();
    // A library that is none of a driver: if it is opened, functions are missing in it.
    let system = PathBuf::from(std::env::var_os("SystemRoot").unwrap());
    let library = system.join("system32").join("version.dll");
    let program = scratchpad.path("tightfit.exe");
    fs::copy(tightfit(), &program).unwrap();
    for name in ["nvcuda.dll", "cuda.dll", "cuda64.dll"] {
        fs::copy(&library, scratchpad.path(name)).unwrap();
    }
    for program in [tightfit(), program] {
        let mut command = Command::new(program);
        let devices = ["devices", "--device", "cuda:0"];
        let output = command.args(devices).current_dir(scratchpad.path(""));
        let output = output.output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!errors.contains("it lacks"), "{errors}");
        // On a machine with a driver that one is asked.
        let has_driver = system.join("system32").join("nvcuda.dll").exists();
        assert!(
            has_driver || errors.contains("no NVIDIA driver"),
            "{errors}"
        );
    }
}

#[test]
fn paths_may_be_long() {
    let scratchpad = Scratchpad::new();
    let long = vec!["d".repeat(90); 4].join("\\");
    let at = |name: &str| format!("{long}\\{name}");
    let (model, saved, picture) = (at("model"), at("saved"), at("plan.svg"));
    assert!(scratchpad.path(&model).as_os_str().len() > 300);
    scratchpad.run(&["synth", "demo", &model]).succeeds();
    scratchpad.run(&["synth", "demo", "m"]).succeeds();
    // Made, and replaced.
    for _ in 0..2 {
        let plan = ["plan", "m", "--device", "sim:1GiB", "--svg", &*picture];
        scratchpad.run(&plan).succeeds();
        assert!(scratchpad.path(&picture).metadata().unwrap().len() > 100);
    }
    if fs::canonicalize(scratchpad.path(&model)).is_err() {
        eprintln!("not run: wine 8 tells of no path that is longer than 260 characters");
        return;
    }
    let digest = |model: &str| {
        let load = ["load", model, "--device", "sim:1GiB", "--json"];
        scratchpad.run(&load).succeeds().json()["digest"].clone()
    };
    assert_eq!(digest(&model), digest("m"));
    for _ in 0..2 {
        let save = ["save", &*model, &*saved, "--force"];
        scratchpad.run(&save).succeeds();
    }
}

#[test]
fn compiled_guests_are_kept_in_the_profile_of_their_user() {
    let scratchpad = Scratchpad::new();
    let compiled = scratchpad.path("..\\home\\AppData\\Local\\tightfit\\compiled");
    fs::write(scratchpad.path("hostile.wasm"), HOSTILE).unwrap();
    let entries = || fs::read_dir(&compiled).unwrap().count();
    for (policy, count) in [("hostile.wasm", 2), ("hostile.wasm", 2), ("auto", 3)] {
        scratchpad.run(&["policy", "show", policy]).succeeds();
        // With the key.
        assert_eq!(entries(), count, "{policy}");
    }
    // What somebody has changed is compiled anew.
    for entry in fs::read_dir(&compiled).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        if bytes.len() > 100 {
            bytes[100] ^= 1;
            fs::write(&path, bytes).unwrap();
        }
    }
    let outcome = scratchpad.run(&["policy", "show", "hostile.wasm"]);
    assert_eq!(outcome.status, Some(0), "{outcome:?}");
    assert!(outcome.stderr.contains("damaged"), "{outcome:?}");
}

#[test]
fn names_of_devices_and_streams_are_no_files_of_a_checkpoint() {
    let scratchpad = Scratchpad::new();
    for name in [
        "nul",
        "CON.safetensors",
        "model.safetensors.",
        "model.safetensors::$DATA",
        "..\\\\other.safetensors",
        "C:other.safetensors",
    ] {
        let directory = scratchpad.path("m");
        fs::create_dir_all(&directory).unwrap();
        fs::write(
            directory.join("model.safetensors.index.json"),
            format!(r#"{{"weight_map":{{"a":"{name}"}}}}"#),
        )
        .unwrap();
        scratchpad
            .run(&["inspect", "m"])
            .fails(3, &["beside the index"]);
    }
}
