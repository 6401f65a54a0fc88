//! What the kernels for experts take, and how they have to be launched.

use tightfit_kernels::cuda::experts::{
    self, ExpertsLaunch, ExpertsProduct, Form, Quantized, Routing, RowsOfX, combine,
};
use tightfit_kernels::{
    Activation, BlockSize, Choices, ExpertsMatrices, FloatType, GateLayout, Isa, Kernels,
    NESTED_BLOCK_SIZE, blocks, packed_bytes,
};

use crate::kernels::{Access, Parameters, Passed, Shape, memory};
use crate::products::{GPU, Operands, float_of};

const ROUTE: &str = "tightfit_experts_route";
const COMBINE: &str = "tightfit_experts_combine";

/// The bits of a form, as `kernels/cuda/experts_common.cuh` has them.
const GATED: u32 = 1;
const INTERLEAVED: u32 = 2;
const PARTS: u32 = 4;
const ONE_TOKEN: u32 = 8;
const FOLLOWS: u32 = 16;
const EXPERTS_APART: u32 = 32;
const HALVES_APART: u32 = 64;

/// Of tensors that have been quantized by themselves: what their means are apart, and their nested scales begin at
/// multiples of, in f32.
const MEAN_FLOATS: usize = 4;
const NESTED_FLOATS: usize = 64;

/// Where pairs and tiles begin in a routing.
const PAIRS_BEGIN: usize = 16;

/// Whether a kernel is one for experts.
pub(crate) fn is_for_experts(kernel: &str) -> bool {
    kernel.starts_with("tightfit_experts")
}

/// The kernels for experts, each with its dynamic shared memory.
pub(crate) fn kernels() -> Vec<(&'static str, u32)> {
    experts::kernels(GPU.compute_capability)
}

fn text(error: impl ToString) -> String {
    error.to_string()
}

/// Which pairs there are: a number of tokens with as many choices. The launch of a product does not say what
/// tokens are where each pair has a row of x; nothing but whether there is one depends on that.
fn routing_of(pairs: usize, choices: usize, experts: usize, one_token: bool) -> Routing {
    match one_token {
        true => Routing {
            tokens: 1,
            choices: pairs,
            experts,
        },
        false if pairs == 1 => Routing {
            // More than one token has no choice of one pair, so that there is one that is not sorted.
            tokens: 1,
            choices: 1,
            experts: 0,
        },
        false => Routing {
            tokens: pairs / choices.max(1),
            choices,
            experts,
        },
    }
}

/// The arguments of a launch, by the tables in [`tightfit_kernels::cuda::experts`]. An error is what is wrong
/// with them.
pub(crate) fn arguments(
    kernel: &str,
    shape: Shape,
    parameters: Parameters,
) -> Result<Vec<Passed>, String> {
    if kernel == ROUTE {
        return route_arguments(shape, parameters);
    }
    if kernel.starts_with(COMBINE) {
        return combine_arguments(kernel, shape, parameters);
    }
    product_arguments(kernel, shape, parameters)
}

fn expect(launch: &ExpertsLaunch, shape: Shape) -> Result<(), String> {
    let expected = Shape {
        grid: launch.grid,
        threads: launch.threads,
        shared_bytes: launch.shared_bytes,
    };
    match expected == shape {
        true => Ok(()),
        false => Err(format!("launched as {shape:?}, not {expected:?}")),
    }
}

fn route_arguments(shape: Shape, parameters: Parameters) -> Result<Vec<Passed>, String> {
    let [pairs, experts, rows] = [2, 3, 4].map(|index| parameters.u32(index) as usize);
    // Of one choice each: sorting depends on the pairs only.
    let routing = Routing {
        tokens: pairs,
        choices: 1,
        experts,
    };
    if pairs > 1 {
        let launch = routing.launch().map_err(text)?;
        expect(&launch.ok_or("one token is not sorted")?, shape)?;
        if rows != routing.tile_rows() {
            return Err(format!("tiles of {rows} rows"));
        }
    }
    let of_routing = if pairs > 1 { routing.bytes() } else { 64 };
    if !parameters.u64(1).is_multiple_of(256) {
        return Err(format!("the routing is at {:#x}", parameters.u64(1)));
    }
    let mut passed = vec![
        memory(parameters, 0, pairs, 4, Access::Read)?,
        memory(parameters, 1, of_routing, 1, Access::Write)?,
    ];
    passed.extend((2..5).map(|index| Passed::Number(parameters.u32(index).into())));
    Ok(passed)
}

