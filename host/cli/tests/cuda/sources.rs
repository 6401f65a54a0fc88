//! Weights that other methods have quantized, by whoever quantizes them to NF4: a GPU takes their codes.

use std::collections::BTreeSet;

use cuda_stand_in::control::Report;
use tempfile::TempDir;
use tightfit::checkpoint::{Checkpoint, Dequantize, OpenOptions};
use tightfit::device::{Device, HostDevice, open_devices};
use tightfit::load::{LoadOptions, QuantizeOn};
use tightfit::plan::PartKind;
use tightfit::types::Format;
use tightfit_tests::loading::{contents, tensor};
use tightfit_tests::models;
use tightfit_tests::sources::{GoldenSource, load_as};

use super::{Driver, in_small_pieces};

const PLACES: [QuantizeOn; 3] = [QuantizeOn::Cpu, QuantizeOn::Gpu, QuantizeOn::Auto];

fn open() -> Vec<Box<dyn Device>> {
    open_devices(&["cuda:0".parse().unwrap()]).unwrap()
}

/// How many launches have quantized from codes, and from elements.
fn launches(report: &Report) -> (usize, usize) {
    let count = |start| {
        let launches = report.launches.iter();
        launches.filter(|kernel| kernel.starts_with(start)).count()
    };
    (
        count("tightfit_quantize_source"),
        count("tightfit_quantize_nf4"),
    )
}

#[test]
fn golden_sources_are_what_bitsandbytes_makes_of_them() {
    for source in GoldenSource::all() {
        let checkpoint = source.open(Dequantize::All);
        let mut nonfinite = None;
        for quantize_on in PLACES {
            let driver = Driver::start(1);
            let devices = open();
            let options = LoadOptions::default()
                .with_threads(2)
                .with_quantize_on(quantize_on)
                .with_compile_from(0);
            let weights = source.weights();
            let model = load_as(&checkpoint, &devices, &weights, Format::NF4, &options);
            let context = format!("{} on {quantize_on}", source.name());
            for weight in &weights {
                let loaded = tensor(&model, weight);
                for (kind, part) in [(PartKind::Codes, "codes"), (PartKind::Absmax, "absmax")] {
                    let have = loaded.read_part(kind).unwrap().unwrap();
                    assert!(
                        have == source.nf4(weight, part),
                        "{part} of {weight}: {context}"
                    );
                }
            }
            let found = model.stats().nonfinite.clone();
            assert_eq!(*nonfinite.get_or_insert(found.clone()), found, "{context}");
            drop((model, devices));
            let Some(report) = driver.clean_report(&context) else {
                continue;
            };
            let (from_codes, from_elements) = launches(&report);
            match (quantize_on, &*source.name()) {
                (QuantizeOn::Cpu, _) => assert_eq!((from_codes, from_elements), (0, 0)),
                (QuantizeOn::Auto, _) => {}
                // Zero points, 2^128, and a plain weight beside them.
                (_, "int4_channel_asym" | "mxfp4_stack_255" | "mxfp4_stack") => {
                    assert!(from_elements > 0, "{context}");
                }
                _ => assert_eq!((from_codes, from_elements), (weights.len(), 0), "{context}"),
            }
        }
    }
}

/// Stacks of which a matrix ends with a part of a tile, or a chunk within a row.
fn stacks() -> (TempDir, Checkpoint) {
    let directory = TempDir::new().unwrap();
    let codes = |count: usize| (0..count).map(|i| (i * 7 % 113 + i / 977 % 11) as u8);
    let scales = |count: usize| (0..count).map(|i| 0.01 + (i % 17) as f32 / 100.0);
    let fp8: Vec<u8> = codes(3 * 200 * 300).collect();
    let fp8_scales: Vec<u8> = scales(3 * 2 * 3).flat_map(f32::to_le_bytes).collect();
    let mxfp4: Vec<u8> = codes(3 * 100 * 40 * 16).collect();
    let mxfp4_scales: Vec<u8> = codes(3 * 100 * 40).map(|code| 80 + code % 60).collect();
    models::write_safetensors(
        &directory.path().join("model.safetensors"),
        &[
            ("ragged", "F8_E4M3", &[3, 200, 300], &fp8),
            ("ragged_scale_inv", "F32", &[3, 2, 3], &fp8_scales),
            ("groups_blocks", "U8", &[3, 100, 40, 16], &mxfp4),
            ("groups_scales", "U8", &[3, 100, 40], &mxfp4_scales),
        ],
    );
    let options = OpenOptions::default().with_dequantize(Dequantize::All);
    let checkpoint = Checkpoint::open_with(directory.path(), &options).unwrap();
    (directory, checkpoint)
}

#[test]
fn stacks_in_small_pieces() {
    let (_directory, checkpoint) = stacks();
    let weights = BTreeSet::from(["ragged", "groups"]);
    for format in [Format::NF4, Format::NF4_DOUBLE] {
        let load = |devices: &[Box<dyn Device>], quantize_on, workers| {
            let options = in_small_pieces(quantize_on, workers);
            load_as(&checkpoint, devices, &weights, format, &options)
        };
        let host: [Box<dyn Device>; 1] = [Box::new(HostDevice::cpu(None))];
        let expected = contents(&load(&host, QuantizeOn::Cpu, 1));
        for quantize_on in PLACES {
            for workers in [1, 3] {
                let driver = Driver::start(1);
                let devices = open();
                let model = load(&devices, quantize_on, workers);
                let context = format!("{format} on {quantize_on}, {workers} workers");
                assert!(contents(&model) == expected, "{context}");
                drop((model, devices));
                let report = driver.clean_report(&context);
                if let (QuantizeOn::Gpu, Some(report)) = (quantize_on, report) {
                    // Where a chunk is of two ragged matrices it is decoded before.
                    let (from_codes, from_elements) = launches(&report);
                    assert!(from_codes > 10 && from_elements > 0, "{context}");
                }
            }
        }
    }
}
