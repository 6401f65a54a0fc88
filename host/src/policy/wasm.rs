//! Runs policies written in wasm, within [`Limits`].
//!
//! Every call gets a fresh instance: nothing of one request is left for the next, and a trap
//! leaves nothing behind.

use std::path::Path;
use std::sync::mpsc;
use std::time::Instant;

use wasmtime::component::{Component, Linker};
use wasmtime::{Config, Engine, Store, Trap, UpdateDeadline};

use super::limits::{Exceeded, Limiter};
use super::{Answer, Description, Failure, Limits, Policy, PolicyError, Request, precheck};
use crate::wit::{self, Context, View, bindings};

/// The policies that are part of the program.
pub const BUILTIN_POLICIES: [&str; 4] = ["auto", "packed", "huggingface", "map"];

static AUTO: &[u8] = include_bytes!("builtin/auto.wasm");
static HUGGINGFACE: &[u8] = include_bytes!("builtin/huggingface.wasm");
static MAP: &[u8] = include_bytes!("builtin/map.wasm");
static PACKED: &[u8] = include_bytes!("builtin/packed.wasm");

/// A compiled policy.
pub struct WasmPolicy {
    /// Its built-in name, or its file: how errors name it before it has described itself.
    label: String,
    engine: Engine,
    pre: bindings::PolicyPre<State>,
    limits: Limits,
}

impl std::fmt::Debug for WasmPolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WasmPolicy")
            .field("label", &self.label)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// What belongs to one call.
struct State {
    context: Context,
    limiter: Limiter,
}

impl View for State {
    fn tightfit(&mut self) -> &mut Context {
        &mut self.context
    }
}

/// The cause of a trap at the deadline.
#[derive(Debug, thiserror::Error)]
#[error("deadline exceeded")]
struct DeadlineExceeded;

impl WasmPolicy {
    /// The built-in policy of this name, or the policy in the file of this name.
    ///
    /// # Errors
    /// [`PolicyError::Unknown`], [`PolicyError::Unreadable`], or as [`WasmPolicy::new`].
    pub fn open(name: &str, limits: Limits) -> Result<WasmPolicy, PolicyError> {
        if let Some(policy) = WasmPolicy::builtin(name, limits.clone()) {
            return policy;
        }
        let path = Path::new(name);
        if !path.exists() && path.extension().is_none() {
            return Err(PolicyError::Unknown {
                name: name.to_owned(),
                builtin: BUILTIN_POLICIES.to_vec(),
            });
        }
        let unreadable = |source| PolicyError::Unreadable {
            path: path.to_owned(),
            source,
        };
        let metadata = std::fs::metadata(path).map_err(unreadable)?;
        // A pipe can block for ever, and a device such as /dev/zero has no end.
        if !metadata.is_file() {
            return Err(unreadable(std::io::Error::other("not a regular file")));
        }
        let length = metadata.len();
        if length > limits.component {
            return Err(PolicyError::Failed {
                policy: name.to_owned(),
                failure: Failure::TooLarge {
                    what: "file",
                    have: length,
                    limit: limits.component,
                },
            });
        }
        let bytes = std::fs::read(path).map_err(unreadable)?;
        WasmPolicy::new(name, &bytes, limits)
    }

    /// A built-in policy, if there is one of this name.
    pub fn builtin(name: &str, limits: Limits) -> Option<Result<WasmPolicy, PolicyError>> {
        match name {
            "auto" => Some(WasmPolicy::new(name, AUTO, limits)),
            "huggingface" => Some(WasmPolicy::new(name, HUGGINGFACE, limits)),
            "map" => Some(WasmPolicy::new(name, MAP, limits)),
            "packed" => Some(WasmPolicy::new(name, PACKED, limits)),
            _ => None,
        }
    }

    /// Compiles a policy: a component, or a core module that carries its component type.
    ///
    /// # Errors
    /// [`PolicyError::Failed`] when the bytes are not a policy for this host or exceed its limits.
    pub fn new(label: &str, bytes: &[u8], limits: Limits) -> Result<WasmPolicy, PolicyError> {
        let failed = |failure| PolicyError::Failed {
            policy: label.to_owned(),
            failure,
        };
        let not_a_policy = |error: wasmtime::Error| {
            failed(Failure::NotAPolicy {
                reason: format!("{error:#}"),
            })
        };
        let bytes = precheck::component(bytes, &limits).map_err(failed)?;
        let engine = Engine::new(&config(&limits)).map_err(not_a_policy)?;
        let component = Component::from_binary(&engine, &bytes).map_err(not_a_policy)?;
        let mut linker = Linker::new(&engine);
        wit::add_to_linker::<State>(&mut linker).map_err(not_a_policy)?;
        let pre = linker
            .instantiate_pre(&component)
            .and_then(bindings::PolicyPre::new)
            .map_err(not_a_policy)?;
        Ok(WasmPolicy {
            label: label.to_owned(),
            engine,
            pre,
            limits,
        })
    }

