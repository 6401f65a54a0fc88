//! The command `tightfit`.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    tightfit_cli::main()
}
