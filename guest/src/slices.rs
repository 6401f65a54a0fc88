//! Parts of tensors, each placed by itself: for policies that cut.
//!
//! A policy with the feature `slices` of this crate can answer [`Policy::plan_slices`](crate::Policy::plan_slices):
//! some tensors placed whole, as [`Policy::plan`](crate::Policy::plan) does, and others by [`Slice`]s.
//!
//! ```
//! use tightfit_guest::slices::{even_parts, nowhere};
//! use tightfit_guest::{Description, Format, Placement, Policy, Proposal, policy};
//! use tightfit_guest::{Refusal, Request, Slice, SlicedProposal};
//!
//! struct Rows;
//! policy!(Rows);
//! impl Policy for Rows {
//!     fn describe() -> Description {
//!         Description::new("rows", "1.0.0", &[])
//!     }
//!     fn plan(_: Request) -> Result<Proposal, Refusal> {
//!         Err(Refusal::unsupported("this host does not cut tensors"))
//!     }
//!     fn plan_slices(request: Request) -> Result<SlicedProposal, Refusal> {
//!         let (devices, mut slices) = (request.devices.len(), vec![]);
//!         for (t, tensor) in request.tensors.iter().enumerate() {
//!             match tensor.shape[..] {
//!                 [rows, _] => {
//!                     let parts = even_parts(rows, devices, 1).into_iter().enumerate();
//!                     slices.extend(parts.map(|(device, part)| {
//!                         Slice::new(t, 0, [part], Placement::on(device, Format::Stored))
//!                     }));
//!                 }
//!                 _ => slices.extend(Slice::copies(t, tensor, devices, Format::Stored)),
//!             }
//!         }
//!         let (placements, headroom) = (nowhere(&request), vec![0; devices]);
//!         Ok(SlicedProposal { placements, headroom, slices })
//!     }
//! }
//! # use tightfit_guest::{Device, Dtype, Tensor};
//! # fn main() {
//! # let tensors = vec![Tensor::new("up_proj.weight", Dtype::Bf16, &[128, 64])];
//! # let devices = vec![Device::new("sim:0", 1 << 20), Device::new("sim:1", 1 << 20)];
//! # let slices = Rows::plan_slices(Request::new(tensors, devices)).unwrap().slices;
//! # assert_eq!((slices[1].ranges[0].start, slices[1].ranges[0].end), (64, 128));
//! # }
//! ```

use std::ops::Range;

use crate::{Format, Placement, Proposal, Request, Slice, SliceRange, SlicedProposal, Tensor};

impl From<Range<u64>> for SliceRange {
    fn from(range: Range<u64>) -> SliceRange {
        SliceRange {
            start: range.start,
            end: range.end,
        }
    }
}

impl SliceRange {
    /// Returns how many there are from `start` to `end`.
    pub fn length(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }
}

