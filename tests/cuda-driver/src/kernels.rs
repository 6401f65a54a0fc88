//! What the kernels take and do: by the emulator, which runs their own sources, or where there was
//! no C++ compiler to compile it by the processor's kernels.

use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use tightfit_cuda_emulator::{Argument, Emulator, MISSING, REQUIRE};
use tightfit_kernels::cuda::{self, Launch, SourceRun};
use tightfit_kernels::{
    BlockSize, FloatType, Isa, KernelError, Kernels, NESTED_BLOCK_SIZE, QuantType, SourceCodes,
    SourceMatrix, SourceRows, SourceScale, blocks, packed_bytes,
};

use crate::{decoder, experts, products};

/// What a kernel does with memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    /// Adds, so that others may do the same at the same time.
    Add,
}

/// An argument of a launch.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Passed {
    Number(u64),
    Memory {
        address: u64,
        len: usize,
        access: Access,
    },
    /// Of the matrix that an argument before it points to; as an emulator takes it.
    Map {
        of: usize,
        numbers: [u64; 7],
    },
}

impl Passed {
    /// Address and length, of memory.
    pub(crate) fn memory(&self) -> Option<(u64, usize)> {
        match *self {
            Passed::Number(_) | Passed::Map { .. } => None,
            Passed::Memory { address, len, .. } => Some((address, len)),
        }
    }
}

/// How a kernel is launched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) grid: u32,
    pub(crate) threads: u32,
    /// Dynamic shared memory of each block.
    pub(crate) shared_bytes: u32,
}

/// An argument that is memory, of `elements` of `width` bytes.
pub(crate) fn memory(
    parameters: Parameters,
    index: usize,
    elements: usize,
    width: usize,
    access: Access,
) -> Result<Passed, String> {
    let address = parameters.u64(index);
    match address.is_multiple_of(width as u64) && address != 0 {
        true => Ok(Passed::Memory {
            address,
            len: elements * width,
            access,
        }),
        false => Err(format!("argument {index} is at {address:#x}")),
    }
}

/// The parameters of a launch, as they are passed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parameters(*const *const c_void);

impl Parameters {
    /// # Safety
    /// Pointers to as many parameters as the kernel has, of their types, for as long as this lives.
    pub(crate) unsafe fn new(pointers: *const *const c_void) -> Parameters {
        Parameters(pointers)
    }

    pub(crate) fn u64(self, index: usize) -> u64 {
        // SAFETY: the kernels' table in tightfit_kernels::cuda has a pointer or a u64 there.
        unsafe { self.0.add(index).read().cast::<u64>().read() }
    }

    /// A map, as it was encoded.
    pub(crate) fn map(self, index: usize) -> [u64; 16] {
        // SAFETY: that table has a `CUtensorMap` there.
        unsafe { self.0.add(index).read().cast::<[u64; 16]>().read() }
    }

    pub(crate) fn u32(self, index: usize) -> u32 {
        // SAFETY: that table has a u32 there.
        unsafe { self.0.add(index).read().cast::<u32>().read() }
    }
}

fn quantized_type(kernel: &str) -> Option<FloatType> {
    match kernel {
        "tightfit_quantize_nf4_f32" => Some(FloatType::F32),
        "tightfit_quantize_nf4_f16" => Some(FloatType::F16),
        "tightfit_quantize_nf4_bf16" => Some(FloatType::Bf16),
        _ => None,
    }
}

fn dequantized_type(kernel: &str) -> Option<FloatType> {
    match kernel {
        "tightfit_dequantize_f32" => Some(FloatType::F32),
        "tightfit_dequantize_f16" => Some(FloatType::F16),
        "tightfit_dequantize_bf16" => Some(FloatType::Bf16),
        _ => None,
    }
}

/// The type that codes of another method are rounded to.
fn rounded_type(kernel: &str) -> Option<FloatType> {
    match kernel {
        "tightfit_quantize_source_f16" => Some(FloatType::F16),
        "tightfit_quantize_source_bf16" => Some(FloatType::Bf16),
        _ => None,
    }
}

