//! NF4 arithmetic, with one meaning on every device.
//!
//! Weights are quantized block by block to 4-bit codes and one `f32` scale (absmax) per block, and
//! the scales can themselves be quantized to 8 bits (double quantization). The bytes are those that
//! bitsandbytes' CUDA kernels give, including for blocks with zeros, subnormals, infinities and
//! NaN, whichever instruction set computes them: portable Rust, AVX2, AVX-512 or
//! NEON.
//!
//! Products with such weights, [`Kernels::linear`], take them as they lie, and so do layers of experts,
//! [`Kernels::experts`]. Weights that other methods
//! have stored (FP8, MXFP4, int4) are decoded by [`Kernels::decode`], to be quantized. What a decoder computes
//! between its products is in [`decoder`].
//!
//! [`Kernels`] is the entry point. It knows no files and no devices: sources are little-endian
//! bytes at any alignment, as they come out of a safetensors file, and results go to slices of the
//! caller. [`cuda`] holds the same kernels for GPUs.
//!
//! ```
//! use tightfit_kernels::{BlockSize, FloatType, Kernels};
//!
//! let weights: Vec<u8> = [0.5f32, -1.0, 0.25].iter().flat_map(|x| x.to_le_bytes()).collect();
//! let (mut packed, mut absmax) = ([0u8; 2], [0f32; 1]);
//! let kernels = Kernels::detect();
//! let (float, size) = (FloatType::F32, BlockSize::DEFAULT);
//! let stats = kernels.quantize_nf4(&weights, float, size, &mut packed, &mut absmax)?;
//! assert_eq!((packed, absmax, stats.nonfinite_blocks), ([0xc0, 0xa7], [1.0], 0));
//! # Ok::<(), tightfit_kernels::KernelError>(())
//! ```
#![deny(missing_docs)]

#[cfg(target_arch = "aarch64")]
mod arm;
mod buckets;
pub mod cuda;
pub mod decoder;
mod dequantize;
mod double;
mod error;
mod experts;
mod float;
mod formats;
mod isa;
mod kernels;
mod linear;
mod mean;
mod quantize;
mod sources;
mod tables;
mod threads;
mod transposed;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use error::KernelError;
pub use experts::{
    Activation, Choices, ExpertsGates, ExpertsLayer, ExpertsMatrices, ExpertsWeights, GateLayout,
};
pub use float::Float;
pub use formats::{FloatType, NESTED_BLOCK_SIZE, blocks, code_values, packed_bytes};
/// The 16-bit numbers of which signatures speak.
pub use half;
pub use isa::Isa;
pub use kernels::{Kernels, QuantizeStats};
pub use linear::{LinearWeights, Scales};
pub use mean::AbsmaxMean;
pub use sources::{SourceCodes, SourceMatrix, SourceRows, SourceScale, e4m3_to_f32};
pub use tables::{DYNAMIC_MAP, FP4, NF4, NF4_THRESHOLDS};
pub use tightfit_common::{BlockSize, IllegalBlockSize, QuantType};