impl Slice {
    /// Returns the slice of tensor number `tensor` that has these ranges of a dimension. Ranges that follow
    /// each other become one, and empty ones are dropped.
    ///
    /// # Panics
    /// When the number of the tensor or the dimension does not fit in 32 bits.
    pub fn new(
        tensor: usize,
        dimension: usize,
        ranges: impl IntoIterator<Item = Range<u64>>,
        placement: Placement,
    ) -> Slice {
        let mut merged: Vec<SliceRange> = Vec::new();
        for range in ranges.into_iter().filter(|range| !range.is_empty()) {
            match merged.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => merged.push(range.into()),
            }
        }
        let number = |number| u32::try_from(number).expect("it fits in a request");
        Slice {
            tensor: number(tensor),
            dimension: number(dimension),
            ranges: merged,
            placement,
        }
    }

    /// Returns a whole copy of a tensor for each of the first `devices` devices. None of a scalar or of what has
    /// no elements along its first dimension: these have no slices.
    pub fn copies(
        number: usize,
        tensor: &Tensor,
        devices: usize,
        format: Format,
    ) -> impl Iterator<Item = Slice> {
        let length = tensor.shape.first().copied().unwrap_or(0);
        let devices = if length == 0 { 0 } else { devices };
        (0..devices)
            .map(move |device| Slice::new(number, 0, [0..length], Placement::on(device, format)))
    }

    /// Returns the shape that the slice of a tensor of this shape has.
    ///
    /// # Panics
    /// When there is no such dimension.
    pub fn shape(&self, whole: &[u64]) -> Vec<u64> {
        let mut shape = whole.to_vec();
        shape[self.dimension as usize] = self.ranges.iter().map(SliceRange::length).sum();
        shape
    }

    /// Returns whether the slice of a tensor of this shape has the blocks that the whole has, of `block_size`
    /// elements each, row after row: then its codes and scales are those of the whole. Otherwise it is
    /// quantized as a tensor of its own; of a weight that is quantized already there is no such slice.
    ///
    /// # Panics
    /// When there is no such dimension.
    pub fn keeps_blocks(&self, whole: &[u64], block_size: u64) -> bool {
        let dimension = self.dimension as usize;
        let product = |lengths: &[u64]| lengths.iter().fold(1, |a: u64, b| a.saturating_mul(*b));
        let inner = product(&whole[dimension + 1..]);
        let row = whole[dimension].saturating_mul(inner);
        let is_one = product(&whole[..dimension]) <= 1;
        let starts_block = |index: u64| index.saturating_mul(inner).is_multiple_of(block_size);
        let is_end = |index: u64| index == whole[dimension];
        // The whole ends where it ends, in the middle of a block or not.
        let is_whole = |range: &SliceRange| range.start == 0 && is_end(range.end);
        if self.ranges.iter().all(is_whole) {
            return true;
        }
        (is_one || row.is_multiple_of(block_size))
            && self.ranges.iter().all(|range| {
                starts_block(range.start) && (starts_block(range.end) || is_end(range.end))
            })
    }
}

impl From<Proposal> for SlicedProposal {
    /// The same, without slices.
    fn from(proposal: Proposal) -> SlicedProposal {
        SlicedProposal {
            placements: proposal.placements,
            headroom: proposal.headroom,
            slices: Vec::new(),
        }
    }
}

/// Returns a placement on no device for each tensor: where there are slices.
pub fn nowhere(request: &Request) -> Vec<Placement> {
    let nowhere = Placement {
        device: None,
        format: Format::Stored,
    };
    vec![nowhere; request.tensors.len()]
}

/// Cuts `length` into consecutive parts, all but the last of whole units: as even as that goes, the earlier ones
/// larger. Of the columns of a matrix with a unit of 64 no block is cut. Parts are empty where there are fewer
/// units than parts.
///
/// ```
/// use tightfit_guest::slices::even_parts;
///
/// assert_eq!(even_parts(7, 2, 1), [0..4, 4..7]);
/// assert_eq!(even_parts(2880, 2, 64), [0..1472, 1472..2880]);
/// assert_eq!(even_parts(64, 2, 64), [0..64, 64..64]);
/// ```
///
/// # Panics
/// When `parts` or `unit` is 0.
pub fn even_parts(length: u64, parts: usize, unit: u64) -> Vec<Range<u64>> {
    let (parts, units) = (parts as u64, length.div_ceil(unit));
    let (each, more) = (units / parts, units % parts);
    let start = |part: u64| length.min((part * each + part.min(more)).saturating_mul(unit));
    (0..parts)
        .map(|part| start(part)..start(part + 1))
        .collect()
}

