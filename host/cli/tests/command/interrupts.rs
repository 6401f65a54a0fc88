//! Ctrl-C: status 130, and nothing left behind.

use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use tightfit::checkpoint::Checkpoint;
use tightfit_tests::command::{Scratchpad, bytes_read, bytes_written};
use tightfit_tests::guests::{HOSTILE, Handwritten};
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
    let scratchpad = Scratchpad::new();
    // A fast machine is done with the first before it can be interrupted.
    for (preset, device) in [("qwen2.5-0.5b", "sim:2GiB"), ("qwen2.5-7b", "sim:8GiB")] {
        scratchpad
            .run(&["synth", preset, preset, "--headers-only"])
            .succeeds();
        let mut load = scratchpad.start(&["load", preset, "--threads", "1", "--device", device]);
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
    let scratchpad = Scratchpad::new();
    long_headers(&scratchpad.path("m"));
    fs::write(scratchpad.path("hostile.wasm"), HOSTILE).unwrap();
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
        let mut running = scratchpad.start(command);
        // In the middle of the second header.
        assert!(running.interrupt_when(|process| bytes_read(process) > 100 << 20));
        let outcome = running.finish();
        assert_eq!(
            outcome.status,
            Some(INTERRUPTED),
            "{command:?}: {outcome:?}"
        );
    }
    assert!(!scratchpad.path("out").exists());
}

#[test]
fn an_interrupted_synth_removes_what_it_has_written() {
    let scratchpad = Scratchpad::new();
    let mut synth = scratchpad.start(&["synth", "qwen2.5-0.5b", "new/model"]);
    assert!(synth.interrupt_when(|_| has_weights(&scratchpad.path("new"))));
    synth.finish().fails(INTERRUPTED, &["cancelled"]);
    is_empty(&scratchpad.path(""));

    // An empty directory that was there stays there.
    fs::create_dir(scratchpad.path("old")).unwrap();
    let mut synth = scratchpad.start(&["synth", "qwen2.5-0.5b", "old"]);
    assert!(synth.interrupt_when(|_| has_weights(&scratchpad.path("old"))));
    synth.finish().fails(INTERRUPTED, &["cancelled"]);
    is_empty(&scratchpad.path("old"));
}

#[test]
fn an_interrupted_demo_removes_its_model() {
    let scratchpad = Scratchpad::new();
    let mut demo = scratchpad.start(&["demo", "--quiet"]);
    assert!(demo.interrupt_when(|_| has_weights(&scratchpad.temporary())));
    demo.finish().fails(INTERRUPTED, &["cancelled"]);
    is_empty(&scratchpad.temporary());
}

#[test]
fn an_interrupted_save_removes_what_it_has_written() {
    let scratchpad = Scratchpad::new();
    scratchpad
        .run(&["synth", "qwen2.5-0.5b", "m", "--headers-only"])
        .succeeds();
    let mut save = scratchpad.start(&["save", "m", "new/out", "--threads", "1"]);
    assert!(save.interrupt_when(|_| has_weights(&scratchpad.path("new"))));
    save.finish().fails(INTERRUPTED, &["cancelled"]);
    assert_eq!(names(&scratchpad.path("")), ["m".to_owned()].into());

    // An empty directory that was there stays there.
    fs::create_dir_all(scratchpad.path("old/out")).unwrap();
    let mut save = scratchpad.start(&["save", "m", "old/out", "--threads", "1"]);
    assert!(save.interrupt_when(|_| has_weights(&scratchpad.path("old"))));
    save.finish().fails(INTERRUPTED, &["cancelled"]);
    assert_eq!(names(&scratchpad.path("old")), ["out".to_owned()].into());
    is_empty(&scratchpad.path("old/out"));
}

#[test]
fn copying_what_lies_beside_the_weights_is_interrupted() {
    let scratchpad = Scratchpad::new();
    models::write_decoder(&scratchpad.path("m"), 1, 64);
    for number in 0..4 {
        let file = fs::File::create(scratchpad.path(&format!("m/{number}.txt"))).unwrap();
        file.set_len(60 << 20).unwrap();
    }
    // A fast machine may be done before it can be interrupted.
    for _ in 0..10 {
        let mut save = scratchpad.start(&["save", "m", "new/out"]);
        if save.interrupt_when(|_| has_weights(&scratchpad.path("new"))) {
            let outcome = save.finish();
            if outcome.status != Some(0) {
                outcome.fails(INTERRUPTED, &["cancelled"]);
                assert_eq!(names(&scratchpad.path("")), ["m".to_owned()].into());
                return;
            }
        }
        fs::remove_dir_all(scratchpad.path("new")).unwrap();
    }
    panic!("no save was slow enough to be interrupted");
}

