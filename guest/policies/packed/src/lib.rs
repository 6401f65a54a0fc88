//! The placement policy that uses the fewest accelerators.
//!
//! Formats and settings are those of `auto`. Layers go in order onto as few accelerators as hold
//! them, each filled before the next, and whole where that takes no more of them. The other
//! accelerators stay empty; host memory is used when all are full.

#![forbid(unsafe_code)]

use tightfit_guest::{Description, Policy, Proposal, Refusal, Request, policy};
use tightfit_policy_layers::{Arrangement, describe, plan};

/// The policy.
#[derive(Debug)]
pub struct Packed;

policy!(Packed);

impl Policy for Packed {
    fn describe() -> Description {
        describe("packed", env!("CARGO_PKG_VERSION"))
    }

    fn plan(request: Request) -> Result<Proposal, Refusal> {
        plan(&request, Arrangement::Pack)
    }
}
