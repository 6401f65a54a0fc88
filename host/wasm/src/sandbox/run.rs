//! Compiling, linking and running guests.

use std::borrow::Cow;

use wasmtime::component::{Component, InstancePre, Linker, ResourceTableError};
use wasmtime::{Config, Engine, Store, Trap};

use super::code::Code;
use super::limiter::Limiter;
use super::wasi::EmptyWasi;
use super::{
    Cache, Compiler, GuestFailure, Limits, Mismatch, SandboxOptions, Wasi, alarm, child, precheck,
    space, wasi,
};
use crate::component;
use crate::wit::messages::Messages;
use crate::wit::{TightfitCtx, TightfitView};
use crate::world::World;

/// An engine in which guests run, and the options that hold for each of them.
pub(crate) struct Sandbox {
    engine: Engine,
    options: SandboxOptions,
    reservation: Reservation,
}

/// Address space that a guest's memory reserves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reservation {
    /// All that it could ever address, 4 GiB: then no access needs to be checked.
    Whole,
    /// What it takes and a little to grow into: where this process's address space is limited.
    Little,
}

/// Bytes of address space for [`Reservation::Little`], to begin with and whenever it is used up.
const LITTLE: u64 = 8 << 20;

/// What belongs to one guest: all that a store holds, gone with it.
pub(crate) struct State<T> {
    pub(super) context: TightfitCtx,
    pub(super) wasi: EmptyWasi,
    limiter: Limiter,
    /// What the interfaces beyond `tightfit:host`'s `sizing` and `log` need.
    #[allow(dead_code, reason = "policies need nothing")]
    pub(crate) own: T,
}

impl<T: Send> TightfitView for State<T> {
    fn tightfit(&mut self) -> &mut TightfitCtx {
        &mut self.context
    }
}

/// Checks bytes, and sees to it that a core module says what component it is.
fn checked<'a>(
    bytes: &'a [u8],
    world: &World,
    wasi: Wasi,
    limits: &Limits,
) -> Result<Cow<'a, [u8]>, GuestFailure> {
    precheck::check(bytes, world, wasi, limits)?;
    component::described(bytes, world).map_err(|error| GuestFailure::NotAComponent {
        reason: format!("damaged: {error}"),
    })
}

/// Does with bytes what is done before they are compiled, and returns the component.
///
/// # Errors
/// As [`Sandbox::compile`].
pub(crate) fn checked_component(
    bytes: &[u8],
    world: &World,
    limits: &Limits,
) -> Result<Vec<u8>, GuestFailure> {
    let bytes = checked(bytes, world, Wasi::None, limits)?;
    component::component(&bytes)
        .map(Cow::into_owned)
        .map_err(|reason| GuestFailure::NotAComponent { reason })
}

impl Sandbox {
    /// # Errors
    /// [`GuestFailure::Host`] where this machine cannot run wasm, or not with this stack.
    pub(crate) fn new(options: impl Into<SandboxOptions>) -> Result<Sandbox, GuestFailure> {
        let options = options.into();
        let reservation = match space::limit() {
            None => Reservation::Whole,
            Some(_) => Reservation::Little,
        };
        let config = config(options.limits.stack, reservation);
        let engine = Engine::new(&config).map_err(GuestFailure::host)?;
        Ok(Sandbox {
            engine,
            options,
            reservation,
        })
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.options.limits
    }

    /// Checks bytes and compiles them, or takes what was compiled before: a component, or a core
    /// module that carries its component type.
    ///
    /// # Errors
    /// [`GuestFailure::NotAComponent`], [`GuestFailure::WrongWorld`], the limits on sizes and on compiling.
    pub(crate) fn compile(&self, bytes: &[u8], world: &World) -> Result<Component, GuestFailure> {
        let limits = &self.options.limits;
        let bytes = checked(bytes, world, self.options.wasi, limits)?;
        let Some(cache) = &self.options.cache else {
            return self.load(&self.compile_anew(&bytes)?);
        };
        let id = Cache::id(&self.engine, &bytes);
        if let Some(code) = cache.find(&id, limits.compiled) {
            match code.load(&self.engine) {
                Ok(component) => return Ok(component),
                Err(error) => tracing::warn!("compiled code is not used: {error:#}"),
            }
        }
        let code = self.compile_anew(&bytes)?;
        let component = self.load(&code)?;
        cache.keep(&id, &code);
        Ok(component)
    }

