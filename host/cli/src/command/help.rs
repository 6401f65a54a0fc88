//! Reads the arguments, and prints help and what is wrong with them.

use std::ffi::OsString;
use std::io;

use crate::error_report::ErrorReport;
use anstream::ColorChoice;
use clap::error::ErrorKind;
use clap::{Command, CommandFactory, FromArgMatches};
use tightfit::status::Status;

use crate::command::args::Arguments;
use crate::command::error::CommandError;
use crate::command::{output, stderr};
use crate::draw::paint;

/// What stands below the help of every command.
const STATUSES: &str = "\
Exit status:
  0    done
  1    an output cannot be written (a full disk, a directory that is not there), or a fault of ours
  2    usage: an argument, a setting, a name
  3    the checkpoint is invalid, unreadable or not to be had
  4    the model does not fit on the devices, or the policy refuses it
  5    the policy or the program itself failed: a trap, a limit, a bad plan
  6    a device failed, is not there, or has less memory than it said; or this machine cannot run
       policies; or another process that loads with this one has ended, says nothing, or is not there
  130  interrupted, by SIGINT (Ctrl-C), SIGTERM or SIGHUP, and tidied up; inspect, plan, policy and
       devices have nothing to tidy up, and end by the signal itself
With --json an error is printed as JSON too; host/cli/JSON.md describes what is printed.";

/// The same for `check`.
const STATUSES_OF_CHECK: &str = "\
Exit status:
  0    every expectation holds
  1    some do not, a scenario could not be run, or an output cannot be written
  2    usage, or a scenario file that makes no sense (nothing is run then)
  130  interrupted, by SIGINT (Ctrl-C), SIGTERM or SIGHUP, and tidied up";

/// The definitions with the exit statuses below each.
pub(crate) fn command() -> Command {
    fn with_statuses(command: Command) -> Command {
        let statuses = match command.get_name() {
            "check" => STATUSES_OF_CHECK,
            _ => STATUSES,
        };
        let command = command.after_long_help(statuses);
        command.mut_subcommands(with_statuses)
    }
    // Named here: otherwise usage is shown for whatever this program's file is called.
    with_statuses(Arguments::command()).bin_name("tightfit")
}

/// What was typed; or, when that was help or nonsense, the status to end with: it has been printed.
pub(crate) fn arguments(typed: Vec<OsString>) -> Result<Arguments, u8> {
    let json = asks_for_json(&typed);
    // Before anything is printed, help and what is wrong with the arguments too.
    color(&typed).write_global();
    let matches = command().try_get_matches_from(typed);
    matches
        .and_then(|mut matches| Arguments::from_arg_matches_mut(&mut matches))
        .map_err(|error| print(&error, json))
}

/// Whether `--json` is among the arguments, where these cannot be understood as a whole.
fn asks_for_json(typed: &[OsString]) -> bool {
    options(typed).any(|argument| argument == "--json")
}

/// What `--color` says among them; of one that cannot be understood, nothing.
fn color(typed: &[OsString]) -> ColorChoice {
    let mut options = options(typed).peekable();
    let mut choice = ColorChoice::Auto;
    while let Some(option) = options.next() {
        let value = match option.to_str() {
            Some("--color") => options.peek().and_then(|value| value.to_str()),
            Some(option) => option.strip_prefix("--color="),
            None => None,
        };
        match value {
            Some("always") => choice = ColorChoice::Always,
            Some("never") => choice = ColorChoice::Never,
            Some("auto") => choice = ColorChoice::Auto,
            _ => {}
        }
    }
    choice
}

/// Arguments that are not for a program that is run.
fn options(typed: &[OsString]) -> impl Iterator<Item = &OsString> {
    typed.iter().take_while(|argument| *argument != "--")
}

/// Prints help to stdout, what is wrong to stderr. Names and values that were typed are repeated in
/// it, and may come from whoever names files.
fn print(error: &clap::Error, json: bool) -> u8 {
    let rendered = error.render();
    if error.use_stderr() {
        let text = rendered.to_string();
        match text.split_once(':') {
            Some((begin @ "error", rest)) => {
                stderr::write_painted(paint::ERROR, &format!("{begin}:"), rest);
            }
            _ => stderr::write(&text),
        }
        if json {
            let sentence = text.trim_start_matches("error: ");
            let sentence = sentence.split("\n\n").next().unwrap_or(sentence);
            let report = ErrorReport::new(Status::Usage, "usage", &sentence.trim_end());
            output::print_error(report);
        }
        return Status::Usage as u8;
    }
    // Help repeats nothing that was typed, so that it may keep its styles.
    let styled = anstream::AutoStream::choice(&io::stdout()) != ColorChoice::Never;
    let printed = match error.kind() {
        ErrorKind::DisplayHelp if styled => {
            let text = rendered.ansi().to_string();
            crate::command::destination::Destination::Stdout
                .write(text.as_bytes())
                .map_err(CommandError::Output)
        }
        _ => output::print(&rendered.to_string()),
    };
    match printed {
        Ok(()) => Status::Done as u8,
        Err(failure) => {
            output::failed(&failure, false);
            failure.status() as u8
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definitions_are_consistent() {
        command().debug_assert();
    }

    #[test]
    fn color_is_what_was_said_last() {
        let color = |arguments: &[&str]| {
            let typed: Vec<OsString> = arguments.iter().map(|&argument| argument.into()).collect();
            color(&typed)
        };
        assert_eq!(color(&["tightfit", "plan", "m"]), ColorChoice::Auto);
        assert_eq!(color(&["t", "--color", "never"]), ColorChoice::Never);
        assert_eq!(color(&["t", "--color=always", "x"]), ColorChoice::Always);
        let twice = ["t", "--color=always", "--color", "never"];
        assert_eq!(color(&twice), ColorChoice::Never);
        let of_a_program = ["t", "run", "--", "--color=always"];
        assert_eq!(color(&of_a_program), ColorChoice::Auto);
        assert_eq!(color(&["t", "--color", "red"]), ColorChoice::Auto);
    }

    #[test]
    fn json_is_asked_for_before_the_arguments_of_a_program() {
        let typed = |arguments: &[&str]| -> Vec<OsString> {
            arguments.iter().map(|&argument| argument.into()).collect()
        };
        assert!(asks_for_json(&typed(&["tightfit", "plan", "--json", "x"])));
        assert!(!asks_for_json(&typed(&["tightfit", "run", "--", "--json"])));
    }
}
