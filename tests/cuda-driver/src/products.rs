//! What the kernels of products take, and how they have to be launched.

use tightfit_kernels::cuda::linear::{self, COUNTERS, Gpu, Linear, LinearLaunch};
use tightfit_kernels::{
    BlockSize, FloatType, Isa, Kernels, LinearWeights, NESTED_BLOCK_SIZE, QuantType, Scales,
    blocks, packed_bytes,
};

use crate::kernels::{Access, Parameters, Passed, Shape, memory};

/// What the stand-in's devices are. Few multiprocessors, so that the emulator has few blocks to run.
pub(crate) const GPU: Gpu = Gpu {
    compute_capability: (9, 0),
    multiprocessors: 4,
};

/// Whether a kernel is one of products.
pub(crate) fn is_product(kernel: &str) -> bool {
    kernel.starts_with("tightfit_linear")
}

/// The kernels of products, each with its dynamic shared memory.
pub(crate) fn kernels() -> Vec<(&'static str, u32)> {
    linear::kernels(GPU.compute_capability)
}

fn float_of(kernel: &str) -> Result<FloatType, String> {
    let name = kernel.rsplit('_').next().unwrap_or_default();
    match name {
        "f32" => Ok(FloatType::F32),
        "f16" => Ok(FloatType::F16),
        "bf16" => Ok(FloatType::Bf16),
        _ => Err(format!("{kernel} is not known")),
    }
}

/// The arguments of a launch, by the table in [`tightfit_kernels::cuda::linear`]. An error is what is
/// wrong with them.
pub(crate) fn arguments(
    kernel: &str,
    shape: Shape,
    parameters: Parameters,
) -> Result<Vec<Passed>, String> {
    let float = float_of(kernel)?;
    let count = |index| parameters.u32(index) as usize;
    let (rows, outputs, inputs) = (count(9), count(10), count(11));
    let block_size = BlockSize::new(count(12)).map_err(|error| error.to_string())?;
    if parameters.u32(13) > 1 {
        return Err(format!("there is no table {}", parameters.u32(13)));
    }
    let elements = outputs * inputs;
    let scales = blocks(elements, block_size);
    let nested = scales.div_ceil(NESTED_BLOCK_SIZE);
    let nulls = [2, 3, 4].map(|index| parameters.u64(index) == 0);
    let is_double = !nulls[0];
    if nulls != [nulls[0]; 3] {
        return Err("nested scales, offset and map are not there together".to_owned());
    }
    let pointers: Vec<u64> = (0..8).map(|index| parameters.u64(index)).collect();
    let linear = Linear {
        float,
        rows,
        outputs,
        inputs,
        block_size,
        aligned: pointers.iter().all(|pointer| pointer % 16 == 0),
        by_row: false,
    };
    let launch = launch_of(&linear, kernel, shape, parameters.u32(14))?;
    if rows > launch.rows {
        return Err(format!("{rows} rows, more than {}", launch.rows));
    }

    use Access::{Read, Write};
    let read = |index, elements, width| memory(parameters, index, elements, width, Read);
    let optional = |index, elements, width| match parameters.u64(index) {
        0 => Ok(Passed::Number(0)),
        _ => read(index, elements, width),
    };
    let workspace = match launch.workspace_bytes {
        0 if parameters.u64(8) == 0 => Passed::Number(0),
        0 => return Err("there is a workspace that it does not need".to_owned()),
        _ if !parameters.u64(8).is_multiple_of(256) => {
            return Err(format!("the workspace is at {:#x}", parameters.u64(8)));
        }
        bytes => memory(parameters, 8, bytes, 1, Write)?,
    };
    let mut passed = vec![
        read(0, packed_bytes(elements), 1)?,
        read(1, scales, if is_double { 1 } else { 4 })?,
        optional(2, nested, 4)?,
        optional(3, 1, 4)?,
        optional(4, 256, 4)?,
        read(5, rows * inputs, float.bytes())?,
        optional(6, outputs, float.bytes())?,
        memory(parameters, 7, rows * outputs, float.bytes(), Write)?,
        workspace,
    ];
    passed.extend((9..15).map(|index| Passed::Number(parameters.u32(index).into())));
    Ok(passed)
}

