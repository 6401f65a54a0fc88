//! Writes a checkpoint that bitsandbytes and transformers understand, tensor by tensor.
//!
//! Memory stays bounded by staging plus a batch of quantized weights (32 MiB of output, or one
//! weight where that is larger), whatever the model's size. A checkpoint appears under its name
//! only when it is complete: it is written to a directory beside it and renamed.
//!
//! The same tensors in the same formats give the same files, whatever order they were read in:
//! tensors are sorted by element size and name, as the safetensors library does.

mod companions;
mod config;
mod error;
mod experts;
mod layout;
mod quant_state;
mod target;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::path::Path;

pub use crate::checkpoint::MAX_COMPANION_BYTES;
pub use companions::{LeftOut, LeftOutReason, MAX_COMPANIONS, MAX_COMPANIONS_BYTES};
pub use error::SaveError;
pub use target::check_target;

use tightfit_common::names::{TensorKind, kind_of};
use tightfit_kernels::{DYNAMIC_MAP, FP4, Kernels, NF4};

use crate::cancel::CancelToken;
use crate::checkpoint::{
    AbsmaxForm, Checkpoint, CheckpointError, Encoded, Extent, Quantized, ScaleForm, TensorInfo,
};
use crate::device::{Device, DeviceKind, HostDevice};
use crate::load;
use crate::memory::DEFAULT_STAGING;
use crate::model::{Quantization, Tensor};
use crate::plan::{PartKind, Plan, tensor_part_sizes};
use crate::progress::{Progress, ReportProgress};
use crate::types::{Format, Placement, QuantType};
use companions::Companions;
use layout::{Content, Layout, ShardFile};
use target::Target;

/// 4-bit weights are quantized in batches of about this many bytes of output.
const BATCH_BYTES: u64 = 32 << 20;

/// Bytes that are copied at once.
const COPY_BYTES: u64 = 1 << 20;

/// A shard is closed when the next weight would make it larger than this, as transformers 4 and
/// most published checkpoints have it.
pub const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;

/// How to save.
#[non_exhaustive]
pub struct SaveOptions<'a> {
    /// Worker threads that quantize.
    pub threads: usize,
    /// Upper bound of host staging in bytes.
    pub staging_bytes: u64,
    /// Blocks with infinities or NaN are an error.
    pub strict: bool,
    /// The kernels to quantize with.
    pub kernels: Kernels,
    /// Largest shard in bytes; a single weight may be larger.
    pub max_shard_bytes: u64,
    /// Replace an existing checkpoint.
    pub force: bool,
    /// Modules were left out of quantization on the user's wish: a reader has to be told. It is in any
    /// case where linear layers were left out.
    pub skipped_on_request: bool,
    /// Called as bytes of the source are done.
    pub progress: ReportProgress<'a>,
    /// Checked between chunks.
    pub cancel: CancelToken,
}

impl Default for SaveOptions<'_> {
    fn default() -> Self {
        let load = load::LoadOptions::default();
        SaveOptions {
            threads: load.threads,
            staging_bytes: DEFAULT_STAGING,
            strict: false,
            kernels: load.kernels,
            max_shard_bytes: DEFAULT_SHARD_BYTES,
            force: false,
            skipped_on_request: false,
            progress: &|_| {},
            cancel: CancelToken::new(),
        }
    }
}

tightfit_common::setters!([<'a>] SaveOptions<'a>:
    with_threads: threads, usize;
    with_staging_bytes: staging_bytes, u64;
    with_strict: strict, bool;
    with_kernels: kernels, Kernels;
    with_max_shard_bytes: max_shard_bytes, u64;
    with_force: force, bool;
    with_skipped_on_request: skipped_on_request, bool;
    with_progress: progress, ReportProgress<'a>;
    with_cancel: cancel, CancelToken;
);

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// Files with weights.
    pub shards: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Weights in a 4-bit format.
    pub quantized: u64,
    /// Blocks with infinities or NaN.
    pub nonfinite_blocks: u64,
    /// Files beside the weights that were not copied, sorted by name.
    pub left_out: Vec<LeftOut>,
}

