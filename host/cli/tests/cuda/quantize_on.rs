//! Who quantizes, what memory that takes, and what is found on the way.

use cuda_stand_in::control::{Setup, StandIn};
use tightfit::device::open_devices;
use tightfit::load::{LoadError, QuantizeOn};
use tightfit::model::Model;
use tightfit::types::Format;
use tightfit_kernels::{Isa, Kernels};
use tightfit_tests::loading::contents;

use super::{Driver, Kind, Kinds, MIB, in_small_pieces, nf4, stand_in};

/// Plain tensors that leave room for kernels to work in.
const ROOMY: &[Kind] = &[
    ("plain", "BF16", 2, &[2048, 1024], Format::Stored),
    ("single", "BF16", 2, &[257, 1030], nf4(64, false)),
    ("half", "F16", 2, &[300, 331], nf4(128, false)),
    ("double", "F32", 4, &[511, 640], nf4(64, true)),
    ("another", "BF16", 2, &[640, 511], nf4(64, true)),
    ("third", "BF16", 2, &[70, 511], nf4(32, true)),
];

/// No plain tensor at all.
const QUANTIZED: &[Kind] = &[
    ("single", "BF16", 2, &[512, 1024], nf4(64, false)),
    ("double", "BF16", 2, &[511, 640], nf4(64, true)),
];

/// Pages so small that nothing is left over behind the last tensor.
fn small_pages() -> Setup {
    Setup {
        devices: vec![16 * MIB],
        granularity: 4096,
        ..Setup::default()
    }
}

fn quantized_bytes(kinds: &Kinds) -> u64 {
    let tensors = kinds.checkpoint.tensors().iter();
    let quantized = tensors.filter(|tensor| {
        let kind = kinds.kinds.iter().find(|kind| kind.0 == tensor.name);
        matches!(kind, Some((.., Format::Nf4 { .. })))
    });
    quantized.map(|tensor| tensor.bytes).sum()
}

/// Bytes quantized by the processor and by devices.
fn sides(model: &Model) -> (u64, u64) {
    let quantized = &model.stats().quantized_on;
    (
        quantized.iter().map(|bytes| bytes.by_host).sum(),
        quantized.iter().map(|bytes| bytes.by_device).sum(),
    )
}

#[test]
fn the_gpu_works_where_plain_tensors_go_and_the_peak_is_the_plan() {
    let kinds = Kinds::new(ROOMY);
    let expected = kinds.on_the_processor();
    for workers in [1, 2, 5] {
        let driver = Driver::start(1);
        let devices = open_devices(&["cuda:0".parse().unwrap()]).unwrap();
        let plan = kinds.plan(&devices);
        let model = kinds.load(&devices, QuantizeOn::Gpu, workers).unwrap();
        assert!(contents(&model) == expected, "{workers} workers");
        assert_eq!(sides(&model), (0, quantized_bytes(&kinds)));
        let reserved = devices[0].usage().reserved;
        assert_eq!(reserved.peak, plan.devices[0].size.reserved);
        drop((model, devices));
        if let Some(report) = driver.clean_report("within") {
            assert_eq!(report.peaks, [reserved.peak]);
        }
    }
}

#[test]
fn without_room_in_the_plan_the_gpu_works_beside_it_and_that_is_counted() {
    let kinds = Kinds::new(QUANTIZED);
    let expected = kinds.on_the_processor();
    let Some(stand_in) = stand_in("small pages", &small_pages()) else {
        return;
    };
    let devices = open_devices(&[]).unwrap();
    let planned = kinds.plan(&devices).devices[0].size.reserved;
    let model = kinds.load(&devices, QuantizeOn::Gpu, 2).unwrap();
    assert!(contents(&model) == expected);
    assert_eq!(sides(&model), (0, quantized_bytes(&kinds)));
    let reserved = devices[0].usage().reserved;
    // Two workers' buffers of 64 KiB are the least of it, and all of it is gone.
    assert!(reserved.peak >= planned + (128 << 10), "{reserved:?}");
    assert_eq!(reserved.now, planned);
    drop((model, devices));
    let report = stand_in.report();
    report.is_clean("beside");
    assert_eq!(report.peaks, [reserved.peak]);
}

