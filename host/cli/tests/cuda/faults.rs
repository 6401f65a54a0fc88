//! Drivers that fail, and loads that are stopped: an error, and nothing left behind.

use std::sync::atomic::{AtomicU64, Ordering};

use cuda_stand_in::control::{Report, Setup, StandIn};
use tightfit::cancel::CancelToken;
use tightfit::device::{Device, WRITER_BUFFERS, open_devices};
use tightfit::kernels::half::bf16;
use tightfit::kernels::{Activation, Choices};
use tightfit::load::{LoadError, LoadOptions, QuantizeOn};
use tightfit::plan::PartKind;
use tightfit::products::{LinearError, WorkspaceOptions};

use super::{Driver, Kind, Kinds, MIB, in_small_pieces, is_left_out, nf4};

/// The calls that give something back: an error of theirs is no reason to fail.
const GIVES_BACK: &[&str] = &[
    "cuCtxPopCurrent",
    "cuDevicePrimaryCtxRelease",
    "cuEventDestroy",
    "cuMemAddressFree",
    "cuMemFree",
    "cuMemFreeHost",
    "cuMemHostUnregister",
    "cuMemRelease",
    "cuMemUnmap",
    "cuModuleUnload",
    "cuStreamDestroy",
    "cuThreadExchangeStreamCaptureMode",
];

const PARTS: [PartKind; 4] = [
    PartKind::Data,
    PartKind::Codes,
    PartKind::Absmax,
    PartKind::NestedAbsmax,
];

/// Who quantizes, where that is settled beforehand.
const PLACES: [QuantizeOn; 2] = [QuantizeOn::Cpu, QuantizeOn::Gpu];

/// What is loaded, and how.
#[derive(Clone, Copy)]
struct Load<'a> {
    kinds: &'a Kinds,
    quantize_on: QuantizeOn,
    workers: usize,
}

/// Opens devices, loads, reads everything, and closes all of it. Gives the bytes.
fn whole_run(load: Load<'_>) -> Result<Vec<Vec<u8>>, String> {
    let specs = ["cuda:0", "cuda:1"].map(|spec| spec.parse().unwrap());
    let devices = open_devices(&specs).map_err(|error| error.to_string())?;
    let result = load_and_read(load, &devices);
    for device in &devices {
        assert_eq!(device.usage().reserved.now, 0);
    }
    result
}

fn load_and_read(load: Load<'_>, devices: &[Box<dyn Device>]) -> Result<Vec<Vec<u8>>, String> {
    let model = load.kinds.load(devices, load.quantize_on, load.workers);
    let model = model.map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    for tensor in model.tensors() {
        for part in PARTS {
            let read = tensor.read_part(part);
            bytes.extend(read.map_err(|error| error.to_string())?);
        }
    }
    Ok(bytes)
}

/// A run on a driver of which a call fails.
fn run_on(setup: &Setup, load: Load<'_>) -> (Result<Vec<Vec<u8>>, String>, Report) {
    let stand_in = StandIn::start(setup);
    let result = whole_run(load);
    let report = stand_in.report();
    assert!(report.faults.is_empty(), "{setup:?}: {:?}", report.faults);
    (result, report)
}

fn two_devices() -> Setup {
    Setup {
        devices: vec![64 * MIB; 2],
        ..Setup::default()
    }
}

/// Devices with and without virtual memory, and such where the kernels have to work beside the plan.
fn setups() -> [Setup; 3] {
    let setup = two_devices();
    [
        setup.clone(),
        Setup {
            virtual_memory: false,
            ..setup.clone()
        },
        Setup {
            granularity: 4096,
            ..setup
        },
    ]
}

#[test]
fn whichever_call_fails_it_is_an_error_and_everything_is_given_back() {
    if is_left_out("calls that fail") {
        return;
    }
    let kinds = Kinds::new(Kinds::FEW);
    for setup in setups() {
        for quantize_on in PLACES {
            let load = Load {
                kinds: &kinds,
                quantize_on,
                workers: 1,
            };
            fail_every_call_of(&setup, load);
        }
    }
}

