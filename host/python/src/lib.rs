//! The module `tightfit._native`: what of the Python package knows files, plans and memory. What knows
//! torch and transformers is Python, beside it in `python/tightfit`.
//!
//! Every call that may take long runs on a thread of its own while the caller's thread, without the
//! interpreter's lock, looks at signals and reports progress (see `work`). Threads of the library
//! never ask for that lock.
// Denied and not forbidden: `dlpack` makes capsules, which Python's C interface alone can, and `products`
// has torch's addresses.
#![deny(unsafe_code)]

mod checkpoint;
mod command;
mod dlpack;
mod failure;
mod log;
mod model;
mod plan;
mod policies;
mod products;
mod save;
mod weight;
mod work;

use pyo3::prelude::*;

/// Tightfit's native half; see the package `tightfit`.
#[pymodule]
mod _native {
    use super::{Bound, PyModule, PyModuleMethods, PyResult};

    #[pymodule_export]
    use crate::checkpoint::{Checkpoint, Slice, TensorInfo, open};
    #[pymodule_export]
    use crate::command::{compile_guest, main};
    #[pymodule_export]
    use crate::model::{DeviceMemory, Model, load};
    #[pymodule_export]
    use crate::plan::{DevicePlan, Plan, PlannedTensor, plan};
    #[pymodule_export]
    use crate::products::{Experts, Linear, Workspace};
    #[pymodule_export]
    use crate::save::save;
    #[pymodule_export]
    use crate::weight::{Part, Weight};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("BUILTIN_POLICIES", tightfit_wasm::policy::BUILTIN_POLICIES)
    }
}
