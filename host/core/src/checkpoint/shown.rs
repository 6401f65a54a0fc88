//! Names that come out of files, in messages.

use std::fmt;

use crate::text::printable;

/// A name from a file, fit for a message: control characters escaped, the middle left out when it
/// is long.
pub(crate) fn shown(name: &str) -> Shown<'_> {
    Shown(name)
}

/// See [`shown`].
pub(crate) struct Shown<'a>(&'a str);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const HEAD: usize = 120;
        const TAIL: usize = 40;
        let count = self.0.chars().take(HEAD + TAIL + 1).count();
        if count <= HEAD + TAIL {
            return f.write_str(&escaped(self.0));
        }
        let split = |n| self.0.char_indices().nth(n).map_or(0, |(i, _)| i);
        let tail = self.0.char_indices().rev().nth(TAIL - 1);
        let tail = tail.map_or(self.0.len(), |(i, _)| i);
        f.write_str(&escaped(&self.0[..split(HEAD)]))?;
        write!(f, "...{}", escaped(&self.0[tail..]))
    }
}

/// Quotes and backslashes escaped too, and then what no text shows.
fn escaped(name: &str) -> String {
    printable(&name.escape_debug().to_string()).into_owned()
}

/// The first part of a name that is too long to keep.
pub(crate) fn shortened(name: &str) -> String {
    name.chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_messages_cannot_write_to_a_terminal_or_fill_it() {
        assert_eq!(shown("a.weight").to_string(), "a.weight");
        assert_eq!(shown("\u{1b}[2J\n").to_string(), "\\u{1b}[2J\\n");
        assert_eq!(shown("a\u{3164}'").to_string(), "a\\u{3164}\\'");
        let long = format!("{}{}", "é".repeat(100_000), "end");
        let text = shown(&long).to_string();
        assert!(text.chars().count() < 200, "{text}");
        assert!(text.ends_with("end"), "{text}");
    }
}
