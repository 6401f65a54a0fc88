//! Programs for tests: one that means harm as it is told, and the SDK's example.

use std::sync::{Arc, OnceLock};

use tempfile::TempDir;
use tightfit::device::{Device, HostDevice};
use tightfit_wasm::program::{Outcome, ProgramError, WasmProgram, default_limits};
use tightfit_wasm::sandbox::{GuestFailure, Limits};
use tightfit_wasm::wit::program::ProgramCtx;

use crate::models;

/// The module built from `guests/program`. What it does is said by its first argument.
pub const HOSTILE: &[u8] = include_bytes!(env!("HOSTILE_PROGRAM"));

/// The module built from the SDK's example.
pub const LOAD_AND_CHECK: &[u8] = include_bytes!(env!("LOAD_AND_CHECK"));

/// Compiles a program that is well-formed.
pub fn compile(bytes: &[u8], limits: Limits) -> WasmProgram {
    WasmProgram::new("test.wasm", bytes, limits).unwrap_or_else(|error| panic!("{error}"))
}

/// The hostile program with the default limits, compiled once.
pub fn hostile() -> &'static WasmProgram {
    static PROGRAM: OnceLock<WasmProgram> = OnceLock::new();
    PROGRAM.get_or_init(|| compile(HOSTILE, default_limits()))
}

/// Devices and a checkpoint for a program to do its worst to.
#[derive(Debug)]
pub struct Bench {
    /// `sim:0` and `sim:1`, or others.
    pub devices: Arc<[Box<dyn Device>]>,
    /// Bytes that the program may reserve.
    pub quota: u64,
    /// Holds the checkpoint that is granted as `model`.
    pub directory: TempDir,
}

impl Default for Bench {
    fn default() -> Bench {
        Bench::new(4 << 20)
    }
}

impl Bench {
    /// Two simulated devices of 64 MiB.
    pub fn new(quota: u64) -> Bench {
        let device = |index| Box::new(HostDevice::sim(index, 64 << 20)) as Box<dyn Device>;
        Bench::with_devices((0..2).map(device).collect(), quota)
    }

    /// These devices.
    pub fn with_devices(devices: Arc<[Box<dyn Device>]>, quota: u64) -> Bench {
        let directory = TempDir::new().unwrap();
        models::write_awkward(directory.path());
        Bench {
            devices,
            quota,
            directory,
        }
    }

    /// What a program has and may do here.
    pub fn context(&self) -> ProgramCtx {
        ProgramCtx::new(Arc::clone(&self.devices), self.quota)
            .grant("model", self.directory.path())
            .load_with(Some(2), None)
    }

    /// Runs a program.
    ///
    /// # Errors
    /// As it fails.
    pub fn run(&self, program: &WasmProgram, arguments: &[&str]) -> Result<Outcome, ProgramError> {
        run(program, self.context(), arguments)
    }

    /// What a program answers. Everything still works after it.
    #[track_caller]
    pub fn answer(&self, program: &WasmProgram, arguments: &[&str]) -> String {
        let outcome = self.run(program, arguments);
        let outcome = outcome.unwrap_or_else(|error| panic!("{arguments:?}: {error}"));
        self.is_unharmed();
        outcome.answer
    }

    /// What a program fails with. Everything still works after it.
    #[track_caller]
    pub fn error(&self, program: &WasmProgram, arguments: &[&str]) -> ProgramError {
        match self.run(program, arguments) {
            Ok(outcome) => panic!("{arguments:?} went well: {outcome:?}"),
            Err(error) => {
                self.is_unharmed();
                error
            }
        }
    }

    /// How a program fails, alone.
    #[track_caller]
    pub fn failure(&self, program: &WasmProgram, arguments: &[&str]) -> GuestFailure {
        match self.error(program, arguments) {
            ProgramError::Failed { program, failure } => {
                assert_eq!(program, "test.wasm");
                failure
            }
            other => panic!("{arguments:?} is another error: {other:?}"),
        }
    }

    /// What the host has told a program that then gave up.
    #[track_caller]
    pub fn told(&self, program: &WasmProgram, arguments: &[&str]) -> String {
        match self.error(program, arguments) {
            ProgramError::GaveUp { message, .. } => message,
            other => panic!("{arguments:?} is another error: {other:?}"),
        }
    }

    /// Nothing has been kept of the devices, and another program runs as ever.
    #[track_caller]
    pub fn is_unharmed(&self) {
        for device in self.devices.iter() {
            let usage = device.usage();
            assert_eq!(usage.requested.now, 0, "{device:?}");
            assert_eq!(usage.padded.now, 0, "{device:?}");
            assert_eq!(usage.reserved.now, 0, "{device:?}");
        }
        let other = Bench::default();
        let outcome = other.run(hostile(), &["honest"]);
        let outcome = outcome.unwrap_or_else(|error| panic!("{error}"));
        // The last of 64 numbers, and three buffers.
        assert_eq!(outcome.answer, "63 292");
        assert_eq!(outcome.peak_reserved, 1 << 20);
    }
}

/// Runs a program.
///
/// # Errors
/// As it fails.
pub fn run(
    program: &WasmProgram,
    context: ProgramCtx,
    arguments: &[&str],
) -> Result<Outcome, ProgramError> {
    let arguments: Vec<String> = arguments.iter().map(|&text| text.to_owned()).collect();
    program.run(context, &arguments)
}
