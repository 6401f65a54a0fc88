//! The interface `models`.

use std::sync::Arc;

use tightfit_kernels::FloatType;
use wasmtime::component::Resource;

use super::bindings::tightfit::host::{models, types};
use super::buffer::{Buffer, PIECE};
use super::checkpoints::OpenCheckpoint;
use super::error::CallError;
use super::nf4::float;
use super::stop::Stop;
use super::{ProgramContext, ProgramContextView, list_bytes};
use crate::wit::convert;
use tightfit::checkpoint::Checkpoint;
use tightfit::load::{LoadError, LoadOptions, Reserved, load_reserved};
use tightfit::memory::{DEFAULT_STAGING, Ledger, LedgerEntry, ReservationSize};
use tightfit::model::{Model, Tensor};
use tightfit::plan::{PartKind, Plan, PlanError, PlanOptions};
use tightfit::types::{Bytes, Placement};

/// What the host keeps in its own memory for each tensor of a loaded model, at most, in bytes; names
/// and shapes come on top.
const TENSOR_BYTES: u64 = 512;

/// Tensors that are gone through between two looks at the clock.
const CHECKED_TENSORS: usize = 4096;

/// Bytes of its own memory that the host keeps for one program's models. A model of 100,000 tensors
/// takes a tenth of it.
const MOST_KEPT: u64 = 1 << 30;

/// How models are loaded, and what is kept of them.
#[derive(Debug)]
pub(super) struct Loader {
    pub(super) threads: usize,
    pub(super) staging_bytes: u64,
    kept: Arc<Ledger>,
}

impl Loader {
    pub(super) fn new() -> Loader {
        Loader {
            threads: LoadOptions::default().threads,
            staging_bytes: DEFAULT_STAGING,
            kept: Arc::default(),
        }
    }

    /// Enters what the host will keep of a model.
    pub(super) fn keep(
        &self,
        checkpoint: &Checkpoint,
        stop: &Stop,
    ) -> Result<LedgerEntry, CallError> {
        let mut texts: usize = checkpoint.ties().iter().map(|tie| tie.alias.len()).sum();
        for tensors in checkpoint.tensors().chunks(CHECKED_TENSORS) {
            stop.check()?;
            // A name is kept twice: with the tensor and as what it is found by.
            let kept = tensors
                .iter()
                .map(|tensor| 2 * tensor.name.len() + 8 * tensor.shape.len());
            texts += kept.sum::<usize>();
        }
        let entries = checkpoint.tensors().len() + checkpoint.ties().len();
        let bytes = texts as u64 + TENSOR_BYTES * entries as u64;
        let size = ReservationSize {
            reserved: bytes,
            ..ReservationSize::default()
        };
        Ledger::enter(&self.kept, size, MOST_KEPT).map_err(|have| {
            CallError::unsupported(format_args!(
                "too many models are loaded: the host would keep {} more for this one, and has {} left",
                Bytes(bytes),
                Bytes(have)
            ))
        })
    }
}

/// A model that a program has loaded.
#[derive(Debug)]
pub struct LoadedModel {
    /// Unloaded before the books say so: fields drop in this order.
    model: Model,
    _entries: Vec<LedgerEntry>,
}

impl LoadedModel {
    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    fn tensor(&self, number: u32) -> Result<Tensor<'_>, CallError> {
        self.model.tensor_at(number as usize).ok_or_else(|| {
            CallError::invalid(format_args!(
                "tensor number {number} is not there, or was not loaded"
            ))
        })
    }
}

