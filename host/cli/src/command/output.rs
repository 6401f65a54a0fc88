//! Results to stdout, errors to stderr.

use std::io::{self, IsTerminal, Write};

use std::path::Path;

use crate::draw::{BarStyle, Comparison, Text, paint};
use crate::error_report::ErrorReport;
use anstream::{AutoStream, ColorChoice};
use serde::Serialize;
use tightfit::report::to_json;
use tightfit::text::{printable, printable_lines};

use crate::command::destination::{self, Destination};
use crate::command::error::CommandError;
use crate::command::stderr;

/// Prints a result. A reader that has gone away (`tightfit ... | head`) is no error.
///
/// Names in it have been escaped, line breaks too; whatever slipped through is escaped here.
pub(crate) fn print(text: &str) -> Result<(), CommandError> {
    let text = printable_lines(text);
    let written = Destination::Stdout.write(text.as_bytes());
    written.map_err(CommandError::Output)
}

/// Prints a result, in color where standard output shows colors.
pub(crate) fn print_text(text: &Text) -> Result<(), CommandError> {
    let choice = AutoStream::choice(&io::stdout());
    if choice == ColorChoice::Never {
        return print(&text.to_string());
    }
    let mut stdout = AutoStream::new(io::stdout().lock(), choice);
    let written = stdout
        .write_all(text.ansi().as_bytes())
        .and_then(|()| stdout.flush());
    destination::unless_unread(written).map_err(CommandError::Output)
}

/// What every `--json` prints: a result or an error, beside the version of the form.
#[derive(Serialize)]
pub(crate) struct Envelope<T> {
    schema: u32,
    #[serde(flatten)]
    content: T,
}

impl<T> Envelope<T> {
    /// Results that do not say the version by themselves.
    pub(crate) fn new(content: T) -> Envelope<T> {
        Envelope { schema: 1, content }
    }
}

/// Prints a result, which has a field `schema`, as JSON.
pub(crate) fn print_json(value: &impl Serialize) -> Result<(), CommandError> {
    let text = to_json(value).map_err(|error| CommandError::Output(error.into()))?;
    print(&(text + "\n"))
}

/// Writes a file that was asked for beside the result. Gives whether it went to standard output:
/// then it is the result, and there is no other.
pub(crate) fn write(
    option: &'static str,
    path: &Path,
    text: &str,
    json: bool,
) -> Result<bool, CommandError> {
    let failed = |source| CommandError::Write {
        path: path.to_owned(),
        source,
    };
    let destination = Destination::of(path).map_err(failed)?;
    let is_stdout = destination == Destination::Stdout;
    if is_stdout && json {
        return Err(CommandError::BothToStdout { option });
    }
    destination.write(text.as_bytes()).map_err(failed)?;
    Ok(is_stdout)
}

/// How many columns a line has; where stdout is no terminal, as many as it likes.
pub(crate) fn columns() -> usize {
    let terminal = io::stdout().is_terminal();
    let columns = terminal.then(|| console::Term::stdout().size_checked());
    columns
        .flatten()
        .map_or(usize::MAX - 2, |(_, columns)| usize::from(columns))
}

/// How bars look best where stdout goes: plain and of a fixed width unless that is a terminal.
pub(crate) fn bar_style() -> BarStyle {
    let plain = BarStyle::default();
    if !io::stdout().is_terminal() {
        return plain;
    }
    let columns = console::Term::stdout().size_checked();
    BarStyle {
        width: columns.map_or(plain.width, |(_, columns)| {
            usize::from(columns).min(MOST_COLUMNS)
        }),
        unicode: is_utf8(|name| std::env::var(name).ok()),
    }
}

/// Longer lines are not easier to read.
const MOST_COLUMNS: usize = 100;

/// Whether the locale is one of UTF-8: the first of these variables that is set says so.
fn is_utf8(variable: impl Fn(&str) -> Option<String>) -> bool {
    let set = |name: &&str| variable(name).filter(|value| !value.is_empty());
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"].iter().find_map(set);
    locale.is_some_and(|locale| {
        let locale = locale.to_ascii_lowercase();
        locale.contains("utf-8") || locale.contains("utf8")
    })
}

/// Prints an error to stderr, and with `json` in place of the result to stdout too.
pub(crate) fn failed(failure: &CommandError, json: bool) {
    error(failure);
    if !json {
        return;
    }
    match failure {
        // The report has been printed, or cannot be.
        CommandError::Unexpected { .. } | CommandError::Output(_) => {}
        CommandError::BothRefuse(comparison) => {
            let error = failure.report();
            // As in `print_error`.
            let _ = print_json(&BothRefuse { error, comparison });
        }
        _ => print_error(failure.report()),
    }
}

/// An error that comes with a result.
#[derive(Serialize)]
struct BothRefuse<'a> {
    error: ErrorReport,
    #[serde(flatten)]
    comparison: &'a Comparison,
}

/// Prints an error in place of a result.
pub(crate) fn print_error(error: ErrorReport) {
    #[derive(Serialize)]
    struct Failed {
        error: ErrorReport,
    }
    // Nothing is left to be done when stdout is gone: the status tells.
    let _ = print_json(&Envelope::new(Failed { error }));
}

/// Prints an error. What comes from checkpoints and policies cannot control the terminal.
pub(crate) fn error(failure: &CommandError) {
    let mut text = failure.to_string();
    if let Some((option, limit)) = failure.limit() {
        text += &format!(" - if you trust it, change that with {option} {limit}=VALUE");
    }
    stderr::write_painted(
        paint::ERROR,
        "tightfit:",
        &format!(" {}\n", printable(&text)),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_variable_that_is_set_names_the_locale() {
        let locale = |values: [&'static str; 3]| {
            move |name: &str| {
                let names = ["LC_ALL", "LC_CTYPE", "LANG"];
                let place = names.iter().position(|&known| known == name)?;
                Some(values[place].to_owned())
            }
        };
        assert!(is_utf8(locale(["", "", "de_DE.UTF-8"])));
        assert!(is_utf8(locale(["C.utf8", "C", "C"])));
        assert!(!is_utf8(locale(["C", "en_US.UTF-8", "en_US.UTF-8"])));
        assert!(!is_utf8(|_| None));
    }
}
