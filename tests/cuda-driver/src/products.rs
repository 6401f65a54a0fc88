//! What the kernels of products take, and how they have to be launched.

use tightfit_kernels::cuda::linear::{self, COUNTERS, Gpu, Linear, LinearLaunch};
use tightfit_kernels::{
    BlockSize, FloatType, Isa, Kernels, LinearWeights, NESTED_BLOCK_SIZE, QuantType, Scales,
    blocks, packed_bytes,
};

use crate::experts;
use crate::kernels::{Access, Parameters, Passed, Shape, memory};
use crate::tiles;

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

pub(crate) fn float_of(kernel: &str) -> Result<FloatType, String> {
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
    let is_transposed = is_transposed(kernel);
    let launch = match is_transposed {
        false => launch_of(&linear, kernel, shape, parameters.u32(14))?,
        true => transposed_launch_of(&linear, kernel, shape, parameters.u32(14))?,
    };
    let (of_x, of_y) = match is_transposed {
        false => (inputs, outputs),
        true => (outputs, inputs),
    };
    if is_transposed && parameters.u64(6) != 0 {
        return Err("there is a bias that it does not read".to_owned());
    }
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
        read(5, rows * of_x, float.bytes())?,
        optional(6, outputs, float.bytes())?,
        memory(parameters, 7, rows * of_y, float.bytes(), Write)?,
        workspace,
    ];
    passed.extend((9..15).map(|index| Passed::Number(parameters.u32(index).into())));
    if let Some([of_x, of_codes]) = &launch.maps {
        passed.push(tiles::map(parameters, 15, 5, of_x)?);
        passed.push(tiles::map(parameters, 16, 0, of_codes)?);
    }
    Ok(passed)
}

fn is_transposed(kernel: &str) -> bool {
    kernel.starts_with("tightfit_linear_transposed")
        || kernel.starts_with("tightfit_linear_many_transposed")
}

/// The launch of a gradient that this is.
fn transposed_launch_of(
    linear: &Linear,
    kernel: &str,
    shape: Shape,
    shares: u32,
) -> Result<LinearLaunch, String> {
    let mut expected = Vec::new();
    for by_row in [false, true] {
        let launch = Linear { by_row, ..*linear }.launch_transposed(GPU);
        let launch = launch.map_err(|error| error.to_string())?;
        let its = Shape {
            grid: launch.grid,
            threads: launch.threads,
            shared_bytes: launch.shared_bytes,
        };
        if (launch.kernel, its, launch.shares) == (kernel, shape, shares) {
            return Ok(launch);
        }
        expected.push(launch);
    }
    Err(format!(
        "launched as {shape:?} in {shares} shares, not {expected:?}"
    ))
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
    // Those for experts that route and combine have none.
    let place = if experts::is_for_experts(kernel) {
        9
    } else {
        8
    };
    let may_have = is_product(kernel) || experts::is_for_experts(kernel);
    let workspace = passed.get(place).filter(|_| may_have);
    let has_workspace = workspace.is_some_and(|workspace| workspace.memory().is_some());
    // It is the last argument that is memory.
    let workspace = memory.last().filter(|_| has_workspace);
    workspace.is_none_or(|bytes| bytes[..COUNTERS.min(bytes.len())].iter().all(|b| *b == 0))
}

/// Arguments, and what those that are memory point to.
pub(crate) struct Operands<'a> {
    pub(crate) passed: &'a [Passed],
    pub(crate) memory: &'a mut [Vec<u8>],
}

/// Weights that own what they are made of.
pub(crate) struct OwnedWeights {
    quant_type: QuantType,
    outputs: usize,
    inputs: usize,
    block_size: BlockSize,
    codes: Vec<u8>,
    scales: Vec<u8>,
    absmax: Vec<f32>,
    nested: Vec<f32>,
    mean: Vec<f32>,
    map: Option<[f32; 256]>,
}

