//! Parts of tensors as tensors of their own: what a plan that gives a tensor to several devices has of it.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;
use std::ops::Range;

use tightfit_kernels::{FloatType, NESTED_BLOCK_SIZE};

use super::gather::Gather;
use super::{AbsmaxForm, Checkpoint, Extent, MAX_TENSORS, Quantized, TensorInfo, Tie};
use crate::types::{DType, Slice, elements};

/// Most ranges of one slice.
pub const MAX_SLICE_RANGES: usize = 4096;

/// What part of which tensor a tensor is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The name of the whole tensor.
    pub of: String,
    /// The whole tensor's shape.
    pub shape: Vec<u64>,
    /// Along which dimension it is cut.
    pub dimension: usize,
    /// What it has along that dimension.
    pub ranges: Vec<Range<u64>>,
    /// Where its bytes, or its codes, lie among those of the whole; none where they follow each other.
    /// In elements where it is decoded as it is read.
    pub(crate) data: Option<Gather>,
    /// Where its scales lie among those of the whole, and how many these are, unless they follow each other.
    pub(crate) scales: Option<(Gather, u64)>,
}

impl Piece {
    /// Whether it is all of the tensor.
    pub fn is_whole(&self) -> bool {
        let length = self.shape.get(self.dimension).copied();
        matches!(&self.ranges[..], [range] if range.start == 0 && Some(range.end) == length)
    }

    /// What is between brackets behind the tensor's name.
    fn suffix(&self) -> String {
        if self.is_whole() {
            return String::new();
        }
        let mut text = String::from("[");
        for _ in 0..self.dimension {
            text.push_str(":, ");
        }
        for (number, range) in self.ranges.iter().enumerate() {
            let joint = if number == 0 { "" } else { "+" };
            // Writing to a string does not fail.
            let _ = write!(text, "{joint}{}:{}", range.start, range.end);
        }
        text.push(']');
        text
    }
}

/// A slice that there cannot be. Whoever made it is at fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SliceError {
    /// Of a tensor that is not there.
    #[error("a slice is of tensor number {tensor}, there are {tensors} (from 0)")]
    NoSuchTensor {
        /// The index given.
        tensor: u32,
        /// How many tensors there are.
        tensors: usize,
    },
    /// Along a dimension that the tensor does not have.
    #[error(
        "a slice is along dimension {dimension} of tensor '{tensor}', which has {dimensions} (from 0)"
    )]
    NoSuchDimension {
        /// The tensor.
        tensor: String,
        /// The dimension given.
        dimension: u32,
        /// How many it has.
        dimensions: usize,
    },
    /// Ranges that are empty, not in order, or not within the tensor.
    #[error(
        "a slice has {start}..{end} of dimension {dimension} of tensor '{tensor}': ranges are in ascending order, not empty, and end at {length} at most"
    )]
    BadRange {
        /// The tensor.
        tensor: String,
        /// The dimension.
        dimension: u32,
        /// Where the range begins.
        start: u64,
        /// Where it ends.
        end: u64,
        /// How long the dimension is.
        length: u64,
    },
    /// No ranges at all, or too many.
    #[error("a slice of tensor '{tensor}' has {have} ranges, there can be 1 to {MAX_SLICE_RANGES}")]
    RangeCount {
        /// The tensor.
        tensor: String,
        /// How many it has.
        have: usize,
    },
    /// It is cut where no byte begins.
    #[error("a slice of tensor '{tensor}' is cut within a byte: its elements are {dtype}")]
    WithinByte {
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: DType,
    },
    /// A weight that is quantized in the checkpoint is cut within a block.
    #[error(
        "a slice of tensor '{tensor}' is cut within a block: it is quantized already, in blocks of {block_size} elements, row after row"
    )]
    WithinBlock {
        /// The tensor.
        tensor: String,
        /// Elements of a block.
        block_size: u64,
    },
    /// The same slice twice on one device.
    #[error("a slice of tensor '{tensor}' is placed twice on device number {device}")]
    Twice {
        /// The tensor.
        tensor: String,
        /// The device.
        device: u32,
    },
    /// A tensor that has slices is placed as a whole, too.
    #[error("tensor '{tensor}' is placed as a whole and in slices: a whole copy is a slice, too")]
    AlsoWhole {
        /// The tensor.
        tensor: String,
    },
    /// Another tensor has the name that a slice would have.
    #[error("a slice would be named '{name}', as a tensor of the checkpoint is")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// There would be too many tensors.
    #[error("cut into slices there are {have} tensors, there can be {MAX_TENSORS}")]
    TooMany {
        /// How many there would be.
        have: usize,
    },
}

