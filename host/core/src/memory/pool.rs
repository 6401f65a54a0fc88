//! Hands out pieces of a range of bytes and takes them back. It counts in offsets and touches no
//! memory, so that the range may be a GPU's.
//!
//! Best fit over exact sizes, in a time that grows with the logarithm of the number of free pieces.
//! Allocators that sort free pieces into classes of sizes are faster by a constant, but cannot give
//! out a range of which only the rounded size is known to be free: a cache that was planned to the
//! byte has to fit.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};

use super::Gauge;

/// A range of bytes of which pieces are given out. The same calls give the same offsets.
#[derive(Debug)]
pub struct Pool {
    id: u64,
    capacity: u64,
    alignment: u64,
    /// First byte and length of every free piece. No two of them touch.
    free: BTreeMap<u64, u64>,
    /// The same as length and first byte: the first that is large enough fits best.
    free_by_length: BTreeSet<(u64, u64)>,
    used: Gauge,
}

/// A piece of a [`Pool`]. It cannot be copied and [`Pool::free`] takes it, so that nothing is given
/// back twice. What is only dropped stays in use.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "what is dropped without `Pool::free` stays in use"]
pub struct Allocation {
    pool: u64,
    offset: u64,
    bytes: u64,
}

impl Allocation {
    /// Returns its first byte in the pool's range, a multiple of the pool's alignment.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Returns its length in bytes, as it was asked for.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// An allocation was given to a pool that it does not come from.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} bytes at {} come from another pool", .0.bytes, .0.offset)]
pub struct ForeignAllocation(
    /// The allocation, which is still in use in its own pool.
    pub Allocation,
);

impl Pool {
    /// Returns a pool of `capacity` bytes, of which every allocation starts at, and takes, a
    /// multiple of `alignment` (at least one byte). What is left of `capacity` beyond such a
    /// multiple is not used.
    pub fn new(capacity: u64, alignment: u64) -> Pool {
        static POOLS: AtomicU64 = AtomicU64::new(0);
        let alignment = alignment.max(1);
        let mut pool = Pool {
            id: POOLS.fetch_add(1, Ordering::Relaxed),
            capacity: capacity / alignment * alignment,
            alignment,
            free: BTreeMap::new(),
            free_by_length: BTreeSet::new(),
            used: Gauge::default(),
        };
        pool.insert(0, pool.capacity);
        pool
    }

    /// Takes `bytes` bytes, or `None` when no free piece is large enough. No bytes take no room.
    pub fn allocate(&mut self, bytes: u64) -> Option<Allocation> {
        let padded = self.padded(bytes)?;
        let mut offset = 0;
        if padded > 0 {
            let length;
            (length, offset) = *self.free_by_length.range((padded, 0)..).next()?;
            self.remove(offset, length);
            self.insert(offset + padded, length - padded);
            self.used.add(padded);
        }
        Some(Allocation {
            pool: self.id,
            offset,
            bytes,
        })
    }

    /// Takes an allocation back; it becomes one piece with what is free beside it.
    ///
    /// # Errors
    /// [`ForeignAllocation`] with the allocation when it comes from another pool.
    pub fn free(&mut self, allocation: Allocation) -> Result<(), ForeignAllocation> {
        if allocation.pool != self.id {
            return Err(ForeignAllocation(allocation));
        }
        let mut offset = allocation.offset;
        // As much as when it was taken.
        let mut length = self.padded(allocation.bytes).unwrap_or(0);
        if length == 0 {
            return Ok(());
        }
        self.used.subtract(length);
        if let Some((&next, &next_length)) = self.free.range(offset..).next()
            && next == offset + length
        {
            self.remove(next, next_length);
            length += next_length;
        }
        if let Some((&before, &before_length)) = self.free.range(..offset).next_back()
            && before + before_length == offset
        {
            self.remove(before, before_length);
            offset = before;
            length += before_length;
        }
        self.insert(offset, length);
        Ok(())
    }

    /// Returns the number of bytes that can be in use at most.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Returns what every allocation's offset is a multiple of.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// Returns the number of bytes in use now and at most, each allocation rounded up to the
    /// alignment.
    pub fn used(&self) -> Gauge {
        self.used
    }

    /// Returns the most that one allocation can have now.
    pub fn largest_free(&self) -> u64 {
        self.free_by_length.last().map_or(0, |&(length, _)| length)
    }

    fn padded(&self, bytes: u64) -> Option<u64> {
        bytes.checked_next_multiple_of(self.alignment)
    }

    fn insert(&mut self, offset: u64, length: u64) {
        if length > 0 {
            self.free.insert(offset, length);
            self.free_by_length.insert((length, offset));
        }
    }