/// Cuts `length` into consecutive parts of one length, but for the last ones, which get what is left: less, or
/// nothing. So does `torch.chunk`, and with it transformers' tensor parallelism.
///
/// ```
/// use tightfit_guest::slices::equal_parts;
///
/// assert_eq!(equal_parts(8, 4), [0..2, 2..4, 4..6, 6..8]);
/// assert_eq!(equal_parts(7, 3), [0..3, 3..6, 6..7]);
/// assert_eq!(equal_parts(4, 3), [0..2, 2..4, 4..4]);
/// ```
///
/// # Panics
/// When `parts` is 0.
pub fn equal_parts(length: u64, parts: usize) -> Vec<Range<u64>> {
    let each = length.div_ceil(parts as u64);
    let start = |part: u64| length.min(part.saturating_mul(each));
    (0..parts as u64)
        .map(|part| start(part)..start(part + 1))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    fn are_all(parts: &[Range<u64>], length: u64) -> bool {
        let follows = parts.windows(2).all(|pair| pair[0].end == pair[1].start);
        follows && parts[0].start == 0 && parts.last().map(|part| part.end) == Some(length)
    }

    #[test]
    fn parts_follow_each_other_and_are_all_there_is() {
        for length in [0, 1, 5, 63, 64, 65, 127, 2880, 14336, u64::MAX / 128] {
            for count in 1..10 {
                for unit in [1, 3, 64] {
                    let parts = even_parts(length, count, unit);
                    assert_eq!(parts.len(), count);
                    assert!(are_all(&parts, length), "{length} {count} {unit}");
                    let is_unit = |end: u64| end.is_multiple_of(unit) || end == length;
                    assert!(parts.iter().all(|part| is_unit(part.end)));
                    let lengths = parts.iter().map(|part| part.end - part.start);
                    let (least, most) = (lengths.clone().min(), lengths.max());
                    assert!(most.unwrap() - least.unwrap() <= unit + unit, "{parts:?}");
                }
                let parts = equal_parts(length, count);
                assert!(are_all(&parts, length), "{length} {count}");
            }
        }
    }

    #[test]
    fn a_slice_keeps_blocks_where_none_is_cut() {
        let slice = |dimension, ranges: &[Range<u64>]| {
            Slice::new(0, dimension, ranges.to_vec(), Placement::on(0, Format::NF4))
        };
        let cases: &[(&[u64], usize, &[Range<u64>], bool)] = &[
            (&[8, 64], 0, &[1..3], true),
            (&[8, 32], 0, &[2..4], true),
            (&[8, 32], 0, &[1..3], false),
            // What is left at the end of the whole is left at the end of the slice.
            (&[7, 32], 0, &[2..7], true),
            (&[8, 128], 1, &[64..128], true),
            (&[8, 128], 1, &[32..96], false),
            (&[8, 100], 1, &[64..100], false),
            (&[1, 100], 1, &[64..100], true),
            (&[8, 100], 1, &[0..100], true),
            (&[4, 6, 64], 1, &[0..1, 3..4], true),
            (&[4, 6, 32], 1, &[0..1, 3..4], false),
            (&[4, 6, 32], 1, &[0..2, 4..6], true),
            (&[4, 3, 32], 1, &[0..2], false),
            (&[4, 3, 32], 0, &[0..2], true),
            (&[4, 3, 32], 0, &[1..2], false),
        ];
        for (shape, dimension, ranges, keeps) in cases {
            let slice = slice(*dimension, ranges);
            assert_eq!(slice.keeps_blocks(shape, 64), *keeps, "{shape:?} {slice:?}");
        }
    }

    #[test]
    fn ranges_that_follow_each_other_are_one() {
        let there = Placement::on(1, Format::Stored);
        let slice = Slice::new(3, 1, [0..2, 2..2, 2..5, 7..9], there);
        assert_eq!((slice.tensor, slice.dimension), (3, 1));
        assert_eq!(slice.ranges, [(0..5).into(), (7..9).into()]);
        assert_eq!(slice.shape(&[4, 10, 2]), [4, 7, 2]);
        let scalar = Tensor::new("scalar", Dtype::F32, &[]);
        assert_eq!(Slice::copies(0, &scalar, 4, Format::Stored).count(), 0);
    }
}
