//! Layers of experts in few launches: products with stacks of 4-bit weights, of which a token takes those
//! that its router has chosen. Everything that depends on the choice is decided on the GPU, so that a
//! graph of these launches can be replayed with other ones.
//!
//! A stack W [experts, outputs, inputs] is one flattened tensor that has been quantized as a whole, or part by
//! part ([`Quantized`]), in the layout that [`super::linear`] reads. A token and one of its choices are a pair: pair
//! `token * choices + choice`. The numbers of the chosen experts are ids [tokens, choices], i32, and their
//! weights [tokens, choices], f32.
//!
//! | launch | what it computes |
//! |---|---|
//! | [`Routing::launch`] | sorts the pairs by expert, for all products that follow |
//! | [`ExpertsProduct::launch`] | y of each pair: x times its expert's weights, and what [`Form`] says |
//! | [`combine`] | y [tokens, outputs] = the sum of weight times part over a token's choices, in their order |
//!
//! [`ExpertsLayer`] puts them together: gates and up projections with the activation, the down projection
//! as parts, and their sum. The kernels are in [`module`], and take these arguments, in this order:
//!
//! | kernel | arguments |
//! |---|---|
//! | [`Routing::launch`] | ids: \*i32, routing: \*u8, pairs: u32, experts: u32, [`Routing::tile_rows`]: u32 |
//! | [`combine`] | parts: \*f32, ids: \*i32, weights: \*f32, y, tokens: u32, choices: u32, experts: u32, outputs: u32 |
//! | [`ExpertsProduct::launch`] | those below |
//!
//! | argument of a product | what it is |
//! |---|---|
//! | codes, scales, nested absmax, offset, map | W, as in [`super::linear`] |
//! | x, bias, y | of the product's type, y of [`Form::Parts`] f32; the bias [experts, outputs] may be null |
//! | routing: \*u8 | what the kernel of [`Routing::launch`] has written; ids where there is no such launch |
//! | workspace: \*u8 | [`ExpertsLaunch::workspace_bytes`]; null where that is 0 |
//! | pairs: u32 | tokens times choices |
//! | pairs of a row of x: u32 | the number of choices with [`RowsOfX::Tokens`], 1 with [`RowsOfX::Pairs`] |
//! | experts: u32, outputs: u32, inputs: u32 | of W: with gates there are twice as many outputs as results |
//! | block size: u32, [`super::quant_type_argument`]: u32 | |
//! | form: u32, limit: f32 | [`ExpertsLaunch::form`], [`ExpertsLaunch::limit`] |
//!
//! - An id that is no number of an expert, such as -1, is of a pair that is skipped: its y is not written,
//!   and it adds nothing to a token's sum. A token without other pairs gets zeros from [`combine`].
//! - The workspace is as in [`super::linear`], and can be the same: its first
//!   [`COUNTERS`] bytes are zero before the first launch that uses it, and every launch leaves them zero.
//!   Nothing else has to be cleared before a replay.
//! - Nothing may overlap y, the routing or the workspace. Routing, workspace and parts begin at multiples
//!   of 256.
//! - The bits of a result depend on its own row of x, its expert and W's lengths, on the GPU's kernels in
//!   [`module`] and on whether the fast ones are used. They do not depend on other tokens, on how many of
//!   them there are or in which order they come: a caller may do as many at a time as it has memory for.
//! - Products are exact, or of numbers rounded to 16 bits where x is of 16 bits; sums, activations and
//!   parts are f32, and each y is rounded once.
//! - A launch may have the attribute for programmatic stream serialization. Then it waits until the launch
//!   before it has ended before it reads anything but weights, with one exception:
//!   [`ExpertsProduct::follows`].

use super::{
    THREADS,
    linear::{
        COUNTERS, Capability, Gpu, MachineCode, check_capability, check_length, grid, module_of,
    },
};
use crate::{Activation, BlockSize, FloatType, GateLayout, KernelError, NESTED_BLOCK_SIZE};

