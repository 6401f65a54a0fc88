//! How much memory there is, and what becomes of plans for more.

use cuda_stand_in::control::Setup;
use tightfit::checkpoint::Checkpoint;
use tightfit::device::{
    Device, DeviceError, DeviceInfo, DeviceSpec, open_devices, planned_devices,
};
use tightfit::load::{
    LoadError, LoadOptions, QuantizeOn, ReserveError, Revision, load, load_reserved, reserve,
};
use tightfit::plan::Plan;
use tightfit::types::Format;
use tightfit_tests::loading::{Planned, auto, contents, load_with_auto};

use super::{Driver, Kind, Kinds, MIB, decoder, nf4, stand_in};

pub(super) fn open(specs: &[&str]) -> Vec<Box<dyn Device>> {
    let specs: Vec<_> = specs.iter().map(|spec| spec.parse().unwrap()).collect();
    open_devices(&specs).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn a_device_says_what_the_driver_says_and_no_more_than_the_user_allows() {
    let driver = Driver::start(2);
    let devices = open(&["cuda:0"]);
    let all = devices[0].info();
    assert_eq!(all.name, "cuda:0");
    assert!(all.available > 0 && all.available <= all.capacity);
    assert!(all.granularity.is_power_of_two());
    drop(devices);
    let some = open(&["cuda:0:10MiB"])[0].info();
    assert_eq!((some.capacity, some.available), (10 * MIB, 10 * MIB));
    let more = open(&["cuda:0:9999GiB"])[0].info();
    assert_eq!(more.capacity, all.capacity);
    driver.clean_report("info");
}

#[test]
fn memory_that_a_gpu_shares_with_the_host_counts_once() {
    // More than any host has: all that is free is the GPU's.
    let plain = Setup {
        devices: vec![1 << 50],
        ..Setup::default()
    };
    let old = 12_010;
    for (integrated, numa_node, version, is_shared) in [
        (false, false, plain.version, false),
        (true, false, plain.version, true),
        (false, true, plain.version, true),
        (false, false, old, false),
        (true, false, old, true),
    ] {
        let setup = Setup {
            integrated,
            numa_node,
            version,
            ..plain.clone()
        };
        let Some(driver) = stand_in("GPUs of a kind", &setup) else {
            return;
        };
        for specs in [["cuda:0", "cpu"], ["cpu", "cuda:0"], ["cpu:1MiB", "cuda:0"]] {
            let opened: Vec<DeviceInfo> = open(&specs).iter().map(|device| device.info()).collect();
            let specs = specs.map(|spec| spec.parse().unwrap());
            let planned = planned_devices(&specs).unwrap();
            let is_sized =
                |spec: &DeviceSpec| matches!(spec, DeviceSpec::Cpu { capacity: Some(_) });
            for (infos, is_told) in [(opened, false), (planned, specs.iter().any(is_sized))] {
                for info in infos {
                    // A plan is for what it is told, whatever this machine has.
                    let is_none = info.name == "cpu" && is_shared && !is_told;
                    assert_eq!(info.available == 0, is_none, "{setup:?}: {info:?}");
                }
            }
        }
        driver.report().is_clean("shared");
    }
}

#[test]
fn without_any_named_all_cuda_devices_are_used() {
    let driver = Driver::start(3);
    let names: Vec<String> = open(&[]).iter().map(|device| device.info().name).collect();
    assert_eq!(names, driver.devices());
    driver.clean_report("defaults");
}

#[test]
fn a_device_that_is_not_there_is_said_to_be_missing() {
    let driver = Driver::start(2);
    let index = driver.devices().len();
    for index in [index as u32, u32::MAX] {
        let spec = format!("cuda:{index}").parse().unwrap();
        let error = open_devices(&[spec]).unwrap_err();
        assert!(matches!(error, DeviceError::Unavailable { .. }), "{error}");
        assert!(
            error.to_string().contains(&format!("cuda:{index}")),
            "{error}"
        );
    }
    driver.clean_report("missing");
}

#[test]
fn a_device_without_virtual_memory_is_used_too() {
    let setup = Setup {
        virtual_memory: false,
        ..Setup::default()
    };
    let Some(stand_in) = stand_in("a device without virtual memory", &setup) else {
        return;
    };
    let directory = decoder(2);
    let model = load_with_auto(directory.path(), &["cuda:0"], &[]);
    let expected = load_with_auto(directory.path(), &["cpu"], &[]);
    assert!(contents(&model) == contents(&expected));
    drop(model);
    let report = stand_in.report();
    report.is_clean("plain");
    assert!(report.calls.iter().any(|call| call == "cuMemAlloc"));
    assert!(report.calls.iter().all(|call| call != "cuMemCreate"));
}

#[test]
fn a_plan_for_another_checkpoint_of_as_many_tensors_is_refused() {
    const GROWN: &[Kind] = &[
        ("bf16", "BF16", 2, &[301, 170], Format::Stored),
        ("blocks of 64", "BF16", 2, &[364, 330], nf4(64, false)),
        ("double", "F32", 4, &[257, 257], nf4(64, true)),
    ];
    let driver = Driver::start(2);
    let devices = open_devices(&[]).unwrap();
    let (planned, grown) = (Kinds::new(Kinds::FEW), Kinds::new(GROWN));
    for quantize_on in [QuantizeOn::Cpu, QuantizeOn::Gpu] {
        let options = LoadOptions::default().with_quantize_on(quantize_on);
        for (made_for, loaded) in [(&planned, &grown), (&grown, &planned)] {
            let plan = made_for.plan(&devices);
            let result = load(&loaded.checkpoint, &plan, &devices, &options);
            assert!(matches!(result, Err(LoadError::OtherPlan)), "{result:?}");
            for device in &devices {
                assert_eq!(device.usage().reserved.now, 0);
            }
        }
    }
    drop(devices);
    driver.clean_report("another checkpoint");
}

/// Asks the default policy and loads. What devices lose is lost while it is being taken.
fn place_and_load(setup: &Setup) -> Option<Result<(Plan, Vec<Revision>), ReserveError>> {
    let stand_in = stand_in("a driver that says more is free than there is", setup)?;
    let directory = decoder(12);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let devices = open(&[]);
    let result = reserve(&checkpoint, auto(), &devices, &[]).map(|placed| {
        let model = load_reserved(&checkpoint, placed.reserved, &LoadOptions::default()).unwrap();
        let expected = load_with_auto(directory.path(), &["cpu"], &[]);
        assert!(contents(&model) == contents(&expected));
        (placed.proposed.plan, placed.revisions)
    });
    for device in &devices {
        assert_eq!(device.usage().reserved.now, 0);
    }
    drop(devices);
    stand_in.report().is_clean("placed");
    Some(result)
}

#[test]
fn a_policy_is_asked_again_when_memory_is_gone_by_the_time_it_is_taken() {
    let setup = Setup {
        devices: vec![64 * MIB; 2],
        stolen: 54 * MIB,
        ..Setup::default()
    };
    let Some(result) = place_and_load(&setup) else {
        return;
    };
    let (plan, revisions) = result.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(revisions.len(), 1);
    assert_eq!(revisions[0].device, "cuda:0");
    assert_eq!(revisions[0].available, 10 * MIB);
    let sizes: Vec<u64> = plan
        .devices
        .iter()
        .map(|device| device.size.reserved)
        .collect();
    assert!(sizes[0] <= 10 * MIB && sizes[1] > sizes[0], "{sizes:?}");
}

#[test]
fn a_policy_that_finds_no_room_any_more_is_quoted_with_what_came_before() {
    let setup = Setup {
        devices: vec![64 * MIB],
        stolen: 54 * MIB,
        ..Setup::default()
    };
    let Some(result) = place_and_load(&setup) else {
        return;
    };
    let error = result.unwrap_err();
    assert!(matches!(error, ReserveError::Revised { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("cuda:0 had 10.00 MiB left"), "{text}");
}

#[test]
fn a_driver_that_says_more_is_free_than_it_gives_is_quoted() {
    let setup = Setup {
        devices: vec![64 * MIB],
        hidden: 60 * MIB,
        ..Setup::default()
    };
    let Some(result) = place_and_load(&setup) else {
        return;
    };
    let error = result.unwrap_err();
    assert!(
        matches!(
            error,
            ReserveError::Load(LoadError::Device(DeviceError::Driver { .. }))
        ),
        "{error}"
    );
    let text = error.to_string();
    for words in [
        "cuda:0",
        "cuMemCreate of ",
        "MiB",
        "CUDA_ERROR_OUT_OF_MEMORY",
    ] {
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn what_others_take_after_the_plan_is_seen_before_memory_is_taken() {
    let setup = Setup::default();
    let Some(stand_in) = stand_in("somebody who takes memory", &setup) else {
        return;
    };
    let directory = decoder(2);
    let planned = Planned::new(directory.path(), &["cuda:0"], &[]);
    stand_in.take(0, setup.devices[0] - MIB);
    let error = planned.try_load(&LoadOptions::default()).unwrap_err();
    assert!(
        matches!(
            error,
            LoadError::Device(DeviceError::OutOfMemory { have: MIB, .. })
        ),
        "{error}"
    );
    drop(planned);
    let report = stand_in.report();
    report.is_clean("taken");
    assert!(
        report
            .calls
            .iter()
            .all(|call| call != "cuMemAddressReserve")
    );
}

#[test]
fn a_load_page_locks_its_buffers_at_once_for_all_workers_and_devices() {
    let setup = Setup {
        devices: vec![64 * MIB; 2],
        ..Setup::default()
    };
    let Some(stand_in) = stand_in("its books", &setup) else {
        return;
    };
    let directory = decoder(12);
    for quantize_on in [QuantizeOn::Cpu, QuantizeOn::Gpu] {
        let planned = Planned::new(directory.path(), &["cuda:0", "cuda:1"], &[]);
        let before = stand_in.report().calls.len();
        let model = planned.load(
            &LoadOptions::default()
                .with_threads(4)
                .with_quantize_on(quantize_on),
        );
        let calls = stand_in.report().calls.split_off(before);
        let count = |name: &str| calls.iter().filter(|call| *call == name).count();
        // They are given back by the time it ends, not with the model.
        let locked = (count("cuMemHostRegister"), count("cuMemHostUnregister"));
        assert_eq!(locked, (1, 1));
        assert!(count("cuStreamCreate") >= 2, "{calls:?}");
        drop((model, planned));
    }
    stand_in.report().is_clean("page-locked");
}
