//! Compiles the kernels' own sources for the CPU, where there is a C++ compiler.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() {
    let package = env::var_os("CARGO_MANIFEST_DIR").expect("cargo says where this is");
    let directory = Path::new(&package).join("../cuda");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=CXX");
    // Where a compiler may have come to be.
    println!("cargo::rerun-if-env-changed=PATH");
    let sources = fs::read_dir(&directory).expect("the kernels are there");
    for source in sources {
        let path = source.expect("a file").path();
        println!("cargo::rerun-if-changed={}", path.display());
    }
    let program = compile(&directory.join("emulator.cpp"));
    let program = program.map(|path| path.display().to_string());
    println!(
        "cargo::rustc-env=TIGHTFIT_EMULATOR={}",
        program.unwrap_or_default()
    );
}

/// None where there is no compiler. What does not compile is an error.
fn compile(source: &Path) -> Option<PathBuf> {
    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux") {
        return None;
    }
    let program = PathBuf::from(env::var_os("OUT_DIR")?).join("cuda-emulator");
    let named = env::var("CXX").ok();
    let known = ["c++", "g++", "clang++"];
    for compiler in named.as_deref().into_iter().chain(known) {
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
            .arg(&program)
            .arg(source)
            .output();
        let Ok(output) = output else { continue };
        assert!(
            output.status.success(),
            "{compiler} does not compile {}:\n{}",
            source.display(),
            String::from_utf8_lossy(&output.stderr)
        );
        return Some(program);
    }
    None
}
