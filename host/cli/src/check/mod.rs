//! Declarative tests of policies: scenario files that say what a policy is asked and what shall
//! come of it.
//!
//! [`ScenarioFile::read`] parses and checks a file, [`Runner::run`] asks the policy about one of
//! its cases, and [`judge()`] compares a plan, or the lack of one, with what was expected. Models
//! are real checkpoints: those that a scenario describes are written, without weights, and opened
//! like any other. Nothing is printed. A scenario file is treated as written by an attacker.
#![forbid(unsafe_code)]

mod error;
mod expect;
mod judge;
mod junit;
mod model;
mod outcome;
mod parse;
mod run;
mod slices;
mod values;

pub use error::{CheckError, RunError};
pub use expect::Expect;
pub use judge::judge;
pub use junit::junit;
pub use model::{ModelSource, TensorEntry};
pub use outcome::{CaseReport, CaseStatus, CheckReport, FileReport, Finding};
pub use parse::{Case, MAX_CASES, MAX_FILE_BYTES, PolicySource, ScenarioFile};
pub use run::Runner;