#[test]
fn a_save_that_is_killed_leaves_nothing_under_its_name_or_everything() {
    const MOMENTS: u64 = 10;
    let scratchpad = Scratchpad::new();
    models::write_decoder(&scratchpad.path("m"), 12, 512);
    let save = |target| ["save", "m", target, "--quiet", "--max-shard-size=10MB"];
    scratchpad.run(&save("whole")).succeeds();
    let whole = files(&scratchpad.path("whole"));
    assert!(whole.len() > 3, "{} files", whole.len());
    let written: usize = whole.values().map(Vec::len).sum();
    let mut killed = 0;
    for moment in 0..MOMENTS {
        let out = scratchpad.path("out");
        // The last are when everything has been written: files are moved, named.
        let begun = written as u64 * moment / (MOMENTS - 2);
        let mut running = scratchpad.start(&save("out"));
        killed += u64::from(running.kill_when(|process| bytes_written(process) >= begun));
        running.finish();
        if out.exists() {
            assert!(files(&out) == whole, "killed after {begun} bytes");
            Checkpoint::open(&out).unwrap_or_else(|error| panic!("{error}"));
            fs::remove_dir_all(&out).unwrap();
        }
        for name in names(&scratchpad.path("")) {
            let left = name.starts_with(".out.partial-");
            assert!(left || name == "m" || name == "whole", "{name} is left");
        }
    }
    assert!(killed >= MOMENTS / 2, "only {killed} were killed in time");
    // What is left does not disturb the next.
    scratchpad.run(&save("out")).succeeds();
    assert!(files(&scratchpad.path("out")) == whole);
}

#[test]
fn an_interrupted_check_removes_its_models() {
    let scratchpad = Scratchpad::new();
    fs::write(scratchpad.path("hostile.wasm"), HOSTILE).unwrap();
    let mut text = String::from(
        "[defaults]\npolicy = \"hostile.wasm\"\nsettings = { behavior = \"loop\" }\n\
         model = { preset = \"demo\" }\ndevices = [\"sim:1GiB\"]\n",
    );
    // Each takes its time to run out of fuel.
    for number in 0..50 {
        text +=
            &format!("[[scenario]]\nname = \"{number}\"\nexpect = {{ fails = \"out-of-fuel\" }}\n");
    }
    fs::write(scratchpad.path("s.toml"), text).unwrap();
    let mut check = scratchpad.start(&["check", "s.toml"]);
    assert!(check.interrupt_when(|_| has_weights(&scratchpad.temporary())));
    check.finish().fails(INTERRUPTED, &["cancelled"]);
    is_empty(&scratchpad.temporary());
}

/// A policy, and a program, that take longer to compile than anybody waits.
fn bombs() -> [Vec<u8>; 2] {
    let mut body = String::new();
    for n in 0..30_000 {
        body += &format!(
            "(if (i32.and (local.get {}) (i32.const {n})) (then (local.set {} (i32.add (local.get {}) (i32.const {n})))))",
            n % 8,
            (n * 5 + 1) % 8,
            (n * 3 + 2) % 8,
        );
    }
    let bomb = format!("(func (param i32 i32 i32 i32 i32 i32 i32 i32) {body})");
    let program = format!(
        r#"(module
            (memory (export "memory") 1)
            (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) (i32.const 64))
            (func (export "tightfit:host/run@0.1.0#run") (param i32 i32) (result i32) (i32.const 0))
            {bomb})"#
    );
    let policy = Handwritten {
        extra: bomb,
        ..Handwritten::default()
    };
    [policy.module(), wat::parse_str(program).unwrap()]
}

/// The processes that a process has started.
fn children(process: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{process}/task"))
        .into_iter()
        .flatten();
    let children = tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    children
        .flat_map(|line| {
            line.split(' ')
                .filter_map(|id| id.parse().ok())
                .collect::<Vec<u32>>()
        })
        .collect()
}

#[test]
fn the_compiling_of_a_policy_is_interrupted() {
    let scratchpad = Scratchpad::new();
    fs::create_dir(scratchpad.path("m")).unwrap();
    models::write_awkward(&scratchpad.path("m"));
    let [policy, program] = bombs();
    fs::write(scratchpad.path("bomb.wasm"), policy).unwrap();
    fs::write(scratchpad.path("program.wasm"), program).unwrap();
    fs::write(
        scratchpad.path("s.toml"),
        "[[scenario]]\nname = \"it\"\npolicy = \"bomb.wasm\"\nmodel = { preset = \"demo\" }\n\
         devices = [\"sim:1GiB\"]\nexpect = { fails = \"compile\" }\n",
    )
    .unwrap();
    let limits = ["--limit", "function=1GiB", "--limit", "compile-time=600"];
    let policy = ["--policy", "bomb.wasm"];
    for arguments in [
        &["policy", "show", "bomb.wasm"][..],
        &[&["plan", "m"], &policy[..]].concat(),
        &[&["inspect", "m"], &policy[..]].concat(),
        &[&["load", "m", "--device", "sim:64MiB"], &policy[..]].concat(),
        &[&["save", "m", "out"], &policy[..]].concat(),
        &["run", "program.wasm", "--device", "sim:64MiB"],
        &["check", "s.toml"],
    ] {
        let compiler = Cell::new(None);
        let mut running = scratchpad.start(&[arguments, &limits].concat());
        let compiles = |process| {
            compiler.set(children(process).first().copied());
            // It has read the policy, and is at it.
            compiler
                .get()
                .is_some_and(|compiler| bytes_read(compiler) > 100_000)
        };
        assert!(running.interrupt_when(compiles), "{arguments:?}");
        assert!(
            running.ends_unread(Duration::from_secs(60)),
            "{arguments:?}"
        );
        let outcome = running.finish();
        assert_eq!(outcome.status, Some(INTERRUPTED), "{outcome:?}");
        // A process that has ended may be listed until it is waited for.
        let compiler = format!("/proc/{}/status", compiler.get().unwrap());
        let runs = || {
            let status = fs::read_to_string(&compiler).unwrap_or_default();
            status.contains("compile-policy") || status.contains("State:\tR")
        };
        let start = Instant::now();
        while runs() && start.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(!runs(), "{arguments:?} leaves its compiler behind");
    }
}
