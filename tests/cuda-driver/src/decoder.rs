//! What the kernels of decoders take, and how they have to be launched.

use std::num::NonZeroUsize;

use tightfit_kernels::cuda::decoder::{Argument, Call, call};
use tightfit_kernels::cuda::linear::COUNTERS;
use tightfit_kernels::decoder::{Attention, Heads, Operand, Operation, RmsNorm, Rotation, Visible};
use tightfit_kernels::{Activation, FloatType, Isa, Kernels};

use crate::kernels::{Access, Parameters, Passed, Shape, memory};
use crate::products::GPU;

/// Whether a kernel is one of decoders.
pub(crate) fn is_of_decoders(kernel: &str) -> bool {
    kernel.starts_with("tightfit_decoder")
}

/// The operation that a launch is of, by the table in [`tightfit_kernels::cuda::decoder`]. `pointer` says whether
/// there is memory at an argument, and `number` what it is else.
fn operation_of(
    kernel: &str,
    shape: Shape,
    pointer: impl Fn(usize) -> bool,
    number: impl Fn(usize) -> u64,
) -> Result<Operation, String> {
    let unknown = || format!("{kernel} is not known");
    let name = kernel
        .strip_prefix("tightfit_decoder_")
        .ok_or_else(unknown)?;
    let (name, float) = name.rsplit_once('_').ok_or_else(unknown)?;
    let float = match float {
        "f32" | "32" => FloatType::F32,
        "f16" | "16" => FloatType::F16,
        "bf16" => FloatType::Bf16,
        _ => return Err(unknown()),
    };
    let count = |index| number(index) as u32 as usize;
    let real = |index| f32::from_bits(number(index) as u32);
    let heads = |first| Heads {
        float,
        rows: count(first),
        query_heads: count(first + 1),
        kv_heads: count(first + 2),
        head_size: count(first + 3),
    };
    let elements = |index| usize::try_from(number(index)).map_err(|error| error.to_string());
    Ok(match name {
        "norm" => Operation::RmsNorm {
            norm: RmsNorm {
                float,
                rows: shape.grid as usize,
                columns: count(4),
                eps: real(5),
                weight_offset: real(6),
            },
            add: pointer(1),
        },
        "gate" => Operation::Gate {
            float,
            elements: elements(3)?,
            activation: match count(4) {
                0 => Activation::Silu,
                1 => Activation::Gelu,
                2 => Activation::GeluTanh,
                _ => return Err(format!("there is no activation {}", count(4))),
            },
        },
        "add" => Operation::Add {
            float,
            elements: elements(2)?,
        },
        "gather" => Operation::Gather {
            float,
            rows: count(4),
            table_rows: count(5),
            columns: count(6),
        },
        "dense_1" | "dense_8" => Operation::Dense {
            float,
            lengths: [count(4), count(5), count(6)],
            bias: pointer(2),
        },
        "rotate" => Operation::Rotate {
            rotation: Rotation {
                heads: heads(10),
                rotary: count(14),
                capacity: count(15),
                scaling: real(16),
                norm_eps: real(17),
                norm_weight_offset: real(18),
            },
            norms: [pointer(3), pointer(4)],
        },
        "attend_1" | "attend_8" => Operation::Attend {
            attention: Attention {
                heads: heads(7),
                capacity: count(11),
                visible: match NonZeroUsize::new(count(13)) {
                    Some(first) => Visible::First(first),
                    None => Visible::Causal {
                        window: NonZeroUsize::new(count(12)),
                    },
                },
                scale: real(15),
            },
            // Keys that are looked at together, in as many shares.
            most: count(14) * 64,
        },
        "top" => Operation::Top {
            float,
            lengths: [count(4), count(5), count(6)],
        },
        "combine" => Operation::Combine {
            float,
            lengths: [count(3), count(4), count(5)],
        },
        "route" => Operation::Route {
            float,
            lengths: [count(3), count(4), count(5)],
            normalize: count(6) != 0,
        },
        _ => return Err(unknown()),
    })
}