/// What is in [`SourceRun::arguments`].
fn run_of(arguments: [u64; 7]) -> Option<SourceRun> {
    const CODES: [SourceCodes; 4] = [
        SourceCodes::F8E4M3,
        SourceCodes::F8E5M2,
        SourceCodes::F4E2M1,
        SourceCodes::Int4,
    ];
    let [_, row_bytes, rest @ ..] = arguments;
    let [columns, tile_rows, tile_columns, first_row, first_column] =
        rest.map(|number| u32::try_from(number).unwrap_or(u32::MAX));
    let run = |codes| SourceRun {
        codes,
        row_bytes,
        columns,
        tile: [tile_rows, tile_columns],
        first_row,
        first_column,
    };
    let mut all = CODES.into_iter().map(run);
    all.find(|run| run.arguments() == arguments)
}

/// The arguments of a launch. An error is what is wrong with them.
pub(crate) fn arguments(
    kernel: &str,
    shape: Shape,
    parameters: Parameters,
) -> Result<Vec<Passed>, String> {
    let passed = if products::is_product(kernel) {
        products::arguments(kernel, shape, parameters)
    } else if decoder::is_of_decoders(kernel) {
        decoder::arguments(kernel, shape, parameters)
    } else if experts::is_for_experts(kernel) {
        experts::arguments(kernel, shape, parameters)
    } else {
        arguments_of_quantizing(kernel, shape, parameters)
    }?;
    check_overlaps(&passed)?;
    Ok(passed)
}

/// Those of the table in [`tightfit_kernels::cuda`].
fn arguments_of_quantizing(
    kernel: &str,
    shape: Shape,
    parameters: Parameters,
) -> Result<Vec<Passed>, String> {
    let number = |index| usize::try_from(parameters.u64(index)).map_err(|error| error.to_string());
    let memory =
        |index, elements, width, access| memory(parameters, index, elements, width, access);
    let value = |index| Passed::Number(parameters.u64(index));
    let narrow = |index| Passed::Number(parameters.u32(index).into());
    use Access::{Add, Read, Write};
    let (expected, passed) = if let Some(float) = quantized_type(kernel) {
        let n = number(1)?;
        let block_size = BlockSize::new(parameters.u32(2) as usize);
        let block_size = block_size.map_err(|error| error.to_string())?;
        let passed = vec![
            memory(0, n, float.bytes(), Read)?,
            value(1),
            narrow(2),
            memory(3, packed_bytes(n), 1, Write)?,
            memory(4, blocks(n, block_size), 4, Write)?,
            memory(5, 1, 8, Add)?,
        ];
        (cuda::quantize_nf4(float, n), passed)
    } else if let Some(float) = rounded_type(kernel) {
        let n = number(9)?;
        let block_size = BlockSize::new(parameters.u32(10) as usize);
        let block_size = block_size.map_err(|error| error.to_string())?;
        let numbers = std::array::from_fn(|index| match index {
            1 => parameters.u64(3),
            _ => parameters.u32(2 + index).into(),
        });
        let run = run_of(numbers).ok_or_else(|| format!("{numbers:?} are no codes"))?;
        run.check().map_err(|error| error.to_string())?;
        let mut passed = vec![
            memory(0, run.code_bytes(n), 1, Read)?,
            memory(1, run.scales(n), 4, Read)?,
        ];
        passed.extend(numbers.map(Passed::Number));
        passed.extend([
            value(9),
            narrow(10),
            memory(11, packed_bytes(n), 1, Write)?,
            memory(12, blocks(n, block_size), 4, Write)?,
            memory(13, 1, 8, Add)?,
        ]);
        (cuda::quantize_source(float, &run, n), passed)
    } else if let Some(float) = dequantized_type(kernel) {
        let n = number(2)?;
        let block_size = BlockSize::new(parameters.u32(3) as usize);
        let block_size = block_size.map_err(|error| error.to_string())?;
        if parameters.u32(4) > 1 {
            return Err(format!("there is no table {}", parameters.u32(4)));
        }
        let passed = vec![
            memory(0, packed_bytes(n), 1, Read)?,
            memory(1, blocks(n, block_size), 4, Read)?,
            value(2),
            narrow(3),
            narrow(4),
            memory(5, n, float.bytes(), Write)?,
        ];
        (cuda::dequantize(float, n), passed)
    } else if kernel == "tightfit_mean" {
        let sums = parameters.u32(1) as usize;
        if sums > 256 {
            return Err(format!("{sums} sums"));
        }
        let passed = vec![
            memory(0, sums, 8, Read)?,
            narrow(1),
            value(2),
            memory(3, 1, 4, Write)?,
        ];
        (Ok(cuda::mean()), passed)
    } else {
        let n = number(1)?;
        match kernel {
            "tightfit_sum_absmax" => {
                let sums = memory(2, cuda::sums(n), 8, Write)?;
                let passed = vec![memory(0, n, 4, Read)?, value(1), sums];
                (cuda::sum_absmax(n), passed)
            }
            "tightfit_sum_sums" => {
                let sums = memory(2, cuda::sums(n), 8, Write)?;
                let passed = vec![memory(0, n, 8, Read)?, value(1), sums];
                (cuda::sum_sums(n), passed)
            }
            "tightfit_quantize_absmax" => {
                let passed = vec![
                    memory(0, n, 4, Read)?,
                    value(1),
                    memory(2, 1, 4, Read)?,
                    memory(3, n, 1, Write)?,
                    memory(4, n.div_ceil(NESTED_BLOCK_SIZE), 4, Write)?,
                ];
                (cuda::quantize_absmax(n), passed)
            }
            "tightfit_dequantize_absmax" => {
                let passed = vec![
                    memory(0, n, 1, Read)?,
                    value(1),
                    memory(2, n.div_ceil(NESTED_BLOCK_SIZE), 4, Read)?,
                    memory(3, 1, 4, Read)?,
                    memory(4, n, 4, Write)?,
                ];
                (cuda::dequantize_absmax(n), passed)
            }
            _ => return Err("nobody is known to launch it".to_owned()),
        }
    };
    let Launch { grid, threads, .. } = expected.map_err(|error| error.to_string())?;
    let expected = Shape {
        grid,
        threads,
        shared_bytes: 0,
    };
    if expected != shape {
        return Err(format!("launched as {shape:?}, not {expected:?}"));
    }
    Ok(passed)
}

