//! The CUDA kernels' sources, compiled for the CPU and run in a process of their own, for tests.

use std::io::{self, BufReader, BufWriter, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// The variable that, when it is `1`, makes the absence of a C++ compiler a failure of tests.
pub const REQUIRE: &str = "TIGHTFIT_REQUIRE_CXX";

/// What is missing where [`Emulator::start`] gives nothing.
pub const MISSING: &str = "no C++ compiler was found to compile the CUDA kernels for the CPU";

/// An argument of a kernel.
#[derive(Debug)]
pub enum Argument<'a> {
    /// By value, whatever its width.
    Number(u64),
    /// By address: these bytes are copied to the device, to `misalignment` bytes behind a multiple
    /// of 16, and back after the kernel.
    Buffer {
        /// Less than 16.
        misalignment: usize,
        /// What is in memory before, and after.
        bytes: &'a mut [u8],
    },
    /// A description of a matrix and of a tile of it, as `cuTensorMapEncodeTiled` makes it.
    Map {
        /// Which of the buffers that come before it has the matrix, from its first byte on.
        of: usize,
        /// Bytes of an element, columns, rows, bytes from one row to the next, columns and rows of a tile, and
        /// the bytes within which 16 are exchanged.
        numbers: [u64; 7],
    },
}

/// A process that runs kernels.
#[derive(Debug)]
pub struct Emulator {
    process: Child,
    requests: BufWriter<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Emulator {
    /// Nothing where there was no C++ compiler when this was built: see [`MISSING`].
    ///
    /// # Errors
    /// When the system refuses the process.
    pub fn start() -> io::Result<Option<Emulator>> {
        let program = env!("TIGHTFIT_EMULATOR");
        if program.is_empty() {
            return Ok(None);
        }
        let mut process = Command::new(program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (Some(requests), Some(answers)) = (process.stdin.take(), process.stdout.take()) else {
            return Err(io::Error::other("its input and output are not piped"));
        };
        Ok(Some(Emulator {
            requests: BufWriter::new(requests),
            answers: BufReader::new(answers),
            process,
        }))
    }

    /// Runs a kernel over a grid of `grid` blocks of `threads` threads.
    ///
    /// # Errors
    /// When the kernel has been stopped, for example because it wrote beside a buffer: why is on the
    /// process's standard error, and nothing more can be run.
    pub fn launch(
        &mut self,
        kernel: &str,
        grid: u32,
        threads: u32,
        arguments: &mut [Argument<'_>],
    ) -> io::Result<()> {
        self.launch_with_shared(kernel, grid, threads, 0, arguments)
    }

    /// The same, with `shared_bytes` bytes of dynamic shared memory for each block.
    ///
    /// # Errors
    /// As above.
    pub fn launch_with_shared(
        &mut self,
        kernel: &str,
        grid: u32,
        threads: u32,
        shared_bytes: u32,
        arguments: &mut [Argument<'_>],
    ) -> io::Result<()> {
        self.exchange(kernel, grid, threads, shared_bytes, arguments)
            .map_err(|error| {
                let status = self.process.wait();
                io::Error::new(error.kind(), format!("{kernel}: {error}; {status:?}"))
            })
    }

    fn exchange(
        &mut self,
        kernel: &str,
        grid: u32,
        threads: u32,
        shared_bytes: u32,
        arguments: &mut [Argument<'_>],
    ) -> io::Result<()> {
        let number = |to: &mut dyn Write, value: usize| to.write_all(&(value as u64).to_le_bytes());
        let to = &mut self.requests;
        number(to, kernel.len())?;
        to.write_all(kernel.as_bytes())?;
        number(to, grid as usize)?;
        number(to, threads as usize)?;
        number(to, shared_bytes as usize)?;
        number(to, arguments.len())?;
        for argument in &*arguments {
            match argument {
                Argument::Number(value) => {
                    number(to, 0)?;
                    to.write_all(&value.to_le_bytes())?;
                }
                Argument::Buffer {
                    misalignment,
                    bytes,
                } => {
                    number(to, 1)?;
                    number(to, *misalignment)?;
                    number(to, bytes.len())?;
                    to.write_all(bytes)?;
                }
                Argument::Map { of, numbers } => {
                    number(to, 2)?;
                    number(to, *of)?;
                    for value in numbers {
                        to.write_all(&value.to_le_bytes())?;
                    }
                }
            }
        }
        to.flush()?;
        for argument in arguments {
            if let Argument::Buffer { bytes, .. } = argument {
                let mut length = [0; 8];
                self.answers.read_exact(&mut length)?;
                if u64::from_le_bytes(length) != bytes.len() as u64 {
                    return Err(io::Error::other("it answers with another length"));
                }
                self.answers.read_exact(bytes)?;
            }
        }
        Ok(())
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // It may have stopped by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
