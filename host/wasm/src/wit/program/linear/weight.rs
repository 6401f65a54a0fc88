//! The resource `weight`.

use std::fmt;
use std::sync::Arc;

use tightfit_kernels::{DYNAMIC_MAP, FloatType, QuantType, blocks, packed_bytes};
use wasmtime::component::Resource;

use super::super::ProgramCtxView;
use super::super::bindings::tightfit::host::buffers::Place;
use super::super::error::CallError;
use super::super::models::{Loaded, LoadedModel};
use super::super::view::{Used, element_bytes, not_there};
use crate::memory::{Buffer, HeldPiece};
use tightfit::device::{DeviceBytes, MatrixShape, Product, Queue, QueuedScales, QueuedWeights};
use tightfit::plan::PartKind;

/// A weight that a program multiplies with.
#[derive(Debug)]
pub struct Weight(pub(super) Arc<Shared>);

/// What a product needs of a weight.
pub(in super::super) struct Shared {
    pub(super) device: usize,
    pub(super) quant_type: QuantType,
    pub(super) shape: MatrixShape,
    /// Where the device multiplies: dropped before what keeps the memory.
    queued: Option<(QueuedWeights, Arc<dyn Queue>)>,
    /// On the device, for a weight whose scales are quantized.
    _constants: Option<Buffer>,
    pub(super) source: Source,
}

/// What keeps the memory of a weight.
pub(super) enum Source {
    Model {
        loaded: Arc<Loaded>,
        /// Its number in the checkpoint.
        tensor: usize,
        /// Of its scales, where they are quantized.
        mean: Option<f32>,
    },
    Buffers {
        codes: Part,
        absmax: Part,
    },
}

/// A range of a buffer.
pub(super) struct Part {
    pub(super) piece: Arc<HeldPiece>,
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Weight")
            .field("device", &self.device)
            .field("shape", &self.shape)
            .finish_non_exhaustive()
    }
}

impl Part {
    fn overlaps(&self, piece: &Arc<HeldPiece>, offset: u64, bytes: u64) -> bool {
        Arc::ptr_eq(&self.piece, piece)
            && bytes > 0
            && self.offset < offset.saturating_add(bytes)
            && offset < self.offset.saturating_add(self.bytes)
    }
}

impl Shared {
    /// Whether it has some of these bytes of a buffer.
    pub(super) fn overlaps(&self, buffer: &Buffer, offset: u64, bytes: u64) -> bool {
        match (&self.source, buffer.share()) {
            (Source::Buffers { codes, absmax }, Some(piece)) => {
                codes.overlaps(&piece, offset, bytes) || absmax.overlaps(&piece, offset, bytes)
            }
            _ => false,
        }
    }

    /// Returns the device's own order of work; none where the processor multiplies.
    pub(super) fn queue(&self) -> Option<&Arc<dyn Queue>> {
        self.queued.as_ref().map(|(_, queue)| queue)
    }

    pub(super) fn queued(&self) -> Option<&QueuedWeights> {
        self.queued.as_ref().map(|(weights, _)| weights)
    }

    /// Returns what products of so many rows, and of fewer, need of the device's memory.
    pub(super) fn scratch_bytes(&self, rows: u32) -> u64 {
        let Some(queue) = self.queue() else {
            return 0;
        };
        let bytes = [false, true].map(|by_row| {
            let product = Product {
                float: FloatType::Bf16,
                rows: rows as usize,
                by_row,
                transposed: false,
            };
            queue.workspace_bytes(&product, &self.shape)
        });
        bytes.into_iter().max().unwrap_or(0)
    }

    /// Returns about how many bytes it has.
    pub(super) fn bytes(&self) -> u64 {
        let elements = self.shape.elements();
        packed_bytes(elements) as u64 + 4 * blocks(elements, self.shape.block_size) as u64
    }
}