/// Nothing may overlap what is written.
fn check_overlaps(passed: &[Passed]) -> Result<(), String> {
    for (index, one) in passed.iter().enumerate() {
        for other in &passed[index + 1..] {
            let both = one.memory().zip(other.memory());
            if both.is_some_and(|((a, a_len), (b, b_len))| {
                a < b + b_len as u64 && b < a + a_len as u64
            }) {
                return Err(format!("{one:?} and {other:?} overlap"));
            }
        }
    }
    Ok(())
}

/// Runs a kernel. `memory` is what the arguments that are memory point to, in their order.
pub(crate) fn run(
    kernel: &str,
    shape: Shape,
    passed: &[Passed],
    memory: &mut [Vec<u8>],
) -> Result<(), String> {
    let counters_are_zero = |memory: &[Vec<u8>]| {
        products::counters_are_zero(kernel, passed, memory)
            && decoder::counters_are_zero(kernel, passed, memory)
    };
    if !counters_are_zero(memory) {
        return Err(format!(
            "{kernel}: the counters of its workspace are not zero"
        ));
    }
    static EMULATOR: Mutex<Option<Emulator>> = Mutex::new(None);
    let mut emulator = EMULATOR.lock().unwrap_or_else(PoisonError::into_inner);
    if emulator.is_none() {
        *emulator = Emulator::start().map_err(|error| error.to_string())?;
    }
    let Some(emulator) = &mut *emulator else {
        if std::env::var_os(REQUIRE).is_some_and(|value| value == "1") {
            return Err(format!("{REQUIRE} is set, but {MISSING}"));
        }
        return if products::is_product(kernel) {
            products::on_the_processor(kernel, passed, memory)
        } else if decoder::is_of_decoders(kernel) {
            decoder::on_the_processor(kernel, shape, passed, memory)
        } else if experts::is_for_experts(kernel) {
            experts::on_the_processor(kernel, passed, memory)
        } else {
            on_the_processor(kernel, passed, memory)
        };
    };
    let mut buffers = memory.iter_mut();
    let mut arguments: Vec<Argument<'_>> = passed
        .iter()
        .filter_map(|argument| {
            Some(match argument {
                Passed::Number(value) => Argument::Number(*value),
                Passed::Memory { address, .. } => Argument::Buffer {
                    misalignment: (address % 16) as usize,
                    bytes: buffers.next()?,
                },
                Passed::Map { of, numbers } => Argument::Map {
                    of: passed[..*of].iter().filter_map(Passed::memory).count(),
                    numbers: *numbers,
                },
            })
        })
        .collect();
    let Shape {
        grid,
        threads,
        shared_bytes,
    } = shape;
    emulator
        .launch_with_shared(kernel, grid, threads, shared_bytes, &mut arguments)
        .map_err(|error| error.to_string())?;
    match counters_are_zero(memory) {
        true => Ok(()),
        false => Err(format!("{kernel} leaves counters that are not zero")),
    }
}

