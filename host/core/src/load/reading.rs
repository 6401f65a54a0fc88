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

/// One chunk in 32 to 512 goes the slower way: in so many as takes a hundredth more time than none. With many workers
/// to map can take ten times as long as to read, for all share one table of pages.
const TRIED_AGAIN: (u64, u64) = (32, 512);

/// What a chunk of so many bytes counts against all before it, which smaller ones do by their size. Where it takes
/// less than they did it counts more: what is slower is tried seldom, and shall not have to wait for its turns.
const LARGE: f64 = (4 << 20) as f64;
const MORE: f64 = 0.25;
const LESS: f64 = 0.5;

/// What both ways take.
#[derive(Debug)]
pub(super) struct Ways {
    /// Chunks that have been begun, and of them those that go both ways in turn.
    begun: AtomicU64,
    first: u64,
    look: Measured,
    read: Measured,
}

/// What a byte takes, as a mean that exceptions hardly move: the first look at a file maps it, and at times the
/// system has something else to do.
#[derive(Debug, Default)]
struct Measured {
    /// Nanoseconds for a byte, a float's bits; zero where nothing has been measured.
    each: AtomicU64,
}

impl Measured {
    fn add(&self, bytes: u64, took: Duration) {
        if bytes == 0 {
            return;
        }
        let took = took.as_nanos() as f64 / bytes as f64;
        let each = match self.each() {
            // What there was before were exceptions.
            Some(each) if took >= each / 2.0 => {
                let most = if took < each { LESS } else { MORE };
                let share = most * (bytes as f64 / LARGE).min(1.0);
                each + (took.min(2.0 * each) - each) * share
            }
            _ => took,
        };
        // Others may add meanwhile, and what they add may be lost: it is a mean.
        self.each.store(each.to_bits(), Ordering::Relaxed);
    }

    /// Nanoseconds for a byte; `None` where nothing has been measured.
    fn each(&self) -> Option<f64> {
        let each = f64::from_bits(self.each.load(Ordering::Relaxed));
        (each > 0.0).then_some(each)
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
        if number < self.first {
            return [Way::Look, Way::Read][(number % 2) as usize];
        }
        let (better, other, every) = match (self.look.each(), self.read.each()) {
            (Some(look), Some(read)) if look > read => (Way::Read, Way::Look, every(look / read)),
            (Some(look), Some(read)) => (Way::Look, Way::Read, every(read / look)),
            _ => (Way::Look, Way::Read, TRIED_AGAIN.0),
        };
        if number.is_multiple_of(every) {
            other
        } else {
            better
        }
    }

    /// Notes what a chunk of so many bytes has taken.
    pub(super) fn record(&self, way: Way, bytes: usize, took: Duration) {
        match way {
            Way::Look => self.look.add(bytes as u64, took),
            Way::Read => self.read.add(bytes as u64, took),
        }
    }
}

/// One in how many chunks goes a way that takes so many times as long as the other.
fn every(slower: f64) -> u64 {
    let (least, most) = TRIED_AGAIN;
    // Saturates, and what is no number is zero.
    ((100.0 * (slower - 1.0)) as u64).clamp(least, most)
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
    fn the_slower_way_costs_a_hundredth() {
        for slower in [100, 110, 150, 250, 400, 580] {
            for is_look in [false, true] {
                let ways = Ways::new(16);
                let (look, read) = if is_look {
                    (slower, 100)
                } else {
                    (100, slower)
                };
                let mut all = 0;
                let chunks = 100_000;
                for chunk in 0..64 + chunks {
                    let way = ways.choose();
                    let took = if way == Way::Look { look } else { read };
                    all += if chunk < 64 { 0 } else { took };
                    ways.record(way, 4 << 20, Duration::from_micros(took));
                }
                let more = all as f64 / (100 * chunks) as f64;
                assert!((1.0..1.0101).contains(&more), "{slower}, {is_look}: {more}");
            }
        }
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

    /// A look is to take 42 us for a megabyte and a read 68, and now and then either 1 ms more.
    #[test]
    fn exceptions_do_not_decide() {
        for (first, every) in [
            (9000, 1 << 20),
            (400, 1 << 20),
            (400, 29),
            (400, 7),
            (68, 5),
        ] {
            let ways = Ways::new(1);
            let mut looked = 0;
            for chunk in 0..200 {
                let way = ways.choose();
                looked += u64::from(way == Way::Look);
                let each = match way {
                    Way::Look if chunk == 0 => first,
                    Way::Look => 42,
                    Way::Read => 68,
                };
                let more = if chunk % every == every - 1 { 1000 } else { 0 };
                ways.record(way, 8 << 20, Duration::from_micros(8 * (each + more)));
            }
            assert!(looked > 150, "{first}, {every}: {looked}");
        }
    }

    #[test]
    fn an_empty_chunk_and_one_that_takes_no_time_say_nothing() {
        let measured = Measured::default();
        measured.add(0, Duration::from_secs(1));
        measured.add(1 << 20, Duration::ZERO);
        assert_eq!(measured.each(), None);
        measured.add(1 << 20, Duration::from_micros(1 << 20));
        assert_eq!(measured.each(), Some(1000.0));
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
