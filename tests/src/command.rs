//! Runs the command `tightfit`.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

#[cfg(unix)]
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// The command: cargo builds it for the tests of its package and tells them where. A test that is
/// started by hand runs the one beside it.
pub fn tightfit() -> PathBuf {
    if let Some(path) = std::env::var_os("CARGO_BIN_EXE_tightfit") {
        return path.into();
    }
    let test = std::env::current_exe().expect("a test knows its own path");
    let directory = test.parent().and_then(Path::parent);
    let name = format!("tightfit{}", std::env::consts::EXE_SUFFIX);
    let path = directory
        .expect("tests are in target/PROFILE/deps")
        .join(name);
    assert!(
        path.exists(),
        "{} is not there: the command is built for the tests of its own package only",
        path.display()
    );
    path
}

/// A place of its own to run the command in: working directory, home and temporary directory.
#[derive(Debug)]
pub struct Scratchpad {
    directory: TempDir,
    variables: Vec<(&'static str, String)>,
}

impl Default for Scratchpad {
    fn default() -> Scratchpad {
        Scratchpad::new()
    }
}

impl Scratchpad {
    /// An empty one.
    pub fn new() -> Scratchpad {
        let directory = TempDir::new().expect("there is room for a temporary directory");
        for name in ["work", "home", "tmp"] {
            fs::create_dir(directory.path().join(name)).unwrap();
        }
        Scratchpad {
            directory,
            variables: Vec::new(),
        }
    }

    /// Sets a variable for the command.
    pub fn set(&mut self, name: &'static str, value: impl Into<String>) {
        self.variables.push((name, value.into()));
    }

    /// A path in the working directory.
    pub fn path(&self, relative: &str) -> PathBuf {
        self.directory.path().join("work").join(relative)
    }

    /// Where the command puts temporary files.
    pub fn temporary(&self) -> PathBuf {
        self.directory.path().join("tmp")
    }

    /// A program with nothing of this process's environment.
    fn command_of(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(self.path(""))
            .env_clear()
            .envs(self.places())
            // No test may ask the real hub.
            .env("HF_HUB_OFFLINE", "1")
            // Without `--device` tests mean the processor, also on a machine with GPUs.
            .env("CUDA_VISIBLE_DEVICES", "")
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// What says where home and temporary files are.
    fn places(&self) -> Vec<(&'static str, PathBuf)> {
        let home = self.directory.path().join("home");
        if cfg!(windows) {
            // Without the last, nothing is random.
            let system = std::env::var_os("SystemRoot").expect("Windows sets it");
            return vec![
                ("LOCALAPPDATA", home.join("AppData").join("Local")),
                ("USERPROFILE", home),
                ("TMP", self.temporary()),
                ("SystemRoot", system.into()),
            ];
        }
        vec![("HOME", home), ("TMPDIR", self.temporary())]
    }

    /// Runs it to its end.
    pub fn run<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Outcome {
        self.start(arguments).finish()
    }

    /// Runs it and lets go of its output at once, as `| true` does.
    pub fn run_unheard<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Outcome {
        let mut running = self.start(arguments);
        running.child.stdout.take();
        running.finish()
    }

    /// Runs it where no file may become longer than some blocks, as if the disk were full then.
    /// A write beyond ends it with a signal, or, `told`, fails.
    #[cfg(unix)]
    pub fn run_limited(&self, blocks: u32, told: bool, arguments: &[&str]) -> Outcome {
        let trap = if told { "trap '' XFSZ; " } else { "" };
        let script = format!("{trap}ulimit -f {blocks}; exec \"$0\" \"$@\"");
        let mut command = self.command_of(Path::new("/bin/sh"));
        command
            .args(["-c", &script])
            .arg(tightfit())
            .args(arguments);
        Running::new(command, arguments).finish()
    }

    /// Runs a line of the shell in which `$TIGHTFIT` is the command: for redirections.
    #[cfg(unix)]
    pub fn run_shell(&self, line: &str) -> Outcome {
        let mut command = self.command_of(Path::new("/bin/sh"));
        command.args(["-c", line]).env("TIGHTFIT", tightfit());
        Running::new(command, &[line]).finish()
    }

    /// Runs it where a process may have so many KiB of address space.
    #[cfg(unix)]
    pub fn run_in_space(&self, kibibytes: u64, arguments: &[&str]) -> Outcome {
        let script = format!("ulimit -v {kibibytes}; exec \"$0\" \"$@\"");
        let mut command = self.command_of(Path::new("/bin/sh"));
        command
            .args(["-c", &script])
            .arg(tightfit())
            .args(arguments);
        Running::new(command, arguments).finish()
    }

    /// Starts it.
    pub fn start<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Running {
        let mut command = self.command_of(&tightfit());
        command.args(arguments);
        Running::new(command, arguments)
    }
}

/// Wine starts nothing at times on a busy machine (`ERROR_INTERNAL_ERROR`).
fn spawn(command: &mut Command) -> std::io::Result<Child> {
    const INTERNAL_ERROR: i32 = 1359;
    let tries = if cfg!(windows) { 5 } else { 0 };
    for _ in 0..tries {
        match command.spawn() {
            Err(error) if error.raw_os_error() == Some(INTERNAL_ERROR) => {
                std::thread::sleep(std::time::Duration::from_secs(1));
            }
            started => return started,
        }
    }
    command.spawn()
}

/// The command while it runs.
#[derive(Debug)]
pub struct Running {
    typed: Vec<OsString>,
    child: Child,
}

impl Running {
    fn new<S: AsRef<OsStr>>(mut command: Command, arguments: &[S]) -> Running {
        Running {
            typed: arguments.iter().map(|a| a.as_ref().to_owned()).collect(),
            child: spawn(&mut command).expect("the command starts"),
        }
    }

