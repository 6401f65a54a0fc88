//! Stands in for NVIDIA's driver in tests: the functions that Tightfit calls, over host memory.
//!
//! Unlike a driver it forgives nothing. Copies are carried out as late as they may be, so that a
//! missing wait shows; whatever is freed twice, used after it was freed, used under the wrong
//! context, or left behind is a fault in its books. It can be told to fail a call, and to have less
//! memory than it says.
//!
//! As a `cdylib` it is the driver. As an `rlib` it is how tests find, set up and question that
//! library ([`control`]).
// Whoever looks for the driver's functions finds them by their names in the library.
#![allow(unreachable_pub)]

mod books;
mod calls;
pub mod control;
mod host;
mod memory;
mod setup;
mod streams;
