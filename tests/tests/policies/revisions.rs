//! Devices that turn out to have less memory than they said: the policy is asked again.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use tempfile::TempDir;
use tightfit::checkpoint::{Checkpoint, TensorInfo};
use tightfit::device::{Device, DeviceError, DeviceInfo, HostDevice, Reservation};
use tightfit::load::{LoadError, LoadOptions, MAX_REVISIONS, ReserveError, load_reserved, reserve};
use tightfit::memory::{ReservationSize, Usage};
use tightfit::plan::ProposeError;
use tightfit::policy::{Answer, Description, Policy, PolicyError, Proposal, Request};
use tightfit::types::{Format, Placement};
use tightfit_tests::loading::{auto, contents, load_with_auto};
use tightfit_tests::models;

/// A device that others use too: memory that was there when it was asked about is gone later.
#[derive(Debug)]
struct Shared {
    device: HostDevice,
    /// What others have taken.
    taken: AtomicU64,
    /// They take this when it is asked about its memory for the first time, and thereafter.
    takes: [AtomicU64; 2],
    asked: AtomicUsize,
    /// Whether it fails without saying how much there is.
    fails: bool,
}

impl Shared {
    fn boxed(index: usize, capacity: u64, first: u64, then: u64) -> Box<dyn Device> {
        Box::new(Shared {
            device: HostDevice::sim(index, capacity),
            taken: AtomicU64::new(0),
            takes: [AtomicU64::new(first), AtomicU64::new(then)],
            asked: AtomicUsize::new(0),
            fails: false,
        })
    }

    fn left(&self) -> u64 {
        let taken = self.taken.load(Ordering::SeqCst);
        self.device.info().available.saturating_sub(taken)
    }
}

impl Device for Shared {
    fn info(&self) -> DeviceInfo {
        let available = self.left();
        let asked = self.asked.fetch_add(1, Ordering::SeqCst).min(1);
        let takes = self.takes[asked].load(Ordering::SeqCst);
        self.taken.fetch_add(takes, Ordering::SeqCst);
        DeviceInfo {
            available,
            ..self.device.info()
        }
    }

    fn reserve(&self, size: ReservationSize) -> Result<Box<dyn Reservation>, DeviceError> {
        if self.fails {
            return Err(DeviceError::Refused {
                device: "sim:0".to_owned(),
                call: "reserve",
                bytes: size.reserved,
                source: std::io::ErrorKind::Other.into(),
            });
        }
        if size.reserved > self.left() {
            return Err(DeviceError::OutOfMemory {
                device: "sim:0".to_owned(),
                need: size.reserved,
                have: self.left(),
            });
        }
        self.device.reserve(size)
    }

    fn usage(&self) -> Usage {
        self.device.usage()
    }
}

const MIB: u64 = 1 << 20;

/// Twelve layers of 2.25 MiB in NF4, and 1 MiB outside them.
fn model() -> (TempDir, Checkpoint) {
    let directory = TempDir::new().unwrap();
    models::write_decoder(directory.path(), 12, 512);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    (directory, checkpoint)
}

fn nothing_is_reserved(devices: &[Box<dyn Device>]) {
    for device in devices {
        assert_eq!(device.usage().reserved.now, 0, "{device:?}");
    }
}

#[test]
fn a_device_with_less_than_it_said_gets_less() {
    let (directory, checkpoint) = model();
    // Half of the model is planned for the first device, which then has room for a fifth.
    let devices = [
        Shared::boxed(0, 64 * MIB, 58 * MIB, 0),
        Box::new(HostDevice::sim(1, 64 * MIB)),
    ];
    let placed = reserve(&checkpoint, auto(), &devices, &[]).unwrap();
    let [revision] = placed.revisions.as_slice() else {
        panic!("{:?}", placed.revisions);
    };
    assert_eq!(
        (revision.device.as_str(), revision.available),
        ("sim:0", 6 * MIB)
    );
    assert!(revision.needed > 12 * MIB, "{revision:?}");
    let planned: Vec<u64> = placed
        .proposed
        .plan
        .devices
        .iter()
        .map(|d| d.size.reserved)
        .collect();
    assert!(planned[0] > 0 && planned[0] <= 6 * MIB, "{planned:?}");

    let model = load_reserved(&checkpoint, placed.reserved, &LoadOptions::default()).unwrap();
    for (device, planned) in devices.iter().zip(planned) {
        assert_eq!(device.usage().reserved.peak, planned);
    }
    let elsewhere = load_with_auto(directory.path(), &["sim:64MiB"], &[]);
    assert_eq!(contents(&model), contents(&elsewhere));
    drop(model);
    nothing_is_reserved(&devices);
}

