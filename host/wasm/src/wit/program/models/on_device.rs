//! Parts and elements of models that are copied, recovered and dequantized where they lie.

use wasmtime::component::Resource;

use tightfit_kernels::{FloatType, NESTED_BLOCK_SIZE, packed_bytes};

use super::super::ProgramCtxView;
use super::super::bindings::tightfit::host::buffers::Place;
use super::super::buffers::COPIED;
use super::super::error::CallError;
use super::super::view::{Used, not_there};
use super::LoadedModel;
use tightfit::device::{AbsmaxRecovery, Dequantization, DeviceBytes, Operation, Queue};
use tightfit::model::{Quantization, Tensor};
use tightfit::plan::PartKind;
use tightfit::types::{DType, Format};

/// Elements that are dequantized in one go: whole nested blocks of every size, and at most 8 MiB of scales.
const PIECE: u64 = 1 << 26;

/// The type that a tensor's elements are stored in, which are not quantized.
fn stored_type(tensor: &Tensor<'_>) -> Option<DType> {
    match tensor.format() {
        Format::Stored => Some(tensor.dtype()),
        Format::Cast(to) => Some(to),
        _ => None,
    }
}

fn part(tensor: &Tensor<'_>, kind: PartKind) -> Result<DeviceBytes, CallError> {
    tensor.device_bytes(kind)?.ok_or_else(not_there)
}

fn slice(bytes: &DeviceBytes, offset: u64, len: u64) -> Result<DeviceBytes, CallError> {
    bytes.slice(offset, len).ok_or_else(not_there)
}

