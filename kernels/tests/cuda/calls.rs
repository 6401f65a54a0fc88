//! The kernels as functions, like the methods of `Kernels`.

use tightfit_kernels::{
    BlockSize, FloatType, NESTED_BLOCK_SIZE, QuantType, blocks,
    cuda::{self, SourceRun},
    packed_bytes,
};

use crate::device::{Argument, Device};
use crate::values::{floats, to_bytes};

/// What is in memory that the kernels have to write.
const UNWRITTEN: u8 = 0xee;

/// How many bytes behind a multiple of 16 each buffer begins.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Misaligned {
    pub(crate) elements: usize,
    pub(crate) packed: usize,
    pub(crate) absmax: usize,
}

impl Misaligned {
    /// Every kind that a type of so many bytes allows, one after the other.
    pub(crate) fn nth(n: usize, float: FloatType) -> Misaligned {
        Misaligned {
            elements: n * float.bytes() % 16,
            packed: n * 5 % 16,
            absmax: n * 4 % 16,
        }
    }
}

#[derive(Debug, PartialEq)]
pub(crate) struct Quantized {
    pub(crate) packed: Vec<u8>,
    pub(crate) absmax: Vec<u8>,
    pub(crate) nonfinite_blocks: u64,
}

fn buffer(misalignment: usize, bytes: &mut [u8]) -> Argument<'_> {
    Argument::Buffer {
        misalignment,
        bytes,
    }
}

fn number(value: usize) -> Argument<'static> {
    Argument::Number(value as u64)
}

pub(crate) fn quantize(
    device: &mut dyn Device,
    source: &[u8],
    float: FloatType,
    block_size: BlockSize,
    misaligned: Misaligned,
) -> Quantized {
    let elements = source.len() / float.bytes();
    let mut after = source.to_vec();
    let arguments = vec![buffer(misaligned.elements, &mut after)];
    let launch = cuda::quantize_nf4(float, elements).expect("not too many");
    let result = quantized(device, launch, arguments, elements, block_size, misaligned);
    assert!(after == source, "the source was changed");
    result
}

/// Codes and `f32` scales of a run, and the type that elements are rounded to.
#[derive(Debug)]
pub(crate) struct Coded {
    pub(crate) run: SourceRun,
    pub(crate) codes: Vec<u8>,
    pub(crate) scales: Vec<u8>,
    pub(crate) float: FloatType,
    pub(crate) elements: usize,
}

/// `misaligned.elements` is that of codes.
pub(crate) fn quantize_source(
    device: &mut dyn Device,
    source: &Coded,
    block_size: BlockSize,
    misaligned: Misaligned,
) -> Quantized {
    let (run, elements) = (&source.run, source.elements);
    assert_eq!(source.codes.len(), run.code_bytes(elements));
    assert_eq!(source.scales.len(), 4 * run.scales(elements));
    let (mut codes, mut scales) = (source.codes.clone(), source.scales.clone());
    let mut arguments = vec![
        buffer(misaligned.elements, &mut codes),
        buffer(misaligned.absmax, &mut scales),
    ];
    arguments.extend(run.arguments().map(Argument::Number));
    let launch = cuda::quantize_source(source.float, run, elements).expect("not too many");
    let result = quantized(device, launch, arguments, elements, block_size, misaligned);
    assert!((&codes, &scales) == (&source.codes, &source.scales));
    result
}

