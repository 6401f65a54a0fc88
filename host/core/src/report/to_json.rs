//! JSON as it is printed.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter, PrettyFormatter, Serializer};

use crate::text::is_hidden;

/// Returns a value as indented JSON that can be printed: characters that [are hidden](is_hidden)
/// are escaped in its strings (`\u009b`; as a pair of surrogates beyond U+FFFF), so that it says
/// the same to a parser and nothing to a terminal. It ends without a line break.
///
/// # Errors
/// When the value cannot be JSON, as a map without strings as keys.
pub fn to_json(value: &impl Serialize) -> serde_json::Result<String> {
    let mut out = Vec::new();
    let escaping = Escaping(PrettyFormatter::new());
    value.serialize(&mut Serializer::with_formatter(&mut out, escaping))?;
    String::from_utf8(out).map_err(serde::ser::Error::custom)
}

/// Indents as serde_json does, and escapes more than it does.
struct Escaping(PrettyFormatter<'static>);

impl Formatter for Escaping {
    /// Parts of strings between those characters that JSON itself has escaped.
    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let mut shown = 0;
        for (at, c) in fragment.char_indices().filter(|&(_, c)| is_hidden(c)) {
            writer.write_all(&fragment.as_bytes()[shown..at])?;
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04x}")?;
            }
            shown = at + c.len_utf8();
        }
        writer.write_all(&fragment.as_bytes()[shown..])
    }

    /// JSON that was text before. Outside of strings it has no such characters, but for the line
    /// breaks and tabs between its parts, which go.
    fn write_raw_fragment<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let fragment: String = fragment.split(['\n', '\r', '\t']).collect();
        self.write_string_fragment(writer, &fragment)
    }

    fn write_char_escape<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        self.0.write_char_escape(writer, escape)
    }

    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_array(writer)
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_array(writer)
    }

    fn begin_array_value<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.0.begin_array_value(writer, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_array_value(writer)
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_object(writer)
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_object(writer)
    }

    fn begin_object_key<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.0.begin_object_key(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_object_value(writer)
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_object_value(writer)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn what_is_printed_is_the_same_value_without_anything_hidden() {
        let all: String = (0u32..=0x10_ffff).filter_map(char::from_u32).collect();
        let value = json!({ "a\u{9b}\u{e0041}": [all, "\u{202e}", 1.5, null], "b": {}, "c": [] });
        let text = to_json(&value).unwrap();
        let hidden = text.chars().find(|&c| c != '\n' && is_hidden(c));
        assert_eq!(hidden, None);
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value);
        assert!(text.contains(r#""a\u009b\udb40\udc41": ["#), "{text}");
    }

    #[test]
    fn what_needs_no_escape_is_printed_as_serde_json_does() {
        let value = json!({ "a": [1, "é\"\\\n漢", {}], "b": { "c": true }, "d": [] });
        assert_eq!(
            to_json(&value).unwrap(),
            serde_json::to_string_pretty(&value).unwrap()
        );
    }

    #[test]
    fn raw_json_is_escaped_too() {
        let raw: &serde_json::value::RawValue =
            serde_json::from_str("{\r\n\t\"\u{9d}\u{7f}\": [1,\n2]}").unwrap();
        let text = to_json(&raw).unwrap();
        assert_eq!(text, r#"{"\u009d\u007f": [1,2]}"#);
    }
}
