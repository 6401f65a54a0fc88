//! What Tightfit's host and its guests have to agree on: what the names of a checkpoint's tensors
//! say, how users write sizes, the parameters of the 4-bit formats, and what a tensor takes on a
//! device, to the byte.
//!
//! Nothing here depends on anything. Policies and programs use it through their SDKs, `tightfit-guest` and
//! `tightfit-program`, and applications through `tightfit`.
//!
//! ```
//! use tightfit_common::{BlockSize, bytes::parse_bytes, names::layer_of, sizes};
//!
//! assert_eq!(layer_of("model.layers.7.mlp.up_proj.weight"), Some(("model.layers", 7)));
//! assert_eq!(parse_bytes("1.5GiB"), Ok(3 << 29));
//!
//! // 4864 x 896 elements of 16 bits in NF4: half a byte each, and four bytes for every 64.
//! let parts = sizes::nf4(&[4864, 896], 16, BlockSize::DEFAULT, false).ok_or("too large")?;
//! assert_eq!((parts.codes, parts.absmax), (2_179_072, 272_384));
//! # Ok::<(), &str>(())
//! ```
#![forbid(unsafe_code)]

pub mod bytes;
pub mod names;
mod options;
pub mod patterns;
mod quantization;
pub mod sizes;

pub use quantization::{BlockSize, IllegalBlockSize, QuantType};
