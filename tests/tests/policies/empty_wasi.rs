//! Components that ask for WASI, and are given one with nothing in it.

use tightfit_tests::failures::failure_of;
use tightfit_tests::guests::{Handwritten, component};
use tightfit_tests::wasi;
use tightfit_wasm::policy::WasmPolicy;
use tightfit_wasm::sandbox::GuestFailure;
use tightfit_wasm::sandbox::{Limits, Mismatch, SandboxOptions, Wasi};

use super::{Bench, rejection};

const IMPORTS: &str = r#"
    (import "wasi:cli/environment@0.2.6" "get-environment" (func $environment (param i32)))
    (import "wasi:cli/environment@0.2.6" "get-arguments" (func $arguments (param i32)))
    (import "wasi:cli/environment@0.2.6" "initial-cwd" (func $directory (param i32)))
    (import "wasi:cli/exit@0.2.6" "exit" (func $exit (param i32)))
    (import "wasi:cli/stdout@0.2.6" "get-stdout" (func $stdout (result i32)))
    (import "wasi:cli/stderr@0.2.6" "get-stderr" (func $stderr (result i32)))
    (import "wasi:cli/terminal-stdout@0.2.6" "get-terminal-stdout" (func $terminal (param i32)))
    (import "wasi:clocks/monotonic-clock@0.2.6" "now" (func $ticks (result i64)))
    (import "wasi:clocks/wall-clock@0.2.6" "now" (func $time (param i32)))
    (import "wasi:filesystem/preopens@0.2.6" "get-directories" (func $directories (param i32)))
    (import "wasi:random/random@0.2.6" "get-random-u64" (func $random (result i64)))
    (import "wasi:random/random@0.2.6" "get-random-bytes" (func $random-bytes (param i64 i32)))
    (import "wasi:sockets/instance-network@0.2.6" "instance-network" (func $network (result i32)))
    (import "wasi:io/streams@0.2.6" "[method]output-stream.blocking-write-and-flush"
        (func $write (param i32 i32 i32 i32)))
"#;

/// A policy that does this as it is asked for a plan, and then proposes nothing.
fn asking(plan: &str) -> Vec<u8> {
    let policy = Handwritten {
        imports: IMPORTS.to_owned(),
        plan: format!("{plan} (i32.const 128)"),
        extra: r#"(data (i32.const 640) "the ground has gone")"#.to_owned(),
        component_type: Some(wasi::component_type()),
        ..Handwritten::default()
    };
    component(&policy.module())
}

fn given_an_empty_one(plan: &str) -> WasmPolicy {
    let options = SandboxOptions::default().with_wasi(Wasi::Empty);
    WasmPolicy::new("test.wasm", &asking(plan), options).unwrap_or_else(|error| panic!("{error}"))
}

/// It got to its answer, which is no good.
#[track_caller]
fn comes_to_its_end(plan: &str) {
    let error = Bench::new().error(&given_an_empty_one(plan), "");
    assert!(error.to_string().contains("placed 0 tensors"), "{error}");
}

#[track_caller]
fn failure(plan: &str) -> GuestFailure {
    Bench::new().failure(&given_an_empty_one(plan), "")
}

#[test]
fn it_has_to_be_asked_for() {
    let failure = rejection(&asking(""));
    assert!(
        matches!(&failure, GuestFailure::WrongWorld(Mismatch::Wasi { import }) if import.starts_with("wasi:")),
        "{failure:?}"
    );
    comes_to_its_end("");
}

#[test]
fn there_is_nothing_in_it() {
    // Lists of no elements, options of nothing: 4 bytes at 516, and the first byte.
    for list in ["environment", "arguments", "directories"] {
        comes_to_its_end(&format!(
            "(i32.store (i32.const 516) (i32.const 7)) (call ${list} (i32.const 512))
            (if (i32.load (i32.const 516)) (then (unreachable)))"
        ));
    }
    for option in ["directory", "terminal"] {
        comes_to_its_end(&format!(
            "(i32.store (i32.const 512) (i32.const 7)) (call ${option} (i32.const 512))
            (if (i32.load8_u (i32.const 512)) (then (unreachable)))"
        ));
    }
}

