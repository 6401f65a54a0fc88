//! `tightfit run`.

use std::fs;
#[cfg(unix)]
use std::time::Duration;

use tightfit_tests::command::Scratchpad;
use tightfit_tests::models;
use tightfit_tests::programs::{HOSTILE, LOAD_AND_CHECK};

const USAGE: i32 = 2;
const CHECKPOINT: i32 = 3;
const PROGRAM: i32 = 5;

/// With a model `m`, the example program and the hostile one.
fn scratchpad() -> Scratchpad {
    let scratchpad = Scratchpad::new();
    models::write_decoder(&scratchpad.path("m"), 1, 64);
    fs::write(scratchpad.path("check.wasm"), LOAD_AND_CHECK).unwrap();
    fs::write(scratchpad.path("hostile.wasm"), HOSTILE).unwrap();
    scratchpad
}

#[test]
fn a_program_loads_what_it_was_granted() {
    let scratchpad = scratchpad();
    let arguments = [
        "run",
        "check.wasm",
        "qwen",
        "--grant",
        "qwen=m",
        "--device",
        "sim:64MiB",
    ];
    let text = scratchpad.run(&arguments).succeeds().stdout;
    // Seven matrices of the layer, embeddings and head.
    assert!(text.starts_with("9 of 10 tensors quantized, "), "{text}");
    assert_eq!(text.lines().count(), 4);

    let outcome = scratchpad.run(&[&arguments[..], &["--json", "--quota", "8MiB"]].concat());
    let ran = outcome.succeeds().json();
    assert_eq!(ran["schema"], 1);
    assert_eq!(ran["answer"], text);
    assert!(ran["fuel"].as_u64().is_some_and(|fuel| fuel > 0));
    let peak = ran["peak_reserved"].as_u64().unwrap();
    assert!(peak > 0 && peak <= 8 << 20);
    assert_eq!(ran["devices"][0]["name"], "sim:0");
    assert_eq!(ran["devices"][0]["peak_reserved"], peak);
}

#[test]
fn what_goes_wrong_has_a_sentence_and_a_status() {
    let scratchpad = scratchpad();
    let device = ["--device", "sim:64MiB", "--device", "sim:64MiB"];
    for (arguments, status, words) in [
        (
            &["check.wasm", "qwen"][..],
            PROGRAM,
            &["check.wasm", "gave up", "'qwen'"][..],
        ),
        (&["check.wasm"], PROGRAM, &["gave up", "give the name"]),
        (
            &["check.wasm", "qwen", "--grant", "qwen=m", "--quota", "4KiB"],
            PROGRAM,
            &["gave up", "quota", "4.000 KiB"],
        ),
        (
            &["check.wasm", "--grant", "qwen=nowhere"],
            CHECKPOINT,
            &["nowhere"],
        ),
        (&["check.wasm", "--grant", "qwen"], USAGE, &["NAME=PATH"]),
        (
            &["nowhere.wasm"],
            USAGE,
            &["cannot read program nowhere.wasm"],
        ),
        (&["m/config.json"], PROGRAM, &["not a WebAssembly binary"]),
        (
            &["hostile.wasm", "panic"],
            PROGRAM,
            &["failed", "lost its head"],
        ),
        (
            &["hostile.wasm", "loop", "--limit", "fuel=1000000"],
            PROGRAM,
            &["ran out of fuel", "--limit fuel=VALUE"],
        ),
        (
            &["hostile.wasm", "give-up-with-escapes"],
            PROGRAM,
            &["evil\\u{1b}[2J"],
        ),
        (&["hostile.wasm", "--limit", "speed=9"], USAGE, &["speed"]),
    ] {
        let arguments = [&["run"], arguments, &device].concat();
        scratchpad.run(&arguments).fails(status, words);
    }
}

#[test]
fn an_answer_cannot_control_the_terminal() {
    let outcome = scratchpad().run(&["run", "hostile.wasm", "escape", "--device", "sim:1MiB"]);
    let text = outcome.succeeds().stdout;
    assert_eq!(
        text,
        "evil\\u{1b}[2J\\u{1b}]0;owned\\u{7}\\r\\u{9b}31m\\u{202e}txt\\u{200b}\\u{2028}\\u{ad}\\u{61c}\\u{feff}\\u{e0041}\n"
    );
}

// Elsewhere nobody asks whether somebody reads.
#[cfg(unix)]
#[test]
fn what_a_program_logs_is_heard_while_it_runs_and_does_not_hold_it() {
    let scratchpad = scratchpad();
    let run = [
        "run",
        "hostile.wasm",
        "log-and-loop",
        "--device",
        "sim:64MiB",
    ];
    // For ever, if nobody stopped it.
    let limits = [
        "--limit",
        "fuel=18446744073709551615",
        "--limit",
        "deadline=80000",
    ];
    let mut running = scratchpad.start(&[&run[..], &limits].concat());
    assert_eq!(running.next_message(), "policy: warn: it begins\n");
    assert!(running.kill_when(|_| true));
    running.finish();
    // With nobody to hear it.
    let run = [
        "run",
        "hostile.wasm",
        "flood-the-log",
        "--device",
        "sim:64MiB",
    ];
    let limits = ["--limit", "log-bytes=1MiB"];
    let mut running = scratchpad.start(&[&run[..], &limits].concat());
    assert!(running.ends_unread(Duration::from_secs(120)));
    let outcome = running.finish();
    assert_eq!(outcome.stdout, "flooded\n");
    assert!(outcome.stderr.contains("policy: warn: flood"));
}
