//! The kernels for many rows, and for gradients: see `linear_many.cuh`.

use super::{COUNTERS, Capability, Gpu, Linear, LinearLaunch, grid};
use crate::{FloatType, KernelError};

/// What they are compiled for.
pub(super) const CAPABILITY: Capability = (9, 0);
/// With so many rows or fewer, kernels for few rows are faster.
pub(super) const FEW_ROWS: usize = 64;
/// Rows of a tile: few, where that is enough, and many.
pub(super) const COLUMNS: [usize; 2] = [128, 256];
/// What a tile has of the side of W that is not summed over, and the thread blocks of a cluster, which have
/// a tile each.
const LEFT: usize = 128;
const CLUSTER: usize = 2;
/// What is summed over at once, and in parts of what.
const DEPTH: usize = 64;
const GROUP: usize = 4 * DEPTH;
const THREADS: u32 = 384;
/// 128 KiB for x, three groups of codes and scales, the table of codes, that of scales' codes, barriers.
const SHARED_BYTES: u32 = (128 << 10) + 3 * (16384 + 2048) + (32 << 10) + 1024 + 256;
/// Clusters that work on parts of tiles at a time. Their sums take 256 KiB each, and all that gradients need
/// shall be 16 MiB at most.
const fn most_parts(transposed: bool) -> usize {
    if transposed { 63 } else { 64 }
}

/// By whether W is transposed and tiles have many rows, of f16 and of bf16.
const NAMES: [[[&str; 2]; 2]; 2] = [
    [
        [
            "tightfit_linear_many_transposed_128_f16",
            "tightfit_linear_many_transposed_128_bf16",
        ],
        [
            "tightfit_linear_many_transposed_256_f16",
            "tightfit_linear_many_transposed_256_bf16",
        ],
    ],
    [
        [
            "tightfit_linear_many_128_f16",
            "tightfit_linear_many_128_bf16",
        ],
        [
            "tightfit_linear_many_256_f16",
            "tightfit_linear_many_256_bf16",
        ],
    ],
];

/// All of them, with their shared memory.
pub(super) fn kernels() -> impl Iterator<Item = (&'static str, u32)> {
    NAMES
        .as_flattened()
        .as_flattened()
        .iter()
        .map(|name| (*name, SHARED_BYTES))
}

/// A matrix in global memory of which the copy engine brings tiles: what `cuTensorMapEncodeTiled` takes,
/// with element strides of 1, no interleaving, L2 promotion to 128 bytes, and zeros for what lies outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TileMap {
    /// Of an unsigned integer: 1 or 2.
    pub element_bytes: u32,
    /// Elements of a row.
    pub columns: u64,
    /// Rows.
    pub rows: u64,
    /// Bytes from one row to the next, a multiple of 16.
    pub row_bytes: u64,
    /// Elements and rows of a tile.
    pub tile: [u32; 2],
    /// Bytes within which 16 are exchanged, which is a row of the tile: 64 or 128.
    pub swizzle: u32,
}

/// How the work is dealt out.
#[derive(Debug, Clone, Copy)]
struct Work {
    /// Rows of a tile.
    columns: usize,
    /// Pairs of tiles, of which each cluster has the same number and some clusters one more: of these `last`
    /// each is computed in `parts`.
    pairs: usize,
    last: usize,
    parts: usize,
}

impl Linear {
    /// Whether the kernels can do it.
    fn is_for_many(&self, gpu: Gpu) -> bool {
        let lengths = [self.rows, self.outputs, self.inputs];
        gpu.compute_capability == CAPABILITY
            && self.float != FloatType::F32
            && self.aligned
            && self.inputs.is_multiple_of(64)
            && self.block_size.elements() >= 64
            && lengths.iter().all(|length| (1..1 << 31).contains(length))
    }

    /// The quickest way to deal it out.
    fn work_of_many(&self, clusters: usize, transposed: bool) -> Work {
        let (left, depth) = match transposed {
            true => (self.inputs, self.outputs),
            false => (self.outputs, self.inputs),
        };
        let groups = depth.div_ceil(GROUP);
        let work = |columns: usize| {
            let pairs = left
                .div_ceil(LEFT * CLUSTER)
                .saturating_mul(self.rows.div_ceil(columns));
            let last = pairs % clusters;
            // In tenths of what a group takes, which is about 2 us; so do beginning and end of a tile. The
            // parts of a tile are summed up by one thread block.
            let cost = |parts: usize| match parts {
                1 => 10 * groups + 7,
                _ => 10 * groups.div_ceil(parts) + 17 + 3 * parts,
            };
            let most = match last {
                // By row nothing may depend on the number of rows.
                _ if self.by_row => 1,
                0 => 1,
                _ => clusters.min(most_parts(transposed)) / last,
            };
            let parts = (1..=most.min(groups).max(1)).min_by_key(|parts| cost(*parts));
            let parts = parts.unwrap_or(1);
            let of_last = if last == 0 { 0 } else { cost(parts) };
            let all = (pairs / clusters).saturating_mul(cost(1)) + of_last;
            // Half the rows take two thirds of the time.
            let all = all.saturating_mul(if columns == COLUMNS[1] { 3 } else { 2 });
            let work = Work {
                columns,
                pairs,
                last,
                parts,
            };
            (all, work)
        };
        let [few, many] = COLUMNS.map(work);
        if few.0 < many.0 && !self.by_row {
            few.1
        } else {
            many.1
        }
    }

