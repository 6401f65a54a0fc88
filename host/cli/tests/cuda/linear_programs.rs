//! Programs that quantize and multiply on a GPU: the same bytes as on the processor, faults, and quotas.

use cuda_stand_in::control::{Setup, StandIn};
use tightfit::device::{Device, HostDevice};
use tightfit_tests::programs::{Bench, hostile, run};

use super::memory::open;
use super::{Driver, MIB, stand_in};

/// A GPU, and the second device that the hostile program counts on.
fn bench(quota: u64) -> Bench {
    Bench::with_devices(open(&["cuda:0", "sim:64MiB"]).into(), quota)
}

fn on_the_processor() -> Bench {
    let device = |index| Box::new(HostDevice::sim(index, 64 * MIB)) as Box<dyn Device>;
    Bench::with_devices((0..2).map(device).collect(), 20 * MIB)
}

/// What does not depend on the order of sums.
const SAME: [&[&str]; 14] = [
    &["quantize-all"],
    &["multiply", "0"],
    &["multiply", "1"],
    &["rows", "0"],
    &["list", "300"],
    &["experts-of-nobody"],
    &["one-of-many-is-bad"],
    &["free-and-multiply"],
    &["unload-and-multiply"],
    &["overwrite-after-multiply"],
    &["read-what-was-not-written"],
    &["hoard-weights", "5000"],
    &["weight-of-model", "2"],
    &["finish-nothing"],
];

#[test]
fn a_gpu_gives_what_the_processor_gives() {
    let driver = Driver::start(1);
    let on_gpu = bench(20 * MIB);
    for arguments in SAME {
        let expected = on_the_processor().answer(hostile(), arguments);
        assert_eq!(
            on_gpu.answer(hostile(), arguments),
            expected,
            "{arguments:?}"
        );
    }
    drop(on_gpu);
    if let Some(report) = driver.clean_report("programs that multiply") {
        let launched = |kernel: &str| report.launches.iter().any(|name| name.starts_with(kernel));
        for kernel in [
            "tightfit_quantize_nf4",
            "tightfit_dequantize_f16",
            "tightfit_quantize_absmax",
            "tightfit_dequantize_absmax",
            "tightfit_linear",
            "tightfit_experts",
        ] {
            assert!(launched(kernel), "{kernel}");
        }
    }
}

#[test]
fn a_gpu_refuses_what_the_processor_refuses() {
    let driver = Driver::start(1);
    let on_gpu = bench(20 * MIB);
    for arguments in [
        &["weight", "128,129", "64", "0", "0"][..],
        &["weight", "0,64", "64", "0", "0"],
        &["weight", "8,64", "64", "0", "2"],
        &["weight", "4097,1,64", "64", "0", "0"],
        &["weight-between-devices"],
        &["operand", "input", "4"],
        &["operand", "experts", "2"],
        &["operand-elsewhere", "output"],
        &["overlap", "input"],
        &["overlap", "bias"],
        &["overlap", "experts"],
        &["overlap", "codes"],
        &["overlap", "absmax"],
        &["experts-missing"],
        &["experts-unasked"],
        &["float", "i64"],
        &["weight-of-model", "3"],
        &["rows", "4294967295"],
    ] {
        let expected = on_the_processor().told(hostile(), arguments);
        assert_eq!(on_gpu.told(hostile(), arguments), expected, "{arguments:?}");
    }
    on_gpu.failure(hostile(), &["panic-while-queued"]);
    drop(on_gpu);
    driver.clean_report("programs that are refused");
}

#[test]
fn what_products_need_beside_their_operands_is_told_and_counted_in_the_quota() {
    let driver = Driver::start(1);
    let granularity = CudaGranularity::ask();
    let enough = bench(20 * MIB);
    let need = ["scratch", "0"];
    assert_eq!(enough.answer(hostile(), &need), "true true true");
    // Operands, of 147 KiB, fit, and what the kernels work in does not fit beside them.
    let short = bench(granularity.0);
    let rest = (granularity.0 - (160 << 10)).to_string();
    let told = short.told(hostile(), &["scratch", &rest]);
    assert!(told.starts_with("Error::QuotaExceeded"), "{told}");
    drop((enough, short));
    driver.clean_report("programs with too little memory to work in");
}

/// What memory of the GPU is a multiple of.
struct CudaGranularity(u64);

impl CudaGranularity {
    fn ask() -> CudaGranularity {
        CudaGranularity(open(&["cuda:0"])[0].info().granularity)
    }
}

#[test]
fn without_room_for_a_number_the_processor_quantizes() {
    let driver = Driver::start(1);
    let granularity = CudaGranularity::ask().0;
    let tight = bench(granularity);
    let expected = on_the_processor().answer(hostile(), &["quantize-in", &granularity.to_string()]);
    let bytes = granularity.to_string();
    assert_eq!(tight.answer(hostile(), &["quantize-in", &bytes]), expected);
    drop(tight);
    driver.clean_report("a quota that is used up");
}

#[test]
fn whichever_call_fails_a_program_is_told_or_ended_and_others_are_unharmed() {
    let one = || Setup {
        devices: vec![64 * MIB],
        ..Setup::default()
    };
    let Some(driver) = stand_in("a driver that fails", &one()) else {
        return;
    };
    let outcome = || {
        let bench = bench(20 * MIB);
        let outcome = run(hostile(), bench.context(), &["multiply", "0"]);
        for device in bench.devices.iter() {
            assert_eq!(device.usage().reserved.now, 0, "{device:?}");
        }
        outcome
            .map(|outcome| outcome.answer)
            .map_err(|error| error.to_string())
    };
    assert_eq!(outcome(), Ok("true true 0".to_owned()));
    let calls = driver.report().calls;
    drop(driver);
    // Of many calls that are the same one after the other, some.
    let (mut failed, mut last) = (0, "");
    let step = calls.len() / 60 + 1;
    for (index, call) in calls.iter().enumerate() {
        if index % step != 0 && call == last {
            continue;
        }
        last = call;
        let driver = StandIn::start(&Setup {
            fail_at: Some(index as u64 + 1),
            ..one()
        });
        let result =
            std::thread::scope(|scope| scope.spawn(|| std::panic::catch_unwind(outcome)).join());
        let report = driver.report();
        let what = format!("{call}, call {}", index + 1);
        // Devices that cannot be opened end the test's own setup.
        if let Ok(Ok(result)) = result {
            match result {
                Ok(answer) => assert_eq!(answer, "true true 0", "{what}"),
                Err(_) => failed += 1,
            }
            assert!(report.leaks.is_empty(), "{what}: {:?}", report.leaks);
        }
        assert!(report.faults.is_empty(), "{what}: {:?}", report.faults);
    }
    assert!(failed > 20, "only {failed} calls mattered");
}
