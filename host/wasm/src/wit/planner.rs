//! What a policy exports, called by a host that has its own engine, linker and store.

use wasmtime::AsContextMut;
use wasmtime::component::{Instance, TypedFunc};

use super::bindings::exports::tightfit::host::planner as wit;
use super::{TEXT_LIMIT, convert};
use tightfit::policy::{Description, Proposal, Refusal, Request};

/// The interface as components name it.
const INTERFACE: &str = "tightfit:host/planner@0.1.0";

type Describe = TypedFunc<(), (wit::Description,)>;
type Plan = TypedFunc<(wit::Request,), (Result<wit::Proposal, wit::Refusal>,)>;

/// The functions of an instantiated policy. Nothing is limited here: fuel, time and memory are what
/// the host's store allows.
///
/// What [`Planner::plan`] gives is unchecked; [`Plan::new`](tightfit::plan::Plan::new) checks it, and
/// [`propose`](tightfit::plan::propose) does so for a [`Policy`](tightfit::policy::Policy).
#[derive(Clone)]
pub struct Planner {
    describe: Describe,
    plan: Plan,
}

impl std::fmt::Debug for Planner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Planner").finish_non_exhaustive()
    }
}

impl Planner {
    /// Finds the functions among what an instance exports.
    ///
    /// # Errors
    /// When it does not export them, or with other types.
    pub fn new(mut store: impl AsContextMut, instance: &Instance) -> wasmtime::Result<Planner> {
        let interface = instance
            .get_export_index(&mut store, None, INTERFACE)
            .ok_or_else(|| wasmtime::format_err!("it does not export {INTERFACE}"))?;
        let mut index = |name: &str| {
            instance
                .get_export_index(&mut store, Some(&interface), name)
                .ok_or_else(|| wasmtime::format_err!("{INTERFACE} has no function {name}"))
        };
        let (describe, plan) = (index("describe")?, index("plan")?);
        Ok(Planner {
            describe: instance.get_typed_func(&mut store, describe)?,
            plan: instance.get_typed_func(&mut store, plan)?,
        })
    }

    /// Returns who the policy is and what can be set.
    ///
    /// # Errors
    /// When it traps, or the store is asynchronous.
    pub fn describe(&self, store: impl AsContextMut) -> wasmtime::Result<Description> {
        let (description,) = self.describe.call(store, ())?;
        Ok(convert::description(description, TEXT_LIMIT))
    }

    /// Asks where every tensor goes.
    ///
    /// # Errors
    /// When it traps, or the store is asynchronous, and a [`BadPlacement`](super::BadPlacement).
    pub fn plan(
        &self,
        store: impl AsContextMut,
        request: &Request<'_>,
    ) -> wasmtime::Result<Result<Proposal, Refusal>> {
        let (answer,) = self.plan.call(store, (convert::request(request),))?;
        converted(answer, request)
    }
}

#[cfg(feature = "async")]
impl Planner {
    /// [`Planner::describe`] in an asynchronous store.
    ///
    /// # Errors
    /// When it traps.
    pub async fn describe_async(
        &self,
        store: impl AsContextMut<Data: Send>,
    ) -> wasmtime::Result<Description> {
        let (description,) = self.describe.call_async(store, ()).await?;
        Ok(convert::description(description, TEXT_LIMIT))
    }

    /// [`Planner::plan`] in an asynchronous store.
    ///
    /// # Errors
    /// When it traps, and a [`BadPlacement`](super::BadPlacement).
    pub async fn plan_async(
        &self,
        store: impl AsContextMut<Data: Send>,
        request: &Request<'_>,
    ) -> wasmtime::Result<Result<Proposal, Refusal>> {
        let (answer,) = self
            .plan
            .call_async(store, (convert::request(request),))
            .await?;
        converted(answer, request)
    }
}

fn converted(
    answer: Result<wit::Proposal, wit::Refusal>,
    request: &Request<'_>,
) -> wasmtime::Result<Result<Proposal, Refusal>> {
    Ok(match answer {
        Ok(proposal) => Ok(convert::proposal(proposal, request)?),
        Err(refusal) => Err(convert::refusal(refusal, TEXT_LIMIT)),
    })
}