fn fail_every_call_of(setup: &Setup, load: Load<'_>) {
    let (expected, report) = run_on(setup, load);
    let expected = expected.unwrap();
    report.is_clean("without a failure");
    assert!(report.calls.len() > 150, "{}", report.calls.len());
    let launches = report.calls.iter().any(|call| call == "cuLaunchKernel");
    assert_eq!(launches, load.quantize_on == QuantizeOn::Gpu);
    for (index, call) in report.calls.iter().enumerate() {
        let setup = Setup {
            fail_at: Some(index as u64 + 1),
            ..setup.clone()
        };
        let context = format!("{call}, call {}, on {}", index + 1, load.quantize_on);
        let (result, report) = run_on(&setup, load);
        assert_eq!(&report.calls[index], call, "runs differ");
        assert!(report.leaks.is_empty(), "{context}: {:?}", report.leaks);
        match result {
            Err(text) => {
                assert!(text.contains(call), "{context}: {text}");
                assert!(
                    text.contains("CUDA_ERROR_LAUNCH_FAILED"),
                    "{context}: {text}"
                );
                assert!(
                    text.contains("cuda:") || call == "cuInit",
                    "{context}: {text}"
                );
            }
            // Entered only to give something back, or given back: done all the same.
            Ok(bytes) => {
                let entered = ["cuCtxGetCurrent", "cuCtxPushCurrent"].contains(&&call[..]);
                assert!(entered || GIVES_BACK.contains(&&call[..]), "{context}");
                assert!(bytes == expected, "{context}");
            }
        }
    }
}

#[test]
fn one_of_eight_devices_that_fails_ends_the_load_and_all_is_given_back() {
    if is_left_out("calls that fail") {
        return;
    }
    let kinds = Kinds::new(Kinds::ALL);
    let setup = Setup {
        devices: vec![64 * MIB; 8],
        ..Setup::default()
    };
    let names: Vec<String> = (0..8).map(|index| format!("cuda:{index}")).collect();
    let specs: Vec<_> = names.iter().map(|name| name.parse().unwrap()).collect();
    let run = |setup: &Setup, quantize_on| {
        let stand_in = StandIn::start(setup);
        let devices = open_devices(&specs).unwrap();
        let load = Load {
            kinds: &kinds,
            quantize_on,
            workers: 8,
        };
        let result = load_and_read(load, &devices);
        for device in &devices {
            assert_eq!(device.usage().reserved.now, 0);
        }
        drop(devices);
        stand_in.report().is_clean("one of eight");
        result
    };
    for quantize_on in PLACES {
        run(&setup, quantize_on).unwrap();
        for (device, name) in names.iter().enumerate() {
            // While all are reserved from, and while all are written to.
            for call in ["cuMemCreate", "cuMemcpyHtoDAsync"] {
                let setup = Setup {
                    fail_at: Some(1),
                    fail_on: Some(device),
                    fail_call: call.to_owned(),
                    ..setup.clone()
                };
                let error = run(&setup, quantize_on).unwrap_err();
                let names_it = error.contains(name.as_str()) && error.contains(call);
                assert!(names_it, "{name}, {call}, {quantize_on}: {error}");
            }
        }
    }
}

/// Loads, and computes products in both ways. Gives the results.
fn run_with_products(kinds: &Kinds) -> Result<Vec<Vec<u8>>, String> {
    let specs = ["cuda:0".parse().unwrap()];
    let devices = open_devices(&specs).map_err(|error| error.to_string())?;
    let result = load_and_multiply(kinds, &devices);
    assert_eq!(devices[0].usage().reserved.now, 0);
    result
}

