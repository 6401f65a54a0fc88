//! What a queue can be given. Lengths follow from the numbers of elements, as
//! [`tightfit_kernels::Kernels`] has them; ranges are exactly as long.

use tightfit_kernels::{BlockSize, FloatType, NESTED_BLOCK_SIZE, QuantType, blocks, packed_bytes};

use super::{QueuedDecode, QueuedProduct};
use crate::device::DeviceBytes;

/// A piece of work for a device.
#[derive(Debug, Clone)]
#[non_exhaustive]
#[allow(
    clippy::large_enum_variant,
    reason = "one lives at a time, and no longer than a call"
)]
pub enum Operation {
    /// Sets bytes to zero.
    Clear(DeviceBytes),
    /// Copies bytes.
    Copy {
        /// Where from.
        source: DeviceBytes,
        /// Where to: as long.
        target: DeviceBytes,
    },
    /// [`tightfit_kernels::Kernels::quantize_nf4`].
    Quantize(Quantization),
    /// [`tightfit_kernels::Kernels::dequantize`].
    Dequantize(Dequantization),
    /// [`tightfit_kernels::Kernels::absmax_mean`].
    AbsmaxMean(AbsmaxMean),
    /// [`tightfit_kernels::Kernels::quantize_absmax`].
    QuantizeAbsmax(AbsmaxQuantization),
    /// [`tightfit_kernels::Kernels::dequantize_absmax`].
    DequantizeAbsmax(AbsmaxRecovery),
    /// A product with a 4-bit weight, or one of many experts for each row.
    Multiply(Box<QueuedProduct>),
    /// What a decoder computes between products.
    Decode(QueuedDecode),
}

/// Numbers to be quantized to NF4, the first of which begins a block.
#[derive(Debug, Clone)]
pub struct Quantization {
    /// Their type.
    pub float: FloatType,
    /// Elements of a block.
    pub block_size: BlockSize,
    /// How many there are.
    pub elements: usize,
    /// The numbers.
    pub source: DeviceBytes,
    /// Gets two codes a byte.
    pub codes: DeviceBytes,
    /// Gets an f32 for each block.
    pub absmax: DeviceBytes,
    /// The number of blocks with infinities or NaN is added to this u64.
    pub nonfinite: DeviceBytes,
}

/// Codes to be made numbers of, the first of which begins a block.
#[derive(Debug, Clone)]
pub struct Dequantization {
    /// The table of values.
    pub quant_type: QuantType,
    /// Elements of a block.
    pub block_size: BlockSize,
    /// How many there are.
    pub elements: usize,
    /// Two codes a byte.
    pub codes: DeviceBytes,
    /// An f32 for each block.
    pub absmax: DeviceBytes,
    /// The type of the numbers.
    pub float: FloatType,
    /// Gets the numbers.
    pub target: DeviceBytes,
}

/// Scales whose mean is asked for.
#[derive(Debug, Clone)]
pub struct AbsmaxMean {
    /// How many there are.
    pub count: usize,
    /// The scales, as f32.
    pub absmax: DeviceBytes,
    /// To work in: [`AbsmaxMean::sums_bytes`].
    pub sums: DeviceBytes,
    /// Gets the mean, as f32.
    pub mean: DeviceBytes,
}

impl AbsmaxMean {
    /// Returns the bytes to work in for this many scales.
    pub fn sums_bytes(count: usize) -> u64 {
        crate::device::ScalesJob::sums_bytes(count as u64)
    }
}

/// Scales to be quantized to 8 bits relative to their mean.
#[derive(Debug, Clone)]
pub struct AbsmaxQuantization {
    /// How many there are.
    pub count: usize,
    /// The scales, as f32.
    pub absmax: DeviceBytes,
    /// Their mean, as f32.
    pub mean: DeviceBytes,
    /// Gets a byte for each.
    pub codes: DeviceBytes,
    /// Gets an f32 for every 256, rounded up.
    pub nested: DeviceBytes,
}

/// 8-bit scales to be made f32.
#[derive(Debug, Clone)]
pub struct AbsmaxRecovery {
    /// How many there are.
    pub count: usize,
    /// A byte for each.
    pub codes: DeviceBytes,
    /// An f32 for every 256, rounded up.
    pub nested: DeviceBytes,
    /// Their mean, as f32.
    pub mean: DeviceBytes,
    /// Gets an f32 for each.
    pub absmax: DeviceBytes,
}

/// A range that an operation uses.
#[derive(Debug, Clone, Copy)]
pub(in crate::device) struct Operand<'a> {
    pub(in crate::device) name: &'static str,
    pub(in crate::device) bytes: &'a DeviceBytes,
    /// How long it has to be; more for what is only worked in.
    pub(in crate::device) need: u64,
    /// What its address is a multiple of.
    pub(in crate::device) align: u64,
    pub(in crate::device) is_written: bool,
    /// Whether it is part of a 4-bit weight, which kernels may read before they wait for earlier ones.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub(in crate::device) is_weight: bool,
}

