//! Results to stdout, errors to stderr.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;
use tightfit::report::{BarStyle, printable};

use crate::failure::Failure;
use crate::stderr;

/// Prints a result. A reader that has gone away (`tightfit ... | head`) is no error.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::Output(error)),
        _ => Ok(()),
    }
}

/// Prints a result as JSON.
pub(crate) fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    let text =
        serde_json::to_string_pretty(value).map_err(|error| Failure::Output(error.into()))?;
    print(&(text + "\n"))
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

/// Prints an error. What comes from checkpoints and policies cannot control the terminal.
pub(crate) fn error(failure: &Failure) {
    let mut text = failure.to_string();
    if let Some((option, limit)) = failure.limit() {
        text += &format!(" - if you trust it, change that with {option} {limit}=VALUE");
    }
    stderr::write(&format!("tightfit: {}\n", printable(&text)));
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