    /// Waits until `begun` holds, looking often, and sends what Ctrl-C sends. Gives false, with
    /// nothing sent, when the command has ended before.
    #[cfg(unix)]
    pub fn interrupt_when(&mut self, begun: impl Fn(u32) -> bool) -> bool {
        self.signal_when(Signal::INT, begun)
    }

    /// The same with the signal that cannot be caught.
    pub fn kill_when(&mut self, begun: impl Fn(u32) -> bool) -> bool {
        self.has_begun(begun) && self.child.kill().is_ok()
    }

    #[cfg(unix)]
    fn signal_when(&mut self, signal: Signal, begun: impl Fn(u32) -> bool) -> bool {
        self.has_begun(begun) && kill_process(Pid::from_child(&self.child), signal).is_ok()
    }

    /// Waits until `begun` holds; false when the command has ended before.
    fn has_begun(&mut self, begun: impl Fn(u32) -> bool) -> bool {
        while !begun(self.child.id()) {
            if self
                .child
                .try_wait()
                .expect("a child can be waited for")
                .is_some()
            {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// The next line that it writes to standard error.
    pub fn next_message(&mut self) -> String {
        let errors = self.child.stderr.as_mut().expect("it is a pipe");
        let mut line = Vec::new();
        let mut byte = [0];
        // No more than the line, so that the rest is there for `finish`.
        while line.last() != Some(&b'\n') && errors.read(&mut byte).is_ok_and(|read| read > 0) {
            line.push(byte[0]);
        }
        String::from_utf8(line).expect("messages are UTF-8")
    }

    /// Waits for its end, at most so long, with nobody reading what it says until then: whether it has
    /// come.
    pub fn ends_unread(&mut self, patience: Duration) -> bool {
        let start = Instant::now();
        loop {
            if self
                .child
                .try_wait()
                .expect("it can be waited for")
                .is_some()
            {
                return true;
            }
            if start.elapsed() > patience {
                self.child.kill().expect("it can be ended");
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for its end. Gives the most memory that it had in use, too, in bytes; not that of the
    /// processes that it has started. What it says has to fit into a pipe.
    #[cfg(target_os = "linux")]
    pub fn finish_measured(mut self) -> (Outcome, u64) {
        let status = format!("/proc/{}/status", self.child.id());
        let mut peak = 0;
        while self
            .child
            .try_wait()
            .expect("it can be waited for")
            .is_none()
        {
            let text = fs::read_to_string(&status).unwrap_or_default();
            let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let kibibytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
            peak = peak.max(kibibytes.unwrap_or(0) << 10);
            std::thread::sleep(Duration::from_millis(1));
        }
        (self.finish(), peak)
    }

    /// Waits for its end.
    pub fn finish(self) -> Outcome {
        let output = self
            .child
            .wait_with_output()
            .expect("a child can be waited for");
        Outcome {
            typed: self.typed,
            status: output.status.code(),
            stdout: String::from_utf8(output.stdout).expect("output is UTF-8"),
            stderr: String::from_utf8(output.stderr).expect("messages are UTF-8"),
        }
    }
}

/// Bytes that a process has read from files so far, without those that it has looked at in the page cache.
#[cfg(target_os = "linux")]
pub fn bytes_read(process: u32) -> u64 {
    count_of(process, "rchar: ")
}

/// Bytes that a process has written to files so far.
#[cfg(target_os = "linux")]
pub fn bytes_written(process: u32) -> u64 {
    count_of(process, "wchar: ")
}

#[cfg(target_os = "linux")]
fn count_of(process: u32, name: &str) -> u64 {
    let Ok(text) = fs::read_to_string(format!("/proc/{process}/io")) else {
        return 0;
    };
    text.lines()
        .find_map(|line| line.strip_prefix(name))
        .map_or(0, |count| count.parse().unwrap())
}

/// What came out.
#[derive(Debug)]
pub struct Outcome {
    /// The arguments.
    pub typed: Vec<OsString>,
    /// Exit status; none where a signal ended it.
    pub status: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Outcome {
    /// Asserts that it went well, with nothing to complain about.
    #[track_caller]
    pub fn succeeds(self) -> Outcome {
        assert_eq!(self.status, Some(0), "{self:#?}");
        assert_eq!(self.stderr, "", "{self:#?}");
        self
    }

    /// Asserts that it failed with this status, with a message that has all these words, and
    /// without a result: with `--json` the error takes its place.
    #[track_caller]
    pub fn fails(self, status: i32, words: &[&str]) -> Outcome {
        if self.typed.iter().any(|argument| argument == "--json") {
            let printed = self.json();
            let names: Vec<&String> = printed.as_object().expect("an object").keys().collect();
            assert_eq!(names, ["error", "schema"], "{self:#?}");
            assert_eq!(printed["error"]["status"], status, "{self:#?}");
        } else {
            assert_eq!(self.stdout, "", "{self:#?}");
        }
        self.fails_midway(status, words)
    }

    /// The same where it may have printed something before.
    #[track_caller]
    pub fn fails_midway(self, status: i32, words: &[&str]) -> Outcome {
        assert_eq!(self.status, Some(status), "{self:#?}");
        for word in words {
            assert!(self.stderr.contains(word), "it lacks `{word}`: {self:#?}");
        }
        self
    }

    /// What it printed as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error} in {self:#?}"))
    }
}