/// Launches a kernel that quantizes, whose arguments begin with those given.
fn quantized(
    device: &mut dyn Device,
    launch: cuda::Launch,
    arguments: Vec<Argument<'_>>,
    elements: usize,
    block_size: BlockSize,
    misaligned: Misaligned,
) -> Quantized {
    // The kernel adds to the count.
    const BEFORE: u64 = 1 << 40;
    let mut count = BEFORE.to_le_bytes();
    let mut result = Quantized {
        packed: vec![UNWRITTEN; packed_bytes(elements)],
        absmax: vec![UNWRITTEN; 4 * blocks(elements, block_size)],
        nonfinite_blocks: 0,
    };
    // Only as long as the results are lent.
    let mut arguments: Vec<Argument<'_>> = arguments;
    arguments.extend([
        number(elements),
        number(block_size.elements()),
        buffer(misaligned.packed, &mut result.packed),
        buffer(misaligned.absmax, &mut result.absmax),
        buffer(8, &mut count),
    ]);
    device.launch(launch, &mut arguments);
    drop(arguments);
    result.nonfinite_blocks = u64::from_le_bytes(count) - BEFORE;
    result
}

#[expect(clippy::too_many_arguments, reason = "what the kernel takes")]
pub(crate) fn dequantize(
    device: &mut dyn Device,
    quant_type: QuantType,
    packed: &[u8],
    absmax: &[f32],
    block_size: BlockSize,
    elements: usize,
    float: FloatType,
    misaligned: Misaligned,
) -> Vec<u8> {
    let mut out = vec![UNWRITTEN; elements * float.bytes()];
    device.launch(
        cuda::dequantize(float, elements).expect("not too many"),
        &mut [
            buffer(misaligned.packed, &mut packed.to_vec()),
            buffer(misaligned.absmax, &mut to_bytes(absmax)),
            number(elements),
            number(block_size.elements()),
            Argument::Number(cuda::quant_type_argument(quant_type).into()),
            buffer(misaligned.elements, &mut out),
        ],
    );
    out
}

/// By as many launches as it takes.
pub(crate) fn absmax_mean(device: &mut dyn Device, absmax: &[f32]) -> f32 {
    let mut count = cuda::sums(absmax.len());
    let mut sums = vec![UNWRITTEN; 8 * count];
    device.launch(
        cuda::sum_absmax(absmax.len()).expect("not too many"),
        &mut [
            buffer(4, &mut to_bytes(absmax)),
            number(absmax.len()),
            buffer(0, &mut sums),
        ],
    );
    while count > 256 {
        let mut next = vec![UNWRITTEN; 8 * cuda::sums(count)];
        device.launch(
            cuda::sum_sums(count).expect("not too many"),
            &mut [buffer(0, &mut sums), number(count), buffer(8, &mut next)],
        );
        (count, sums) = (cuda::sums(count), next);
    }
    let mut mean = [UNWRITTEN; 4];
    device.launch(
        cuda::mean(),
        &mut [
            buffer(0, &mut sums),
            number(count),
            number(absmax.len()),
            buffer(4, &mut mean),
        ],
    );
    f32::from_le_bytes(mean)
}

pub(crate) fn quantize_absmax(
    device: &mut dyn Device,
    absmax: &[f32],
    offset: f32,
) -> (Vec<u8>, Vec<f32>) {
    let mut codes = vec![UNWRITTEN; absmax.len()];
    let mut nested = vec![UNWRITTEN; 4 * absmax.len().div_ceil(NESTED_BLOCK_SIZE)];
    device.launch(
        cuda::quantize_absmax(absmax.len()).expect("not too many"),
        &mut [
            buffer(4, &mut to_bytes(absmax)),
            number(absmax.len()),
            buffer(0, &mut offset.to_le_bytes()),
            buffer(1, &mut codes),
            buffer(4, &mut nested),
        ],
    );
    (codes, floats(&nested))
}

pub(crate) fn dequantize_absmax(
    device: &mut dyn Device,
    codes: &[u8],
    nested: &[f32],
    offset: f32,
) -> Vec<f32> {
    let mut out = vec![UNWRITTEN; 4 * codes.len()];
    device.launch(
        cuda::dequantize_absmax(codes.len()).expect("not too many"),
        &mut [
            buffer(3, &mut codes.to_vec()),
            number(codes.len()),
            buffer(4, &mut to_bytes(nested)),
            buffer(12, &mut offset.to_le_bytes()),
            buffer(4, &mut out),
        ],
    );
    floats(&out)
}
