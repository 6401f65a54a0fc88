//! Ranges of loaded tensors: copied as they are, or as numbers, in bounded memory.

use tightfit_kernels::{Float, FloatType, KernelError, Kernels, NESTED_BLOCK_SIZE};

use super::{ModelError, Quantization, Tensor};
use crate::plan::{PartKind, PlannedPart};
use crate::types::{Format, elements};

/// Elements that are converted at once: whole blocks and whole nested blocks of every size.
const PIECE: u64 = 1 << 20;

/// In which form elements are stored.
enum Elements {
    Float(FloatType),
    Quantized(Quantization),
}

impl Tensor<'_> {
    /// Returns whether this range lies in a part.
    ///
    /// # Errors
    /// [`ModelError::NoPart`] and [`ModelError::OutsideTensor`].
    pub fn check_part(
        &self,
        kind: PartKind,
        start: u64,
        bytes: u64,
    ) -> Result<PlannedPart, ModelError> {
        let part = self.planned().part(kind);
        let part = part.ok_or_else(|| ModelError::NoPart {
            tensor: self.name().to_owned(),
            kind,
        })?;
        self.inside("bytes", start, bytes, part.bytes)?;
        Ok(part)
    }

    /// Whether the tensor has these elements.
    ///
    /// # Errors
    /// [`ModelError::OutsideTensor`].
    pub fn check_elements(&self, first: u64, count: u64) -> Result<(), ModelError> {
        let have = elements(self.shape()).unwrap_or(0);
        self.inside("elements", first, count, have)
    }

    fn inside(&self, unit: &'static str, first: u64, n: u64, have: u64) -> Result<(), ModelError> {
        match first.checked_add(n) {
            Some(end) if end <= have => Ok(()),
            end => Err(ModelError::OutsideTensor {
                tensor: self.name().to_owned(),
                unit,
                first,
                end: end.unwrap_or(u64::MAX),
                have,
            }),
        }
    }

    /// Copies bytes of a part from its byte `start` on, wherever it is.
    ///
    /// # Errors
    /// [`ModelError::NoPart`], [`ModelError::OutsideTensor`], and [`ModelError::Device`] when the
    /// device cannot be read.
    pub fn read_part_at(
        &self,
        kind: PartKind,
        start: u64,
        out: &mut [u8],
    ) -> Result<(), ModelError> {
        let part = self.check_part(kind, start, out.len() as u64)?;
        if let Some(reservation) = self.reservation() {
            reservation.read(part.offset + start, out)?;
        }
        Ok(())
    }

    /// Reads the elements from number `first` on, as many as `out` has room for: one row of a matrix, for
    /// example. What they are is as with [`Tensor::to_floats`].
    ///
    /// # Errors
    /// [`ModelError`]: those of [`Tensor::to_floats`], and [`ModelError::OutsideTensor`].
    pub fn read_floats<T: Float>(&self, first: u64, out: &mut [T]) -> Result<(), ModelError> {
        self.to_float_at(first, T::TYPE, bytemuck::cast_slice_mut(out))
    }

    /// The elements from number `first` on as numbers of type `to`, as many as `out` has room for;
    /// otherwise as [`Tensor::to_float`].
    ///
    /// # Errors
    /// [`ModelError`]: those of [`Tensor::to_float`], [`ModelError::OutsideTensor`], and
    /// [`ModelError::Kernel`] when `out` ends inside an element.
    pub fn to_float_at(&self, first: u64, to: FloatType, out: &mut [u8]) -> Result<(), ModelError> {
        if !out.len().is_multiple_of(to.bytes()) {
            return Err(ModelError::Kernel(KernelError::PartialElement {
                float: to,
                need: to.bytes(),
                have: out.len(),
            }));
        }
        let count = (out.len() / to.bytes()) as u64;
        self.check_elements(first, count)?;
        let elements = self.elements()?;
        let mut done = 0;
        while done < count {
            // Up to where a piece ends when the tensor is cut from its beginning.
            let start = first + done;
            let piece = (PIECE - start % PIECE).min(count - done);
            let from = done as usize * to.bytes();
            let out = &mut out[from..from + piece as usize * to.bytes()];
            match &elements {
                Elements::Float(from) => self.cast_piece(start, piece, *from, to, out)?,
                Elements::Quantized(how) => self.dequantize_piece(how, start, piece, to, out)?,
            }
            done += piece;
        }
        Ok(())
    }

    /// What is stored of the elements.
    fn elements(&self) -> Result<Elements, ModelError> {
        if let Some(quantization) = self.quantization() {
            return Ok(Elements::Quantized(quantization));
        }
        let dtype = match self.format() {
            Format::Cast(target) => target,
            Format::Stored | Format::Nf4 { .. } => self.dtype(),
        };
        let float = dtype.float_type().ok_or_else(|| ModelError::NotFloat {
            tensor: self.name().to_owned(),
            dtype,
        })?;
        Ok(Elements::Float(float))
    }

    fn cast_piece(
        &self,
        first: u64,
        count: u64,
        from: FloatType,
        to: FloatType,
        out: &mut [u8],
    ) -> Result<(), ModelError> {
        let each = from.bytes() as u64;
        let mut source = vec![0; (count * each) as usize];
        self.read_part_at(PartKind::Data, first * each, &mut source)?;
        Ok(Kernels::detect().cast(&source, from, to, out)?)
    }

    /// Dequantizes whole blocks, and gives what was asked for of them.
    fn dequantize_piece(
        &self,
        quantization: &Quantization,
        first: u64,
        count: u64,
        to: FloatType,
        out: &mut [u8],
    ) -> Result<(), ModelError> {
        let block_size = quantization.block_size;
        let block = u64::from(block_size);
        let first_block = first / block;
        let start = first_block * block;
        let end = (first + count)
            .next_multiple_of(block)
            .min(elements(self.shape()).unwrap_or(0));
        let mut codes = vec![0; (end.div_ceil(2) - start / 2) as usize];
        self.read_part_at(PartKind::Codes, start / 2, &mut codes)?;
        let blocks = (end - start).div_ceil(block);
        let absmax = self.absmax_piece(quantization, first_block, blocks)?;
        let quant_type = quantization.quant_type;
        let elements = (end - start) as usize;
        let kernels = Kernels::detect();
        let dequantize = |out: &mut [u8]| {
            kernels.dequantize(quant_type, &codes, &absmax, block_size, elements, to, out)
        };
        if elements * to.bytes() == out.len() {
            return Ok(dequantize(out)?);
        }
        let mut whole = vec![0; elements * to.bytes()];
        dequantize(&mut whole)?;
        let skipped = (first - start) as usize * to.bytes();
        out.copy_from_slice(&whole[skipped..skipped + out.len()]);
        Ok(())
    }

    /// The scales of these blocks.
    pub(crate) fn absmax_piece(
        &self,
        quantization: &Quantization,
        first: u64,
        count: u64,
    ) -> Result<Vec<f32>, ModelError> {
        let floats = |kind, first: u64, count: u64| {
            let mut bytes = vec![0; 4 * count as usize];
            self.read_part_at(kind, 4 * first, &mut bytes)?;
            let (chunks, _) = bytes.as_chunks::<4>();
            let floats = chunks.iter().copied().map(f32::from_le_bytes);
            Ok::<Vec<f32>, ModelError>(floats.collect())
        };
        let Some(mean) = quantization.absmax_mean else {
            return floats(PartKind::Absmax, first, count);
        };
        // From the beginning of a nested block on.
        let group = NESTED_BLOCK_SIZE as u64;
        let skipped = first % group;
        let mut codes = vec![0; (skipped + count) as usize];
        self.read_part_at(PartKind::Absmax, first - skipped, &mut codes)?;
        let groups = (skipped + count).div_ceil(group);
        let nested = floats(PartKind::NestedAbsmax, first / group, groups)?;
        let mut absmax = vec![0.0; codes.len()];
        Kernels::detect().dequantize_absmax(&codes, &nested, mean, &mut absmax)?;
        absmax.drain(..skipped as usize);
        Ok(absmax)
    }
}
