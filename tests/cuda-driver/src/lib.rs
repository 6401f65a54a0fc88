//! Stands in for NVIDIA's driver in tests: the functions that Tightfit calls, over host memory.
//!
//! Unlike a driver it forgives nothing. Copies and kernels are carried out as late as they may be, so
//! that a missing wait shows; what two streams do to the same memory without waiting for each other,
//! whatever is freed twice, used after it was freed, used under the wrong context, or left behind is a
//! fault in its books. Kernels are run from their own sources, by an emulator. It can be told to fail
//! a call, and to have less memory than it says.
//!
//! As a `cdylib` it is the driver. As an `rlib` it is how tests find, set up and question that
//! library ([`control`]).
// Whoever looks for the driver's functions finds them by their names in the library.
#![allow(unreachable_pub)]

pub mod application;
mod books;
mod calls;
pub mod control;
mod decoder;
mod experts;
mod graphs;
mod host;
mod kernels;
mod memory;
mod modules;
mod products;
mod setup;
mod streams;
mod tiles;
