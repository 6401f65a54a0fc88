//! Ctrl-C: status 130, and nothing left behind.

use std::fs;
use std::path::Path;

use tightfit::checkpoint::Checkpoint;
use tightfit_tests::command::{Place, bytes_read};
use tightfit_tests::guests::HOSTILE;
use tightfit_tests::models;
use tightfit_tests::saving::{files, names};

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

/// A checkpoint whose headers have 160 MB, as no honest one has.
fn long_headers(directory: &Path) {
    fs::create_dir(directory).unwrap();
    for shard in 1..=2 {
        let entry = |i: usize| {
            let name = format!("{}.{shard}.{i:08}", "x".repeat(4000));
            format!(r#""{name}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#)
        };
        let entries: Vec<String> = (0..20_000).map(entry).collect();
        let header = format!("{{{}}}", entries.join(","));
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        let name = format!("model-0000{shard}-of-00002.safetensors");
        fs::write(directory.join(name), bytes).unwrap();
    }
}

#[test]
fn opening_a_checkpoint_is_interrupted() {
    let place = Place::new();
    long_headers(&place.path("m"));
    fs::write(place.path("hostile.wasm"), HOSTILE).unwrap();
    let commands: [&[&str]; 5] = [
        &["inspect", "m"],
        &["plan", "m", "--device", "sim:1GiB"],
        &["load", "m", "--device", "sim:1GiB"],
        &["save", "m", "out"],
        &[
            "run",
            "hostile.wasm",
            "--device",
            "sim:1GiB",
            "--grant",
            "m=m",
        ],
    ];
    for command in commands {
        let mut running = place.start(command);
        // In the middle of the second header.
        assert!(running.interrupt_when(|process| bytes_read(process) > 100 << 20));
        let outcome = running.finish();
        assert_eq!(
            outcome.status,
            Some(INTERRUPTED),
            "{command:?}: {outcome:?}"
        );
    }
    assert!(!place.path("out").exists());
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

#[test]
fn an_interrupted_save_removes_what_it_has_written() {
    let place = Place::new();
    place
        .run(&["synth", "qwen2.5-0.5b", "m", "--headers-only"])
        .succeeds();
    let mut save = place.start(&["save", "m", "new/out", "--threads", "1"]);
    assert!(save.interrupt_when(|_| has_weights(&place.path("new"))));
    save.finish().fails(INTERRUPTED, &["cancelled"]);
    assert_eq!(names(&place.path("")), ["m".to_owned()].into());

    // An empty directory that was there stays there.
    fs::create_dir_all(place.path("old/out")).unwrap();
    let mut save = place.start(&["save", "m", "old/out", "--threads", "1"]);
    assert!(save.interrupt_when(|_| has_weights(&place.path("old"))));
    save.finish().fails(INTERRUPTED, &["cancelled"]);
    assert_eq!(names(&place.path("old")), ["out".to_owned()].into());
    is_empty(&place.path("old/out"));
}

#[test]
fn copying_what_lies_beside_the_weights_is_interrupted() {
    let place = Place::new();
    models::write_decoder(&place.path("m"), 1, 64);
    for number in 0..4 {
        let file = fs::File::create(place.path(&format!("m/{number}.txt"))).unwrap();
        file.set_len(60 << 20).unwrap();
    }
    // A fast machine may be done before it can be interrupted.
    for _ in 0..10 {
        let mut save = place.start(&["save", "m", "new/out"]);
        if save.interrupt_when(|_| has_weights(&place.path("new"))) {
            let outcome = save.finish();
            if outcome.status != Some(0) {
                outcome.fails(INTERRUPTED, &["cancelled"]);
                assert_eq!(names(&place.path("")), ["m".to_owned()].into());
                return;
            }
        }
        fs::remove_dir_all(place.path("new")).unwrap();
    }
    panic!("no save was slow enough to be interrupted");
}

#[test]
fn a_save_that_is_killed_leaves_nothing_under_its_name_or_everything() {
    const MOMENTS: u64 = 10;
    let place = Place::new();
    models::write_decoder(&place.path("m"), 12, 512);
    let save = |target| ["save", "m", target, "--quiet", "--max-shard-size=10MB"];
    place.run(&save("whole")).succeeds();
    let whole = files(&place.path("whole"));
    assert!(whole.len() > 3, "{} files", whole.len());
    let source = fs::metadata(place.path("m/model.safetensors"))
        .unwrap()
        .len();
    let mut killed = 0;
    for moment in 0..MOMENTS {
        let out = place.path("out");
        // The last are when everything has been read: files are written, moved, named.
        let begun = source * moment / (MOMENTS - 2);
        let mut running = place.start(&save("out"));
        killed += u64::from(running.kill_when(|process| bytes_read(process) >= begun));
        running.finish();
        if out.exists() {
            assert!(files(&out) == whole, "killed after {begun} bytes");
            Checkpoint::open(&out).unwrap_or_else(|error| panic!("{error}"));
            fs::remove_dir_all(&out).unwrap();
        }
        for name in names(&place.path("")) {
            let left = name.starts_with(".out.partial-");
            assert!(left || name == "m" || name == "whole", "{name} is left");
        }
    }
    assert!(killed >= MOMENTS / 2, "only {killed} were killed in time");
    // What is left does not disturb the next.
    place.run(&save("out")).succeeds();
    assert!(files(&place.path("out")) == whole);
}

#[test]
fn an_interrupted_check_removes_its_models() {
    let place = Place::new();
    fs::write(place.path("hostile.wasm"), HOSTILE).unwrap();
    let mut text = String::from(
        "[defaults]\npolicy = \"hostile.wasm\"\nsettings = { behavior = \"loop\" }\n\
         model = { preset = \"demo\" }\ndevices = [\"sim:1GiB\"]\n",
    );
    // Each takes its time to run out of fuel.
    for number in 0..50 {
        text +=
            &format!("[[scenario]]\nname = \"{number}\"\nexpect = {{ fails = \"out-of-fuel\" }}\n");
    }
    fs::write(place.path("s.toml"), text).unwrap();
    let mut check = place.start(&["check", "s.toml"]);
    assert!(check.interrupt_when(|_| has_weights(&place.temporary())));
    check.finish().fails(INTERRUPTED, &["cancelled"]);
    is_empty(&place.temporary());
}