fn on_the_processor(kernel: &str, passed: &[Passed], memory: &mut [Vec<u8>]) -> Result<(), String> {
    let text = |error: KernelError| error.to_string();
    let illegal = |error: tightfit_kernels::IllegalBlockSize| error.to_string();
    let kernels = Kernels::new(Isa::Portable).map_err(text)?;
    let number = |index: usize| match passed[index] {
        Passed::Number(value) => value,
        Passed::Memory { .. } | Passed::Map { .. } => 0,
    };
    match (kernel, memory) {
        (_, [source, packed, absmax, count]) if quantized_type(kernel).is_some() => {
            let float = quantized_type(kernel).unwrap_or(FloatType::F32);
            let block_size = BlockSize::new(number(2) as usize).map_err(illegal)?;
            quantize(kernels, source, float, block_size, [packed, absmax, count]).map_err(text)?;
        }
        (_, [codes, scales, packed, absmax, count]) if rounded_type(kernel).is_some() => {
            let float = rounded_type(kernel).unwrap_or(FloatType::Bf16);
            let run = run_of(std::array::from_fn(|index| number(2 + index)));
            let run = run.ok_or_else(|| format!("{passed:?} are no codes"))?;
            let elements = number(9) as usize;
            let decoded = decode(kernels, &run, codes, scales, float, elements).map_err(text)?;
            let block_size = BlockSize::new(number(10) as usize).map_err(illegal)?;
            quantize(
                kernels,
                &decoded,
                float,
                block_size,
                [packed, absmax, count],
            )
            .map_err(text)?;
        }
        (_, [packed, absmax, out]) if dequantized_type(kernel).is_some() => {
            let float = dequantized_type(kernel).unwrap_or(FloatType::F32);
            let block_size = BlockSize::new(number(3) as usize).map_err(illegal)?;
            let quant_type = match number(4) {
                0 => QuantType::Nf4,
                _ => QuantType::Fp4,
            };
            let absmax = from_bytes(absmax, f32::from_le_bytes);
            let n = number(2) as usize;
            kernels
                .dequantize(quant_type, packed, &absmax, block_size, n, float, out)
                .map_err(text)?;
        }
        ("tightfit_dequantize_absmax", [codes, nested, offset, absmax]) => {
            let nested = from_bytes(nested, f32::from_le_bytes);
            let offset = from_bytes(offset, f32::from_le_bytes)[0];
            let mut scales = vec![0.0; absmax.len() / 4];
            kernels
                .dequantize_absmax(codes, &nested, offset, &mut scales)
                .map_err(text)?;
            absmax.copy_from_slice(&to_bytes(&scales, f32::to_le_bytes));
        }
        ("tightfit_sum_absmax", [absmax, sums]) => {
            let values: Vec<f64> = from_bytes(absmax, f32::from_le_bytes)
                .into_iter()
                .map(f64::from)
                .collect();
            sums.copy_from_slice(&to_bytes(&sums_of(&values), f64::to_le_bytes));
        }
        ("tightfit_sum_sums", [values, sums]) => {
            let values = from_bytes(values, f64::from_le_bytes);
            sums.copy_from_slice(&to_bytes(&sums_of(&values), f64::to_le_bytes));
        }
        ("tightfit_mean", [sums, mean]) => {
            let sum = sums_of(&from_bytes(sums, f64::from_le_bytes))[0];
            mean.copy_from_slice(&((sum / number(2) as f64) as f32).to_le_bytes());
        }
        ("tightfit_quantize_absmax", [absmax, offset, codes, nested]) => {
            let absmax = from_bytes(absmax, f32::from_le_bytes);
            let offset = from_bytes(offset, f32::from_le_bytes)[0];
            let mut scales = vec![0.0; nested.len() / 4];
            kernels
                .quantize_absmax(&absmax, offset, codes, &mut scales)
                .map_err(text)?;
            nested.copy_from_slice(&to_bytes(&scales, f32::to_le_bytes));
        }
        _ => return Err(format!("{kernel} is not known")),
    }
    Ok(())
}

