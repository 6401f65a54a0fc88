//! Products with 4-bit weights: `y = x * transpose(W) + bias`, with W where it lies.
//!
//! W is [outputs, inputs] in the layout that [`crate::Kernels::quantize_nf4`] writes, or with its
//! scales quantized once more as [`crate::Kernels::quantize_absmax`] does it: codes of the flattened
//! tensor, so that a row may begin in the middle of a byte or of a block. x is [rows, inputs] and
//! y [rows, outputs], both row-major and of one [`FloatType`], as is the bias \[outputs\].
//!
//! [`Linear::launch`] says which kernel of [`module`] to launch and how. Kernels of products take
//! the same arguments, in this order:
//!
//! | argument | what it is |
//! |---|---|
//! | codes: \*u8 | W |
//! | scales: \*f32, or \*u8 | absmax; with double quantization, its codes |
//! | nested absmax: \*f32 | of 256 absmax values each; null without double quantization |
//! | offset: \*f32 | one value, added to every absmax; null without double quantization |
//! | map: \*f32 | 256 values, of the codes of absmax; null without double quantization |
//! | x, bias, y | the bias may be null |
//! | workspace: \*u8 | [`LinearLaunch::workspace_bytes`]; null where that is 0 |
//! | rows: u32 | rows of x and y, at most [`LinearLaunch::rows`] |
//! | outputs: u32, inputs: u32 | of W |
//! | block size: u32, [`super::quant_type_argument`]: u32 | |
//! | shares: u32 | [`LinearLaunch::shares`] |
//! | of some kernels two `CUtensorMap` | [`LinearLaunch::maps`] |
//!
//! - The first [`COUNTERS`] bytes of the workspace are zero before the first launch that uses it, and
//!   every launch leaves them zero. Launches of one stream may share a workspace, whatever they
//!   compute.
//! - Nothing may overlap y or the workspace.
//! - A launch may have the attribute for programmatic stream serialization: then it reads codes and
//!   scales before the launch before it has ended, and everything else after that.
//! - Products are exact, or of numbers rounded to 16 bits where x is of 16 bits; sums are f32, in an
//!   order that depends on W's lengths and the shares only. So without [`Linear::by_row`] results are
//!   the same in every run, and with it a row's result is the same bits also with other rows beside
//!   it, more of them or fewer, and on every GPU for which [`module`] is the same.

use super::THREADS;
use crate::{BlockSize, FloatType, KernelError};

/// Bytes of the workspace that are zero between launches.
pub const COUNTERS: usize = 16384;

/// For every GPU of compute capability 8.0 and later, as PTX, compressed.
const PTX: &[u8] = include_bytes!("../../cuda/linear.ptx.zlib");

/// Major and minor.
pub(super) type Capability = (u32, u32);