    /// The names of what the component imports, for example `tightfit:host/sizing@0.1.0`.
    pub fn imports(&self) -> Vec<String> {
        self.pre
            .instance_pre()
            .component()
            .component_type()
            .imports(&self.engine)
            .map(|(name, _)| name.to_owned())
            .collect()
    }

    /// Runs `call` on a fresh instance. Gives its result and the fuel it took.
    fn run<R>(
        &self,
        tensors: usize,
        call: impl FnOnce(&bindings::Policy, &mut Store<State>) -> wasmtime::Result<R>,
    ) -> Result<(R, u64), PolicyError> {
        let fuel = self
            .limits
            .fuel_per_tensor
            .saturating_mul(tensors as u64)
            .saturating_add(self.limits.fuel);
        let mut store = Store::new(
            &self.engine,
            State {
                context: Context::new(),
                limiter: Limiter::new(&self.limits),
            },
        );
        store.limiter(|state| &mut state.limiter);
        store.set_hostcall_fuel(self.limits.host_call_bytes);
        let result = store.set_fuel(fuel).and_then(|()| {
            let _alarm = self.set_alarm(&mut store);
            // Instantiation runs guest code too: everything is limited from here on.
            let policy = self.pre.instantiate(&mut store)?;
            call(&policy, &mut store)
        });
        match result {
            Ok(value) => Ok((value, fuel - store.get_fuel().unwrap_or(0))),
            Err(error) => Err(PolicyError::Failed {
                policy: self.label.clone(),
                failure: self.failure(&error, fuel, store.data().context.last_error()),
            }),
        }
    }

    /// Interrupts the store's guest when its time is up. Other calls on this engine are woken too
    /// and find that theirs is not.
    fn set_alarm(&self, store: &mut Store<State>) -> Alarm {
        let deadline = Instant::now() + self.limits.deadline;
        store.set_epoch_deadline(1);
        store.epoch_deadline_callback(move |_| {
            if Instant::now() >= deadline {
                Err(DeadlineExceeded.into())
            } else {
                Ok(UpdateDeadline::Continue(1))
            }
        });
        let (disarm, armed) = mpsc::channel::<()>();
        let engine = self.engine.clone();
        let thread = std::thread::spawn(move || {
            while armed.recv_timeout(deadline.saturating_duration_since(Instant::now()))
                == Err(mpsc::RecvTimeoutError::Timeout)
            {
                // Repeated by the loop, at no more than this rate, in case the clock was early.
                engine.increment_epoch();
                if Instant::now() > deadline {
                    break;
                }
            }
        });
        Alarm {
            disarm: Some(disarm),
            thread: Some(thread),
        }
    }

    fn failure(&self, error: &wasmtime::Error, fuel: u64, last_log: Option<&str>) -> Failure {
        if let Some(exceeded) = error.downcast_ref::<Exceeded>() {
            return match *exceeded {
                Exceeded::Memory { need, limit } => Failure::Memory { need, limit },
                Exceeded::Tables { need, limit } => Failure::Tables { need, limit },
            };
        }
        if error.is::<DeadlineExceeded>() {
            return Failure::Deadline {
                seconds: self.limits.deadline.as_secs_f64(),
            };
        }
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
}

impl Policy for WasmPolicy {
    fn describe(&self) -> Result<Description, PolicyError> {
        self.run(0, |policy, store| {
            policy.tightfit_host_planner().call_describe(store)
        })
        .map(|(description, _)| wit::convert::description(description))
    }

    fn plan(&self, request: &Request<'_>) -> Result<Answer, PolicyError> {
        let converted = wit::convert::request(request);
        let (answer, fuel) = self.run(request.tensors.len(), |policy, store| {
            policy.tightfit_host_planner().call_plan(store, &converted)
        })?;
        match answer {
            Ok(proposal) => Ok(Answer {
                proposal: wit::convert::proposal(proposal),
                fuel: Some(fuel),
            }),
            Err(refusal) => Err(PolicyError::Refused {
                policy: self.label.clone(),
                refusal: wit::convert::refusal(refusal),
            }),
        }
    }
}

/// Disarmed when dropped.
struct Alarm {
    disarm: Option<mpsc::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.disarm.take();
        if let Some(thread) = self.thread.take() {
            // The thread does nothing that panics; if it did there would be nothing to mend.
            let _ = thread.join();
        }
    }
}

/// Deterministic, and with nothing on that policies do not need.
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
