//! The subcommands. The only place that prints or exits.

mod amount;
mod args;
mod check;
mod completions;
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
mod ranks;
mod run;
mod save;
mod session;
mod stderr;
mod synth;
mod timeline;

use std::ffi::OsString;
use std::io;
use std::process::ExitCode;

use tightfit::status::Status;
use tightfit_wasm::sandbox::{self, CompilerProgram};

use args::{Arguments, Command};
use error::CommandError;

/// Runs the command with the process's own arguments. Policies of users are compiled by this program,
/// started again.
pub fn main() -> ExitCode {
    ExitCode::from(main_with(std::env::args_os(), None))
}

/// Runs the command for a program that is another: with these arguments, the first of which is a name and
/// not looked at, and with what compiles policies of users, which has to call
/// [`compile_for_parent`](sandbox::compile_for_parent). Gives the exit status. It takes over the process:
/// what shows messages is set for all of it, and so is what an interrupt does.
pub fn main_with(
    arguments: impl IntoIterator<Item = OsString>,
    compiler: Option<CompilerProgram>,
) -> u8 {
    let arguments = help::arguments(arguments.into_iter().collect());
    let Arguments {
        command, verbose, ..
    } = match arguments {
        Ok(arguments) => arguments,
        Err(status) => return status,
    };
    if let Some(compiler) = compiler {
        args::compile_with(compiler);
    }
    log::install(verbose);
    let json = command.json();
    match run(command, verbose) {
        Ok(()) => Status::Done as u8,
        Err(failure) => {
            output::failed(&failure, json);
            failure.status() as u8
        }
    }
}

fn run(command: Command, verbose: bool) -> Result<(), CommandError> {
    // These leave nothing behind that an interrupt would have to tidy up.
    if let Command::Inspect(_)
    | Command::Plan(_)
    | Command::Policy(_)
    | Command::Devices(_)
    | Command::Completions(_)
    | Command::Man(_) = command
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
        Command::Completions(options) => completions::print(&options),
        Command::Man(options) => completions::write_manual(&options),
        Command::CompilePolicy => {
            sandbox::compile_for_parent(io::stdin().lock(), io::stdout().lock())
                .map_err(CommandError::CompilePolicy)
        }
    }
}
