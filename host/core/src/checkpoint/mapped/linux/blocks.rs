//! Which parts of a mapping somebody looks at: the others are released.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

/// What one entry of the processor's second level of pages spans, with pages of 4 KiB. The system maps, and
/// releases, no more than this at once: what lies in other blocks keeps its pages.
const BLOCK: usize = 2 << 20;

/// In a count: its pages are being released.
const RELEASING: u32 = 1 << 31;

/// A mapping in blocks that begin at multiples of [`BLOCK`], each with the number of those who look at it.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    counts: Box<[AtomicU32]>,
    /// What the first block has before the mapping.
    before: usize,
    length: usize,
}

impl Blocks {
    pub(super) fn new(address: usize, length: usize) -> Blocks {
        let before = address % BLOCK;
        let count = (before + length).div_ceil(BLOCK);
        Blocks {
            counts: (0..count).map(|_| AtomicU32::new(0)).collect(),
            before,
            length,
        }
    }

    fn of(&self, range: &Range<usize>) -> Range<usize> {
        let (start, end) = (self.before + range.start, self.before + range.end);
        start / BLOCK..end.div_ceil(BLOCK)
    }

    /// Keeps the range from being released; it is not empty and lies in the mapping. `false` if a part of
    /// it is being released right now: then nothing is kept.
    pub(super) fn enter(&self, range: Range<usize>) -> bool {
        let blocks = self.of(&range);
        for block in blocks.clone() {
            if self.counts[block].fetch_add(1, Ordering::SeqCst) & RELEASING != 0 {
                // Nothing has been populated here: there is nothing to release.
                for entered in blocks.start..=block {
                    self.counts[entered].fetch_sub(1, Ordering::SeqCst);
                }
                return false;
            }
        }
        true
    }

    /// Ends what [`enter`](Blocks::enter) began, and has `release` take back what nobody looks at any more.
    pub(super) fn leave(&self, range: Range<usize>, release: impl Fn(Range<usize>)) {
        let mut unused = 0..0;
        for block in self.of(&range) {
            let count = &self.counts[block];
            count.fetch_sub(1, Ordering::SeqCst);
            let last = count.compare_exchange(0, RELEASING, Ordering::SeqCst, Ordering::SeqCst);
            if last.is_ok() {
                if unused.end != block {
                    self.release(unused, &release);
                    unused = block..block;
                }
                unused.end = block + 1;
            }
        }
        self.release(unused, &release);
    }

    fn release(&self, blocks: Range<usize>, release: impl Fn(Range<usize>)) {
        if blocks.is_empty() {
            return;
        }
        let start = (blocks.start * BLOCK).saturating_sub(self.before);
        let end = (blocks.end * BLOCK - self.before).min(self.length);
        release(start..end);
        for count in &self.counts[blocks] {
            count.fetch_and(!RELEASING, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Everything that was entered is released once nobody looks at it, and nothing before.
        #[test]
        fn what_is_looked_at_is_never_released(
            address in (0_usize..1 << 20).prop_map(|page| page << 12),
            length in 1_usize..20 << 20,
            ranges in prop::collection::vec((0.0..1.0_f64, 0.0..1.0_f64), 1..12),
        ) {
            let blocks = Blocks::new(address, length);
            let mut inside = Vec::new();
            for (a, b) in ranges {
                let at = |part: f64| (part * (length - 1) as f64) as usize;
                let (start, end) = (at(a.min(b)), at(a.max(b)) + 1);
                prop_assert!(blocks.enter(start..end));
                inside.push(start..end);
            }
            let all = inside.clone();
            let released = Mutex::new(Vec::new());
            while let Some(range) = inside.pop() {
                blocks.leave(range, |unused| {
                    assert!(!unused.is_empty() && unused.end <= length);
                    assert!((address + unused.start).is_multiple_of(BLOCK) || unused.start == 0);
                    for other in &inside {
                        assert!(other.end <= unused.start || unused.end <= other.start);
                    }
                    released.lock().unwrap().push(unused);
                });
            }
            let released = released.into_inner().unwrap();
            for range in all {
                for byte in [range.start, range.end - 1] {
                    prop_assert_eq!(released.iter().filter(|part| part.contains(&byte)).count(), 1);
                }
            }
            prop_assert!(blocks.counts.iter().all(|count| count.load(Ordering::SeqCst) == 0));
        }
    }

    #[test]
    fn nobody_enters_what_is_being_released() {
        let blocks = Blocks::new(0, 3 * BLOCK);
        assert!(blocks.enter(0..1));
        blocks.leave(0..1, |_| {
            assert!(!blocks.enter(BLOCK - 1..BLOCK + 1));
            assert!(!blocks.enter(0..3 * BLOCK));
            assert!(blocks.enter(BLOCK..3 * BLOCK));
            blocks.leave(BLOCK..3 * BLOCK, |unused| {
                assert_eq!(unused, BLOCK..3 * BLOCK)
            });
        });
        assert!(blocks.enter(0..3 * BLOCK));
    }
}
