//! What policies make the command take of memory, whatever they are made of. The compiler is a
//! process of its own, and counts for itself.

use std::fs;

use tightfit_tests::command::{Outcome, Scratchpad};
use tightfit_tests::guests::Handwritten;
use tightfit_tests::models;

const POLICY: i32 = 5;
const MIB: u64 = 1 << 20;

/// What the command takes whatever it runs, and some more.
const BASE: u64 = 50 * MIB;

/// Shows a policy. Gives the most memory that this took.
fn show(scratchpad: &Scratchpad, policy: &[u8], more: &[&str]) -> (Outcome, u64) {
    fs::write(scratchpad.path("test.wasm"), policy).unwrap();
    let arguments = [&["policy", "show", "test.wasm"], more].concat();
    let (outcome, peak) = scratchpad.start(&arguments).finish_measured();
    println!(
        "{} bytes: {} MiB, {}",
        policy.len(),
        peak / MIB,
        outcome.stderr
    );
    (outcome, peak)
}

/// A component of these parts that exports what a policy does, with nothing in it.
fn component(parts: &str) -> Vec<u8> {
    let text = format!(
        r#"(component {parts} (instance $nothing)
            (export "tightfit:host/planner@0.1.0" (instance $nothing)))"#
    );
    wat::parse_str(text).unwrap()
}

#[test]
fn a_few_bytes_do_not_become_many_nor_drive_out_what_is_kept() {
    let mut scratchpad = Scratchpad::new();
    let cached = scratchpad.path("xdg");
    scratchpad.set("XDG_CACHE_HOME", cached.to_str().unwrap());
    scratchpad.run(&["policy", "show", "auto"]).succeeds();
    let images = r#"(core module (memory 257)
        (data (i32.const 0) "a") (data (i32.const 16777200) "b"))"#;
    let table = "(core module (table 1048576 funcref) (elem (i32.const 1048568) $f) (func $f))";
    let data = r#"(core module (memory 1) (data (i32.const 0) "a"))"#;
    let mut levels = "(type $t0 (instance))".to_owned();
    for level in 1..=18 {
        levels += &format!(
            r#"(type $t{level} (instance (alias outer 1 $t{} (type $b))
                (export "a" (instance (type $b))) (export "b" (instance (type $b)))))"#,
            level - 1
        );
    }
    levels += r#"(import "tightfit:host/log@0.1.0" (instance (type $t18)))"#;
    for parts in [
        images.repeat(42),
        images.repeat(255),
        table.repeat(100),
        data.repeat(255),
        levels,
    ] {
        let (outcome, peak) = show(&scratchpad, &component(&parts), &[]);
        assert_eq!(outcome.status, Some(POLICY), "{outcome:?}");
        assert!(peak < BASE, "{} MiB", peak / MIB);
    }
    // The key, the built-in policy and at most what was made of these.
    let kept = fs::read_dir(cached.join("tightfit/compiled")).unwrap();
    let bytes = kept.map(|file| file.unwrap().metadata().unwrap().len());
    let bytes: Vec<_> = bytes.collect();
    assert!(bytes.len() >= 2, "{bytes:?}");
    assert!(bytes.iter().sum::<u64>() < 10 * MIB, "{bytes:?}");
}

/// A policy that hands over so many elements of zeros, or bytes, in one call.
fn handing_over(describe: &str, plan: &str) -> Vec<u8> {
    let grow = "(drop (memory.grow (i32.const 3000)))";
    let policy = Handwritten {
        describe: format!("{grow} {describe}"),
        plan: format!("{grow} {plan}"),
        imports: r#"(import "tightfit:host/log@0.1.0" "write" (func $log (param i32 i32 i32)))
            (import "tightfit:host/sizing@0.1.0" "stored-bytes" (func $size
                (param i32 i32 i32 i32 i32 i32 i32)))"#
            .to_owned(),
        ..Handwritten::default()
    };
    policy.module()
}