impl OwnedWeights {
    /// The same with f32 scales, of tensors that have each been quantized by itself: so far apart are their means, and
    /// at multiples of so much their nested scales begin.
    pub(crate) fn into_plain(mut self, tensors: usize, [mean, begin]: [usize; 2]) -> OwnedWeights {
        let Some(map) = self.map.take() else {
            return self;
        };
        let of_tensor = (self.scales.len() / tensors.max(1)).max(1);
        let apart = of_tensor
            .div_ceil(NESTED_BLOCK_SIZE)
            .next_multiple_of(begin);
        let scale = |(index, code): (usize, &u8)| {
            let (tensor, block) = (index / of_tensor, index % of_tensor);
            let nested = self.nested[tensor * apart + block / NESTED_BLOCK_SIZE];
            map[usize::from(*code)] * nested + self.mean[tensor * mean]
        };
        self.absmax = self.scales.iter().enumerate().map(scale).collect();
        self
    }

    pub(crate) fn view(&self) -> LinearWeights<'_> {
        LinearWeights {
            quant_type: self.quant_type,
            outputs: self.outputs,
            inputs: self.inputs,
            block_size: self.block_size,
            codes: &self.codes,
            scales: match &self.map {
                None => Scales::Absmax(&self.absmax),
                Some(map) => Scales::Double {
                    codes: &self.scales,
                    nested_absmax: &self.nested,
                    absmax_mean: self.mean[0],
                    map,
                },
            },
        }
    }
}

impl Operands<'_> {
    pub(crate) fn number(&self, index: usize) -> usize {
        match self.passed[index] {
            Passed::Number(value) => value as usize,
            Passed::Memory { .. } | Passed::Map { .. } => 0,
        }
    }

    /// Which of the memory an argument is.
    fn place(&self, index: usize) -> Option<usize> {
        let before = self.passed[..index].iter().filter_map(Passed::memory);
        let before = before.count();
        self.passed[index].memory().map(|_| before)
    }

    pub(crate) fn bytes(&self, index: usize) -> Option<Vec<u8>> {
        self.place(index).map(|place| self.memory[place].clone())
    }

    pub(crate) fn ids(&self, index: usize) -> Vec<u32> {
        let bytes = self.bytes(index).unwrap_or_default();
        let (ids, _) = bytes.as_chunks::<4>();
        ids.iter().map(|id| u32::from_le_bytes(*id)).collect()
    }

    pub(crate) fn floats(&self, index: usize) -> Vec<f32> {
        self.ids(index).into_iter().map(f32::from_bits).collect()
    }

    pub(crate) fn write(self, index: usize, bytes: &[u8]) -> Result<(), String> {
        match self.place(index) {
            None => Err(format!("argument {index} is no memory")),
            Some(place) => {
                self.memory[place].copy_from_slice(bytes);
                Ok(())
            }
        }
    }

    /// Weights of the first five arguments; the others are the block size and the table.
    pub(crate) fn weights(
        &self,
        outputs: usize,
        inputs: usize,
        [block_size, table]: [usize; 2],
    ) -> Result<OwnedWeights, String> {
        let block_size = BlockSize::new(self.number(block_size));
        Ok(OwnedWeights {
            quant_type: match self.number(table) {
                0 => QuantType::Nf4,
                _ => QuantType::Fp4,
            },
            outputs,
            inputs,
            block_size: block_size.map_err(|error| error.to_string())?,
            codes: self.bytes(0).unwrap_or_default(),
            scales: self.bytes(1).unwrap_or_default(),
            absmax: self.floats(1),
            nested: self.floats(2),
            mean: self.floats(3),
            map: self.floats(4).try_into().ok(),
        })
    }
}

/// Computes what the kernel would, where no compiler has made an emulator of it.
pub(crate) fn on_the_processor(
    kernel: &str,
    passed: &[Passed],
    memory: &mut [Vec<u8>],
) -> Result<(), String> {
    let operands = Operands { passed, memory };
    let [rows, outputs, inputs] = [9, 10, 11].map(|index| operands.number(index));
    let weights = operands.weights(outputs, inputs, [12, 13])?;
    let (x, bias) = (operands.bytes(5).unwrap_or_default(), operands.bytes(6));
    let mut y = operands.bytes(7).unwrap_or_default();
    let (float, one) = (float_of(kernel)?, std::num::NonZeroUsize::MIN);
    let weights = weights.view();
    let computed = Kernels::new(Isa::Portable).and_then(|kernels| match is_transposed(kernel) {
        true => kernels.linear_transposed_bytes(&weights, float, rows, &x, &mut y, one),
        false => kernels.linear_bytes(&weights, float, rows, &x, bias.as_deref(), &mut y, one),
    });
    computed.map_err(|error| error.to_string())?;
    operands.write(7, &y)
}
