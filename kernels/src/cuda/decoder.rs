//! What a decoder computes between its products, in few launches: [`crate::decoder`] for GPUs.
//!
//! | launch | arguments |
//! |---|---|
//! | [`rms_norm`] | x, add, weight, y, columns: u32, eps: f32, weight offset: f32 |
//! | [`gate`] | gate, up, y, elements: u64, [`activation_argument`]: u32 |
//! | [`add`] | x, add, elements: u64 |
//! | [`gather`] | table, ids: \*u32, y, faults: \*u32, rows: u32, rows of the table: u32, columns: u32 |
//! | [`dense`] | weights, x, bias, y, rows: u32, outputs: u32, inputs: u32 |
//! | [`rotate`] | queries, keys, values, query norm, key norm, positions: \*u32, frequencies: \*f32, key cache, value cache, faults: \*u32, rows: u32, query heads: u32, key heads: u32, head size: u32, rotary: u32, capacity: u32, scaling: f32, norm's eps: f32, norm's weight offset: f32 |
//! | [`attend`] | queries, key cache, value cache, positions: \*u32, y, workspace: \*u8, faults: \*u32, rows: u32, query heads: u32, key heads: u32, head size: u32, capacity: u32, window: u32, length: u32, [`DecoderLaunch::shares`]: u32, scale: f32 |
//! | [`top`] | x, ids: \*u32, values: \*f32, workspace: \*u8, rows: u32, columns: u32, k: u32, [`DecoderLaunch::shares`]: u32 |
//! | [`route`] | scores, ids: \*i32, weights: \*f32, rows: u32, experts: u32, k: u32, normalize: u32 |
//! | [`combine`] | x, weights: \*f32, y, rows: u32, k: u32, columns: u32 |
//!
//! Lengths and what is computed are those of the methods of [`crate::Kernels`] with these names.
//!
//! - `add` of [`rms_norm`] may be null: then x is only read, and y may be x. Elsewhere norms' weights and the bias
//!   may be null, and y may be where `gate` or `up` is. Nothing else may overlap what is written.
//! - Pointers are multiples of the size of their element. Those of [`rotate`] and [`attend`] to matrices are multiples
//!   of 16; where others are too, and columns are multiples of 8, the kernels are faster.
//! - `faults` is the word of [`crate::decoder::Faults`]: bits are set in it, and it is never cleared here.
//! - `window` and `length` are [`visible_arguments`].
//! - The workspace is as in [`super::linear`], and can be the same: its first [`COUNTERS`] bytes are zero
//!   before the first launch that uses it, and every launch leaves them zero.
//! - A grid never depends on ids or positions: a graph of these launches can be replayed with others.
//! - A launch may have the attribute for programmatic stream serialization. Then it waits until the launch
//!   before it has ended before it reads anything.
//! - Sums are f32. Those of [`dense`] and [`rms_norm`] do not depend on other rows; those of [`attend`] depend on
//!   its shares, which depend on the GPU and on how many rows there are.

use super::{
    THREADS,
    linear::{COUNTERS, Gpu, MachineCode, check_capability, grid, module_of},
};
use crate::{
    Activation, FloatType, KernelError,
    decoder::{
        Attention, Operation, RmsNorm, Rotation, Visible,
        choose::{check_route, check_top},
        shape,
    },
};

/// For every GPU of compute capability 8.0 and later, as PTX, compressed.
const PTX: &[u8] = include_bytes!("../../cuda/decoder.ptx.zlib");

const MACHINE_CODE: [MachineCode; 3] = [
    (
        (7, 5),
        (7, 9),
        include_bytes!("../../cuda/decoder.sm_75.cubin.zlib"),
    ),
    (
        (8, 0),
        (8, 9),
        include_bytes!("../../cuda/decoder.sm_80.cubin.zlib"),
    ),
    (
        (9, 0),
        (9, 9),
        include_bytes!("../../cuda/decoder.sm_90.cubin.zlib"),
    ),
];

