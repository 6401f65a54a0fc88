//! What the command does on Windows as it does elsewhere, by other means.
#![cfg(windows)]

use std::fs;
use std::os::windows::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tightfit_tests::command::{Scratchpad, tightfit};
use tightfit_tests::guests::HOSTILE;
use windows_sys::Win32::System::Console::{
    AllocConsole, CTRL_BREAK_EVENT, GenerateConsoleCtrlEvent,
};
use windows_sys::Win32::System::Threading::CREATE_NEW_PROCESS_GROUP;

const INTERRUPTED: i32 = 130;

/// Whether there is a file of some length below the directory.
fn has_weights(directory: &Path) -> bool {
    let Ok(entries) = fs::read_dir(directory) else {
        return false;
    };
    entries.flatten().any(|entry| {
        let path = entry.path();
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() => has_weights(&path),
            Ok(metadata) => metadata.len() > 1 << 20,
            Err(_) => false,
        }
    })
}

/// Starts the command in a group of its own, so that it alone is interrupted.
fn start(scratchpad: &Scratchpad, arguments: &[&str]) -> Child {
    // SAFETY: there are no arguments. Where this process has a console already, it keeps that.
    unsafe { AllocConsole() };
    Command::new(tightfit())
        .args(arguments)
        .current_dir(scratchpad.path(""))
        .env("TMP", scratchpad.temporary())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .creation_flags(CREATE_NEW_PROCESS_GROUP)
        .spawn()
        .unwrap()
}

/// Interrupts it once something has been written.
#[track_caller]
fn is_interrupted(mut child: Child, written: &Path) {
    let started = Instant::now();
    while !has_weights(written) {
        assert!(child.try_wait().unwrap().is_none(), "it has ended before");
        assert!(started.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(1));
    }
    // SAFETY: there are no pointers.
    let sent = unsafe { GenerateConsoleCtrlEvent(CTRL_BREAK_EVENT, child.id()) };
    assert_ne!(sent, 0, "{}", std::io::Error::last_os_error());
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(INTERRUPTED), "{errors}");
    assert!(errors.contains("cancelled"), "{errors}");
}

#[test]
fn an_interrupt_ends_it_in_order() {
    let scratchpad = Scratchpad::new();
    let is_empty = |directory: &Path| assert_eq!(fs::read_dir(directory).unwrap().count(), 0);
    let synth = start(&scratchpad, &["synth", "qwen2.5-0.5b", "new/model"]);
    is_interrupted(synth, &scratchpad.path("new"));
    is_empty(&scratchpad.path(""));
    let demo = start(&scratchpad, &["demo", "--quiet"]);
    is_interrupted(demo, &scratchpad.temporary());
    is_empty(&scratchpad.temporary());
}

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
        assert!(has_driver || errors.contains("no NVIDIA driver"), "{errors}");
    }
}

#[test]
fn paths_may_be_long() {
    let scratchpad = Scratchpad::new();
    let long = vec!["d".repeat(90); 4].join("\\");
    let at = |name: &str| format!("{long}\\{name}");
    let (model, saved, picture) = (at("model"), at("saved"), at("plan.svg"));
    scratchpad.run(&["synth", "demo", &model]).succeeds();
    let load = ["load", &*model, "--device", "sim:1GiB", "--json"];
    let digest = scratchpad.run(&load).succeeds().json()["digest"].clone();
    assert!(digest.is_string(), "{digest}");
    for _ in 0..2 {
        let save = ["save", &*model, &*saved, "--force"];
        scratchpad.run(&save).succeeds();
        // Made, and replaced.
        let plan = ["plan", &*saved, "--device", "sim:1GiB", "--svg", &*picture];
        scratchpad.run(&plan).succeeds();
    }
    assert!(scratchpad.path(&picture).metadata().unwrap().len() > 100);
    assert!(scratchpad.path("").as_os_str().len() + long.len() > 300);
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