/// For every tensor of the cut checkpoint where it comes from, in its order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Came {
    /// A tensor that is not cut.
    Tensor(usize),
    /// A slice, by its place in the list.
    Slice(usize),
}

/// The tensors of a cut checkpoint, by what they are of: tensors in their order, and of each that is cut
/// its slices in their order.
///
/// # Errors
/// [`SliceError::NoSuchTensor`], [`SliceError::TooMany`].
pub(crate) fn order(tensors: usize, slices: &[Slice]) -> Result<Vec<Came>, SliceError> {
    let mut sorted: Vec<usize> = (0..slices.len()).collect();
    sorted.sort_by_key(|&slice| slices[slice].tensor);
    let mut sorted = sorted.into_iter().peekable();
    if let Some(slice) = slices.iter().find(|slice| slice.tensor as usize >= tensors) {
        return Err(SliceError::NoSuchTensor {
            tensor: slice.tensor,
            tensors,
        });
    }
    let have = tensors + slices.len();
    if have > 2 * MAX_TENSORS {
        return Err(SliceError::TooMany { have });
    }
    let mut order = Vec::with_capacity(have);
    for tensor in 0..tensors {
        let before = order.len();
        while let Some(slice) = sorted.next_if(|&slice| slices[slice].tensor as usize == tensor) {
            order.push(Came::Slice(slice));
        }
        if order.len() == before {
            order.push(Came::Tensor(tensor));
        }
    }
    if order.len() > MAX_TENSORS {
        return Err(SliceError::TooMany { have: order.len() });
    }
    Ok(order)
}

