//! What happens in the middle of things: the user cancels, the deadline passes, a device fails.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tightfit::cancel::CancelToken;
use tightfit::device::{Device, DeviceError, DeviceInfo, HostDevice, Reservation};
use tightfit::memory::{ReservationSize, Usage};
use tightfit_tests::programs::{Bench, HOSTILE, compile, hostile, run};
use tightfit_wasm::program::{ProgramError, default_limits};
use tightfit_wasm::sandbox::GuestFailure;

type Hook = Box<dyn Fn() -> Result<(), DeviceError> + Send>;

/// A device at which something happens whenever memory is taken: in the middle of what a program does.
struct Hooked {
    device: HostDevice,
    hook: Arc<Mutex<Hook>>,
}

impl fmt::Debug for Hooked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.device.fmt(f)
    }
}

impl Device for Hooked {
    fn info(&self) -> DeviceInfo {
        self.device.info()
    }

    fn reserve(&self, size: ReservationSize) -> Result<Box<dyn Reservation>, DeviceError> {
        let reservation = self.device.reserve(size)?;
        (self.hook.lock().unwrap())()?;
        Ok(reservation)
    }

    fn usage(&self) -> Usage {
        self.device.usage()
    }
}

/// A bench whose first device does this when memory is taken.
fn bench(hook: impl FnOnce(PathBuf) -> Hook) -> Bench {
    let shared: Arc<Mutex<Hook>> = Arc::new(Mutex::new(Box::new(|| Ok(()))));
    let hooked = Hooked {
        device: HostDevice::sim(0, 64 << 20),
        hook: Arc::clone(&shared),
    };
    let devices: [Box<dyn Device>; 2] = [Box::new(hooked), Box::new(HostDevice::sim(1, 64 << 20))];
    let bench = Bench::with_devices(devices.into(), 4 << 20);
    *shared.lock().unwrap() = hook(bench.directory.path().join("model.safetensors"));
    bench
}

/// The same with what happens to the checkpoint's file.
pub(crate) fn with_hook(hook: impl Fn(&PathBuf) + Send + 'static) -> Bench {
    bench(|path| {
        Box::new(move || {
            hook(&path);
            Ok(())
        })
    })
}

#[test]
fn a_program_that_is_cancelled_does_nothing() {
    let bench = Bench::default();
    let token = CancelToken::new();
    token.cancel();
    let error = run(hostile(), bench.context().cancelled_by(token), &["honest"]).unwrap_err();
    assert!(matches!(error, ProgramError::Cancelled), "{error:?}");
    assert_eq!(bench.devices[0].usage(), Usage::default());
}

#[test]
fn a_load_is_cancelled_in_the_middle() {
    let token = CancelToken::new();
    let asked = token.clone();
    let bench = with_hook(move |_| asked.cancel());
    for behavior in ["load", "load-without-end", "never-free"] {
        let context = bench.context().cancelled_by(token.clone());
        let error = run(hostile(), context, &[behavior]).unwrap_err();
        assert!(
            matches!(error, ProgramError::Cancelled),
            "{behavior}: {error:?}"
        );
        bench.is_unharmed();
    }
    assert!(bench.devices[0].usage().reserved.peak > 0);
}

#[test]
fn a_deadline_that_passes_in_the_middle_of_a_load_ends_it() {
    let patience = Duration::from_millis(200);
    let program = compile(
        HOSTILE,
        default_limits().with_fuel(u64::MAX).with_deadline(patience),
    );
    // The load has begun by then, and its time is up before it reads.
    let bench = with_hook(move |_| std::thread::sleep(patience));
    let failure = bench.failure(&program, &["load"]);
    assert_eq!(failure, GuestFailure::Deadline { seconds: 0.2 });
    assert!(bench.devices[0].usage().reserved.peak > 0);
}

#[test]
fn a_device_that_fails_is_told() {
    let bench = bench(|_| {
        Box::new(|| {
            Err(DeviceError::Driver {
                device: "sim:0".to_owned(),
                call: "reserve",
                bytes: 0,
                error: "SIM_ERROR_FELL_OFF_THE_BUS".to_owned(),
                out_of_memory: false,
            })
        })
    });
    let expected = "Error::DeviceFailed(\"sim:0: reserve failed: SIM_ERROR_FELL_OFF_THE_BUS\")";
    for arguments in [&["load"][..], &["allocate", "1"]] {
        assert_eq!(bench.told(hostile(), arguments), expected);
    }
}
