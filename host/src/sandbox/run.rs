//! Compiling, linking and running guests.

use wasmtime::component::{Component, InstancePre, Linker};
use wasmtime::{Config, Engine, Store, Trap};

use super::limiter::Limiter;
use super::{Failure, Limits, alarm, precheck};
use crate::wit::{Context, View};

/// Where guests run: an engine, and the limits that hold for each of them.
pub(crate) struct Sandbox {
    engine: Engine,
    limits: Limits,
}

/// What belongs to one guest: all that a store holds, gone with it.
pub(crate) struct State<T> {
    context: Context,
    limiter: Limiter,
    /// What the interfaces beyond `tightfit:host`'s `sizing` and `log` need.
    pub(crate) own: T,
}

impl<T: Send> View for State<T> {
    fn tightfit(&mut self) -> &mut Context {
        &mut self.context
    }
}

impl Sandbox {
    /// # Errors
    /// [`Failure::Host`] where this machine cannot run wasm, or not with this stack.
    pub(crate) fn new(limits: Limits) -> Result<Sandbox, Failure> {
        let engine = Engine::new(&config(&limits)).map_err(|error| Failure::Host {
            message: format!("{error:#}"),
        })?;
        Ok(Sandbox { engine, limits })
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Checks bytes and compiles them: a component, or a core module that carries its component
    /// type.
    ///
    /// # Errors
    /// [`Failure::NotAComponent`], [`Failure::TooLarge`].
    pub(crate) fn compile(&self, bytes: &[u8]) -> Result<Component, Failure> {
        let bytes = precheck::component(bytes, &self.limits)?;
        Component::from_binary(&self.engine, &bytes).map_err(|error| Failure::NotAComponent {
            reason: format!("{error:#}"),
        })
    }

    /// Finds all that the component imports.
    ///
    /// # Errors
    /// [`Failure::WrongWorld`] where something is not there.
    pub(crate) fn link<T: 'static>(
        &self,
        linker: &Linker<State<T>>,
        component: &Component,
    ) -> Result<InstancePre<State<T>>, Failure> {
        linker
            .instantiate_pre(component)
            .map_err(|error| wrong_world(&error))
    }

    /// Has `call` instantiate a guest and ask it, within the limits and this much fuel. Gives its
    /// result and the fuel it took. The store is gone when this returns.
    ///
    /// # Errors
    /// How the guest failed.
    pub(crate) fn run<T: 'static, R>(
        &self,
        own: T,
        fuel: u64,
        call: impl FnOnce(&mut Store<State<T>>) -> wasmtime::Result<R>,
    ) -> Result<(R, u64), Failure> {
        let state = State {
            context: Context::new(),
            limiter: Limiter::new(&self.limits),
            own,
        };
        let mut store = Store::new(&self.engine, state);
        store.limiter(|state| &mut state.limiter);
        store.set_hostcall_fuel(self.limits.host_call_bytes);
        let alarm = alarm::set(&mut store, self.limits.deadline);
        let _alarm = alarm.map_err(|error| Failure::Host {
            message: format!("no thread to watch its deadline: {error}"),
        })?;
        match store.set_fuel(fuel).and_then(|()| call(&mut store)) {
            Ok(value) => Ok((value, fuel - store.get_fuel().unwrap_or(0))),
            Err(error) => Err(failure(error, fuel, store.data().context.last_error())),
        }
    }
}

/// What a guest lacks, or wants and does not get.
pub(crate) fn wrong_world(error: &wasmtime::Error) -> Failure {
    Failure::WrongWorld {
        reason: format!("{error:#}"),
    }
}

fn failure(error: wasmtime::Error, fuel: u64, last_log: Option<&str>) -> Failure {
    let error = match error.downcast::<Failure>() {
        Ok(failure) => return failure,
        Err(error) => error,
    };
    match (error.downcast_ref::<Trap>(), last_log) {
        (Some(Trap::OutOfFuel), _) => Failure::OutOfFuel { fuel },
        (Some(Trap::StackOverflow), _) => Failure::StackOverflow,
        (Some(Trap::UnreachableCodeReached), Some(message)) => Failure::Panic {
            message: message.to_owned(),
        },
        (Some(trap), _) => Failure::Trap {
            message: trap.to_string(),
        },
        (None, _) => Failure::Trap {
            message: format!("{error:#}"),
        },
    }
}

/// Deterministic, and with nothing on that guests do not need.
fn config(limits: &Limits) -> Config {
    let mut config = Config::new();
    config
        .wasm_component_model(true)
        .consume_fuel(true)
        .epoch_interruption(true)
        .max_wasm_stack(limits.stack)
        .cranelift_nan_canonicalization(true)
        .relaxed_simd_deterministic(true)
        .wasm_relaxed_simd(false)
        .wasm_backtrace_max_frames(None);
    config
}
