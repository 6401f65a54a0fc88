//! The default placement policy.
//!
//! Formats: NF4 for every matrix of a linear layer and for all experts, everything else as stored.
//! Placement: layers whole and in order, spread over the accelerators so that the fullest one is
//! as empty as possible; less tidily where that does not fit, and on host memory what then is left.

#![forbid(unsafe_code)]

use tightfit_guest::{Description, Policy, Proposal, Refusal, Request, policy};
use tightfit_policy_layers::{Arrangement, describe, plan};

/// The policy.
#[derive(Debug)]
pub struct Auto;

policy!(Auto);

impl Policy for Auto {
    fn describe() -> Description {
        describe("auto", env!("CARGO_PKG_VERSION"))
    }

    fn plan(request: Request) -> Result<Proposal, Refusal> {
        plan(&request, Arrangement::Spread)
    }
}