fn combine_arguments(
    kernel: &str,
    shape: Shape,
    parameters: Parameters,
) -> Result<Vec<Passed>, String> {
    let float = float_of(kernel)?;
    let [tokens, choices, experts, outputs] =
        [4, 5, 6, 7].map(|index| parameters.u32(index) as usize);
    let routing = Routing {
        tokens,
        choices,
        experts,
    };
    expect(&combine(routing, float, outputs).map_err(text)?, shape)?;
    let pairs = tokens * choices;
    let read = |index, elements: usize, width| match elements {
        0 => Ok(Passed::Number(0)),
        _ => memory(parameters, index, elements, width, Access::Read),
    };
    let mut passed = vec![
        read(0, pairs * outputs, 4)?,
        read(1, pairs, 4)?,
        read(2, pairs, 4)?,
        memory(
            parameters,
            3,
            tokens * outputs,
            float.bytes(),
            Access::Write,
        )?,
    ];
    passed.extend((4..8).map(|index| Passed::Number(parameters.u32(index).into())));
    Ok(passed)
}

fn form_of(form: u32, limit: f32) -> Result<Form, String> {
    if form & GATED == 0 {
        return match form & PARTS {
            0 => Ok(Form::Plain),
            _ => Ok(Form::Parts),
        };
    }
    let activation = match form >> 8 {
        0 => Activation::Silu,
        1 => Activation::Gelu,
        2 => Activation::GeluTanh,
        3 => Activation::Clamped { limit },
        other => return Err(format!("there is no activation {other}")),
    };
    let layout = match form & INTERLEAVED {
        0 => GateLayout::Halves,
        _ => GateLayout::Interleaved,
    };
    Ok(Form::Gated { layout, activation })
}

/// What has been quantized by itself, and how many tensors that makes.
fn quantized_of(form: u32, experts: usize) -> Result<(Quantized, usize), String> {
    match form & (EXPERTS_APART | HALVES_APART) {
        0 => Ok((Quantized::Whole, 1)),
        EXPERTS_APART => Ok((Quantized::Experts, experts)),
        HALVES_APART => Ok((Quantized::Halves, 2 * experts)),
        _ => Err(format!("both experts and halves are apart: {form}")),
    }
}

