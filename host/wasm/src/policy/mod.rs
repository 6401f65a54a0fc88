//! Runs policies written in wasm, in the [`sandbox`](crate::sandbox).
//!
//! Every call gets a fresh instance: nothing of one request is left for the next, and a trap
//! leaves nothing behind.

use std::path::Path;

use wasmtime::component::types::ComponentItem;
use wasmtime::component::{InstancePre, Linker};
use wasmtime::error::Context as _;
use wasmtime::{Store, bail};

use crate::sandbox::{
    Compiler, Guest, GuestFailure, Limits, Linked, SandboxOptions, State, checked_component,
};
use crate::wit;
use crate::wit::BadPlacement;
use crate::wit::bindings::exports::tightfit::host::planner;
use crate::wit::bindings::{self, PolicyPre};
use crate::world::{PLANNER, World};
use tightfit::policy::{Answer, Description, Policy, PolicyError, Request};
use tightfit::status::Status;

/// The policies that are part of the program.
pub const BUILTIN_POLICIES: [&str; 4] = ["auto", "packed", "huggingface", "map"];

static AUTO: &[u8] = include_bytes!("builtin/auto.wasm");
static HUGGINGFACE: &[u8] = include_bytes!("builtin/huggingface.wasm");
static MAP: &[u8] = include_bytes!("builtin/map.wasm");
static PACKED: &[u8] = include_bytes!("builtin/packed.wasm");

/// Checks a policy's bytes and returns what is made of them before they are compiled: what the fuzz
/// target of it calls.
///
/// # Errors
/// As [`WasmPolicy::new`].
#[doc(hidden)]
pub fn precheck_component(bytes: &[u8], limits: &Limits) -> Result<Vec<u8>, GuestFailure> {
    checked_component(bytes, &World::POLICY, limits)
}

impl Linked for PolicyPre<State<()>> {
    type Own = ();

    const WORLD: World = World::POLICY;

    fn add_to_linker(linker: &mut Linker<State<()>>) -> wasmtime::Result<()> {
        wit::add_to_linker(linker)
    }

    fn new(pre: InstancePre<State<()>>) -> wasmtime::Result<Self> {
        check_planner(&pre)?;
        PolicyPre::new(pre)
    }

    fn instance_pre(&self) -> &InstancePre<State<()>> {
        self.instance_pre()
    }
}

/// A compiled policy. Errors name it by its built-in name or its file, which hold before it has
/// described itself.
#[derive(Debug)]
pub struct WasmPolicy(Guest<PolicyPre<State<()>>>);

impl WasmPolicy {
    /// Returns the built-in policy of this name, or the policy in the file of this name.
    ///
    /// # Errors
    /// [`PolicyError::Unknown`], [`PolicyError::Unreadable`], or as [`WasmPolicy::new`].
    pub fn open(name: &str, options: impl Into<SandboxOptions>) -> Result<WasmPolicy, PolicyError> {
        let options = options.into();
        if let Some(policy) = WasmPolicy::builtin(name, options.clone()) {
            return policy;
        }
        let path = Path::new(name);
        if !path.exists() && path.extension().is_none() {
            return Err(PolicyError::Unknown {
                name: name.to_owned(),
                builtin: BUILTIN_POLICIES.to_vec(),
            });
        }
        let guest = Guest::open(name, path, options);
        let guest = guest.map_err(|source| PolicyError::Unreadable {
            path: path.to_owned(),
            source,
        })?;
        guest
            .map(WasmPolicy)
            .map_err(|failure| failed(name, failure))
    }

    /// Returns a built-in policy, if there is one of this name. It is as much to be trusted as this
    /// program, and so compiled in this process.
    pub fn builtin(
        name: &str,
        options: impl Into<SandboxOptions>,
    ) -> Option<Result<WasmPolicy, PolicyError>> {
        let bytes = match name {
            "auto" => AUTO,
            "huggingface" => HUGGINGFACE,
            "map" => MAP,
            "packed" => PACKED,
            _ => return None,
        };
        let options = options.into().with_compiler(Compiler::InProcess);
        Some(WasmPolicy::new(name, bytes, options))
    }