#[test]
fn time_stands_still_and_chance_repeats_itself() {
    comes_to_its_end(
        "(call $time (i32.const 512))
        (if (i64.ne (i64.load (i32.const 512)) (call $ticks)) (then (unreachable)))
        (if (i64.ne (call $ticks) (i64.const 0)) (then (unreachable)))",
    );
    for _ in 0..2 {
        comes_to_its_end(
            "(if (i64.ne (call $random) (i64.const 0xe220a8397b1dcdaf)) (then (unreachable)))
            (if (i64.eq (call $random) (call $random)) (then (unreachable)))",
        );
    }
    comes_to_its_end(
        "(call $random-bytes (i64.const 16) (i32.const 512))
        (if (i32.ne (i32.load (i32.const 516)) (i32.const 16)) (then (unreachable)))",
    );
}

#[test]
fn it_cannot_be_asked_for_more_random_bytes_than_fit() {
    for length in ["1099511627776", "65537", "-1"] {
        let failure = failure(&format!(
            "(call $random-bytes (i64.const {length}) (i32.const 512))"
        ));
        assert!(
            matches!(&failure, GuestFailure::Trap { message } if message.contains("random bytes")),
            "{failure:?}"
        );
    }
}

#[test]
fn what_is_not_in_it_is_named() {
    let function = "wasi:sockets/instance-network#instance-network".to_owned();
    assert_eq!(
        failure("(drop (call $network))"),
        GuestFailure::EmptyWasi { function }
    );
}

#[test]
fn a_guest_that_exits_has_failed() {
    for (result, status) in [(0, 0), (1, 1)] {
        let failure = failure(&format!("(call $exit (i32.const {result}))"));
        assert_eq!(failure, GuestFailure::Exit { status });
    }
}

#[test]
fn last_words_on_standard_error_are_passed_on() {
    let write = |stream| {
        format!("(call $write (call ${stream}) (i32.const 640) (i32.const 19) (i32.const 512))")
    };
    let failure_after = |stream| failure(&format!("{} (unreachable)", write(stream)));
    let message = "the ground has gone".to_owned();
    assert_eq!(failure_after("stderr"), GuestFailure::Panic { message });
    let silent = failure_after("stdout");
    assert!(matches!(silent, GuestFailure::Trap { .. }), "{silent:?}");
    comes_to_its_end(&write("stdout"));
}

#[test]
fn handles_without_end_run_into_the_limit() {
    let flood = |stream| {
        let flood = format!("(loop (drop (call ${stream})) (br 0))");
        failure(&flood)
    };
    let limit = Limits::default().handles;
    assert_eq!(flood("stdout"), GuestFailure::Handles { limit });
    assert_eq!(flood("stderr"), GuestFailure::Handles { limit });
}

#[test]
fn a_handle_that_was_never_given_is_not_one() {
    for handle in ["0", "1", "12345", "-1"] {
        let failure = failure(&format!(
            "(call $write (i32.const {handle}) (i32.const 640) (i32.const 19) (i32.const 512))"
        ));
        assert!(
            matches!(&failure, GuestFailure::Trap { message } if message.contains("handle")),
            "{failure:?}"
        );
    }
}

/// How a component is turned down that declares WASI's functions itself.
#[track_caller]
fn declaring(text: &str) -> Mismatch {
    let options = SandboxOptions::default().with_wasi(Wasi::Empty);
    let text = format!(
        r#"(component {text} (instance $nothing) (export "tightfit:host/planner@0.1.0" (instance $nothing)))"#
    );
    let component = wat::parse_str(&text).unwrap_or_else(|error| panic!("{error}"));
    let error = WasmPolicy::new("test.wasm", &component, options).expect_err(&text);
    match failure_of(error).1 {
        GuestFailure::WrongWorld(mismatch) => mismatch,
        other => panic!("{text}: {other:?}"),
    }
}

