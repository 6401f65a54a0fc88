//! Progress on stderr, and only on a terminal.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tightfit::Progress;
use tightfit::text::printable;

/// A bar that counts bytes; it hides itself where stderr is not a terminal.
pub(crate) fn bytes(what: &'static str, quiet: bool) -> ProgressBar {
    let target = if quiet {
        ProgressDrawTarget::hidden()
    } else {
        ProgressDrawTarget::stderr_with_hz(10)
    };
    let columns = console::Term::stderr().size_checked();
    drawn_on(target, columns.map_or(80, |(_, columns)| columns), what)
}

fn drawn_on(target: ProgressDrawTarget, columns: u16, what: &'static str) -> ProgressBar {
    // Nothing is drawn before the total is known: of nothing, nothing looks like all.
    let bar = ProgressBar::with_draw_target(Some(0), target).with_message(what);
    match ProgressStyle::with_template(template(columns)) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// Moves a bar.
pub(crate) fn show(bar: &ProgressBar, progress: Progress) {
    bar.set_length(progress.bytes_total);
    bar.set_position(progress.bytes_done);
}

/// What a line of this many columns has room for; the bar takes what is left.
fn template(columns: u16) -> &'static str {
    match columns {
        100.. => "{msg} {bar:30} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
        // Besides the bar 24 for the message, and 23 + 13 + 6 for the figures with spaces.
        76.. => "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
        56.. => "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes}",
        34.. => "{msg} {wide_bar} {percent:>3}%",
        _ => "{wide_bar} {percent:>3}%",
    }
}

/// Characters of a message.
const LONGEST_MESSAGE: usize = 24;

/// A name as a message: its end, which tells files apart, where it is long.
pub(crate) fn message(name: &str) -> String {
    let name = printable(name);
    match name.char_indices().rev().nth(LONGEST_MESSAGE - 1) {
        Some((at, _)) if at > 0 => {
            let (at, _) = name
                .char_indices()
                .rev()
                .nth(LONGEST_MESSAGE - 3)
                .unwrap_or((at, ' '));
            format!("..{}", &name[at..])
        }
        _ => name.into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use indicatif::TermLike;

    use super::*;

    /// A terminal that remembers what was written.
    #[derive(Debug, Clone)]
    struct Recorder {
        columns: u16,
        written: Arc<Mutex<String>>,
    }

    impl TermLike for Recorder {
        fn width(&self) -> u16 {
            self.columns
        }
        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_down(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn write_line(&self, text: &str) -> io::Result<()> {
            self.write_str(text)?;
            self.write_str("\n")
        }
        fn write_str(&self, text: &str) -> io::Result<()> {
            *self.written.lock().unwrap() += text;
            Ok(())
        }
        fn clear_line(&self) -> io::Result<()> {
            self.write_str("\n")
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_frame_is_never_full_before_anything_is_done_nor_wider_than_the_terminal() {
        for columns in [20, 40, 60, 80, 120] {
            let written = Arc::new(Mutex::new(String::new()));
            let recorder = Recorder {
                columns,
                written: Arc::clone(&written),
            };
            let target = ProgressDrawTarget::term_like(Box::new(recorder));
            let bar = drawn_on(target, columns, "loading");
            assert_eq!(
                *written.lock().unwrap(),
                "",
                "it is drawn before it is begun"
            );
            bar.set_length(123 << 20);
            bar.set_position(0);
            let frames = written.lock().unwrap().clone();
            assert!(!frames.is_empty());
            assert!(
                !frames.contains("0 B/0 B") && !frames.contains("100%"),
                "{frames:?}"
            );
            bar.set_message(message(&"x".repeat(500)));
            bar.set_position(122 << 20);
            bar.tick();
            for line in written.lock().unwrap().split(['\n', '\r']) {
                let width = line.trim_end().chars().count();
                assert!(
                    width <= usize::from(columns),
                    "{width} of {columns}: {line:?}"
                );
            }
        }
    }

    #[test]
    fn a_message_is_short_and_harmless() {
        assert_eq!(message("config.json"), "config.json");
        assert_eq!(
            message("12345678901234567890.123"),
            "12345678901234567890.123"
        );
        assert_eq!(
            message("model-00001-of-00005.safetensors"),
            "..1-of-00005.safetensors"
        );
        assert_eq!(message("\u{9b}2J"), "\\u{9b}2J");
    }
}