/// Machine code: what compute capabilities it is for, the first and the last one, and the code,
/// compressed.
pub(super) type MachineCode = (Capability, Capability, &'static [u8]);

const MACHINE_CODE: [MachineCode; 3] = [
    (
        (7, 5),
        (7, 9),
        include_bytes!("../../cuda/linear.sm_75.cubin.zlib"),
    ),
    (
        (8, 0),
        (8, 9),
        include_bytes!("../../cuda/linear.sm_80.cubin.zlib"),
    ),
    (
        (9, 0),
        (9, 0),
        include_bytes!("../../cuda/linear.sm_90a.cubin.zlib"),
    ),
];

/// Returns the kernels for a compute capability, to be given to `cuModuleLoadData`: machine code
/// where there is some, else PTX, which the driver compiles and which ends in a zero. They are
/// decompressed at every call, which takes some milliseconds: it is called once for each GPU.
///
/// # Errors
/// [`KernelError::ComputeCapability`] below 7.5.
pub fn module(compute_capability: (u32, u32)) -> Result<Vec<u8>, KernelError> {
    module_of(compute_capability, &MACHINE_CODE, PTX)
}

/// Returns whether kernels of products, of experts and of what a decoder computes wait for earlier launches
/// themselves on GPUs of a compute capability: only there may launches have the attribute for programmatic stream
/// serialization. Elsewhere the instructions for it are not in them.
pub fn waits_for_earlier_launches(compute_capability: (u32, u32)) -> bool {
    compute_capability == (9, 0)
}

/// The machine code for a compute capability, or else the PTX.
pub(super) fn module_of(
    compute_capability: Capability,
    machine_code: &[MachineCode],
    ptx: &[u8],
) -> Result<Vec<u8>, KernelError> {
    let code = machine_code_of(compute_capability, machine_code)?;
    Ok(code.unwrap_or_else(|| {
        let mut ptx = decompressed(ptx);
        ptx.push(0);
        ptx
    }))
}

/// The machine code for a compute capability, where there is some.
pub(super) fn machine_code_of(
    compute_capability: Capability,
    machine_code: &[MachineCode],
) -> Result<Option<Vec<u8>>, KernelError> {
    check_capability(compute_capability)?;
    let is_for = |(first, last, _): &&MachineCode| (*first..=*last).contains(&compute_capability);
    let code = machine_code.iter().find(is_for);
    Ok(code.map(|(_, _, code)| decompressed(code)))
}

pub(super) fn check_capability(have: Capability) -> Result<(), KernelError> {
    let need = (7, 5);
    match have < need {
        true => Err(KernelError::ComputeCapability { need, have }),
        false => Ok(()),
    }
}

/// What `kernels/cuda/compile.py` has compressed. The tests decompress all that is embedded.
fn decompressed(code: &[u8]) -> Vec<u8> {
    miniz_oxide::inflate::decompress_to_vec_zlib(code).unwrap_or_default()
}

/// What a launch depends on of a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gpu {
    /// Major and minor.
    pub compute_capability: (u32, u32),
    /// Number of multiprocessors.
    pub multiprocessors: u32,
}

/// A product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Linear {
    /// The type of x, y and the bias.
    pub float: FloatType,
    /// Rows of x and y.
    pub rows: usize,
    /// Rows of W.
    pub outputs: usize,
    /// Columns of W.
    pub inputs: usize,
    /// Elements of W that share one absmax.
    pub block_size: BlockSize,
    /// Whether all pointers are multiples of 16. The fast kernels need that.
    pub aligned: bool,
    /// Whether a row's result shall not depend on what is computed with it.
    pub by_row: bool,
}

/// A kernel for a product, and the shape of its launch. Grid and thread blocks have one dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearLaunch {
    /// The name of the kernel in [`module`].
    pub kernel: &'static str,
    /// Thread blocks, for as many rows as `rows` says; never 0.
    pub grid: u32,
    /// Threads of each.
    pub threads: u32,
    /// Bytes of dynamic shared memory of each. Above 48 KiB the function has to be told first
    /// (`CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`).
    pub shared_bytes: u32,
    /// Bytes of device memory that the kernel needs to work in, at a multiple of 256.
    pub workspace_bytes: usize,
    /// Rows of one launch. Where there are more, the kernel is launched again for those that follow,
    /// with the same grid also where fewer are left.
    pub rows: usize,
    /// Number of parts that the work is dealt out in.
    pub shares: u32,
    /// Of the kernels that have them, what is behind the other arguments: the maps of x and of codes, each a
    /// `CUtensorMap`, for all rows of a launch.
    pub maps: Option<[TileMap; 2]>,
}

/// A kernel for few rows; see `linear_tiles.cuh`.
struct Tier {
    /// Whether it is for compute capability 9.0 only, and not by row: its sums are made otherwise.
    by_warpgroup: bool,
    rows: usize,
    f16: &'static str,
    bf16: &'static str,
    /// Inputs of a unit, stages, and what a stage has of scales for each output.
    unit: usize,
    stages: usize,
    scales: usize,
    /// Thread blocks of a multiprocessor.
    blocks: u32,
}

impl Tier {
    /// Whether such GPUs have the kernels.
    fn is_for(&self, compute_capability: (u32, u32)) -> bool {
        compute_capability >= (8, 0) && (!self.by_warpgroup || compute_capability == (9, 0))
    }

