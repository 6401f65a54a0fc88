//! What a program exports, called by a host that has its own engine, linker and store.

use wasmtime::AsContextMut;
use wasmtime::component::{Instance, TypedFunc};

/// The interface as components name it.
const INTERFACE: &str = "tightfit:host/run@0.1.0";

/// What a program gives: what it has to say, or why it gave up.
type Answer = Result<String, String>;

/// The function of an instantiated program. Nothing is limited here: fuel, time and memory are what
/// the host's store allows, and devices' memory is what its
/// [`ProgramCtx`](super::ProgramCtx) does.
#[derive(Clone)]
pub struct Run {
    run: TypedFunc<(Vec<String>,), (Answer,)>,
}

impl std::fmt::Debug for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Run").finish_non_exhaustive()
    }
}

impl Run {
    /// Finds the function among what an instance exports.
    ///
    /// # Errors
    /// When it does not export it, or with other types.
    pub fn new(mut store: impl AsContextMut, instance: &Instance) -> wasmtime::Result<Run> {
        let interface = instance.get_export_index(&mut store, None, INTERFACE);
        let interface =
            interface.ok_or_else(|| wasmtime::format_err!("it does not export {INTERFACE}"))?;
        let run = instance.get_export_index(&mut store, Some(&interface), "run");
        let run = run.ok_or_else(|| wasmtime::format_err!("{INTERFACE} has no function run"))?;
        Ok(Run {
            run: instance.get_typed_func(&mut store, run)?,
        })
    }

    /// Has the program do its work. Gives what it has to say, or why it gave up.
    ///
    /// # Errors
    /// When it traps, or the store is asynchronous.
    pub fn run(&self, store: impl AsContextMut, arguments: &[String]) -> wasmtime::Result<Answer> {
        let (answer,) = self.run.call(store, (arguments.to_vec(),))?;
        Ok(answer)
    }

    /// [`Run::run`] in an asynchronous store. The program's own instructions yield as the store says;
    /// what the host does for it, it does before it yields.
    ///
    /// # Errors
    /// When it traps.
    #[cfg(feature = "async")]
    pub async fn run_async(
        &self,
        store: impl AsContextMut<Data: Send>,
        arguments: &[String],
    ) -> wasmtime::Result<Answer> {
        let (answer,) = self.run.call_async(store, (arguments.to_vec(),)).await?;
        Ok(answer)
    }
}