impl Checkpoint {
    /// Returns the same checkpoint with every tensor that has slices replaced by these, which are tensors of
    /// their own from then on: of the shape that they have, and read from where they lie in the file. One of
    /// `gate_proj.weight` [14336, 4096] along dimension 0 is named `gate_proj.weight[0:3584]` or so, along
    /// dimension 1 `gate_proj.weight[:, 0:1024]`; of several ranges `[0:16+64:80]`. A whole copy has the
    /// tensor's name. Where a name would be there twice, `@` and the number of the device follow.
    ///
    /// What is quantized while loading has the same blocks as the whole where the cut is between blocks: along
    /// dimension 0 of a matrix where rows before it are whole blocks, along the last where the edges are and
    /// rows are. Otherwise the slice is quantized as the tensor that it is. So it is under double quantization
    /// always, which depends on the mean of all scales. What is quantized in the checkpoint keeps its codes and
    /// scales; under double quantization it has f32 scales, which are exactly what the bytes stand for, unless
    /// each block of 256 scales is whole and they follow each other.
    ///
    /// # Errors
    /// [`SliceError`].
    pub fn cut(&self, slices: &[Slice]) -> Result<Checkpoint, SliceError> {
        let order = order(self.tensors.len(), slices)?;
        let mut tensors = Vec::with_capacity(order.len());
        let mut places: Vec<Vec<usize>> = vec![Vec::new(); self.tensors.len()];
        let mut times: HashMap<String, usize> = HashMap::new();
        for &came in &order {
            let (tensor, index) = match came {
                Came::Tensor(index) => (self.tensors[index].clone(), index),
                Came::Slice(slice) => {
                    let slice = &slices[slice];
                    let index = slice.tensor as usize;
                    let tensor = self.tensors[index].cut(slice)?;
                    *times.entry(tensor.name.clone()).or_default() += 1;
                    (tensor, index)
                }
            };
            places[index].push(tensors.len());
            tensors.push(tensor);
        }
        let mut names = BTreeSet::new();
        for (tensor, came) in tensors.iter_mut().zip(&order) {
            let Came::Slice(slice) = *came else { continue };
            let slice = &slices[slice];
            if times.get(&tensor.name).is_some_and(|&times| times > 1) {
                let device = slice.placement.device;
                let device = device.map_or_else(|| "none".into(), |device| device.to_string());
                let _ = write!(tensor.name, "@{device}");
            }
            if !names.insert(tensor.name.clone()) {
                return Err(SliceError::Twice {
                    tensor: self.tensors[slice.tensor as usize].name.clone(),
                    device: slice.placement.device.unwrap_or(0),
                });
            }
            if self
                .find(&tensor.name)
                .is_some_and(|found| found != slice.tensor as usize)
            {
                return Err(SliceError::NameTaken {
                    name: tensor.name.clone(),
                });
            }
        }
        let moved = |ties: &[Tie]| {
            let moved = ties.iter().flat_map(|tie| {
                let alias = tie.alias_tensor.map(|alias| &places[alias][..]);
                places[tie.tensor]
                    .iter()
                    .enumerate()
                    .map(move |(number, &place)| (tie, number, place, alias))
            });
            moved
                .map(|(tie, number, place, alias)| {
                    let tensor: &TensorInfo = &tensors[place];
                    let whole = self.tensors[tie.tensor].name.len();
                    Tie {
                        tensor: place,
                        alias: format!("{}{}", tie.alias, &tensor.name[whole..]),
                        // Cut the same way, or not at all.
                        alias_tensor: alias.and_then(|alias| alias.get(number).copied()),
                    }
                })
                .collect()
        };
        let (ties, untied) = (moved(&self.ties), moved(&self.untied));
        Ok(self.derived(tensors, ties, untied))
    }

    /// Whether some of its tensors are parts of others.
    pub(crate) fn is_cut(&self) -> bool {
        self.tensors.iter().any(|tensor| tensor.piece.is_some())
    }
}

impl TensorInfo {
    /// The slice as a tensor, with the name that it has unless another has it.
    fn cut(&self, slice: &Slice) -> Result<TensorInfo, SliceError> {
        let name = || self.name.clone();
        let dimension = slice.dimension as usize;
        let Some(&length) = self.shape.get(dimension) else {
            return Err(SliceError::NoSuchDimension {
                tensor: name(),
                dimension: slice.dimension,
                dimensions: self.shape.len(),
            });
        };
        if slice.ranges.is_empty() || slice.ranges.len() > MAX_SLICE_RANGES {
            return Err(SliceError::RangeCount {
                tensor: name(),
                have: slice.ranges.len(),
            });
        }
        let mut before = 0;
        for range in &slice.ranges {
            if range.start < before || range.start >= range.end || range.end > length {
                return Err(SliceError::BadRange {
                    tensor: name(),
                    dimension: slice.dimension,
                    start: range.start,
                    end: range.end,
                    length,
                });
            }
            before = range.end;
        }
        // Sizes of tensors that are there fit.
        let inner: u64 = self.shape[dimension + 1..].iter().product();
        let whole = elements(&self.shape).unwrap_or(0);
        let mut shape = self.shape.clone();
        shape[dimension] = slice
            .ranges
            .iter()
            .map(|range| range.end - range.start)
            .sum();
        let count = elements(&shape).unwrap_or(0);
        let gather = Gather::new(
            length * inner,
            slice
                .ranges
                .iter()
                .map(|range| range.start * inner..range.end * inner),
            whole,
        );
        let mut piece = Piece {
            of: name(),
            shape: self.shape.clone(),
            dimension,
            ranges: merged(&slice.ranges),
            data: None,
            scales: None,
        };
        let mut tensor = TensorInfo {
            name: name() + &piece.suffix(),
            shape,
            ..self.clone()
        };
        if let Some(quantized) = &self.quantized {
            let (quantized, scales) =
                cut_quantized(quantized, &gather, count, whole).ok_or_else(|| {
                    SliceError::WithinBlock {
                        tensor: name(),
                        block_size: quantized.block_size.elements() as u64,
                    }
                })?;
            tensor.quantized = Some(Box::new(quantized));
            tensor.bytes = count.div_ceil(2);
            piece.scales = scales;
            match gather.contiguous() {
                Some(run) => tensor.offset += run.start / 2,
                None => piece.data = gather.scaled(1, 2),
            }
        } else if self.encoded.is_some() {
            let share = u128::from(self.bytes) * u128::from(count) / u128::from(whole.max(1));
            // Less than all.
            tensor.bytes = share as u64;
            piece.data = Some(gather);
        } else {
            let within_byte = || SliceError::WithinByte {
                tensor: name(),
                dtype: self.dtype,
            };
            let bytes = gather
                .scaled(self.dtype.bits(), 8)
                .ok_or_else(within_byte)?;
            tensor.bytes = bytes.len();
            match bytes.contiguous() {
                Some(run) => tensor.offset += run.start,
                None => piece.data = Some(bytes),
            }
        }
        tensor.piece = Some(Box::new(piece));
        Ok(tensor)
    }
}

