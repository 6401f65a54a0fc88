//! Runs programs: programs in wasm that load models and work with them, within [`Limits`] and a quota
//! of devices' memory.
//!
//! ```no_run
//! use std::sync::Arc;
//! use tightfit::device::{Device, HostDevice};
//! use tightfit_wasm::program::{WasmProgram, default_limits};
//! use tightfit_wasm::wit::program::ProgramContext;
//!
//! let devices: Arc<[Box<dyn Device>]> = Arc::new([Box::new(HostDevice::cpu(None))]);
//! let program = WasmProgram::open("program.wasm".as_ref(), default_limits())?;
//! let context = ProgramContext::new(devices, 8 << 30).grant("model", "/models/qwen");
//! println!("{}", program.run(context, &["--fast".to_owned()])?.answer);
//! # Ok::<(), tightfit_wasm::program::ProgramError>(())
//! ```

mod error;

use std::path::Path;
use std::time::{Duration, Instant};

use wasmtime::Store;
use wasmtime::component::{Linker, ResourceTable};

pub use error::ProgramError;

pub use crate::sandbox::{Failure, Limits};

use crate::sandbox::{Mismatch, Options, Sandbox, State, World, read_component};
use crate::wit::program::bindings::{COMPONENT_TYPE, ProgramPre};
use crate::wit::program::{
    ProgramContext, ProgramContextView, ProgramView, Stopped, add_program_to_linker,
};
use tightfit::text::{truncate, truncated};

/// What a program may import and has to export.
const WORLD: World = World {
    imports: &[
        "tightfit:host/types@0.1.0",
        "tightfit:host/sizing@0.1.0",
        "tightfit:host/log@0.1.0",
        "tightfit:host/errors@0.1.0",
        "tightfit:host/devices@0.1.0",
        "tightfit:host/buffers@0.1.0",
        "tightfit:host/nf4@0.1.0",
        "tightfit:host/checkpoints@0.1.0",
        "tightfit:host/models@0.1.0",
    ],
    exports: &[RUN],
    component_type: COMPONENT_TYPE,
};

const RUN: &str = "tightfit:host/run@0.1.0";

/// Bytes of the text that a program gives.
const MOST_ANSWER: usize = 1 << 20;

/// What a program may use unless it is said otherwise: as a policy, but fuel and time for reading,
/// computing and loading.
pub fn default_limits() -> Limits {
    Limits {
        fuel: 1_000_000_000_000,
        fuel_per_tensor: 0,
        deadline: Duration::from_secs(600),
        ..Limits::default()
    }
}

/// A compiled program.
pub struct WasmProgram {
    label: String,
    sandbox: Sandbox,
    pre: ProgramPre<State<Own>>,
}

/// What a program's store has beyond what every guest's has.
struct Own {
    context: ProgramContext,
    table: ResourceTable,
}

impl ProgramView for State<Own> {
    fn tightfit_program(&mut self) -> ProgramContextView<'_> {
        ProgramContextView {
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

impl std::fmt::Debug for WasmProgram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WasmProgram")
            .field("label", &self.label)
            .field("limits", self.sandbox.limits())
            .finish_non_exhaustive()
    }
}

impl WasmProgram {
    /// The program in a file.
    ///
    /// # Errors
    /// [`ProgramError::Unreadable`], or as [`WasmProgram::new`].
    pub fn open(path: &Path, options: impl Into<Options>) -> Result<WasmProgram, ProgramError> {
        let options = options.into();
        let label = path.display().to_string();
        let bytes =
            read_component(path, &options.limits).map_err(|source| ProgramError::Unreadable {
                path: path.to_owned(),
                source,
            })?;
        let bytes = bytes.map_err(|failure| ProgramError::Failed {
            program: label.clone(),
            failure,
        })?;
        WasmProgram::new(&label, &bytes, options)
    }

    /// Compiles a program: a component, or a core module that carries its component type.
    ///
    /// # Errors
    /// [`ProgramError::Failed`] when the bytes are not a program for this host or exceed its limits.
    pub fn new(
        label: &str,
        bytes: &[u8],
        options: impl Into<Options>,
    ) -> Result<WasmProgram, ProgramError> {
        let options = options.into();
        let text_bytes = options.limits.text_bytes;
        let compiled = || -> Result<_, Failure> {
            let sandbox = Sandbox::new(options)?;
            let component = sandbox.compile(bytes, &WORLD)?;
            let mut linker = Linker::new(sandbox.engine());
            add_program_to_linker::<State<Own>>(&mut linker).map_err(Failure::host)?;
            let pre = sandbox.link(&mut linker, &component)?;
            let pre = ProgramPre::new(pre).map_err(|error| {
                Failure::WrongWorld(Mismatch::ExportType {
                    export: RUN.to_owned(),
                    reason: format!("{error:#}"),
                })
            })?;
            Ok((sandbox, pre))
        };
        let (sandbox, pre) = compiled().map_err(|failure| match failure {
            Failure::Cancelled => ProgramError::Cancelled,
            failure => ProgramError::Failed {
                program: label.to_owned(),
                failure: failure.shortened(text_bytes),
            },
        })?;
        Ok(WasmProgram {
            label: label.to_owned(),
            sandbox,
            pre,
        })
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
        mut context: ProgramContext,
        arguments: &[String],
    ) -> Result<Outcome, ProgramError> {
        let limits = self.sandbox.limits();
        if let Some(deadline) = Instant::now().checked_add(limits.deadline) {
            context.set_deadline(deadline);
        }
        let mut table = ResourceTable::new();
        table.set_max_capacity(limits.resources);
        let own = Own { context, table };
        let mut cancelled = false;
        let result = self.sandbox.run(own, limits.fuel_for(0), true, |store| {
            self.call(store, arguments).map_err(|error| {
                cancelled = matches!(error.downcast_ref(), Some(Stopped::Cancelled));
                self.cause(error)
            })
        });
        let program = || self.label.clone();
        match result {
            _ if cancelled => Err(ProgramError::Cancelled),
            Err(failure) => Err(ProgramError::Failed {
                program: program(),
                failure: failure.shortened(limits.text_bytes),
            }),
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

    fn call(
        &self,
        store: &mut Store<State<Own>>,
        arguments: &[String],
    ) -> wasmtime::Result<(Result<String, String>, u64)> {
        // Instantiation runs guest code too: everything is limited from here on.
        let program = self.pre.instantiate(&mut *store)?;
        let answer = program
            .tightfit_host_run()
            .call_run(&mut *store, arguments)?;
        Ok((answer, store.data().own.context.reserved().peak))
    }

    /// What the interfaces trap with, as the sandbox's own failure where that is the same.
    fn cause(&self, error: wasmtime::Error) -> wasmtime::Error {
        if let Some(Stopped::Deadline) = error.downcast_ref() {
            let seconds = self.sandbox.limits().deadline.as_secs_f64();
            return Failure::Deadline { seconds }.into();
        }
        error
    }

    /// The names of what the component imports, for example `tightfit:host/models@0.1.0`.
    pub fn imports(&self) -> Vec<String> {
        let text_bytes = self.sandbox.limits().text_bytes;
        self.pre
            .instance_pre()
            .component()
            .component_type()
            .imports(self.sandbox.engine())
            .map(|(name, _)| truncated(name.to_owned(), text_bytes))
            .collect()
    }
}