    /// Code that has been checked.
    fn compile_anew(&self, bytes: &[u8]) -> Result<Code, GuestFailure> {
        let SandboxOptions { limits, cancel, .. } = &self.options;
        let code = match &self.options.compiler {
            Compiler::InProcess => component::component(bytes)
                .and_then(|bytes| {
                    Code::compile(&self.engine, &bytes).map_err(|error| format!("{error:#}"))
                })
                .map_err(|reason| GuestFailure::NotAComponent { reason }),
            Compiler::Child(program) => {
                child::compile(program, bytes, limits, self.reservation, cancel)
            }
        }?;
        code.check(bytes.len(), limits)?;
        Ok(code)
    }

    fn load(&self, code: &Code) -> Result<Component, GuestFailure> {
        code.load(&self.engine).map_err(host_failure)
    }

    /// Finds all that the component imports: what the linker has and, where it is asked for, an
    /// empty WASI.
    ///
    /// # Errors
    /// [`GuestFailure::WrongWorld`] where something is not there.
    pub(crate) fn link<T: Send + 'static>(
        &self,
        linker: &mut Linker<State<T>>,
        component: &Component,
    ) -> Result<InstancePre<State<T>>, GuestFailure> {
        if self.options.wasi == Wasi::Empty {
            wasi::add_to_linker(linker, component)?;
        }
        linker.instantiate_pre(component).map_err(|error| {
            if space::is_short(&error) {
                return host_failure(error);
            }
            let reason = format!("{error:#}");
            // The interfaces are there, so it is about something in one of them.
            let ty = component.component_type();
            let mut imports = ty.imports(&self.engine).map(|(name, _)| name);
            let import = imports
                .find(|name| reason.contains(name))
                .unwrap_or_default();
            GuestFailure::WrongWorld(Mismatch::ImportType {
                import: import.to_owned(),
                reason,
            })
        })
    }

    /// Has `call` instantiate a guest and ask it, within the limits and this much fuel. Gives its
    /// result and the fuel it took. The store is gone when this returns.
    ///
    /// What the guest logs is handed on after the call or, with `live`, by another thread in the
    /// meantime too: the guest never waits for whoever reads it.
    ///
    /// # Errors
    /// How the guest failed.
    pub(crate) fn run<T: 'static, R>(
        &self,
        own: T,
        fuel: u64,
        live: bool,
        call: impl FnOnce(&mut Store<State<T>>) -> wasmtime::Result<R>,
    ) -> Result<(R, u64), GuestFailure> {
        let messages = Messages::default();
        messages.emit_around(live, || self.run_with(&messages, own, fuel, call))
    }

    fn run_with<T: 'static, R>(
        &self,
        messages: &Messages,
        own: T,
        fuel: u64,
        call: impl FnOnce(&mut Store<State<T>>) -> wasmtime::Result<R>,
    ) -> Result<(R, u64), GuestFailure> {
        let limits = &self.options.limits;
        let state = State {
            context: TightfitCtx::keeping(messages.clone(), limits.log_bytes, limits.text_bytes),
            wasi: EmptyWasi::default(),
            limiter: Limiter::new(limits),
            own,
        };
        let mut store = Store::new(&self.engine, state);
        store.limiter(|state| &mut state.limiter);
        store.set_hostcall_fuel(limits.host_call_bytes);
        store.set_max_component_handles(limits.handles);
        let alarm = alarm::set(&mut store, limits.deadline);
        let _alarm = alarm.map_err(|error| {
            GuestFailure::host(format_args!("no thread to watch its deadline: {error}"))
        })?;
        match store.set_fuel(fuel).and_then(|()| call(&mut store)) {
            Ok(value) => Ok((value, fuel - store.get_fuel().unwrap_or(0))),
            Err(error) => Err(failure(error, fuel, limits, store.data())),
        }
    }
}

