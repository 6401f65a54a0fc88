//! The examples in other languages, built as their recipes say.
//!
//! A recipe whose tool cannot be installed here is skipped, and says so; with
//! `TIGHTFIT_REQUIRE_FOREIGN=1` that is a failure. Tools stay in `target/foreign/`.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

/// For the installation and the build of one language.
const PATIENCE: Duration = Duration::from_secs(240);
/// What a recipe says where its tool cannot be installed.
const NO_TOOL: i32 = 3;

/// Where tools and components are kept: `target/foreign`.
pub fn kept() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let target = test.ancestors().nth(3);
    target
        .expect("tests are in target/PROFILE/deps")
        .join("foreign")
}

/// Runs a command to its end, or to ours. Gives its status, and all that it said.
pub fn run(mut command: Command, log: &Path) -> (Option<i32>, String) {
    let file = File::create(log).unwrap();
    let start = Instant::now();
    let mut child = command
        .stdout(file.try_clone().unwrap())
        .stderr(file)
        .process_group(0)
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status.code();
        }
        if start.elapsed() > PATIENCE {
            // With all that it has started.
            let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
            let _ = child.wait();
            break None;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    (status, fs::read_to_string(log).unwrap_or_default())
}

/// The repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A component that a language's recipe in this repository makes, unless its tool cannot be installed.
pub fn build(repository: &Path, language: &str, component: &str) -> Option<PathBuf> {
    let out = kept().join(language);
    fs::create_dir_all(&out).unwrap();
    let recipe = repository
        .join("guest/examples")
        .join(language)
        .join("build.sh");
    let component = out.join(component);
    // What an earlier run has left must not stand for this one.
    let _ = fs::remove_file(&component);
    let mut command = Command::new("sh");
    command.arg(recipe).arg(&out).env_remove("CC");
    let start = Instant::now();
    let (status, said) = run(command, &out.join("log"));
    let reason = match status {
        Some(0) => {
            let bytes = fs::metadata(&component).unwrap().len();
            println!(
                "{language}: built in {:.1?}, {bytes} bytes",
                start.elapsed()
            );
            return Some(component);
        }
        Some(NO_TOOL) => "its tool cannot be installed",
        None => "it took too long",
        Some(status) => panic!("the recipe for {language} ends with {status}: {said}"),
    };
    println!("skipped: {language}: {reason}: {said}");
    let required = std::env::var_os("TIGHTFIT_REQUIRE_FOREIGN").is_some_and(|value| value == "1");
    assert!(!required, "{language} is required, but {reason}: {said}");
    None
}