/// Returns the kernels for a compute capability, as [`super::linear::module`] does.
///
/// # Errors
/// [`KernelError::ComputeCapability`] below 7.5.
pub fn module(compute_capability: (u32, u32)) -> Result<Vec<u8>, KernelError> {
    module_of(compute_capability, &MACHINE_CODE, PTX)
}

/// Every kernel in [`module`].
pub const KERNELS: [&str; 34] = [
    "tightfit_decoder_norm_f32",
    "tightfit_decoder_norm_f16",
    "tightfit_decoder_norm_bf16",
    "tightfit_decoder_gate_f32",
    "tightfit_decoder_gate_f16",
    "tightfit_decoder_gate_bf16",
    "tightfit_decoder_add_f32",
    "tightfit_decoder_add_f16",
    "tightfit_decoder_add_bf16",
    "tightfit_decoder_gather_32",
    "tightfit_decoder_gather_16",
    "tightfit_decoder_dense_1_f32",
    "tightfit_decoder_dense_1_f16",
    "tightfit_decoder_dense_1_bf16",
    "tightfit_decoder_dense_8_f32",
    "tightfit_decoder_dense_8_f16",
    "tightfit_decoder_dense_8_bf16",
    "tightfit_decoder_rotate_f32",
    "tightfit_decoder_rotate_f16",
    "tightfit_decoder_rotate_bf16",
    "tightfit_decoder_attend_1_f32",
    "tightfit_decoder_attend_1_f16",
    "tightfit_decoder_attend_1_bf16",
    "tightfit_decoder_attend_8_f16",
    "tightfit_decoder_attend_8_bf16",
    "tightfit_decoder_top_f32",
    "tightfit_decoder_top_f16",
    "tightfit_decoder_top_bf16",
    "tightfit_decoder_route_f32",
    "tightfit_decoder_route_f16",
    "tightfit_decoder_route_bf16",
    "tightfit_decoder_combine_f32",
    "tightfit_decoder_combine_f16",
    "tightfit_decoder_combine_bf16",
];

// As in `kernels/cuda`.
const EIGHT: usize = 8;
const WARPS: usize = 8;
const ATTEND_KEYS: usize = 64;
const MOST_SPLITS: usize = 64;
const SORTED: usize = 2048;

/// A kernel and the shape of its launch. Grid and thread blocks have one dimension, and no dynamic shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecoderLaunch {
    /// The name of the kernel in [`module`].
    pub kernel: &'static str,
    /// Thread blocks; never 0.
    pub grid: u32,
    /// Threads of each.
    pub threads: u32,
    /// Bytes of device memory that the kernel needs to work in, at a multiple of 256.
    pub workspace_bytes: usize,
    /// In how many parts the work on a row is dealt out.
    pub shares: u32,
}

