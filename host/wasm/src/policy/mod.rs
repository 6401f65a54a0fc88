//! Runs policies written in wasm, in the [`sandbox`](crate::sandbox).
//!
//! Every call gets a fresh instance: nothing of one request is left for the next, and a trap
//! leaves nothing behind.

use std::path::Path;

use wasmtime::component::types::{ComponentFunc, ComponentInstance, ComponentItem};
use wasmtime::component::{ComponentExportIndex, Instance, InstancePre, Linker};
use wasmtime::error::Context as _;
use wasmtime::{Store, bail};

use crate::sandbox::{
    Compiler, Guest, GuestFailure, Limits, Linked, SandboxOptions, State, checked_component,
};
use crate::wit;
use crate::wit::BadPlacement;
use crate::wit::bindings::exports::tightfit::host::planner;
use crate::wit::bindings::slicing::exports::tightfit::host::slicer;
use crate::wit::bindings::{self, PolicyIndices};
use crate::wit::convert::{BadSlices, MOST_RANGES};
use crate::world::{PLANNER, SLICER, World};
use tightfit::policy::{Answer, Description, Policy, PolicyError, Request};
use tightfit::status::Status;

/// The policies that are part of the program.
pub const BUILTIN_POLICIES: [&str; 5] = ["auto", "packed", "huggingface", "map", "tensor-parallel"];

static AUTO: &[u8] = include_bytes!("builtin/auto.wasm");
static HUGGINGFACE: &[u8] = include_bytes!("builtin/huggingface.wasm");
static MAP: &[u8] = include_bytes!("builtin/map.wasm");
static PACKED: &[u8] = include_bytes!("builtin/packed.wasm");
static TENSOR_PARALLEL: &[u8] = include_bytes!("builtin/tensor-parallel.wasm");

/// Checks a policy's bytes and returns what is made of them before they are compiled: what the fuzz
/// target of it calls.
///
/// # Errors
/// As [`WasmPolicy::new`].
#[doc(hidden)]
pub fn precheck_component(bytes: &[u8], limits: &Limits) -> Result<Vec<u8>, GuestFailure> {
    checked_component(bytes, &World::POLICY, limits)
}

/// A policy's exports: `planner`, and `slicer` where it has that.
struct Exports {
    pre: InstancePre<State<()>>,
    indices: PolicyIndices,
    /// The function `plan-slices`.
    plan_slices: Option<ComponentExportIndex>,
}

/// An instance of a policy.
struct Instantiated {
    instance: Instance,
    policy: bindings::Policy,
}

impl Exports {
    fn instantiate(&self, store: &mut Store<State<()>>) -> wasmtime::Result<Instantiated> {
        let instance = self.pre.instantiate(&mut *store)?;
        let policy = self.indices.load(&mut *store, &instance)?;
        Ok(Instantiated { instance, policy })
    }
}

impl Linked for Exports {
    type Own = ();

    const WORLD: World = World::POLICY;

    fn add_to_linker(linker: &mut Linker<State<()>>) -> wasmtime::Result<()> {
        wit::add_to_linker(linker)
    }

    fn new(pre: InstancePre<State<()>>) -> wasmtime::Result<Self> {
        check_planner(&pre)?;
        let is_slicer = check_slicer(&pre)?;
        let component = pre.component();
        let plan_slices = is_slicer.then(|| {
            let interface = component.get_export_index(None, SLICER)?;
            component.get_export_index(Some(&interface), PLAN_SLICES)
        });
        Ok(Exports {
            indices: PolicyIndices::new(&pre)?,
            plan_slices: plan_slices.flatten(),
            pre,
        })
    }

    fn instance_pre(&self) -> &InstancePre<State<()>> {
        &self.pre
    }
}

/// A compiled policy. Errors name it by its built-in name or its file, which hold before it has
/// described itself.
#[derive(Debug)]
pub struct WasmPolicy(Guest<Exports>);

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
            "tensor-parallel" => TENSOR_PARALLEL,
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
        call: impl FnOnce(&Exports, &Instantiated, &mut Store<State<()>>) -> wasmtime::Result<R>,
    ) -> Result<(R, u64), PolicyError> {
        let fuel = self.0.limits().fuel_for(tensors);
        let result = self.0.run((), fuel, false, |exports, store| {
            // Instantiation runs guest code too: everything is limited from here on.
            let policy = exports.instantiate(store)?;
            call(exports, &policy, store)
        });
        result.map_err(|failure| failed(self.0.label(), failure))
    }
}

