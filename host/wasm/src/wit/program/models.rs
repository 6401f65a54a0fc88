//! The interface `models`.

mod on_device;

use std::sync::Arc;

use wasmtime::component::Resource;

use super::bindings::tightfit::host::{models, types};
use super::checkpoints::OpenCheckpoint;
use super::error::CallError;
use super::nf4::float;
use super::view::{element_bytes, list_bytes, place};
use super::{ProgramCtx, ProgramCtxView};
use crate::memory::{Buffer, Settler};
use crate::stop::Stop;
use crate::wit::convert::{self, same_cases};
use tightfit::checkpoint::Checkpoint;
use tightfit::load::{LoadError, LoadOptions, Reserved, load_reserved};
use tightfit::memory::{DEFAULT_STAGING, Ledger, LedgerEntry, ReservationSize};
use tightfit::model::{Model, Tensor};
use tightfit::plan::{PartKind, Plan, PlanError, PlanOptions};
use tightfit::policy::Proposal;
use tightfit::types::{Bytes, Slice};

/// What the host keeps in its own memory for each tensor of a loaded model, at most, in bytes; names
/// and shapes come on top.
const TENSOR_BYTES: u64 = 512;

/// The same for each range of a slice, which is in its name too.
const RANGE_BYTES: u64 = 320;

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

    /// Enters what the host will keep of a model that has these slices of some tensors.
    pub(super) fn keep(
        &self,
        checkpoint: &Checkpoint,
        slices: &[Slice],
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
        let mut entries = checkpoint.tensors().len() + checkpoint.ties().len();
        let mut ranges = 0;
        if !slices.is_empty() {
            let mut aliases = vec![(0, 0); checkpoint.tensors().len()];
            for tie in checkpoint.ties() {
                let (number, length) = &mut aliases[tie.tensor];
                *number += 1;
                *length += tie.alias.len();
            }
            for slices in slices.chunks(CHECKED_TENSORS) {
                stop.check()?;
                for slice in slices {
                    // What is not there is refused soon.
                    let index = slice.tensor as usize;
                    let Some(tensor) = checkpoint.tensors().get(index) else {
                        continue;
                    };
                    let (number, length) = aliases[index];
                    entries += 1 + number;
                    texts += 4 * tensor.name.len() + 16 * tensor.shape.len() + length;
                    ranges += (1 + number) * slice.ranges.len();
                }
            }
        }
        let bytes = texts as u64 + TENSOR_BYTES * entries as u64 + RANGE_BYTES * ranges as u64;
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

/// A model that a program has loaded. Weights that are made of it have a share in it.
#[derive(Debug)]
pub struct LoadedModel(Arc<Loaded>);

/// A model, and what it takes.
#[derive(Debug)]
pub(super) struct Loaded {
    /// Unloaded when no device uses it any more, and before the books say so: fields drop in this order.
    _settler: Settler,
    model: Model,
    _entries: Vec<LedgerEntry>,
}

impl Loaded {
    pub(super) fn model(&self) -> &Model {
        &self.model
    }
}

impl LoadedModel {
    /// Returns the model.
    pub fn model(&self) -> &Model {
        &self.0.model
    }

    /// Returns a share in it.
    pub(super) fn share(&self) -> Arc<Loaded> {
        Arc::clone(&self.0)
    }

    pub(super) fn tensor(&self, number: u32) -> Result<Tensor<'_>, CallError> {
        self.model().tensor_at(number as usize).ok_or_else(|| {
            CallError::invalid(format_args!(
                "tensor number {number} is not there, or was not loaded"
            ))
        })
    }
}

impl ProgramCtx {
    /// Loads a model, with everything checked and counted before anything is taken.
    pub(super) fn load(
        &self,
        checkpoint: &Checkpoint,
        proposal: &Proposal,
    ) -> Result<LoadedModel, CallError> {
        self.memory.trim();
        let infos = self.device_infos();
        // Cutting takes that memory already.
        let kept = self.models.keep(checkpoint, &proposal.slices, &self.stop)?;
        // Planning and loading look at the clock themselves, and do not know why they are ended.
        let cancel = self.stop.token();
        let options = PlanOptions::default().with_cancel(cancel.clone());
        let plan = Plan::of_with(checkpoint, &infos, proposal, &options);
        let plan = match plan {
            Err(PlanError::Cancelled) => return Err(self.stop.reason().into()),
            other => other?,
        };
        self.memory.check(&plan)?;
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
            Ok(model) => Ok(LoadedModel(Arc::new(Loaded {
                _settler: self.memory.settler(),
                model,
                _entries: entries,
            }))),
            Err(LoadError::Cancelled) => Err(self.stop.reason().into()),
            Err(error) => Err(error.into()),
        }
    }
}

