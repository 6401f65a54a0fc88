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
fn room_for_products_is_reserved_whoever_asks_for_it() {
    let bench = Bench::new();
    let devices: Vec<Box<dyn Device>> = vec![Box::new(HostDevice::sim(0, 256 << 20))];
    let mut settings = bench.settings.clone();
    let ask = |settings: &[(String, String)], options: &PlanOptions| {
        reserve_with(&bench.checkpoint, auto(), &devices, settings, options).unwrap()
    };
    let by_option = ask(&settings, &PlanOptions::default().with_rows(16)).proposed;
    settings.push(("rows".to_owned(), "16".to_owned()));
    let placed = ask(&settings, &PlanOptions::default());
    assert_eq!(placed.proposed.plan, by_option.plan);
    let rows = ("rows".to_owned(), "16".to_owned());
    assert!(placed.proposed.settings.contains(&rows));
    assert!(!by_option.settings.contains(&rows));

    let device = placed.proposed.plan.devices[0].clone();
    assert!(device.products > 1 << 14 && device.products < 16 << 20);
    // What the policy leaves stays free beside it.
    assert_eq!((device.tail, device.headroom), (device.products, RESERVE));
    let report = Report::of_plan(&bench.checkpoint, &placed.proposed, DEFAULT_STAGING);
    assert_eq!(report.devices[0].tail, device.tail);
    assert_eq!(report.devices[0].fill.headroom, device.tail + RESERVE);
    let model = load_reserved(&bench.checkpoint, placed.reserved, &LoadOptions::default()).unwrap();
    assert_eq!(devices[0].usage().reserved.peak, device.size.reserved);
    assert_eq!(model.tail(0).unwrap().capacity(), device.products);

    for value in ["", "many", "-1", "1.5"] {
        let settings = [("rows".to_owned(), value.to_owned())];
        let infos = [Bench::device(1 << 30)];
        let error = propose(&bench.checkpoint, auto(), &infos, &settings).unwrap_err();
        let text = error.to_string();
        assert_eq!(
            text,
            format!("setting 'rows': '{value}' is not a number of rows")
        );
    }
}

#[test]
fn a_policy_is_not_offered_what_products_will_need() {
    let bench = Bench::new();
    for reserve_headroom in [false, true] {
        let options = PlanOptions::default()
            .with_rows(64)
            .with_reserved_headroom(reserve_headroom);
        let ask = |capacity| {
            let devices = [Bench::device(capacity)];
            propose_with(
                &bench.checkpoint,
                auto(),
                &devices,
                &bench.settings,
                &options,
            )
        };
        let reserved = ask(256 << 20).unwrap().plan.devices[0].size.reserved;
        let mut fits = 0;
        let least = reserved - (1 << 20);
        for available in (least..reserved + (8 << 20)).step_by(100_000) {
            match ask(available) {
                Ok(proposed) => {
                    assert!(proposed.plan.devices[0].size.reserved <= available);
                    fits += 1;
                }
                Err(ProposeError::Policy(PolicyError::Refused { .. })) => {}
                Err(other) => panic!("{other}"),
            }
        }
        assert!(fits > 0);
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
