//! Components that are no programs, and what programs and policies may not import.

use tempfile::TempDir;
use tightfit_tests::failures::failure_of;
use tightfit_tests::guests;
use tightfit_tests::programs::{Bench, HOSTILE, LOAD_AND_CHECK};
use tightfit_wasm::policy::WasmPolicy;
use tightfit_wasm::program::{ProgramError, WasmProgram, default_limits};
use tightfit_wasm::sandbox::GuestFailure;
use tightfit_wasm::sandbox::Limits;
use tightfit_wasm::sandbox::Mismatch;

#[track_caller]
fn rejection(bytes: &[u8]) -> GuestFailure {
    let result = WasmProgram::new("test.wasm", bytes, default_limits());
    Bench::default().is_unharmed();
    match result {
        Err(ProgramError::Failed { failure, .. }) => failure,
        other => panic!("{other:?}"),
    }
}

fn component(text: &str) -> Vec<u8> {
    wat::parse_str(text).unwrap()
}

#[track_caller]
fn is_for_another_host(bytes: &[u8], word: &str) {
    let failure = rejection(bytes);
    assert!(
        matches!(failure, GuestFailure::WrongWorld { .. }),
        "{failure:?}"
    );
    assert!(failure.to_string().contains(word), "{failure}");
}

#[test]
fn what_is_no_component_is_no_program() {
    for bytes in [&b""[..], b"(component)", &[0; 100]] {
        let failure = rejection(bytes);
        assert!(
            matches!(failure, GuestFailure::NotAComponent { .. }),
            "{failure:?}"
        );
    }
    is_for_another_host(&component("(component)"), "run");
}

#[test]
fn programs_have_no_wasi_and_no_planner() {
    for interface in [
        "wasi:clocks/wall-clock@0.2.0",
        "wasi:filesystem/types@0.2.0",
        "wasi:sockets/tcp@0.2.0",
        "tightfit:host/planner@0.1.0",
        "tightfit:host/models@0.2.0",
    ] {
        let text = format!(r#"(component (import "{interface}" (instance (export "f" (func)))))"#);
        is_for_another_host(&component(&text), interface);
    }
    let text = r#"(component
        (import "tightfit:host/devices@0.1.0" (instance (export "reset" (func))))
        (instance $run)
        (export "tightfit:host/run@0.1.0" (instance $run)))"#;
    is_for_another_host(&component(text), "reset");
}

#[test]
fn a_policy_is_no_program_and_a_program_is_no_policy() {
    // A core module is held to the world that it is to be used in, not to the one that it describes.
    let failure = rejection(guests::HOSTILE);
    assert!(
        matches!(&failure, GuestFailure::NotAComponent { reason } if reason.contains("tightfit:host/run@0.1.0")),
        "{failure:?}"
    );
    for program in [HOSTILE, LOAD_AND_CHECK] {
        let error = WasmPolicy::new("test.wasm", program, Limits::default()).unwrap_err();
        let (_, failure) = failure_of(error);
        // Not for what it exports, but for what a policy is not given.
        assert!(
            matches!(&failure, GuestFailure::WrongWorld(Mismatch::Import { import })
                if import.starts_with("tightfit:host/")),
            "{failure:?}"
        );
    }
    // Each interface that is a program's alone.
    for interface in [
        "errors",
        "devices",
        "buffers",
        "nf4",
        "checkpoints",
        "models",
    ] {
        let interface = format!("tightfit:host/{interface}@0.1.0");
        let text = format!(r#"(component (import "{interface}" (instance (export "f" (func)))))"#);
        let error = WasmPolicy::new("test.wasm", &component(&text), Limits::default());
        let error = error.unwrap_err().to_string();
        assert!(error.contains(&interface), "{error}");
    }
}

#[test]
fn files_that_are_no_programs() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("program.wasm");
    for path in [path.as_path(), directory.path()] {
        let error = WasmProgram::open(path, default_limits()).unwrap_err();
        assert!(
            matches!(&error, ProgramError::Unreadable { path: named, .. } if named == path),
            "{error:?}"
        );
    }
    std::fs::File::create(&path)
        .unwrap()
        .set_len(1 << 40)
        .unwrap();
    let error = WasmProgram::open(&path, default_limits()).unwrap_err();
    assert!(
        matches!(error, ProgramError::Failed { failure: GuestFailure::TooLarge { have, .. }, .. } if have == 1 << 40)
    );
}

#[test]
fn a_program_says_what_it_imports() {
    let program = WasmProgram::new("test.wasm", LOAD_AND_CHECK, default_limits()).unwrap();
    let mut imports = program.imports();
    imports.sort();
    let expected = [
        "buffers",
        "checkpoints",
        "devices",
        "errors",
        "log",
        "models",
        "types",
    ];
    assert_eq!(
        imports,
        expected.map(|name| format!("tightfit:host/{name}@0.1.0"))
    );
}