    fn remove(&mut self, offset: u64, length: u64) {
        self.free.remove(&offset);
        self.free_by_length.remove(&(length, offset));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The lengths of what lies between allocations, which is what must be free.
    fn gaps(live: &[Allocation], pool: &Pool) -> Vec<u64> {
        let mut ends: Vec<(u64, u64)> = live
            .iter()
            .filter(|piece| piece.bytes > 0)
            .map(|piece| {
                (
                    piece.offset,
                    piece.offset + pool.padded(piece.bytes).unwrap(),
                )
            })
            .collect();
        ends.sort_unstable();
        ends.push((pool.capacity, pool.capacity));
        let mut end = 0;
        let gap = |(start, next): (u64, u64)| {
            assert!(start >= end, "allocations overlap, or reach beyond the end");
            let gap = start - end;
            end = next;
            gap
        };
        ends.into_iter().map(gap).filter(|&gap| gap > 0).collect()
    }

    #[derive(Debug, Clone)]
    enum Step {
        Allocate(u64),
        Free(usize),
    }

    fn steps(largest: u64) -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => (0..=largest).prop_map(Step::Allocate),
            2 => any::<usize>().prop_map(Step::Free),
        ];
        prop::collection::vec(step, 0..200)
    }

    proptest! {
        #[test]
        fn allocations_are_aligned_disjoint_and_inside_and_what_is_between_them_is_free(
            // Beyond 32 bits, where arenas are.
            units in prop_oneof![0u64..64, (1u64 << 32)..(1 << 33)],
            rest in 0u64..256,
            alignment in prop_oneof![Just(0u64), Just(1), Just(24), Just(256), Just(4096)],
            steps in steps(1 << 14),
        ) {
            let mut pool = Pool::new(units * alignment.max(1) + rest % alignment.max(1), alignment);
            prop_assert_eq!(pool.capacity(), units * alignment.max(1));
            let mut live = Vec::new();
            let mut peak = 0;
            for step in steps {
                match step {
                    Step::Allocate(bytes) => {
                        let fits = pool.padded(bytes).unwrap() <= pool.largest_free();
                        let allocation = pool.allocate(bytes);
                        prop_assert_eq!(allocation.is_some(), fits);
                        if let Some(allocation) = allocation {
                            prop_assert_eq!(allocation.bytes(), bytes);
                            prop_assert_eq!(allocation.offset() % pool.alignment(), 0);
                            live.push(allocation);
                        }
                    }
                    Step::Free(which) if !live.is_empty() => {
                        let allocation = live.swap_remove(which % live.len());
                        prop_assert_eq!(pool.free(allocation), Ok(()));
                    }
                    Step::Free(_) => {}
                }
                let free = gaps(&live, &pool);
                prop_assert_eq!(pool.largest_free(), free.iter().copied().max().unwrap_or(0));
                // Each gap is one piece: what was given back beside it has become part of it.
                prop_assert_eq!(pool.free.len(), free.len());
                prop_assert_eq!(pool.used().now, pool.capacity() - free.iter().sum::<u64>());
                peak = peak.max(pool.used().now);
                prop_assert_eq!(pool.used().peak, peak);
            }
            for allocation in live {
                prop_assert_eq!(pool.free(allocation), Ok(()));
            }
            prop_assert_eq!(pool.used().now, 0);
            prop_assert_eq!(pool.largest_free(), pool.capacity());
        }
    }

    #[test]
    fn a_pool_can_be_given_out_to_the_last_byte() {
        // No power of two and no sum of a few: a class of sizes would lose the end.
        let capacity = 256 * ((1 << 33) + 1001);
        let mut pool = Pool::new(capacity, 256);
        let all = pool.allocate(capacity).unwrap();
        assert_eq!(pool.largest_free(), 0);
        assert_eq!(pool.allocate(1), None);
        assert_eq!(pool.free(all), Ok(()));
        assert_eq!(pool.allocate(capacity + 1), None);
        assert_eq!(pool.allocate(u64::MAX), None);
        assert_eq!(pool.used().now, 0);
        assert_eq!(pool.used().peak, capacity);
    }

    #[test]
    fn the_smallest_piece_that_is_large_enough_is_taken() {
        let mut pool = Pool::new(100, 1);
        let pieces: Vec<Allocation> = [30, 10, 20, 10, 30]
            .map(|bytes| pool.allocate(bytes).unwrap())
            .into();
        for piece in pieces.into_iter().step_by(2) {
            pool.free(piece).unwrap();
        }
        assert_eq!(pool.allocate(20).unwrap().offset(), 40);
        assert_eq!(pool.allocate(21).unwrap().offset(), 0);
    }

    #[test]
    fn another_pools_allocation_is_given_back() {
        let (mut one, mut other) = (Pool::new(64, 1), Pool::new(64, 1));
        let mine = one.allocate(16).unwrap();
        let theirs = other.allocate(16).unwrap();
        let ForeignAllocation(theirs) = one.free(theirs).unwrap_err();
        assert_eq!((one.used().now, other.used().now), (16, 16));
        assert_eq!(other.free(theirs), Ok(()));
        assert_eq!(one.free(mine), Ok(()));
    }
}
