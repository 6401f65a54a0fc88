//! The interface `nf4`: by the kernels of the device that the buffers are on, else by the processor's,
//! piece by piece. Both give the same bytes.

mod on_device;

use tightfit_kernels::{AbsmaxMean, BlockSize, FloatType, NESTED_BLOCK_SIZE, blocks, packed_bytes};

use super::ProgramCtxView;
use super::bindings::tightfit::host::{buffers::Place, nf4, types};
use super::error::CallError;
use super::view::{PIECE, Used, element_bytes, list_bytes};
use crate::wit::convert;

/// Elements that are quantized or dequantized at once: whole blocks of every size, and at most
/// [`PIECE`] bytes.
const PIECE_ELEMENTS: u64 = (PIECE / 4) as u64;

/// Scales that are quantized or dequantized at once, a multiple of [`NESTED_BLOCK_SIZE`].
const PIECE_SCALES: u64 = (PIECE / 4) as u64;

/// Returns the kernels' name of a type that a program has given.
pub(super) fn float(given: types::Dtype) -> Result<FloatType, CallError> {
    let dtype = convert::dtype(given);
    dtype.float_type().ok_or_else(|| {
        CallError::unsupported(format_args!(
            "{dtype} numbers are not converted: only bf16, f16 and f32"
        ))
    })
}

pub(super) fn block_size(given: u32) -> Result<BlockSize, CallError> {
    let size = usize::try_from(given).ok();
    let size = size.and_then(|size| BlockSize::new(size).ok());
    size.ok_or_else(|| {
        CallError::invalid(format_args!(
            "block size {given} is not a power of two from 32 to 4096"
        ))
    })
}

impl ProgramCtxView<'_> {
    /// Quantizes numbers that `source` gives piece by piece: the first it is to give, and where to.
    fn quantize_from(
        &mut self,
        elements: u64,
        float: FloatType,
        block_size: BlockSize,
        [codes, absmax]: [&Place; 2],
        mut source: impl FnMut(&Self, u64, &mut [u8]) -> Result<(), CallError>,
    ) -> Result<u64, CallError> {
        let mut nonfinite = 0;
        let (mut numbers, mut packed, mut scales) = (vec![], vec![], vec![]);
        self.in_pieces(elements, PIECE_ELEMENTS, |view, first, count| {
            numbers.resize(count * float.bytes(), 0);
            packed.resize(packed_bytes(count), 0);
            scales.resize(blocks(count, block_size), 0.0);
            source(view, first, &mut numbers)?;
            let kernels = view.context.kernels;
            let stats =
                kernels.quantize_nf4(&numbers, float, block_size, &mut packed, &mut scales)?;
            nonfinite += stats.nonfinite_blocks;
            view.store(codes, first / 2, &packed)?;
            let block = first / block_size.elements() as u64;
            view.store(absmax, 4 * block, bytemuck::cast_slice(&scales))
        })?;
        Ok(nonfinite)
    }
}

/// Returns the bytes of the codes and the scales of `elements` elements.
fn quantized_bytes(elements: u64, block_size: BlockSize) -> Result<[u64; 2], CallError> {
    let blocks = elements.div_ceil(block_size.elements() as u64);
    Ok([elements.div_ceil(2), element_bytes(blocks, 4)?])
}