/// Ranges with those joined that follow each other.
fn merged(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => merged.push(range.clone()),
        }
    }
    merged
}

/// What is left of a quantization, and where its scales lie unless they follow each other. `None` where a
/// block is cut.
fn cut_quantized(
    quantized: &Quantized,
    gather: &Gather,
    count: u64,
    whole: u64,
) -> Option<(Quantized, Option<(Gather, u64)>)> {
    const NESTED: u64 = NESTED_BLOCK_SIZE as u64;
    let block = quantized.block_size.elements() as u64;
    let all = whole.div_ceil(block);
    let scales = gather.in_blocks(block)?;
    let count = count.div_ceil(block);
    let mut cut = *quantized;
    let run = scales.contiguous();
    let sub = |extent: Extent, start: u64, bytes: u64| Extent {
        offset: extent.offset + start,
        bytes,
        ..extent
    };
    let is_nested_whole = |run: &Range<u64>| {
        run.start.is_multiple_of(NESTED) && (run.end.is_multiple_of(NESTED) || run.end == all)
    };
    match (quantized.absmax_form, quantized.nested, run) {
        (AbsmaxForm::AsUsed, None, Some(run)) => {
            cut.absmax = sub(quantized.absmax, 4 * run.start, 4 * count);
            return Some((cut, None));
        }
        (AbsmaxForm::Bf16, _, Some(run)) => {
            cut.absmax = sub(quantized.absmax, 2 * run.start, 2 * count);
            return Some((cut, None));
        }
        (AbsmaxForm::AsUsed, Some(mut nested), Some(run)) if is_nested_whole(&run) => {
            cut.absmax = sub(quantized.absmax, run.start, count);
            nested.absmax = sub(
                nested.absmax,
                4 * (run.start / NESTED),
                4 * count.div_ceil(NESTED),
            );
            cut.nested = Some(nested);
            return Some((cut, None));
        }
        (AbsmaxForm::AsUsed, Some(nested), _) => {
            cut.nested = None;
            cut.absmax_form = AbsmaxForm::RoundedDouble {
                nested: nested.absmax,
                absmax_mean: nested.absmax_mean,
                // What the bytes stand for, to the bit.
                float: FloatType::F32,
            };
        }
        _ => {}
    }
    cut.absmax.bytes = cut.absmax_form.bytes_of(count);
    Some((cut, Some((scales, all))))
}