fn load_and_multiply(kinds: &Kinds, devices: &[Box<dyn Device>]) -> Result<Vec<Vec<u8>>, String> {
    let text = |error: LinearError| error.to_string();
    let model = kinds.load(devices, QuantizeOn::Cpu, 1);
    let model = model.map_err(|error| error.to_string())?;
    let mut results = Vec::new();
    for name in ["blocks of 64", "double"] {
        let linear = model.linear(name).map_err(text)?;
        let x = vec![bf16::ONE; 9 * linear.inputs()];
        let mut y = vec![bf16::ZERO; 9 * linear.outputs()];
        linear.forward(&x, 9, None, &mut y).map_err(text)?;
        results.push(y.iter().flat_map(|y| y.to_le_bytes()).collect());
    }
    let bytes = |y: &[bf16]| -> Vec<u8> { y.iter().flat_map(|y| y.to_le_bytes()).collect() };
    let linear = model.linear("blocks of 64").map_err(text)?;
    let mut dx = vec![bf16::ZERO; 2 * linear.inputs()];
    let dy = vec![bf16::ONE; 2 * linear.outputs()];
    linear.input_gradient(&dy, 2, &mut dx).map_err(text)?;
    results.push(bytes(&dx));
    // One that begins between nested scales.
    let linear = model.linear_of("e.gate_up_proj", 1).map_err(text)?;
    let mut y = vec![bf16::ZERO; linear.outputs()];
    let (x, bias) = (
        vec![bf16::ONE; linear.inputs()],
        vec![bf16::ONE; linear.outputs()],
    );
    linear.forward(&x, 1, Some(&bias), &mut y).map_err(text)?;
    results.push(bytes(&y));
    let experts = model.experts("e", Activation::Silu).map_err(text)?;
    let choices = Choices {
        of_token: 2,
        ids: &[1, 2, 0, -1],
        weights: &[0.5; 4],
    };
    let x = vec![bf16::ONE; 2 * experts.hidden()];
    let mut y = vec![bf16::ZERO; x.len()];
    experts
        .forward(&x, &choices, None, None, &mut y)
        .map_err(text)?;
    results.push(bytes(&y));
    let wanted = WorkspaceOptions::rows(9).with_experts_per_token(2);
    let workspace = model.product_workspace(0, &wanted).map_err(text)?;
    assert!(workspace.bytes() > 0);
    Ok(results)
}

#[test]
fn whichever_call_of_products_fails_it_is_an_error_and_everything_is_given_back() {
    if is_left_out("calls that fail") {
        return;
    }
    const WEIGHTS: &[Kind] = &[
        ("blocks of 64", "BF16", 2, &[130, 640], nf4(64, false)),
        ("double", "BF16", 2, &[64, 64], nf4(64, true)),
        ("e.gate_up_proj", "BF16", 2, &[3, 34, 48], nf4(32, true)),
        ("e.down_proj", "BF16", 2, &[3, 48, 17], nf4(64, true)),
    ];
    let kinds = Kinds::new(WEIGHTS);
    for virtual_memory in [true, false] {
        let setup = Setup {
            devices: vec![64 * MIB],
            virtual_memory,
            ..Setup::default()
        };
        let run = |setup: &Setup| {
            let stand_in = StandIn::start(setup);
            let result = run_with_products(&kinds);
            let report = stand_in.report();
            assert!(report.faults.is_empty(), "{setup:?}: {:?}", report.faults);
            (result, report)
        };
        let (expected, report) = run(&setup);
        let expected = expected.unwrap();
        report.is_clean("without a failure");
        for (index, call) in report.calls.iter().enumerate() {
            let setup = Setup {
                fail_at: Some(index as u64 + 1),
                ..setup.clone()
            };
            let context = format!("{call}, call {}", index + 1);
            let (result, report) = run(&setup);
            assert_eq!(&report.calls[index], call, "runs differ");
            assert!(report.leaks.is_empty(), "{context}: {:?}", report.leaks);
            match result {
                Err(text) => {
                    assert!(text.contains(call), "{context}: {text}");
                    assert!(
                        text.contains("cuda:") || call == "cuInit",
                        "{context}: {text}"
                    );
                }
                Ok(results) => {
                    let entered = ["cuCtxGetCurrent", "cuCtxPushCurrent"].contains(&&call[..]);
                    assert!(entered || GIVES_BACK.contains(&&call[..]), "{context}");
                    assert!(results == expected, "{context}");
                }
            }
        }
    }
}

#[test]
fn a_driver_that_fails_for_good_ends_the_load_and_is_given_back_what_it_takes() {
    if is_left_out("calls that fail") {
        return;
    }
    let kinds = Kinds::new(Kinds::FEW);
    for quantize_on in PLACES {
        let load = Load {
            kinds: &kinds,
            quantize_on,
            workers: 1,
        };
        let (_, report) = run_on(&two_devices(), load);
        let calls = report.calls.len() as u64;
        let last_read = report.calls.iter().rposition(|call| call == "cuMemcpyDtoH");
        for at in 1..=calls {
            let setup = Setup {
                fail_at: Some(at),
                for_good: true,
                ..two_devices()
            };
            let (result, _) = run_on(&setup, load);
            // Nothing is left to fail once everything has been read.
            let done = last_read.is_some_and(|last| at > last as u64 + 1);
            assert_eq!(result.is_ok(), done, "call {at}, on {quantize_on}");
        }
    }
}

