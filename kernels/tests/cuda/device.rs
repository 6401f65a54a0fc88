//! What can launch a kernel: a GPU, or the emulator.

pub(crate) use tightfit_cuda_emulator::Argument;
use tightfit_kernels::cuda::{Launch, linear::LinearLaunch};

/// Runs one kernel at a time. Panics, naming the kernel, if it cannot be run, or if it writes to
/// memory beside a buffer.
pub(crate) trait Device {
    fn launch(&mut self, launch: Launch, arguments: &mut [Argument]);

    /// The same with a kernel of products.
    fn multiply(&mut self, launch: LinearLaunch, arguments: &mut [Argument]);

    /// Major and minor.
    fn compute_capability(&self) -> (u32, u32);
}

/// Whether an environment variable says that a device must be there.
pub(crate) fn is_required(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|value| value == "1")
}

/// What the tests that need a device do without it.
pub(crate) fn skip(variable: &str, reason: &str) {
    assert!(!is_required(variable), "{variable} is set, but {reason}");
    println!("skipped: {reason} ({variable}=1 makes this an error)");
}
