//! Tensors as there is to be done with them: parts that workers take, chunks that they cut from these.

use std::sync::Arc;

use tightfit_kernels::{BlockSize, FloatType, NESTED_BLOCK_SIZE, blocks, packed_bytes};

use super::arena::{PartTargets, Target};
use super::double::{DoubleState, Kept};
use super::put::BUFFER_GAP;
use crate::checkpoint::{AbsmaxForm, Extent, TensorInfo};
use crate::plan::PlannedTensor;
use crate::types::{DType, Format};

/// Bytes of a plain tensor that are read at once: it needs no staging, so that this only bounds
/// how long a cancelled load goes on.
const LARGEST_COPY: usize = 4 << 20;

/// Bytes that are quantized or cast at once, as they are read.
const LARGEST_CHUNK: usize = 8 << 20;

/// A piece of one tensor.
pub(super) struct Chunk<'m> {
    /// Index of the tensor.
    pub(super) tensor: usize,
    /// The file that holds it.
    pub(super) shard: usize,
    /// Its first byte in the file; in the tensor or the scales, where these are decoded or gathered as they
    /// are read.
    pub(super) offset: u64,
    /// Its length in bytes, as it is read.
    pub(super) bytes: usize,
    /// Whether it is decoded or gathered as it is read.
    pub(super) is_indirect: bool,
    pub(super) task: Task<'m>,
}

impl Chunk<'_> {
    /// Bytes that it takes where it is stored.
    pub(super) fn stored_bytes(&self) -> u64 {
        let bytes = match &self.task {
            Task::Copy { data } | Task::WidenScales { data } | Task::Cast { data, .. } => {
                data.len()
            }
            Task::Quantize(piece) => {
                let scales = match &piece.scales {
                    Scales::Stored(absmax) => absmax.len(),
                    Scales::Quantized { first, .. } => {
                        let end = first + blocks(piece.elements, piece.block_size);
                        let nested = |scales: usize| scales.div_ceil(NESTED_BLOCK_SIZE);
                        end - first + 4 * (nested(end) - nested(*first))
                    }
                };
                piece.codes.len() + scales
            }
        };
        bytes as u64
    }
}

/// What is to be done with a chunk, and where the result goes.
pub(super) enum Task<'m> {
    Copy {
        data: Target<'m>,
    },
    /// Scales of a quantized weight that are not f32 in the file.
    WidenScales {
        data: Target<'m>,
    },
    Cast {
        from: FloatType,
        to: FloatType,
        data: Target<'m>,
    },
    Quantize(ToQuantize<'m>),
}

/// Elements to be quantized: whole blocks, but for the last of a tensor.
pub(super) struct ToQuantize<'m> {
    pub(super) float: FloatType,
    pub(super) block_size: BlockSize,
    pub(super) elements: usize,
    pub(super) codes: Target<'m>,
    pub(super) scales: Scales<'m>,
}

impl<'m> ToQuantize<'m> {
    /// Cuts off the first elements: at most so many, whole blocks.
    pub(super) fn take(&mut self, elements: usize) -> ToQuantize<'m> {
        let block = self.block_size.elements();
        let elements = (elements / block * block).max(block).min(self.elements);
        let count = blocks(elements, self.block_size);
        self.elements -= elements;
        ToQuantize {
            elements,
            codes: self.codes.take(packed_bytes(elements)),
            scales: self.scales.take(count),
            ..*self
        }
    }
}

/// What becomes of scales.
pub(super) enum Scales<'m> {
    /// They are stored as f32.
    Stored(Target<'m>),
    /// They are quantized with all others of their tensor.
    Quantized {
        /// How many lie before them.
        first: usize,
        state: Arc<DoubleState<'m>>,
    },
}

impl<'m> Scales<'m> {
    fn take(&mut self, count: usize) -> Scales<'m> {
        match self {
            Scales::Stored(absmax) => Scales::Stored(absmax.take(4 * count)),
            Scales::Quantized { first, state } => {
                let taken = Scales::Quantized {
                    first: *first,
                    state: Arc::clone(state),
                };
                *first += count;
                taken
            }
        }
    }
}

/// A tensor to be loaded, or a part of one that is quantized in the checkpoint.
pub(super) struct Tensor<'m> {
    pub(super) origin: Origin,
    /// Its length in bytes, as it is read.
    pub(super) bytes: usize,
    pub(super) target: PartTargets<'m>,
    pub(super) scratch: u64,
}

