//! The kernels by name, and how much memory is enough before it is known how many tokens there will be.

use super::{
    COUNTERS, ExpertsLayer, ExpertsProduct, Gpu, MOST_SEGMENTS, OUTPUTS, Routing, SLICE, Tier,
};
use crate::cuda::linear::MOST_MULTIPROCESSORS;

/// Rows of the tiles that there are kernels for.
const TIERS: [usize; 3] = [8, 16, 64];

/// Returns the kernels that launches of this module name for a compute capability, each with its
/// [`ExpertsLaunch::shared_bytes`](super::ExpertsLaunch::shared_bytes): as
/// [`linear::kernels`](crate::cuda::linear::kernels).
pub fn kernels(compute_capability: (u32, u32)) -> Vec<(&'static str, u32)> {
    const SIMPLE: [&str; 7] = [
        "tightfit_experts_route",
        "tightfit_experts_combine_f32",
        "tightfit_experts_combine_f16",
        "tightfit_experts_combine_bf16",
        "tightfit_experts_general_f32",
        "tightfit_experts_general_f16",
        "tightfit_experts_general_bf16",
    ];
    let tiles = TIERS.into_iter().flat_map(|rows| {
        let tier = Tier::of_rows(rows);
        let shared = tier.shared_bytes(rows);
        [(tier.f16, shared), (tier.bf16, shared)]
    });
    let has_tiles = compute_capability >= (8, 0);
    let simple = SIMPLE.into_iter().map(|kernel| (kernel, 0));
    simple.chain(tiles.filter(|_| has_tiles)).collect()
}

impl Routing {
    /// Returns a number of bytes that is enough for [`Routing::bytes`] of this many tokens and of any fewer.
    pub fn most_bytes(&self) -> usize {
        let pairs = self.tokens.saturating_mul(self.choices);
        // The smallest tiles are of 8 rows, and each expert may have one that is not full.
        let used = pairs.min(self.experts);
        let tiles = used.saturating_add((pairs - used) / 8);
        let of_pairs = pairs
            .saturating_mul(4)
            .saturating_add(2 * super::PAIRS_BEGIN);
        of_pairs.saturating_add(tiles.saturating_mul(16))
    }

    /// The most tiles of this many rows that there can be of these tokens or fewer.
    fn most_tiles_of(&self, rows: usize) -> usize {
        let pairs = self.tokens.saturating_mul(self.choices);
        let used = pairs.min(self.experts);
        // Of one token each pair is a tile.
        (used + (pairs - used) / rows).max(self.choices.min(pairs))
    }
}

impl ExpertsProduct {
    /// Returns a number of bytes that is enough as the workspace of [`ExpertsProduct::launch`] for this many
    /// tokens and for any fewer, however they are aligned: on `gpu`, or without one on every GPU with at most
    /// [`MOST_MULTIPROCESSORS`].
    pub fn most_workspace_bytes(&self, gpu: Option<Gpu>) -> usize {
        let gpu = gpu.unwrap_or(MOST_GPU);
        let fast = ExpertsProduct {
            aligned: true,
            ..*self
        };
        let slices = self.inputs.div_ceil(SLICE);
        if !fast.is_fast(gpu.compute_capability) || slices < 2 || self.routing.tokens == 0 {
            return 0;
        }
        let segments = slices.div_ceil(slices.div_ceil(MOST_SEGMENTS));
        let reached = self.routing.tile_rows();
        let bytes = |rows: usize| {
            let busy = gpu.multiprocessors.clamp(1, 2048) * Tier::of_rows(rows).blocks;
            let busy = (busy as usize).min(COUNTERS / 4);
            let tiles = self.routing.most_tiles_of(rows);
            let tiles = tiles.saturating_mul(self.output_tiles());
            let grid = tiles.saturating_mul(segments).clamp(1, busy);
            COUNTERS + grid * segments * OUTPUTS * rows * 4
        };
        let tiers = TIERS.into_iter().filter(|rows| *rows <= reached);
        tiers.map(bytes).max().unwrap_or(0)
    }
}

impl ExpertsLayer {
    /// Returns the same of [`ExpertsLayer::launches`].
    pub fn most_workspace_bytes(&self, gpu: Option<Gpu>) -> usize {
        let (gate_up, down) = self.products();
        let of = |product: ExpertsProduct| product.most_workspace_bytes(gpu);
        of(gate_up).max(of(down))
    }
}

const MOST_GPU: Gpu = Gpu {
    compute_capability: (9, 0),
    multiprocessors: MOST_MULTIPROCESSORS,
};