/// Quantizes to codes and scales, and adds to the count of non-finite blocks.
fn quantize(
    kernels: Kernels,
    source: &[u8],
    float: FloatType,
    block_size: BlockSize,
    [packed, absmax, count]: [&mut Vec<u8>; 3],
) -> Result<(), KernelError> {
    let mut scales = vec![0.0; absmax.len() / 4];
    let stats = kernels.quantize_nf4(source, float, block_size, packed, &mut scales)?;
    absmax.copy_from_slice(&to_bytes(&scales, f32::to_le_bytes));
    let before = from_bytes(count, u64::from_le_bytes)[0];
    count.copy_from_slice(&(before + stats.nonfinite_blocks).to_le_bytes());
    Ok(())
}

/// The elements of a run: those of whole rows, of which the first may begin and the last end elsewhere.
fn decode(
    kernels: Kernels,
    run: &SourceRun,
    codes: &[u8],
    scales: &[u8],
    float: FloatType,
    elements: usize,
) -> Result<Vec<u8>, KernelError> {
    let (columns, first) = (run.columns as usize, run.first_column as usize);
    let rows = (first + elements).div_ceil(columns);
    let row_bytes = run.row_bytes as usize;
    let mut whole = vec![0; first * run.codes.bits() / 8];
    whole.extend(codes);
    whole.resize(rows * row_bytes, 0);
    let whole: Vec<u8> = whole
        .chunks_exact(row_bytes)
        .flat_map(|row| &row[..run.codes.bytes(columns)])
        .copied()
        .collect();
    let matrix = SourceMatrix {
        codes: run.codes,
        columns,
        tile: run.tile.map(|length| length as usize),
        scale: SourceScale::Float(FloatType::F32),
    };
    let given = SourceRows {
        first: run.first_row as usize,
        codes: &whole,
        scales,
        zeros: &[],
    };
    let mut out = vec![0; rows * columns * float.bytes()];
    kernels.decode(&matrix, &given, float, &mut out)?;
    Ok(out[first * float.bytes()..][..elements * float.bytes()].to_vec())
}

/// Sums of groups of 256, each by halving.
fn sums_of(values: &[f64]) -> Vec<f64> {
    let sum = |group: &[f64]| {
        let mut sums = [0.0; 256];
        sums[..group.len()].copy_from_slice(group);
        let mut half = 128;
        while half > 0 {
            for index in 0..half {
                sums[index] += sums[index + half];
            }
            half /= 2;
        }
        sums[0]
    };
    values.chunks(256).map(sum).collect()
}

fn to_bytes<T: Copy, const N: usize>(values: &[T], bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|&value| bytes(value)).collect()
}

fn from_bytes<T, const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> T) -> Vec<T> {
    let (values, _) = bytes.as_chunks::<N>();
    values.iter().map(|bytes| value(*bytes)).collect()
}