#[test]
fn headroom_that_is_gone_is_a_reason_too() {
    let (_directory, checkpoint) = model();
    let settings = [("reserve".to_owned(), "1MiB".to_owned())];
    // There is still room for the weights, but no longer for the reserve beside them.
    let devices = [
        Shared::boxed(0, 32 * MIB, 43 * MIB / 2, 0),
        Box::new(HostDevice::sim(1, 64 * MIB)),
    ];
    let placed = reserve(&checkpoint, auto(), &devices, &settings).unwrap();
    assert_eq!(placed.revisions.len(), 1, "{:?}", placed.revisions);
    assert!(placed.revisions[0].needed - MIB < 21 * MIB / 2);
    assert_eq!(placed.revisions[0].available, 21 * MIB / 2);
    let first = &placed.proposed.plan.devices[0];
    assert!(first.size.reserved > 0 && first.size.reserved + first.headroom <= 21 * MIB / 2);
}

#[test]
fn a_refusal_of_the_revision_says_why_it_was_asked_for() {
    let (_directory, checkpoint) = model();
    let devices = [Shared::boxed(0, 64 * MIB, 60 * MIB, 0)];
    let error = reserve(&checkpoint, auto(), &devices, &[]).unwrap_err();
    let ReserveError::Revised { revisions, source } = &error else {
        panic!("{error:?}");
    };
    assert_eq!(revisions.len(), 1);
    assert!(matches!(
        **source,
        ProposeError::Policy(PolicyError::Refused { .. })
    ));
    let text = error.to_string();
    for word in ["sim:0 had 4.000 MiB left", "refuses", "missing"] {
        assert!(text.contains(word), "{text}");
    }
    nothing_is_reserved(&devices);
}

/// Fills the first device with as many tensors as there is room for, and counts how often it is
/// asked.
struct Filling(AtomicUsize);

impl Policy for Filling {
    fn describe(&self) -> Result<Description, PolicyError> {
        Ok(Description {
            name: "filling".to_owned(),
            version: "1.0.0".to_owned(),
            settings: vec![],
        })
    }

    fn plan(&self, request: &Request<'_>) -> Result<Answer, PolicyError> {
        let asked = self.0.fetch_add(1, Ordering::SeqCst);
        assert_eq!(request.failure.is_some(), asked > 0);
        if let Some(failure) = request.failure {
            assert_eq!(failure.available, request.devices[0].available);
            assert!(failure.needed > failure.available);
        }
        let mut room = request.devices[0].available;
        let place = |tensor: &TensorInfo| {
            let fits = tensor.bytes <= room;
            room -= if fits { tensor.bytes } else { 0 };
            Placement {
                device: Some(u32::from(!fits)),
                format: Format::Stored,
            }
        };
        Ok(Answer {
            proposal: Proposal {
                placements: request.tensors.iter().map(place).collect(),
                headroom: vec![0; 2],
                slices: Vec::new(),
            },
            fuel: None,
        })
    }
}

#[test]
fn a_device_that_shrinks_every_time_is_given_up() {
    let (_directory, checkpoint) = model();
    let devices = [
        Shared::boxed(0, 60 * MIB, 8 * MIB, 8 * MIB),
        Box::new(HostDevice::sim(1, 1024 * MIB)),
    ];
    let policy = Filling(AtomicUsize::new(0));
    let error = reserve(&checkpoint, &policy, &devices, &[]).unwrap_err();
    assert!(
        matches!(
            error,
            ReserveError::Load(LoadError::Device(DeviceError::OutOfMemory { .. }))
        ),
        "{error:?}"
    );
    assert_eq!(policy.0.into_inner(), 1 + MAX_REVISIONS);
    nothing_is_reserved(&devices);
}

#[test]
fn a_failure_that_is_not_about_memory_is_final() {
    let (_directory, checkpoint) = model();
    let devices: [Box<dyn Device>; 1] = [Box::new(Shared {
        device: HostDevice::sim(0, 64 * MIB),
        taken: AtomicU64::new(0),
        takes: [AtomicU64::new(0), AtomicU64::new(0)],
        asked: AtomicUsize::new(0),
        fails: true,
    })];
    let error = reserve(&checkpoint, auto(), &devices, &[]).unwrap_err();
    assert!(
        matches!(
            error,
            ReserveError::Load(LoadError::Device(DeviceError::Refused { .. }))
        ),
        "{error:?}"
    );
}
