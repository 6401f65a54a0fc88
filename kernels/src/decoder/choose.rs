//! Choosing: the largest of a row, and what a router makes of its experts' scores.

use super::{MOST_CHOICES, MOST_ROUTED, MOST_TOP, MOST_TOP_COLUMNS, shape};
use crate::{FloatType, KernelError, Kernels, error::check_length};

/// Larger for what comes earlier: the larger value first, of equal ones the one with the smaller index, NaN
/// last.
fn rank(value: f32, index: usize) -> u64 {
    let bits = if value == 0.0 { 0 } else { value.to_bits() };
    let order = match bits >> 31 {
        _ if value.is_nan() => 0,
        0 => bits | 0x8000_0000,
        _ => !bits,
    };
    u64::from(order) << 32 | u64::from(!(index as u32))
}

fn index(rank: u64) -> usize {
    !(rank as u32) as usize
}

/// The k largest, the largest first.
fn largest(values: &[f32], k: usize) -> Vec<u64> {
    let mut ranks: Vec<u64> = values
        .iter()
        .enumerate()
        .map(|(i, value)| rank(*value, i))
        .collect();
    let k = k.min(ranks.len());
    if k > 0 && k < ranks.len() {
        ranks.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
        ranks.truncate(k);
    }
    ranks.sort_unstable_by(|a, b| b.cmp(a));
    ranks
}

impl Kernels {
    /// Finds the `k` largest of each row of `x` [rows, columns]: their `ids` [rows, k], that is indices, and
    /// `values` [rows, k], the largest first.
    ///
    /// Of equal values the one with the smaller index comes first, and NaN comes last. With `k` 1 it is
    /// an argmax.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if there are less than `k` columns, more than [`MOST_TOP_COLUMNS`], or `k` is not within 1 and
    /// [`MOST_TOP`]; [`KernelError::Length`].
    pub fn top(
        self,
        float: FloatType,
        [rows, columns, k]: [usize; 3],
        x: &[u8],
        ids: &mut [u32],
        values: &mut [f32],
    ) -> Result<(), KernelError> {
        check_top(columns, k)?;
        let row = columns.saturating_mul(float.bytes());
        check_length("x", rows.saturating_mul(row), x.len())?;
        check_length("ids", rows.saturating_mul(k), ids.len())?;
        check_length("values", ids.len(), values.len())?;
        let mut widened = vec![];
        let results = ids.chunks_exact_mut(k).zip(values.chunks_exact_mut(k));
        for (x, (ids, values)) in x.chunks_exact(row).zip(results) {
            self.widen(float, x, &mut widened);
            let results = ids.iter_mut().zip(values);
            for (rank, (id, value)) in largest(&widened, k).into_iter().zip(results) {
                (*id, *value) = (index(rank) as u32, widened[index(rank)]);
            }
        }
        Ok(())
    }

    /// Chooses experts: of each row of `scores` [rows, experts] the `k` largest, as `ids` [rows, k], and their
    /// `weights` [rows, k], which is the softmax over all experts, or with `normalize` over the chosen
    /// ones. As [`crate::Choices`] has them.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if there are less than `k` experts, more than [`MOST_ROUTED`], or `k` is not
    /// within 1 and [`MOST_CHOICES`]; [`KernelError::Length`].
    pub fn route(
        self,
        float: FloatType,
        [rows, experts, k]: [usize; 3],
        normalize: bool,
        scores: &[u8],
        ids: &mut [i32],
        weights: &mut [f32],
    ) -> Result<(), KernelError> {
        check_route(experts, k)?;
        let row = experts * float.bytes();
        check_length("scores", rows.saturating_mul(row), scores.len())?;
        check_length("ids", rows.saturating_mul(k), ids.len())?;
        check_length("weights", ids.len(), weights.len())?;
        let mut widened = vec![];
        let results = ids.chunks_exact_mut(k).zip(weights.chunks_exact_mut(k));
        for (scores, (ids, weights)) in scores.chunks_exact(row).zip(results) {
            self.widen(float, scores, &mut widened);
            let most = widened.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let all: f32 = widened.iter().map(|score| (score - most).exp()).sum();
            for (i, rank) in largest(&widened, k).into_iter().enumerate() {
                ids[i] = index(rank) as i32;
                weights[i] = (widened[index(rank)] - most).exp() / all;
            }
            if normalize {
                let chosen: f32 = weights.iter().sum();
                for weight in weights {
                    *weight /= chosen;
                }
            }
        }
        Ok(())
    }
}

pub(crate) fn check_top(columns: usize, k: usize) -> Result<(), KernelError> {
    if k == 0 || k > MOST_TOP {
        return Err(shape("from 1 to 256 are asked for", k));
    }
    if columns < k || columns > MOST_TOP_COLUMNS {
        let problem = "a row has as many as are asked for, and at most 2^24";
        return Err(shape(problem, columns));
    }
    Ok(())
}

pub(crate) fn check_route(experts: usize, k: usize) -> Result<(), KernelError> {
    if k == 0 || k > MOST_CHOICES {
        return Err(shape("from 1 to 64 experts are chosen", k));
    }
    if experts < k || experts > MOST_ROUTED {
        let problem = "there are as many experts as are chosen, and at most 4096";
        return Err(shape(problem, experts));
    }
    Ok(())
}
