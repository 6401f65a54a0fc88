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
/// Clusters that work on parts of tiles at a time: their sums take 16 MiB.
const MOST_PARTS: usize = 64;

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
    /// Elements of a row, and rows.
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

/// What the kernels have to do: tiles in pairs, and what each sums up.
struct Work {
    columns: usize,
    pairs: usize,
    groups: usize,
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

    fn work_of_many(&self, transposed: bool) -> Work {
        let (left, depth) = match transposed {
            true => (self.inputs, self.outputs),
            false => (self.outputs, self.inputs),
        };
        // By row nothing may depend on the number of rows.
        let few = self.rows <= COLUMNS[0] && !self.by_row;
        let columns = if few { COLUMNS[0] } else { COLUMNS[1] };
        Work {
            columns,
            pairs: left
                .div_ceil(LEFT * CLUSTER)
                .saturating_mul(self.rows.div_ceil(columns)),
            groups: depth.div_ceil(GROUP),
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
        let work = self.work_of_many(transposed);
        let is_many = work.columns == COLUMNS[1];
        let names = NAMES[usize::from(!transposed)][usize::from(is_many)];
        let kernel = names[usize::from(self.float == FloatType::Bf16)];
        let clusters = clusters(gpu.multiprocessors);
        let (last, parts) = if self.by_row {
            (0, 1)
        } else {
            work.parts(clusters)
        };
        // What all parts are: they have to be counted in 32 bits.
        if work.pairs >= 1 << 31 {
            return Ok(None);
        }
        let units = work.pairs + last * (parts - 1);
        Ok(Some(LinearLaunch {
            kernel,
            grid: grid(kernel, (units.min(clusters) * CLUSTER) as u64)?,
            threads: THREADS,
            shared_bytes: SHARED_BYTES,
            workspace_bytes: match parts {
                1 => 0,
                _ => COUNTERS + last * parts * CLUSTER * LEFT * work.columns * 4,
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

impl Work {
    /// Pairs of tiles that are left over once all others have been dealt out evenly, and in how many parts
    /// each of them is computed.
    fn parts(&self, clusters: usize) -> (usize, usize) {
        let last = match self.pairs % clusters {
            0 => return (0, 1),
            last => last,
        };
        // A group of a part takes about 2 us, and that much its beginning and end; every part has to be
        // summed up by one thread block.
        let cost = |parts: usize| match parts {
            1 => 10 * self.groups,
            _ => 10 * self.groups.div_ceil(parts) + 10 + 3 * parts,
        };
        let most = (clusters.min(MOST_PARTS) / last).min(self.groups).max(1);
        let parts = (1..=most).min_by_key(|parts| cost(*parts)).unwrap_or(1);
        (last, parts)
    }
}

/// A number of bytes that is enough as a workspace for this many rows and any fewer, with W transposed or
/// not.
pub(super) fn most_workspace_bytes(linear: &Linear, gpu: Option<Gpu>, transposed: bool) -> usize {
    let is_there = gpu.is_none_or(|gpu| gpu.compute_capability == CAPABILITY);
    if !is_there || linear.by_row || (!transposed && linear.rows <= FEW_ROWS) {
        return 0;
    }
    let columns = if linear.rows <= COLUMNS[0] {
        COLUMNS[0]
    } else {
        COLUMNS[1]
    };
    let clusters = gpu.map_or(MOST_PARTS, |gpu| clusters(gpu.multiprocessors));
    COUNTERS + clusters.min(MOST_PARTS) * CLUSTER * LEFT * columns * 4
}