#[test]
fn whichever_call_fails_among_several_workers_nothing_is_left() {
    if is_left_out("calls that fail") {
        return;
    }
    let kinds = Kinds::new(Kinds::FEW);
    for quantize_on in PLACES {
        let load = Load {
            kinds: &kinds,
            quantize_on,
            workers: 3,
        };
        let (_, report) = run_on(&two_devices(), load);
        let calls = report.calls.len() as u64;
        for at in (1..=calls).step_by(3) {
            let setup = Setup {
                fail_at: Some(at),
                error: 999_999,
                ..two_devices()
            };
            let (result, report) = run_on(&setup, load);
            assert!(report.leaks.is_empty(), "call {at}: {:?}", report.leaks);
            if let Err(text) = result {
                // The driver has no name for it.
                assert!(text.contains("error 999999"), "{text}");
            }
        }
    }
}

#[test]
fn a_cancelled_load_waits_for_what_is_under_way_and_gives_everything_back() {
    let kinds = Kinds::new(Kinds::ALL);
    let times = [(0, 1), (1, 1), (5, 2), (17, 4), (60, 3)];
    let all = PLACES.map(|place| times.map(|(after, workers)| (place, after, workers)));
    for (quantize_on, after, workers) in all.into_iter().flatten() {
        let driver = Driver::start(2);
        let devices = open_devices(&[]).unwrap();
        let cancel = CancelToken::new();
        let chunks = AtomicU64::new(0);
        let result = kinds.load_with(
            &devices,
            &in_small_pieces(quantize_on, workers)
                .with_progress(&|_| {
                    if chunks.fetch_add(1, Ordering::SeqCst) >= after {
                        cancel.cancel();
                    }
                })
                .with_cancel(cancel.clone()),
        );
        assert!(matches!(result, Err(LoadError::Cancelled)), "{result:?}");
        for device in &devices {
            assert_eq!(device.usage().reserved.now, 0);
        }
        drop(devices);
        driver.clean_report("cancelled");
    }
}

#[test]
fn a_checkpoint_cut_short_while_it_is_loaded_gives_everything_back() {
    for quantize_on in PLACES {
        let kinds = Kinds::new(Kinds::ALL);
        let driver = Driver::start(2);
        let devices = open_devices(&[]).unwrap();
        let path = kinds.path();
        let cut = std::sync::Once::new();
        let result = kinds.load_with(
            &devices,
            &in_small_pieces(quantize_on, 4).with_progress(&|_| {
                cut.call_once(|| {
                    let file = std::fs::OpenOptions::new().write(true).open(&path);
                    file.unwrap().set_len(4096).unwrap();
                });
            }),
        );
        assert!(
            matches!(result, Err(LoadError::Checkpoint(_))),
            "{result:?}"
        );
        drop(devices);
        driver.clean_report("cut short");
    }
}

#[test]
fn a_callback_that_panics_ends_the_load_and_gives_everything_back() {
    let kinds = Kinds::new(Kinds::ALL);
    for quantize_on in PLACES {
        let driver = Driver::start(1);
        let devices = open_devices(&[]).unwrap();
        let chunks = AtomicU64::new(0);
        // The others go on, and wait for the one that does not.
        let report = |_| assert_ne!(chunks.fetch_add(1, Ordering::SeqCst), 7, "as it should");
        let options = in_small_pieces(quantize_on, 3).with_progress(&report);
        let load = || kinds.load_with(&devices, &options).map(drop);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(load));
        assert!(result.is_err(), "on {quantize_on}");
        for device in &devices {
            assert_eq!(device.usage().reserved.now, 0);
        }
        drop(devices);
        driver.clean_report("panicked");
    }
}

#[test]
fn staging_too_small_for_a_worker_is_refused() {
    let kinds = Kinds::new(Kinds::FEW);
    let driver = Driver::start(2);
    let devices = open_devices(&[]).unwrap();
    // One worker has a slot, and two buffers for whichever device it writes to.
    let least = (1 + WRITER_BUFFERS as u64) * (64 << 10);
    let options = |staging_bytes| LoadOptions::default().with_staging_bytes(staging_bytes);
    let result = kinds.load_with(&devices, &options(least - 1));
    assert!(matches!(result, Err(LoadError::Staging(_))), "{result:?}");
    drop(kinds.load_with(&devices, &options(least)).unwrap());
    drop(devices);
    driver.clean_report("staging");
}
