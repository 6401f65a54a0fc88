//! A guest that is compiled and linked, ready to be called.

use std::fmt;
use std::io;
use std::path::Path;

use wasmtime::Store;
use wasmtime::component::{InstancePre, Linker};

use super::{GuestFailure, Limits, Mismatch, Sandbox, SandboxOptions, State, read_component};
use crate::world::World;
use tightfit::text::truncated;

/// What a guest of one world is once its imports are found: the type generated for that world.
pub(crate) trait Linked: Sized {
    /// What its store has beyond what every guest's has.
    type Own: Send + 'static;

    /// What it may import and has to export.
    const WORLD: World;

    /// Adds what it may import.
    ///
    /// # Errors
    /// When the linker has one of the interfaces already.
    fn add_to_linker(linker: &mut Linker<State<Self::Own>>) -> wasmtime::Result<()>;

    /// Finds its exports.
    ///
    /// # Errors
    /// When one has another type.
    fn new(pre: InstancePre<State<Self::Own>>) -> wasmtime::Result<Self>;

    /// Returns what [`Linked::new`] was given.
    fn instance_pre(&self) -> &InstancePre<State<Self::Own>>;
}

/// A compiled guest.
pub(crate) struct Guest<P> {
    /// How errors name it: its file, or what it was called by whoever compiled it.
    label: String,
    sandbox: Sandbox,
    linked: P,
}

impl<P> fmt::Debug for Guest<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guest")
            .field("label", &self.label)
            .field("limits", self.sandbox.limits())
            .finish_non_exhaustive()
    }
}

impl<P: Linked> Guest<P> {
    /// Compiles the guest in a file.
    ///
    /// # Errors
    /// When the file cannot be read; inside of that, as [`Guest::new`].
    pub(crate) fn open(
        label: &str,
        path: &Path,
        options: SandboxOptions,
    ) -> io::Result<Result<Guest<P>, GuestFailure>> {
        let bytes = read_component(path, &options.limits)?;
        Ok(bytes.and_then(|bytes| Guest::new(label, &bytes, options)))
    }

    /// Compiles a guest: a component, or a core module that carries its component type.
    ///
    /// # Errors
    /// When the bytes are not a guest of this world or exceed the limits.
    pub(crate) fn new(
        label: &str,
        bytes: &[u8],
        options: SandboxOptions,
    ) -> Result<Guest<P>, GuestFailure> {
        let text_bytes = options.limits.text_bytes;
        Guest::link(label, bytes, options).map_err(|failure| failure.shortened(text_bytes))
    }

    fn link(label: &str, bytes: &[u8], options: SandboxOptions) -> Result<Guest<P>, GuestFailure> {
        let sandbox = Sandbox::new(options)?;
        let component = sandbox.compile(bytes, &P::WORLD)?;
        let mut linker = Linker::new(sandbox.engine());
        P::add_to_linker(&mut linker).map_err(GuestFailure::host)?;
        let linked = P::new(sandbox.link(&mut linker, &component)?).map_err(|error| {
            GuestFailure::WrongWorld(Mismatch::ExportType {
                export: P::WORLD.exports.concat(),
                reason: format!("{error:#}"),
            })
        })?;
        Ok(Guest {
            label: label.to_owned(),
            sandbox,
            linked,
        })
    }

    /// Returns how errors name it.
    pub(crate) fn label(&self) -> &str {
        &self.label
    }

    /// Returns what it may use.
    pub(crate) fn limits(&self) -> &Limits {
        self.sandbox.limits()
    }

    /// Returns the names of what it imports, for example `tightfit:host/sizing@0.1.0`.
    pub(crate) fn imports(&self) -> Vec<String> {
        let text_bytes = self.limits().text_bytes;
        let component = self.linked.instance_pre().component();
        component
            .component_type()
            .imports(self.sandbox.engine())
            .map(|(name, _)| truncated(name.to_owned(), text_bytes))
            .collect()
    }

    /// Has `call` instantiate the guest and ask it; otherwise as [`Sandbox::run`].
    ///
    /// # Errors
    /// How the guest failed.
    pub(crate) fn run<R>(
        &self,
        own: P::Own,
        fuel: u64,
        live: bool,
        call: impl FnOnce(&P, &mut Store<State<P::Own>>) -> wasmtime::Result<R>,
    ) -> Result<(R, u64), GuestFailure> {
        let result = self
            .sandbox
            .run(own, fuel, live, |store| call(&self.linked, store));
        result.map_err(|failure| failure.shortened(self.limits().text_bytes))
    }
}
