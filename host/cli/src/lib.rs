//! The command `tightfit` as a library: scenario files that test policies, and plans and reports as
//! text and pictures.
#![forbid(unsafe_code)]

pub mod check;
mod command;
pub mod draw;
mod error_report;

pub use command::main;
pub use error_report::ErrorReport;
