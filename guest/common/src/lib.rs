//! What Tightfit's host and its guests have to agree on: what the names of a checkpoint's tensors
//! say, how users write sizes, the parameters of the 4-bit formats, and what a tensor takes on a
//! device, to the byte.
//!
//! Nothing here depends on anything.
#![forbid(unsafe_code)]

pub mod bytes;
pub mod names;
mod options;
pub mod patterns;
mod quantization;
pub mod sizes;

pub use quantization::{BlockSize, IllegalBlockSize, QuantType};
