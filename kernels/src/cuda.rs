//! The kernels for NVIDIA GPUs: PTX, and how each kernel is launched.
//!
//! The sources are in `kernels/cuda`, and `kernels/cuda/build.sh` compiles them; what it gives is
//! embedded here, so that building needs no CUDA toolkit. The PTX is for GPUs of compute capability
//! 7.5 and later, and for drivers of CUDA 12.0 and later, which compile it when the module is
//! loaded; [`module`] gives machine code for GPUs up to 9.0 instead. The bytes are those of [`crate::Kernels`], special cases included; only the payload of a
//! NaN is not specified.
//!
//! This module does not call CUDA. Its functions say which kernel to launch and with which grid;
//! the table says what the arguments are, in order. Pointers are device addresses.
//!
//! | kernel | arguments |
//! |---|---|
//! | [`quantize_nf4`] | source, elements: u64, block size: u32, packed: \*u8, absmax: \*f32, non-finite blocks: \*u64 |
//! | [`quantize_source`] | codes: \*u8, scales: \*f32, those of [`SourceRun::arguments`]: u32, u64, u32, u32, u32, u32, u32; then as [`quantize_nf4`] from elements on |
//! | [`dequantize`] | packed: \*u8, absmax: \*f32, elements: u64, block size: u32, [`quant_type_argument`]: u32, out |
//! | [`sum_absmax`] | absmax: \*f32, values: u64, sums: \*f64 |
//! | [`sum_sums`] | sums: \*f64, number of them: u64, sums of these: \*f64 |
//! | [`mean`] | sums: \*f64, number of them, at most 256: u32, values that they sum: u64, mean: \*f32 |
//! | [`quantize_absmax`] | absmax: \*f32, values: u64, offset: \*f32, codes: \*u8, nested absmax: \*f32 |
//! | [`dequantize_absmax`] | codes: \*u8, values: u64, nested absmax: \*f32, offset: \*f32, out: \*f32 |
//!
//! Lengths of what the arguments point to are those of the methods of [`crate::Kernels`] that have
//! the same names, in elements of the pointer's type. Source, sums and mean are only read by the
//! kernels that do not produce them; nothing may overlap what a kernel writes. No kernel needs
//! dynamic shared memory.
//!
//! - Sources and outputs hold elements of the [`FloatType`] that the launch is for. Every pointer
//!   is a multiple of the size of its element. The kernels are fast only if source and out are
//!   multiples of 16 and packed is one of 4; else they go element by element. A tensor that begins
//!   at a multiple of 16 may be worked on in pieces that begin at block boundaries: these are
//!   multiples too.
//! - The codes and scales of [`quantize_source`] are [`SourceRun::code_bytes`] and [`SourceRun::scales`].
//!   It is fast only if the columns of rows and tiles are multiples of 8, and codes are multiples of 8
//!   where every row begins.
//! - The number of non-finite blocks is added to what is in its place. The caller sets it to zero,
//!   and may let many launches add to the same place.
//! - The mean of all absmax values of a tensor, [`crate::Kernels::absmax_mean`], is made of sums of
//!   256: [`sum_absmax`], [`sum_sums`] as long as there are more than 256 of them, and [`mean`].
//!   The [`sums`] of `n` values are `n / 256`, rounded up.
//!
//! Products are in [`linear`], those with stacks of experts in [`experts`], and what a decoder computes between
//! them in [`decoder`]; all have modules of their
//! own.

pub mod decoder;
pub mod experts;
pub mod linear;
mod sources;

pub use sources::{SourceRun, quantize_source};

use crate::{FloatType, KernelError, NESTED_BLOCK_SIZE, QuantType};

/// The kernels, to be given to `cuModuleLoadData`, which compiles them.
pub const PTX: &str = include_str!("../cuda/nf4.ptx");

/// Machine code of [`PTX`].
const MACHINE_CODE: [linear::MachineCode; 3] = [
    (
        (7, 5),
        (7, 9),
        include_bytes!("../cuda/nf4.sm_75.cubin.zlib"),
    ),
    (
        (8, 0),
        (8, 9),
        include_bytes!("../cuda/nf4.sm_80.cubin.zlib"),
    ),
    (
        (9, 0),
        (9, 9),
        include_bytes!("../cuda/nf4.sm_90.cubin.zlib"),
    ),
];

