//! Compiles the hostile policy and the hostile program in `guests/`, and the example program, to wasm.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const TARGET: &str = "wasm32-unknown-unknown";

fn main() -> ExitCode {
    for path in [
        "build.rs",
        "guests/src",
        "guests/program",
        "guests/slices",
        "guests/Cargo.toml",
        "guests/Cargo.lock",
        "../guest/program",
        "../guest/examples/generate",
        "../guest/examples/load-and-check",
        "../guest/common",
        "../guest/src",
        "../guest/Cargo.toml",
        "../Cargo.lock",
        "../wit",
        "../guest/wit",
    ] {
        println!("cargo::rerun-if-changed={path}");
    }
    match target_is_installed().and_then(|()| build_all()) {
        Ok(modules) => {
            for (name, module) in modules {
                println!("cargo::rustc-env={name}={}", module.display());
            }
            ExitCode::SUCCESS
        }
        Err(problem) => {
            println!("cargo::error={problem}");
            ExitCode::FAILURE
        }
    }
}

/// Installs the target where rustup can: on a fresh machine nothing else does.
fn target_is_installed() -> Result<(), String> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc)
        .args(["--print", "target-libdir", "--target", TARGET])
        .output()
        .map_err(|error| format!("cannot ask rustc for the target {TARGET}: {error}"))?;
    if Path::new(String::from_utf8_lossy(&output.stdout).trim()).exists() {
        return Ok(());
    }
    let added = Command::new("rustup")
        .args(["target", "add", TARGET])
        .status();
    match added {
        Ok(status) if status.success() => Ok(()),
        _ => Err(format!(
            "the tests' guests need the target {TARGET}: run `rustup target add {TARGET}`"
        )),
    }
}

/// Gives the modules with the variables that tests find them by.
fn build_all() -> Result<[(&'static str, PathBuf); 5], String> {
    let tests = path_from_environment("CARGO_MANIFEST_DIR")?;
    let guests = tests.join("guests");
    // By itself: its feature of the SDK would hold for the others too.
    let slices = build(&guests, "slices", &["--package", "hostile-slices"])?;
    let without = ["--workspace", "--exclude", "hostile-slices"];
    let guests = build(&guests, "guests", &without)?;
    // Where a guest's author would build it.
    let examples = build(
        &tests,
        "examples",
        &["--package", "load-and-check", "--package", "generate"],
    )?;
    Ok([
        ("HOSTILE_POLICY", guests.join("hostile.wasm")),
        ("HOSTILE_SLICES", slices.join("hostile_slices.wasm")),
        ("HOSTILE_PROGRAM", guests.join("hostile_program.wasm")),
        ("LOAD_AND_CHECK", examples.join("load_and_check.wasm")),
        ("GENERATE", examples.join("generate.wasm")),
    ])
}

/// Builds packages of a workspace. Gives the directory of their modules.
fn build(workspace: &Path, target: &str, packages: &[&str]) -> Result<PathBuf, String> {
    let target = path_from_environment("OUT_DIR")?.join(target);
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args(["build", "--release", "--locked", "--target", TARGET])
        .args(packages)
        .current_dir(workspace);
    // What cargo tells this build about itself would be taken for orders by the next.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let is_setup = text == "CARGO_HOME" || text.starts_with("CARGO_NET_");
        if (text.starts_with("CARGO") && !is_setup)
            || text.starts_with("RUSTC")
            || text == "RUSTFLAGS"
        {
            cargo.env_remove(&name);
        }
    }
    let output = cargo
        .env("CARGO_TARGET_DIR", &target)
        .output()
        .map_err(|error| format!("cannot run cargo for the tests' guests: {error}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        // A directive is one line; the compiler's own message goes where cargo shows it.
        eprintln!("{text}");
        let reason = text.lines().find(|line| line.starts_with("error"));
        return Err(format!(
            "the tests' guests in {} do not build: {}",
            workspace.display(),
            reason.unwrap_or("no reason given")
        ));
    }
    Ok(target.join(TARGET).join("release"))
}

fn path_from_environment(name: &str) -> Result<PathBuf, String> {
    env::var_os(name)
        .map(PathBuf::from)
        .ok_or_else(|| format!("{name} is not set"))
}