#[test]
fn auto_never_takes_more_than_the_plan() {
    let kinds = Kinds::new(QUANTIZED);
    let Some(stand_in) = stand_in("small pages", &small_pages()) else {
        return;
    };
    let devices = open_devices(&[]).unwrap();
    let planned = kinds.plan(&devices).devices[0].size.reserved;
    let options = in_small_pieces(QuantizeOn::Auto, 2).with_compile_from(0);
    let model = kinds.load_with(&devices, &options).unwrap();
    assert_eq!(sides(&model), (quantized_bytes(&kinds), 0));
    assert_eq!(devices[0].usage().reserved.peak, planned);
    drop((model, devices));
    let report = stand_in.report();
    report.is_clean("auto");
    assert_eq!(report.peaks, [planned]);
}

#[test]
fn no_memory_for_the_gpu_to_work_in_is_an_error_that_auto_does_not_have() {
    let kinds = Kinds::new(QUANTIZED);
    let Some(stand_in) = stand_in("small pages", &small_pages()) else {
        return;
    };
    let devices = open_devices(&[]).unwrap();
    let planned = kinds.plan(&devices).devices[0].size.reserved;
    // Nothing beyond the plan.
    stand_in.take(0, 16 * MIB - planned);
    let error = kinds.load(&devices, QuantizeOn::Gpu, 1).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, LoadError::Device(_)), "{text}");
    assert!(text.contains("cuda:0 has too little memory"), "{text}");
    assert_eq!(devices[0].usage().reserved.now, 0);
    drop(kinds.load(&devices, QuantizeOn::Auto, 1).unwrap());
    drop(devices);
    stand_in.report().is_clean("no memory");
}

#[test]
fn auto_gives_both_their_share_once_the_kernels_are_there() {
    let kinds = Kinds::new(ROOMY);
    let expected = kinds.on_the_processor();
    let driver = Driver::start(1);
    let devices = open_devices(&["cuda:0".parse().unwrap()]).unwrap();
    // Has them compiled.
    drop(kinds.load(&devices, QuantizeOn::Gpu, 1).unwrap());
    // Without vectors the processor is not left alone with them, nor left the first.
    let options = in_small_pieces(QuantizeOn::Auto, 3);
    let options = options.with_kernels(Kernels::new(Isa::Portable).unwrap());
    let model = kinds.load_with(&devices, &options).unwrap();
    assert!(contents(&model) == expected);
    let (by_host, by_device) = sides(&model);
    assert!(by_host > 0 && by_device > 0, "{by_host}, {by_device}");
    assert_eq!(by_host + by_device, quantized_bytes(&kinds));
    drop((model, devices));
    driver.clean_report("both");
}

#[test]
fn auto_does_not_have_kernels_compiled_for_little() {
    let kinds = Kinds::new(ROOMY);
    let Some(stand_in) = stand_in("its books", &Setup::default()) else {
        return;
    };
    let devices = open_devices(&[]).unwrap();
    let model = kinds.load(&devices, QuantizeOn::Auto, 1).unwrap();
    assert_eq!(sides(&model), (quantized_bytes(&kinds), 0));
    drop((model, devices));
    let report = stand_in.report();
    report.is_clean("little");
    assert!(report.calls.iter().all(|call| call != "cuModuleLoadData"));
}

/// A driver that cannot compile the kernels.
fn without_kernels() -> Option<StandIn> {
    let setup = Setup {
        refuses_modules: true,
        ..Setup::default()
    };
    stand_in("a driver that refuses modules", &setup)
}

