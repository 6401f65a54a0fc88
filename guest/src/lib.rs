//! SDK for placement policies of [Tightfit](https://github.com/tightfit/tightfit).
//!
//! A policy is a WebAssembly module with one pure function: from what a checkpoint holds and which
//! devices there are, to where every tensor goes and in which format. It has no clock, no
//! randomness, no files and no network, and it never sees a weight.
//!
//! ```
//! use tightfit_guest::{Description, Format, Placement, Policy, Proposal, Refusal, Request, policy};
//!
//! struct AllOnTheFirst;
//!
//! impl Policy for AllOnTheFirst {
//!     fn describe() -> Description {
//!         Description::new("all-on-the-first", "1.0.0", &[])
//!     }
//!
//!     fn plan(request: Request) -> Result<Proposal, Refusal> {
//!         let there = Placement::on(0, Format::Stored);
//!         Ok(Proposal::without_headroom(&request, vec![there; request.tensors.len()]))
//!     }
//! }
//!
//! policy!(AllOnTheFirst);
//! # fn main() {}
//! ```
//!
//! What a policy answers can be tested natively:
//!
//! ```
//! use tightfit_guest::{Device, Dtype, Request, Tensor};
//!
//! let tensors = vec![Tensor::new("model.layers.0.mlp.up_proj.weight", Dtype::Bf16, &[64, 32])];
//! let request = Request::new(tensors, vec![Device::new("sim:0", 1 << 30)]).set("layer", "3");
//! assert_eq!(request.tensors[0].bytes, 4096);
//! ```
//!
//! A policy can also cut tensors, each device to get a part: with the feature `slices` it has
//! a function `plan_slices` more, and helpers in the module `slices`.
//!
//! What most policies need is here too: [`names`] (which layer is a tensor of, what is it for),
//! [`formats`] (what is quantized), [`sizing`] (what it takes on a device), [`partition`]
//! (spreading a sequence over devices), [`tree`] (the modules that names stand for), [`settings`] and
//! [`patterns`] (what the user asked for).

#![deny(unsafe_code)]

// The generated code names this crate from the outside, wherever it is expanded.
extern crate self as tightfit_guest;

pub mod amounts;
#[doc(hidden)]
pub mod bindings;
pub mod config;
#[doc(hidden)]
pub mod export;
pub mod formats;
pub mod in_memory;
mod kept;
mod log;
pub mod names;
pub mod partition;
pub mod settings;
pub mod sizing;
#[cfg(feature = "slices")]
pub mod slices;
pub mod tree;
mod types;

pub use bindings::exports::tightfit::host::planner::{
    Description, Failure as PreviousFailure, Proposal, Refusal, RefusalReason, Request,
    RequiredFormat, Setting, Tie,
};
#[cfg(feature = "slices")]
pub use bindings::exports::tightfit::host::slicer::SlicedProposal;
pub use bindings::tightfit::host::log::Level;
pub use bindings::tightfit::host::sizing::StoredSize;
#[cfg(feature = "slices")]
pub use bindings::tightfit::host::slices::{Range as SliceRange, Slice};
pub use bindings::tightfit::host::types::{
    Device, DeviceKind, Dtype, Error, ErrorCode, Format, Nf4Format, Placement, QuantType,
    Quantization, Tensor,
};
pub use kept::transposed;
pub use log::log;
pub use tightfit_common::patterns;

/// A placement policy. Export it with [`policy!`].
pub trait Policy {
    /// Returns who the policy is and which settings it understands. Called before every `plan`.
    fn describe() -> Description;

    /// Decides where every tensor goes and in which format.
    ///
    /// # Errors
    /// A [`Refusal`] when the policy cannot place this model on these devices.
    fn plan(request: Request) -> Result<Proposal, Refusal>;

    /// Decides where every tensor goes, whole or in slices, and in which format. Hosts that know of slices
    /// call this instead of `plan`, whose answer it is unless a policy has more to say.
    ///
    /// # Errors
    /// As [`Policy::plan`].
    #[cfg(feature = "slices")]
    fn plan_slices(request: Request) -> Result<SlicedProposal, Refusal> {
        Self::plan(request).map(SlicedProposal::from)
    }
}

/// Exports a type that implements [`Policy`] as the policy of this crate, which must be a `cdylib`.
/// Natively nothing is exported, so that the crate's tests run anywhere.
#[macro_export]
#[rustfmt::skip]
macro_rules! policy {
    ($policy:ident) => {
        #[cfg(target_family = "wasm")]
        const _: () = {
            type Exported = $crate::export::Exported<$policy>;
            $crate::bindings::export!(Exported with_types_in $crate::bindings);
        };
        // Natively this is what uses the policy.
        #[cfg(not(target_family = "wasm"))]
        const _: fn($crate::Request) -> Result<$crate::Proposal, $crate::Refusal> =
            <$policy as $crate::Policy>::plan;
    };
}
