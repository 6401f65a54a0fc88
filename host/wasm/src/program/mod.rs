//! Runs programs in wasm, which load models and work with them, within [`Limits`] and a quota
//! of devices' memory.
//!
//! ```no_run
//! use std::sync::Arc;
//! use tightfit::device::{Device, HostDevice};
//! use tightfit_wasm::program::{WasmProgram, default_limits};
//! use tightfit_wasm::wit::program::ProgramCtx;
//!
//! let devices: Arc<[Box<dyn Device>]> = Arc::new([Box::new(HostDevice::cpu(None))]);
//! let program = WasmProgram::open("program.wasm".as_ref(), default_limits())?;
//! let context = ProgramCtx::new(devices, 8 << 30).grant("model", "/models/qwen");
//! println!("{}", program.run(context, &["--fast".to_owned()])?.answer);
//! # Ok::<(), tightfit_wasm::program::ProgramError>(())
//! ```

mod error;

use std::path::Path;
use std::time::{Duration, Instant};

use wasmtime::Store;
use wasmtime::component::{InstancePre, Linker, ResourceTable};

pub use error::ProgramError;

use crate::sandbox::{Guest, GuestFailure, Limits, Linked, SandboxOptions, State};
use crate::wit::program::bindings::ProgramPre;
use crate::wit::program::{
    ProgramCtx, ProgramCtxView, ProgramView, Stopped, add_program_to_linker,
};
use crate::world::World;
use tightfit::text::truncate;

/// Bytes of the text that a program gives.
const MOST_ANSWER: usize = 1 << 20;

/// Returns what a program may use unless it is said otherwise: as a policy, but fuel and time for
/// reading, computing and loading.
pub fn default_limits() -> Limits {
    Limits::default()
        .with_fuel(1_000_000_000_000)
        .with_fuel_per_tensor(0)
        .with_deadline(Duration::from_secs(600))
}

impl Linked for ProgramPre<State<Own>> {
    type Own = Own;

    const WORLD: World = World::PROGRAM;

    fn add_to_linker(linker: &mut Linker<State<Own>>) -> wasmtime::Result<()> {
        add_program_to_linker(linker)
    }

    fn new(pre: InstancePre<State<Own>>) -> wasmtime::Result<Self> {
        ProgramPre::new(pre)
    }

    fn instance_pre(&self) -> &InstancePre<State<Own>> {
        self.instance_pre()
    }
}

/// A compiled program.
#[derive(Debug)]
pub struct WasmProgram(Guest<ProgramPre<State<Own>>>);

/// What a program's store has beyond what every guest's has.
struct Own {
    context: ProgramCtx,
    table: ResourceTable,
}

impl ProgramView for State<Own> {
    fn tightfit_program(&mut self) -> ProgramCtxView<'_> {
        ProgramCtxView {
            context: &mut self.own.context,
            table: &mut self.own.table,
        }
    }
}

/// What a program has done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// What it has to say.
    pub answer: String,
    /// Fuel that it burnt. Only its own instructions count, not what the host does for it.
    pub fuel: u64,
    /// The most bytes that it had reserved on all devices together.
    pub peak_reserved: u64,
}

impl WasmProgram {
    /// Returns the program in a file.
    ///
    /// # Errors
    /// [`ProgramError::Unreadable`], or as [`WasmProgram::new`].
    pub fn open(
        path: &Path,
        options: impl Into<SandboxOptions>,
    ) -> Result<WasmProgram, ProgramError> {
        let label = path.display().to_string();
        let guest = Guest::open(&label, path, options.into());
        let guest = guest.map_err(|source| ProgramError::Unreadable {
            path: path.to_owned(),
            source,
        })?;
        guest
            .map(WasmProgram)
            .map_err(|failure| failed(&label, failure))
    }

    /// Compiles a program: a component, or a core module that carries its component type.
    ///
    /// # Errors
    /// [`ProgramError::Failed`] when the bytes are not a program for this host or exceed its limits.
    pub fn new(
        label: &str,
        bytes: &[u8],
        options: impl Into<SandboxOptions>,
    ) -> Result<WasmProgram, ProgramError> {
        Guest::new(label, bytes, options.into())
            .map(WasmProgram)
            .map_err(|failure| failed(label, failure))
    }

    /// Returns the names of what the component imports, for example `tightfit:host/models@0.1.0`.
    pub fn imports(&self) -> Vec<String> {
        self.0.imports()
    }

    /// Runs the program on a fresh instance. When this returns, whatever it had taken has been given
    /// back.
    ///
    /// The deadline holds for what the host does for the program, too; the context's token ends its
    /// calls of the host, and itself at the next of them.
    ///
    /// # Errors
    /// [`ProgramError`].
    pub fn run(
        &self,
        mut context: ProgramCtx,
        arguments: &[String],
    ) -> Result<Outcome, ProgramError> {
        let limits = self.0.limits();
        if let Some(deadline) = Instant::now().checked_add(limits.deadline) {
            context.set_deadline(deadline);
        }
        let mut table = ResourceTable::new();
        table.set_max_capacity(limits.resources);
        let own = Own { context, table };
        let mut cancelled = false;
        let result = self.0.run(own, limits.fuel_for(0), true, |pre, store| {
            call(pre, store, arguments).map_err(|error| {
                cancelled = matches!(error.downcast_ref(), Some(Stopped::Cancelled));
                cause(error, limits)
            })
        });
        let program = || self.0.label().to_owned();
        match result {
            _ if cancelled => Err(ProgramError::Cancelled),
            Err(failure) => Err(failed(self.0.label(), failure)),
            Ok(((Err(mut message), _), _)) => {
                truncate(&mut message, limits.text_bytes);
                Err(ProgramError::GaveUp {
                    program: program(),
                    message,
                })
            }
            Ok(((Ok(answer), _), _)) if answer.len() > MOST_ANSWER => {
                Err(ProgramError::LongAnswer {
                    program: program(),
                    have: answer.len() as u64,
                    limit: MOST_ANSWER as u64,
                })
            }
            Ok(((Ok(answer), peak_reserved), fuel)) => Ok(Outcome {
                answer,
                fuel,
                peak_reserved,
            }),
        }
    }
}

fn call(
    pre: &ProgramPre<State<Own>>,
    store: &mut Store<State<Own>>,
    arguments: &[String],
) -> wasmtime::Result<(Result<String, String>, u64)> {
    // Instantiation runs guest code too: everything is limited from here on.
    let program = pre.instantiate(&mut *store)?;
    let answer = program
        .tightfit_host_run()
        .call_run(&mut *store, arguments)?;
    Ok((answer, store.data().own.context.reserved().peak))
}

/// Returns what the interfaces trap with, as the sandbox's own failure where that is the same.
fn cause(error: wasmtime::Error, limits: &Limits) -> wasmtime::Error {
    if let Some(Stopped::Deadline) = error.downcast_ref() {
        let seconds = limits.deadline.as_secs_f64();
        return GuestFailure::Deadline { seconds }.into();
    }
    error
}

fn failed(program: &str, failure: GuestFailure) -> ProgramError {
    match failure {
        GuestFailure::Cancelled => ProgramError::Cancelled,
        failure => ProgramError::Failed {
            program: program.to_owned(),
            failure,
        },
    }
}