/// Writes the tensors that `placements` load (one placement for each tensor), in their formats, to
/// the directory `target`.
///
/// Stacks of experts that are to be quantized are written expert by expert, under the keys that
/// checkpoints with separate experts have; stacks without elements stay stacks.
///
/// Files beside the weights that belong to a model (`*.json`, `*.txt`, `*.model`, `*.jinja`,
/// `*.tiktoken`, `*.bpe`) are copied as new files of this user, whatever their modes are. What is
/// larger than [`MAX_COMPANION_BYTES`], or no regular file, is left out, as [`Saved::left_out`] says.
///
/// A checkpoint that another method has quantized is only copied, but for weights that are decoded as they
/// are read ([`TensorInfo::encoded`]): then all of them must be, and config.json names the method no more.
///
/// # Errors
/// [`SaveError`]; nothing is left at `target`, or what was there before.
pub fn save(
    checkpoint: &Checkpoint,
    placements: &[Placement],
    target: impl AsRef<Path>,
    options: &SaveOptions<'_>,
) -> Result<Saved, SaveError> {
    if checkpoint.is_cut() {
        return Err(SaveError::Slices);
    }
    if placements.len() != checkpoint.tensors().len() {
        return Err(SaveError::OtherPlan);
    }
    if checkpoint.has_headers_only() {
        let path = checkpoint.path().into();
        return Err(SaveError::Checkpoint(CheckpointError::HeadersOnly { path }));
    }
    let is_decoded = check_method(checkpoint, placements)?;
    // First, for what may not be copied is known before hours of work.
    let companions = Companions::find(
        checkpoint.directory(),
        !checkpoint.path().is_dir(),
        is_decoded,
        &options.cancel,
    )?;
    let target = Target::create(target.as_ref(), options.force)?;
    let kept: Vec<(TensorInfo, Format)> = checkpoint
        .tensors()
        .iter()
        .zip(placements)
        .filter(|(_, placement)| placement.device.is_some())
        .map(|(tensor, placement)| (tensor.clone(), placement.format))
        .collect();
    let mut weights = experts::split_stacks(kept, checkpoint.config())?;
    weights.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name));
    let layout = Layout::new(&weights, options.max_shard_bytes)?;
    let mut writer = Writer {
        checkpoint,
        weights: &weights,
        layout: &layout,
        options,
        done: 0,
        total: weights
            .iter()
            .map(|(tensor, _)| tensor.source_bytes())
            .sum(),
        nonfinite_blocks: 0,
        state_bytes: 0,
    };
    for shard in &layout.shards {
        writer.write_shard(shard, &target)?;
    }
    let state_bytes = writer.state_bytes;
    layout.write_index(&weights, state_bytes, &target)?;
    companions.copy(&target, &options.cancel)?;
    config::write(
        checkpoint.config(),
        &weights,
        is_decoded,
        options.skipped_on_request || weights.iter().any(is_left_out),
        &target,
    )?;
    let nonfinite_blocks = writer.nonfinite_blocks;
    target.finish(&options.cancel)?;
    Ok(Saved {
        shards: layout.shards.len(),
        bytes: layout.total_bytes + state_bytes,
        quantized: weights
            .iter()
            .filter(|(tensor, format)| is_4bit(tensor, *format))
            .count() as u64,
        nonfinite_blocks,
        left_out: companions.left_out,
    })
}

/// Whether weights of another method are written decoded. Nothing else of such a checkpoint is to be in
/// another form: its configuration would describe one of them only.
fn check_method(checkpoint: &Checkpoint, placements: &[Placement]) -> Result<bool, SaveError> {
    let method = checkpoint.quantization();
    let name = || method.map_or("another method".to_owned(), ToString::to_string);
    let tensors = checkpoint.tensors().iter().zip(placements);
    let mut loaded = tensors.filter(|(_, placement)| placement.device.is_some());
    if loaded.clone().any(|(tensor, _)| tensor.encoded.is_some()) {
        let counts = checkpoint.encoded();
        if counts.left + counts.unknown > 0 {
            return Err(SaveError::MixedMethods {
                method: name(),
                weights: counts.left + counts.unknown,
            });
        }
        // A program that has them dense has them the other way round, or not in 4 bits.
        let is_stack = |encoded: &Encoded| {
            encoded.scale == ScaleForm::Plain(tightfit_kernels::SourceScale::Ldexp)
        };
        return match loaded.find(|(tensor, _)| tensor.encoded.as_deref().is_some_and(is_stack)) {
            None => Ok(true),
            Some((tensor, _)) => Err(SaveError::NoReader {
                tensor: tensor.name.clone(),
            }),
        };
    }
    let quantized =
        |(_, placement): &(&TensorInfo, &Placement)| matches!(placement.format, Format::Nf4 { .. });
    match (method, loaded.find(quantized)) {
        (Some(method), Some((tensor, placement))) if !method.is_bitsandbytes_4bit() => {
            Err(SaveError::OtherMethod {
                method: name(),
                tensor: tensor.name.clone(),
                format: placement.format,
            })
        }
        _ => Ok(false),
    }
}

