//! Reads components from files that may be anything.

use std::io;
use std::path::Path;

use super::{GuestFailure, Limits};

/// Returns the bytes of a component's file, unless it is larger than what would be compiled.
///
/// # Errors
/// When it cannot be read; inside of that, [`GuestFailure::TooLarge`].
pub(crate) fn read_component(
    path: &Path,
    limits: &Limits,
) -> io::Result<Result<Vec<u8>, GuestFailure>> {
    let metadata = std::fs::metadata(path)?;
    // A pipe can block for ever, and a device such as /dev/zero has no end.
    if !metadata.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    if metadata.len() > limits.component {
        return Ok(Err(GuestFailure::TooLarge {
            what: "file",
            have: metadata.len(),
            limit: limits.component,
        }));
    }
    std::fs::read(path).map(Ok)
}
