//! NF4 by a device's own kernels, in its order of work. Ranges have been checked, are aligned, do not overlap
//! and are not empty: [`ProgramCtxView::queue_for`] has looked.

use tightfit_kernels::{BlockSize, FloatType, NESTED_BLOCK_SIZE, QuantType, blocks, packed_bytes};

use super::super::ProgramCtxView;
use super::super::bindings::tightfit::host::buffers::Place;
use super::super::error::CallError;
use super::super::view::not_there;
use crate::memory::Buffer;
use tightfit::device::{
    AbsmaxMean, AbsmaxQuantization, AbsmaxRecovery, Dequantization, DeviceBytes, Operation,
    Quantization, Queue,
};

/// Elements of one operation: whole blocks of every size, in far less than a device does before it is
/// waited for.
const PIECE_ELEMENTS: u64 = 1 << 29;

/// Scales of one operation, a multiple of [`NESTED_BLOCK_SIZE`].
const PIECE_SCALES: u64 = 1 << 29;

/// Bytes for a number that is made on the device and read from there.
const NUMBER: u64 = 8;

/// All of what was taken for a call.
fn whole(buffer: &Buffer) -> Result<DeviceBytes, CallError> {
    part(buffer, 0, buffer.bytes())
}

fn part(buffer: &Buffer, offset: u64, bytes: u64) -> Result<DeviceBytes, CallError> {
    buffer.range(offset, bytes)?.ok_or_else(not_there)
}

