//! The command `tightfit`, which comes with the package, and what compiles policies for it.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use tightfit_wasm::sandbox::{CompilerProgram, compile_for_parent};

/// What the interpreter runs to compile a policy: this module alone, from its file. No site, no
/// environment: it has no use for either, and the sandbox gives it none.
const COMPILE: &str = "\
import sys
from importlib.machinery import ExtensionFileLoader as Loader
from importlib.util import module_from_spec, spec_from_loader
loader = Loader('_native', sys.argv[1])
module = module_from_spec(spec_from_loader('_native', loader))
loader.exec_module(module)
module.compile_guest()
";

/// What compiles policies of users: this interpreter, started again. `None` where it does not say which
/// program that is, as when it is embedded.
pub(crate) fn compiler(py: Python<'_>) -> PyResult<Option<CompilerProgram>> {
    let program: Option<PathBuf> = py.import("sys")?.getattr("executable")?.extract()?;
    let Some(program) = program.filter(|program| program.is_absolute()) else {
        return Ok(None);
    };
    let module: PathBuf = py
        .import("tightfit._native")?
        .getattr("__file__")?
        .extract()?;
    let arguments = ["-I", "-S", "-c", COMPILE].map(OsString::from);
    Ok(Some(CompilerProgram {
        program,
        arguments: arguments.into_iter().chain([module.into()]).collect(),
    }))
}

/// Runs the command with these arguments, the first of which is its name. Gives the exit status.
#[pyfunction]
pub(crate) fn main(py: Python<'_>, arguments: Vec<OsString>) -> PyResult<u8> {
    let compiler = compiler(py)?;
    Ok(py.detach(|| tightfit_cli::main_with(arguments, compiler)))
}

/// Compiles a policy for another process, which writes it to this one's standard input.
#[pyfunction]
pub(crate) fn compile_guest(py: Python<'_>) -> PyResult<()> {
    py.detach(|| compile_for_parent(io::stdin().lock(), io::stdout().lock()))
        .map_err(|error| PyRuntimeError::new_err(error.to_string()))
}
