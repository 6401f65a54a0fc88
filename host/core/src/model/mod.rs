//! What has been loaded: look it up, use it, unload it.

mod multipliers;
mod pieces;
mod shared;
mod stacked;
mod stats;
mod tail;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::Arc;

pub use shared::SharedPart;
pub use stacked::Stacked;
pub use stats::{LoadStats, QuantizedBytes};
pub use tail::{TailAllocation, TailAllocator};

use tightfit_kernels::{Float, FloatType, KernelError};

use crate::cancel::{CancelToken, Cancelled, Watch};
use crate::checkpoint::{Checkpoint, Piece, Quantized};
use crate::device::{DeviceAddress, DeviceBytes, DeviceError, Reservation};
use crate::plan::{PartKind, Plan, PlannedPart, PlannedTensor};
use crate::status::Status;
use crate::types::{BlockSize, DType, Format, QuantType, elements};
use multipliers::Multipliers;

/// A loaded model. Dropping it gives its memory back, unless [`SharedPart`]s, tails or exported
/// tensors still use it: each keeps its device's memory until the last is dropped.
#[derive(Debug)]
pub struct Model {
    plan: Plan,
    tensors: Vec<Stored>,
    by_name: HashMap<String, usize>,
    /// One for each device, as the plan has them. Dropped before the memory that they use.
    multipliers: Vec<Multipliers>,
    memory: Vec<Option<Arc<dyn Reservation>>>,
    tails: Vec<Option<TailAllocator>>,
    stats: LoadStats,
}

#[derive(Debug)]
struct Stored {
    name: String,
    dtype: DType,
    shape: Vec<u64>,
    /// How it was quantized in the checkpoint.
    quantized: Option<Box<Quantized>>,
    piece: Option<Box<Piece>>,
    absmax_mean: f32,
}

/// How the parts of a 4-bit weight are to be read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quantization {
    /// The table of values.
    pub quant_type: QuantType,
    /// Number of elements that share a scale.
    pub block_size: BlockSize,
    /// Under double quantization, the mean of the scales, which was subtracted before they were
    /// quantized.
    pub absmax_mean: Option<f32>,
}

/// Why a tensor cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The device could not be read.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The elements are not floating-point numbers that can be converted.
    #[error("tensor '{tensor}' holds {dtype} elements, which are not converted")]
    NotFloat {
        /// The tensor.
        tensor: String,
        /// Its element type.
        dtype: DType,
    },
    /// Its format has no such part.
    #[error("tensor '{tensor}' has no {kind:?} as it is stored")]
    NoPart {
        /// The tensor.
        tensor: String,
        /// The part asked for.
        kind: PartKind,
    },
    /// A range outside of a tensor or of its part.
    #[error("{unit} {first}..{end} of tensor '{tensor}' were asked for, which has {have}")]
    OutsideTensor {
        /// The tensor.
        tensor: String,
        /// What is counted: bytes of a part, or elements.
        unit: &'static str,
        /// The first asked for.
        first: u64,
        /// Behind the last asked for.
        end: u64,
        /// How many there are.
        have: u64,
    },
    /// A kernel was called with lengths that do not belong together: a fault of ours.
    #[error("internal error: {0}")]
    Kernel(#[from] KernelError),
}

impl From<&ModelError> for Status {
    fn from(error: &ModelError) -> Status {
        match error {
            ModelError::Device(error) => error.into(),
            ModelError::NotFloat { .. }
            | ModelError::NoPart { .. }
            | ModelError::OutsideTensor { .. } => Status::Usage,
            ModelError::Kernel(_) => Status::Other,
        }
    }
}