mod layer;
mod workspace;

pub use layer::{ExpertsLayer, ExpertsLayerLaunches};
pub use workspace::kernels;

/// For every GPU of compute capability 8.0 and later, as PTX, compressed.
const PTX: &[u8] = include_bytes!("../../cuda/experts.ptx.zlib");

const MACHINE_CODE: [MachineCode; 3] = [
    (
        (7, 5),
        (7, 9),
        include_bytes!("../../cuda/experts.sm_75.cubin.zlib"),
    ),
    (
        (8, 0),
        (8, 9),
        include_bytes!("../../cuda/experts.sm_80.cubin.zlib"),
    ),
    (
        (9, 0),
        (9, 0),
        include_bytes!("../../cuda/experts.sm_90a.cubin.zlib"),
    ),
];

/// Returns the kernels for a compute capability, as [`super::linear::module`] does.
///
/// # Errors
/// [`KernelError::ComputeCapability`] below 7.5.
pub fn module(compute_capability: (u32, u32)) -> Result<Vec<u8>, KernelError> {
    module_of(compute_capability, &MACHINE_CODE, PTX)
}

/// The most experts of a layer.
pub const MOST_EXPERTS: usize = 4096;

// As in `kernels/cuda`: of a thread block's tile the outputs, and of these the segments of inputs that
// have sums of their own; what routing has before its pairs; the threads that route.
const OUTPUTS: usize = 128;
const SLICE: usize = 256;
const MOST_SEGMENTS: usize = 8;
const PAIRS_BEGIN: usize = 16;
const ROUTE_THREADS: u32 = 1024;

// The bits of a form.
const GATED: u32 = 1;
const INTERLEAVED: u32 = 2;
const PARTS: u32 = 4;
const ONE_TOKEN: u32 = 8;
const FOLLOWS: u32 = 16;
const EXPERTS_APART: u32 = 32;
const HALVES_APART: u32 = 64;
const ACTIVATION: u32 = 8;

/// What is chosen from: the only lengths that a routing depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Routing {
    /// Rows of ids.
    pub tokens: usize,
    /// Experts that each token chooses.
    pub choices: usize,
    /// Experts that there are.
    pub experts: usize,
}

impl Routing {
    /// Returns how to sort the pairs by expert; nothing where there is one token, since products then
    /// read the ids themselves.
    ///
    /// # Errors
    /// [`KernelError::Launch`] if there are more than [`MOST_EXPERTS`] experts, or 2^31 pairs.
    pub fn launch(&self) -> Result<Option<ExpertsLaunch>, KernelError> {
        self.check()?;
        Ok((!self.is_of_one_token()).then_some(ExpertsLaunch {
            threads: ROUTE_THREADS,
            ..ExpertsLaunch::simple("tightfit_experts_route", 1)
        }))
    }

    /// Returns the bytes of what [`Routing::launch`] writes; 0 where there is no such launch.
    pub fn bytes(&self) -> usize {
        if self.is_of_one_token() {
            return 0;
        }
        let pairs = (PAIRS_BEGIN + 4 * self.pairs()).next_multiple_of(16);
        pairs + 16 * self.most_tiles()
    }

    /// Returns the rows of a tile, the most pairs of one expert that are computed together. Results do
    /// not depend on it.
    pub fn tile_rows(&self) -> usize {
        // Most experts shall have one tile, so that their weights are read once.
        match self.pairs().div_ceil(self.experts.max(1)) {
            0..=4 => 8,
            5..=12 => 16,
            _ => 64,
        }
    }

    fn pairs(&self) -> usize {
        self.tokens.saturating_mul(self.choices)
    }

    fn is_of_one_token(&self) -> bool {
        self.tokens == 1 && self.choices > 0 && self.experts > 0
    }

