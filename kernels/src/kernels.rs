//! The entry point: checks lengths, and sends each call to the code for the instruction set.

use crate::{
    BlockSize, FloatType, Isa, KernelError, NESTED_BLOCK_SIZE, QuantType, SourceMatrix, SourceRows,
    blocks, code_values, dequantize, double, error::check_length, float, packed_bytes, quantize,
    sources,
};

/// Runs one function of the module for the instruction set.
macro_rules! dispatch {
    ($isa:expr, $portable:expr, $function:ident($($argument:expr),*)) => {
        match $isa {
            Isa::Portable => $portable,
            // SAFETY: a `Kernels` is only made for an instruction set that has been found on this
            // machine.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { crate::x86::avx2::$function($($argument),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { crate::x86::avx512::$function($($argument),*) },
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 => unreachable!("never available on this architecture"),
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => unsafe { crate::arm::neon::$function($($argument),*) },
            #[cfg(not(target_arch = "aarch64"))]
            Isa::Neon => unreachable!("never available on this architecture"),
        }
    };
}

/// The kernels, for one instruction set that this machine has. Whichever it is, the results are the
/// same bytes; only the payload of a NaN is not specified, and products ([`Kernels::linear`]) differ
/// by their rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kernels {
    isa: Isa,
}

/// What quantizing found on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QuantizeStats {
    /// Blocks that hold at least one infinity or NaN.
    pub nonfinite_blocks: u64,
}

impl Default for Kernels {
    fn default() -> Self {
        Kernels::detect()
    }
}

impl Kernels {
    /// Returns the kernels for one instruction set.
    ///
    /// # Errors
    /// [`KernelError::IsaUnavailable`] if this machine does not have it.
    pub fn new(isa: Isa) -> Result<Kernels, KernelError> {
        if isa.is_available() {
            Ok(Kernels { isa })
        } else {
            Err(KernelError::IsaUnavailable { isa })
        }
    }

    /// Returns the fastest kernels of this machine.
    pub fn detect() -> Kernels {
        Kernels { isa: Isa::detect() }
    }

    /// Returns the instruction set.
    pub fn isa(self) -> Isa {
        self.isa
    }

    /// Quantizes to NF4.
    ///
    /// - `source`: `n` elements of type `float`, little-endian, at any alignment; a tensor is
    ///   flattened in row-major order, and blocks run across the ends of rows.
    /// - `packed`: [`packed_bytes`]`(n)` bytes. Element `2i` goes to the high half of byte `i`,
    ///   element `2i + 1` to the low half; for odd `n` the spare half gets the code of zero.
    /// - `absmax`: [`blocks`]`(n, block_size)` values, one for each block.
    ///
    /// A tensor may be quantized in pieces that begin at block boundaries: the bytes are the same.
    ///
    /// Each element is converted to `f32`, multiplied with the correctly rounded reciprocal of the
    /// largest magnitude of its block, and gets the number of [`crate::NF4_THRESHOLDS`] strictly
    /// below the product as its code. Subnormals, as an element, as the absmax and as the
    /// reciprocal, are zeros. It follows that
    /// - a block of zeros has absmax 0.0 and codes 0, which dequantize to -0.0;
    /// - a block with an absmax above 2^126 has codes 7, because the reciprocal is subnormal;
    /// - a block with an infinity has absmax infinity, code 0 for infinities and 7 for what is
    ///   finite;
    /// - NaN has code 0 and does not count in the absmax, which is -`f32::MAX` where all elements
    ///   are NaN, or 0.0 if that block is the partial one at the end.
    ///
    /// This is what the CUDA kernels of bitsandbytes 0.50 do (`kQuantizeBlockwise` compiled with
    /// fast math), except that they approximate the reciprocal within one ulp.
    ///
    /// # Errors
    /// [`KernelError::PartialElement`] and [`KernelError::Length`] if the lengths do not belong
    /// together.
    pub fn quantize_nf4(
        self,
        source: &[u8],
        float: FloatType,
        block_size: BlockSize,
        packed: &mut [u8],
        absmax: &mut [f32],
    ) -> Result<QuantizeStats, KernelError> {
        let elements = elements(source, float)?;
        check_length("packed", packed_bytes(elements), packed.len())?;
        check_length("absmax", blocks(elements, block_size), absmax.len())?;
        let block_size = block_size.elements();
        let nonfinite_blocks = dispatch!(
            self.isa,
            quantize::quantize_nf4(source, float, block_size, packed, absmax),
            quantize_nf4(source, float, block_size, packed, absmax)
        );
        Ok(QuantizeStats { nonfinite_blocks })
    }

