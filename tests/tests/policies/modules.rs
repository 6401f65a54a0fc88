//! Files that are no policies, and modules that break the rules of the interface.

use std::fs::File;

use tempfile::TempDir;
use tightfit::policy::PolicyError;
use tightfit_tests::failures::failure_of;
use tightfit_tests::guests::{self, Handwritten, compile};
use tightfit_wasm::policy::WasmPolicy;
use tightfit_wasm::sandbox::{GuestFailure, Limits};

use super::{Bench, rejection};

#[track_caller]
fn is_no_policy(bytes: &[u8], word: &str) {
    let failure = rejection(bytes);
    let GuestFailure::NotAComponent { reason } = &failure else {
        panic!("{failure:?}");
    };
    assert!(reason.contains(word), "{reason}");
}

#[test]
fn only_wasm_binaries_are_read() {
    let refused = "not a WebAssembly binary";
    is_no_policy(b"", refused);
    is_no_policy(b"import tightfit\n", refused);
    // The text format is another parser to attack.
    is_no_policy(b"(module)", refused);
    is_no_policy(b"(component)", refused);
    // What wasmtime precompiles is an ELF file, and native code to be trusted blindly.
    let mut precompiled = b"\x7fELF\x02\x01\x01".to_vec();
    precompiled.extend_from_slice(guests::HOSTILE);
    is_no_policy(&precompiled, refused);
    is_no_policy(b"\0asm\x07\0\0\0", "unknown version");
}

#[test]
fn size_is_checked_before_anything_is_compiled() {
    let limit = Limits::default().component;
    let mut padded = guests::HOSTILE.to_vec();
    padded.resize(limit as usize + 1, 0);
    let too_large = |have| GuestFailure::TooLarge {
        what: "file",
        have,
        limit,
    };
    assert_eq!(rejection(&padded), too_large(limit + 1));

    // A file is not even read.
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("sparse.wasm");
    File::create(&path).unwrap().set_len(1 << 40).unwrap();
    let error = WasmPolicy::open(path.to_str().unwrap(), Limits::default()).unwrap_err();
    assert_eq!(failure_of(error).1, too_large(1 << 40));
}

#[test]
fn a_function_that_would_take_minutes_to_compile_is_turned_down() {
    let limit = Limits::default().function;
    let mut policy = Handwritten::default();
    let body = "nop ".repeat(limit as usize);
    policy.extra = format!("(func {body})");
    let failure = rejection(&policy.module());
    assert!(
        matches!(
            failure,
            GuestFailure::TooLarge { what: "largest function", have, limit: of }
                if have > limit && of == limit
        ),
        "{failure:?}"
    );
    // Also where it hides in a component's module.
    let nested = wat::parse_str(format!("(component (core module (func {body})))")).unwrap();
    assert!(matches!(
        rejection(&nested),
        GuestFailure::TooLarge {
            what: "largest function",
            ..
        }
    ));
}

#[test]
fn names_and_files_that_are_not_there_are_told_apart() {
    let open = |name: &str| WasmPolicy::open(name, Limits::default()).unwrap_err();
    assert!(matches!(
        open("automatic"),
        PolicyError::Unknown { name, builtin } if name == "automatic" && builtin.contains(&"auto")
    ));
    let directory = TempDir::new().unwrap();
    let missing = directory.path().join("missing.wasm");
    for path in [missing.as_path(), directory.path()] {
        let error = open(path.to_str().unwrap());
        assert!(
            matches!(&error, PolicyError::Unreadable { path: named, .. } if named == path),
            "{error:?}"
        );
    }
}

/// Values that no compiler makes: each breaks a rule of the interface.
#[test]
fn values_that_break_the_interface_are_traps() {
    let store = |at: u32, value: u32| format!("(i32.store (i32.const {at}) (i32.const {value}))");
    // A description: name (address, length) and version at 16. A result: at 128 its case, at 136
    // placements (address, length), at 144 headroom.
    let describe = |stores: &[String]| Handwritten {
        describe: format!("{} (i32.const 16)", stores.concat()),
        ..Handwritten::default()
    };
    let plan = |stores: &[String]| Handwritten {
        plan: format!("{} (i32.const 128)", stores.concat()),
        ..Handwritten::default()
    };
    let outside = 0x7fff_0000;
    for (policy, what) in [
        (describe(&[store(16, outside)]), "a name outside of memory"),
        (describe(&[store(20, u32::MAX)]), "a name without end"),
        (describe(&[store(64, u32::MAX)]), "a name that is not UTF-8"),
        (plan(&[store(128, 7)]), "neither an answer nor a refusal"),
        (plan(&[store(140, u32::MAX)]), "placements without end"),
        (
            plan(&[store(136, outside), store(140, 1)]),
            "placements outside of memory",
        ),
        (plan(&[store(136, 1), store(140, 1)]), "crooked placements"),
        (
            plan(&[store(136, 256), store(140, 1), store(264, 9)]),
            "a format that does not exist",
        ),
        (
            Handwritten {
                plan: format!("(i32.const {outside})"),
                ..Handwritten::default()
            },
            "an answer outside of memory",
        ),
        (
            Handwritten {
                realloc: format!("(i32.const {outside})"),
                ..Handwritten::default()
            },
            "an allocation outside of memory",
        ),
    ] {
        let policy = compile(&policy.module(), Limits::default());
        let failure = Bench::new().failure(&policy, "");
        assert!(
            matches!(failure, GuestFailure::Trap { .. }),
            "{what}: {failure:?}"
        );
    }
}

#[test]
fn a_hand_written_policy_without_harm_is_only_wrong() {
    // Without this the tests above could fail for a reason of their own.
    let policy = compile(&Handwritten::default().module(), Limits::default());
    let error = Bench::new().error(&policy, "");
    let expected = "policy 'test.wasm' gave a bad plan: it placed 0 tensors, the checkpoint has 4";
    assert_eq!(error.to_string(), expected);
}
