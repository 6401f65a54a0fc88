//! Compiling what users bring: in a process that can be killed, and out of a cache that cannot be
//! poisoned.
#![cfg(unix)]

mod cache;
mod child;

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tightfit::policy::Policy;
use tightfit_tests::command::tightfit;
use tightfit_tests::failures::failure_of;
use tightfit_tests::guests::HOSTILE;
use tightfit_wasm::policy::WasmPolicy;
use tightfit_wasm::sandbox::GuestFailure;
use tightfit_wasm::sandbox::{Compiler, CompilerProgram, Limits, SandboxOptions};

/// Held by tests that look at what the whole process has open or has started.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The command, as it compiles for itself.
fn compiler() -> Compiler {
    Compiler::Child(CompilerProgram {
        program: tightfit(),
        arguments: vec!["compile-policy".into()],
    })
}

/// Something that is no compiler.
fn program(program: &str, arguments: &[&str]) -> Compiler {
    Compiler::Child(CompilerProgram {
        program: PathBuf::from(program),
        arguments: arguments.iter().map(Into::into).collect(),
    })
}

/// Limits under which only the compiler's own can stop a bomb.
fn unwary() -> Limits {
    Limits::default()
        .with_component(u64::MAX)
        .with_function(u64::MAX)
        .with_compile_time(Duration::from_secs(300))
}

fn open(bytes: &[u8], options: impl Into<SandboxOptions>) -> Result<WasmPolicy, GuestFailure> {
    WasmPolicy::new("test.wasm", bytes, options).map_err(|error| failure_of(error).1)
}

/// The policy works.
#[track_caller]
fn works(options: SandboxOptions) {
    let policy = open(HOSTILE, options).unwrap();
    assert_eq!(policy.describe().unwrap().name, "hostile");
}