fn product_arguments(
    kernel: &str,
    shape: Shape,
    parameters: Parameters,
) -> Result<Vec<Passed>, String> {
    let float = float_of(kernel)?;
    let count = |index| parameters.u32(index) as usize;
    let [pairs, of_row, experts, outputs, inputs] = [10, 11, 12, 13, 14].map(count);
    let block_size = BlockSize::new(count(15)).map_err(text)?;
    if parameters.u32(16) > 1 {
        return Err(format!("there is no table {}", parameters.u32(16)));
    }
    let (bits, limit) = (parameters.u32(17), f32::from_bits(parameters.u32(18)));
    let form = form_of(bits, limit)?;
    let (quantized, tensors) = quantized_of(bits, experts)?;
    let results = match form {
        Form::Gated { .. } => outputs / 2,
        Form::Plain | Form::Parts => outputs,
    };
    let one_token = bits & ONE_TOKEN != 0;
    let routing = routing_of(pairs, of_row, experts, one_token);
    let pointers: Vec<u64> = (0..8).map(|index| parameters.u64(index)).collect();
    let product = ExpertsProduct {
        routing,
        float,
        x: match of_row {
            1 => RowsOfX::Pairs,
            _ => RowsOfX::Tokens,
        },
        results,
        inputs,
        block_size,
        form,
        quantized,
        aligned: pointers.iter().all(|pointer| pointer % 16 == 0),
        follows: bits & FOLLOWS != 0,
    };
    let launch = product.launch(GPU).map_err(text)?;
    if launch.kernel != kernel || launch.form != bits || launch.limit.to_bits() != limit.to_bits() {
        return Err(format!("launched with the form {bits}, not {launch:?}"));
    }
    expect(&launch, shape)?;

    let elements = experts * outputs * inputs;
    let scales = blocks(elements, block_size);
    let nulls = [2, 3, 4].map(|index| parameters.u64(index) == 0);
    let is_double = !nulls[0];
    if nulls != [nulls[0]; 3] {
        return Err("nested scales, offset and map are not there together".to_owned());
    }
    if tensors > 1 && !is_double {
        return Err("tensors have means of their own, and there are none".to_owned());
    }
    let of_tensor = (scales / tensors.max(1)).div_ceil(NESTED_BLOCK_SIZE);
    let nested = of_tensor.next_multiple_of(NESTED_FLOATS) * tensors.saturating_sub(1) + of_tensor;
    use Access::{Read, Write};
    let read = |index, elements, width| memory(parameters, index, elements, width, Read);
    let optional = |index, elements, width| match parameters.u64(index) {
        0 => Ok(Passed::Number(0)),
        _ => read(index, elements, width),
    };
    let y_width = match form {
        Form::Parts => 4,
        Form::Plain | Form::Gated { .. } => float.bytes(),
    };
    let workspace = match launch.workspace_bytes {
        0 if parameters.u64(9) == 0 => Passed::Number(0),
        0 => return Err("there is a workspace that it does not need".to_owned()),
        _ if !parameters.u64(9).is_multiple_of(256) => {
            return Err(format!("the workspace is at {:#x}", parameters.u64(9)));
        }
        bytes => memory(parameters, 9, bytes, 1, Write)?,
    };
    let mut passed = vec![
        read(0, packed_bytes(elements), 1)?,
        read(1, scales, if is_double { 1 } else { 4 })?,
        optional(2, nested, 4)?,
        optional(3, MEAN_FLOATS * tensors.saturating_sub(1) + 1, 4)?,
        optional(4, 256, 4)?,
        read(5, pairs / of_row.max(1) * inputs, float.bytes())?,
        optional(6, experts * outputs, float.bytes())?,
        memory(parameters, 7, pairs * results, y_width, Write)?,
        match one_token {
            true => read(8, pairs, 4)?,
            false => read(8, routing.bytes(), 1)?,
        },
        workspace,
    ];
    passed.extend((10..19).map(|index| Passed::Number(parameters.u32(index).into())));
    Ok(passed)
}

/// Computes what a kernel would, where no compiler has made an emulator of it.
pub(crate) fn on_the_processor(
    kernel: &str,
    passed: &[Passed],
    memory: &mut [Vec<u8>],
) -> Result<(), String> {
    let operands = Operands { passed, memory };
    if kernel == ROUTE {
        let routing = route(&operands);
        return operands.write(1, &routing);
    }
    let float = float_of(kernel)?;
    let kernels = Kernels::new(Isa::Portable).map_err(text)?;
    let narrow = |values: &[f32]| {
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        let mut out = vec![0; values.len() * float.bytes()];
        let cast = kernels.cast(&bytes, FloatType::F32, float, &mut out);
        cast.map(|()| out).map_err(text)
    };
    if kernel.starts_with(COMBINE) {
        let [tokens, choices, experts, outputs] = [4, 5, 6, 7].map(|index| operands.number(index));
        let (parts, weights, ids) = (operands.floats(0), operands.floats(2), operands.ids(1));
        let mut y = vec![0.0f32; tokens * outputs];
        for (pair, id) in ids.iter().enumerate() {
            if *id as usize >= experts {
                continue;
            }
            let y = &mut y[pair / choices * outputs..][..outputs];
            for (y, part) in y.iter_mut().zip(&parts[pair * outputs..]) {
                *y = weights[pair].mul_add(*part, *y);
            }
        }
        return operands.write(3, &narrow(&y)?);
    }
    let [pairs, of_row, experts, outputs, inputs] =
        [10, 11, 12, 13, 14].map(|index| operands.number(index));
    let bits = operands.number(17) as u32;
    let form = form_of(bits, f32::from_bits(operands.number(18) as u32))?;
    let ids = match bits & ONE_TOKEN {
        0 => ids_of_routing(&operands, pairs),
        _ => operands.ids(8).iter().map(|id| *id as i32).collect(),
    };
    let wide = |index| {
        let bytes = operands.bytes(index).unwrap_or_default();
        let mut out = vec![0; bytes.len() / float.bytes() * 4];
        let cast = kernels.cast(&bytes, float, FloatType::F32, &mut out);
        cast.map(|()| out).map_err(text)
    };
    let (x, bias) = (wide(5)?, operands.bytes(6).map(|_| wide(6)).transpose()?);
    let weights = operands.weights(experts * outputs, inputs, [15, 16])?;
    let weights = match quantized_of(bits, experts)? {
        (Quantized::Whole, _) => weights,
        (_, tensors) => weights.into_plain(tensors, [MEAN_FLOATS, NESTED_FLOATS]),
    };
    let stack = ExpertsMatrices::Stack {
        experts,
        weights: weights.view(),
    };
    let choices = Choices {
        of_token: of_row,
        ids: &ids,
        weights: &[],
    };
    let mut all = vec![0; pairs * outputs * 4];
    let one = std::num::NonZeroUsize::MIN;
    let float_32 = FloatType::F32;
    kernels
        .experts_linear_bytes(
            &stack,
            &choices,
            float_32,
            &x,
            bias.as_deref(),
            &mut all,
            one,
        )
        .map_err(text)?;
    let (all, _) = all.as_chunks::<4>();
    let all: Vec<f32> = all.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let results: Vec<f32> = match form {
        Form::Plain | Form::Parts => all,
        Form::Gated { layout, activation } => all
            .chunks_exact(outputs.max(1))
            .flat_map(|row| {
                let half = outputs / 2;
                let place = move |result| match layout {
                    GateLayout::Halves => (result, half + result),
                    GateLayout::Interleaved => (2 * result, 2 * result + 1),
                };
                let of = move |(gate, up): (usize, usize)| activation.apply(row[gate], row[up]);
                (0..half).map(place).map(of)
            })
            .collect(),
    };
    let bytes = match form {
        Form::Parts => results
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect(),
        Form::Plain | Form::Gated { .. } => narrow(&results)?,
    };
    let mut y = operands.bytes(7).unwrap_or_default();
    let row = y.len() / pairs.max(1);
    for (pair, id) in ids.iter().enumerate() {
        if usize::try_from(*id).is_ok_and(|id| id < experts) {
            y[pair * row..][..row].copy_from_slice(&bytes[pair * row..][..row]);
        }
    }
    operands.write(7, &y)
}