/// Whether a weight is stored in a 4-bit format, quantized now or before.
fn is_4bit(tensor: &TensorInfo, format: Format) -> bool {
    tensor.quantized.is_some() || matches!(format, Format::Nf4 { .. })
}

/// Whether a matrix is none in 4 bits, though transformers would make a 4-bit module for it unless it is
/// told: that of a linear layer, or an output head of a name of its own.
fn is_left_out((tensor, format): &(TensorInfo, Format)) -> bool {
    let Some(module) = tensor.name.strip_suffix(".weight") else {
        return false;
    };
    if tensor.shape.len() != 2 || !tensor.dtype.is_quantizable() || is_4bit(tensor, *format) {
        return false;
    }
    match kind_of(&tensor.name, 2, true) {
        TensorKind::Linear => true,
        TensorKind::OutputHead => {
            let name = module.rsplit('.').next().unwrap_or(module);
            name == "output" || name.ends_with("_lm_head") || name.parse::<u32>().is_ok()
        }
        _ => false,
    }
}

struct Writer<'a> {
    checkpoint: &'a Checkpoint,
    weights: &'a [(TensorInfo, Format)],
    layout: &'a Layout,
    options: &'a SaveOptions<'a>,
    done: u64,
    total: u64,
    nonfinite_blocks: u64,
    /// Bytes of all quant states.
    state_bytes: u64,
}