/// The arguments of a launch. An error is what is wrong with them.
pub(crate) fn arguments(
    kernel: &str,
    shape: Shape,
    parameters: Parameters,
) -> Result<Vec<Passed>, String> {
    // Two of the kernels count in 64 bits, and there only.
    let wide = |index| match kernel.contains("_gate_") {
        true => index == 3,
        false => kernel.contains("_add_") && index == 2,
    };
    let number = |index| match wide(index) {
        true => parameters.u64(index),
        false => parameters.u32(index).into(),
    };
    let operation = operation_of(kernel, shape, |index| parameters.u64(index) != 0, number)?;
    let Some(Call { launch, arguments }) = call(&operation, GPU).map_err(|e| e.to_string())? else {
        return Err(format!("there is nothing to do for {operation:?}"));
    };
    let expected = Shape {
        grid: launch.grid,
        threads: launch.threads,
        shared_bytes: 0,
    };
    if (launch.kernel, expected) != (kernel, shape) {
        return Err(format!("{kernel} as {shape:?}, not {launch:?}"));
    }
    let shapes = operation.operands();
    let passed = arguments.iter().enumerate().map(|(index, argument)| {
        let access = |is_written| match is_written {
            true => Access::Write,
            false => Access::Read,
        };
        match *argument {
            Argument::Operand(operand) => {
                let shape = &shapes[operand];
                let address = parameters.u64(index);
                if !address.is_multiple_of(shape.align as u64) {
                    return Err(format!("{} is at {address:#x}", shape.name));
                }
                let access = access(shape.is_written);
                memory(parameters, index, shape.elements, shape.size, access)
            }
            Argument::Faults => memory(parameters, index, 1, 4, Access::Write),
            Argument::Workspace if launch.workspace_bytes > 0 => {
                let address = parameters.u64(index);
                if !address.is_multiple_of(256) {
                    return Err(format!("the workspace is at {address:#x}"));
                }
                memory(parameters, index, launch.workspace_bytes, 1, Access::Write)
            }
            Argument::Workspace if parameters.u64(index) != 0 => {
                Err("there is a workspace that it does not need".to_owned())
            }
            Argument::Workspace => Ok(Passed::Number(0)),
            // Null, for an operand that is not there.
            Argument::Number(0) if parameters.u32(index) == 0 => Ok(Passed::Number(0)),
            Argument::Number(need) => match number(index) {
                have if have == need => Ok(Passed::Number(need)),
                have => Err(format!("argument {index} is {have}, not {need}")),
            },
        }
    });
    passed.collect()
}

/// Where the workspace is among the arguments, of kernels that may have one.
fn workspace(kernel: &str) -> Option<usize> {
    match kernel {
        _ if kernel.starts_with("tightfit_decoder_attend") => Some(5),
        _ if kernel.starts_with("tightfit_decoder_top") => Some(3),
        _ => None,
    }
}

/// Which of the memory an argument is.
fn place(passed: &[Passed], index: usize) -> Option<usize> {
    let before = passed[..index].iter().filter_map(Passed::memory).count();
    passed[index].memory().map(|_| before)
}

/// Whether the counters of a workspace are zero, as each launch has to find and to leave them.
pub(crate) fn counters_are_zero(kernel: &str, passed: &[Passed], memory: &[Vec<u8>]) -> bool {
    let place = workspace(kernel).and_then(|index| place(passed, index));
    let workspace = place.and_then(|place| memory.get(place));
    workspace.is_none_or(|bytes| bytes[..COUNTERS.min(bytes.len())].iter().all(|b| *b == 0))
}

/// Computes what the kernel would, where no compiler has made an emulator of it.
pub(crate) fn on_the_processor(
    kernel: &str,
    shape: Shape,
    passed: &[Passed],
    memory: &mut [Vec<u8>],
) -> Result<(), String> {
    let text = |error: tightfit_kernels::KernelError| error.to_string();
    let number = |index: usize| match passed[index] {
        Passed::Number(value) => value,
        Passed::Memory { .. } | Passed::Map { .. } => 0,
    };
    let pointer = |index: usize| passed[index].memory().is_some();
    let operation = operation_of(kernel, shape, pointer, number)?;
    let Some(call) = call(&operation, GPU).map_err(text)? else {
        return Ok(());
    };
    let mut operands: Vec<Vec<u8>> = vec![];
    let mut places = vec![];
    let mut faults = None;
    for (index, argument) in call.arguments.iter().enumerate() {
        match argument {
            Argument::Operand(_) => {
                let place = place(passed, index).ok_or("an operand is no memory")?;
                places.push(place);
                operands.push(memory[place].clone());
            }
            Argument::Faults => faults = place(passed, index),
            _ => {}
        }
    }
    let shapes = operation.operands();
    let given = shapes.iter().zip(&mut operands);
    let given = given.map(|(shape, bytes)| match shape.is_written {
        true => Operand::Written(bytes),
        false => Operand::Read(bytes),
    });
    let kernels = Kernels::new(Isa::Portable).map_err(text)?;
    let found = kernels.decode_step(&operation, given.collect(), NonZeroUsize::MIN, &|| true);
    let found = found.map_err(text)?;
    for (place, bytes) in places.into_iter().zip(operands) {
        memory[place] = bytes;
    }
    if let Some(place) = faults {
        let (words, _) = memory[place].as_chunks_mut::<4>();
        words[0] = (u32::from_le_bytes(words[0]) | found.bits()).to_le_bytes();
    }
    Ok(())
}
