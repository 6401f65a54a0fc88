//! The mean of double quantization over scales that come in pieces.

use crate::double::{GROUP, group_sum, halve};

/// Computes what [`Kernels::absmax_mean`](crate::Kernels::absmax_mean) does, to the bit, without
/// having all values at once.
///
/// ```
/// use tightfit_kernels::{AbsmaxMean, Kernels};
///
/// let scales: Vec<f32> = (0..1000).map(|i| 1.0 / (i + 1) as f32).collect();
/// let mut mean = AbsmaxMean::default();
/// scales.chunks(7).for_each(|piece| mean.add(piece));
/// assert_eq!(mean.mean(), Kernels::detect().absmax_mean(&scales));
/// ```
#[derive(Debug, Clone, Default)]
pub struct AbsmaxMean {
    /// Values that do not fill a group yet.
    values: Vec<f32>,
    /// Sums of groups that do not fill a group of sums yet: of values, of such sums, and so on.
    sums: Vec<Vec<f64>>,
    count: u64,
}

impl AbsmaxMean {
    /// Adds the next values.
    pub fn add(&mut self, mut absmax: &[f32]) {
        self.count += absmax.len() as u64;
        while !absmax.is_empty() {
            let (first, rest) = absmax.split_at(absmax.len().min(GROUP - self.values.len()));
            self.values.extend_from_slice(first);
            absmax = rest;
            if self.values.len() == GROUP {
                let sum = group_sum(&self.values);
                self.values.clear();
                self.push(0, sum);
            }
        }
    }

    /// Returns the mean of everything that was added; 0.0 of nothing.
    pub fn mean(mut self) -> f32 {
        if self.count == 0 {
            return 0.0;
        }
        if !self.values.is_empty() {
            self.push(0, group_sum(&self.values));
        }
        let mut level = 0;
        // The last level's only sum is that of everything.
        while level + 1 < self.sums.len() || self.sums[level].len() > 1 {
            if !self.sums[level].is_empty() {
                let sum = sum(&self.sums[level]);
                self.sums[level].clear();
                self.push(level + 1, sum);
            }
            level += 1;
        }
        let sum = self.sums[level].first().copied().unwrap_or(0.0);
        (sum / self.count as f64) as f32
    }

    /// Adds a sum to a level, and the sum of that level's group to the next where it is full.
    fn push(&mut self, level: usize, mut value: f64) {
        for level in level.. {
            if level == self.sums.len() {
                self.sums.push(Vec::with_capacity(GROUP));
            }
            let sums = &mut self.sums[level];
            sums.push(value);
            if sums.len() < GROUP {
                return;
            }
            value = sum(sums);
            sums.clear();
        }
    }
}

/// The sum of up to 256 sums, padded with zeros.
fn sum(sums: &[f64]) -> f64 {
    let mut padded = [0.0; GROUP];
    padded[..sums.len()].copy_from_slice(sums);
    halve(&|sum: f64| sum, &padded)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kernels;

    #[test]
    fn pieces_have_the_mean_of_the_whole() {
        let scale = |i: usize| ((i * 2_654_435_761) % 1_000_003) as f32 / 977.0 - 100.0;
        for count in [0, 1, 2, 255, 256, 257, 511, 65_535, 65_536, 65_537, 200_001] {
            let scales: Vec<f32> = (0..count).map(scale).collect();
            let whole = Kernels::detect().absmax_mean(&scales);
            for piece in [1, 255, 256, 1000, 1 << 18] {
                let mut mean = AbsmaxMean::default();
                scales.chunks(piece).for_each(|piece| mean.add(piece));
                assert_eq!(mean.mean().to_bits(), whole.to_bits(), "{count} by {piece}");
            }
        }
    }
}