    /// Dequantizes NF4 or FP4: the value of the code times the absmax of the block, one `f32`
    /// multiplication, rounded once to `float`, to nearest even. Subnormals are kept.
    ///
    /// - `packed`, `absmax`: as [`Kernels::quantize_nf4`] writes them, for `elements` elements.
    /// - `out`: `elements` elements of type `float`, little-endian, at any alignment.
    ///
    /// A piece of a tensor that begins at a block boundary is dequantized by passing the slices
    /// that belong to it.
    ///
    /// # Errors
    /// [`KernelError::Length`] if the lengths do not belong together.
    #[expect(
        clippy::too_many_arguments,
        reason = "each is one thing that a caller has to decide"
    )]
    pub fn dequantize(
        self,
        quant_type: QuantType,
        packed: &[u8],
        absmax: &[f32],
        block_size: BlockSize,
        elements: usize,
        float: FloatType,
        out: &mut [u8],
    ) -> Result<(), KernelError> {
        check_length("packed", packed_bytes(elements), packed.len())?;
        check_length("absmax", blocks(elements, block_size), absmax.len())?;
        check_length("out", elements.saturating_mul(float.bytes()), out.len())?;
        let (values, block_size) = (code_values(quant_type), block_size.elements());
        dispatch!(
            self.isa,
            dequantize::dequantize(values, packed, absmax, block_size, float, out),
            dequantize(values, packed, absmax, block_size, float, out)
        );
        Ok(())
    }

    /// Returns the mean of the absmax values of a whole tensor, the offset of double quantization;
    /// 0.0 if there are none.
    ///
    /// bitsandbytes lets torch compute it in `f32`, in an order that depends on the device and the
    /// number of threads. Here it is defined so that every device can give the same bits: in `f64`,
    /// the values are padded with +0.0 to a multiple of 256 and cut into groups of 256; in each
    /// group, value `i` becomes value `i` plus value `i + 128` for `i < 128`, then the same with
    /// 64, 32, ... 1; the sums of the groups are summed in the same way until one value is left. It
    /// is divided by the number of values, and the quotient rounded to `f32`.
    pub fn absmax_mean(self, absmax: &[f32]) -> f32 {
        dispatch!(
            self.isa,
            double::mean(absmax, double::group_sum),
            absmax_mean(absmax)
        )
    }

    /// Quantizes absmax values to 8 bits: `absmax - offset`, in blocks of 256, to the nearest value
    /// of [`crate::DYNAMIC_MAP`].
    ///
    /// - `offset`: [`Kernels::absmax_mean`] of the whole tensor.
    /// - `codes`: as many as `absmax`.
    /// - `nested_absmax`: one for every [`NESTED_BLOCK_SIZE`] of them, rounded up.
    ///
    /// As in [`Kernels::quantize_nf4`], differences are multiplied with the reciprocal of the
    /// block's largest magnitude, and subnormals are zeros. Nearest is by the `f32` midpoint of two
    /// values; on the midpoint it is the value that CUDA's search ends at. Where all differences of
    /// a block are zero, nested absmax is 0.0 and codes are 0. Pieces may begin at multiples of
    /// 256.
    ///
    /// # Errors
    /// [`KernelError::Length`] if the lengths do not belong together.
    pub fn quantize_absmax(
        self,
        absmax: &[f32],
        offset: f32,
        codes: &mut [u8],
        nested_absmax: &mut [f32],
    ) -> Result<(), KernelError> {
        check_length("codes", absmax.len(), codes.len())?;
        check_length(
            "nested_absmax",
            absmax.len().div_ceil(NESTED_BLOCK_SIZE),
            nested_absmax.len(),
        )?;
        dispatch!(
            self.isa,
            double::quantize(absmax, offset, codes, nested_absmax, double::plain_codes),
            quantize_absmax(absmax, offset, codes, nested_absmax)
        );
        Ok(())
    }

    /// Recovers absmax values from their 8-bit codes: the value of the code times the nested
    /// absmax, rounded to `f32`, plus `offset`, rounded again. Arguments as in
    /// [`Kernels::quantize_absmax`]; `out` has as many values as `codes`.
    ///
    /// # Errors
    /// [`KernelError::Length`] if the lengths do not belong together.
    pub fn dequantize_absmax(
        self,
        codes: &[u8],
        nested_absmax: &[f32],
        offset: f32,
        out: &mut [f32],
    ) -> Result<(), KernelError> {
        check_length(
            "nested_absmax",
            codes.len().div_ceil(NESTED_BLOCK_SIZE),
            nested_absmax.len(),
        )?;
        check_length("out", codes.len(), out.len())?;
        dispatch!(
            self.isa,
            double::dequantize(codes, nested_absmax, offset, out),
            dequantize_absmax(codes, nested_absmax, offset, out)
        );
        Ok(())
    }

    /// Converts between float types: exactly where possible, else rounded to nearest even. Overflow
    /// becomes infinity; subnormals are kept; NaN stays NaN. Conversion to the same type copies the
    /// bytes.
    ///
    /// - `source`: `n` elements of type `from`; `out`: `n` elements of type `to`; little-endian, at
    ///   any alignment.
    ///
    /// # Errors
    /// [`KernelError::PartialElement`] and [`KernelError::Length`] if the lengths do not belong
    /// together.
    pub fn cast(
        self,
        source: &[u8],
        from: FloatType,
        to: FloatType,
        out: &mut [u8],
    ) -> Result<(), KernelError> {
        let elements = elements(source, from)?;
        check_length("out", elements.saturating_mul(to.bytes()), out.len())?;
        if from == to {
            out.copy_from_slice(source);
        } else {
            dispatch!(
                self.isa,
                float::cast(source, from, to, out),
                cast(source, from, to, out)
            );
        }
        Ok(())
    }
}