impl Model {
    /// # Errors
    /// [`Cancelled`].
    pub(crate) fn new(
        checkpoint: &Checkpoint,
        plan: &Plan,
        memory: Vec<Option<Box<dyn Reservation>>>,
        absmax_means: Vec<f32>,
        stats: LoadStats,
        cancel: &CancelToken,
    ) -> Result<Model, Cancelled> {
        let mut watch = Watch::new(cancel);
        let mut tensors: Vec<Stored> = Vec::with_capacity(plan.tensors.len());
        let mut planned: Vec<PlannedTensor> = Vec::with_capacity(plan.tensors.len());
        // Large enough from the start: growing would hash all names again.
        let loaded = plan
            .devices
            .iter()
            .map(|device| device.tensors as usize)
            .sum();
        let mut by_name: HashMap<String, usize> = HashMap::with_capacity(loaded);
        // Slices that are the only one of their tensor.
        let mut alone: HashMap<&String, Option<usize>> = HashMap::new();
        let each = checkpoint.tensors().iter().zip(&plan.tensors);
        for (index, ((tensor, place), absmax_mean)) in each.zip(absmax_means).enumerate() {
            watch.item(2 * tensor.name.len())?;
            tensors.push(Stored {
                name: tensor.name.clone(),
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
                quantized: tensor.quantized.clone(),
                piece: tensor.piece.clone(),
                absmax_mean,
            });
            if place.placement.device.is_some() {
                by_name.insert(tensor.name.clone(), index);
                if let Some(piece) = &tensor.piece {
                    alone
                        .entry(&piece.of)
                        .and_modify(|alone| *alone = None)
                        .or_insert(Some(index));
                }
            }
            planned.push(place.clone());
        }
        let plan = Plan {
            devices: plan.devices.clone(),
            tensors: planned,
            slices: plan.slices.clone(),
        };
        let loaded = |index: usize| plan.tensors[index].placement.device.is_some();
        for tie in checkpoint.ties().iter().filter(|tie| loaded(tie.tensor)) {
            by_name.entry(tie.alias.clone()).or_insert(tie.tensor);
            let tensor = &checkpoint.tensors()[tie.tensor];
            if let Some(piece) = &tensor.piece
                && alone.get(&piece.of) == Some(&Some(tie.tensor))
                && let Some(whole) = tie.alias.strip_suffix(&tensor.name[piece.of.len()..])
            {
                by_name.entry(whole.to_owned()).or_insert(tie.tensor);
            }
        }
        for (name, index) in alone {
            if let Some(index) = index {
                by_name.entry(name.clone()).or_insert(index);
            }
        }
        let memory: Vec<Option<Arc<dyn Reservation>>> = memory
            .into_iter()
            .map(|reservation| reservation.map(Arc::from))
            .collect();
        let tail = |(plan, memory): (_, &Option<_>)| TailAllocator::new(plan, memory.as_ref()?);
        Ok(Model {
            tails: plan.devices.iter().zip(&memory).map(tail).collect(),
            multipliers: plan
                .devices
                .iter()
                .map(|_| Multipliers::default())
                .collect(),
            plan,
            tensors,
            by_name,
            memory,
            stats,
        })
    }

    /// Returns the plan that was carried out.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Returns what loading took.
    pub fn stats(&self) -> &LoadStats {
        &self.stats
    }

    /// Returns what hands out the bytes that the plan reserved behind the weights of this device
    /// ([`PlanOptions::reserve_headroom`](crate::plan::PlanOptions::reserve_headroom)); `None` where it
    /// reserved none.
    pub fn tail(&self, device: usize) -> Option<&TailAllocator> {
        self.tails.get(device)?.as_ref()
    }

    /// Returns the tensor with this name, also under its tied name. A slice has a name of its own
    /// ([`Checkpoint::cut`]), and that of its tensor where it is the only one of it that was loaded. `None`
    /// for what was not loaded.
    pub fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        self.by_name
            .get(name)
            .map(|&index| Tensor { model: self, index })
    }

    /// Returns the tensor with this index in the checkpoint. `None` for what was not loaded.
    pub fn tensor_at(&self, index: usize) -> Option<Tensor<'_>> {
        let planned = self.plan.tensors.get(index)?;
        planned.placement.device?;
        Some(Tensor { model: self, index })
    }

    /// Returns every loaded tensor, in checkpoint order.
    pub fn tensors(&self) -> impl Iterator<Item = Tensor<'_>> {
        (0..self.tensors.len())
            .filter(|&index| self.plan.tensors[index].placement.device.is_some())
            .map(|index| Tensor { model: self, index })
    }
}

/// A part of a tensor in a GPU's memory. It lives as long as the model.
#[derive(Debug, Clone, Copy)]
pub struct DevicePart<'m> {
    address: DeviceAddress,
    bytes: u64,
    _model: PhantomData<&'m Model>,
}

impl DevicePart<'_> {
    /// Returns its device, and its first byte there, a multiple of 256.
    pub fn address(&self) -> DeviceAddress {
        self.address
    }

    /// Returns its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// One loaded tensor.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'m> {
    model: &'m Model,
    index: usize,
}