impl ProgramContext {
    /// Loads a model, with everything checked and counted before anything is taken.
    pub(super) fn load(
        &self,
        checkpoint: &Checkpoint,
        placements: &[Placement],
        headroom: &[u64],
    ) -> Result<LoadedModel, CallError> {
        self.memory.trim();
        let infos = self.device_infos();
        let (tensors, ties) = (checkpoint.tensors(), checkpoint.ties());
        // Planning and loading look at the clock themselves, and do not know why they are ended.
        let cancel = self.stop.token();
        let options = PlanOptions::default().with_cancel(cancel.clone());
        let plan = Plan::new_with(tensors, ties, &infos, placements, headroom, &options);
        let plan = match plan {
            Err(PlanError::Cancelled) => return Err(self.stop.reason().into()),
            other => other?,
        };
        self.memory.check(&plan)?;
        let kept = self.models.keep(checkpoint, &self.stop)?;
        self.stop.check()?;
        let reserved = Reserved::take(plan, &self.devices)?;
        let mut entries = self.memory.enter(reserved.plan())?;
        entries.push(kept);
        let options = LoadOptions::default()
            .with_threads(self.models.threads)
            .with_staging_bytes(self.models.staging_bytes)
            .with_kernels(self.kernels)
            .with_cancel(cancel);
        match load_reserved(checkpoint, reserved, &options) {
            Ok(model) => Ok(LoadedModel {
                model,
                _entries: entries,
            }),
            Err(LoadError::Cancelled) => Err(self.stop.reason().into()),
            Err(error) => Err(error.into()),
        }
    }
}

pub(super) fn part_kind(kind: models::PartKind) -> PartKind {
    match kind {
        models::PartKind::Data => PartKind::Data,
        models::PartKind::Codes => PartKind::Codes,
        models::PartKind::Absmax => PartKind::Absmax,
        models::PartKind::NestedAbsmax => PartKind::NestedAbsmax,
    }
}

fn wit_part_kind(kind: PartKind) -> models::PartKind {
    match kind {
        PartKind::Data => models::PartKind::Data,
        PartKind::Codes => models::PartKind::Codes,
        PartKind::Absmax => models::PartKind::Absmax,
        PartKind::NestedAbsmax => models::PartKind::NestedAbsmax,
    }
}

fn stored_tensor(tensor: Tensor<'_>) -> models::StoredTensor {
    models::StoredTensor {
        name: tensor.name().to_owned(),
        dtype: convert::wit_dtype(tensor.dtype()),
        shape: tensor.shape().to_vec(),
        device: convert::index(tensor.device()),
        format: convert::wit_format(tensor.format()),
        quantization: tensor
            .quantization()
            .map(|given| models::StoredQuantization {
                quant_type: convert::wit_quant_type(given.quant_type),
                block_size: given.block_size.into(),
                mean: given.absmax_mean,
            }),
        parts: tensor
            .parts()
            .iter()
            .map(|part| models::Part {
                kind: wit_part_kind(part.kind),
                offset: part.offset,
                bytes: part.bytes,
            })
            .collect(),
    }
}

/// Bytes of `count` numbers.
fn float_bytes(count: u64, float: FloatType) -> Result<u64, CallError> {
    let bytes = count.checked_mul(float.bytes() as u64);
    bytes.ok_or_else(|| CallError::invalid(format_args!("{count} elements have no size")))
}

impl models::Host for ProgramContextView<'_> {}