impl Writer<'_> {
    fn write_shard(&mut self, shard: &ShardFile, target: &Target) -> Result<(), SaveError> {
        let mut file = OpenShard {
            file: target.create_file(&shard.file_name)?,
            shard,
            target,
            states: Vec::new(),
        };
        let mut batch: Vec<usize> = Vec::new();
        let mut batch_bytes = 0;
        for weight in shard.weights.clone() {
            let (tensor, format) = &self.weights[weight];
            match format {
                Format::Nf4 { .. } => {
                    let bytes = tensor_part_sizes(tensor, *format)?.padded();
                    if !batch.is_empty() && batch_bytes + bytes > BATCH_BYTES {
                        self.quantize(&batch, &mut file)?;
                        batch.clear();
                        batch_bytes = 0;
                    }
                    batch.push(weight);
                    batch_bytes += bytes;
                }
                Format::Stored | Format::Cast(_) => self.copy(weight, &mut file)?,
            }
        }
        self.quantize(&batch, &mut file)?;
        self.state_bytes += file.finish(self.layout)?;
        Ok(())
    }

    /// Quantizes some weights with the loader, and writes them.
    fn quantize(&mut self, batch: &[usize], file: &mut OpenShard<'_>) -> Result<(), SaveError> {
        if batch.is_empty() {
            return Ok(());
        }
        let tensors: Vec<TensorInfo> = batch.iter().map(|&i| self.weights[i].0.clone()).collect();
        let view = self.checkpoint.view(tensors);
        let placements: Vec<Placement> = batch
            .iter()
            .map(|&i| Placement {
                device: Some(0),
                format: self.weights[i].1,
            })
            .collect();
        let mut device = HostDevice::sim(0, u64::MAX >> 1).info();
        device.kind = DeviceKind::Cpu;
        let plan = Plan::new(view.tensors(), &[], &[device], &placements, &[0])
            .map_err(SaveError::Plan)?;
        let memory: Vec<Box<dyn Device>> =
            vec![Box::new(HostDevice::sim(0, plan.devices[0].size.reserved))];
        let before = self.done;
        let total = self.total;
        let progress = |progress: Progress| {
            (self.options.progress)(Progress::new(before + progress.bytes_done, total));
        };
        let options = load::LoadOptions::default()
            .with_threads(self.options.threads)
            .with_staging_bytes(self.options.staging_bytes)
            .with_strict(self.options.strict)
            .with_kernels(self.options.kernels)
            .with_progress(&progress)
            .with_cancel(self.options.cancel.clone());
        let model = load::load(&view, &plan, &memory, &options)?;
        self.done += model.stats().bytes_read;
        self.nonfinite_blocks += model.stats().nonfinite_blocks();
        for (tensor, &weight) in model.tensors().zip(batch) {
            file.write_quantized(&tensor, weight)?;
        }
        Ok(())
    }

    /// Copies a weight as it is, or casts it, piece by piece.
    fn copy(&mut self, weight: usize, file: &mut OpenShard<'_>) -> Result<(), SaveError> {
        let (tensor, format) = &self.weights[weight];
        let own = Extent {
            shard: tensor.shard,
            offset: tensor.offset,
            bytes: tensor.bytes,
        };
        let Some(quantized) = &tensor.quantized else {
            return self.copy_extent(own, *format, Content::Data, weight, file);
        };
        self.copy_extent(own, Format::Stored, Content::Data, weight, file)?;
        match quantized.absmax_form {
            AbsmaxForm::AsUsed => {
                let content = Content::Absmax;
                self.copy_extent(quantized.absmax, Format::Stored, content, weight, file)?;
            }
            _ => self.write_scales(tensor, quantized, weight, file)?,
        }
        if let Some(nested) = quantized.nested {
            let content = Content::NestedAbsmax;
            self.copy_extent(nested.absmax, Format::Stored, content, weight, file)?;
        }
        let quantization = Quantization {
            quant_type: quantized.quant_type,
            block_size: quantized.block_size,
            absmax_mean: quantized.nested.map(|nested| nested.absmax_mean),
        };
        file.write_tables(weight, tensor, &quantization)
    }

    /// Writes scales as they are used, which are not so in the checkpoint.
    fn write_scales(
        &mut self,
        tensor: &TensorInfo,
        quantized: &Quantized,
        weight: usize,
        file: &mut OpenShard<'_>,
    ) -> Result<(), SaveError> {
        let total = 4 * quantized.scales();
        let mut scales = vec![0; total.min(COPY_BYTES) as usize];
        let mut scratch = vec![0; COPY_BYTES as usize];
        let before = self.done;
        let mut start = 0;
        while start < total {
            if self.options.cancel.is_cancelled() {
                return Err(SaveError::Cancelled);
            }
            let piece = &mut scales[..(total - start).min(COPY_BYTES) as usize];
            self.checkpoint
                .read_absmax(tensor, quantized, start / 4, piece, &mut scratch)?;
            file.write(weight, Content::Absmax, start, piece)?;
            start += piece.len() as u64;
            self.done = before + quantized.stored_bytes_until(start);
            (self.options.progress)(Progress::new(self.done, self.total));
        }
        Ok(())
    }

    fn copy_extent(
        &mut self,
        extent: Extent,
        format: Format,
        content: Content,
        weight: usize,
        file: &mut OpenShard<'_>,
    ) -> Result<(), SaveError> {
        let weights = self.weights;
        let tensor = &weights[weight].0;
        let total = match tensor.encoded {
            Some(_) => tensor.decoded_bytes(),
            None => extent.bytes,
        };
        let mut source = vec![0; total.min(COPY_BYTES) as usize];
        let mut scratch = vec![0; tensor.encoded.as_ref().map_or(0, |_| COPY_BYTES as usize)];
        let mut cast = Vec::new();
        let types = match format {
            Format::Cast(to) => tensor.dtype.float_type().zip(to.float_type()),
            Format::Stored | Format::Nf4 { .. } => None,
        };
        // What the checkpoint has of it: that is what progress counts.
        let before = self.done;
        let source_bytes = match tensor.encoded {
            Some(_) => tensor.source_bytes(),
            None => total,
        };
        let mut start = 0;
        while start < total {
            if self.options.cancel.is_cancelled() {
                return Err(SaveError::Cancelled);
            }
            let length = (total - start).min(COPY_BYTES) as usize;
            let piece = &mut source[..length];
            match tensor.encoded {
                None => self
                    .checkpoint
                    .read_at(extent.shard, extent.offset + start, piece)?,
                Some(_) => {
                    let kernels = self.options.kernels;
                    self.checkpoint
                        .read_elements(tensor, start, piece, &mut scratch, kernels)?;
                }
            }
            match types {
                None => file.write(weight, content, start, piece)?,
                Some((from, to)) => {
                    cast.resize(length / from.bytes() * to.bytes(), 0);
                    self.options.kernels.cast(piece, from, to, &mut cast)?;
                    let at = start / from.bytes() as u64 * to.bytes() as u64;
                    file.write(weight, content, at, &cast)?;
                }
            }
            start += length as u64;
            let share = u128::from(source_bytes) * u128::from(start) / u128::from(total);
            self.done = before + share as u64;
            (self.options.progress)(Progress::new(self.done, self.total));
        }
        Ok(())
    }
}