    /// Each expert with pairs may have one tile that is not full.
    fn most_tiles(&self) -> usize {
        let pairs = self.pairs();
        if self.is_of_one_token() {
            return pairs;
        }
        let used = pairs.min(self.experts);
        used + (pairs - used) / self.tile_rows()
    }

    fn check(&self) -> Result<(), KernelError> {
        check("tightfit_experts_route", MOST_EXPERTS, self.experts)?;
        check("tightfit_experts_route", i32::MAX as usize, self.pairs())
    }
}

fn check(kernel: &'static str, most: usize, have: usize) -> Result<(), KernelError> {
    if have <= most {
        Ok(())
    } else {
        Err(KernelError::Launch { kernel, most, have })
    }
}

/// What x has rows for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowsOfX {
    /// Tokens: x is [tokens, inputs].
    Tokens,
    /// Pairs: x is [tokens, choices, inputs].
    Pairs,
}

/// What of a stack has been quantized by itself. That makes a difference with double quantization only: each
/// such tensor has its own mean, and nested scales of its own blocks. Its elements are a multiple of 256
/// blocks, so that codes and scales are those of one matrix; the means lie 16 bytes apart, and the nested scales
/// of each tensor begin at a multiple of 256 bytes from those of the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Quantized {
    /// The whole stack.
    #[default]
    Whole,
    /// The outputs of each expert.
    Experts,
    /// Each half of the outputs of each expert: gates, and the other ones behind them.
    Halves,
}

/// What becomes of a pair's products with its expert's weights. Biases have been added.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Form {
    /// They are the results: y [tokens, choices, results].
    Plain,
    /// The same as f32, for [`combine`].
    Parts,
    /// Two of them make a result: y = activation(gate, up).
    Gated {
        /// Where both are among the outputs of W.
        layout: GateLayout,
        /// What is made of them.
        activation: Activation,
    },
}

/// A product of pairs with their experts' weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpertsProduct {
    /// What is chosen from.
    pub routing: Routing,
    /// The type of x, the bias and y.
    pub float: FloatType,
    /// What x has rows for.
    pub x: RowsOfX,
    /// Columns of y. W has as many outputs for each expert, or with gates twice as many.
    pub results: usize,
    /// Columns of x.
    pub inputs: usize,
    /// Elements of W that share one absmax.
    pub block_size: BlockSize,
    /// What becomes of the products.
    pub form: Form,
    /// What has been quantized by itself.
    pub quantized: Quantized,
    /// Whether all pointers are multiples of 16. The fast kernels need that.
    pub aligned: bool,
    /// Whether the launch right before this one in the stream is a product with the same routing. With
    /// programmatic stream serialization this one then reads the routing, too, before that one has ended.
    pub follows: bool,
}

/// A kernel for experts, and the shape of its launch. Grid and thread blocks have one dimension. Both
/// depend on lengths and the GPU only, never on ids.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpertsLaunch {
    /// The name of the kernel in [`module`].
    pub kernel: &'static str,
    /// Thread blocks; never 0.
    pub grid: u32,
    /// Threads of each.
    pub threads: u32,
    /// Bytes of dynamic shared memory of each. Above 48 KiB the function has to be told first
    /// (`CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`).
    pub shared_bytes: u32,
    /// Bytes of device memory that the kernel needs to work in, at a multiple of 256.
    pub workspace_bytes: usize,
    /// An argument of products.
    pub form: u32,
    /// An argument of products: that of the activation, or 0.
    pub limit: f32,
}

impl ExpertsLaunch {
    fn simple(kernel: &'static str, grid: u32) -> ExpertsLaunch {
        ExpertsLaunch {
            kernel,
            grid,
            threads: THREADS,
            shared_bytes: 0,
            workspace_bytes: 0,
            form: 0,
            limit: 0.0,
        }
    }
}

