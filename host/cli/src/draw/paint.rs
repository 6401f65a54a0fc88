//! Text with colors, kept apart from what they color.

use std::fmt::{self, Write as _};

use anstyle::{Ansi256Color, AnsiColor, Style};
use tightfit::report::Content;
use tightfit::text::printable_lines;

/// Text in pieces, each of which may have a style. Shown with [`fmt::Display`] it has none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Text {
    pieces: Vec<(Style, String)>,
}

/// Heads of tables, and names of devices.
pub(super) const HEAD: Style = Style::new().bold();

/// What a user ought to look at.
pub(crate) const WARNING: Style = AnsiColor::Yellow.on_default().bold();

/// What went wrong.
pub(crate) const ERROR: Style = AnsiColor::Red.on_default().bold();

/// What hardly matters.
pub(crate) const ASIDE: Style = Style::new().dimmed();

impl Text {
    /// Adds text without a style.
    pub(super) fn push(&mut self, text: impl Into<String>) {
        self.paint(Style::new(), text);
    }

    /// Adds text with a style.
    pub(super) fn paint(&mut self, style: Style, text: impl Into<String>) {
        self.pieces.push((style, text.into()));
    }

    /// Adds all of another text.
    pub(super) fn append(&mut self, mut other: Text) {
        self.pieces.append(&mut other.pieces);
    }

    /// Returns it with escape sequences for its colors, which are the only ones in it: all others are
    /// escaped.
    pub fn ansi(&self) -> String {
        let mut ansi = String::new();
        for (style, text) in &self.pieces {
            // Writing to a string does not fail.
            let _ = write!(ansi, "{style}{}{style:#}", printable_lines(text));
        }
        ansi
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.pieces
            .iter()
            .try_for_each(|(_, text)| f.write_str(text))
    }
}

/// The color of each kind of content in drawings, as red, green and blue. Told apart on white and on black,
/// and by people who see few colors (after Okabe and Ito).
pub(super) fn color(content: Content) -> [u8; 3] {
    match content {
        Content::Embeddings => [0xe6, 0x9f, 0x00],
        Content::Linear => [0x00, 0x72, 0xb2],
        Content::Experts => [0x00, 0x9e, 0x73],
        Content::Other => [0x8c, 0x6b, 0xb1],
        Content::OutputHead => [0xd5, 0x5e, 0x00],
        Content::Scales => [0x56, 0xb4, 0xe9],
        Content::Padding => [0x99, 0x99, 0x99],
        Content::Headroom => [0xc9, 0xb4, 0x58],
        Content::InUse => [0x6e, 0x77, 0x81],
        Content::Free => [0xea, 0xee, 0xf2],
    }
}

/// The same on a terminal, whose background nobody knows: what is free has none.
pub(super) fn style(content: Content) -> Style {
    match content {
        Content::Free => ASIDE,
        _ => Style::new().fg_color(Some(nearest(color(content)).into())),
    }
}

/// Steps of each component in the cube of 6 x 6 x 6 colors that terminals have from 16 on.
const STEPS: [u8; 6] = [0, 95, 135, 175, 215, 255];

/// The color of that cube that is nearest: few terminals lack it, and more lack any colors.
fn nearest(color: [u8; 3]) -> Ansi256Color {
    let place = |value: u8| {
        (0u8..)
            .zip(STEPS)
            .min_by_key(|(_, step)| value.abs_diff(*step))
    };
    let index = color.iter().fold(0, |index, &value| {
        index * 6 + place(value).map_or(0, |(at, _)| at)
    });
    Ansi256Color(16 + index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_styles_are_escape_sequences() {
        let mut text = Text::default();
        text.push("a\x1b[31mb\n");
        text.paint(ERROR, "c\x1b[0m\u{202e}");
        assert_eq!(
            text.ansi(),
            "a\\u{1b}[31mb\n\x1b[1m\x1b[31mc\\u{1b}[0m\\u{202e}\x1b[0m"
        );
    }

    #[test]
    fn a_text_without_colors_is_all_of_its_pieces() {
        let mut text = Text::default();
        text.paint(WARNING, "a");
        let mut more = Text::default();
        more.push("b");
        text.append(more);
        assert_eq!(text.to_string(), "ab");
    }

    #[test]
    fn colors_on_a_terminal_are_near_those_of_drawings() {
        for content in Content::ALL {
            let [red, green, blue] = color(content);
            let Ansi256Color(index) = nearest([red, green, blue]);
            let place = |divisor: u8| STEPS[usize::from((index - 16) / divisor % 6)];
            let near = [place(36), place(6), place(1)];
            for (value, near) in [red, green, blue].into_iter().zip(near) {
                assert!(value.abs_diff(near) <= 48, "{content:?}: {near:?}");
            }
        }
    }
}
