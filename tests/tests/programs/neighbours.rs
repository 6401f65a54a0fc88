//! Programs in one process: none sees anything of another.

use std::sync::Arc;

use tightfit::device::{Device, HostDevice};
use tightfit_tests::programs::{Bench, hostile, run};

/// Two programs' places on the same device.
fn two() -> [Bench; 2] {
    let devices: Arc<[Box<dyn Device>]> = Arc::new([
        Box::new(HostDevice::sim(0, 64 << 20)) as Box<dyn Device>,
        Box::new(HostDevice::sim(1, 64 << 20)),
    ]);
    [
        Bench::with_devices(Arc::clone(&devices), 4 << 20),
        Bench::with_devices(devices, 2 << 20),
    ]
}

#[test]
fn what_one_has_does_not_show_in_what_another_is_told() {
    let [one, other] = two();
    let alone = run(hostile(), other.context(), &["look-around"]).unwrap();
    // As if the one were in the middle of its work.
    let busy = one.devices[0].reserve(tightfit::memory::ReservationSize {
        requested: 4 << 20,
        padded: 4 << 20,
        reserved: 4 << 20,
    });
    let beside = run(hostile(), other.context(), &["look-around"]).unwrap();
    drop(busy);
    assert_eq!(alone, beside);
}

#[test]
fn what_is_taken_after_a_program_was_started_does_not_show() {
    let [_, mut other] = two();
    // Nothing but the devices bounds it.
    other.quota = u64::MAX;
    let alone = run(hostile(), other.context(), &["look-around"]).unwrap();
    let context = other.context();
    let busy = other.devices[0].reserve(tightfit::memory::ReservationSize {
        requested: 4 << 20,
        padded: 4 << 20,
        reserved: 4 << 20,
    });
    let beside = run(hostile(), context, &["look-around"]).unwrap();
    drop(busy);
    assert_eq!(alone, beside);
}

#[test]
fn memory_that_another_has_written_is_zeros() {
    let [one, other] = two();
    for byte in ["1", "255"] {
        assert_eq!(
            one.answer(hostile(), &["scribble", byte]),
            format!("[{byte}]")
        );
        assert_eq!(other.answer(hostile(), &["zeros", "3"]), "zeros");
    }
}

#[test]
fn programs_at_the_same_time_stay_apart() {
    let [one, other] = two();
    let work = |bench: &Bench, arguments: &[&str]| {
        for _ in 0..5 {
            run(hostile(), bench.context(), arguments).unwrap_or_else(|error| panic!("{error}"));
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| work(&one, &["scribble", "165"]));
        scope.spawn(|| work(&other, &["zeros", "4"]));
        scope.spawn(|| work(&one, &["load-and-forget"]));
        scope.spawn(|| work(&other, &["many-small", "1000"]));
        // One that dies has the others go on.
        for _ in 0..5 {
            run(hostile(), one.context(), &["panic-with-model"]).unwrap_err();
        }
    });
    one.is_unharmed();
}