/// Returns the kernels of [`KERNELS`] for a compute capability, to be given to `cuModuleLoadData`: machine
/// code where there is some, else [`PTX`] with a zero at its end, which the driver compiles. They are
/// decompressed at every call.
///
/// # Errors
/// [`KernelError::ComputeCapability`] below 7.5.
pub fn module(compute_capability: (u32, u32)) -> Result<Vec<u8>, KernelError> {
    let code = linear::machine_code_of(compute_capability, &MACHINE_CODE)?;
    Ok(code.unwrap_or_else(|| [PTX.as_bytes(), b"\0"].concat()))
}

/// Every kernel in [`PTX`].
pub const KERNELS: [&str; 13] = [
    "tightfit_quantize_nf4_f32",
    "tightfit_quantize_nf4_f16",
    "tightfit_quantize_nf4_bf16",
    "tightfit_quantize_source_f16",
    "tightfit_quantize_source_bf16",
    "tightfit_dequantize_f32",
    "tightfit_dequantize_f16",
    "tightfit_dequantize_bf16",
    "tightfit_sum_absmax",
    "tightfit_sum_sums",
    "tightfit_mean",
    "tightfit_quantize_absmax",
    "tightfit_dequantize_absmax",
];

/// Threads of a thread block.
const THREADS: u32 = 256;

/// Threads that work together on one group of 256 values.
const WARP: u32 = 32;

/// Elements that a thread block quantizes: four vectors of 8 for each thread, a multiple of every block
/// size.
const QUANTIZED_ELEMENTS: usize = 32 * THREADS as usize;

/// The largest grid in its first dimension.
const MAX_GRID: usize = i32::MAX as usize;

/// A kernel and the shape of its launch. Grid and thread blocks have one dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// The name of the kernel in [`PTX`].
    pub kernel: &'static str,
    /// Thread blocks; never 0, which CUDA does not accept: with nothing to do, one does nothing.
    pub grid: u32,
    /// Threads of each.
    pub threads: u32,
}

impl Launch {
    /// A launch of as many thread blocks as are needed if each does `tile` of the elements.
    fn new(kernel: &'static str, elements: usize, tile: usize) -> Result<Launch, KernelError> {
        let blocks = elements.div_ceil(tile).max(1);
        match u32::try_from(blocks) {
            Ok(grid) if blocks <= MAX_GRID => Ok(Launch {
                kernel,
                grid,
                threads: THREADS,
            }),
            _ => Err(KernelError::Launch {
                kernel,
                most: MAX_GRID.saturating_mul(tile),
                have: elements,
            }),
        }
    }
}

/// Quantizes this many elements to NF4: [`crate::Kernels::quantize_nf4`].
///
/// # Errors
/// [`KernelError::Launch`] if there are too many elements for one launch, as in every function
/// here. It takes a tensor of 2^43 elements or more.
pub fn quantize_nf4(float: FloatType, elements: usize) -> Result<Launch, KernelError> {
    let kernel = match float {
        FloatType::F32 => "tightfit_quantize_nf4_f32",
        FloatType::F16 => "tightfit_quantize_nf4_f16",
        FloatType::Bf16 => "tightfit_quantize_nf4_bf16",
    };
    Launch::new(kernel, elements, QUANTIZED_ELEMENTS)
}

/// Dequantizes this many elements: [`crate::Kernels::dequantize`].
///
/// # Errors
/// [`KernelError::Launch`] if there are too many.
pub fn dequantize(float: FloatType, elements: usize) -> Result<Launch, KernelError> {
    let kernel = match float {
        FloatType::F32 => "tightfit_dequantize_f32",
        FloatType::F16 => "tightfit_dequantize_f16",
        FloatType::Bf16 => "tightfit_dequantize_bf16",
    };
    // Four vectors of 16 bytes for each thread.
    let tile = 4 * 16 / float.bytes() * THREADS as usize;
    Launch::new(kernel, elements, tile)
}

/// Returns what [`dequantize`]'s kernels take for the 4-bit format.
pub const fn quant_type_argument(quant_type: QuantType) -> u32 {
    match quant_type {
        QuantType::Nf4 => 0,
        QuantType::Fp4 => 1,
    }
}

