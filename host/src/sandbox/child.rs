//! Compiling in a process that can be killed, from both ends.
//!
//! The parent sends its limits and the component, the child answers with code or with a reason.
//! Anything else - an answer that is cut short, a signal - is told from the way in which the child
//! ended.

use std::io::{self, Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use wasmtime::{Engine, OutOfMemory};

use super::code::Code;
use super::{CompilerProgram, Failure, Limits, module, run};

/// What the child is told before the component: three numbers of 8 bytes, least significant first.
struct Order {
    /// Bytes of address space.
    memory: u64,
    /// Seconds of processor time.
    seconds: u64,
    /// Bytes of stack that guests have.
    stack: u64,
}

impl Order {
    fn write(&self, output: &mut impl Write) -> io::Result<()> {
        for number in [self.memory, self.seconds, self.stack] {
            output.write_all(&number.to_le_bytes())?;
        }
        Ok(())
    }

    fn read(input: &mut impl Read) -> io::Result<Order> {
        let mut number = || {
            let mut bytes = [0; 8];
            input.read_exact(&mut bytes)?;
            Ok::<u64, io::Error>(u64::from_le_bytes(bytes))
        };
        Ok(Order {
            memory: number()?,
            seconds: number()?,
            stack: number()?,
        })
    }
}

/// The first byte of an answer; its length and itself follow.
const COMPILED: u8 = b'+';
const REFUSED: u8 = b'-';
const OUT_OF_MEMORY: u8 = b'm';

/// Environment variables without which a program may not start. The child is given no other: it
/// has no use for what may be secret.
const ENVIRONMENT: [&str; 3] = ["LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SystemRoot"];

/// Bytes that are read of what the child says as it dies.
const LAST_WORDS: u64 = 64 << 10;

/// Compiles a component, or a core module with the description of its world, that has been checked.
///
/// # Errors
/// [`Failure::NotAComponent`], [`Failure::CompileTime`], [`Failure::CompileMemory`],
/// [`Failure::Compiler`]; [`Failure::Host`] when the child cannot be started.
pub(super) fn compile(
    program: &CompilerProgram,
    bytes: &[u8],
    limits: &Limits,
) -> Result<Code, Failure> {
    let order = Order {
        memory: limits.compile_memory,
        // The parent's clock is the limit. Should the parent be gone, this one ends the child.
        seconds: limits.compile_time.as_secs().saturating_add(1),
        stack: limits.stack as u64,
    };
    let ended = talk(program, &order, bytes, limits.compile_time).map_err(|error| {
        let program = program.program.display();
        Failure::host(format_args!(
            "the compiler {program} cannot be run: {error}"
        ))
    })?;
    match answer(&ended.output) {
        Some((COMPILED, code)) => {
            // SAFETY: the child is a program that the embedder chose; it answers with what
            // `compile_for_parent` made, and the answer is complete.
            #[allow(unsafe_code)]
            let code = unsafe { Code::new(code.to_vec()) };
            Ok(code)
        }
        Some((REFUSED, reason)) => Err(Failure::NotAComponent {
            reason: String::from_utf8_lossy(reason).into_owned(),
        }),
        Some((OUT_OF_MEMORY, _)) => Err(Failure::CompileMemory {
            limit: limits.compile_memory,
        }),
        _ => Err(ended.failure(limits)),
    }
}

/// What a complete answer says, and its contents.
fn answer(output: &[u8]) -> Option<(u8, &[u8])> {
    let (&kind, rest) = output.split_first()?;
    let (length, contents) = rest.split_first_chunk()?;
    (u64::from_le_bytes(*length) == contents.len() as u64).then_some((kind, contents))
}

/// How a child ended.
struct Ended {
    output: Vec<u8>,
    last_words: String,
    status: ExitStatus,
    timed_out: bool,
}

impl Ended {
    /// Why there is no answer.
    fn failure(&self, limits: &Limits) -> Failure {
        if self.timed_out {
            return Failure::CompileTime {
                seconds: limits.compile_time.as_secs_f64(),
            };
        }
        // What the standard library says as it gives up.
        if self.last_words.contains("memory allocation of ") {
            return Failure::CompileMemory {
                limit: limits.compile_memory,
            };
        }
        let last = self.last_words.lines().map(str::trim);
        let mut last = last.filter(|line| !line.is_empty() && !line.starts_with("note: "));
        let mut message = self.status.to_string();
        if let Some(last) = last.next_back() {
            message += ": ";
            message.extend(last.chars().take(500));
        }
        Failure::Compiler { message }
    }
}

/// Ended and waited for when dropped.
struct Kept(Child);

impl Kept {
    fn end(&mut self) -> io::Result<ExitStatus> {
        // It has ended by itself, or has closed its output and has nothing more to say, or is late.
        let _ = self.0.kill();
        self.0.wait()
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

fn talk(
    program: &CompilerProgram,
    order: &Order,
    bytes: &[u8],
    patience: Duration,
) -> io::Result<Ended> {
    let mut command = Command::new(&program.program);
    command.args(&program.arguments).env_clear();
    command.envs(
        ENVIRONMENT
            .iter()
            .filter_map(|&name| Some((name, std::env::var_os(name)?))),
    );
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // An interrupt at the terminal is for the parent.
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let mut child = command.spawn()?;
    let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let kept = Kept(child);
    let (Some(mut input), Some(mut output), Some(mut errors)) = pipes else {
        return Err(io::Error::other("no pipes to it"));
    };
    thread::scope(|scope| {
        // Ended at every way out, so that the threads see the end of their pipes.
        let mut kept = kept;
        let named = |name: &str| thread::Builder::new().name(format!("tightfit-compile-{name}"));
        named("in").spawn_scoped(scope, move || {
            // A child that stops reading says why elsewhere.
            let _ = order
                .write(&mut input)
                .and_then(|()| input.write_all(bytes));
        })?;
        let last_words = named("err").spawn_scoped(scope, move || {
            let mut words = Vec::new();
            let _ = (&mut errors).take(LAST_WORDS).read_to_end(&mut words);
            let _ = io::copy(&mut errors, &mut io::sink());
            String::from_utf8_lossy(&words).into_owned()
        })?;
        let (sender, answers) = mpsc::sync_channel(1);
        named("out").spawn_scoped(scope, move || {
            let mut answer = Vec::new();
            let read = output.read_to_end(&mut answer);
            // The parent may have stopped waiting.
            let _ = sender.send(read.map(|_| answer));
        })?;
        let answer = answers.recv_timeout(patience);
        let status = kept.end()?;
        Ok(Ended {
            timed_out: answer.is_err(),
            output: answer.unwrap_or_else(|_| Ok(Vec::new()))?,
            last_words: last_words.join().unwrap_or_default(),
            status,
        })
    })
}

/// The child's part of [`Compiler::Child`](super::Compiler::Child): reads a component from `input`,
/// compiles it and writes the code to `output`. For a process that does nothing else, with its
/// standard input and output: its address space, its processor time and the files it writes are
/// limited from here on.
///
/// # Errors
/// When the parent cannot be read from or written to, or the limits cannot be set.
pub fn compile_for_parent(mut input: impl Read, mut output: impl Write) -> io::Result<()> {
    let order = Order::read(&mut input)?;
    limit_process(&order)?;
    let mut bytes = Vec::new();
    let (kind, contents) = match input.read_to_end(&mut bytes) {
        Ok(_) => match compiled(&bytes, order.stack) {
            Ok(code) => (COMPILED, code),
            Err(answer) => answer,
        },
        Err(error) if error.kind() == io::ErrorKind::OutOfMemory => (OUT_OF_MEMORY, Vec::new()),
        Err(error) => return Err(error),
    };
    output.write_all(&[kind])?;
    output.write_all(&(contents.len() as u64).to_le_bytes())?;
    output.write_all(&contents)?;
    output.flush()
}

/// Code, or another answer.
fn compiled(bytes: &[u8], stack: u64) -> Result<Vec<u8>, (u8, Vec<u8>)> {
    let refused = |reason: String| (REFUSED, reason.into_bytes());
    let component = module::component(bytes).map_err(refused)?;
    let stack = usize::try_from(stack).unwrap_or(usize::MAX);
    Engine::new(&run::config(stack))
        .and_then(|engine| engine.precompile_component(&component))
        .map_err(|error| match error.is::<OutOfMemory>() {
            true => (OUT_OF_MEMORY, Vec::new()),
            false => refused(format!("{error:#}")),
        })
}

#[cfg(unix)]
fn limit_process(order: &Order) -> io::Result<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    #[cfg(target_os = "linux")]
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    let limits = [
        (Resource::As, order.memory),
        (Resource::Cpu, order.seconds),
        (Resource::Fsize, 0),
        (Resource::Core, 0),
    ];
    for (resource, value) in limits {
        // What is lower already stays.
        let value = getrlimit(resource)
            .maximum
            .map_or(value, |most| most.min(value));
        let value = Some(value);
        setrlimit(
            resource,
            Rlimit {
                current: value,
                maximum: value,
            },
        )?;
    }
    Ok(())
}

/// Only the parent's clock limits it.
#[cfg(not(unix))]
fn limit_process(_: &Order) -> io::Result<()> {
    Ok(())
}