    fn shared_bytes(&self) -> u32 {
        let stage = OUTPUTS * self.unit / 2 + self.rows * self.unit * 2 + OUTPUTS * self.scales;
        (self.stages * stage) as u32
    }
}

/// Outputs of a tile, and inputs of a slice.
const OUTPUTS: usize = 128;
const SLICE: usize = 256;

const TIERS: [Tier; 6] = [
    Tier {
        by_warpgroup: false,
        rows: 8,
        f16: "tightfit_linear_8_f16",
        bf16: "tightfit_linear_8_bf16",
        unit: 256,
        stages: 3,
        scales: 32,
        blocks: 2,
    },
    Tier {
        by_warpgroup: false,
        rows: 16,
        f16: "tightfit_linear_16_f16",
        bf16: "tightfit_linear_16_bf16",
        unit: 256,
        stages: 3,
        scales: 16,
        blocks: 2,
    },
    Tier {
        by_warpgroup: true,
        rows: 32,
        f16: "tightfit_linear_wide_32_f16",
        bf16: "tightfit_linear_wide_32_bf16",
        unit: 128,
        stages: 4,
        scales: 16,
        blocks: 2,
    },
    Tier {
        by_warpgroup: true,
        rows: 64,
        f16: "tightfit_linear_wide_64_f16",
        bf16: "tightfit_linear_wide_64_bf16",
        unit: 128,
        stages: 3,
        scales: 16,
        blocks: 2,
    },
    Tier {
        by_warpgroup: false,
        rows: 32,
        f16: "tightfit_linear_32_f16",
        bf16: "tightfit_linear_32_bf16",
        unit: 128,
        stages: 4,
        scales: 16,
        blocks: 2,
    },
    Tier {
        by_warpgroup: false,
        rows: 64,
        f16: "tightfit_linear_64_f16",
        bf16: "tightfit_linear_64_bf16",
        unit: 128,
        stages: 4,
        scales: 16,
        blocks: 1,
    },
];

/// Rows of the last tiers. More are several tiles of columns.
const MOST_ROWS: usize = 64;

/// Rows of a launch, so that counters and workspace are enough for any number of rows.
const MOST_ROWS_OF_LAUNCH: usize = 4096;

/// Of a product with the transposed weights, beside the counters.
const MOST_SCRATCH: usize = 16 << 20;

/// By row, the work is dealt out as if for a GPU with this many multiprocessors.
const MULTIPROCESSORS_BY_ROW: u32 = 132;

/// Returns the kernels that [`Linear::launch`] and [`Linear::launch_transposed`] name for a compute capability, each with its
/// [`LinearLaunch::shared_bytes`]: what has to be looked up in [`module`], and told to the driver, before
/// the first launch.
pub fn kernels(compute_capability: (u32, u32)) -> Vec<(&'static str, u32)> {
    let general = GENERAL.map(|kernel| (kernel, 0));
    let tiers = TIERS.iter().filter(|tier| tier.is_for(compute_capability));
    let fast = tiers.flat_map(|tier| [tier.f16, tier.bf16].map(|name| (name, tier.shared_bytes())));
    let many = many::kernels().filter(|_| compute_capability == many::CAPABILITY);
    let transposed = workspace::transposed_kernels(compute_capability);
    let all = general.into_iter().chain(fast).chain(many);
    all.chain(transposed).collect()
}

/// The kernels for whatever the fast ones cannot do.
const GENERAL: [&str; 3] = [
    "tightfit_linear_general_f32",
    "tightfit_linear_general_f16",
    "tightfit_linear_general_bf16",
];

