//! Policies that fail, lie or attack: each is one typed error, and nothing else comes to harm.

mod answers;
mod damaged;
mod determinism;
mod empty_wasi;
mod formats;
mod limits;
mod modules;
mod parts;
mod revisions;
mod slices;
mod traps;
mod worlds;

use tempfile::TempDir;
use tightfit::checkpoint::Checkpoint;
use tightfit::device::{Device, DeviceInfo, open_devices};
use tightfit::memory::Usage;
use tightfit::plan::{ProposeError, Proposed, propose};
use tightfit::policy::{Policy, PolicyError, Refusal, Request};
use tightfit_tests::failures::failure_of;
use tightfit_tests::loading::auto;
use tightfit_tests::{guests, models};
use tightfit_wasm::policy::WasmPolicy;
use tightfit_wasm::sandbox::{GuestFailure, Limits};

/// A checkpoint and devices for a policy to do its worst to.
struct Bench {
    checkpoint: Checkpoint,
    devices: Vec<Box<dyn Device>>,
    _directory: TempDir,
}

impl Bench {
    /// With room for everything.
    fn new() -> Bench {
        Bench::with_device("sim:64MiB")
    }

    fn with_device(device: &str) -> Bench {
        let directory = TempDir::new().unwrap();
        models::write_awkward(directory.path());
        Bench {
            checkpoint: Checkpoint::open(directory.path()).unwrap(),
            devices: open_devices(&[device.parse().unwrap()]).unwrap(),
            _directory: directory,
        }
    }

    fn infos(&self) -> Vec<DeviceInfo> {
        self.devices.iter().map(|device| device.info()).collect()
    }

    /// Asks the policy for a plan, with this behavior where one is given.
    fn propose(&self, policy: &dyn Policy, behavior: &str) -> Result<Proposed, ProposeError> {
        let settings = match behavior {
            "" => vec![],
            _ => vec![("behavior".to_owned(), behavior.to_owned())],
        };
        propose(&self.checkpoint, policy, &self.infos(), &settings)
    }

    /// The request that `propose` makes without settings.
    fn request<'a>(&'a self, devices: &'a [DeviceInfo]) -> Request<'a> {
        Request {
            config_json: &self.checkpoint.config().unwrap().text,
            tensors: self.checkpoint.tensors(),
            ties: self.checkpoint.ties(),
            devices,
            settings: &[],
            required_formats: &[],
            failure: None,
        }
    }

    /// How a policy with this behavior fails, alone.
    #[track_caller]
    fn failure(&self, policy: &dyn Policy, behavior: &str) -> GuestFailure {
        let error = self.error(policy, behavior);
        let ProposeError::Policy(error) = error else {
            panic!("it did not fail: {error:?}");
        };
        let (policy, failure) = failure_of(error);
        assert_eq!(policy, "test.wasm");
        failure
    }

    /// How a policy with this behavior refuses, alone.
    #[track_caller]
    fn refusal(&self, behavior: &str) -> Refusal {
        let error = self.error(guests::hostile(), behavior);
        let ProposeError::Policy(PolicyError::Refused { refusal, .. }) = error else {
            panic!("it did not refuse: {error:?}");
        };
        refusal
    }

    /// The error of a policy with this behavior. Everything else still works after it.
    #[track_caller]
    fn error(&self, policy: &dyn Policy, behavior: &str) -> ProposeError {
        let Err(error) = self.propose(policy, behavior) else {
            panic!("`{behavior}` went well");
        };
        self.is_unharmed();
        error
    }

    /// Nothing has been taken of the devices, and the default policy plans as ever.
    #[track_caller]
    fn is_unharmed(&self) {
        for device in &self.devices {
            assert_eq!(device.usage(), Usage::default());
        }
        let other = Bench::with_device("sim:1GiB");
        let proposed = other.propose(auto(), "").unwrap();
        assert_eq!(proposed.plan.devices[0].tensors, 3);
        assert!(proposed.fuel.is_some_and(|fuel| fuel > 0));
    }
}

/// How bytes that are no policy are turned down.
#[track_caller]
fn rejection(bytes: &[u8]) -> GuestFailure {
    let result = WasmPolicy::new("test.wasm", bytes, Limits::default());
    let Err(error) = result else {
        panic!("it was taken for a policy");
    };
    Bench::new().is_unharmed();
    let (policy, failure) = failure_of(error);
    assert_eq!(policy, "test.wasm");
    failure
}