impl DecoderLaunch {
    fn new(kernels: &[&'static str], float: FloatType, blocks: u64) -> Result<Self, KernelError> {
        let kernel = kernels[match float {
            FloatType::F32 => 0,
            FloatType::F16 => 1,
            FloatType::Bf16 => 2,
        }];
        Ok(DecoderLaunch {
            kernel,
            grid: grid(kernel, blocks.max(1))?,
            threads: THREADS,
            workspace_bytes: 0,
            shares: 1,
        })
    }
}

/// Looks whether lengths can be arguments of kernels.
fn check_lengths(lengths: &[usize]) -> Result<(), KernelError> {
    match lengths
        .iter()
        .find(|length| u32::try_from(**length).is_err())
    {
        Some(length) => Err(shape("a length is less than 2^32", *length)),
        None => Ok(()),
    }
}

/// [`crate::Kernels::rms_norm`] and [`crate::Kernels::add_rms_norm`]. Not for no rows: there is nothing to launch then.
///
/// # Errors
/// [`KernelError::Shape`] and [`KernelError::Launch`] if something is too long for a launch, as in every
/// function here.
pub fn rms_norm(norm: &RmsNorm) -> Result<DecoderLaunch, KernelError> {
    check_lengths(&[norm.rows, norm.columns])?;
    DecoderLaunch::new(&KERNELS[0..3], norm.float, norm.rows as u64)
}

/// [`crate::Kernels::gate`].
///
/// # Errors
/// As [`rms_norm`].
pub fn gate(float: FloatType, elements: usize) -> Result<DecoderLaunch, KernelError> {
    let blocks = elements.div_ceil(EIGHT * THREADS as usize) as u64;
    DecoderLaunch::new(&KERNELS[3..6], float, blocks)
}

/// Returns what [`gate`]'s kernels take for an activation; nothing for [`Activation::Clamped`], which they do
/// not know.
pub const fn activation_argument(activation: Activation) -> Option<u32> {
    match activation {
        Activation::Silu => Some(0),
        Activation::Gelu => Some(1),
        Activation::GeluTanh => Some(2),
        Activation::Clamped { .. } => None,
    }
}

/// [`crate::Kernels::add`].
///
/// # Errors
/// As [`rms_norm`].
pub fn add(float: FloatType, elements: usize) -> Result<DecoderLaunch, KernelError> {
    let blocks = elements.div_ceil(EIGHT * THREADS as usize) as u64;
    DecoderLaunch::new(&KERNELS[6..9], float, blocks)
}

/// [`crate::Kernels::gather`] of so many rows.
///
/// # Errors
/// As [`rms_norm`].
pub fn gather(
    float: FloatType,
    rows: usize,
    table_rows: usize,
    columns: usize,
) -> Result<DecoderLaunch, KernelError> {
    check_lengths(&[rows, table_rows, columns])?;
    let blocks = rows as u64 * columns.div_ceil(EIGHT * THREADS as usize) as u64;
    let [wide, narrow] = [KERNELS[9], KERNELS[10]];
    DecoderLaunch::new(&[wide, narrow, narrow], float, blocks)
}

/// [`crate::Kernels::dense`].
///
/// # Errors
/// As [`rms_norm`].
pub fn dense(
    float: FloatType,
    [rows, outputs, inputs]: [usize; 3],
) -> Result<DecoderLaunch, KernelError> {
    check_lengths(&[rows, outputs, inputs])?;
    let (kernels, tiles) = match rows {
        1 => (&KERNELS[11..14], 1),
        _ => (&KERNELS[14..17], rows.div_ceil(8)),
    };
    // A warp has an output.
    let blocks = (outputs.div_ceil(WARPS) as u64).saturating_mul(tiles as u64);
    DecoderLaunch::new(kernels, float, blocks)
}

/// [`crate::Kernels::rotate`].
///
/// # Errors
/// As [`rms_norm`], and if there cannot be such a rotation.
pub fn rotate(rotation: &Rotation) -> Result<DecoderLaunch, KernelError> {
    rotation.check()?;
    let heads = &rotation.heads;
    check_lengths(&[heads.rows, heads.query_heads, heads.kv_heads])?;
    let of_row = heads.query_heads as u64 + 2 * heads.kv_heads as u64;
    check_lengths(&[of_row as usize])?;
    // A warp has a head of a row.
    let blocks = (heads.rows as u64)
        .saturating_mul(of_row)
        .div_ceil(WARPS as u64);
    DecoderLaunch::new(&KERNELS[17..20], heads.float, blocks)
}

/// Returns what [`attend`]'s kernels take for what is seen: window and length.
pub fn visible_arguments(visible: Visible) -> [u32; 2] {
    let argument = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    match visible {
        Visible::Causal { window } => [window.map_or(0, |window| argument(window.get())), 0],
        Visible::First(count) => [0, argument(count.get())],
    }
}

/// [`crate::Kernels::attend`], where no row sees more than about `most` keys: results are right whatever
/// it is, and the GPU is busy if it is right too. It is not for no rows.
///
/// # Errors
/// As [`rms_norm`], and if there cannot be such an attention.
pub fn attend(attention: &Attention, most: usize, gpu: Gpu) -> Result<DecoderLaunch, KernelError> {
    check_capability(gpu.compute_capability)?;
    attention.check()?;
    let heads = &attention.heads;
    check_lengths(&[heads.query_elements(), heads.kv_elements(1)])?;
    let group = heads.query_heads / heads.kv_heads;
    // Queries that look at the same keys are computed together, up to eight; wide elements are too many
    // registers for that.
    let (kernels, at_once) = match heads.float {
        FloatType::F16 if group > 1 => (&[KERNELS[23]; 3][..], 8),
        FloatType::Bf16 if group > 1 => (&[KERNELS[24]; 3][..], 8),
        _ => (&KERNELS[20..23], 1),
    };
    let units = (heads.rows as u64)
        .saturating_mul(heads.kv_heads as u64)
        .saturating_mul(group.div_ceil(at_once) as u64);
    let most = match attention.visible {
        Visible::First(count) => count.get(),
        Visible::Causal { window } => {
            let most = most.min(attention.capacity);
            window.map_or(most, |window| most.min(window.get()))
        }
    };
    let busy = u64::from(gpu.multiprocessors.clamp(1, 2048));
    let shares = (busy / units.max(1)).min(most.div_ceil(ATTEND_KEYS) as u64);
    let shares = shares.clamp(1, MOST_SPLITS as u64);
    let launch = DecoderLaunch::new(kernels, heads.float, units.saturating_mul(shares))?;
    Ok(DecoderLaunch {
        shares: shares as u32,
        workspace_bytes: match shares {
            1 => 0,
            // There are fewer units than multiprocessors.
            _ => COUNTERS + (units * shares) as usize * at_once * (heads.head_size + 2) * 4,
        },
        ..launch
    })
}

/// [`crate::Kernels::top`].
///
/// # Errors
/// As [`rms_norm`], and if so many cannot be asked for.
pub fn top(
    float: FloatType,
    [rows, columns, k]: [usize; 3],
    gpu: Gpu,
) -> Result<DecoderLaunch, KernelError> {
    check_capability(gpu.compute_capability)?;
    check_top(columns, k)?;
    check_lengths(&[rows, columns])?;
    let busy = 2 * gpu.multiprocessors.clamp(1, 2048) as usize;
    let shares = (busy / rows.max(1)).min(columns.div_ceil(SORTED)).max(1);
    let launch = DecoderLaunch::new(
        &KERNELS[25..28],
        float,
        (rows as u64).saturating_mul(shares as u64),
    )?;
    Ok(DecoderLaunch {
        shares: shares as u32,
        workspace_bytes: match shares {
            1 => 0,
            // There are fewer rows than places for counters.
            _ => COUNTERS + rows * shares * k * 8,
        },
        ..launch
    })
}

/// [`crate::Kernels::route`].
///
/// # Errors
/// As [`rms_norm`], and if there cannot be such a choice.
pub fn route(
    float: FloatType,
    [rows, experts, k]: [usize; 3],
) -> Result<DecoderLaunch, KernelError> {
    check_route(experts, k)?;
    check_lengths(&[rows])?;
    DecoderLaunch::new(&KERNELS[28..31], float, rows.div_ceil(WARPS) as u64)
}

/// [`crate::Kernels::combine`].
///
/// # Errors
/// As [`rms_norm`].
pub fn combine(
    float: FloatType,
    [rows, k, columns]: [usize; 3],
) -> Result<DecoderLaunch, KernelError> {
    check_lengths(&[rows, k, columns])?;
    let blocks = (rows as u64).saturating_mul(columns.div_ceil(THREADS as usize) as u64);
    DecoderLaunch::new(&KERNELS[31..34], float, blocks)
}

/// An argument of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Argument {
    /// The address of the operand with this number, of those of [`Operation::operands`].
    Operand(usize),
    /// The address of a word that gets [`crate::decoder::Faults`].
    Faults,
    /// The address of the workspace; null where none is needed.
    Workspace,
    /// A value, of a float its bits; null where an operand is left out.
    Number(u64),
}

