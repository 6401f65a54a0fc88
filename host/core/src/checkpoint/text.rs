//! Text that is read piece by piece, so that reading a large one can be stopped.

use std::str;

use crate::cancel::{CancelToken, Cancelled};

/// Bytes that are read at once.
pub(super) const PIECE: usize = 1 << 20;

/// Text up to this length is parsed without a look at its values: none of them takes long.
const SMALL_TEXT: usize = 16 << 20;

/// Longest single value in a longer text: a string with what is escaped in it, a number, or white
/// space. A parser does not ask whether to go on inside of one.
pub(super) const MAX_VALUE_BYTES: usize = 8 << 20;

/// What is no UTF-8.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NotUtf8;

/// UTF-8 text as it arrives.
#[derive(Debug, Default)]
pub(super) struct Text {
    text: String,
    /// The beginning of a character that a piece ended in.
    rest: Vec<u8>,
}

impl Text {
    /// With room for this many bytes.
    pub(super) fn with_capacity(bytes: usize) -> Text {
        Text {
            text: String::with_capacity(bytes),
            rest: Vec::new(),
        }
    }

    /// Adds a piece.
    pub(super) fn push(&mut self, mut piece: &[u8]) -> Result<(), NotUtf8> {
        while let Some((&byte, others)) = piece.split_first().filter(|_| !self.rest.is_empty()) {
            // At most four are a character or none.
            self.rest.push(byte);
            piece = others;
            match str::from_utf8(&self.rest) {
                Ok(character) => {
                    self.text.push_str(character);
                    self.rest.clear();
                }
                Err(error) if error.error_len().is_some() => return Err(NotUtf8),
                Err(_) => {}
            }
        }
        match str::from_utf8(piece) {
            Ok(text) => self.text.push_str(text),
            Err(error) if error.error_len().is_some() => return Err(NotUtf8),
            Err(error) => {
                let (whole, rest) = piece.split_at(error.valid_up_to());
                self.text
                    .push_str(str::from_utf8(whole).map_err(|_| NotUtf8)?);
                self.rest.extend_from_slice(rest);
            }
        }
        Ok(())
    }

    /// All of it.
    pub(super) fn finish(self) -> Result<String, NotUtf8> {
        match self.rest.is_empty() {
            true => Ok(self.text),
            false => Err(NotUtf8),
        }
    }
}

/// Bytes of the first value of a JSON text that is longer than [`MAX_VALUE_BYTES`], as far as it was
/// looked at; none where all are shorter, and for short texts.
///
/// # Errors
/// [`Cancelled`].
pub(super) fn long_value(text: &str, cancel: &CancelToken) -> Result<Option<usize>, Cancelled> {
    if text.len() <= SMALL_TEXT || ends_often(text.as_bytes(), cancel)? {
        return Ok(None);
    }
    let (mut length, mut in_string, mut is_escaped) = (0, false, false);
    for piece in text.as_bytes().chunks(PIECE) {
        cancel.check()?;
        for &byte in piece {
            length += 1;
            if in_string {
                match byte {
                    _ if is_escaped => is_escaped = false,
                    b'\\' => is_escaped = true,
                    b'"' => (in_string, length) = (false, 0),
                    _ => {}
                }
            } else {
                match byte {
                    b'"' => (in_string, length) = (true, 0),
                    b'{' | b'}' | b'[' | b']' | b',' | b':' => length = 0,
                    _ => {}
                }
            }
            if length > MAX_VALUE_BYTES {
                return Ok(Some(length));
            }
        }
    }
    Ok(None)
}

/// Whether every piece of half the longest value has a quote that begins or ends a string: then no
/// value is longer. So it is in the texts of real models, and quickly seen.
fn ends_often(text: &[u8], cancel: &CancelToken) -> Result<bool, Cancelled> {
    for start in (0..text.len()).step_by(MAX_VALUE_BYTES / 2) {
        cancel.check()?;
        let end = text.len().min(start + MAX_VALUE_BYTES / 2);
        let is_end = |at: usize| {
            let before = text[..at].iter().rev();
            text[at] == b'"' && before.take_while(|&&byte| byte == b'\\').count() % 2 == 0
        };
        if end - start == MAX_VALUE_BYTES / 2 && !(start..end).any(is_end) {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same text, cut everywhere.
    fn cut(bytes: &[u8]) -> Vec<Result<String, NotUtf8>> {
        let cut = |at: usize| {
            let mut text = Text::default();
            text.push(&bytes[..at])?;
            text.push(&bytes[at..])?;
            text.finish()
        };
        let each = || {
            let mut text = Text::with_capacity(bytes.len());
            bytes.chunks(1).try_for_each(|byte| text.push(byte))?;
            text.finish()
        };
        (0..=bytes.len()).map(cut).chain([each()]).collect()
    }

    #[test]
    fn characters_may_be_cut() {
        let text = "aé€😀z";
        for outcome in cut(text.as_bytes()) {
            assert_eq!(outcome.as_deref(), Ok(text));
        }
    }

    #[test]
    fn what_is_no_text_is_refused_wherever_it_is_cut() {
        for bytes in [
            &b"a\xff"[..],
            b"\xe2\x82",
            b"\xe2\x82a",
            b"\x80",
            b"\xf0\x9f\x98",
            b"\xed\xa0\x80",
            b"x\xc0\x80y",
        ] {
            assert!(
                cut(bytes).iter().all(|outcome| *outcome == Err(NotUtf8)),
                "{bytes:?}"
            );
        }
    }

    #[test]
    fn one_long_value_is_found_among_short_ones() {
        let go_on = CancelToken::new();
        let long = |value: String| {
            let text = format!("{{\"a\":[{}{value}]}}", "0,".repeat(SMALL_TEXT / 2));
            long_value(&text, &go_on).unwrap().is_some()
        };
        let many = MAX_VALUE_BYTES;
        assert!(!long("1".to_owned()));
        assert!(long("1".repeat(many + 1)));
        assert!(long(" ".repeat(many + 1)));
        assert!(long(format!("\"{}\"", "x".repeat(many + 1))));
        assert!(long(format!("\"{}\"", "\\\"".repeat(many / 2 + 1))));
        assert!(long(format!("\"{}\"", ",".repeat(many + 1))));
        // Long together, and each short.
        assert!(!long("\"x\",".repeat(many / 2)));
        assert!(!long(format!("\"{}\"", "x".repeat(many - 2))));
        // Not in short texts.
        assert_eq!(long_value(&" ".repeat(SMALL_TEXT), &go_on), Ok(None));
        go_on.cancel();
        assert_eq!(
            long_value(&" ".repeat(SMALL_TEXT + 1), &go_on),
            Err(Cancelled)
        );
    }
}
