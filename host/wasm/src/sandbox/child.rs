//! Compiling in a process that can be killed, from both ends.
//!
//! The parent sends its limits and the component, the child answers with code or with a reason.
//! Anything else - an answer that is cut short, a signal - is told from the way in which the child
//! ended.

use std::io::{self, Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use wasmtime::{Engine, OutOfMemory};

use super::code::{Code, check_length};
use super::run::{self, Reservation};
use super::{CompilerProgram, GuestFailure, Limits, space};
use crate::component;
use tightfit::cancel::CancelToken;

/// What the child is told before the component: four numbers of 8 bytes, least significant first.
struct Order {
    /// Bytes of address space.
    memory: u64,
    /// Seconds of processor time.
    seconds: u64,
    /// Bytes of stack that guests have.
    stack: u64,
    /// What their memories reserve: as a number, 1 where that is little.
    reservation: Reservation,
}

impl Order {
    fn write(&self, output: &mut impl Write) -> io::Result<()> {
        let little = u64::from(self.reservation == Reservation::Little);
        for number in [self.memory, self.seconds, self.stack, little] {
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
            reservation: match number()? {
                0 => Reservation::Whole,
                _ => Reservation::Little,
            },
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

/// Bytes that are read of why the child refuses.
const REASON: u64 = 64 << 10;

/// How often it is asked whether the user still wants the answer.
const TURN: Duration = Duration::from_millis(20);

/// Bytes that are read of what the child says as it dies.
const LAST_WORDS: u64 = 64 << 10;

/// Compiles a component, or a core module with the description of its world, that has been checked.
///
/// # Errors
/// [`GuestFailure::NotAComponent`], [`GuestFailure::CompileTime`], [`GuestFailure::CompileMemory`],
/// [`GuestFailure::Compiled`], [`GuestFailure::Compiler`], [`GuestFailure::Cancelled`]; [`GuestFailure::Host`] when the
/// child cannot be started.
pub(super) fn compile(
    program: &CompilerProgram,
    bytes: &[u8],
    limits: &Limits,
    reservation: Reservation,
    cancel: &CancelToken,
) -> Result<Code, GuestFailure> {
    let order = Order {
        memory: limits.compile_memory,
        // The parent's clock is the limit. Should the parent be gone, this one ends the child.
        seconds: limits.compile_time.as_secs().saturating_add(1),
        stack: limits.stack as u64,
        reservation,
    };
    let ended = talk(program, &order, bytes, limits, cancel).map_err(|error| {
        let program = program.program.display();
        GuestFailure::host(format_args!(
            "the compiler {program} cannot be run: {error}"
        ))
    })?;
    match ended.answer {
        Answer::Compiled(code) => {
            // SAFETY: the child is a program that the embedder chose; it answers with what
            // `compile_for_parent` made, and the answer is complete.
            #[allow(unsafe_code)]
            let code = unsafe { Code::new(code) };
            Ok(code)
        }
        Answer::TooLong(failure) => Err(failure),
        Answer::Refused(reason) => Err(GuestFailure::NotAComponent {
            reason: String::from_utf8_lossy(&reason).into_owned(),
        }),
        Answer::OutOfMemory => Err(out_of_memory(limits)),
        Answer::None => Err(ended.failure(limits)),
    }
}

/// Returns the failure of a child that ran out of memory: it inherits what this process may use,
/// where that is less.
fn out_of_memory(limits: &Limits) -> GuestFailure {
    match space::limit() {
        Some(most) if most < limits.compile_memory => space::failure("compiling it takes more"),
        _ => GuestFailure::CompileMemory {
            limit: limits.compile_memory,
        },
    }
}

/// What the child says.
#[derive(Debug)]
enum Answer {
    Compiled(Vec<u8>),
    /// Compiled, to more than is read.
    TooLong(GuestFailure),
    Refused(Vec<u8>),
    OutOfMemory,
    /// Nothing, or nothing whole.
    None,
}

impl Answer {
    /// Reads an answer about a guest of this many bytes, and no more of it than is allowed.
    fn read(input: &mut impl Read, guest: usize, limits: &Limits) -> io::Result<Answer> {
        let mut head = Vec::with_capacity(9);
        input.take(9).read_to_end(&mut head)?;
        let Some((&kind, length)) = head.split_first() else {
            return Ok(Answer::None);
        };
        let Ok(length) = <[u8; 8]>::try_from(length).map(u64::from_le_bytes) else {
            return Ok(Answer::None);
        };
        let limit = match kind {
            COMPILED => match check_length(length, guest, limits) {
                Ok(()) => length,
                Err(failure) => return Ok(Answer::TooLong(failure)),
            },
            OUT_OF_MEMORY => return Ok(Answer::OutOfMemory),
            REFUSED => length.min(REASON),
            _ => return Ok(Answer::None),
        };
        // Memory is taken as the bytes come.
        let mut contents = Vec::new();
        input.take(limit).read_to_end(&mut contents)?;
        if contents.len() as u64 != limit {
            return Ok(Answer::None);
        }
        contents.shrink_to_fit();
        Ok(match kind {
            COMPILED => Answer::Compiled(contents),
            _ => Answer::Refused(contents),
        })
    }
}

/// How a child ended.
struct Ended {
    answer: Answer,
    last_words: String,
    status: ExitStatus,
    timed_out: bool,
    cancelled: bool,
}

impl Ended {
    /// Returns why there is no answer.
    fn failure(&self, limits: &Limits) -> GuestFailure {
        if self.cancelled {
            return GuestFailure::Cancelled;
        }
        if self.timed_out {
            return GuestFailure::CompileTime {
                seconds: limits.compile_time.as_secs_f64(),
            };
        }
        // What the standard library says as it gives up, and what wasmtime does.
        let lack = ["memory allocation of ", "unhandled out-of-memory error"];
        if lack.iter().any(|words| self.last_words.contains(words)) {
            return out_of_memory(limits);
        }
        let last = self.last_words.lines().map(str::trim);
        let mut last = last.filter(|line| !line.is_empty() && !line.starts_with("note: "));
        let mut message = self.status.to_string();
        if let Some(last) = last.next_back() {
            message += ": ";
            message.extend(last.chars().take(500));
        }
        GuestFailure::Compiler { message }
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
    limits: &Limits,
    cancel: &CancelToken,
) -> io::Result<Ended> {
    let due = Instant::now().checked_add(limits.compile_time);
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
    #[cfg(windows)]
    {
        use std::os::windows::process::CommandExt;
        use windows_sys::Win32::System::Threading::{CREATE_NEW_PROCESS_GROUP, CREATE_NO_WINDOW};
        command.creation_flags(CREATE_NEW_PROCESS_GROUP | CREATE_NO_WINDOW);
    }
    let mut child = command.spawn()?;
    let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let kept = Kept(child);
    // Before it is told anything.
    #[cfg(windows)]
    let _job = super::job::Job::of(&kept.0, order.memory, order.seconds)?;
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
            // The parent may have stopped waiting.
            let _ = sender.send(Answer::read(&mut output, bytes.len(), limits));
        })?;
        let (mut cancelled, mut timed_out) = (false, false);
        let answer = loop {
            let left = due.map_or(TURN, |due| due.saturating_duration_since(Instant::now()));
            match answers.recv_timeout(left.min(TURN)) {
                Ok(answer) => break answer,
                Err(RecvTimeoutError::Timeout) if cancel.is_cancelled() => cancelled = true,
                Err(RecvTimeoutError::Timeout) if left > TURN => continue,
                Err(_) => timed_out = true,
            }
            break Ok(Answer::None);
        };
        let status = kept.end()?;
        Ok(Ended {
            answer: answer?,
            last_words: last_words.join().unwrap_or_default(),
            status,
            timed_out,
            cancelled,
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
        Ok(_) => match compiled(&bytes, &order) {
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
fn compiled(bytes: &[u8], order: &Order) -> Result<Vec<u8>, (u8, Vec<u8>)> {
    let refused = |reason: String| (REFUSED, reason.into_bytes());
    let component = component::component(bytes).map_err(refused)?;
    let stack = usize::try_from(order.stack).unwrap_or(usize::MAX);
    Engine::new(&run::config(stack, order.reservation))
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

/// The parent has done so.
#[cfg(windows)]
fn limit_process(_: &Order) -> io::Result<()> {
    Ok(())
}