same_cases!(part_kind, wit_part_kind, PartKind, models::PartKind:
    Data = Data, Codes = Codes, Absmax = Absmax, NestedAbsmax = NestedAbsmax);

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

impl models::Host for ProgramCtxView<'_> {}

impl models::HostModel for ProgramCtxView<'_> {
    fn load(
        &mut self,
        checkpoint: Resource<OpenCheckpoint>,
        placements: Vec<types::Placement>,
        headroom: Vec<u64>,
    ) -> Result<Resource<LoadedModel>, CallError> {
        let (context, table) = self.begin()?;
        let OpenCheckpoint(checkpoint) = table.get(&checkpoint)?;
        let placements = convert::placements(placements, checkpoint.tensors(), |_| false)
            .map_err(CallError::invalid)?;
        let proposal = Proposal {
            placements,
            headroom,
            slices: Vec::new(),
        };
        let model = context.load(checkpoint, &proposal)?;
        Ok(table.push(model)?)
    }

    fn get_statistics(
        &mut self,
        model: Resource<LoadedModel>,
    ) -> wasmtime::Result<models::Statistics> {
        let (_, table) = self.begin()?;
        let model = table.get(&model)?.model();
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
        let (_, table) = self.begin()?;
        let tensor = table.get(&model)?.model().tensor(&name);
        Ok(tensor.map(|tensor| convert::index(tensor.index())))
    }

    fn get_tensor(
        &mut self,
        model: Resource<LoadedModel>,
        tensor: u32,
    ) -> Result<models::StoredTensor, CallError> {
        let (_, table) = self.begin()?;
        Ok(stored_tensor(table.get(&model)?.tensor(tensor)?))
    }

    fn read_part(
        &mut self,
        model: Resource<LoadedModel>,
        tensor: u32,
        part: models::PartKind,
        start: u64,
        bytes: u64,
    ) -> Result<Vec<u8>, CallError> {
        let (_, table) = self.begin()?;
        let mut out = vec![0; list_bytes(bytes)?];
        let tensor = table.get(&model)?.tensor(tensor)?;
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
        self.begin()?;
        let (target, kind) = (place(target, offset), part_kind(part));
        self.check(&[(&target, bytes)])?;
        let loaded = self.table.get(&model)?.tensor(tensor)?;
        loaded.check_part(kind, start, bytes)?;
        if self.copy_part_on_device(&model, tensor, kind, [start, bytes], &target)? {
            return Ok(());
        }
        self.fill(&target, bytes, |view, from, piece| {
            let loaded = view.table.get(&model)?.tensor(tensor)?;
            Ok(loaded.read_part_at(kind, start + from, piece)?)
        })
    }

    fn read_elements(
        &mut self,
        model: Resource<LoadedModel>,
        tensor: u32,
        first: u64,
        count: u64,
        dtype: types::Dtype,
    ) -> Result<Vec<u8>, CallError> {
        let (_, table) = self.begin()?;
        let float = float(dtype)?;
        let mut out = vec![0; list_bytes(element_bytes(count, float.bytes())?)?];
        let tensor = table.get(&model)?.tensor(tensor)?;
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
        self.begin()?;
        let (target, float) = (place(target, offset), float(dtype)?);
        let bytes = element_bytes(count, float.bytes())?;
        self.check(&[(&target, bytes)])?;
        let loaded = self.table.get(&model)?.tensor(tensor)?;
        loaded.check_elements(first, count)?;
        if self.elements_on_device(&model, tensor, [first, count], float, &target)? {
            return Ok(());
        }
        // A piece is a multiple of every type's bytes.
        self.fill(&target, bytes, |view, from, piece| {
            let loaded = view.table.get(&model)?.tensor(tensor)?;
            let from = first + from / float.bytes() as u64;
            Ok(loaded.to_float_at(from, float, piece)?)
        })
    }

    fn drop(&mut self, model: Resource<LoadedModel>) -> wasmtime::Result<()> {
        self.table.delete(model)?;
        Ok(())
    }
}
