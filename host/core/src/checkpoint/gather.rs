//! Runs of something that repeat at a distance, as the columns of a matrix lie in a file.

use std::ops::Range;

/// What a slice has of a tensor: of every `stride` the same runs. Counted in elements, bytes or scales.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Gather {
    stride: u64,
    /// Ascending, none touching another, within a stride.
    runs: Vec<Range<u64>>,
    /// How many are before each run, of one stride.
    before: Vec<u64>,
    /// How many there are of one stride.
    each: u64,
    /// How many the whole has.
    whole: u64,
}

impl Gather {
    /// `runs` are in ascending order and within `stride`, of which `whole` is a multiple.
    pub(super) fn new(
        stride: u64,
        runs: impl IntoIterator<Item = Range<u64>>,
        whole: u64,
    ) -> Gather {
        let mut gather = Gather {
            stride,
            runs: Vec::new(),
            before: Vec::new(),
            each: 0,
            whole,
        };
        for run in runs {
            gather.each += run.end - run.start;
            match gather.runs.last_mut() {
                Some(last) if last.end == run.start => last.end = run.end,
                _ => {
                    gather.before.push(gather.each - (run.end - run.start));
                    gather.runs.push(run);
                }
            }
        }
        gather
    }

    /// How many there are in all.
    pub(crate) fn len(&self) -> u64 {
        match self.stride {
            0 => 0,
            stride => self.whole / stride * self.each,
        }
    }

    /// The one run that all is.
    pub(super) fn contiguous(&self) -> Option<Range<u64>> {
        match &self.runs[..] {
            [run] if self.whole <= self.stride => Some(run.clone()),
            [run] if run.end - run.start == self.stride => Some(0..self.whole),
            [] => Some(0..0),
            _ => None,
        }
    }

    /// The same where each takes `times / by`; `None` where a run would not begin and end with a whole one.
    pub(super) fn scaled(&self, times: u64, by: u64) -> Option<Gather> {
        let scale = |number: u64| {
            let number = number.checked_mul(times)?;
            number.is_multiple_of(by).then_some(number / by)
        };
        let mut runs = Vec::with_capacity(self.runs.len());
        for run in &self.runs {
            runs.push(scale(run.start)?..scale(run.end)?);
        }
        Some(Gather::new(scale(self.stride)?, runs, scale(self.whole)?))
    }

    /// The blocks of so many elements that these are; `None` where one is cut. The last of the whole may be
    /// shorter.
    pub(super) fn in_blocks(&self, block: u64) -> Option<Gather> {
        let edge = |number: u64| {
            let is_edge = number.is_multiple_of(block) || number == self.whole;
            is_edge.then(|| number.div_ceil(block))
        };
        let blocks = self.whole.div_ceil(block);
        // Whole strides need no edges within.
        if let Some(all) = self.contiguous() {
            let run = edge(all.start)?..edge(all.end)?;
            return Some(Gather::new(blocks, Some(run), blocks));
        }
        let mut runs = Vec::with_capacity(self.runs.len());
        for run in &self.runs {
            runs.push(edge(run.start)?..edge(run.end)?);
        }
        Some(Gather::new(edge(self.stride)?, runs, blocks))
    }

