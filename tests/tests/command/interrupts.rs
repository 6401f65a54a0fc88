//! Ctrl-C: status 130, and nothing left behind.

use std::fs;
use std::path::Path;

use tightfit_tests::command::Place;

const INTERRUPTED: i32 = 130;

/// Bytes that a process has read from files so far.
fn bytes_read(process: u32) -> u64 {
    let Ok(text) = fs::read_to_string(format!("/proc/{process}/io")) else {
        return 0;
    };
    text.lines()
        .find_map(|line| line.strip_prefix("rchar: "))
        .map_or(0, |count| count.parse().unwrap())
}

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

#[track_caller]
fn is_empty(directory: &Path) {
    assert_eq!(fs::read_dir(directory).unwrap().count(), 0);
}

#[test]
fn a_load_is_interrupted() {
    let place = Place::new();
    // A fast machine is done with the first before it can be interrupted.
    for (preset, device) in [("qwen2.5-0.5b", "sim:2GiB"), ("qwen2.5-7b", "sim:8GiB")] {
        place
            .run(&["synth", preset, preset, "--headers-only"])
            .succeeds();
        let mut load = place.start(&["load", preset, "--threads", "1", "--device", device]);
        // Much more than headers: it has begun to load.
        if load.interrupt_when(|process| bytes_read(process) > 8 << 20) {
            let outcome = load.finish();
            if outcome.status != Some(0) {
                outcome.fails(INTERRUPTED, &["cancelled"]);
                return;
            }
        }
    }
    panic!("no load was slow enough to be interrupted");
}

#[test]
fn an_interrupted_synth_removes_what_it_has_written() {
    let place = Place::new();
    let mut synth = place.start(&["synth", "qwen2.5-0.5b", "new/model"]);
    assert!(synth.interrupt_when(|_| has_weights(&place.path("new"))));
    synth.finish().fails(INTERRUPTED, &["cancelled"]);
    is_empty(&place.path(""));

    // An empty directory that was there stays there.
    fs::create_dir(place.path("old")).unwrap();
    let mut synth = place.start(&["synth", "qwen2.5-0.5b", "old"]);
    assert!(synth.interrupt_when(|_| has_weights(&place.path("old"))));
    synth.finish().fails(INTERRUPTED, &["cancelled"]);
    is_empty(&place.path("old"));
}

#[test]
fn an_interrupted_demo_removes_its_model() {
    let place = Place::new();
    let mut demo = place.start(&["demo", "--quiet"]);
    assert!(demo.interrupt_when(|_| has_weights(&place.temporary())));
    demo.finish().fails(INTERRUPTED, &["cancelled"]);
    is_empty(&place.temporary());
}
