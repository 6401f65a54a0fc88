//! The command `tightfit`.
#![forbid(unsafe_code)]

mod args;
mod demo;
mod failure;
mod inspect;
mod load;
mod log;
mod output;
mod policy;
mod progress;
mod session;
mod synth;

use std::process::ExitCode;

use clap::Parser;

use args::{Arguments, Command};
use failure::Failure;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    log::install(arguments.verbose);
    match run(arguments.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::error(&failure);
            ExitCode::from(failure.status())
        }
    }
}

fn run(command: Command) -> Result<(), Failure> {
    let cancel = session::cancel_on_interrupt();
    match command {
        Command::Demo(options) => demo::run(&options, cancel),
        Command::Synth(options) => synth::run(&options, &cancel),
        Command::Inspect(options) => inspect::run(&options),
        Command::Plan(options) => load::plan(&options),
        Command::Load(options) => load::load(&options, cancel),
        Command::Policy(command) => policy::run(&command),
        Command::Devices(options) => session::list_devices(&options),
    }
}
