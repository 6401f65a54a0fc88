//! The kernels' sources, compiled for the CPU.

pub(crate) use tightfit_cuda_emulator::Emulator;
use tightfit_cuda_emulator::{MISSING, REQUIRE};
use tightfit_kernels::cuda::Launch;

use crate::device::{Argument, Device, skip};

/// Nothing where there is no C++ compiler.
pub(crate) fn start() -> Option<Emulator> {
    let emulator = Emulator::start().expect("the emulator starts");
    if emulator.is_none() {
        skip(REQUIRE, MISSING);
    }
    emulator
}

impl Device for Emulator {
    fn run(&mut self, launch: Launch, shared_bytes: u32, arguments: &mut [Argument]) {
        let Launch {
            kernel,
            grid,
            threads,
        } = launch;
        self.launch_with_shared(kernel, grid, threads, shared_bytes, arguments)
            .unwrap_or_else(|error| panic!("{error}"));
    }

    fn compute_capability(&self) -> (u32, u32) {
        (9, 0)
    }
}