impl ProgramCtxView<'_> {
    /// A tensor of a model as a weight.
    pub(super) fn weight_of(
        &mut self,
        model: &Resource<LoadedModel>,
        number: u32,
    ) -> Result<Shared, CallError> {
        let model = self.table.get(model)?;
        let tensor = model.tensor(number)?;
        let Some(how) = tensor.quantization() else {
            return Err(CallError::unsupported(format_args!(
                "tensor number {number} is {}: products are of weights in 4 bits",
                tensor.format()
            )));
        };
        let shape = super::shape(tensor.shape(), how.block_size.into())?;
        let device = tensor.device();
        let queue = self.context.memory.queue(device)?;
        let (mut queued, mut constants) = (None, None);
        if let Some(queue) = queue {
            let part = |kind| tensor.device_bytes(kind)?.ok_or_else(not_there);
            let scales = match how.absmax_mean {
                None => QueuedScales::Absmax(part(PartKind::Absmax)?),
                Some(mean) => {
                    let (codes, nested) = (part(PartKind::Absmax)?, part(PartKind::NestedAbsmax)?);
                    let index = u32::try_from(device).unwrap_or(u32::MAX);
                    let taken = self.context.memory.allocate(index, CONSTANTS)?;
                    let mut bytes: Vec<u8> = Vec::with_capacity(CONSTANTS as usize);
                    bytes.extend(DYNAMIC_MAP.iter().flat_map(|value| value.to_le_bytes()));
                    bytes.extend(mean.to_le_bytes());
                    let all = taken.range(0, CONSTANTS)?.ok_or_else(not_there)?;
                    queue.write(&all, &bytes)?;
                    let part = |start, len| all.slice(start, len).ok_or_else(not_there);
                    let [map, mean] = [part(0, MAP)?, part(MAP, 4)?];
                    constants = Some(taken);
                    QueuedScales::Double {
                        codes,
                        nested,
                        mean,
                        map,
                    }
                }
            };
            let weights = QueuedWeights {
                quant_type: how.quant_type,
                shape,
                codes: part(PartKind::Codes)?,
                scales,
            };
            queued = Some((weights, queue));
        } else if tensor.part(PartKind::Codes).is_none() {
            return Err(no_kernels(device));
        }
        Ok(Shared {
            device,
            quant_type: how.quant_type,
            shape,
            queued,
            _constants: constants,
            source: Source::Model {
                loaded: model.share(),
                tensor: tensor.index(),
                mean: how.absmax_mean,
            },
        })
    }

    /// Codes and scales in buffers as a weight.
    pub(super) fn weight_from_codes(
        &mut self,
        quant_type: QuantType,
        shape: MatrixShape,
        codes: &Place,
        absmax: &Place,
    ) -> Result<Shared, CallError> {
        let elements = shape.elements();
        let code_bytes = packed_bytes(elements) as u64;
        let absmax_bytes = element_bytes(blocks(elements, shape.block_size) as u64, 4)?;
        let used = [
            Used::read(codes, code_bytes, 1),
            Used::read(absmax, absmax_bytes, 4),
        ];
        let queue = self.queue_for(&used)?;
        if !used[1].is_aligned() {
            return Err(CallError::invalid(format_args!(
                "absmax begins at byte {}, not at a multiple of 4",
                absmax.offset
            )));
        }
        let code_part = self.part(codes, code_bytes)?;
        let absmax_part = self.part(absmax, absmax_bytes)?;
        let queued = match queue {
            Some(queue) => {
                let range = |place: &Place, bytes| -> Result<DeviceBytes, CallError> {
                    let buffer = self.table.get(&place.buffer)?;
                    buffer.range(place.offset, bytes)?.ok_or_else(not_there)
                };
                let weights = QueuedWeights {
                    quant_type,
                    shape,
                    codes: range(codes, code_bytes)?,
                    scales: QueuedScales::Absmax(range(absmax, absmax_bytes)?),
                };
                Some((weights, queue))
            }
            None => {
                let ranges = [&code_part, &absmax_part];
                let ranges = ranges.map(|part| (&*part.piece, part.offset, part.bytes));
                if HeldPiece::with_host(ranges, |_| ()).is_none() {
                    return Err(no_kernels(self.table.get(&codes.buffer)?.device()));
                }
                None
            }
        };
        Ok(Shared {
            device: self.table.get(&codes.buffer)?.device(),
            quant_type,
            shape,
            queued,
            _constants: None,
            source: Source::Buffers {
                codes: code_part,
                absmax: absmax_part,
            },
        })
    }

    /// A share in a range of a buffer, which has been checked and is not empty. What was never written is
    /// zero from now on.
    fn part(&mut self, place: &Place, bytes: u64) -> Result<Part, CallError> {
        let buffer = self.table.get_mut(&place.buffer)?;
        buffer.clear_until(place.offset + bytes, &self.context.stop)?;
        let piece = buffer.share().ok_or_else(not_there)?;
        Ok(Part {
            piece,
            offset: place.offset,
            bytes,
        })
    }
}

fn no_kernels(device: usize) -> CallError {
    CallError::unsupported(format_args!(
        "device {device} has no kernels for products, and the processor cannot read it"
    ))
}

/// The values of the codes of scales, and their mean.
const MAP: u64 = 4 * 256;
const CONSTANTS: u64 = MAP + 4;
