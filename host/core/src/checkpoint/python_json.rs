//! JSON as Python writes it. `json.dumps` writes `NaN`, `Infinity` and `-Infinity`, halves of surrogate
//! pairs as they are, and `json.loads` takes numbers that no float can hold for infinite. Editors put a
//! byte order mark before it. No parser that follows RFC 8259 reads any of that.

use std::borrow::Cow;
use std::ops::Range;

use crate::cancel::{CancelToken, Cancelled, Watch};

/// The text without the byte order mark that some editors begin a file with.
pub(crate) fn without_mark(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

/// The same as JSON that every parser reads, where the text is JSON as Python writes it. What is no
/// finite number becomes `null`, as JavaScript writes it, and half of a surrogate pair U+FFFD.
///
/// # Errors
/// [`Cancelled`].
pub(crate) fn strict<'t>(text: &'t str, cancel: &CancelToken) -> Result<Cow<'t, str>, Cancelled> {
    let text = without_mark(text);
    replaced(text, cancel, |oddity, _| {
        Some(match oddity {
            Oddity::Constant | Oddity::Overflow => "null",
            Oddity::Surrogate => "\\ufffd",
        })
    })
}

/// The same without a change of length, so that every value lies where it lies in `text`; other
/// numbers stand in place of `NaN` and `Infinity`.
pub(crate) fn in_place(text: &str) -> Cow<'_, str> {
    let in_place = replaced(text, &CancelToken::new(), |oddity, word| match word {
        "NaN" => Some("0e0"),
        "Infinity" => Some("1e000000"),
        "-Infinity" => Some("-1e000000"),
        _ => (oddity == Oddity::Surrogate).then_some("\\ufffd"),
    });
    // Nobody asked it to stop.
    in_place.unwrap_or(Cow::Borrowed(text))
}

/// What Python writes and others do not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Oddity {
    /// `NaN`, `Infinity` or `-Infinity`.
    Constant,
    /// A number beyond all floats.
    Overflow,
    /// The escape of half a surrogate pair.
    Surrogate,
}

fn replaced<'t>(
    text: &'t str,
    cancel: &CancelToken,
    replacement: impl Fn(Oddity, &str) -> Option<&'static str>,
) -> Result<Cow<'t, str>, Cancelled> {
    let mut watch = Watch::new(cancel);
    let mut scanner = Scanner {
        text,
        at: 0,
        in_string: false,
    };
    let mut out = String::new();
    let mut copied = 0;
    while let Some((range, oddity)) = scanner.next(&mut watch)? {
        if let Some(new) = replacement(oddity, &text[range.clone()]) {
            out.push_str(&text[copied..range.start]);
            out.push_str(new);
            copied = range.end;
        }
    }
    if copied == 0 {
        return Ok(Cow::Borrowed(text));
    }
    out.push_str(&text[copied..]);
    Ok(Cow::Owned(out))
}

struct Scanner<'t> {
    text: &'t str,
    at: usize,
    in_string: bool,
}

impl Scanner<'_> {
    /// Where the next oddity is, and what it is.
    fn next(&mut self, watch: &mut Watch<'_>) -> Result<Option<(Range<usize>, Oddity)>, Cancelled> {
        let bytes = self.text.as_bytes();
        let mut looked_at = self.at;
        while let Some(&byte) = bytes.get(self.at) {
            if self.at - looked_at >= 4096 {
                watch.item(self.at - looked_at)?;
                looked_at = self.at;
            }
            let start = self.at;
            match byte {
                b'"' => {
                    self.in_string = !self.in_string;
                    self.at += 1;
                }
                b'\\' if self.in_string => {
                    if let Some(length) = surrogates(&bytes[start..]) {
                        self.at += length;
                        // A pair has two escapes of six bytes.
                        if length == 6 {
                            return Ok(Some((start..self.at, Oddity::Surrogate)));
                        }
                    } else {
                        self.at += 2;
                    }
                }
                b'N' | b'I' | b'-' | b'0'..=b'9' if !self.in_string => {
                    let rest = &bytes[start..];
                    let words = [&b"NaN"[..], b"Infinity", b"-Infinity"];
                    if let Some(word) = words.iter().find(|word| rest.starts_with(word)) {
                        self.at += word.len();
                        return Ok(Some((start..self.at, Oddity::Constant)));
                    }
                    let is_number =
                        |byte: &&u8| matches!(byte, b'0'..=b'9' | b'.' | b'e' | b'E' | b'+' | b'-');
                    let length = rest.iter().take_while(is_number).count().max(1);
                    self.at += length;
                    // Others are finite: the longest float has 309 digits.
                    let number = &self.text[start..self.at];
                    let is_long = length > 300 || number.contains(['e', 'E']);
                    if is_long && number.parse().is_ok_and(f64::is_infinite) {
                        return Ok(Some((start..self.at, Oddity::Overflow)));
                    }
                }
                _ => self.at += 1,
            }
        }
        Ok(None)
    }
}

/// Bytes of an escaped surrogate at the beginning: 6 of one alone, 12 of a pair.
fn surrogates(bytes: &[u8]) -> Option<usize> {
    let unit = |at: usize| {
        let escape = bytes.get(at..at + 6)?.strip_prefix(b"\\u")?;
        let digits = std::str::from_utf8(escape).ok()?;
        u16::from_str_radix(digits, 16).ok()
    };
    match unit(0)? {
        0xd800..0xdc00 => match unit(6) {
            Some(0xdc00..0xe000) => Some(12),
            _ => Some(6),
        },
        0xdc00..0xe000 => Some(6),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strict(text: &str) -> Cow<'_, str> {
        super::strict(text, &CancelToken::new()).unwrap()
    }

    #[test]
    fn what_python_writes_becomes_json() {
        for (python, json) in [
            ("[NaN,Infinity,-Infinity]", "[null,null,null]"),
            ("\u{feff}{\"a\": NaN}", "{\"a\": null}"),
            (
                "[1e999, -1E400, 1e308, -1.5e-400]",
                "[null, null, 1e308, -1.5e-400]",
            ),
            (
                r#"["\ud800","\udc00\ud83d\ude00x"]"#,
                r#"["\ufffd","\ufffd\ud83d\ude00x"]"#,
            ),
        ] {
            let have = strict(python);
            assert_eq!(have, json);
            assert!(serde_json::from_str::<serde_json::Value>(&have).is_ok());
        }
        let digits = format!("[{}]", "9".repeat(400));
        assert_eq!(strict(&digits), "[null]");
    }

    #[test]
    fn what_is_json_stays_as_it_is() {
        for text in [
            r#"{"NaN": "Infinity, \"NaN\" and -Infinity", "\\": "\ud83d\ude00", "n": -1.5e3}"#,
            "",
            "\"",
            "\"\\",
            "\"\\ud8",
        ] {
            assert!(matches!(strict(text), Cow::Borrowed(same) if same == text));
        }
    }

    #[test]
    fn no_value_moves_in_place() {
        let text = r#"{"a": [NaN, Infinity, -Infinity], "b": 1e999, "c": "\ud800 NaN"}"#;
        let same = in_place(text);
        assert_eq!(
            same,
            r#"{"a": [0e0, 1e000000, -1e000000], "b": 1e999, "c": "\ufffd NaN"}"#
        );
        assert_eq!(same.len(), text.len());
    }

    #[test]
    fn a_long_text_can_be_stopped() {
        let cancel = CancelToken::new();
        cancel.cancel();
        assert_eq!(
            super::strict(&"[0,".repeat(1 << 20), &cancel),
            Err(Cancelled)
        );
    }
}