impl Linear {
    /// Returns how to compute it.
    ///
    /// # Errors
    /// [`KernelError::ComputeCapability`] below 7.5, and [`KernelError::Launch`] if a length is 2^32
    /// or more, or the grid too large for a launch.
    pub fn launch(&self, gpu: Gpu) -> Result<LinearLaunch, KernelError> {
        check_capability(gpu.compute_capability)?;
        if let Some(tier) = self.tier(gpu)? {
            return match self.launch_many(gpu)? {
                Some(launch) => Ok(launch),
                None => self.launch_tiles(tier, gpu),
            };
        }
        let kernel = match self.float {
            FloatType::F32 => GENERAL[0],
            FloatType::F16 => GENERAL[1],
            FloatType::Bf16 => GENERAL[2],
        };
        // A warp has one output of 8 rows.
        let blocks = self.outputs.div_ceil(8) as u64 * self.rows.div_ceil(8) as u64;
        Ok(LinearLaunch {
            kernel,
            grid: grid(kernel, blocks)?,
            threads: THREADS,
            shared_bytes: 0,
            workspace_bytes: 0,
            rows: self.rows.max(1),
            shares: 1,
            maps: None,
        })
    }

    /// Returns how to compute `dx = dy * W` instead, as training needs it: of dy [rows, outputs],
    /// which is the argument x, dx [rows, inputs], which is y. The bias is not read, and the
    /// workspace is at most 16 MiB.
    ///
    /// # Errors
    /// As in [`Linear::launch`].
    pub fn launch_transposed(&self, gpu: Gpu) -> Result<LinearLaunch, KernelError> {
        check_capability(gpu.compute_capability)?;
        self.check_lengths()?;
        if let Some(launch) = self.launch_many_transposed(gpu)? {
            return Ok(launch);
        }
        let fast = gpu.compute_capability >= (8, 0)
            && self.aligned
            && self.inputs.is_multiple_of(32)
            && self.outputs.is_multiple_of(8)
            && self.rows > 0
            && self.inputs > 0;
        let many = self.rows > 64;
        let (kernel, inputs, rows) = match (self.float, fast) {
            (FloatType::F16, true) if many => ("tightfit_linear_transposed_128_f16", 128, 128),
            (FloatType::F16, true) => ("tightfit_linear_transposed_64_f16", 128, 64),
            (FloatType::Bf16, true) if many => ("tightfit_linear_transposed_128_bf16", 128, 128),
            (FloatType::Bf16, true) => ("tightfit_linear_transposed_64_bf16", 128, 64),
            (FloatType::F32, _) => ("tightfit_linear_transposed_general_f32", 32, 8),
            (FloatType::F16, false) => ("tightfit_linear_transposed_general_f16", 32, 8),
            (FloatType::Bf16, false) => ("tightfit_linear_transposed_general_bf16", 32, 8),
        };
        let blocks = self.inputs.div_ceil(inputs) as u64 * self.rows.div_ceil(rows) as u64;
        // Two stages of 64 outputs' weights and dy, in rows that are 16 bytes longer.
        let stage = 64 * (inputs * 2 + 16) + rows * (64 * 2 + 16);
        // The outputs are dealt out where tiles are too few to keep the GPU busy.
        let of_one = if many { 1 } else { 2 };
        let busy = u64::from(of_one * gpu.multiprocessors.clamp(1, 1024));
        let steps = self.outputs.div_ceil(64) as u64;
        let shares = if rows < 64 || self.by_row {
            1
        } else {
            // Some rounds of blocks end closer together than one.
            let room = ((MOST_SCRATCH - COUNTERS) / (inputs * rows * 4)) as u64;
            let enough = (2 * busy).div_ceil(blocks).min(8);
            enough.min(steps / 4).min(room / blocks).max(1)
        };
        let blocks = blocks * shares;
        Ok(LinearLaunch {
            kernel,
            grid: grid(kernel, blocks)?,
            threads: THREADS,
            shared_bytes: if rows < 64 { 0 } else { 2 * stage as u32 },
            workspace_bytes: if shares > 1 {
                COUNTERS + blocks as usize * inputs * rows * 4
            } else {
                0
            },
            rows: self.rows.max(1),
            shares: shares as u32,
            maps: None,
        })
    }

    fn check_lengths(&self) -> Result<(), KernelError> {
        let lengths = [self.rows, self.outputs, self.inputs];
        lengths
            .iter()
            .try_for_each(|length| check_length("tightfit_linear", *length))
    }

