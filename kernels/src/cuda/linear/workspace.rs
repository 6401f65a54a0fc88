//! How much of a workspace is enough, before it is known what will be computed in it.

use super::{
    COUNTERS, Gpu, Linear, MOST_ROWS, MOST_ROWS_OF_LAUNCH, MULTIPROCESSORS_BY_ROW, OUTPUTS, SLICE,
    TIERS, Tier, many,
};
use crate::FloatType;

/// More than any GPU has by now: what [`Linear::most_workspace_bytes`] counts with where it is not
/// known which GPU it will be.
pub const MOST_MULTIPROCESSORS: u32 = 192;

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
        let most = tiers.max().unwrap_or(0);
        most.max(many::most_workspace_bytes(self, gpu, false))
    }
}
