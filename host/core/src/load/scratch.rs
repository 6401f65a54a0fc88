//! Memory for what is kept of tensors until they are complete.

/// Host memory for f32 scales of tensors that are double-quantized. What a tensor has had the next ones
/// have: fresh memory costs the system more than these cost us.
pub(super) struct HostScratch {
    limit: u64,
    /// Bytes in use.
    used: u64,
    unused: Vec<Vec<f32>>,
}

impl HostScratch {
    pub(super) fn new(limit: u64) -> HostScratch {
        HostScratch {
            limit,
            used: 0,
            unused: Vec::new(),
        }
    }

    pub(super) fn is_unused(&self) -> bool {
        self.used == 0
    }

    /// Memory for so many bytes of scales; empty where there is none of an earlier tensor that fits.
    /// `None` while others have too much.
    pub(super) fn take(&mut self, bytes: u64) -> Option<Vec<f32>> {
        let left = self.limit.saturating_sub(self.used);
        if bytes > left {
            return None;
        }
        // What is much larger is left for others, who would have to wait for it.
        let most = left.min(bytes.saturating_add(bytes / 4));
        let fits = |memory: &Vec<f32>| (bytes..=most).contains(&held(memory));
        let unused = self.unused.iter().enumerate();
        let best = unused
            .filter(|(_, memory)| fits(memory))
            .min_by_key(|(_, memory)| memory.capacity());
        let best = best.map(|(index, _)| index);
        let memory = best.map_or_else(Vec::new, |index| self.unused.swap_remove(index));
        self.used += held(&memory).max(bytes);
        // All that is held stays within the limit.
        while self.used + self.unused.iter().map(held).sum::<u64>() > self.limit {
            self.unused.pop();
        }
        Some(memory)
    }

    pub(super) fn give_back(&mut self, memory: Vec<f32>) {
        self.used = self.used.saturating_sub(held(&memory));
        self.unused.push(memory);
    }
}

/// Bytes that a vector takes.
fn held(memory: &Vec<f32>) -> u64 {
    4 * memory.capacity() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_stays_within_the_limit_and_memory_is_used_again() {
        let mut scratch = HostScratch::new(4000);
        let mut at_work: Vec<Vec<f32>> = Vec::new();
        let mut state = 7u64;
        let mut reused = 0;
        for _ in 0..10_000 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
            let bytes = 4 * (1 + (state >> 33) % 300);
            match scratch.take(bytes) {
                Some(mut memory) => {
                    reused += usize::from(memory.capacity() > 0);
                    assert!(held(&memory) <= bytes + bytes / 4);
                    if memory.capacity() == 0 {
                        memory = Vec::with_capacity((bytes / 4) as usize);
                    }
                    memory.resize((bytes / 4) as usize, 0.0);
                    at_work.push(memory);
                }
                // As much as there is at most is always to be had in the end.
                None => scratch.give_back(at_work.swap_remove(0)),
            }
            let all = at_work.iter().chain(&scratch.unused);
            assert!(all.map(held).sum::<u64>() <= 4000);
        }
        assert!(reused > 100, "{reused}");
        for memory in at_work {
            scratch.give_back(memory);
        }
        assert!(scratch.is_unused());
        assert!(scratch.take(4000).is_some());
    }
}
