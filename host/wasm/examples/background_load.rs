//! Loads models in the background, as a server does: others see how far a load is and can stop it, an error has a
//! class to answer with, and policies of strangers are compiled in a process that can be killed.
//!
//!     cargo run --release --example background_load -- MODEL POLICY DEVICE

use std::error::Error;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tightfit::checkpoint::OpenOptions;
use tightfit::device::DeviceSpec;
use tightfit::load::reserve_with;
use tightfit::status::Status;
use tightfit::{
    CancelToken, Checkpoint, LoadOptions, Model, PlanOptions, load_reserved, open_devices,
};
use tightfit_wasm::sandbox::{Compiler, CompilerProgram, compile_for_parent};
use tightfit_wasm::{Limits, SandboxOptions, WasmPolicy};

// ANCHOR: load
/// A load that is under way.
pub(crate) struct Loading {
    /// Bytes of the checkpoint that are done.
    pub(crate) done: Arc<AtomicU64>,
    /// Stops it; everything is given back then.
    pub(crate) cancel: CancelToken,
    pub(crate) result: JoinHandle<Result<Model, Failure>>,
}

/// Why there is no model: what to answer, and what to say.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) status: Status,
    pub(crate) message: String,
}

impl Failure {
    fn of<E: Display>(error: E) -> Failure
    where
        for<'a> Status: From<&'a E>,
    {
        Failure {
            status: Status::from(&error),
            message: error.to_string(),
        }
    }
}

pub(crate) fn start(model: PathBuf, policy: String, device: DeviceSpec) -> Loading {
    let (done, cancel) = (Arc::new(AtomicU64::new(0)), CancelToken::new());
    let (shown, token) = (Arc::clone(&done), cancel.clone());
    let result = thread::spawn(move || load(&model, &policy, device, &shown, token));
    Loading {
        done,
        cancel,
        result,
    }
}

fn load(
    model: &Path,
    policy: &str,
    device: DeviceSpec,
    done: &AtomicU64,
    cancel: CancelToken,
) -> Result<Model, Failure> {
    let options = OpenOptions::default().with_cancel(cancel.clone());
    let checkpoint = Checkpoint::open_with(model, &options).map_err(Failure::of)?;
    let devices = open_devices(&[device]).map_err(Failure::of)?;
    let policy = WasmPolicy::open(policy, sandbox(cancel.clone())?).map_err(Failure::of)?;
    let options = PlanOptions::default().with_cancel(cancel.clone());
    let placed = reserve_with(&checkpoint, &policy, &devices, &[], &options);
    let placed = placed.map_err(Failure::of)?;
    let progress = |progress: tightfit::Progress| {
        done.fetch_max(progress.bytes_done, Ordering::Relaxed);
    };
    let options = LoadOptions::default()
        .with_threads(4)
        .with_staging_bytes(16 << 20)
        .with_progress(&progress)
        .with_cancel(cancel);
    load_reserved(&checkpoint, placed.reserved, &options).map_err(Failure::of)
}
// ANCHOR_END: load

// ANCHOR: sandbox
/// What a stranger's policy may use, and where it is compiled.
fn sandbox(cancel: CancelToken) -> Result<SandboxOptions, Failure> {
    let limits = Limits::default()
        .with_fuel(50_000_000)
        .with_deadline(Duration::from_secs(2))
        .with_memory(32 << 20);
    let itself = CompilerProgram::itself(["compile-guest"]).map_err(|error| Failure {
        status: Status::Other,
        message: error.to_string(),
    })?;
    Ok(SandboxOptions::from(limits)
        .with_compiler(Compiler::Child(itself))
        .with_cancel(cancel))
}

fn main() -> Result<(), Box<dyn Error>> {
    // First of all: this program is started again to compile.
    if std::env::args().nth(1).as_deref() == Some("compile-guest") {
        compile_for_parent(std::io::stdin().lock(), std::io::stdout().lock())?;
        return Ok(());
    }
    // ANCHOR_END: sandbox
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, policy, device] = &arguments[..] else {
        return Err("usage: background_load MODEL POLICY DEVICE".into());
    };
    let loading = start(model.into(), policy.clone(), device.parse()?);
    while !loading.result.is_finished() {
        thread::sleep(Duration::from_millis(100));
        println!("{} bytes", loading.done.load(Ordering::Relaxed));
    }
    let model = loading.result.join().map_err(|_| "the load panicked")?;
    let model = model.map_err(|failure| format!("{:?}: {}", failure.status, failure.message))?;
    println!("{} tensors", model.tensors().count());
    // What `loading.cancel` is for: to be kept where a request can be given up.
    drop(loading.cancel);
    Ok(())
}
