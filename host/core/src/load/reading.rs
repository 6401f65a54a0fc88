//! Whether what the processor quantizes is read, or looked at where the page cache has it.
//!
//! To read is to copy. To look is to have pages mapped and unmapped, which a processor with slow page tables
//! (in a virtual machine, or of files in small pages) pays for dearly: there reading is faster, elsewhere
//! looking by a quarter. Nothing tells beforehand, so both are tried, and what takes less time per byte is
//! done, but for a chunk here and there that shows whether it still does.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How a chunk gets to the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Look,
    Read,
}

/// One in so many chunks goes the slower way.
const TRIED_AGAIN: u64 = 32;

/// Bytes after which what was measured counts half.
const MEMORY: u64 = 1 << 30;

/// What both ways take.
#[derive(Debug)]
pub(super) struct Ways {
    /// Chunks that have been begun, and of them those that go both ways in turn.
    begun: AtomicU64,
    first: u64,
    look: Measured,
    read: Measured,
}

#[derive(Debug, Default)]
struct Measured {
    bytes: AtomicU64,
    nanoseconds: AtomicU64,
}

impl Measured {
    fn add(&self, bytes: u64, took: Duration) {
        // More than 500 years do not fit.
        let nanoseconds = took.as_nanos() as u64;
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
        if self.bytes.fetch_add(bytes, Ordering::Relaxed) > MEMORY {
            // Others may add meanwhile, and what they add may be lost: it is an average.
            for sum in [&self.bytes, &self.nanoseconds] {
                sum.store(sum.load(Ordering::Relaxed) / 2, Ordering::Relaxed);
            }
        }
    }

    /// Nanoseconds for a byte; `None` where nothing has been measured.
    fn each(&self) -> Option<f64> {
        let bytes = self.bytes.load(Ordering::Relaxed);
        let nanoseconds = self.nanoseconds.load(Ordering::Relaxed);
        (bytes > 0).then(|| nanoseconds as f64 / bytes as f64)
    }
}

impl Ways {
    /// For a load by so many workers.
    pub(super) fn new(workers: usize) -> Ways {
        Ways {
            begun: AtomicU64::new(0),
            first: 4 * workers as u64,
            look: Measured::default(),
            read: Measured::default(),
        }
    }

    /// How to do the next chunk.
    pub(super) fn choose(&self) -> Way {
        let number = self.begun.fetch_add(1, Ordering::Relaxed);
        let (better, other) = match (self.look.each(), self.read.each()) {
            (Some(look), Some(read)) if look > read => (Way::Read, Way::Look),
            _ => (Way::Look, Way::Read),
        };
        let is_other = match number < self.first {
            true => return [Way::Look, Way::Read][(number % 2) as usize],
            false => number.is_multiple_of(TRIED_AGAIN),
        };
        if is_other { other } else { better }
    }

    /// Notes what a chunk of so many bytes has taken.
    pub(super) fn record(&self, way: Way, bytes: usize, took: Duration) {
        match way {
            Way::Look => self.look.add(bytes as u64, took),
            Way::Read => self.read.add(bytes as u64, took),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The share of chunks that are looked at, of those after the first.
    fn looked_at(look: u64, read: u64) -> f64 {
        let ways = Ways::new(4);
        let mut looked = 0;
        for chunk in 0..2016 {
            let way = ways.choose();
            looked += u32::from(chunk >= 16 && way == Way::Look);
            let took = if way == Way::Look { look } else { read };
            ways.record(way, 1 << 20, Duration::from_micros(took));
        }
        f64::from(looked) / 2000.0
    }

    #[test]
    fn the_faster_way_is_taken_and_the_other_is_not_forgotten() {
        let share = looked_at(100, 150);
        assert!((0.96..1.0).contains(&share), "{share}");
        let share = looked_at(150, 100);
        assert!((0.0..0.04).contains(&share) && share > 0.0, "{share}");
    }

    #[test]
    fn what_has_become_faster_is_taken_after_a_while() {
        let ways = Ways::new(1);
        let mut last = Way::Look;
        for chunk in 0..20_000u64 {
            last = ways.choose();
            let look = if chunk < 100 { 50 } else { 200 };
            let took = if last == Way::Look { look } else { 100 };
            ways.record(last, 4 << 20, Duration::from_micros(took));
        }
        assert_eq!(last, Way::Read);
    }

    #[test]
    fn where_there_is_no_window_nothing_is_waited_for() {
        let ways = Ways::new(2);
        for _ in 0..100 {
            let _ = ways.choose();
            ways.record(Way::Read, 1 << 20, Duration::from_micros(100));
        }
        assert_eq!(ways.choose(), Way::Look);
    }
}