/// What a policy answers through [`SLICER`].
type Sliced = Result<slicer::SlicedProposal, planner::Refusal>;

/// The function of [`SLICER`].
const PLAN_SLICES: &str = "plan-slices";

/// Finds an interface among the exports, of whatever version it is; `None` where there is none.
fn exported(
    pre: &InstancePre<State<()>>,
    interface: &str,
) -> wasmtime::Result<Option<ComponentInstance>> {
    let interface = interface.split('@').next();
    let ty = pre.component().component_type();
    let export = ty
        .exports(pre.engine())
        .find(|(name, _)| name.split('@').next() == interface);
    match export.map(|(_, export)| export.ty) {
        Some(ComponentItem::ComponentInstance(instance)) => Ok(Some(instance)),
        Some(_) => bail!("it is not an interface"),
        None => Ok(None),
    }
}

fn function(
    pre: &InstancePre<State<()>>,
    interface: &ComponentInstance,
    name: &str,
) -> wasmtime::Result<ComponentFunc> {
    match interface
        .get_export(pre.engine(), name)
        .map(|export| export.ty)
    {
        Some(ComponentItem::ComponentFunc(function)) => Ok(function),
        _ => bail!("it has no function {name}"),
    }
}

/// Compares the types of the planner's functions, which the generated code does when it is asked.
fn check_planner(pre: &InstancePre<State<()>>) -> wasmtime::Result<()> {
    let Some(planner) = exported(pre, PLANNER)? else {
        bail!("it is not an interface");
    };
    let ty = pre.component().component_type();
    let types = ty.instance_type();
    function(pre, &planner, "describe")?
        .typecheck::<(), (planner::Description,)>(&types)
        .context("its function describe has another type")?;
    function(pre, &planner, "plan")?
        .typecheck::<(&planner::Request,), (Result<planner::Proposal, planner::Refusal>,)>(&types)
        .context("its function plan has another type")
}

/// The same for the slicer, which there need not be.
fn check_slicer(pre: &InstancePre<State<()>>) -> wasmtime::Result<bool> {
    let check = || {
        let Some(slicer) = exported(pre, SLICER)? else {
            return Ok(false);
        };
        let ty = pre.component().component_type();
        function(pre, &slicer, PLAN_SLICES)?
            .typecheck::<(&planner::Request,), (Sliced,)>(&ty.instance_type())
            .context("its function plan-slices has another type")?;
        Ok(true)
    };
    check().map_err(|error: wasmtime::Error| error.context(SLICER))
}

/// A policy's answer as it came.
enum Proposed {
    Whole(planner::Proposal),
    Sliced(slicer::SlicedProposal),
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
        let (description, _) = self.run(0, |_, instantiated, store| {
            let planner = instantiated.policy.tightfit_host_planner();
            planner.call_describe(store)
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
        let (answer, fuel) = self.run(request.tensors.len(), |exports, instantiated, store| {
            let Some(plan_slices) = &exports.plan_slices else {
                let planner = instantiated.policy.tightfit_host_planner();
                let answer = planner.call_plan(store, &converted)?;
                return Ok(answer.map(Proposed::Whole));
            };
            let plan_slices = instantiated
                .instance
                .get_typed_func::<(&planner::Request,), (Sliced,)>(&mut *store, plan_slices)?;
            let (answer,) = plan_slices.call(store, (&converted,))?;
            Ok(answer.map(Proposed::Sliced))
        })?;
        let proposal = answer.map(|proposed| match proposed {
            Proposed::Whole(proposal) => {
                wit::convert::proposal(proposal, request).map_err(BadSlices::from)
            }
            Proposed::Sliced(proposal) => wit::convert::sliced_proposal(proposal, request),
        });
        match proposal {
            Ok(Ok(proposal)) => Ok(Answer {
                proposal,
                fuel: Some(fuel),
            }),
            Ok(Err(BadSlices::Placement(BadPlacement { tensor, source }))) => {
                Err(PolicyError::BadAnswer {
                    policy: self.0.label().to_owned(),
                    tensor,
                    problem: source.to_string(),
                })
            }
            Ok(Err(BadSlices::Ranges(_))) => {
                let failure = GuestFailure::TooMany {
                    what: "ranges of slices",
                    limit: MOST_RANGES,
                };
                Err(failed(self.0.label(), failure))
            }
            Err(refusal) => Err(PolicyError::Refused {
                policy: self.0.label().to_owned(),
                refusal: wit::convert::refusal(refusal, self.0.limits().text_bytes),
            }),
        }
    }
}
