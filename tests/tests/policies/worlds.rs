//! Components made for another host: one sentence that says what does not fit.

use tightfit_tests::guests::Handwritten;
use tightfit_wasm::sandbox::GuestFailure;
use tightfit_wasm::sandbox::Mismatch;

use super::rejection;

#[track_caller]
fn mismatch(text: &str) -> Mismatch {
    mismatch_of(&wat::parse_str(text).unwrap())
}

#[track_caller]
fn mismatch_of(bytes: &[u8]) -> Mismatch {
    match rejection(bytes) {
        GuestFailure::WrongWorld(mismatch) => mismatch,
        other => panic!("{other:?}"),
    }
}

/// A component that imports an interface with one function without parameters.
fn importing(interface: &str, function: &str) -> String {
    format!(
        r#"(component
            (import "{interface}" (instance (export "{function}" (func))))
            (instance $none)
            (export "tightfit:host/planner@0.1.0" (instance $none)))"#
    )
}

#[test]
fn imports_that_nobody_has_are_named() {
    let text = importing("acme:disk/wipe@1.0.0", "now");
    let import = "acme:disk/wipe@1.0.0".to_owned();
    assert_eq!(mismatch(&text), Mismatch::Import { import });
    let function = r#"(component (import "exec" (func)))"#;
    let import = "exec".to_owned();
    assert_eq!(mismatch(function), Mismatch::Import { import });
}

#[test]
fn wasi_is_turned_down_with_the_option_that_gives_an_empty_one() {
    for interface in [
        "wasi:cli/environment@0.2.6",
        "wasi:filesystem/preopens@0.2.0",
        "wasi:sockets/tcp@0.2.3",
        "wasi:clocks/wall-clock@0.2.0",
    ] {
        let mismatch = mismatch(&importing(interface, "now"));
        let import = interface.to_owned();
        assert_eq!(mismatch, Mismatch::Wasi { import });
        assert!(mismatch.to_string().contains("--wasi empty"), "{mismatch}");
    }
    // What compilers for the first WASI make.
    let first = Handwritten {
        imports: r#"(import "wasi_snapshot_preview1" "proc_exit" (func (param i32)))"#.to_owned(),
        ..Handwritten::default()
    };
    let import = "wasi_snapshot_preview1".to_owned();
    assert_eq!(mismatch_of(&first.module()), Mismatch::Import { import });
}

#[test]
fn versions_of_imports_are_compared() {
    for (version, newer) in [
        ("0.2.0", true),
        ("1.0.0", true),
        ("0.0.9", false),
        ("0.1.0-rc1", false),
    ] {
        let import = format!("tightfit:host/sizing@{version}");
        let mismatch = mismatch(&importing(&import, "stored-bytes"));
        let sentence = mismatch.to_string();
        assert_eq!(
            mismatch,
            Mismatch::ImportVersion {
                import: import.clone(),
                have: "0.1.0".to_owned(),
                newer,
            }
        );
        let expected = format!("it imports {import}, this host has 0.1.0: it is for ");
        assert!(sentence.starts_with(&expected), "{sentence}");
    }
}

#[test]
fn a_function_that_is_not_there_or_another_is_named() {
    for (interface, function) in [
        ("tightfit:host/log@0.1.0", "erase"),
        // For a later 0.1, which has it.
        ("tightfit:host/log@0.1.7", "erase"),
        // Which has parameters.
        ("tightfit:host/log@0.1.0", "write"),
    ] {
        let mismatch = mismatch(&importing(interface, function));
        let Mismatch::ImportType { import, reason } = &mismatch else {
            panic!("{mismatch:?}");
        };
        assert_eq!(import, interface);
        assert!(reason.contains(function), "{reason}");
    }
}

#[test]
fn the_planner_must_be_exported() {
    let export = || "tightfit:host/planner@0.1.0".to_owned();
    let missing = Mismatch::Export { export: export() };
    for text in [
        "(component)",
        r#"(component
            (core module $m (func (export "f")))
            (core instance $i (instantiate $m))
            (func (export "plan") (canon lift (core func $i "f"))))"#,
    ] {
        assert_eq!(mismatch(text), missing);
    }
    for (name, newer) in [("0.2.0", true), ("0.0.1", false)] {
        let name = format!("tightfit:host/planner@{name}");
        let text = format!(r#"(component (instance $none) (export "{name}" (instance $none)))"#);
        assert_eq!(
            mismatch(&text),
            Mismatch::ExportVersion {
                export: name,
                want: "0.1.0".to_owned(),
                newer,
            }
        );
    }
}

#[test]
fn the_planner_must_have_its_functions() {
    let empty = r#"(component
        (instance $none)
        (export "tightfit:host/planner@0.1.0" (instance $none)))"#;
    // One without parameters, which gives nothing.
    let other = r#"(component
        (core module $m (func (export "f")))
        (core instance $i (instantiate $m))
        (func $f (canon lift (core func $i "f")))
        (instance $p (export "describe" (func $f)) (export "plan" (func $f)))
        (export "tightfit:host/planner@0.1.0" (instance $p)))"#;
    for text in [empty, other] {
        let mismatch = mismatch(text);
        assert!(
            matches!(&mismatch, Mismatch::ExportType { export, reason }
                if export == "tightfit:host/planner@0.1.0" && reason.contains("describe")),
            "{mismatch:?}"
        );
    }
    // What is no instance at all.
    let function = r#"(component
        (core module $m (func (export "f")))
        (core instance $i (instantiate $m))
        (func $f (canon lift (core func $i "f")))
        (export "tightfit:host/planner@0.1.0" (func $f)))"#;
    let failure = rejection(&wat::parse_str(function).unwrap_or_default());
    assert!(
        matches!(
            failure,
            GuestFailure::WrongWorld(_) | GuestFailure::NotAComponent { .. }
        ),
        "{failure:?}"
    );
}

#[test]
fn a_core_module_needs_the_interface() {
    let reason = |bytes: &[u8]| match rejection(bytes) {
        GuestFailure::NotAComponent { reason } => reason,
        other => panic!("{other:?}"),
    };
    let foreign = wat::parse_str(r#"(module (import "env" "read_file" (func)))"#).unwrap();
    let said = reason(&foreign);
    assert!(said.contains("was it built with the SDK"), "{said}");
    let said = reason(&wat::parse_str("(module)").unwrap());
    assert!(said.contains("planner"), "{said}");
    // A version that the module names, and its description of its world does not.
    let newer = Handwritten {
        imports: r#"(import "tightfit:host/log@0.3.0" "write" (func (param i32 i32 i32)))"#
            .to_owned(),
        ..Handwritten::default()
    };
    let newer = mismatch_of(&newer.module());
    assert!(
        matches!(newer, Mismatch::ImportVersion { newer: true, .. }),
        "{newer:?}"
    );
}
