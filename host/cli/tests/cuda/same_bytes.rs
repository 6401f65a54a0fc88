//! What a GPU holds is what host memory would.

use std::path::Path;

use tightfit::device::{HostDevice, open_devices};
use tightfit::load::{LoadOptions, QuantizeOn};
use tightfit::plan::PartKind;
use tightfit_kernels::FloatType;
use tightfit_tests::golden::{GoldenModel, MODELS};
use tightfit_tests::loading::{Contents, DOUBLE_QUANT, Planned, contents, load_with_auto};

use super::{Driver, Kinds, decoder, existing, in_small_pieces, slices};

const SETTINGS: [&[(&str, &str)]; 2] = [&[], DOUBLE_QUANT];

const PLACES: [QuantizeOn; 3] = [QuantizeOn::Cpu, QuantizeOn::Gpu, QuantizeOn::Auto];

/// A few workers, whatever this machine has; the kernels are compiled for however little.
fn on(quantize_on: QuantizeOn) -> LoadOptions<'static> {
    LoadOptions::default()
        .with_threads(3)
        .with_quantize_on(quantize_on)
        .with_compile_from(0)
}

fn on_the_processor(path: &Path, settings: &[(&str, &str)]) -> Contents {
    contents(&load_with_auto(path, &["cpu"], settings))
}

/// Loads onto all devices that the driver has and compares.
#[track_caller]
fn check(driver: &Driver, path: &Path, settings: &[(&str, &str)], options: &LoadOptions<'_>) {
    let expected = on_the_processor(existing(path), settings);
    let names = driver.devices();
    let context = format!(
        "{} {settings:?} on {} devices, on {}",
        path.display(),
        names.len(),
        options.quantize_on
    );
    let planned = Planned::new(path, &slices(&names), settings);
    let model = planned.load(options);
    assert!(contents(&model) == expected, "{context}");
    let mut peaks = Vec::new();
    for (device, plan) in planned.devices.iter().zip(&planned.plan.devices) {
        let usage = device.usage();
        assert_eq!(usage.reserved.now, plan.size.reserved, "{context}");
        // Only where the GPU has to quantize it may work beside the plan.
        if options.quantize_on != QuantizeOn::Gpu {
            assert_eq!(usage.reserved.peak, plan.size.reserved, "{context}");
        }
        peaks.push(usage.reserved.peak);
    }
    let staging = model.stats().staging_bytes;
    assert!(staging <= options.staging_bytes, "{context}");
    drop((model, planned));
    if let Some(report) = driver.clean_report(&context) {
        assert_eq!(report.peaks, peaks, "{context}: more taken than entered");
        assert!(
            report.host_peak > 0 && report.host_peak < staging,
            "{context}"
        );
    }
}

#[test]
fn golden_checkpoints_on_one_device() {
    for name in MODELS {
        let golden = GoldenModel::unpack(name);
        for settings in SETTINGS {
            for quantize_on in PLACES {
                let driver = Driver::start(1);
                check(&driver, &golden.path("bf16"), settings, &on(quantize_on));
            }
        }
    }
}

#[test]
fn golden_checkpoints_on_two_and_eight_devices() {
    for name in MODELS {
        let golden = GoldenModel::unpack(name);
        for (devices, settings) in [(2, SETTINGS[0]), (8, SETTINGS[1])] {
            for quantize_on in PLACES {
                let driver = Driver::start(devices);
                check(&driver, &golden.path("bf16"), settings, &on(quantize_on));
            }
        }
    }
}

#[test]
fn checkpoints_that_bitsandbytes_has_quantized() {
    let golden = GoldenModel::unpack("llama");
    for relative in ["nf4", "nf4_dq"] {
        let driver = Driver::start(1);
        check(
            &driver,
            &golden.path(relative),
            &[],
            &LoadOptions::default(),
        );
    }
}

#[test]
fn in_small_pieces_by_one_and_by_several_workers() {
    let directory = decoder(2);
    for settings in SETTINGS {
        for workers in [1, 4] {
            for quantize_on in PLACES {
                let driver = Driver::start(1);
                let options = in_small_pieces(quantize_on, workers * driver.devices().len());
                check(&driver, directory.path(), settings, &options);
            }
        }
    }
}

#[test]
fn every_format_in_small_pieces() {
    let kinds = Kinds::new(Kinds::ALL);
    let expected = kinds.on_the_processor();
    for devices in [1, 2] {
        for (quantize_on, workers) in [(QuantizeOn::Cpu, 1), (QuantizeOn::Cpu, 3)]
            .into_iter()
            .chain([(QuantizeOn::Gpu, 1), (QuantizeOn::Gpu, 3)])
        {
            let driver = Driver::start(devices);
            let devices = open_devices(&[]).unwrap();
            let model = kinds.load(&devices, quantize_on, workers).unwrap();
            let context = format!("{devices:?}, on {quantize_on}, {workers} workers");
            assert!(contents(&model) == expected, "{context}");
            drop((model, devices));
            driver.clean_report(&context);
        }
    }
}

#[test]
fn beside_other_devices() {
    let kinds = Kinds::new(Kinds::ALL);
    let expected = kinds.on_the_processor();
    for quantize_on in [QuantizeOn::Cpu, QuantizeOn::Gpu] {
        let driver = Driver::start(1);
        let mut devices = open_devices(&[]).unwrap();
        devices.push(Box::new(HostDevice::cpu(None)));
        devices.push(Box::new(HostDevice::sim(0, 1 << 30)));
        let model = kinds.load(&devices, quantize_on, 2).unwrap();
        assert!(contents(&model) == expected, "{quantize_on}");
        drop((model, devices));
        driver.clean_report("mixed");
    }
}

#[test]
fn tensors_on_a_gpu_can_be_read_dequantized_and_pointed_to() {
    let driver = Driver::start(1);
    let directory = decoder(1);
    let expected = load_with_auto(directory.path(), &["cpu"], &[]);
    let model = load_with_auto(directory.path(), &["cuda:0"], &[]);
    let mut ends = Vec::new();
    for (tensor, expected) in model.tensors().zip(expected.tensors()) {
        let name = tensor.name();
        assert_eq!(
            tensor.to_float(FloatType::F32).unwrap(),
            expected.to_float(FloatType::F32).unwrap(),
            "{name}"
        );
        for kind in [PartKind::Data, PartKind::Codes, PartKind::Absmax] {
            assert!(tensor.part(kind).is_none(), "{name}");
            let part = tensor.device_part(kind);
            let read = tensor.read_part(kind).unwrap();
            assert_eq!(part.is_some(), read.is_some(), "{name}");
            assert!(expected.device_part(kind).is_none(), "{name}");
            if let (Some(part), Some(read)) = (part, read) {
                assert_eq!(part.bytes(), read.len() as u64, "{name}");
                assert_eq!(part.address().ordinal, 0, "{name}");
                assert_eq!(part.address().pointer % 256, 0, "{name}");
                ends.push((part.address().pointer, part.bytes()));
            }
        }
    }
    ends.sort_unstable();
    for pair in ends.windows(2) {
        assert!(pair[0].0 + pair[0].1 <= pair[1].0, "parts overlap");
    }
    drop(model);
    driver.clean_report("read");
}