    /// Where numbers `start..end` of these lie in the whole, in order.
    pub(crate) fn segments(&self, start: u64, end: u64) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut next = start;
        std::iter::from_fn(move || {
            if next >= end || self.each == 0 {
                return None;
            }
            let (stride, within) = (next / self.each, next % self.each);
            let run = self.before.partition_point(|&before| before <= within) - 1;
            let first = self.runs[run].start + (within - self.before[run]);
            let length = (self.runs[run].end - first).min(end - next);
            next += length;
            let first = stride * self.stride + first;
            Some(first..first + length)
        })
    }

    /// The whole range that numbers `start..end` lie in.
    pub(crate) fn span(&self, start: u64, end: u64) -> Range<u64> {
        let mut first = self.segments(start, end.min(start + 1));
        let mut last = self.segments(end.saturating_sub(1).max(start), end);
        match (first.next(), last.next()) {
            (Some(first), Some(last)) => first.start..last.end,
            _ => 0..0,
        }
    }

    /// Copies numbers `start..end` to `out`, of `each` bytes each, from bytes of the whole that begin with
    /// number `first` and have them all.
    pub(crate) fn copy(
        &self,
        Range { start, end }: Range<u64>,
        each: u64,
        (first, bytes): (u64, &[u8]),
        out: &mut [u8],
    ) {
        let mut rest = out;
        for segment in self.segments(start, end) {
            let within = &bytes[(each * (segment.start - first)) as usize..];
            let length = (each * (segment.end - segment.start)) as usize;
            let (piece, others) = rest.split_at_mut(length);
            piece.copy_from_slice(&within[..length]);
            rest = others;
        }
    }

    /// How many follow each other at least, but at both ends.
    pub(crate) fn shortest_run(&self) -> u64 {
        let runs = self.runs.iter().map(|run| run.end - run.start);
        runs.min().unwrap_or(0)
    }

    /// The most that are between two runs.
    pub(crate) fn longest_gap(&self) -> u64 {
        let between = self.runs.windows(2).map(|pair| pair[1].start - pair[0].end);
        let around = self.runs.first().zip(self.runs.last());
        let around = around.map(|(first, last)| self.stride - last.end + first.start);
        between.chain(around).max().unwrap_or(0)
    }

    /// From a run to the same one of what follows.
    pub(crate) fn stride(&self) -> u64 {
        self.stride
    }

    /// How many there are of one stride.
    pub(crate) fn of_stride(&self) -> u64 {
        self.each
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn segments_are_what_the_runs_of_all_strides_are(
            lengths in prop::collection::vec((0u64..5, 1u64..7), 1..4),
            tail in 0u64..4,
            strides in 1u64..5,
            from in 0.0f64..1.0,
            to in 0.0f64..1.0,
        ) {
            let mut runs = Vec::new();
            let mut at = 0;
            for (gap, length) in lengths {
                runs.push(at + gap..at + gap + length);
                at += gap + length;
            }
            let stride = at + tail;
            let gather = Gather::new(stride, runs.clone(), stride * strides);
            let all: Vec<u64> = (0..strides)
                .flat_map(|number| runs.iter().cloned().flatten().map(move |at| number * stride + at))
                .collect();
            prop_assert_eq!(gather.len(), all.len() as u64);
            let place = |share: f64| (share * all.len() as f64) as usize;
            let (start, end) = (place(from.min(to)), place(from.max(to)));
            let have: Vec<u64> = gather.segments(start as u64, end as u64).flatten().collect();
            prop_assert_eq!(&have[..], &all[start..end]);
            let mut between = all.windows(2).map(|pair| pair[1] - pair[0] - 1);
            prop_assert!(between.all(|gap| gap <= gather.longest_gap()));
            if start < end {
                prop_assert_eq!(gather.span(start as u64, end as u64), all[start]..all[end - 1] + 1);
            }
            if let Some(run) = gather.contiguous() {
                prop_assert!(run.eq(all.iter().copied()));
            }
            let double = gather.scaled(2, 1).unwrap();
            prop_assert_eq!(double.len(), 2 * gather.len());
            prop_assert_eq!(double.scaled(1, 2).unwrap(), gather);
        }

        #[test]
        fn blocks_are_whole_or_there_are_none(
            rows in 1u64..5,
            columns in 1u64..40,
            start in 0u64..40,
            length in 1u64..40,
            block in prop::sample::select(vec![2u64, 4, 8]),
        ) {
            let start = start.min(columns - 1);
            let end = (start + length).min(columns);
            let whole = rows * columns;
            let gather = Gather::new(columns, Some(start..end), whole);
            let all: Vec<u64> = gather.segments(0, gather.len()).flatten().collect();
            // By hand: the blocks of these elements have no others.
            let mut blocks: Vec<u64> = all.iter().map(|at| at / block).collect();
            blocks.dedup();
            let members = blocks.iter().flat_map(|number| {
                number * block..((number + 1) * block).min(whole)
            });
            let are_whole = members.eq(all.iter().copied());
            match gather.in_blocks(block) {
                Some(cut) => {
                    prop_assert!(are_whole);
                    let have: Vec<u64> = cut.segments(0, cut.len()).flatten().collect();
                    prop_assert_eq!(have, blocks);
                }
                // Rows that are not whole blocks, and yet are cut between some.
                None => prop_assert!(!are_whole || !columns.is_multiple_of(block)),
            }
        }
    }
}
