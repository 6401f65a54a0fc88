//! Several processes that load one model together, each its share: the ranks of a world.
//!
//! A plan follows from headers and devices alone, so that every rank makes the same one without being
//! told, and loads what of it is on its own devices ([`Plan::share`](crate::Plan::share)). [`World`] says
//! which rank this is, as launchers do (torchrun, Slurm, Open MPI, MPICH); [`PlanDigest`] is what
//! equal plans have in common; a [`Group`] lets ranks tell each other what is free on their devices, find
//! out before anything is reserved that they do not agree, and end together.
//!
//! Nobody is trusted: whatever comes from another process is checked like a file, and bad news from one of
//! them is an error of all.

mod digest;
mod error;
mod group;
mod message;
mod rendezvous;
#[cfg(test)]
mod tests;
mod world;

pub use digest::{Digest, ParseDigestError, PlanDigest};
pub use error::{Failure, RankError};
pub use group::{Group, JoinOptions};
pub use message::MAX_DEVICES;
pub use world::{Given, MAX_WORLD, Rendezvous, World, WorldError};