impl Tier {
    pub(super) fn shared_bytes(&self, rows: usize) -> u32 {
        let stage = OUTPUTS * self.unit / 2 + rows * self.unit * 2 + OUTPUTS * self.scales;
        (self.stages * stage) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::experts::Form;
    use crate::cuda::linear::Linear;
    use crate::{Activation, BlockSize, FloatType, GateLayout};

    const GPUS: [(u32, (u32, u32)); 4] = [(4, (9, 0)), (40, (7, 5)), (108, (8, 0)), (192, (12, 0))];

    #[test]
    fn a_workspace_for_experts_is_enough_for_fewer_tokens_too() {
        for (multiprocessors, compute_capability) in GPUS {
            let gpu = Gpu {
                compute_capability,
                multiprocessors,
            };
            for (experts, choices, hidden, intermediate) in [
                (1, 1, 512, 64),
                (8, 2, 4096, 14336),
                (3, 5, 2048, 192),
                (256, 8, 2048, 512),
                (32, 4, 2880, 2880),
                (16, 0, 1024, 1024),
            ] {
                let of = |tokens| ExpertsLayer {
                    routing: Routing {
                        tokens,
                        choices,
                        experts,
                    },
                    float: FloatType::Bf16,
                    hidden,
                    intermediate,
                    block_size: BlockSize::DEFAULT,
                    layout: GateLayout::Halves,
                    activation: Activation::Silu,
                    apart: false,
                    aligned: true,
                };
                let (mut most, mut most_routing) = (0, 0);
                for tokens in (1..300).chain((300..5000).step_by(97)) {
                    let layer = of(tokens);
                    let launches = layer.launches(gpu).unwrap();
                    most = most.max(launches.workspace_bytes);
                    most_routing = most_routing.max(launches.routing_bytes);
                    let enough = layer.most_workspace_bytes(Some(gpu));
                    assert!(enough >= most, "{layer:?}: {enough}, {most}");
                    assert!(layer.most_workspace_bytes(None) >= enough);
                    let plain = ExpertsProduct {
                        form: Form::Plain,
                        ..layer.products().1
                    };
                    let need = plain.launch(gpu).unwrap().workspace_bytes;
                    assert!(plain.most_workspace_bytes(Some(gpu)) >= need);
                    assert!(layer.routing.most_bytes() >= most_routing);
                }
            }
        }
    }

    #[test]
    fn every_kernel_that_is_launched_is_named_with_its_shared_memory() {
        for (multiprocessors, compute_capability) in GPUS {
            let gpu = Gpu {
                compute_capability,
                multiprocessors,
            };
            let named = kernels(compute_capability);
            for float in [FloatType::F32, FloatType::F16, FloatType::Bf16] {
                for tokens in [1, 2, 40, 400] {
                    let layer = ExpertsLayer {
                        routing: Routing {
                            tokens,
                            choices: 2,
                            experts: 8,
                        },
                        float,
                        hidden: 128,
                        intermediate: 64,
                        block_size: BlockSize::DEFAULT,
                        layout: GateLayout::Interleaved,
                        activation: Activation::Gelu,
                        apart: false,
                        aligned: true,
                    };
                    let launches = layer.launches(gpu).unwrap();
                    let all = [launches.gate_up, launches.down, launches.combine];
                    for launch in all.into_iter().chain(launches.route) {
                        assert!(named.contains(&(launch.kernel, launch.shared_bytes)));
                    }
                }
            }
        }
    }

    #[test]
    fn a_workspace_for_gradients_is_enough_for_fewer_rows_too() {
        for (multiprocessors, compute_capability) in GPUS {
            let gpu = Gpu {
                compute_capability,
                multiprocessors,
            };
            let named = crate::cuda::linear::kernels(compute_capability);
            for (outputs, inputs) in [
                (4096, 4096),
                (448, 64),
                (456, 160),
                (18944, 3584),
                (40, 8192),
            ] {
                let mut most = 0;
                for rows in (0..300).chain((300..5000).step_by(61)) {
                    let linear = Linear {
                        float: FloatType::Bf16,
                        rows,
                        outputs,
                        inputs,
                        block_size: BlockSize::DEFAULT,
                        aligned: true,
                        by_row: false,
                    };
                    let launch = linear.launch_transposed(gpu).unwrap();
                    assert!(named.contains(&(launch.kernel, launch.shared_bytes)));
                    most = most.max(launch.workspace_bytes);
                    let enough = linear.most_transposed_workspace_bytes(Some(gpu));
                    assert!(
                        enough >= most && enough <= 16 << 20,
                        "{linear:?}: {enough}, {most}"
                    );
                    assert!(linear.most_transposed_workspace_bytes(None) >= enough);
                }
            }
        }
    }
}
