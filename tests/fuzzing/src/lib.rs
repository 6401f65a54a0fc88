//! What the fuzz targets do: each takes bytes from anyone and asserts what must hold whatever they
//! are. `fuzz/` calls these from libFuzzer; a test here runs them over the committed seeds, so that
//! CI needs no fuzzer.
#![forbid(unsafe_code)]

mod checkpoint;
#[cfg(feature = "component")]
mod component;
mod plan;
#[cfg(feature = "program")]
mod program;
mod quant_state;
#[cfg(unix)]
mod save;

pub use checkpoint::checkpoint;
#[cfg(feature = "component")]
pub use component::component;
pub use plan::plan;
#[cfg(feature = "program")]
pub use program::{program, program_seeds};
pub use quant_state::quant_state;
#[cfg(unix)]
pub use save::save_directory;

use std::path::PathBuf;

use tempfile::TempDir;

/// A target: whether the input was accepted. It panics where something does not hold.
pub type Target = fn(&[u8]) -> bool;

/// Every target with the name that it has in `fuzz/`.
pub const TARGETS: &[(&str, Target)] = &[
    ("checkpoint", checkpoint),
    #[cfg(feature = "component")]
    ("component", component),
    #[cfg(feature = "program")]
    ("program", program),
    ("plan", plan),
    ("quant_state", quant_state),
    #[cfg(unix)]
    ("save", save_directory),
];

/// A file with these bytes, in a directory that is this thread's alone.
fn file(name: &str, bytes: &[u8]) -> PathBuf {
    thread_local! {
        static DIRECTORY: TempDir = tempfile::tempdir().expect("there is room for files");
    }
    let path = DIRECTORY.with(|directory| directory.path().join(name));
    std::fs::write(&path, bytes).expect("files can be written");
    path
}
