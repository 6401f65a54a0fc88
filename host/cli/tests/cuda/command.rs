//! The command, with a driver, without one, and with bad ones.

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;

use cuda_stand_in::control::{FUNCTIONS, Report, Setup, VARIABLE, install};
use tightfit_tests::command::Scratchpad;

use super::{MIB, decoder, is_left_out};

/// A place where the command finds the stand-in, and where its books will be.
fn with_stand_in(setup: &Setup, missing: Option<&str>) -> (Scratchpad, PathBuf) {
    let mut scratchpad = Scratchpad::new();
    let books = scratchpad.path("books");
    let setup = Setup {
        report: books.to_str().unwrap().to_owned(),
        ..setup.clone()
    };
    fs::create_dir(scratchpad.path("driver")).unwrap();
    install(&scratchpad.path("driver"), missing);
    find_driver(&mut scratchpad);
    scratchpad.set(VARIABLE, setup.to_string());
    (scratchpad, books)
}

fn find_driver(scratchpad: &mut Scratchpad) {
    let directory = scratchpad.path("driver");
    scratchpad.set("LD_LIBRARY_PATH", directory.to_str().unwrap());
}

/// A place where no driver can be loaded, whatever this machine has: libraries of its names are
/// there and are none.
fn without_driver() -> Scratchpad {
    let mut scratchpad = Scratchpad::new();
    fs::create_dir(scratchpad.path("driver")).unwrap();
    for name in ["libcuda.so", "libcuda.so.1"] {
        fs::write(scratchpad.path("driver").join(name), "not a library").unwrap();
    }
    find_driver(&mut scratchpad);
    scratchpad
}

