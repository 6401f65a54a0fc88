//! What can launch a kernel: a GPU, or the emulator.

pub(crate) use tightfit_cuda_emulator::Argument;
use tightfit_kernels::cuda::{
    Launch,
    decoder::DecoderLaunch,
    experts::ExpertsLaunch,
    linear::{LinearLaunch, TileMap},
};

/// Runs one kernel at a time. Panics, naming the kernel, if it cannot be run, or if it writes to
/// memory beside a buffer.
pub(crate) trait Device {
    fn run(&mut self, launch: Launch, shared_bytes: u32, arguments: &mut [Argument]);

    /// Major and minor.
    fn compute_capability(&self) -> (u32, u32);

    fn launch(&mut self, launch: Launch, arguments: &mut [Argument]) {
        self.run(launch, 0, arguments);
    }

    /// The same with a kernel of products.
    fn multiply(&mut self, launch: LinearLaunch, arguments: &mut [Argument]) {
        let LinearLaunch {
            kernel,
            grid,
            threads,
            shared_bytes,
            maps,
            ..
        } = launch;
        let launch = Launch {
            kernel,
            grid,
            threads,
        };
        let Some([of_x, of_codes]) = maps else {
            return self.run(launch, shared_bytes, arguments);
        };
        // Codes are the first argument and x the sixth.
        let is_buffer = |argument: &&Argument| matches!(argument, Argument::Buffer { .. });
        let x = arguments[..5].iter().filter(is_buffer).count();
        let maps = [map(x, of_x), map(0, of_codes)];
        let arguments = arguments.iter_mut().map(|argument| match argument {
            Argument::Number(value) => Argument::Number(*value),
            Argument::Buffer {
                misalignment,
                bytes,
            } => Argument::Buffer {
                misalignment: *misalignment,
                bytes,
            },
            Argument::Map { of, numbers } => map_of(*of, *numbers),
        });
        let mut arguments: Vec<Argument> = arguments.chain(maps).collect();
        self.run(launch, shared_bytes, &mut arguments);
    }

    /// The same with a kernel of what lies between products.
    fn launch_decoder(&mut self, launch: DecoderLaunch, arguments: &mut [Argument]) {
        let DecoderLaunch {
            kernel,
            grid,
            threads,
            ..
        } = launch;
        let launch = Launch {
            kernel,
            grid,
            threads,
        };
        self.run(launch, 0, arguments);
    }

    /// The same with a kernel for experts.
    fn launch_experts(&mut self, launch: ExpertsLaunch, arguments: &mut [Argument]) {
        let ExpertsLaunch {
            kernel,
            grid,
            threads,
            shared_bytes,
            ..
        } = launch;
        let launch = Launch {
            kernel,
            grid,
            threads,
        };
        self.run(launch, shared_bytes, arguments);
    }
}

fn map_of(of: usize, numbers: [u64; 7]) -> Argument<'static> {
    Argument::Map { of, numbers }
}

fn map(of: usize, map: TileMap) -> Argument<'static> {
    let TileMap {
        element_bytes,
        columns,
        rows,
        row_bytes,
        tile: [tile_columns, tile_rows],
        swizzle,
    } = map;
    let [element_bytes, tile_columns, tile_rows, swizzle] =
        [element_bytes, tile_columns, tile_rows, swizzle].map(u64::from);
    let numbers = [
        element_bytes,
        columns,
        rows,
        row_bytes,
        tile_columns,
        tile_rows,
        swizzle,
    ];
    map_of(of, numbers)
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