impl nf4::Host for ProgramCtxView<'_> {
    fn quantize(
        &mut self,
        source: Place,
        dtype: types::Dtype,
        elements: u64,
        block: u32,
        codes: Place,
        absmax: Place,
    ) -> Result<u64, CallError> {
        self.begin()?;
        let (float, block) = (float(dtype)?, block_size(block)?);
        let [code_bytes, absmax_bytes] = quantized_bytes(elements, block)?;
        let source_bytes = element_bytes(elements, float.bytes())?;
        let queue = self.queue_for(&[
            Used::read(&source, source_bytes, float.bytes()),
            Used::written(&codes, code_bytes, 1),
            Used::written(&absmax, absmax_bytes, 4),
        ])?;
        let what = (float, block);
        if let Some(queue) = queue
            && let Some(nonfinite) =
                self.quantize_on_device(&*queue, elements, what, &source, [&codes, &absmax])?
        {
            return Ok(nonfinite);
        }
        let each = float.bytes() as u64;
        self.quantize_from(
            elements,
            float,
            block,
            [&codes, &absmax],
            |view, first, out| view.fetch(&source, first * each, out),
        )
    }

    fn quantize_bytes(
        &mut self,
        source: Vec<u8>,
        dtype: types::Dtype,
        block: u32,
        codes: Place,
        absmax: Place,
    ) -> Result<u64, CallError> {
        self.begin()?;
        let (float, block) = (float(dtype)?, block_size(block)?);
        list_bytes(source.len() as u64)?;
        if !source.len().is_multiple_of(float.bytes()) {
            return Err(CallError::invalid(format_args!(
                "{} bytes are no whole number of elements",
                source.len()
            )));
        }
        let elements = (source.len() / float.bytes()) as u64;
        let [code_bytes, absmax_bytes] = quantized_bytes(elements, block)?;
        let queue = self.queue_for(&[
            Used::written(&codes, code_bytes, 1),
            Used::written(&absmax, absmax_bytes, 4),
        ])?;
        let what = (float, block);
        if let Some(queue) = queue
            && let Some(nonfinite) =
                self.quantize_bytes_on_device(&*queue, &source, what, [&codes, &absmax])?
        {
            return Ok(nonfinite);
        }
        self.quantize_from(
            elements,
            float,
            block,
            [&codes, &absmax],
            |_, first, out| {
                let start = first as usize * float.bytes();
                out.copy_from_slice(&source[start..start + out.len()]);
                Ok(())
            },
        )
    }

    fn dequantize(
        &mut self,
        quant_type: types::QuantType,
        codes: Place,
        absmax: Place,
        elements: u64,
        block: u32,
        dtype: types::Dtype,
        target: Place,
    ) -> Result<(), CallError> {
        self.begin()?;
        let (float, block) = (float(dtype)?, block_size(block)?);
        let quant_type = convert::quant_type(quant_type);
        let [code_bytes, absmax_bytes] = quantized_bytes(elements, block)?;
        let each = float.bytes() as u64;
        let queue = self.queue_for(&[
            Used::read(&codes, code_bytes, 1),
            Used::read(&absmax, absmax_bytes, 4),
            Used::written(
                &target,
                element_bytes(elements, float.bytes())?,
                float.bytes(),
            ),
        ])?;
        if let Some(queue) = queue {
            let what = (quant_type, float, block);
            let places = [&codes, &absmax];
            return self.dequantize_on_device(&*queue, elements, what, places, &target);
        }
        let (mut packed, mut scales, mut numbers) = (vec![], vec![0f32; 0], vec![]);
        self.in_pieces(elements, PIECE_ELEMENTS, |view, first, count| {
            packed.resize(packed_bytes(count), 0);
            scales.resize(blocks(count, block), 0.0);
            numbers.resize(count * float.bytes(), 0);
            view.fetch(&codes, first / 2, &mut packed)?;
            let first_block = first / block.elements() as u64;
            let bytes = bytemuck::cast_slice_mut(&mut scales);
            view.fetch(&absmax, 4 * first_block, bytes)?;
            let kernels = view.context.kernels;
            kernels.dequantize(
                quant_type,
                &packed,
                &scales,
                block,
                count,
                float,
                &mut numbers,
            )?;
            view.store(&target, first * each, &numbers)
        })
    }

    fn quantize_absmax(
        &mut self,
        absmax: Place,
        count: u64,
        codes: Place,
        nested_absmax: Place,
    ) -> Result<f32, CallError> {
        self.begin()?;
        let nested = count.div_ceil(NESTED_BLOCK_SIZE as u64);
        let queue = self.queue_for(&[
            Used::read(&absmax, element_bytes(count, 4)?, 4),
            Used::written(&codes, count, 1),
            Used::written(&nested_absmax, element_bytes(nested, 4)?, 4),
        ])?;
        if let Some(queue) = queue
            && let Some(mean) =
                self.quantize_absmax_on_device(&*queue, count, &absmax, [&codes, &nested_absmax])?
        {
            return Ok(mean);
        }
        let mut scales = vec![0f32; count.min(PIECE_SCALES) as usize];
        let mut mean = AbsmaxMean::default();
        self.in_pieces(count, PIECE_SCALES, |view, first, count| {
            let scales = &mut scales[..count];
            view.fetch(&absmax, 4 * first, bytemuck::cast_slice_mut(scales))?;
            mean.add(scales);
            Ok(())
        })?;
        let mean = mean.mean();
        let (mut bytes, mut nested) = (vec![], vec![0f32; 0]);
        self.in_pieces(count, PIECE_SCALES, |view, first, count| {
            let scales = &mut scales[..count];
            view.fetch(&absmax, 4 * first, bytemuck::cast_slice_mut(scales))?;
            bytes.resize(count, 0);
            nested.resize(count.div_ceil(NESTED_BLOCK_SIZE), 0.0);
            let kernels = view.context.kernels;
            kernels.quantize_absmax(scales, mean, &mut bytes, &mut nested)?;
            view.store(&codes, first, &bytes)?;
            let group = first / NESTED_BLOCK_SIZE as u64;
            view.store(&nested_absmax, 4 * group, bytemuck::cast_slice(&nested))
        })?;
        Ok(mean)
    }

    fn dequantize_absmax(
        &mut self,
        codes: Place,
        nested_absmax: Place,
        mean: f32,
        count: u64,
        absmax: Place,
    ) -> Result<(), CallError> {
        self.begin()?;
        let nested = count.div_ceil(NESTED_BLOCK_SIZE as u64);
        let queue = self.queue_for(&[
            Used::read(&codes, count, 1),
            Used::read(&nested_absmax, element_bytes(nested, 4)?, 4),
            Used::written(&absmax, element_bytes(count, 4)?, 4),
        ])?;
        let places = [&codes, &nested_absmax];
        if let Some(queue) = queue
            && self.recover_absmax_on_device(&*queue, count, mean, places, &absmax)?
        {
            return Ok(());
        }
        let (mut bytes, mut nested, mut scales) = (vec![], vec![0f32; 0], vec![0f32; 0]);
        self.in_pieces(count, PIECE_SCALES, |view, first, count| {
            bytes.resize(count, 0);
            nested.resize(count.div_ceil(NESTED_BLOCK_SIZE), 0.0);
            scales.resize(count, 0.0);
            view.fetch(&codes, first, &mut bytes)?;
            let group = first / NESTED_BLOCK_SIZE as u64;
            view.fetch(
                &nested_absmax,
                4 * group,
                bytemuck::cast_slice_mut(&mut nested),
            )?;
            let kernels = view.context.kernels;
            kernels.dequantize_absmax(&bytes, &nested, mean, &mut scales)?;
            view.store(&absmax, 4 * first, bytemuck::cast_slice(&scales))
        })
    }
}
