//! What a policy exports, called by a host that has its own engine, linker and store.

use wasmtime::AsContextMut;
use wasmtime::component::{Instance, TypedFunc};

use super::bindings::exports::tightfit::host::planner as wit;
use super::bindings::slicing::exports::tightfit::host::slicer;
use super::convert::BadSlices;
use super::{TEXT_LIMIT, convert};
use tightfit::policy::{Description, Proposal, Refusal, Request};

/// The interface as components name it.
const INTERFACE: &str = "tightfit:host/planner@0.1.0";

/// The one that policies have besides if they cut tensors.
const SLICER: &str = "tightfit:host/slicer@0.1.0";

type Describe = TypedFunc<(), (wit::Description,)>;
type Plan = TypedFunc<(wit::Request,), (Result<wit::Proposal, wit::Refusal>,)>;

type PlanSlices = TypedFunc<(wit::Request,), (Result<slicer::SlicedProposal, wit::Refusal>,)>;

/// The functions of an instantiated policy. Nothing is limited here: fuel, time and memory are what
/// the host's store allows.
///
/// What [`Planner::plan`] gives is unchecked; [`Plan::new`](tightfit::plan::Plan::new) checks it, and
/// [`propose`](tightfit::plan::propose) does so for a [`Policy`](tightfit::policy::Policy).
#[derive(Clone)]
pub struct Planner {
    describe: Describe,
    plan: Plan,
    plan_slices: Option<PlanSlices>,
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
        let plan_slices = match instance.get_export_index(&mut store, None, SLICER) {
            Some(interface) => {
                let index = instance.get_export_index(&mut store, Some(&interface), "plan-slices");
                let index = index
                    .ok_or_else(|| wasmtime::format_err!("{SLICER} has no function plan-slices"))?;
                Some(instance.get_typed_func(&mut store, index)?)
            }
            None => None,
        };
        Ok(Planner {
            describe: instance.get_typed_func(&mut store, describe)?,
            plan: instance.get_typed_func(&mut store, plan)?,
            plan_slices,
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

    /// Asks where every tensor goes, a policy that cuts tensors also which parts.
    ///
    /// # Errors
    /// When it traps, or the store is asynchronous, and a [`BadPlacement`](super::BadPlacement) or
    /// [`TooManyRanges`](super::TooManyRanges).
    pub fn plan(
        &self,
        store: impl AsContextMut,
        request: &Request<'_>,
    ) -> wasmtime::Result<Result<Proposal, Refusal>> {
        let converted_request = convert::request(request);
        if let Some(plan_slices) = &self.plan_slices {
            let (answer,) = plan_slices.call(store, (converted_request,))?;
            return sliced(answer, request);
        }
        let (answer,) = self.plan.call(store, (converted_request,))?;
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
    /// When it traps, and a [`BadPlacement`](super::BadPlacement) or
    /// [`TooManyRanges`](super::TooManyRanges).
    pub async fn plan_async(
        &self,
        store: impl AsContextMut<Data: Send>,
        request: &Request<'_>,
    ) -> wasmtime::Result<Result<Proposal, Refusal>> {
        let converted_request = convert::request(request);
        if let Some(plan_slices) = &self.plan_slices {
            let (answer,) = plan_slices.call_async(store, (converted_request,)).await?;
            return sliced(answer, request);
        }
        let (answer,) = self.plan.call_async(store, (converted_request,)).await?;
        converted(answer, request)
    }
}

fn sliced(
    answer: Result<slicer::SlicedProposal, wit::Refusal>,
    request: &Request<'_>,
) -> wasmtime::Result<Result<Proposal, Refusal>> {
    Ok(match answer {
        Ok(proposal) => Ok(convert::sliced_proposal(proposal, request).map_err(
            |error| match error {
                BadSlices::Placement(error) => wasmtime::Error::from(error),
                BadSlices::Ranges(error) => error.into(),
            },
        )?),
        Err(refusal) => Err(convert::refusal(refusal, TEXT_LIMIT)),
    })
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