    /// The launch of a kernel for many rows, where one is to do it.
    pub(super) fn launch_many(&self, gpu: Gpu) -> Result<Option<LinearLaunch>, KernelError> {
        if !self.is_for_many(gpu) || self.by_row || self.rows <= FEW_ROWS {
            return Ok(None);
        }
        self.launch_of(gpu, false)
    }

    /// The same for W not transposed, which all rows are many for.
    pub(super) fn launch_many_transposed(
        &self,
        gpu: Gpu,
    ) -> Result<Option<LinearLaunch>, KernelError> {
        // A row of dy begins at a multiple of 16 bytes.
        if !self.is_for_many(gpu) || !self.outputs.is_multiple_of(8) {
            return Ok(None);
        }
        self.launch_of(gpu, true)
    }

    fn launch_of(&self, gpu: Gpu, transposed: bool) -> Result<Option<LinearLaunch>, KernelError> {
        let clusters = clusters(gpu.multiprocessors);
        let work = self.work_of_many(clusters, transposed);
        let Work {
            columns,
            pairs,
            last,
            parts,
        } = work;
        let is_many = columns == COLUMNS[1];
        let names = NAMES[usize::from(!transposed)][usize::from(is_many)];
        let kernel = names[usize::from(self.float == FloatType::Bf16)];
        // They are counted in 32 bits.
        if pairs >= 1 << 31 {
            return Ok(None);
        }
        let units = pairs + last * (parts - 1);
        Ok(Some(LinearLaunch {
            kernel,
            grid: grid(kernel, (units.min(clusters) * CLUSTER) as u64)?,
            threads: THREADS,
            shared_bytes: SHARED_BYTES,
            workspace_bytes: match parts {
                1 => 0,
                _ => COUNTERS + last * parts * CLUSTER * LEFT * columns * 4,
            },
            rows: self.rows,
            shares: parts as u32,
            maps: Some(self.maps(&work, transposed)),
        }))
    }

    /// Of x, of which each thread block of a cluster brings its part, and of codes, in groups.
    fn maps(&self, work: &Work, transposed: bool) -> [TileMap; 2] {
        let depth = if transposed {
            self.outputs
        } else {
            self.inputs
        };
        let x = TileMap {
            element_bytes: 2,
            columns: depth as u64,
            rows: self.rows as u64,
            row_bytes: 2 * depth as u64,
            tile: [DEPTH as u32, (work.columns / CLUSTER) as u32],
            swizzle: 128,
        };
        let bytes = (self.inputs / 2) as u64;
        let (width, height) = match transposed {
            true => (LEFT / 2, GROUP),
            false => (GROUP / 2, LEFT),
        };
        let codes = TileMap {
            element_bytes: 1,
            columns: bytes,
            rows: self.outputs as u64,
            row_bytes: bytes,
            tile: [width as u32, height as u32],
            swizzle: width as u32,
        };
        [x, codes]
    }
}

/// Clusters that run at a time.
fn clusters(multiprocessors: u32) -> usize {
    (multiprocessors.clamp(2, 2048) as usize) / CLUSTER
}

/// A number of bytes that is enough as a workspace for this many rows and any fewer, with W transposed or
/// not. Zero where these kernels are not for it.
pub(super) fn most_workspace_bytes(linear: &Linear, gpu: Option<Gpu>, transposed: bool) -> usize {
    let gpu = gpu.unwrap_or(Gpu {
        compute_capability: CAPABILITY,
        multiprocessors: u32::MAX,
    });
    let linear = Linear {
        aligned: true,
        ..*linear
    };
    let is_for = match transposed {
        true => linear.outputs.is_multiple_of(8),
        false => linear.rows > FEW_ROWS,
    };
    if !linear.is_for_many(gpu) || !is_for || linear.by_row {
        return 0;
    }
    let parts = clusters(gpu.multiprocessors).min(most_parts(transposed));
    COUNTERS + parts * CLUSTER * LEFT * COLUMNS[1] * 4
}
