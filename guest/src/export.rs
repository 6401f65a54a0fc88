//! The glue between the generated exports and [`Policy`].

use std::marker::PhantomData;
use std::sync::Once;

use crate::bindings::exports::tightfit::host::planner::Guest;
use crate::{Description, Level, Policy, Proposal, Refusal, Request};

/// What [`policy!`](crate::policy) exports.
#[derive(Debug)]
pub struct Exported<P>(PhantomData<P>);

impl<P: Policy> Guest for Exported<P> {
    fn describe() -> Description {
        report_panics();
        P::describe()
    }

    fn plan(request: Request) -> Result<Proposal, Refusal> {
        report_panics();
        P::plan(request)
    }
}

#[cfg(feature = "slices")]
impl<P: Policy> crate::bindings::exports::tightfit::host::slicer::Guest for Exported<P> {
    fn plan_slices(request: Request) -> Result<crate::SlicedProposal, Refusal> {
        report_panics();
        P::plan_slices(request)
    }
}

/// A panic ends in a trap, which carries no text. The message goes to the log before that, where
/// the host finds it.
fn report_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        std::panic::set_hook(Box::new(|panic| {
            crate::log(Level::Error, &panic.to_string());
        }));
    });
}