/// The launch that this is one of: for these rows or, where they are the rest of more, for more.
fn launch_of(
    linear: &Linear,
    kernel: &str,
    shape: Shape,
    shares: u32,
) -> Result<LinearLaunch, String> {
    let mut expected = Vec::new();
    let more = (1..=64).chain((65..=4096).step_by(64));
    for rows in std::iter::once(linear.rows).chain(more.filter(|rows| *rows > linear.rows)) {
        for by_row in [false, true] {
            let launch = Linear {
                rows,
                by_row,
                ..*linear
            }
            .launch(GPU);
            let launch = launch.map_err(|error| error.to_string())?;
            let its = Shape {
                grid: launch.grid,
                threads: launch.threads,
                shared_bytes: launch.shared_bytes,
            };
            if (launch.kernel, its, launch.shares) == (kernel, shape, shares) {
                return Ok(launch);
            }
            if rows == linear.rows {
                expected.push(launch);
            }
        }
    }
    Err(format!(
        "launched as {shape:?} in {shares} shares, not {expected:?}"
    ))
}

/// Whether the counters of a workspace are zero, as each launch has to find and to leave them.
pub(crate) fn counters_are_zero(kernel: &str, passed: &[Passed], memory: &[Vec<u8>]) -> bool {
    let has_workspace = is_product(kernel) && passed[8].memory().is_some();
    // It is the last argument that is memory.
    let workspace = memory.last().filter(|_| has_workspace);
    workspace.is_none_or(|bytes| bytes[..COUNTERS.min(bytes.len())].iter().all(|b| *b == 0))
}

/// Computes what the kernel would, where no compiler has made an emulator of it.
pub(crate) fn on_the_processor(
    kernel: &str,
    passed: &[Passed],
    memory: &mut [Vec<u8>],
) -> Result<(), String> {
    let text = |error: tightfit_kernels::KernelError| error.to_string();
    let number = |index: usize| match passed[index] {
        Passed::Number(value) => value as usize,
        Passed::Memory { .. } => 0,
    };
    // Which of the memory an argument is.
    let place = |index: usize| {
        let before = passed[..index].iter().filter_map(Passed::memory).count();
        passed[index].memory().map(|_| before)
    };
    let bytes = |index: usize| place(index).map(|place| memory[place].clone());
    let floats = |index: usize| {
        let bytes = bytes(index).unwrap_or_default();
        let (floats, _) = bytes.as_chunks::<4>();
        floats
            .iter()
            .map(|float| f32::from_le_bytes(*float))
            .collect::<Vec<f32>>()
    };
    let scales = bytes(1).unwrap_or_default();
    let (absmax, nested, mean, map) = (floats(1), floats(2), floats(3), floats(4));
    let map: Option<[f32; 256]> = map.try_into().ok();
    let codes = bytes(0).unwrap_or_default();
    let weights = LinearWeights {
        quant_type: match number(13) {
            0 => QuantType::Nf4,
            _ => QuantType::Fp4,
        },
        outputs: number(10),
        inputs: number(11),
        block_size: BlockSize::new(number(12)).map_err(|error| error.to_string())?,
        codes: &codes,
        scales: match &map {
            None => Scales::Absmax(&absmax),
            Some(map) => Scales::Double {
                codes: &scales,
                nested_absmax: &nested,
                absmax_mean: mean[0],
                map,
            },
        },
    };
    let (x, bias) = (bytes(5).unwrap_or_default(), bytes(6));
    let Some(y) = place(7) else {
        return Err("y is no memory".to_owned());
    };
    let (float, one) = (float_of(kernel)?, std::num::NonZeroUsize::MIN);
    Kernels::new(Isa::Portable)
        .and_then(|kernels| {
            let y = &mut memory[y];
            kernels.linear_bytes(&weights, float, number(9), &x, bias.as_deref(), y, one)
        })
        .map_err(text)
}