/// A kernel for tiles of at most so many rows; see `experts_tiles.cuh`.
struct Tier {
    f16: &'static str,
    bf16: &'static str,
    /// Inputs of a unit, stages, and bytes that a stage has of scales for each output.
    unit: usize,
    stages: usize,
    scales: usize,
    /// Thread blocks of a multiprocessor.
    blocks: u32,
}

impl Tier {
    fn of_rows(rows: usize) -> Tier {
        match rows {
            8 => Tier {
                f16: "tightfit_experts_8_f16",
                bf16: "tightfit_experts_8_bf16",
                unit: 256,
                stages: 3,
                scales: 32,
                blocks: 2,
            },
            16 => Tier {
                f16: "tightfit_experts_16_f16",
                bf16: "tightfit_experts_16_bf16",
                unit: 256,
                stages: 3,
                scales: 16,
                blocks: 2,
            },
            _ => Tier {
                f16: "tightfit_experts_64_f16",
                bf16: "tightfit_experts_64_bf16",
                unit: 128,
                stages: 4,
                scales: 16,
                blocks: 1,
            },
        }
    }
}

impl ExpertsProduct {
    /// Returns the rows of W that each expert has.
    pub fn outputs(&self) -> usize {
        match self.form {
            Form::Gated { .. } => self.results.saturating_mul(2),
            Form::Plain | Form::Parts => self.results,
        }
    }

    /// Returns how to compute it.
    ///
    /// # Errors
    /// [`KernelError::ComputeCapability`] below 7.5, and [`KernelError::Launch`] as in
    /// [`Routing::launch`], if a length or the number of all experts' outputs is 2^32 or more, or if
    /// there are more tokens than one launch can do; and [`KernelError::Shape`] if what has been quantized by
    /// itself is no multiple of 256 blocks.
    pub fn launch(&self, gpu: Gpu) -> Result<ExpertsLaunch, KernelError> {
        check_capability(gpu.compute_capability)?;
        self.routing.check()?;
        let all_outputs = self.outputs().saturating_mul(self.routing.experts.max(1));
        for length in [all_outputs, self.inputs] {
            check_length("tightfit_experts", length)?;
        }
        self.check_tensors()?;
        let launch = if self.is_fast(gpu.compute_capability) {
            self.launch_tiles(gpu)?
        } else {
            let kernel = match self.float {
                FloatType::F32 => "tightfit_experts_general_f32",
                FloatType::F16 => "tightfit_experts_general_f16",
                FloatType::Bf16 => "tightfit_experts_general_bf16",
            };
            // A warp has one result of 8 rows at a time.
            let all = self.routing.most_tiles() as u64 * self.results.div_ceil(8) as u64;
            let busy = u64::from(8 * gpu.multiprocessors.clamp(1, 2048));
            ExpertsLaunch::simple(kernel, all.clamp(1, busy) as u32)
        };
        let (form, limit) = self.form_arguments();
        Ok(ExpertsLaunch {
            form,
            limit,
            ..launch
        })
    }

    fn check_tensors(&self) -> Result<(), KernelError> {
        let rows = match self.quantized {
            Quantized::Whole => return Ok(()),
            Quantized::Experts => self.outputs(),
            Quantized::Halves if self.outputs().is_multiple_of(2) => self.outputs() / 2,
            Quantized::Halves => {
                return Err(KernelError::Shape {
                    problem: "outputs of two tensors have to be even",
                    have: self.outputs(),
                });
            }
        };
        let elements = rows.saturating_mul(self.inputs);
        match elements.is_multiple_of(NESTED_BLOCK_SIZE * self.block_size.elements()) {
            true => Ok(()),
            false => Err(KernelError::Shape {
                problem: "the elements of a tensor of a stack have to be a multiple of 256 blocks",
                have: elements,
            }),
        }
    }