impl<'m> Tensor<'m> {
    /// Cuts off the first bytes of a copy.
    pub(super) fn cut(&mut self, bytes: usize) -> Tensor<'m> {
        let first = Tensor {
            origin: self.origin,
            bytes,
            target: PartTargets {
                data: self.target.data.take(bytes),
                ..PartTargets::default()
            },
            scratch: 0,
        };
        self.origin.offset += bytes as u64;
        self.bytes -= bytes;
        first
    }
}

/// Where a tensor comes from and what is done with it.
#[derive(Clone, Copy)]
pub(super) struct Origin {
    pub(super) index: usize,
    pub(super) shard: usize,
    /// Where it begins in the file.
    pub(super) offset: u64,
    /// Whether it is decoded or gathered as it is read.
    pub(super) is_indirect: bool,
    pub(super) kind: Kind,
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Kind {
    Copy,
    WidenScales,
    Cast {
        from: FloatType,
        to: FloatType,
    },
    Nf4 {
        float: FloatType,
        block_size: BlockSize,
    },
}

/// Bytes of one tensor that follow each other, with the places that they go to.
pub(super) struct Part<'m> {
    pub(super) origin: Origin,
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) target: PartTargets<'m>,
    pub(super) state: Option<Arc<DoubleState<'m>>>,
}

/// Gives what there is to be read of one tensor.
pub(super) fn add<'m>(
    index: usize,
    info: &TensorInfo,
    planned: &PlannedTensor,
    target: PartTargets<'m>,
    found: &mut dyn FnMut(Tensor<'m>),
) {
    let Some(quantized) = &info.quantized else {
        let Some(kind) = kind(info.dtype, planned) else {
            return;
        };
        found(Tensor {
            origin: Origin {
                index,
                shard: info.shard,
                offset: info.offset,
                is_indirect: info.is_indirect(),
                kind,
            },
            // Parts of a tensor that is placed fit in memory, and this is at most 8 times as much.
            bytes: info.decoded_bytes() as usize,
            target,
            scratch: planned.scratch_bytes(),
        });
        return;
    };
    let codes = Extent {
        shard: info.shard,
        offset: info.offset,
        bytes: info.bytes,
    };
    let nested = quantized.nested.map(|nested| nested.absmax);
    let are_gathered = info
        .piece
        .as_ref()
        .is_some_and(|piece| piece.scales.is_some());
    let scales = match quantized.absmax_form {
        AbsmaxForm::AsUsed if !are_gathered => Kind::Copy,
        _ => Kind::WidenScales,
    };
    let parts = [
        (Some(codes), target.codes, Kind::Copy, info.is_indirect()),
        (
            Some(quantized.absmax),
            target.absmax,
            scales,
            scales == Kind::WidenScales,
        ),
        (nested, target.nested_absmax, Kind::Copy, false),
    ];
    for (extent, data, kind, is_indirect) in parts {
        let Some(extent) = extent else { continue };
        let bytes = match kind {
            // What is placed fits in memory.
            Kind::WidenScales => 4 * quantized.scales() as usize,
            _ => extent.bytes as usize,
        };
        found(Tensor {
            origin: Origin {
                index,
                shard: extent.shard,
                offset: extent.offset,
                is_indirect,
                kind,
            },
            bytes,
            target: PartTargets {
                data,
                ..PartTargets::default()
            },
            scratch: 0,
        });
    }
}

impl<'m> Part<'m> {
    /// All of a tensor. `kept` where scales are quantized, too.
    pub(super) fn new(mut tensor: Tensor<'m>, kept: Option<Kept>) -> Part<'m> {
        let state = kept.map(|kept| {
            let scales = (tensor.scratch / 4) as usize;
            let codes = std::mem::take(&mut tensor.target.absmax);
            let nested = std::mem::take(&mut tensor.target.nested_absmax);
            Arc::new(DoubleState::new(scales, kept, codes, nested))
        });
        Part {
            origin: tensor.origin,
            start: 0,
            end: tensor.bytes,
            target: tensor.target,
            state,
        }
    }

    /// Cuts off the first bytes: at most so many, which are whole elements and blocks.
    pub(super) fn take(&mut self, bytes: usize) -> Part<'m> {
        let bytes = bytes.min(self.end - self.start);
        let target = &mut self.target;
        let mut taken = PartTargets::default();
        match self.origin.kind {
            Kind::Copy | Kind::WidenScales => taken.data = target.data.take(bytes),
            Kind::Cast { from, to } => {
                taken.data = target.data.take(bytes / from.bytes() * to.bytes());
            }
            Kind::Nf4 { float, block_size } => {
                let elements = bytes / float.bytes();
                taken.codes = target.codes.take(packed_bytes(elements));
                if self.state.is_none() {
                    taken.absmax = target.absmax.take(4 * blocks(elements, block_size));
                }
            }
        }
        let start = self.start;
        self.start += bytes;
        Part {
            origin: self.origin,
            start,
            end: self.start,
            target: taken,
            state: self.state.clone(),
        }
    }

