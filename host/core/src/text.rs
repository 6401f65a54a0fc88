//! How much of a text is shown, and which of its characters are escaped. Imports nothing.
//!
//! Names, messages and paths come from checkpoints, policies, servers and file systems. Whatever is
//! printed or written for people or programs, in whatever form, asks [`is_hidden`].

use std::borrow::Cow;

/// Returns whether a character is escaped wherever text is shown: it does not show itself, and what
/// it does instead (move the cursor, recolor the screen, begin a line, turn the direction of
/// reading around, join or part its neighbors, or nothing at all) can make a text look like
/// another.
///
/// These are Unicode's controls (Cc: C0, DEL and C1), format characters (Cf: directions, zero-width
/// joiners, the byte order mark, the soft hyphen, tags, annotations, signs that enclose what follows),
/// separators of lines and paragraphs (Zl, Zp), all that is ignorable by default (variation
/// selectors, fillers), private use (Co) and noncharacters.
pub fn is_hidden(c: char) -> bool {
    // What nearly all texts consist of.
    if matches!(c, ' '..='~') {
        return false;
    }
    c.is_control()
        || matches!(
            c,
            // The soft hyphen, and the joiner of graphemes.
            '\u{ad}' | '\u{34f}'
            // Signs of Arabic, Syriac and Kaithi that enclose numbers, and the Arabic letter mark.
            | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{890}'..='\u{891}'
            | '\u{8e2}' | '\u{110bd}' | '\u{110cd}'
            // Fillers of Hangul and vowels of Khmer that show nothing; Mongolian selectors.
            | '\u{115f}'..='\u{1160}' | '\u{17b4}'..='\u{17b5}' | '\u{180b}'..='\u{180f}'
            | '\u{3164}' | '\u{ffa0}'
            // Zero width, directions, separators of lines and paragraphs, invisible operators.
            | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            // Variation selectors, the byte order mark, annotations and other specials.
            | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{fff0}'..='\u{fffb}'
            // Controls of hieroglyphs, shorthand and music.
            | '\u{13430}'..='\u{1343f}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
            // Tags and more variation selectors.
            | '\u{e0000}'..='\u{e0fff}'
            // Private use.
            | '\u{e000}'..='\u{f8ff}' | '\u{f0000}'..='\u{10ffff}'
            // Noncharacters.
            | '\u{fdd0}'..='\u{fdef}'
        )
        || u32::from(c) & 0xfffe == 0xfffe
}

/// Text as it may be shown: characters that [are hidden](is_hidden) are escaped as in a Rust string
/// (`\n`, `\u{1b}`), line breaks too.
pub fn printable(text: &str) -> Cow<'_, str> {
    escaped(text, is_hidden)
}

/// [`printable`] for a text of several lines: its line breaks stay.
pub fn printable_lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| c != '\n' && is_hidden(c))
}

fn escaped(text: &str, hidden: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&hidden) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if hidden(c) {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    Cow::Owned(shown)
}

/// Returns the number of bytes that a character takes where it is shown, with what is escaped by
/// then. Never too few.
pub fn shown_bytes(c: char) -> usize {
    match c.escape_debug().count() {
        _ if matches!(c, ' '..='~') => 1,
        1 if !is_hidden(c) => c.len_utf8(),
        _ => c.escape_default().count(),
    }
}

/// Keeps what takes at most `limit` bytes where it is shown, and marks that there was more. All that
/// is shown of a guest's texts comes through here.
pub fn truncate(text: &mut String, limit: usize) {
    let mut shown = 0usize;
    let end = text.char_indices().find(|&(_, c)| {
        shown = shown.saturating_add(shown_bytes(c));
        shown > limit
    });
    if let Some((end, _)) = end {
        text.truncate(end);
        text.push('…');
        // What is kept takes no more room than it needs.
        text.shrink_to_fit();
    }
}

/// Returns the same for a text that is given away.
pub fn truncated(mut text: String, limit: usize) -> String {
    truncate(&mut text, limit);
    text
}

