//! An application that runs users' policies within limits of its own, and tells them which one was
//! in the way.
//!
//!     cargo run --release --example own_limits -- MODEL POLICY

use std::error::Error;
use std::path::Path;
use std::time::Duration;

use tightfit::checkpoint::Checkpoint;
use tightfit::device::{Device, HostDevice};
use tightfit::plan::{ProposeError, Proposed, propose};
use tightfit_wasm::policy::WasmPolicy;
use tightfit_wasm::sandbox::{GuestFailure, Limits};

/// Less than the defaults: this application's users write small policies.
pub(crate) fn limits() -> Limits {
    Limits::default()
        .with_fuel(50_000_000)
        .with_deadline(Duration::from_secs(2))
        .with_memory(32 << 20)
}

pub(crate) fn plan(
    checkpoint: &Checkpoint,
    policy: &str,
    limits: Limits,
) -> Result<Proposed, ProposeError> {
    let policy = WasmPolicy::open(policy, limits)?;
    let device = HostDevice::sim(0, 24 << 30).info();
    propose(checkpoint, &policy, &[device], &[])
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, policy] = &arguments[..] else {
        return Err("usage: own_limits MODEL POLICY".into());
    };
    let checkpoint = Checkpoint::open(Path::new(model))?;
    let proposed = plan(&checkpoint, policy, limits()).map_err(|error| match &error {
        ProposeError::Policy(policy) => {
            match GuestFailure::of(policy).and_then(GuestFailure::limit) {
                Some(limit) => format!("{error}; ask us to raise the limit `{limit}`"),
                None => error.to_string(),
            }
        }
        _ => error.to_string(),
    })?;
    println!(
        "{} bytes, fuel {:?}",
        proposed.plan.devices[0].size.reserved, proposed.fuel
    );
    Ok(())
}