#[test]
fn load_uses_all_devices_and_reports_them() {
    let directory = decoder(2);
    let model = directory.path().to_str().unwrap();
    let setup = Setup {
        devices: vec![64 * MIB; 2],
        ..Setup::default()
    };
    let (scratchpad, books) = with_stand_in(&setup, None);
    let report = scratchpad.run(&["load", model, "--json"]).succeeds().json();
    let devices = report["devices"].as_array().unwrap();
    assert_eq!(devices.len(), 2);
    let books = Report::read(&fs::read_to_string(books).unwrap());
    books.is_clean("load");
    for (index, device) in devices.iter().enumerate() {
        assert_eq!(device["name"], format!("cuda:{index}"));
        assert_eq!(device["peak_reserved"], device["reserved"]);
        assert_eq!(device["peak_reserved"], books.peaks[index]);
        assert_eq!(device["capacity"], 64 * MIB);
    }
    let staging = report["host"]["staging_bytes"].as_u64().unwrap();
    assert!(books.host_peak > 0 && books.host_peak < staging);
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_taken() {
    let directory = decoder(4);
    let model = directory.path().to_str().unwrap();
    let (scratchpad, books) = with_stand_in(&Setup::default(), None);
    scratchpad
        .run(&["load", model, "--device", "cuda:0:4MiB"])
        .fails(4, &["12.00 MiB", "4.00 MiB"]);
    let books = Report::read(&fs::read_to_string(books).unwrap());
    books.is_clean("refused");
    assert!(books.calls.iter().all(|call| call != "cuMemCreate"));
}

#[test]
fn without_a_driver_gpus_are_missing_and_the_processor_is_used() {
    let directory = decoder(1);
    let model = directory.path().to_str().unwrap();
    let scratchpad = without_driver();
    scratchpad
        .run(&["load", model, "--device", "cuda:0"])
        .fails(6, &["cuda:0", "no NVIDIA driver"]);
    for device in [&[][..], &["--device", "cpu"]] {
        let arguments = [&["load", model, "--json"], device].concat();
        let report = scratchpad.run(&arguments).succeeds().json();
        assert_eq!(report["devices"][0]["name"], "cpu");
    }
}

#[test]
fn a_driver_without_devices_says_so() {
    let directory = decoder(1);
    let model = directory.path().to_str().unwrap();
    let setup = Setup {
        devices: Vec::new(),
        ..Setup::default()
    };
    let (scratchpad, _) = with_stand_in(&setup, None);
    scratchpad
        .run(&["plan", model, "--device", "cuda:0"])
        .fails(6, &["cuda:0", "no device"]);
    let report = scratchpad.run(&["plan", model, "--json"]).succeeds().json();
    assert_eq!(report["devices"][0]["name"], "cpu");
}

#[test]
fn a_driver_that_cannot_start_is_quoted() {
    let directory = decoder(1);
    let model = directory.path().to_str().unwrap();
    let setup = Setup {
        fail_at: Some(1),
        error: 803,
        ..Setup::default()
    };
    let (scratchpad, _) = with_stand_in(&setup, None);
    scratchpad
        .run(&["load", model, "--device", "cuda:0"])
        .fails(
            6,
            &["cuda:0", "cuInit", "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"],
        );
    scratchpad.run(&["load", model, "--quiet"]).succeeds();
}

#[test]
fn a_driver_too_old_is_named_by_what_it_lacks() {
    let directory = decoder(1);
    let model = directory.path().to_str().unwrap();
    for function in FUNCTIONS {
        let (scratchpad, _) = with_stand_in(&Setup::default(), Some(function));
        scratchpad
            .run(&["plan", model, "--device", "cuda:0"])
            .fails(6, &["cuda:0", "too old", function]);
    }
}

#[test]
fn a_driver_that_fails_while_loading_is_quoted_with_status_6() {
    if is_left_out("its books") {
        return;
    }
    let directory = decoder(1);
    let model = directory.path().to_str().unwrap();
    for (quantize_on, failing) in [
        (
            "cpu",
            &[
                "cuMemCreate",
                "cuMemHostRegister",
                "cuMemcpyHtoDAsync",
                "cuEventRecord",
            ][..],
        ),
        (
            "gpu",
            &["cuModuleLoadData", "cuLaunchKernel", "cuMemsetD8Async"],
        ),
    ] {
        // One worker in all runs, and who quantizes is settled: the Nth call is the same call only in
        // the same order.
        let load = ["load", model, "--quiet", "--threads", "1"];
        let load = [&load[..], &["--quantize-on", quantize_on]].concat();
        let (scratchpad, books) = with_stand_in(&Setup::default(), None);
        scratchpad.run(&load).succeeds();
        let calls = Report::read(&fs::read_to_string(books).unwrap()).calls;
        for call in failing {
            let at = calls.iter().position(|name| name == call).unwrap() as u64 + 1;
            let setup = Setup {
                fail_at: Some(at),
                ..Setup::default()
            };
            let (scratchpad, books) = with_stand_in(&setup, None);
            scratchpad
                .run(&load)
                .fails(6, &["cuda:0", call, "CUDA_ERROR_LAUNCH_FAILED"]);
            Report::read(&fs::read_to_string(books).unwrap()).is_clean(call);
        }
    }
}

#[test]
fn who_has_quantized_is_reported() {
    if is_left_out("its books") {
        return;
    }
    let directory = decoder(2);
    let model = directory.path().to_str().unwrap();
    let load = ["load", model, "--json", "--quantize-on"];
    for (quantize_on, side, other) in [
        ("cpu", "by_host", "by_device"),
        ("gpu", "by_device", "by_host"),
    ] {
        let (scratchpad, books) = with_stand_in(&Setup::default(), None);
        let arguments = [&load[..], &[quantize_on]].concat();
        let report = scratchpad.run(&arguments).succeeds().json();
        let quantized = &report["load"]["quantized_on"]["cuda:0"];
        assert!(quantized[side].as_u64().unwrap() > 0, "{quantized}");
        assert_eq!(quantized[other], 0, "{quantized}");
        Report::read(&fs::read_to_string(books).unwrap()).is_clean(quantize_on);
    }
    let (scratchpad, _) = with_stand_in(&Setup::default(), None);
    let outcome = scratchpad
        .run(&["load", model, "--quantize-on", "gpu"])
        .succeeds();
    let line = "quantized for cuda:0: ";
    assert!(outcome.stdout.contains(line), "{}", outcome.stdout);
    scratchpad
        .run(&["load", model, "--quantize-on", "elsewhere"])
        .fails(2, &["--quantize-on", "cpu, gpu and auto"]);
}

#[test]
fn one_of_eight_ranks_whose_gpu_fails_ends_all() {
    if is_left_out("calls that fail") {
        return;
    }
    let directory = decoder(8);
    let model = directory.path().to_str().unwrap();
    let run = |broken: Option<usize>| {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr();
        let address = address.unwrap().to_string();
        let ranks = (0..8).map(|rank| {
            let setup = Setup {
                devices: vec![64 * MIB; 8],
                // While all shares are written.
                fail_at: (broken == Some(rank)).then_some(2),
                fail_on: Some(rank),
                fail_call: "cuMemcpyHtoDAsync".to_owned(),
                ..Setup::default()
            };
            let (scratchpad, books) = with_stand_in(&setup, None);
            let place = format!("--rank {rank} --world 8 --rendezvous {address}");
            let load = ["load", model, "--threads", "1", "--quiet", "--json"];
            let all: Vec<&str> = load.into_iter().chain(place.split(' ')).collect();
            (scratchpad.start(&all), scratchpad, books)
        });
        let ranks: Vec<_> = ranks.collect();
        let ended = ranks
            .into_iter()
            .enumerate()
            .map(|(rank, (process, _scratchpad, books))| {
                let outcome = process.finish();
                let books = Report::read(&fs::read_to_string(books).unwrap());
                books.is_clean(&format!("rank {rank}"));
                (outcome, books)
            });
        ended.collect::<Vec<_>>()
    };
    for (rank, (outcome, books)) in run(None).into_iter().enumerate() {
        let report = outcome.succeeds().json();
        let device = &report["devices"][0];
        assert_eq!(device["name"], format!("{rank}/cuda:{rank}"));
        assert_eq!(device["peak_reserved"], books.peaks[rank], "{rank}");
        assert!(books.peaks[rank] > MIB, "{rank}");
        let elsewhere: u64 = books.peaks.iter().sum();
        assert_eq!(elsewhere, books.peaks[rank], "{rank}");
    }
    for (rank, (outcome, _)) in run(Some(5)).into_iter().enumerate() {
        match rank {
            5 => outcome.fails(6, &["cuda:5", "CUDA_ERROR_LAUNCH_FAILED"]),
            _ => outcome.fails(6, &["rank 5"]),
        };
    }
}
