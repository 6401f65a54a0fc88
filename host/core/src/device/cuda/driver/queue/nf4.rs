//! NF4 in a queue: the kernels that quantize and dequantize, and bytes.

use tightfit_kernels::cuda::{self, quant_type_argument};

use super::super::stream::Stream;
use super::CudaQueue;
use crate::device::{
    AbsmaxMean, AbsmaxQuantization, AbsmaxRecovery, Dequantization, DeviceBytes, DeviceError,
    Quantization,
};

/// Sums that the last kernel takes.
const LAST_SUMS: usize = 256;

/// The address of a range that has been checked.
fn at(bytes: &DeviceBytes) -> u64 {
    bytes.address().pointer
}

/// Operands have been checked and are kept, and the context is current: what [`super::Queue::give`] does
/// before it comes here.
impl CudaQueue {
    pub(super) fn clear(&self, stream: &Stream, target: &DeviceBytes) -> Result<(), DeviceError> {
        let (context, len) = (self.context(), target.bytes() as usize);
        if len == 0 {
            return Ok(());
        }
        // SAFETY: the bytes lie inside of memory that is kept until the stream is done.
        let code = unsafe { (context.api.cuMemsetD8Async)(at(target), 0, len, stream.raw) };
        context.check("cuMemsetD8Async", target.bytes(), code)
    }

    pub(super) fn copy(
        &self,
        stream: &Stream,
        source: &DeviceBytes,
        target: &DeviceBytes,
    ) -> Result<(), DeviceError> {
        let (context, len) = (self.context(), target.bytes() as usize);
        if len == 0 {
            return Ok(());
        }
        // SAFETY: both ranges are as long, do not overlap and lie inside of memory that is kept until the
        // stream is done.
        let code =
            unsafe { (context.api.cuMemcpyDtoDAsync_v2)(at(target), at(source), len, stream.raw) };
        context.check("cuMemcpyDtoDAsync", target.bytes(), code)
    }

    pub(super) fn quantize(&self, stream: &Stream, of: &Quantization) -> Result<(), DeviceError> {
        if of.elements == 0 {
            return Ok(());
        }
        let launch = self.checked(cuda::quantize_nf4(of.float, of.elements))?;
        let arguments = [
            at(&of.source),
            of.elements as u64,
            u64::from(of.block_size),
            at(&of.codes),
            at(&of.absmax),
            at(&of.nonfinite),
        ];
        // SAFETY: here and below: the arguments that the kernel has, of lengths that have been checked, in
        // memory that is kept until the stream is done.
        unsafe { self.quantizing.launch(stream, launch, arguments) }
    }

    pub(super) fn dequantize(
        &self,
        stream: &Stream,
        of: &Dequantization,
    ) -> Result<(), DeviceError> {
        if of.elements == 0 {
            return Ok(());
        }
        let launch = self.checked(cuda::dequantize(of.float, of.elements))?;
        let arguments = [
            at(&of.codes),
            at(&of.absmax),
            of.elements as u64,
            u64::from(of.block_size),
            u64::from(quant_type_argument(of.quant_type)),
            at(&of.target),
        ];
        // SAFETY: as above.
        unsafe { self.quantizing.launch(stream, launch, arguments) }
    }

    pub(super) fn absmax_mean(&self, stream: &Stream, of: &AbsmaxMean) -> Result<(), DeviceError> {
        let n = of.count;
        let mut sums = at(&of.sums);
        let mut count = cuda::sums(n);
        let mut next = sums + 8 * count as u64;
        let kernels = &self.quantizing;
        if n > 0 {
            let launch = self.checked(cuda::sum_absmax(n))?;
            // SAFETY: as above; sums of sums lie behind the sums.
            unsafe { kernels.launch(stream, launch, [at(&of.absmax), n as u64, sums]) }?;
        }
        while count > LAST_SUMS {
            let launch = self.checked(cuda::sum_sums(count))?;
            // SAFETY: as above. Later sums are fewer than those they take the place of.
            unsafe { kernels.launch(stream, launch, [sums, count as u64, next]) }?;
            (sums, next) = (next, sums);
            count = cuda::sums(count);
        }
        let arguments = [sums, count as u64, n as u64, at(&of.mean)];
        // SAFETY: as above.
        unsafe { kernels.launch(stream, cuda::mean(), arguments) }
    }

    pub(super) fn quantize_absmax(
        &self,
        stream: &Stream,
        of: &AbsmaxQuantization,
    ) -> Result<(), DeviceError> {
        if of.count == 0 {
            return Ok(());
        }
        let launch = self.checked(cuda::quantize_absmax(of.count))?;
        let arguments = [
            at(&of.absmax),
            of.count as u64,
            at(&of.mean),
            at(&of.codes),
            at(&of.nested),
        ];
        // SAFETY: as above.
        unsafe { self.quantizing.launch(stream, launch, arguments) }
    }

    pub(super) fn dequantize_absmax(
        &self,
        stream: &Stream,
        of: &AbsmaxRecovery,
    ) -> Result<(), DeviceError> {
        if of.count == 0 {
            return Ok(());
        }
        let launch = self.checked(cuda::dequantize_absmax(of.count))?;
        let arguments = [
            at(&of.codes),
            of.count as u64,
            at(&of.nested),
            at(&of.mean),
            at(&of.absmax),
        ];
        // SAFETY: as above.
        unsafe { self.quantizing.launch(stream, launch, arguments) }
    }
}
