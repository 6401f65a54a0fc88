//! How much is shown of a text that somebody wrote who is not trusted: a guest.

/// Bytes that a character takes where it is shown, with what is escaped by then. Never too few.
pub(crate) fn shown_bytes(c: char) -> usize {
    match c.escape_debug().count() {
        _ if matches!(c, ' '..='~') => 1,
        1 => c.len_utf8(),
        _ => c.escape_default().count(),
    }
}

/// Keeps what takes at most `limit` bytes where it is shown, and marks that there was more. All that
/// is shown of a guest's texts comes through here.
pub(crate) fn truncate(text: &mut String, limit: usize) {
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

/// The same for a text that is given away.
pub(crate) fn truncated(mut text: String, limit: usize) -> String {
    truncate(&mut text, limit);
    text
}

/// Texts one after the other as far as `limit` goes for all of them together.
pub(crate) fn joined(texts: &[String], limit: usize) -> String {
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