    /// The kernel for this many rows, if one of the fast ones can do it.
    fn tier(&self, gpu: Gpu) -> Result<Option<&'static Tier>, KernelError> {
        self.check_lengths()?;
        // Offsets within a tile, and slices of all tiles, are 32 bits wide.
        let slices = self.outputs.div_ceil(OUTPUTS) as u64 * self.inputs.div_ceil(SLICE / 2) as u64;
        let fast = gpu.compute_capability >= (8, 0)
            && self.float != FloatType::F32
            && self.aligned
            && self.inputs.is_multiple_of(64)
            && self.block_size.elements() >= 64
            && self.inputs < 1 << 25
            && slices < 1 << 31
            && self.rows > 0
            && slices > 0;
        let mut tiers = TIERS
            .iter()
            .filter(|tier| tier.is_for(gpu.compute_capability))
            .filter(|tier| !(self.by_row && tier.by_warpgroup))
            .filter(|tier| tier.rows == MOST_ROWS || self.rows <= tier.rows);
        Ok(tiers.next().filter(|_| fast))
    }

    fn launch_tiles(&self, tier: &Tier, gpu: Gpu) -> Result<LinearLaunch, KernelError> {
        let kernel = match self.float {
            FloatType::F16 => tier.f16,
            _ => tier.bf16,
        };
        let rows = if self.by_row {
            self.rows.min(tier.rows)
        } else {
            self.rows.min(MOST_ROWS_OF_LAUNCH)
        };
        let column_tiles = rows.div_ceil(tier.rows);
        let tiles = self.outputs.div_ceil(OUTPUTS);
        let slices = self.inputs.div_ceil(SLICE);
        let (shares, split) = if self.by_row {
            shares(tiles, slices, 2 * MULTIPROCESSORS_BY_ROW as usize)
        } else {
            let blocks = (gpu.multiprocessors.clamp(1, 2048) * tier.blocks) as usize;
            shares(tiles, slices, blocks / column_tiles)
        };
        let blocks = shares as u64 * column_tiles as u64;
        // Two places for the sums of each share.
        let places = if split { 2 * blocks as usize } else { 0 };
        Ok(LinearLaunch {
            kernel,
            grid: grid(kernel, blocks)?,
            threads: THREADS,
            shared_bytes: tier.shared_bytes(),
            workspace_bytes: match places {
                0 => 0,
                _ => COUNTERS + places * OUTPUTS * tier.rows * 4,
            },
            rows,
            shares: shares as u32,
            maps: None,
        })
    }
}

/// In how many parts to deal out the slices of all tiles if this many thread blocks run at a time, and
/// whether some tile belongs to several parts.
fn shares(tiles: usize, slices: usize, blocks: usize) -> (usize, bool) {
    // With more tiles than that, each has a block of its own.
    if tiles >= 4 * blocks.max(1) {
        return (tiles, false);
    }
    let all = tiles * slices;
    // Parts of a tile each, if that leaves few blocks without work: fewer sums have to be made.
    let parts = (blocks / tiles.max(1)).min(slices);
    let even = tiles * parts;
    // A share of two slices takes about as long as making the sum of one more.
    let most = blocks.min(all.div_ceil(2)).max(1);
    let shares = if parts > 0 && even <= most && 25 * even >= 24 * most {
        even
    } else {
        most
    };
    (shares, shares != tiles)
}

/// Lengths are arguments of 32 bits.
pub(super) fn check_length(kernel: &'static str, length: usize) -> Result<(), KernelError> {
    match u32::try_from(length) {
        Ok(_) => Ok(()),
        Err(_) => Err(KernelError::Launch {
            kernel,
            most: u32::MAX as usize,
            have: length,
        }),
    }
}

pub(super) fn grid(kernel: &'static str, blocks: u64) -> Result<u32, KernelError> {
    match i32::try_from(blocks) {
        Ok(blocks) => Ok(blocks.max(1) as u32),
        Err(_) => Err(KernelError::Launch {
            kernel,
            most: i32::MAX as usize,
            have: usize::try_from(blocks).unwrap_or(usize::MAX),
        }),
    }
}

mod many;
mod workspace;

pub use many::TileMap;
pub use workspace::MOST_MULTIPROCESSORS;

#[cfg(test)]
mod tests;
