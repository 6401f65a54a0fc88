//! A policy's headroom as memory of the application's own: reserved with the weights, reported, and
//! never more than there is.

use tempfile::TempDir;
use tightfit::checkpoint::Checkpoint;
use tightfit::device::{Device, DeviceInfo, HostDevice};
use tightfit::load::{LoadOptions, load_reserved, reserve_with};
use tightfit::memory::DEFAULT_STAGING;
use tightfit::plan::{PlanOptions, ProposeError, propose, propose_with};
use tightfit::policy::PolicyError;
use tightfit::report::Report;
use tightfit_tests::loading::auto;
use tightfit_tests::models;

/// No multiple of anything.
const RESERVE: u64 = 1_000_001;

struct Bench {
    _directory: TempDir,
    checkpoint: Checkpoint,
    settings: Vec<(String, String)>,
}

impl Bench {
    fn new() -> Bench {
        let directory = TempDir::new().unwrap();
        models::write_decoder(directory.path(), 3, 256);
        Bench {
            checkpoint: Checkpoint::open(directory.path()).unwrap(),
            _directory: directory,
            settings: vec![("reserve".to_owned(), RESERVE.to_string())],
        }
    }

    fn device(capacity: u64) -> DeviceInfo {
        HostDevice::sim(0, capacity).info()
    }
}

fn with_tail() -> PlanOptions {
    PlanOptions::default().with_reserved_headroom(true)
}

#[test]
fn what_a_policy_leaves_free_is_reserved_and_reported() {
    let bench = Bench::new();
    let devices: Vec<Box<dyn Device>> = vec![
        Box::new(HostDevice::sim(0, 64 << 20)),
        Box::new(HostDevice::sim(1, 64 << 20)),
    ];
    let placed = reserve_with(
        &bench.checkpoint,
        auto(),
        &devices,
        &bench.settings,
        &with_tail(),
    )
    .unwrap();
    let report = Report::of_plan(&bench.checkpoint, &placed.proposed, DEFAULT_STAGING);
    let plan = placed.reserved.plan().clone();
    let infos: Vec<DeviceInfo> = devices.iter().map(|device| device.info()).collect();
    let model = load_reserved(&bench.checkpoint, placed.reserved, &LoadOptions::default()).unwrap();
    for (index, (device, reported)) in plan.devices.iter().zip(&report.devices).enumerate() {
        let tail = RESERVE.next_multiple_of(256);
        assert_eq!((device.tail, reported.tail), (tail, tail));
        assert_eq!((device.headroom, reported.headroom), (0, 0));
        let reserved = (device.size.padded + tail).next_multiple_of(4096);
        assert_eq!(reported.reserved, reserved);
        assert_eq!(devices[index].usage().reserved.peak, reserved);
        assert_eq!(infos[index].available, (64 << 20) - reserved);
        // It is shown as what it is for, and every byte of the device once.
        assert_eq!(reported.fill.headroom, tail);
        let all: u64 = reported.fill.parts().iter().map(|(_, bytes)| bytes).sum();
        assert_eq!(all, 64 << 20);
        assert_eq!(model.tail(index).unwrap().capacity(), tail);
    }
}

#[test]
fn a_policy_is_offered_what_weights_and_tail_can_be_rounded_up_in() {
    let bench = Bench::new();
    let ask = |capacity| {
        let devices = [Bench::device(capacity)];
        propose_with(
            &bench.checkpoint,
            auto(),
            &devices,
            &bench.settings,
            &with_tail(),
        )
    };
    let plan = ask(64 << 20).unwrap().plan;
    let reserved = plan.devices[0].size.reserved;
    // Around the least that there must be, the policy knows what fits, and is not caught by the plan.
    let mut fits = 0;
    for available in (reserved - 4096..=reserved + 8192).step_by(512) {
        match ask(available) {
            Ok(proposed) => {
                let device = &proposed.plan.devices[0];
                assert_eq!(device.size.reserved, reserved);
                // As it is, not as it was offered.
                assert_eq!(device.device.available, available);
                fits += 1;
            }
            Err(ProposeError::Policy(PolicyError::Refused { .. })) => {
                assert!(fits == 0 && available < reserved + 4096, "{available}");
            }
            Err(other) => panic!("{other}"),
        }
    }
    assert!(fits > 0);
    // Unless it is asked for, it is left free.
    let devices = [Bench::device(64 << 20)];
    let free = propose(&bench.checkpoint, auto(), &devices, &bench.settings).unwrap();
    assert_eq!(
        (free.plan.devices[0].tail, free.plan.devices[0].headroom),
        (0, RESERVE)
    );
}
