//! The kernels' sources, compiled for the CPU.

use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;
use std::{env, fs, process};

use tightfit_kernels::cuda::Launch;

use crate::device::{Argument, Device, skip};

const REQUIRE: &str = "TIGHTFIT_REQUIRE_CXX";

/// A process of the emulator.
pub(crate) struct Emulator {
    process: Child,
    requests: BufWriter<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Emulator {
    /// Nothing where there is no C++ compiler.
    pub(crate) fn start() -> Option<Emulator> {
        static PROGRAM: OnceLock<Result<PathBuf, String>> = OnceLock::new();
        let program = match PROGRAM.get_or_init(compile) {
            Ok(program) => program,
            Err(reason) => {
                skip(REQUIRE, reason);
                return None;
            }
        };
        let mut process = Command::new(program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the emulator starts");
        Some(Emulator {
            requests: BufWriter::new(process.stdin.take().expect("piped")),
            answers: BufReader::new(process.stdout.take().expect("piped")),
            process,
        })
    }

    fn request(&mut self, launch: Launch, arguments: &mut [Argument]) -> std::io::Result<()> {
        let number = |to: &mut dyn Write, value: usize| to.write_all(&(value as u64).to_le_bytes());
        let to = &mut self.requests;
        number(to, launch.kernel.len())?;
        to.write_all(launch.kernel.as_bytes())?;
        number(to, launch.grid as usize)?;
        number(to, launch.threads as usize)?;
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
            }
        }
        to.flush()?;
        for argument in arguments {
            if let Argument::Buffer { bytes, .. } = argument {
                let mut length = [0; 8];
                self.answers.read_exact(&mut length)?;
                assert_eq!(u64::from_le_bytes(length), bytes.len() as u64);
                self.answers.read_exact(bytes)?;
            }
        }
        Ok(())
    }
}

impl Device for Emulator {
    fn launch(&mut self, launch: Launch, arguments: &mut [Argument]) {
        if let Err(error) = self.request(launch, arguments) {
            // Why it has stopped is on standard error.
            let status = self.process.wait();
            panic!("{}: {error}; the emulator: {status:?}", launch.kernel);
        }
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // It may have stopped by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Compiles the emulator. An error says that there is no compiler; what does not compile is a
/// failure of the tests.
fn compile() -> Result<PathBuf, String> {
    if !cfg!(target_os = "linux") {
        return Err("the emulator is only known to work on Linux".to_owned());
    }
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let program = directory.join("cuda-emulator");
    // Under a name of its own until it is complete: tests may run twice at a time.
    let unfinished = directory.join(format!("cuda-emulator-{}", process::id()));
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/cuda/emulator.cpp");
    let named = env::var("CXX").ok();
    for compiler in named
        .as_deref()
        .into_iter()
        .chain(["c++", "g++", "clang++"])
    {
        let output = Command::new(compiler)
            .args(["-std=c++17", "-O1"])
            // One rounding for each operation, as the kernels are written.
            .args(["-fno-fast-math", "-ffp-contract=off"])
            // What a GPU stops at, or does otherwise than this processor: then a trap.
            .args(["-fsanitize=alignment,shift,signed-integer-overflow"])
            .arg("-fsanitize-undefined-trap-on-error")
            // Its checks take a fiber's jump for an error.
            .arg("-U_FORTIFY_SOURCE")
            .arg("-o")
            .arg(&unfinished)
            .arg(source)
            .output();
        let Ok(output) = output else { continue };
        assert!(
            output.status.success(),
            "{compiler} does not compile {source}:\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        fs::rename(&unfinished, &program).expect("the emulator can be renamed");
        return Ok(program);
    }
    Err("no C++ compiler was found to compile the CUDA kernels for the CPU".to_owned())
}