/// Pairs by expert, and the tiles that they are in.
fn route(operands: &Operands<'_>) -> Vec<u8> {
    let [pairs, experts, rows] = [2, 3, 4].map(|index| operands.number(index));
    let mut routing = operands.bytes(1).unwrap_or_default();
    let ids = operands.ids(0);
    let mut by_expert: Vec<u32> = (0..pairs as u32)
        .filter(|pair| (ids[*pair as usize] as usize) < experts)
        .collect();
    by_expert.sort_by_key(|pair| ids[*pair as usize]);
    let mut tiles: Vec<[u32; 4]> = Vec::new();
    for (place, pair) in by_expert.iter().enumerate() {
        let expert = ids[*pair as usize];
        match tiles.last_mut() {
            Some(tile) if tile[0] == expert && (tile[2] as usize) < rows => tile[2] += 1,
            _ => tiles.push([expert, place as u32, 1, 0]),
        }
    }
    let mut write = |at: usize, value: u32| {
        routing[at..at + 4].copy_from_slice(&value.to_le_bytes());
    };
    write(0, tiles.len() as u32);
    for (place, pair) in by_expert.iter().enumerate() {
        write(PAIRS_BEGIN + 4 * place, *pair);
    }
    let begin = (PAIRS_BEGIN + 4 * pairs).next_multiple_of(16);
    for (place, number) in tiles.iter().flatten().enumerate() {
        write(begin + 4 * place, *number);
    }
    routing
}

/// The expert of each pair, -1 for those that are skipped.
fn ids_of_routing(operands: &Operands<'_>, pairs: usize) -> Vec<i32> {
    let routing = operands.bytes(8).unwrap_or_default();
    let word = |at: usize| {
        let bytes = routing[at..at + 4].try_into().unwrap_or_default();
        u32::from_le_bytes(bytes)
    };
    let begin = (PAIRS_BEGIN + 4 * pairs).next_multiple_of(16);
    let mut ids = vec![-1; pairs];
    for tile in 0..word(0) as usize {
        let [expert, first, count] = [0, 4, 8].map(|at| word(begin + 16 * tile + at));
        for place in first..first + count {
            ids[word(PAIRS_BEGIN + 4 * place as usize) as usize] = expert as i32;
        }
    }
    ids
}