/// Returns how many sums [`sum_absmax`] and [`sum_sums`] write for this many values.
pub const fn sums(values: usize) -> usize {
    values.div_ceil(NESTED_BLOCK_SIZE)
}

/// Sums groups of 256 absmax values: the first step to their mean.
///
/// # Errors
/// [`KernelError::Launch`] if there are too many.
pub fn sum_absmax(values: usize) -> Result<Launch, KernelError> {
    Launch::new("tightfit_sum_absmax", values, groups_of_a_block())
}

/// Sums groups of 256 sums.
///
/// # Errors
/// [`KernelError::Launch`] if there are too many.
pub fn sum_sums(values: usize) -> Result<Launch, KernelError> {
    Launch::new("tightfit_sum_sums", values, groups_of_a_block())
}

/// Returns the mean, of at most 256 sums: [`crate::Kernels::absmax_mean`].
pub const fn mean() -> Launch {
    Launch {
        kernel: "tightfit_mean",
        grid: 1,
        threads: WARP,
    }
}

/// Quantizes this many absmax values to 8 bits: [`crate::Kernels::quantize_absmax`].
///
/// # Errors
/// [`KernelError::Launch`] if there are too many.
pub fn quantize_absmax(values: usize) -> Result<Launch, KernelError> {
    Launch::new("tightfit_quantize_absmax", values, groups_of_a_block())
}

/// Recovers this many absmax values: [`crate::Kernels::dequantize_absmax`].
///
/// # Errors
/// [`KernelError::Launch`] if there are too many.
pub fn dequantize_absmax(values: usize) -> Result<Launch, KernelError> {
    Launch::new("tightfit_dequantize_absmax", values, 8 * THREADS as usize)
}

/// Values of a thread block in which each warp does a group of 256.
const fn groups_of_a_block() -> usize {
    (THREADS / WARP) as usize * NESTED_BLOCK_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ptx_has_the_kernels_and_no_others() {
        let entries: Vec<&str> = PTX
            .lines()
            .filter_map(|line| line.strip_prefix(".visible .entry "))
            .map(|line| line.trim_end_matches('('))
            .collect();
        assert_eq!(entries, KERNELS);
        // What building anywhere gives, for every GPU since Turing.
        assert!(PTX.contains("\n.target sm_75\n") && PTX.contains("\n.version 8.0\n"));
        assert!(PTX.len() < 500_000 && !PTX.contains(env!("CARGO_MANIFEST_DIR")));
    }

    #[test]
    fn the_ptx_rounds_every_operation_by_itself() {
        for inexact in ["fma.", "mad.f", "mad.rn.f", ".ftz", ".approx", "div.full"] {
            assert!(!PTX.contains(inexact), "{inexact}");
        }
    }

    #[test]
    fn launches_cover_all_elements_and_are_never_empty() {
        let grid = |elements| quantize_nf4(FloatType::Bf16, elements).map(|launch| launch.grid);
        assert_eq!(grid(0), Ok(1));
        assert_eq!(grid(8192), Ok(1));
        assert_eq!(grid(8193), Ok(2));
        assert_eq!(grid(MAX_GRID * 8192), Ok(MAX_GRID as u32));
        assert_eq!(
            grid(MAX_GRID * 8192 + 1),
            Err(KernelError::Launch {
                kernel: "tightfit_quantize_nf4_bf16",
                most: MAX_GRID * 8192,
                have: MAX_GRID * 8192 + 1,
            })
        );
        assert!(grid(usize::MAX).is_err());
        for (float, tile) in [
            (FloatType::F32, 4096),
            (FloatType::F16, 8192),
            (FloatType::Bf16, 8192),
        ] {
            let grid = |elements| dequantize(float, elements).map(|launch| launch.grid);
            assert_eq!((grid(tile), grid(tile + 1)), (Ok(1), Ok(2)));
        }
        assert_eq!(sum_absmax(2048).map(|launch| launch.grid), Ok(1));
        assert_eq!(sum_sums(2049).map(|launch| launch.grid), Ok(2));
        assert_eq!(quantize_absmax(2049).map(|launch| launch.grid), Ok(2));
        assert_eq!(dequantize_absmax(2049).map(|launch| launch.grid), Ok(2));
        assert_eq!((sums(0), sums(256), sums(257)), (0, 1, 2));
    }
}