#[test]
fn all_functions_of_wasi_are_known() {
    let options = SandboxOptions::default().with_wasi(Wasi::Empty);
    let policy = WasmPolicy::new("test.wasm", &wasi::importing_all_but(&[]), options);
    let policy = policy.unwrap_or_else(|error| panic!("{error}"));
    let imports = policy.imports();
    for interface in ["wasi:sockets/udp@0.2.0", "wasi:clocks/timezone@0.2.0"] {
        assert!(imports.contains(&interface.to_owned()), "{imports:?}");
    }
}

#[test]
fn a_function_that_wasi_does_not_have_is_not_given() {
    for (interface, function, ty) in [
        ("wasi:cli/terminal-stdout@0.2.0", "f", "(func)"),
        ("wasi:cli/nothing@0.2.0", "get-stdout", "(func)"),
        ("wasi:nowhere/at-all@0.2.6", "f", r#"(func (param "x" u8))"#),
        (
            "wasi:random/random@0.2.9",
            "get-random-u32",
            "(func (result u32))",
        ),
    ] {
        let import = format!(r#"(import "{interface}" (instance (export "{function}" {ty})))"#);
        assert_eq!(
            declaring(&import),
            Mismatch::Import {
                import: format!("{interface}#{function}")
            }
        );
    }
}

#[test]
fn functions_of_wasi_are_given_with_the_types_that_wasi_gives_them() {
    let flags: String = (0..32).map(|label| format!(r#" "f{label}""#)).collect();
    let flags = format!(r#"(type $f' (flags{flags})) (export "f" (type $f (eq $f')))"#);
    let list_of_flags = format!(r#"{flags} (type $l (list $f))"#);
    let resource = r#"(export "output-stream" (type $s (sub resource)))"#;
    let write = "[method]output-stream.write";
    for (interface, function, types, ty) in [
        // More, fewer, others.
        (
            "wasi:cli/environment",
            "get-arguments",
            list_of_flags.as_str(),
            r#"(func (param "x" $l) (result (list string)))"#,
        ),
        ("wasi:cli/environment", "get-arguments", "", "(func)"),
        (
            "wasi:cli/environment",
            "get-arguments",
            "",
            "(func (result (list u8)))",
        ),
        (
            "wasi:cli/environment",
            "get-environment",
            "",
            "(func (result (list (tuple string))))",
        ),
        (
            "wasi:cli/environment",
            "get-environment",
            "",
            "(func (result (list (tuple string string string))))",
        ),
        (
            "wasi:cli/exit",
            "exit",
            list_of_flags.as_str(),
            r#"(func (param "status" (result $l)))"#,
        ),
        (
            "wasi:cli/exit",
            "exit",
            "",
            r#"(func (param "status" (result string (error string))))"#,
        ),
        (
            "wasi:random/random",
            "get-random-bytes",
            "",
            r#"(func (param "len" (list u64)) (result (list u8)))"#,
        ),
        (
            "wasi:random/insecure-seed",
            "insecure-seed",
            "",
            "(func (result (tuple u64 u32)))",
        ),
        // What is written is bytes, to a stream.
        (
            "wasi:io/streams",
            write,
            resource,
            r#"(func (param "self" (borrow $s)) (param "contents" (list (list u8))) (result (result)))"#,
        ),
        (
            "wasi:io/streams",
            write,
            resource,
            r#"(func (param "self" (borrow $s)) (param "contents" (list u8)) (result (result)))"#,
        ),
    ] {
        let import = format!(
            r#"(import "{interface}@0.2.3" (instance {types} (export "{function}" {ty})))"#
        );
        let mismatch = declaring(&import);
        assert!(
            matches!(&mismatch, Mismatch::ImportType { import, reason }
                if *import == format!("{interface}@0.2.3") && reason.contains(function)),
            "{import}: {mismatch:?}"
        );
    }
}
