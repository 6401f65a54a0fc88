//! Helpers for the end-to-end tests. They panic instead of returning errors: a test has nothing
//! better to do.
#![forbid(unsafe_code)]

pub mod command;
pub mod device_maps;
pub mod double_quant;
pub mod failures;
#[cfg(unix)]
pub mod foreign;
pub mod generate;
pub mod golden;
pub mod guests;
pub mod hub_server;
pub mod json_schema;
pub mod loading;
pub mod models;
pub mod products;
pub mod programs;
pub mod reference;
pub mod saving;
pub mod sources;
pub mod tensors;
pub mod wasi;
pub mod wit_package;