    fn form_arguments(&self) -> (u32, f32) {
        let (mut form, limit) = match self.form {
            Form::Plain => (0, 0.0),
            Form::Parts => (PARTS, 0.0),
            Form::Gated { layout, activation } => {
                let (number, limit) = match activation {
                    Activation::Silu => (0, 0.0),
                    Activation::Gelu => (1, 0.0),
                    Activation::GeluTanh => (2, 0.0),
                    Activation::Clamped { limit } => (3, limit),
                };
                let layout = match layout {
                    GateLayout::Halves => 0,
                    GateLayout::Interleaved => INTERLEAVED,
                };
                (GATED | layout | number << ACTIVATION, limit)
            }
        };
        if self.routing.is_of_one_token() {
            form |= ONE_TOKEN;
        }
        if self.follows {
            form |= FOLLOWS;
        }
        form |= match self.quantized {
            Quantized::Whole => 0,
            Quantized::Experts => EXPERTS_APART,
            Quantized::Halves => HALVES_APART,
        };
        (form, limit)
    }

    /// Tiles of 128 outputs.
    fn output_tiles(&self) -> usize {
        self.outputs().div_ceil(OUTPUTS)
    }

    /// Whether the fast kernels can do it. That must not depend on the number of tokens: the general
    /// ones' sums are made otherwise.
    fn is_fast(&self, capability: Capability) -> bool {
        capability >= (8, 0)
            && self.float != FloatType::F32
            && self.aligned
            && self.inputs.is_multiple_of(64)
            && (64..1 << 25).contains(&self.inputs)
            && self.block_size.elements() >= 64
            && self.results > 0
            // Bytes within an expert are 32 bits wide.
            && self.outputs() as u64 * (self.inputs as u64) < 1 << 32
    }

    fn launch_tiles(&self, gpu: Gpu) -> Result<ExpertsLaunch, KernelError> {
        let rows = self.routing.tile_rows();
        let tier = Tier::of_rows(rows);
        let kernel = match self.float {
            FloatType::F16 => tier.f16,
            _ => tier.bf16,
        };
        let slices = self.inputs.div_ceil(SLICE);
        let segments = slices.div_ceil(slices.div_ceil(MOST_SEGMENTS));
        let tiles = self
            .routing
            .most_tiles()
            .saturating_mul(self.output_tiles());
        // The units of all tiles are counted in 32 bits, and there are no fewer than segments.
        let units = tiles.saturating_mul(self.inputs.div_ceil(tier.unit));
        check(kernel, i32::MAX as usize, units)?;
        // Each has a counter.
        let busy = gpu.multiprocessors.clamp(1, 2048) * tier.blocks;
        let busy = busy.min(COUNTERS as u32 / 4) as usize;
        let grid = (tiles * segments).clamp(1, busy);
        Ok(ExpertsLaunch {
            grid: grid as u32,
            shared_bytes: tier.shared_bytes(rows),
            workspace_bytes: match segments {
                1 => 0,
                _ => COUNTERS + grid * segments * OUTPUTS * rows * 4,
            },
            ..ExpertsLaunch::simple(kernel, 1)
        })
    }
}

/// Returns how to add up the parts of each token: y [tokens, outputs] of type `float`, of parts
/// [tokens, choices, outputs].
///
/// # Errors
/// [`KernelError::Launch`] as in [`Routing::launch`], or if the grid is too large for a launch.
pub fn combine(
    routing: Routing,
    float: FloatType,
    outputs: usize,
) -> Result<ExpertsLaunch, KernelError> {
    let kernel = match float {
        FloatType::F32 => "tightfit_experts_combine_f32",
        FloatType::F16 => "tightfit_experts_combine_f16",
        FloatType::Bf16 => "tightfit_experts_combine_bf16",
    };
    routing.check()?;
    check_length(kernel, routing.tokens)?;
    check_length(kernel, outputs)?;
    let blocks = routing.tokens as u64 * outputs.div_ceil(THREADS as usize) as u64;
    let blocks = grid(kernel, blocks)?;
    Ok(ExpertsLaunch::simple(kernel, blocks))
}

#[cfg(test)]
mod tests;
