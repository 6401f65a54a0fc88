//! Checkpoints of real shape with seeded random weights, for demonstrations, tests and benchmarks
//! where the real ones cannot or need not be downloaded.
//!
//! Names, shapes, types, shards, index and `config.json` are those of the real models; the weights
//! are normally distributed, which is what NF4 is made for, and those that are published in 8 or 4
//! bits are about as large once decoded. The same preset and seed give the same weights on every
//! machine, however they are cut into shards.
#![forbid(unsafe_code)]

mod config;
mod created;
mod deepseek;
mod error;
mod gpt_oss;
mod layout;
mod model;
mod preset;
mod random;
mod shards;
#[cfg(test)]
mod tests;
mod write;

pub use error::SynthError;
pub use model::{Model, Tensor, Values};
pub use preset::Preset;
pub use write::{SynthOptions, Written, write, write_model};
