//! How much of a workspace is enough, before it is known what will be computed in it.

use super::{
    COUNTERS, Capability, Gpu, Linear, MANY_CAPABILITY, MANY_COLUMNS, MANY_ROWS, MANY_STEP,
    MOST_ROWS, MOST_ROWS_OF_LAUNCH, MOST_SCRATCH, MULTIPROCESSORS_BY_ROW, OUTPUTS, SLICE, TIERS,
    Tier,
};
use crate::{BlockSize, FloatType};

/// More than any GPU has by now: what [`Linear::most_workspace_bytes`] counts with where it is not
/// known which GPU it will be.
pub const MOST_MULTIPROCESSORS: u32 = 192;

/// The kernels that [`Linear::launch_transposed`] names, as [`super::kernels`] has them.
pub(super) fn transposed_kernels(
    compute_capability: Capability,
) -> impl Iterator<Item = (&'static str, u32)> {
    let all = [FloatType::F32, FloatType::F16, FloatType::Bf16]
        .into_iter()
        .flat_map(|float| [(float, 1, 1), (float, 64, 64), (float, 65, 64)]);
    let launches = all.filter_map(move |(float, rows, lengths)| {
        let linear = Linear {
            float,
            rows,
            outputs: lengths,
            inputs: lengths,
            block_size: BlockSize::DEFAULT,
            aligned: true,
            by_row: false,
        };
        let gpu = Gpu {
            compute_capability,
            multiprocessors: 1,
        };
        linear.launch_transposed(gpu).ok()
    });
    let mut named: Vec<&'static str> = Vec::new();
    launches.filter_map(move |launch| {
        let is_new = !named.contains(&launch.kernel);
        named.push(launch.kernel);
        is_new.then_some((launch.kernel, launch.shared_bytes))
    })
}

/// Rows of the larger tiles of products with the transposed weights, and inputs of all of them.
const TRANSPOSED_ROWS: usize = 128;

impl Linear {
    /// Returns a number of bytes that is enough as the workspace of [`Linear::launch`] for this many rows
    /// and for any fewer, however they are aligned: on `gpu`, or without one on every GPU with at most
    /// [`MOST_MULTIPROCESSORS`]. It does not get smaller with more rows.
    pub fn most_workspace_bytes(&self, gpu: Option<Gpu>) -> usize {
        let is_fast = self.float != FloatType::F32
            && self.inputs.is_multiple_of(64)
            && self.block_size.elements() >= 64;
        if !is_fast || self.rows == 0 || self.outputs == 0 || self.inputs == 0 {
            return 0;
        }
        let tiles = self.outputs.div_ceil(OUTPUTS);
        let slices = tiles.saturating_mul(self.inputs.div_ceil(SLICE));
        let smallest = |tier: &Tier| match tier.rows {
            8 => 1,
            rows => rows / 2 + 1,
        };
        let bytes = |tier: &Tier| {
            let column_tiles = match tier.rows {
                MOST_ROWS if !self.by_row => self.rows.min(MOST_ROWS_OF_LAUNCH).div_ceil(MOST_ROWS),
                _ => 1,
            };
            let blocks = if self.by_row {
                2 * MULTIPROCESSORS_BY_ROW as usize
            } else {
                let known = gpu.map_or(MOST_MULTIPROCESSORS, |gpu| gpu.multiprocessors);
                (known.clamp(1, 2048) * tier.blocks) as usize
            };
            if tiles >= 4 * blocks {
                // Each has a block of its own, with more tiles of columns all the more.
                return 0;
            }
            // Of each tile of columns as many as `shares` deals out at most.
            let all = slices.div_ceil(2).saturating_mul(column_tiles);
            let most = all.min(blocks).max(column_tiles);
            COUNTERS + 2 * most * OUTPUTS * tier.rows * 4
        };
        let tiers = TIERS
            .iter()
            .filter(|tier| gpu.is_none_or(|gpu| tier.is_for(gpu.compute_capability)))
            .filter(|tier| !(self.by_row && tier.by_warpgroup))
            .filter(|tier| self.rows >= smallest(tier))
            .map(bytes);
        tiers.max().unwrap_or(0).max(self.most_of_many(gpu))
    }

    /// Returns the same for [`Linear::launch_transposed`]; at most 16 MiB.
    pub fn most_transposed_workspace_bytes(&self, gpu: Option<Gpu>) -> usize {
        let gpu = gpu.unwrap_or(Gpu {
            compute_capability: MANY_CAPABILITY,
            multiprocessors: MOST_MULTIPROCESSORS,
        });
        let of_rows = |rows| {
            let linear = Linear {
                rows,
                aligned: true,
                ..*self
            };
            // What cannot be launched needs nothing.
            linear.launch_transposed(gpu).ok()
        };
        let of_few = of_rows(self.rows.min(TRANSPOSED_ROWS / 2));
        let of_few = of_few.map_or(0, |launch| launch.workspace_bytes);
        let has_large_tiles = of_rows(self.rows).is_some_and(|launch| launch.shared_bytes > 0);
        // Outputs are dealt out in steps of 64, at least four to a share.
        if self.rows <= TRANSPOSED_ROWS / 2
            || self.by_row
            || !has_large_tiles
            || self.outputs <= 448
        {
            return of_few;
        }
        let tile = TRANSPOSED_ROWS * TRANSPOSED_ROWS * 4;
        let columns = self.inputs.div_ceil(TRANSPOSED_ROWS);
        let tiles = columns.saturating_mul(self.rows.div_ceil(TRANSPOSED_ROWS));
        // In at most 8 shares each, and only as long as there are fewer than keep the GPU busy.
        let busy = 4 * gpu.multiprocessors.clamp(1, 1024) as usize;
        let room = (MOST_SCRATCH - COUNTERS) / tile;
        let places = tiles.saturating_mul(8).min(busy).min(room);
        of_few.max(COUNTERS + places * tile)
    }

    /// The same for the kernel for many rows alone: its tiles are dealt out in parts as long as there is
    /// a thread block for each.
    fn most_of_many(&self, gpu: Option<Gpu>) -> usize {
        let is_there = gpu.is_none_or(|gpu| gpu.compute_capability == MANY_CAPABILITY);
        if !is_there || self.by_row || self.rows <= MANY_ROWS {
            return 0;
        }
        let known = gpu.map_or(MOST_MULTIPROCESSORS, |gpu| gpu.multiprocessors);
        let blocks = known.clamp(1, 2048) as usize;
        let fewest = self.outputs.div_ceil(OUTPUTS);
        match fewest > blocks / 2 || self.inputs / MANY_STEP < 8 {
            true => 0,
            false => COUNTERS + blocks * OUTPUTS * MANY_COLUMNS * 4,
        }
    }
}
