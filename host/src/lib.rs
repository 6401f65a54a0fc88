//! Tightfit loads Hugging Face checkpoints into 4-bit NF4 in exactly the memory the weights need.
#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod synth;
pub mod types;