impl Kernels {
    /// Decodes rows of weights that another method has stored with a scale for each tile: a code's value
    /// times its scale in f32, rounded once to `to`. To bf16 these are the weights that programs
    /// compute with which load such checkpoints, and what NF4 is made of.
    ///
    /// `out` holds as many elements of type `to`, little-endian, at any alignment.
    ///
    /// ```
    /// use tightfit_kernels::{
    ///     FloatType, Kernels, SourceCodes, SourceMatrix, SourceRows, SourceScale,
    /// };
    ///
    /// // One row of MXFP4: 1.0, -6.0 and zeros, times 2^1.
    /// let matrix = SourceMatrix {
    ///     codes: SourceCodes::F4E2M1,
    ///     columns: 32,
    ///     tile: [1, 32],
    ///     scale: SourceScale::E8M0,
    /// };
    /// let mut codes = [0u8; 16];
    /// codes[0] = 0xf2;
    /// let rows = SourceRows {
    ///     first: 0,
    ///     codes: &codes,
    ///     scales: &[128],
    ///     zeros: &[],
    /// };
    /// let mut out = [0u8; 128];
    /// Kernels::detect().decode(&matrix, &rows, FloatType::F32, &mut out)?;
    /// assert_eq!(out[..8], [2f32.to_le_bytes(), (-12f32).to_le_bytes()].concat());
    /// # Ok::<(), tightfit_kernels::KernelError>(())
    /// ```
    ///
    /// # Errors
    /// [`KernelError::SourceTile`], and [`KernelError::Length`] if the lengths do not belong together.
    pub fn decode(
        self,
        matrix: &SourceMatrix,
        rows: &SourceRows<'_>,
        to: FloatType,
        out: &mut [u8],
    ) -> Result<(), KernelError> {
        sources::check(matrix, rows, to, out)?;
        dispatch!(
            self.isa,
            sources::decode(matrix, rows, to, out),
            decode(matrix, rows, to, out)
        );
        Ok(())
    }
}

/// The number of elements in a source.
fn elements(source: &[u8], float: FloatType) -> Result<usize, KernelError> {
    let (need, have) = (float.bytes(), source.len());
    if have.is_multiple_of(need) {
        Ok(have / need)
    } else {
        Err(KernelError::PartialElement { float, need, have })
    }
}
