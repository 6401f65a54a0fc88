//! Guests that were built against another version of the interface than this host's.

use std::io::Read;
use std::path::Path;

use flate2::read::GzDecoder;
use tightfit::checkpoint::Checkpoint;
use tightfit::device::{Device, HostDevice};
use tightfit::plan::propose;
use tightfit::policy::Policy;
use tightfit_tests::failures::failure_of;
use tightfit_tests::golden::GoldenModel;
use tightfit_tests::guests;
use tightfit_tests::programs::{self, Bench, run};
use tightfit_wasm::policy::WasmPolicy;
use tightfit_wasm::program::{ProgramError, WasmProgram, default_limits};
use tightfit_wasm::sandbox::{Failure, Limits, Mismatch};

/// A component that was built once, with the SDK of its time, and is kept as it was.
fn kept(version: &str, name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("versions")
        .join(version)
        .join(format!("{name}.wasm.gz"));
    let mut bytes = Vec::new();
    let packed = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    GzDecoder::new(&packed[..]).read_to_end(&mut bytes).unwrap();
    bytes
}

/// A guest as one built against another version of the interface: every name of it says so.
fn renamed(bytes: &[u8], version: &str) -> Vec<u8> {
    const OWN: &[u8] = b"@0.1.0";
    let other = format!("@{version}");
    assert_eq!(other.len(), OWN.len(), "names keep their lengths");
    let mut renamed = bytes.to_vec();
    let places: Vec<usize> = (0..bytes.len().saturating_sub(OWN.len()))
        .filter(|&at| bytes[at..].starts_with(OWN))
        .collect();
    assert!(!places.is_empty());
    for at in places {
        renamed[at..at + OWN.len()].copy_from_slice(other.as_bytes());
    }
    renamed
}

/// The policy puts one layer on the second device.
fn places(bytes: &[u8]) -> Result<(), Failure> {
    let policy = WasmPolicy::new("test.wasm", bytes, Limits::default())
        .map_err(|error| failure_of(error).1)?;
    let golden = GoldenModel::unpack("llama");
    let checkpoint = Checkpoint::open(&golden.path("bf16")).unwrap();
    let devices: Vec<_> = (0..2)
        .map(|index| HostDevice::sim(index, 1 << 30).info())
        .collect();
    let settings = [("layer", "1"), ("device", "sim:1")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
    let proposed = propose(&checkpoint, &policy, &devices, &settings)
        .unwrap_or_else(|error| panic!("{error}"));
    let tensors = |device: usize| proposed.plan.devices[device].tensors;
    assert!(tensors(0) > tensors(1) && tensors(1) > 0);
    Ok(())
}

/// The program loads a checkpoint that it was granted.
fn loads(bytes: &[u8]) -> Result<(), Failure> {
    let program = match WasmProgram::new("test.wasm", bytes, default_limits()) {
        Err(ProgramError::Failed { failure, .. }) => return Err(failure),
        program => program.unwrap_or_else(|error| panic!("{error}")),
    };
    let golden = GoldenModel::unpack("llama");
    let bench = Bench::new(16 << 20);
    let context = bench.context().grant("llama", golden.path("bf16"));
    let outcome = run(&program, context, &["llama"]).unwrap_or_else(|error| panic!("{error}"));
    assert!(
        outcome.answer.contains(" tensors quantized, "),
        "{}",
        outcome.answer
    );
    Ok(())
}

#[test]
fn a_policy_that_was_built_with_0_1_0_places() {
    places(&kept("0.1.0", "pin_layer")).unwrap();
}

#[test]
fn a_program_that_was_built_with_0_1_0_loads() {
    loads(&kept("0.1.0", "load_and_check")).unwrap();
}

#[test]
fn guests_of_another_patch_version_run() {
    for version in ["0.1.1", "0.1.9"] {
        places(&renamed(&kept("0.1.0", "pin_layer"), version)).unwrap();
        loads(&renamed(&kept("0.1.0", "load_and_check"), version)).unwrap();
    }
}

#[test]
fn guests_of_another_minor_version_are_turned_down_by_version() {
    let turned_down = |result: Result<(), Failure>| match result {
        Err(Failure::WrongWorld(
            Mismatch::ImportVersion { newer, .. } | Mismatch::ExportVersion { newer, .. },
        )) => newer,
        other => panic!("{other:?}"),
    };
    for (version, newer) in [("0.2.0", true), ("0.0.9", false)] {
        let policy = places(&renamed(&kept("0.1.0", "pin_layer"), version));
        assert_eq!(turned_down(policy), newer, "{version}");
        let program = loads(&renamed(&kept("0.1.0", "load_and_check"), version));
        assert_eq!(turned_down(program), newer, "{version}");
    }
}

#[test]
fn core_modules_of_another_patch_version_run() {
    let policy = renamed(guests::HOSTILE, "0.1.1");
    let policy = guests::compile(&policy, Limits::default());
    assert_eq!(policy.describe().unwrap().name, "hostile");
    loads(&renamed(programs::LOAD_AND_CHECK, "0.1.1")).unwrap();
}