/// A launch with its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// The launch.
    pub launch: DecoderLaunch,
    /// What the kernel takes.
    pub arguments: Vec<Argument>,
}

/// Returns how a GPU does an operation; nothing where there is nothing to do.
///
/// # Errors
/// As [`rms_norm`], and for what there cannot be.
pub fn call(operation: &Operation, gpu: Gpu) -> Result<Option<Call>, KernelError> {
    use Argument::{Faults, Number, Operand, Workspace};
    check_capability(gpu.compute_capability)?;
    operation.check()?;
    let number = |value: usize| Number(value as u64);
    let real = |value: f32| Number(u64::from(value.to_bits()));
    // Operands one after the other, and null for those that are not there.
    let mut next = 0;
    let mut operand = |is_there: bool| {
        if !is_there {
            return Number(0);
        }
        next += 1;
        Operand(next - 1)
    };
    let (launch, arguments) = match *operation {
        Operation::RmsNorm { norm, add } => {
            if norm.rows == 0 {
                return Ok(None);
            }
            let operands = [true, add, true, true].map(&mut operand);
            let rest = [
                number(norm.columns),
                real(norm.eps),
                real(norm.weight_offset),
            ];
            (rms_norm(&norm)?, [&operands[..], &rest].concat())
        }
        Operation::Gate {
            float,
            activation,
            elements,
        } => {
            let activation = activation_argument(activation).unwrap_or(0);
            let operands = [true; 3].map(&mut operand);
            let rest = [number(elements), number(activation as usize)];
            (gate(float, elements)?, [&operands[..], &rest].concat())
        }
        Operation::Add { float, elements } => {
            let operands = [true; 2].map(&mut operand);
            (
                add(float, elements)?,
                [&operands[..], &[number(elements)]].concat(),
            )
        }
        Operation::Gather {
            float,
            rows,
            table_rows,
            columns,
        } => {
            let operands = [true; 3].map(&mut operand);
            let rest = [Faults, number(rows), number(table_rows), number(columns)];
            let launch = gather(float, rows, table_rows, columns)?;
            (launch, [&operands[..], &rest].concat())
        }
        Operation::Dense {
            float,
            lengths,
            bias,
        } => {
            let operands = [true, true, bias, true].map(&mut operand);
            (
                dense(float, lengths)?,
                [&operands[..], &lengths.map(number)].concat(),
            )
        }
        Operation::Rotate { rotation, norms } => {
            let there = [true, true, true, norms[0], norms[1], true, true, true, true];
            let (heads, operands) = (&rotation.heads, there.map(&mut operand));
            let rest = [
                Faults,
                number(heads.rows),
                number(heads.query_heads),
                number(heads.kv_heads),
                number(heads.head_size),
                number(rotation.rotary),
                number(rotation.capacity),
                real(rotation.scaling),
                real(rotation.norm_eps),
                real(rotation.norm_weight_offset),
            ];
            (rotate(&rotation)?, [&operands[..], &rest].concat())
        }
        Operation::Attend { attention, most } => {
            if attention.heads.rows == 0 {
                return Ok(None);
            }
            let (heads, operands) = (&attention.heads, [true; 5].map(&mut operand));
            let launch = attend(&attention, most, gpu)?;
            let [window, length] = visible_arguments(attention.visible);
            let rest = [
                Workspace,
                Faults,
                number(heads.rows),
                number(heads.query_heads),
                number(heads.kv_heads),
                number(heads.head_size),
                number(attention.capacity),
                number(window as usize),
                number(length as usize),
                number(launch.shares as usize),
                real(attention.scale),
            ];
            (launch, [&operands[..], &rest].concat())
        }
        Operation::Top { float, lengths } => {
            let operands = [true; 3].map(&mut operand);
            let launch = top(float, lengths, gpu)?;
            let rest = lengths.map(number);
            let shares = number(launch.shares as usize);
            let arguments = [&operands[..], &[Workspace], &rest, &[shares]].concat();
            (launch, arguments)
        }
        Operation::Combine { float, lengths } => {
            let operands = [true; 3].map(&mut operand);
            let arguments = [&operands[..], &lengths.map(number)].concat();
            (combine(float, lengths)?, arguments)
        }
        Operation::Route {
            float,
            lengths,
            normalize,
        } => {
            let operands = [true; 3].map(&mut operand);
            let normalize = number(usize::from(normalize));
            let arguments = [&operands[..], &lengths.map(number), &[normalize]].concat();
            (route(float, lengths)?, arguments)
        }
    };
    Ok(Some(Call { launch, arguments }))
}

#[cfg(test)]
mod tests;