/// A shard that is being written.
struct OpenShard<'a> {
    file: File,
    shard: &'a ShardFile,
    target: &'a Target,
    /// The quant states, known as weights are quantized: weight and text.
    states: Vec<(usize, String)>,
}

impl OpenShard<'_> {
    fn write(
        &mut self,
        weight: usize,
        content: Content,
        start: u64,
        bytes: &[u8],
    ) -> Result<(), SaveError> {
        let offset = self
            .shard
            .offset(weight, content)
            .ok_or(SaveError::Internal("a shard has no place for a tensor"))?
            + start;
        self.target
            .write_at(&mut self.file, &self.shard.file_name, offset, bytes)
    }

    fn write_quantized(&mut self, tensor: &Tensor<'_>, weight: usize) -> Result<(), SaveError> {
        let parts = [
            (PartKind::Codes, Content::Data),
            (PartKind::Absmax, Content::Absmax),
            (PartKind::NestedAbsmax, Content::NestedAbsmax),
        ];
        for (kind, content) in parts {
            if let Some(bytes) = tensor.part(kind) {
                self.write(weight, content, 0, bytes)?;
            }
        }
        let quantization = tensor.quantization().ok_or(SaveError::Internal(
            "a 4-bit tensor says nothing of its format",
        ))?;
        let state = quant_state::text(tensor.dtype(), tensor.shape(), &quantization);
        self.write_constants(weight, &quantization, state)
    }

    fn write_tables(
        &mut self,
        weight: usize,
        tensor: &TensorInfo,
        quantization: &Quantization,
    ) -> Result<(), SaveError> {
        let state = quant_state::text(tensor.dtype, &tensor.shape, quantization);
        self.write_constants(weight, quantization, state)
    }

    fn write_constants(
        &mut self,
        weight: usize,
        quantization: &Quantization,
        state: String,
    ) -> Result<(), SaveError> {
        let table = match quantization.quant_type {
            QuantType::Nf4 => NF4,
            QuantType::Fp4 => FP4,
        };
        self.write(weight, Content::QuantMap, 0, bytemuck::cast_slice(&table))?;
        if quantization.absmax_mean.is_some() {
            let map: &[u8] = bytemuck::cast_slice(&DYNAMIC_MAP);
            self.write(weight, Content::NestedQuantMap, 0, map)?;
        }
        self.states.push((weight, state));
        Ok(())
    }

    /// Writes the quant states behind everything else, and the header, which only now is known.
    /// Gives the bytes of the quant states.
    fn finish(mut self, layout: &Layout) -> Result<u64, SaveError> {
        self.states.sort_unstable_by_key(|&(weight, _)| weight);
        let mut offset = self.shard.states_offset;
        let states = std::mem::take(&mut self.states);
        for (_, state) in &states {
            self.target.write_at(
                &mut self.file,
                &self.shard.file_name,
                offset,
                state.as_bytes(),
            )?;
            offset += state.len() as u64;
        }
        let header = self.shard.header(layout, &states)?;
        self.target
            .write_at(&mut self.file, &self.shard.file_name, 0, &header)?;
        self.target
            .finish_file(self.file, &self.shard.file_name, offset)?;
        Ok(offset - self.shard.states_offset)
    }
}