    /// Cuts off what is to be done next.
    pub(super) fn next_chunk(&mut self, buffer_bytes: usize) -> Option<Chunk<'m>> {
        if self.start == self.end {
            return None;
        }
        let Part {
            origin,
            start,
            end,
            target,
            state,
        } = self.take(self.chunk_bytes(buffer_bytes));
        let (bytes, data) = (end - start, target.data);
        let task = match origin.kind {
            Kind::Copy => Task::Copy { data },
            Kind::WidenScales => Task::WidenScales { data },
            Kind::Cast { from, to } => Task::Cast { from, to, data },
            Kind::Nf4 { float, block_size } => Task::Quantize(ToQuantize {
                float,
                block_size,
                elements: bytes / float.bytes(),
                codes: target.codes,
                scales: match state {
                    None => Scales::Stored(target.absmax),
                    Some(state) => Scales::Quantized {
                        first: blocks(start / float.bytes(), block_size),
                        state,
                    },
                },
            }),
        };
        let first = match origin.is_indirect {
            true => 0,
            false => origin.offset,
        };
        Some(Chunk {
            tensor: origin.index,
            shard: origin.shard,
            offset: first + start as u64,
            bytes,
            is_indirect: origin.is_indirect,
            task,
        })
    }

    /// Bytes that are done at once, as they are read. Quantized tensors are cut at block boundaries (a slot
    /// holds several of the largest blocks), so that a cut changes no scale. A buffer holds the results.
    fn chunk_bytes(&self, buffer_bytes: usize) -> usize {
        let is_remote = [&self.target.data, &self.target.codes]
            .iter()
            .any(|target| target.on_device().is_some());
        let most = match self.origin.kind {
            Kind::Copy | Kind::WidenScales if !is_remote => LARGEST_COPY,
            _ if !is_remote => LARGEST_CHUNK,
            Kind::Copy | Kind::WidenScales => buffer_bytes,
            Kind::Cast { from, to } => buffer_bytes / to.bytes() * from.bytes(),
            Kind::Nf4 { float, block_size } => {
                let block = packed_bytes(block_size.elements()) + size_of::<f32>();
                let fit = buffer_bytes.saturating_sub(BUFFER_GAP) / block;
                fit * block_size.elements() * float.bytes()
            }
        };
        self.whole_units(most.min(LARGEST_CHUNK))
    }

    /// Bytes that a worker takes at once, as they are read: about `most`, as far as they are whole chunks.
    /// Of what holds scratch until its last part is done only one: others wait for that.
    pub(super) fn part_bytes(&self, buffer_bytes: usize, most: usize) -> usize {
        let chunk = self.chunk_bytes(buffer_bytes);
        match most / chunk {
            1.. if self.state.is_some() => chunk,
            0 => self.whole_units(most),
            chunks => chunks * chunk,
        }
    }

    /// The most bytes up to `most` that a tensor may be cut after; at least what it may be cut after first.
    fn whole_units(&self, most: usize) -> usize {
        let unit = match self.origin.kind {
            Kind::Copy => 1,
            Kind::WidenScales => size_of::<f32>(),
            Kind::Cast { from, .. } => from.bytes(),
            Kind::Nf4 { float, block_size } => block_size.elements() * float.bytes(),
        };
        (most / unit).max(1) * unit
    }
}

/// How a tensor is stored; `None` for what plans do not contain.
fn kind(dtype: DType, planned: &PlannedTensor) -> Option<Kind> {
    Some(match planned.placement.format {
        Format::Stored => Kind::Copy,
        Format::Cast(target) => Kind::Cast {
            from: dtype.float_type()?,
            to: target.float_type()?,
        },
        Format::Nf4 { block_size, .. } => Kind::Nf4 {
            float: dtype.float_type()?,
            block_size,
        },
    })
}