impl ProgramCtxView<'_> {
    /// Quantizes; gives the number of blocks that have infinities or NaN. Nothing has been done where there
    /// is no room for that number.
    pub(super) fn quantize_on_device(
        &mut self,
        queue: &dyn Queue,
        elements: u64,
        (float, block_size): (FloatType, BlockSize),
        source: &Place,
        [codes, absmax]: [&Place; 2],
    ) -> Result<Option<u64>, CallError> {
        let Some(count) = self.borrow_memory(source, NUMBER)? else {
            return Ok(None);
        };
        let nonfinite = whole(&count)?;
        queue.give(&Operation::Clear(nonfinite.clone()))?;
        let each = float.bytes() as u64;
        self.in_pieces(elements, PIECE_ELEMENTS, |view, first, elements| {
            let source = view.source(source, first * each, elements as u64 * each)?;
            let nonfinite = nonfinite.clone();
            view.quantize_piece(
                queue,
                [first, elements as u64],
                (float, block_size),
                [source, nonfinite],
                [codes, absmax],
            )
        })?;
        let mut bytes = [0; NUMBER as usize];
        queue.read(&nonfinite, &mut bytes)?;
        Ok(Some(u64::from_le_bytes(bytes)))
    }

    /// The same for numbers of the program's own, which are copied to the device.
    pub(super) fn quantize_bytes_on_device(
        &mut self,
        queue: &dyn Queue,
        source: &[u8],
        (float, block_size): (FloatType, BlockSize),
        [codes, absmax]: [&Place; 2],
    ) -> Result<Option<u64>, CallError> {
        let start = NUMBER.next_multiple_of(256);
        let bytes = start + source.len() as u64;
        let Some(copied) = self.borrow_memory(codes, bytes)? else {
            return Ok(None);
        };
        let nonfinite = part(&copied, 0, NUMBER)?;
        let numbers = part(&copied, start, source.len() as u64)?;
        queue.give(&Operation::Clear(nonfinite.clone()))?;
        queue.write(&numbers, source)?;
        let elements = (source.len() / float.bytes()) as u64;
        self.quantize_piece(
            queue,
            [0, elements],
            (float, block_size),
            [numbers, nonfinite.clone()],
            [codes, absmax],
        )?;
        let mut bytes = [0; NUMBER as usize];
        queue.read(&nonfinite, &mut bytes)?;
        Ok(Some(u64::from_le_bytes(bytes)))
    }

    fn quantize_piece(
        &mut self,
        queue: &dyn Queue,
        [first, elements]: [u64; 2],
        (float, block_size): (FloatType, BlockSize),
        [source, nonfinite]: [DeviceBytes; 2],
        [codes, absmax]: [&Place; 2],
    ) -> Result<(), CallError> {
        let count = elements as usize;
        let code_bytes = packed_bytes(count) as u64;
        let scale_bytes = 4 * blocks(count, block_size) as u64;
        let block = first / block_size.elements() as u64;
        let operation = Operation::Quantize(Quantization {
            float,
            block_size,
            elements: count,
            source,
            codes: self.target(codes, first / 2, code_bytes)?,
            absmax: self.target(absmax, 4 * block, scale_bytes)?,
            nonfinite,
        });
        queue.give(&operation)?;
        self.wrote(codes, first / 2 + code_bytes)?;
        self.wrote(absmax, 4 * block + scale_bytes)
    }

    pub(super) fn dequantize_on_device(
        &mut self,
        queue: &dyn Queue,
        elements: u64,
        (quant_type, float, block_size): (QuantType, FloatType, BlockSize),
        [codes, absmax]: [&Place; 2],
        target: &Place,
    ) -> Result<(), CallError> {
        let each = float.bytes() as u64;
        self.in_pieces(elements, PIECE_ELEMENTS, |view, first, count| {
            let block = first / block_size.elements() as u64;
            let scales = blocks(count, block_size) as u64;
            let bytes = count as u64 * each;
            let operation = Operation::Dequantize(Dequantization {
                quant_type,
                block_size,
                elements: count,
                codes: view.source(codes, first / 2, packed_bytes(count) as u64)?,
                absmax: view.source(absmax, 4 * block, 4 * scales)?,
                float,
                target: view.target(target, first * each, bytes)?,
            });
            queue.give(&operation)?;
            view.wrote(target, first * each + bytes)
        })
    }

    /// Quantizes scales; gives their mean. Nothing has been done where there is no room to compute it.
    pub(super) fn quantize_absmax_on_device(
        &mut self,
        queue: &dyn Queue,
        count: u64,
        absmax: &Place,
        [codes, nested]: [&Place; 2],
    ) -> Result<Option<f32>, CallError> {
        // The mean is of all of them at once.
        let Ok(all) = usize::try_from(count) else {
            return Ok(None);
        };
        let sums = AbsmaxMean::sums_bytes(all);
        let start = NUMBER.next_multiple_of(256);
        let Some(worked_in) = self.borrow_memory(absmax, start + sums)? else {
            return Ok(None);
        };
        let mean = part(&worked_in, 0, 4)?;
        queue.give(&Operation::AbsmaxMean(AbsmaxMean {
            count: all,
            absmax: self.source(absmax, 0, 4 * count)?,
            sums: part(&worked_in, start, sums)?,
            mean: mean.clone(),
        }))?;
        self.in_pieces(count, PIECE_SCALES, |view, first, count| {
            let group = first / NESTED_BLOCK_SIZE as u64;
            let nested_bytes = 4 * count.div_ceil(NESTED_BLOCK_SIZE) as u64;
            let operation = Operation::QuantizeAbsmax(AbsmaxQuantization {
                count,
                absmax: view.source(absmax, 4 * first, 4 * count as u64)?,
                mean: mean.clone(),
                codes: view.target(codes, first, count as u64)?,
                nested: view.target(nested, 4 * group, nested_bytes)?,
            });
            queue.give(&operation)?;
            view.wrote(codes, first + count as u64)?;
            view.wrote(nested, 4 * group + nested_bytes)
        })?;
        let mut bytes = [0; 4];
        queue.read(&mean, &mut bytes)?;
        Ok(Some(f32::from_le_bytes(bytes)))
    }

    /// Recovers scales. False, with nothing done, where there is no room for their mean.
    pub(super) fn recover_absmax_on_device(
        &mut self,
        queue: &dyn Queue,
        count: u64,
        mean: f32,
        [codes, nested]: [&Place; 2],
        absmax: &Place,
    ) -> Result<bool, CallError> {
        let Some(given) = self.borrow_memory(absmax, NUMBER)? else {
            return Ok(false);
        };
        let given = part(&given, 0, 4)?;
        queue.write(&given, &mean.to_le_bytes())?;
        self.in_pieces(count, PIECE_SCALES, |view, first, count| {
            let group = first / NESTED_BLOCK_SIZE as u64;
            let nested_bytes = 4 * count.div_ceil(NESTED_BLOCK_SIZE) as u64;
            let bytes = 4 * count as u64;
            let operation = Operation::DequantizeAbsmax(AbsmaxRecovery {
                count,
                codes: view.source(codes, first, count as u64)?,
                nested: view.source(nested, 4 * group, nested_bytes)?,
                mean: given.clone(),
                absmax: view.target(absmax, 4 * first, bytes)?,
            });
            queue.give(&operation)?;
            view.wrote(absmax, 4 * first + bytes)
        })?;
        Ok(true)
    }
}