impl<'m> Tensor<'m> {
    fn stored(&self) -> &'m Stored {
        &self.model.tensors[self.index]
    }

    fn planned(&self) -> &'m PlannedTensor {
        &self.model.plan.tensors[self.index]
    }

    pub(crate) fn reservation(&self) -> Option<&'m Arc<dyn Reservation>> {
        let device = self.planned().placement.device? as usize;
        self.model.memory.get(device)?.as_ref()
    }

    /// Returns the model that it is of.
    pub fn model(&self) -> &'m Model {
        self.model
    }

    /// Returns its index in the checkpoint and in the plan.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Returns its parts, in the order of their offsets on its device.
    pub fn parts(&self) -> &'m [PlannedPart] {
        &self.planned().parts
    }

    /// Returns its key in the checkpoint.
    pub fn name(&self) -> &'m str {
        &self.stored().name
    }

    /// Returns what part of which tensor it is, if the plan has cut that into slices.
    pub fn piece(&self) -> Option<&'m Piece> {
        self.stored().piece.as_deref()
    }

    /// Type of the elements in the checkpoint.
    pub fn dtype(&self) -> DType {
        self.stored().dtype
    }

    /// Row-major shape in elements.
    pub fn shape(&self) -> &'m [u64] {
        &self.stored().shape
    }

    /// Returns how it is stored.
    pub fn format(&self) -> Format {
        self.planned().placement.format
    }

    /// Index of its device in the plan.
    pub fn device(&self) -> usize {
        self.planned()
            .placement
            .device
            .map_or(usize::MAX, |device| device as usize)
    }

    /// Returns how its parts are to be read if it is a 4-bit weight, quantized while loading or
    /// before.
    pub fn quantization(&self) -> Option<Quantization> {
        match (self.format(), &self.stored().quantized) {
            (
                Format::Nf4 {
                    block_size,
                    double_quantized,
                },
                _,
            ) => Some(Quantization {
                quant_type: QuantType::Nf4,
                block_size,
                absmax_mean: double_quantized.then_some(self.stored().absmax_mean),
            }),
            (Format::Stored, Some(quantized)) => Some(Quantization {
                quant_type: quantized.quant_type,
                block_size: quantized.block_size,
                absmax_mean: quantized.nested.map(|nested| nested.absmax_mean),
            }),
            _ => None,
        }
    }

    /// Returns the mean of the scales of a double-quantized weight.
    pub fn absmax_mean(&self) -> Option<f32> {
        self.quantization()?.absmax_mean
    }

    /// Returns a part in place, where the processor can read the device's memory.
    pub fn part(&self, kind: PartKind) -> Option<&'m [u8]> {
        let part = self.planned().part(kind)?;
        match self.reservation() {
            Some(memory) => shared::host_bytes(&**memory, part.offset, part.bytes),
            // An empty tensor on a device that holds nothing else.
            None => Some(&[]),
        }
    }

    /// Returns a part that stays in place, wherever it is, when the model is gone.
    pub fn shared_part(&self, kind: PartKind) -> Option<SharedPart> {
        let part = self.planned().part(kind)?;
        let memory = self.reservation().cloned();
        Some(SharedPart::new(memory, part.offset, part.bytes))
    }

    /// Returns a part in place in a GPU's memory, for kernels of the application's own. `None` for
    /// parts in host memory.
    pub fn device_part(&self, kind: PartKind) -> Option<DevicePart<'m>> {
        let part = self.planned().part(kind)?;
        Some(DevicePart {
            address: shared::address(&**self.reservation()?, part.offset)?,
            bytes: part.bytes,
            _model: PhantomData,
        })
    }

    /// Returns a part in place for a [`Queue`](crate::device::Queue) of its device, as long as that needs it,
    /// whatever becomes of the model. `None` for parts in host memory.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`] from a device that has less than it said.
    pub fn device_bytes(&self, kind: PartKind) -> Result<Option<DeviceBytes>, DeviceError> {
        match (self.planned().part(kind), self.reservation()) {
            (Some(part), Some(memory)) => memory.range(part.offset, part.bytes),
            _ => Ok(None),
        }
    }

    /// Returns a copy of a part, wherever it is; `None` when the format has no such part.
    ///
    /// # Errors
    /// When the device cannot be read.
    pub fn read_part(&self, kind: PartKind) -> Result<Option<Vec<u8>>, DeviceError> {
        let Some(part) = self.planned().part(kind) else {
            return Ok(None);
        };
        let mut bytes = vec![0; part.bytes as usize];
        if let Some(reservation) = self.reservation() {
            reservation.read(part.offset, &mut bytes)?;
        }
        Ok(Some(bytes))
    }

    /// Returns all elements, row-major: 4-bit weights are dequantized (one f32 product, rounded once),
    /// others converted. [`Tensor::read_floats`] gives some of them.
    ///
    /// ```no_run
    /// use tightfit::kernels::half::bf16;
    ///
    /// # fn weight(model: &tightfit::Model) -> Result<(), Box<dyn std::error::Error>> {
    /// let weight = model.tensor("lm_head.weight").ok_or("it has no head")?;
    /// let values: Vec<bf16> = weight.to_floats()?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ModelError`] when the elements are not floating-point numbers or cannot be read.
    pub fn to_floats<T: Float>(&self) -> Result<Vec<T>, ModelError> {
        let mut out = vec![T::zeroed(); elements(self.shape()).unwrap_or(0) as usize];
        self.read_floats(0, &mut out)?;
        Ok(out)
    }

    /// Returns the elements as numbers of type `to`, little-endian and row-major: NF4 weights are
    /// dequantized (one f32 product, rounded once), others converted.
    ///
    /// # Errors
    /// [`ModelError`] when the elements are not floating-point numbers or cannot be read.
    pub fn to_float(&self, to: FloatType) -> Result<Vec<u8>, ModelError> {
        let elements = elements(self.shape()).unwrap_or(0) as usize;
        let mut out = vec![0; elements * to.bytes()];
        self.to_float_at(0, to, &mut out)?;
        Ok(out)
    }
}
