//! Messages on stderr, which may be a pipe that nobody reads: the command does not wait for ever for
//! somebody to hear what it has to say.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};

use anstream::AutoStream;
use anstyle::Style;
use tightfit::text::printable_lines;

/// Messages that were left out since the last that was written.
static LEFT_OUT: AtomicU64 = AtomicU64::new(0);

/// Bytes that a pipe takes without waiting when it says that it takes any.
const PIECE: usize = 512;

/// Writes whole lines of which `begin` has a style, where stderr shows colors. What else a terminal obeys is escaped
/// in both.
pub(crate) fn write_painted(style: Style, begin: &str, rest: &str) {
    let (begin, rest) = (printable_lines(begin), printable_lines(rest));
    write_raw(&format!("{style}{begin}{style:#}{rest}"));
}

/// Writes whole lines. Once nobody has read for a while, what comes is left out until somebody does.
pub(crate) fn write(lines: &str) {
    write_raw(&printable_lines(lines));
}

fn write_raw(lines: &str) {
    let mut stderr = AutoStream::auto(io::stderr().lock());
    let left_out = LEFT_OUT.load(Ordering::Relaxed);
    let note = match left_out {
        0 => String::new(),
        count => format!("\ntightfit: warn: {count} messages were left out, which nobody read\n"),
    };
    for piece in note
        .as_bytes()
        .chunks(PIECE)
        .chain(lines.as_bytes().chunks(PIECE))
    {
        if !is_ready(left_out > 0) {
            LEFT_OUT.fetch_add(1, Ordering::Relaxed);
            return;
        }
        // Nothing is left to be done when even stderr is gone.
        if stderr.write_all(piece).is_err() {
            return;
        }
    }
    LEFT_OUT.fetch_sub(left_out, Ordering::Relaxed);
}

/// Whether it takes a piece: at once, or within a time in which whoever reads at all has read.
#[cfg(unix)]
fn is_ready(at_once: bool) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let patience = Timespec {
        tv_sec: if at_once { 0 } else { 5 },
        tv_nsec: 0,
    };
    loop {
        let stderr = io::stderr();
        match poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], Some(&patience)) {
            Ok(ready) => return ready > 0,
            Err(rustix::io::Errno::INTR) => {}
            // What cannot be asked is written to.
            Err(_) => return true,
        }
    }
}

#[cfg(not(unix))]
fn is_ready(_: bool) -> bool {
    true
}