impl<'a> Operand<'a> {
    pub(super) fn read(
        name: &'static str,
        bytes: &'a DeviceBytes,
        count: usize,
        each: usize,
    ) -> Operand<'a> {
        Operand {
            name,
            bytes,
            need: (count as u64).saturating_mul(each as u64),
            align: each as u64,
            is_written: false,
            is_weight: false,
        }
    }

    pub(super) fn weight(
        name: &'static str,
        bytes: &'a DeviceBytes,
        count: usize,
        each: usize,
    ) -> Operand<'a> {
        Operand {
            is_weight: true,
            ..Operand::read(name, bytes, count, each)
        }
    }

    pub(super) fn written(
        name: &'static str,
        bytes: &'a DeviceBytes,
        count: usize,
        each: usize,
    ) -> Operand<'a> {
        Operand {
            is_written: true,
            ..Operand::read(name, bytes, count, each)
        }
    }
}

impl Operation {
    /// Returns about how many bytes it moves, at least one: what takes longer for its arithmetic counts as
    /// more.
    pub fn work(&self) -> u64 {
        self.work_of(&self.operands())
    }

    /// The same, of what [`Operation::operands`] has said.
    pub(in crate::device) fn work_of(&self, operands: &[Operand]) -> u64 {
        let moved = operands.iter().map(|operand| operand.bytes.bytes());
        let moved = moved.fold(1, u64::saturating_add);
        match self {
            Operation::Multiply(product) => moved.saturating_add(product.arithmetic()),
            Operation::Decode(given) => given.operation.work(),
            _ => moved,
        }
    }

    /// Returns the ranges that it uses, as long and as aligned as they have to be.
    pub(in crate::device) fn operands(&self) -> Vec<Operand<'_>> {
        use Operand as O;
        match self {
            Operation::Clear(target) => {
                vec![O::written("the target", target, target.bytes() as usize, 1)]
            }
            Operation::Copy { source, target } => {
                let count = source.bytes() as usize;
                vec![
                    O::read("the source", source, count, 1),
                    O::written("the target", target, count, 1),
                ]
            }
            Operation::Quantize(of) => vec![
                O::read("the source", &of.source, of.elements, of.float.bytes()),
                O::written("codes", &of.codes, packed_bytes(of.elements), 1),
                O::written("absmax", &of.absmax, blocks(of.elements, of.block_size), 4),
                O::written("the count", &of.nonfinite, 1, 8),
            ],
            Operation::Dequantize(of) => vec![
                O::read("codes", &of.codes, packed_bytes(of.elements), 1),
                O::read("absmax", &of.absmax, blocks(of.elements, of.block_size), 4),
                O::written("the target", &of.target, of.elements, of.float.bytes()),
            ],
            Operation::AbsmaxMean(of) => vec![
                O::read("absmax", &of.absmax, of.count, 4),
                Operand {
                    align: 8,
                    ..O::written(
                        "sums",
                        &of.sums,
                        AbsmaxMean::sums_bytes(of.count) as usize,
                        1,
                    )
                },
                O::written("the mean", &of.mean, 1, 4),
            ],
            Operation::QuantizeAbsmax(of) => vec![
                O::read("absmax", &of.absmax, of.count, 4),
                O::read("the mean", &of.mean, 1, 4),
                O::written("codes", &of.codes, of.count, 1),
                O::written("nested absmax", &of.nested, nested(of.count), 4),
            ],
            Operation::DequantizeAbsmax(of) => vec![
                O::read("codes", &of.codes, of.count, 1),
                O::read("nested absmax", &of.nested, nested(of.count), 4),
                O::read("the mean", &of.mean, 1, 4),
                O::written("absmax", &of.absmax, of.count, 4),
            ],
            Operation::Multiply(product) => product.operands(),
            Operation::Decode(given) => given.operands(),
        }
    }

    /// Looks whether the operands are as long as they have to be, at multiples of their elements, and
    /// nothing overlaps what is written: for devices, which know besides whose memory it is.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), String> {
        self.check_operands(&self.operands())
    }

    /// The same, of what [`Operation::operands`] has said.
    pub(in crate::device) fn check_operands(&self, operands: &[Operand]) -> Result<(), String> {
        if let Operation::Multiply(product) = self {
            product.check()?;
        }
        if let Operation::Decode(given) = self {
            given.check()?;
        }
        for operand in operands {
            let (have, at) = (operand.bytes.bytes(), operand.bytes.address().pointer);
            let Operand {
                name, need, align, ..
            } = *operand;
            if have != need {
                return Err(format!("{name} has {have} bytes, need {need}"));
            }
            if !at.is_multiple_of(align.max(1)) {
                return Err(format!("{name} is at {at:#x}, need a multiple of {align}"));
            }
        }
        for (index, one) in operands.iter().enumerate() {
            for other in &operands[index + 1..] {
                if (one.is_written || other.is_written) && one.bytes.overlaps(other.bytes) {
                    return Err(format!("{} and {} overlap", one.name, other.name));
                }
            }
        }
        Ok(())
    }
}

fn nested(count: usize) -> usize {
    count.div_ceil(NESTED_BLOCK_SIZE)
}
