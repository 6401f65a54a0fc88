//! The subcommands. The only place that prints or exits.

mod amount;
mod args;
mod check;
mod demo;
mod destination;
mod diff;
mod error;
mod help;
mod inspect;
mod load;
mod log;
mod output;
mod plan;
mod policy;
mod progress;
mod run;
mod save;
mod session;
mod stderr;
mod synth;

use std::io;
use std::process::ExitCode;

use tightfit_wasm::sandbox;

use args::{Arguments, Command};
use error::CommandError;

/// Runs the command with the process's own arguments.
pub fn main() -> ExitCode {
    let Arguments { command, verbose } = match help::arguments() {
        Ok(arguments) => arguments,
        Err(status) => return status,
    };
    log::install(verbose);
    let json = command.json();
    match run(command, verbose) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::failed(&failure, json);
            ExitCode::from(failure.status() as u8)
        }
    }
}

fn run(command: Command, verbose: bool) -> Result<(), CommandError> {
    // These leave nothing behind that an interrupt would have to tidy up.
    if let Command::Inspect(_) | Command::Plan(_) | Command::Policy(_) | Command::Devices(_) =
        command
    {
        session::exit_on_interrupt();
    }
    match command {
        Command::Demo(options) => demo::run(&options, session::cancel_on_interrupt()),
        Command::Synth(options) => synth::run(&options, &session::cancel_on_interrupt()),
        Command::Inspect(options) => inspect::run(&options),
        Command::Plan(options) => plan::run(&options),
        Command::Load(options) => load::load(&options, session::cancel_on_interrupt()),
        Command::Save(options) => save::run(&options, session::cancel_on_interrupt()),
        Command::Run(options) => run::run(&options, session::cancel_on_interrupt()),
        Command::Check(options) => check::run(&options, verbose, &session::cancel_on_interrupt()),
        Command::Policy(command) => policy::run(&command),
        Command::Devices(options) => session::list_devices(&options),
        Command::CompilePolicy => {
            sandbox::compile_for_parent(io::stdin().lock(), io::stdout().lock())
                .map_err(CommandError::CompilePolicy)
        }
    }
}