impl ProgramCtxView<'_> {
    /// The queue of a buffer's device, if the tensor is there, too, and there is something to do. The range
    /// has been checked.
    fn queue_beside(
        &self,
        model: &Resource<LoadedModel>,
        tensor: u32,
        target: Used<'_>,
    ) -> Result<Option<std::sync::Arc<dyn Queue>>, CallError> {
        let device = self.table.get(model)?.tensor(tensor)?.device();
        let is_here = self.table.get(&target.place.buffer)?.device() == device;
        match is_here {
            true => self.queue_for(&[target]),
            false => Ok(None),
        }
    }

    /// Copies bytes of a part. False, with nothing done, where the device cannot.
    pub(super) fn copy_part_on_device(
        &mut self,
        model: &Resource<LoadedModel>,
        tensor: u32,
        kind: PartKind,
        [start, bytes]: [u64; 2],
        target: &Place,
    ) -> Result<bool, CallError> {
        let used = Used::written(target, bytes, 1);
        let Some(queue) = self.queue_beside(model, tensor, used)? else {
            return Ok(false);
        };
        let source = part(&self.table.get(model)?.tensor(tensor)?, kind)?;
        self.copy_to(&*queue, &source, [start, bytes], target)?;
        Ok(true)
    }

    fn copy_to(
        &mut self,
        queue: &dyn Queue,
        source: &DeviceBytes,
        [start, bytes]: [u64; 2],
        target: &Place,
    ) -> Result<(), CallError> {
        self.in_pieces(bytes, COPIED, |view, from, length| {
            let length = length as u64;
            let operation = Operation::Copy {
                source: slice(source, start + from, length)?,
                target: view.target(target, from, length)?,
            };
            queue.give(&operation)?;
            view.wrote(target, from + length)
        })
    }

    /// Gives elements as numbers. False, with nothing done, where the device has no kernel for it: where
    /// numbers change their type, or the first element does not begin a block.
    pub(super) fn elements_on_device(
        &mut self,
        model: &Resource<LoadedModel>,
        tensor: u32,
        [first, count]: [u64; 2],
        float: FloatType,
        target: &Place,
    ) -> Result<bool, CallError> {
        let each = float.bytes() as u64;
        let used = Used::written(target, count * each, float.bytes());
        let Some(queue) = self.queue_beside(model, tensor, used)? else {
            return Ok(false);
        };
        let queue = &*queue;
        let of = self.table.get(model)?.tensor(tensor)?;
        let Some(how) = of.quantization() else {
            let stored = stored_type(&of).and_then(|dtype| dtype.float_type());
            if stored != Some(float) {
                return Ok(false);
            }
            let source = part(&of, PartKind::Data)?;
            self.copy_to(queue, &source, [first * each, count * each], target)?;
            return Ok(true);
        };
        let block = u64::from(how.block_size);
        if !first.is_multiple_of(block) {
            return Ok(false);
        }
        let codes = part(&of, PartKind::Codes)?;
        let absmax = part(&of, PartKind::Absmax)?;
        let nested = match how.absmax_mean {
            Some(mean) => Some((part(&of, PartKind::NestedAbsmax)?, mean)),
            None => None,
        };
        // A piece may begin inside of the blocks of a nested scale.
        let most = PIECE.min(count) / block + 1 + NESTED_BLOCK_SIZE as u64;
        let scratch = match nested {
            None => None,
            Some(_) => match self.borrow_memory(target, 256 + 4 * most)? {
                Some(memory) => Some(memory),
                None => return Ok(false),
            },
        };
        let worked_in = match &scratch {
            Some(memory) => Some(memory.range(0, memory.bytes())?.ok_or_else(not_there)?),
            None => None,
        };
        if let (Some(memory), Some((_, mean))) = (&worked_in, &nested) {
            queue.write(&slice(memory, 0, 4)?, &mean.to_le_bytes())?;
        }
        self.in_pieces(count, PIECE, |view, from, count| {
            let (start, blocks) = ((first + from) / block, (count as u64).div_ceil(block));
            let absmax = match (&worked_in, &nested) {
                (Some(memory), Some((nested, _))) => {
                    recover(queue, &absmax, nested, memory, [start, blocks])?
                }
                _ => slice(&absmax, 4 * start, 4 * blocks)?,
            };
            view.dequantize_to(
                queue,
                &how,
                &codes,
                absmax,
                [first + from, count as u64],
                float,
                target,
                from,
            )
        })?;
        Ok(true)
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "each is one thing that differs from piece to piece or tensor to tensor"
    )]
    fn dequantize_to(
        &mut self,
        queue: &dyn Queue,
        how: &Quantization,
        codes: &DeviceBytes,
        absmax: DeviceBytes,
        [first, count]: [u64; 2],
        float: FloatType,
        target: &Place,
        from: u64,
    ) -> Result<(), CallError> {
        let (each, elements) = (float.bytes() as u64, count as usize);
        let operation = Operation::Dequantize(Dequantization {
            quant_type: how.quant_type,
            block_size: how.block_size,
            elements,
            codes: slice(codes, first / 2, packed_bytes(elements) as u64)?,
            absmax,
            float,
            target: self.target(target, from * each, count * each)?,
        });
        queue.give(&operation)?;
        self.wrote(target, (from + count) * each)
    }
}

/// Recovers the scales of some blocks, from the nested scale of the first of them on, in memory that begins
/// with their mean.
fn recover(
    queue: &dyn Queue,
    codes: &DeviceBytes,
    nested: &DeviceBytes,
    memory: &DeviceBytes,
    [start, blocks]: [u64; 2],
) -> Result<DeviceBytes, CallError> {
    let group = start / NESTED_BLOCK_SIZE as u64;
    let begin = group * NESTED_BLOCK_SIZE as u64;
    let count = start - begin + blocks;
    let groups = count.div_ceil(NESTED_BLOCK_SIZE as u64);
    let absmax = slice(memory, 256, 4 * count)?;
    queue.give(&Operation::DequantizeAbsmax(AbsmaxRecovery {
        count: count as usize,
        codes: slice(codes, begin, count)?,
        nested: slice(nested, 4 * group, 4 * groups)?,
        mean: slice(memory, 0, 4)?,
        absmax: absmax.clone(),
    }))?;
    slice(&absmax, 4 * (start - begin), 4 * blocks)
}
