//! What an embedder chooses.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use super::{Cache, Limits};
use tightfit::cancel::CancelToken;

/// How guests are compiled and run.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct SandboxOptions {
    /// What a guest may use.
    pub limits: Limits,
    /// The process in which guests are compiled.
    pub compiler: Compiler,
    /// The cache that keeps compiled code for the next time, if any.
    pub cache: Option<Arc<Cache>>,
    /// What a guest that asks for WASI is given.
    pub wasi: Wasi,
    /// Ends compiling in a child when it is used. What a guest does is ended by the limits.
    pub cancel: CancelToken,
}

tightfit_common::setters!([] SandboxOptions:
    with_limits: limits, Limits;
    with_compiler: compiler, Compiler;
    with_cache: cache, Option<Arc<Cache>>;
    with_wasi: wasi, Wasi;
    with_cancel: cancel, CancelToken;
);

impl From<Limits> for SandboxOptions {
    /// With these limits, compiling in this process, without a cache or WASI.
    fn from(limits: Limits) -> SandboxOptions {
        SandboxOptions {
            limits,
            ..SandboxOptions::default()
        }
    }
}

/// The process in which guests that are not part of this program are compiled.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Compiler {
    /// In this process. The limits on sizes keep all but a bomb within seconds; nothing stops a
    /// bomb.
    #[default]
    InProcess,
    /// In a process of its own, which is killed at the limits `compile-time` and `compile-memory`.
    Child(CompilerProgram),
}

/// A program that calls [`compile_for_parent`](super::compile_for_parent) when it is started with
/// these arguments: mostly the embedder's own.
///
/// ```no_run
/// use tightfit_wasm::policy::WasmPolicy;
/// use tightfit_wasm::sandbox::{Compiler, CompilerProgram, SandboxOptions, compile_for_parent};
///
/// // First of all, before anything else is started or opened.
/// if std::env::args().nth(1).as_deref() == Some("compile-guest") {
///     compile_for_parent(std::io::stdin().lock(), std::io::stdout().lock())?;
///     return Ok(());
/// }
/// let options = SandboxOptions::default()
///     .with_compiler(Compiler::Child(CompilerProgram::itself(["compile-guest"])?));
/// let policy = WasmPolicy::open("policy.wasm", options)?;
/// # drop(policy);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompilerProgram {
    /// Its file.
    pub program: PathBuf,
    /// What tells it to compile.
    pub arguments: Vec<OsString>,
}

impl CompilerProgram {
    /// Returns the program that is running, started with these arguments.
    ///
    /// # Errors
    /// When the operating system does not tell which program that is.
    pub fn itself<A: Into<OsString>>(
        arguments: impl IntoIterator<Item = A>,
    ) -> std::io::Result<CompilerProgram> {
        // The same file even when another has taken its place since.
        let running = PathBuf::from("/proc/self/exe");
        let program = match cfg!(target_os = "linux") && running.exists() {
            true => running,
            false => std::env::current_exe()?,
        };
        Ok(CompilerProgram {
            program,
            arguments: arguments.into_iter().map(Into::into).collect(),
        })
    }
}

/// What a guest that asks for WASI is given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Wasi {
    /// Nothing: it is turned down.
    #[default]
    None,
    /// WASI 0.2 with nothing in it: no files, no environment, no network, a clock that stands
    /// still, random numbers that are always the same. What it writes to its standard output and
    /// error is logged.
    Empty,
}
