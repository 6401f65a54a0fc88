//! Runs policies written in wasm, in the [`sandbox`](crate::sandbox).
//!
//! Every call gets a fresh instance: nothing of one request is left for the next, and a trap
//! leaves nothing behind.

use std::path::Path;

use wasmtime::component::types::ComponentItem;
use wasmtime::component::{Component, Linker};
use wasmtime::error::Context as _;
use wasmtime::{Engine, Store, bail};

use crate::sandbox::{
    Compiler, Failure, Limits, Mismatch, Options, Sandbox, State, World, checked_component,
    read_component,
};
use crate::wit::bindings::exports::tightfit::host::planner;
use crate::wit::{self, BadPlacement, bindings};
use tightfit::policy::{Answer, Description, Policy, PolicyError, Request};
use tightfit::status::Status;
use tightfit::text::truncated;

/// The policies that are part of the program.
pub const BUILTIN_POLICIES: [&str; 4] = ["auto", "packed", "huggingface", "map"];

static AUTO: &[u8] = include_bytes!("builtin/auto.wasm");
static HUGGINGFACE: &[u8] = include_bytes!("builtin/huggingface.wasm");
static MAP: &[u8] = include_bytes!("builtin/map.wasm");
static PACKED: &[u8] = include_bytes!("builtin/packed.wasm");

/// What a policy may import and has to export.
const WORLD: World = World {
    imports: &[
        "tightfit:host/types@0.1.0",
        "tightfit:host/sizing@0.1.0",
        "tightfit:host/log@0.1.0",
    ],
    exports: &[PLANNER],
    component_type: bindings::COMPONENT_TYPE,
};

/// What is checked of a policy's bytes and made of them before they are compiled: what the fuzz
/// target of it calls.
///
/// # Errors
/// As [`WasmPolicy::new`].
#[doc(hidden)]
pub fn precheck_component(bytes: &[u8], limits: &Limits) -> Result<Vec<u8>, Failure> {
    checked_component(bytes, &WORLD, limits)
}

const PLANNER: &str = "tightfit:host/planner@0.1.0";

/// A compiled policy.
pub struct WasmPolicy {
    /// Its built-in name, or its file: how errors name it before it has described itself.
    label: String,
    sandbox: Sandbox,
    pre: bindings::PolicyPre<State<()>>,
}

impl std::fmt::Debug for WasmPolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WasmPolicy")
            .field("label", &self.label)
            .field("limits", self.sandbox.limits())
            .finish_non_exhaustive()
    }
}

impl WasmPolicy {
    /// The built-in policy of this name, or the policy in the file of this name.
    ///
    /// # Errors
    /// [`PolicyError::Unknown`], [`PolicyError::Unreadable`], or as [`WasmPolicy::new`].
    pub fn open(name: &str, options: impl Into<Options>) -> Result<WasmPolicy, PolicyError> {
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
        let unreadable = |source| PolicyError::Unreadable {
            path: path.to_owned(),
            source,
        };
        let bytes = read_component(path, &options.limits).map_err(unreadable)?;
        let bytes = bytes.map_err(|failure| failed(name, failure))?;
        WasmPolicy::new(name, &bytes, options)
    }

    /// A built-in policy, if there is one of this name. It is as much to be trusted as this program,
    /// and so compiled in this process.
    pub fn builtin(
        name: &str,
        options: impl Into<Options>,
    ) -> Option<Result<WasmPolicy, PolicyError>> {
        let bytes = match name {
            "auto" => AUTO,
            "huggingface" => HUGGINGFACE,
            "map" => MAP,
            "packed" => PACKED,
            _ => return None,
        };
        let options = Options {
            compiler: Compiler::InProcess,
            ..options.into()
        };
        Some(WasmPolicy::new(name, bytes, options))
    }

    /// Compiles a policy: a component, or a core module that carries its component type.
    ///
    /// # Errors
    /// [`PolicyError::Failed`] when the bytes are not a policy for this host or exceed its limits.
    pub fn new(
        label: &str,
        bytes: &[u8],
        options: impl Into<Options>,
    ) -> Result<WasmPolicy, PolicyError> {
        let options = options.into();
        let text_bytes = options.limits.text_bytes;
        let compiled = || -> Result<_, Failure> {
            let sandbox = Sandbox::new(options)?;
            let component = sandbox.compile(bytes, &WORLD)?;
            let mut linker = Linker::new(sandbox.engine());
            wit::add_to_linker::<State<()>>(&mut linker).map_err(Failure::host)?;
            let pre = sandbox.link(&mut linker, &component)?;
            check_planner(&component, sandbox.engine())
                .and_then(|()| bindings::PolicyPre::new(pre))
                .map(|pre| (sandbox, pre))
                .map_err(|error| {
                    Failure::WrongWorld(Mismatch::ExportType {
                        export: PLANNER.to_owned(),
                        reason: format!("{error:#}"),
                    })
                })
        };
        let (sandbox, pre) =
            compiled().map_err(|failure| failed(label, failure.shortened(text_bytes)))?;
        Ok(WasmPolicy {
            label: label.to_owned(),
            sandbox,
            pre,
        })
    }

    /// The names of what the component imports, for example `tightfit:host/sizing@0.1.0`.
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

    /// Runs `call` on a fresh instance. Gives its result and the fuel it took.
    fn run<R>(
        &self,
        tensors: usize,
        call: impl FnOnce(&bindings::Policy, &mut Store<State<()>>) -> wasmtime::Result<R>,
    ) -> Result<(R, u64), PolicyError> {
        let fuel = self.sandbox.limits().fuel_for(tensors);
        let result = self.sandbox.run((), fuel, false, |store| {
            // Instantiation runs guest code too: everything is limited from here on.
            let policy = self.pre.instantiate(&mut *store)?;
            call(&policy, store)
        });
        result.map_err(|failure| self.failed(failure))
    }

    fn failed(&self, failure: Failure) -> PolicyError {
        failed(
            &self.label,
            failure.shortened(self.sandbox.limits().text_bytes),
        )
    }
}

/// Compares the types of the planner's functions, which the generated code does when it is asked.
fn check_planner(component: &Component, engine: &Engine) -> wasmtime::Result<()> {
    let ty = component.component_type();
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

fn failed(policy: &str, failure: Failure) -> PolicyError {
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
        let limits = self.sandbox.limits();
        if description.settings.len() > limits.settings {
            return Err(self.failed(Failure::TooMany {
                what: "settings",
                limit: limits.settings,
            }));
        }
        Ok(wit::convert::description(description, limits.text_bytes))
    }

    fn label(&self) -> Option<&str> {
        Some(&self.label)
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
                    policy: self.label.clone(),
                    tensor,
                    problem: source.to_string(),
                }),
            },
            Err(refusal) => Err(PolicyError::Refused {
                policy: self.label.clone(),
                refusal: wit::convert::refusal(refusal, self.sandbox.limits().text_bytes),
            }),
        }
    }
}