impl models::HostModel for ProgramContextView<'_> {
    fn load(
        &mut self,
        checkpoint: Resource<OpenCheckpoint>,
        placements: Vec<types::Placement>,
        headroom: Vec<u64>,
    ) -> Result<Resource<LoadedModel>, CallError> {
        self.context.stop.check()?;
        let OpenCheckpoint(checkpoint) = self.table.get(&checkpoint)?;
        let placements = convert::placements(placements, checkpoint.tensors(), |_| false)
            .map_err(CallError::invalid)?;
        let model = self.context.load(checkpoint, &placements, &headroom)?;
        Ok(self.table.push(model)?)
    }

    fn get_statistics(
        &mut self,
        model: Resource<LoadedModel>,
    ) -> wasmtime::Result<models::Statistics> {
        self.context.stop.check()?;
        let model = self.table.get(&model)?.model();
        let stats = model.stats();
        let shares = model.plan().devices.iter().map(|device| models::Share {
            requested: device.size.requested,
            padded: device.size.padded,
            reserved: device.size.reserved,
            tensors: device.tensors,
        });
        Ok(models::Statistics {
            bytes_read: stats.bytes_read,
            quantized: stats.quantized,
            stored: stats.stored,
            nonfinite_blocks: stats.nonfinite_blocks(),
            shares: shares.collect(),
        })
    }

    fn find(
        &mut self,
        model: Resource<LoadedModel>,
        name: String,
    ) -> wasmtime::Result<Option<u32>> {
        self.context.stop.check()?;
        let tensor = self.table.get(&model)?.model().tensor(&name);
        Ok(tensor.map(|tensor| convert::index(tensor.index())))
    }

    fn get_tensor(
        &mut self,
        model: Resource<LoadedModel>,
        tensor: u32,
    ) -> Result<models::StoredTensor, CallError> {
        self.context.stop.check()?;
        Ok(stored_tensor(self.table.get(&model)?.tensor(tensor)?))
    }

    fn read_part(
        &mut self,
        model: Resource<LoadedModel>,
        tensor: u32,
        part: models::PartKind,
        start: u64,
        bytes: u64,
    ) -> Result<Vec<u8>, CallError> {
        self.context.stop.check()?;
        let mut out = vec![0; list_bytes(bytes)?];
        let tensor = self.table.get(&model)?.tensor(tensor)?;
        tensor.read_part_at(part_kind(part), start, &mut out)?;
        Ok(out)
    }

    fn read_part_into(
        &mut self,
        model: Resource<LoadedModel>,
        tensor: u32,
        part: models::PartKind,
        start: u64,
        bytes: u64,
        target: Resource<Buffer>,
        offset: u64,
    ) -> Result<(), CallError> {
        self.context.stop.check()?;
        self.table.get(&target)?.check(offset, bytes)?;
        let kind = part_kind(part);
        let loaded = self.table.get(&model)?.tensor(tensor)?;
        loaded.check_part(kind, start, bytes)?;
        let mut piece = vec![0; bytes.min(PIECE as u64) as usize];
        let mut done = 0;
        while done < bytes {
            self.context.stop.check()?;
            let length = (bytes - done).min(PIECE as u64);
            let piece = &mut piece[..length as usize];
            let loaded = self.table.get(&model)?.tensor(tensor)?;
            loaded.read_part_at(kind, start + done, piece)?;
            let buffer = self.table.get_mut(&target)?;
            buffer.write(offset + done, piece, &self.context.stop)?;
            done += length;
        }
        Ok(())
    }

    fn read_elements(
        &mut self,
        model: Resource<LoadedModel>,
        tensor: u32,
        first: u64,
        count: u64,
        dtype: types::Dtype,
    ) -> Result<Vec<u8>, CallError> {
        self.context.stop.check()?;
        let float = float(dtype)?;
        let mut out = vec![0; list_bytes(float_bytes(count, float)?)?];
        let tensor = self.table.get(&model)?.tensor(tensor)?;
        tensor.to_float_at(first, float, &mut out)?;
        Ok(out)
    }

    fn read_elements_into(
        &mut self,
        model: Resource<LoadedModel>,
        tensor: u32,
        first: u64,
        count: u64,
        dtype: types::Dtype,
        target: Resource<Buffer>,
        offset: u64,
    ) -> Result<(), CallError> {
        self.context.stop.check()?;
        let float = float(dtype)?;
        let bytes = float_bytes(count, float)?;
        self.table.get(&target)?.check(offset, bytes)?;
        let loaded = self.table.get(&model)?.tensor(tensor)?;
        loaded.check_elements(first, count)?;
        let each = (PIECE / float.bytes()) as u64;
        let mut piece = vec![0; bytes.min(PIECE as u64) as usize];
        let mut done = 0;
        while done < count {
            self.context.stop.check()?;
            let elements = (count - done).min(each);
            let piece = &mut piece[..elements as usize * float.bytes()];
            let loaded = self.table.get(&model)?.tensor(tensor)?;
            loaded.to_float_at(first + done, float, piece)?;
            let buffer = self.table.get_mut(&target)?;
            let at = offset + done * float.bytes() as u64;
            buffer.write(at, piece, &self.context.stop)?;
            done += elements;
        }
        Ok(())
    }

    fn drop(&mut self, model: Resource<LoadedModel>) -> wasmtime::Result<()> {
        self.table.delete(model)?;
        Ok(())
    }
}