#[test]
fn a_driver_that_cannot_compile_the_kernels_is_quoted() {
    let kinds = Kinds::new(ROOMY);
    let Some(stand_in) = without_kernels() else {
        return;
    };
    let devices = open_devices(&[]).unwrap();
    let error = kinds.load(&devices, QuantizeOn::Gpu, 1).unwrap_err();
    let text = error.to_string();
    for words in [
        "cuda:0",
        "cuModuleLoadData",
        "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
    ] {
        assert!(text.contains(words), "{text}");
    }
    assert_eq!(devices[0].usage().reserved.now, 0);
    drop(devices);
    stand_in.report().is_clean("not compiled");
}

#[test]
fn where_the_kernels_cannot_be_compiled_auto_uses_the_processor() {
    let kinds = Kinds::new(ROOMY);
    let expected = kinds.on_the_processor();
    let Some(stand_in) = without_kernels() else {
        return;
    };
    let devices = open_devices(&[]).unwrap();
    let options = in_small_pieces(QuantizeOn::Auto, 2).with_compile_from(0);
    let model = kinds.load_with(&devices, &options).unwrap();
    assert!(contents(&model) == expected);
    assert_eq!(sides(&model), (quantized_bytes(&kinds), 0));
    drop((model, devices));
    let report = stand_in.report();
    report.is_clean("refused");
    assert!(report.calls.iter().any(|call| call == "cuModuleLoadData"));
}

/// Replaces elements of a bf16 tensor by what NF4 cannot hold.
fn spoil(bytes: &mut [u8], elements: &[usize]) {
    for (index, element) in elements.iter().enumerate() {
        // Infinity, and NaN.
        let value: u16 = [0x7f80, 0xffc0][index % 2];
        bytes[2 * element..][..2].copy_from_slice(&value.to_le_bytes());
    }
}

#[test]
fn infinities_and_nan_are_counted_by_whoever_quantizes() {
    let kinds = Kinds::edited(ROOMY, |name, bytes| match name {
        // Two of them in one block, others in the first and last block and in other chunks.
        "single" => spoil(bytes, &[0, 64, 65, 100_000, 257 * 1030 - 1]),
        "third" => spoil(bytes, &[31, 32]),
        _ => {}
    });
    let expected = kinds.on_the_processor();
    let driver = Driver::start(2);
    let devices = open_devices(&[]).unwrap();
    for quantize_on in [QuantizeOn::Cpu, QuantizeOn::Gpu, QuantizeOn::Auto] {
        let model = kinds.load(&devices, quantize_on, 2).unwrap();
        assert!(contents(&model) == expected, "{quantize_on}");
        let found: Vec<(&str, u64)> = model
            .stats()
            .nonfinite
            .iter()
            .map(|&(tensor, blocks)| (&*kinds.checkpoint.tensors()[tensor].name, blocks))
            .collect();
        assert_eq!(found, [("single", 4), ("third", 2)], "{quantize_on}");
        drop(model);
        let strict = in_small_pieces(quantize_on, 2 * devices.len()).with_strict(true);
        let error = kinds.load_with(&devices, &strict).unwrap_err();
        assert!(matches!(error, LoadError::NonFinite { .. }), "{error}");
        for device in &devices {
            assert_eq!(device.usage().reserved.now, 0);
        }
    }
    drop(devices);
    driver.clean_report("non-finite");
}

#[test]
fn several_models_on_one_device_share_its_kernels() {
    let kinds = Kinds::new(ROOMY);
    let expected = kinds.on_the_processor();
    let driver = Driver::start(1);
    let devices = open_devices(&["cuda:0".parse().unwrap()]).unwrap();
    let models: Vec<Model> = (0..3)
        .map(|_| kinds.load(&devices, QuantizeOn::Gpu, 2).unwrap())
        .collect();
    for model in &models {
        assert!(contents(model) == expected);
    }
    drop((models, devices));
    if let Some(report) = driver.clean_report("several") {
        let loads = report
            .calls
            .iter()
            .filter(|call| *call == "cuModuleLoadData");
        assert_eq!(loads.count(), 1);
    }
}