    /// Compiles a policy: a component, or a core module that carries its component type.
    ///
    /// # Errors
    /// [`PolicyError::Failed`] when the bytes are not a policy for this host or exceed its limits.
    pub fn new(
        label: &str,
        bytes: &[u8],
        options: impl Into<SandboxOptions>,
    ) -> Result<WasmPolicy, PolicyError> {
        Guest::new(label, bytes, options.into())
            .map(WasmPolicy)
            .map_err(|failure| failed(label, failure))
    }

    /// Returns the names of what the component imports, for example `tightfit:host/sizing@0.1.0`.
    pub fn imports(&self) -> Vec<String> {
        self.0.imports()
    }

    /// Runs `call` on a fresh instance. Gives its result and the fuel it took.
    fn run<R>(
        &self,
        tensors: usize,
        call: impl FnOnce(&bindings::Policy, &mut Store<State<()>>) -> wasmtime::Result<R>,
    ) -> Result<(R, u64), PolicyError> {
        let fuel = self.0.limits().fuel_for(tensors);
        let result = self.0.run((), fuel, false, |pre, store| {
            // Instantiation runs guest code too: everything is limited from here on.
            let policy = pre.instantiate(&mut *store)?;
            call(&policy, store)
        });
        result.map_err(|failure| failed(self.0.label(), failure))
    }
}

/// Compares the types of the planner's functions, which the generated code does when it is asked.
fn check_planner(pre: &InstancePre<State<()>>) -> wasmtime::Result<()> {
    let (ty, engine) = (pre.component().component_type(), pre.engine());
    let (interface, _) = PLANNER.split_once('@').unwrap_or((PLANNER, ""));
    let planner = ty
        .exports(engine)
        .find(|(name, _)| name.split('@').next() == Some(interface));
    let Some(ComponentItem::ComponentInstance(planner)) = planner.map(|(_, export)| export.ty)
    else {
        bail!("it is not an interface");
    };
    let function = |name: &str| match planner.get_export(engine, name).map(|export| export.ty) {
        Some(ComponentItem::ComponentFunc(function)) => Ok(function),
        _ => bail!("it has no function {name}"),
    };
    let types = ty.instance_type();
    function("describe")?
        .typecheck::<(), (planner::Description,)>(&types)
        .context("its function describe has another type")?;
    function("plan")?
        .typecheck::<(&planner::Request,), (Result<planner::Proposal, planner::Refusal>,)>(&types)
        .context("its function plan has another type")
}

fn failed(policy: &str, failure: GuestFailure) -> PolicyError {
    PolicyError::Failed {
        policy: policy.to_owned(),
        status: Status::from(&failure),
        source: Box::new(failure),
    }
}

impl Policy for WasmPolicy {
    fn describe(&self) -> Result<Description, PolicyError> {
        let (description, _) = self.run(0, |policy, store| {
            policy.tightfit_host_planner().call_describe(store)
        })?;
        let limits = self.0.limits();
        if description.settings.len() > limits.settings {
            let failure = GuestFailure::TooMany {
                what: "settings",
                limit: limits.settings,
            };
            return Err(failed(self.0.label(), failure));
        }
        Ok(wit::convert::description(description, limits.text_bytes))
    }

    fn label(&self) -> Option<&str> {
        Some(self.0.label())
    }

    fn plan(&self, request: &Request<'_>) -> Result<Answer, PolicyError> {
        let converted = wit::convert::request(request);
        let (answer, fuel) = self.run(request.tensors.len(), |policy, store| {
            policy.tightfit_host_planner().call_plan(store, &converted)
        })?;
        match answer {
            Ok(proposal) => match wit::convert::proposal(proposal, request) {
                Ok(proposal) => Ok(Answer {
                    proposal,
                    fuel: Some(fuel),
                }),
                Err(BadPlacement { tensor, source }) => Err(PolicyError::BadAnswer {
                    policy: self.0.label().to_owned(),
                    tensor,
                    problem: source.to_string(),
                }),
            },
            Err(refusal) => Err(PolicyError::Refused {
                policy: self.0.label().to_owned(),
                refusal: wit::convert::refusal(refusal, self.0.limits().text_bytes),
            }),
        }
    }
}
