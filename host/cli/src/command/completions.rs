//! `tightfit completions` and `tightfit man`: what packages install beside the program.

use std::fs;
use std::path::Path;

use clap::Command;
use clap_mangen::Man;

use crate::command::args::{CompletionsOptions, ManOptions};
use crate::command::destination::Destination;
use crate::command::error::CommandError;
use crate::command::help;

/// Prints what a shell reads.
pub(crate) fn print(options: &CompletionsOptions) -> Result<(), CommandError> {
    let mut text = Vec::new();
    let command = help::command();
    // What is hidden would be completed by some shells.
    let shown = command.get_subcommands().filter(|one| !one.is_hide_set());
    let mut shown = Command::new("tightfit")
        .version(env!("CARGO_PKG_VERSION"))
        .subcommands(shown.cloned())
        .args(command.get_arguments().cloned());
    clap_complete::generate(options.shell, &mut shown, "tightfit", &mut text);
    // Not as help is printed, whose control characters are escaped.
    Destination::Stdout
        .write(&text)
        .map_err(CommandError::Output)
}

/// Writes `tightfit.1`, `tightfit-load.1` and so on.
pub(crate) fn write_manual(options: &ManOptions) -> Result<(), CommandError> {
    fs::create_dir_all(&options.directory).map_err(CommandError::Output)?;
    let mut command = help::command();
    command.build();
    write_pages(&command, "tightfit", &options.directory)
}

fn write_pages(command: &Command, name: &str, directory: &Path) -> Result<(), CommandError> {
    let page = command.clone().display_name(name.to_owned());
    let mut text = Vec::new();
    Man::new(page)
        .title(name.to_owned())
        .render(&mut text)
        .map_err(CommandError::Output)?;
    Destination::File(directory.join(format!("{name}.1")))
        .write(&text)
        .map_err(CommandError::Output)?;
    for subcommand in command.get_subcommands() {
        // Each has its help as an option.
        if !subcommand.is_hide_set() && subcommand.get_name() != "help" {
            let name = format!("{name}-{}", subcommand.get_name());
            write_pages(subcommand, &name, directory)?;
        }
    }
    Ok(())
}