/// Texts one after the other as far as `limit` goes for all of them together.
pub fn joined(texts: &[String], limit: usize) -> String {
    let mut list = String::new();
    for (index, text) in texts.iter().enumerate() {
        if index > 0 {
            list += ", ";
        }
        list += text;
        if list.len() > limit {
            break;
        }
    }
    truncated(list, limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_control_a_terminal_is_escaped() {
        assert_eq!(printable("plain – text"), "plain – text");
        assert_eq!(
            printable("a\x1b[2Jb\n\u{202e}c"),
            "a\\u{1b}[2Jb\\n\\u{202e}c"
        );
        assert_eq!(printable_lines("a\n\r\u{9b}b\n"), "a\n\\r\\u{9b}b\n");
    }

    #[test]
    fn every_control_and_every_direction_is_hidden() {
        let some = [
            '\0',
            '\t',
            '\n',
            '\r',
            '\x1b',
            '\x7f',
            '\u{80}',
            '\u{85}',
            '\u{9b}',
            '\u{9d}',
            '\u{9f}',
            '\u{ad}',
            '\u{34f}',
            '\u{61c}',
            '\u{115f}',
            '\u{180e}',
            '\u{200b}',
            '\u{200c}',
            '\u{200d}',
            '\u{200e}',
            '\u{200f}',
            '\u{2028}',
            '\u{2029}',
            '\u{202a}',
            '\u{202e}',
            '\u{2060}',
            '\u{2066}',
            '\u{2069}',
            '\u{206f}',
            '\u{3164}',
            '\u{e000}',
            '\u{fe0f}',
            '\u{feff}',
            '\u{fff9}',
            '\u{fffb}',
            '\u{ffff}',
            '\u{1bca0}',
            '\u{1d173}',
            '\u{e0001}',
            '\u{e007f}',
            '\u{e0100}',
            '\u{f0000}',
            '\u{10fffd}',
        ];
        for c in some {
            assert!(is_hidden(c), "{c:?}");
            assert!(printable(&format!("a{c}b")).starts_with("a\\"), "{c:?}");
        }
        // Letters, accents of their own, marks that join letters, spaces of all widths, signs.
        for c in "aZ~é\u{301}ßΩяא ال漢字\u{3000}\u{a0}\u{93f}😀∎█·".chars() {
            assert!(!is_hidden(c), "{c:?}");
        }
    }

    #[test]
    fn what_std_prints_otherwise_is_hidden_or_known() {
        // The standard library escapes what Unicode does not print: our list must not fall behind
        // it, but for spaces and what is not assigned yet.
        let unassigned = |c: char| match u32::from(c) {
            ..0x800 => true,
            // Format characters are assigned below; the rest of what std escapes are gaps.
            code => !(0x2000..0x2070).contains(&code) && !(0xfe00..0x10000).contains(&code),
        };
        let all = (0u32..=0x10_ffff).filter_map(char::from_u32);
        for c in all.filter(|c| !c.is_whitespace() && !unassigned(*c)) {
            let text = format!("a{c}");
            let escaped = text.escape_debug().count() > 2;
            // U+2065 is not assigned, and ignorable by default all the same; gaps among the half
            // widths and the presentation forms show as boxes.
            let gap = matches!(u32::from(c), 0xfe1a..=0xfe1f | 0xfe53 | 0xfe67 | 0xfe6c..=0xfeff | 0xff00..=0xffef);
            assert!(!escaped || gap || is_hidden(c), "{c:?}");
        }
        // C0, DEL and C1 are exactly what std calls controls.
        for c in (0u32..0x200).filter_map(char::from_u32) {
            assert_eq!(is_hidden(c), c.is_control() || c == '\u{ad}', "{c:?}");
        }
    }

    #[test]
    fn a_text_is_cut_by_what_it_takes_on_the_screen() {
        let cut = |text: &str, limit| truncated(text.to_owned(), limit);
        assert_eq!(cut("plain", 5), "plain");
        assert_eq!(cut("plain", 4), "plai…");
        assert_eq!(cut("plain", 0), "…");
        assert_eq!(cut("", 0), "");
        assert_eq!(cut("ééé", 5), "éé…");
        // `\u{0}` takes 5 bytes, `\u{202e}` takes 8.
        assert_eq!(cut("\0\0\0", 10), "\0\0…");
        assert_eq!(cut("\u{202e}a", 8), "\u{202e}…");
    }

    #[test]
    fn what_was_cut_off_is_not_kept() {
        let text = truncated("x".repeat(1 << 20), 10);
        assert!(text.capacity() < 100, "{}", text.capacity());
    }

    #[test]
    fn a_list_is_as_long_as_one_text() {
        let texts = vec!["x".repeat(40); 1000];
        let list = joined(&texts, 100);
        assert!(list.starts_with("xxx") && list.contains(", "), "{list}");
        assert!(list.len() <= 100 + '…'.len_utf8(), "{}", list.len());
        assert_eq!(joined(&["a".to_owned(), "b".to_owned()], 100), "a, b");
    }
}