fn failure<T>(
    error: wasmtime::Error,
    fuel: u64,
    limits: &Limits,
    state: &State<T>,
) -> GuestFailure {
    let error = match error.downcast::<GuestFailure>() {
        Ok(failure) => return failure,
        Err(error) => error,
    };
    if let Some(ResourceTableError::Full) = error.downcast_ref() {
        let limit = limits.resources;
        return GuestFailure::Resources { limit };
    }
    let last_words = || {
        let logged = state.context.last_error().map(str::to_owned);
        logged.or_else(|| state.wasi.last_words())
    };
    match error.downcast_ref::<Trap>() {
        Some(Trap::OutOfFuel) => return GuestFailure::OutOfFuel { fuel },
        Some(Trap::StackOverflow) => return GuestFailure::StackOverflow,
        Some(trap) => {
            return match last_words() {
                Some(message) if *trap == Trap::UnreachableCodeReached => {
                    GuestFailure::Panic { message }
                }
                _ => GuestFailure::Trap {
                    message: trap.to_string(),
                },
            };
        }
        None => {}
    }
    let short = space::is_short(&error);
    let message = format!("{error:#}");
    match limit_in(&message, limits) {
        Some(failure) => failure,
        None if short => space::failure(message),
        None => GuestFailure::Trap { message },
    }
}

/// Makes a failure of an error that is not about the guest.
fn host_failure(error: wasmtime::Error) -> GuestFailure {
    match space::is_short(&error) {
        true => space::failure(format_args!("{error:#}")),
        false => GuestFailure::host(error),
    }
}

/// Returns the limit of which wasmtime says only in words that it was exceeded.
fn limit_in(message: &str, limits: &Limits) -> Option<GuestFailure> {
    let too_many = |what, limit| GuestFailure::TooMany { what, limit };
    [
        (
            "memory count too high",
            too_many("memories", limits.memories),
        ),
        ("table count too high", too_many("tables", limits.tables)),
        (
            "instance count too high",
            too_many("instances", limits.instances),
        ),
        (
            "store handle limit exceeded",
            GuestFailure::Handles {
                limit: limits.handles,
            },
        ),
        (
            "fuel allocated for hostcalls has been exhausted",
            GuestFailure::HostCall {
                limit: limits.host_call_bytes as u64,
            },
        ),
    ]
    .into_iter()
    .find(|(words, _)| message.contains(words))
    .map(|(_, failure)| failure)
}

/// Deterministic, and with nothing on that guests do not need. What it compiles to is the same in
/// every process; what a memory reserves changes neither answers nor fuel.
pub(super) fn config(stack: usize, reservation: Reservation) -> Config {
    let mut config = Config::new();
    config
        .wasm_component_model(true)
        .consume_fuel(true)
        .epoch_interruption(true)
        .max_wasm_stack(stack)
        .cranelift_nan_canonicalization(true)
        .relaxed_simd_deterministic(true)
        .wasm_relaxed_simd(false)
        .wasm_gc(false)
        .wasm_backtrace_max_frames(None)
        // A memory's image takes at most twice the data that it is made of; by default a byte at each
        // end makes 16 MiB, whether the module is instantiated or not.
        .memory_guaranteed_dense_image_size(0)
        // Halves what a call between guest and host takes; nothing here is asynchronous.
        .concurrency_support(false);
    if reservation == Reservation::Little {
        config
            .memory_reservation(LITTLE)
            .memory_reservation_for_growth(LITTLE)
            .memory_guard_size(64 << 10)
            .guard_before_linear_memory(false);
    }
    config
}
