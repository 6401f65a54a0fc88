//! Results to stdout, errors to stderr.

use std::io::{self, Write};

use serde::Serialize;
use tightfit::report::printable;

use crate::failure::Failure;

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

/// Prints an error. What comes from checkpoints and policies cannot control the terminal.
pub(crate) fn error(failure: &Failure) {
    let mut text = failure.to_string();
    if let Some(limit) = failure.policy_limit() {
        text += &format!(" - if you trust it, change that with --policy-limit {limit}=VALUE");
    }
    // Nothing is left to be done when even stderr is gone.
    let _ = writeln!(io::stderr().lock(), "tightfit: {}", printable(&text));
}