#[test]
fn a_call_takes_a_small_multiple_of_what_it_may_hand_over() {
    const LIMIT: u64 = 32 * MIB;
    let scratchpad = Scratchpad::new();
    fs::create_dir(scratchpad.path("m")).unwrap();
    models::write_awkward(&scratchpad.path("m"));
    let plan = |policy: Vec<u8>, words: &str| {
        fs::write(scratchpad.path("test.wasm"), &policy).unwrap();
        let arguments = [
            "plan",
            "m",
            "--policy",
            "test.wasm",
            "--device",
            "sim:64MiB",
            "--limit",
            "deadline=5",
            "--limit",
            "log-bytes=1KiB",
        ];
        let (outcome, peak) = scratchpad.start(&arguments).finish_measured();
        println!("{words}: {} MiB, {:.100}", peak / MIB, outcome.stderr);
        assert!(
            outcome.stderr.contains(words),
            "{words}: {:.300}",
            outcome.stderr
        );
        assert!(peak < BASE + 3 * LIMIT, "{words}: {} MiB", peak / MIB);
    };
    let store = |at: u32, value: u64| format!("(i32.store (i32.const {at}) (i32.const {value}))");
    let describe = "(i32.const 16)";
    let zeros = store(136, 65_536) + &store(144, 65_536);
    // As many as fit, by the sizes that they have here: 16, 8 and 72 bytes, and 1.
    let placements = zeros.clone() + &store(140, LIMIT / 24);
    plan(
        handing_over(describe, &(placements + "(i32.const 128)")),
        "bad plan",
    );
    let headroom = zeros + &store(148, LIMIT / 8);
    plan(
        handing_over(describe, &(headroom + "(i32.const 128)")),
        "bad plan",
    );
    let settings = store(32, 65_536) + &store(36, LIMIT / 72);
    plan(
        handing_over(&(settings + describe), "(i32.const 128)"),
        "more than 256 settings",
    );
    let name = store(16, 65_536) + &store(20, LIMIT - 100);
    plan(
        handing_over(&(name + describe), "(i32.const 128)"),
        "bad plan",
    );
    let refusal = store(128, 1) + &store(140, 65_536) + &store(144, LIMIT);
    plan(
        handing_over(describe, &(refusal + "(i32.const 128)")),
        "refuses",
    );
    // Again and again, each the last words so far.
    let log = format!(
        "(loop (call $log (i32.const 0) (i32.const 65536) (i32.const {LIMIT})) (br 0)) (unreachable)"
    );
    plan(handing_over(describe, &log), "(limit `");
    // A bf16 tensor of a shape that has no size: the answer does not repeat it.
    let shape = format!(
        "(memory.fill (i32.const 65536) (i32.const 255) (i32.const {LIMIT}))
        (call $size (i32.const 16) (i32.const 65536) (i32.const {}) (i32.const 0) (i32.const 0)
            (i32.const 0) (i32.const 512)) (i32.const 128)",
        LIMIT / 8
    );
    plan(handing_over(describe, &shape), "bad plan");
}

#[test]
fn types_of_a_guests_own_under_names_of_wasi_are_not_lifted() {
    // 470,000 elements of 32 flags are 1.9 MB there and 0.85 GB of names here.
    let scratchpad = Scratchpad::new();
    let labels: String = (0..32).map(|label| format!(r#" "f{label}""#)).collect();
    let component = component(&format!(
        r#"(import "wasi:cli/environment@0.2.0" (instance
            (type $f' (flags{labels})) (export "f" (type $f (eq $f'))) (type $l (list $f))
            (export "get-arguments" (func (param "x" $l)))))"#
    ));
    let (outcome, peak) = show(&scratchpad, &component, &["--wasi", "empty"]);
    outcome.fails(
        POLICY,
        &["wasi:cli/environment@0.2.0", "get-arguments", "WASI 0.2"],
    );
    assert!(peak < BASE, "{} MiB", peak / MIB);
}
