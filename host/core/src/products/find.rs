//! Finding the weight of a product: its parts, in host memory or on a device.

use std::borrow::Cow;

use tightfit_kernels::{
    DYNAMIC_MAP, LinearWeights, NESTED_BLOCK_SIZE, Scales, blocks, packed_bytes,
};

use super::{Linear, LinearError};
use crate::device::{MatrixOfStack, Multiplier, NestedScales, ProductWeights};
use crate::model::{Model, Quantization, Tensor};
use crate::plan::PartKind;

/// Where a weight is.
#[derive(Clone)]
pub(super) enum Place<'m> {
    Host(HostWeights<'m>),
    Device(OnDevice<'m>),
}

/// A matrix in host memory.
#[derive(Clone)]
pub(super) struct HostWeights<'m> {
    codes: &'m [u8],
    scales: HostScales<'m>,
}

#[derive(Clone)]
enum HostScales<'m> {
    Absmax(Cow<'m, [f32]>),
    Double {
        codes: &'m [u8],
        nested: Cow<'m, [f32]>,
        mean: f32,
    },
}

impl HostWeights<'_> {
    /// The same as the kernels take it.
    pub(super) fn view(
        &self,
        quantization: &Quantization,
        outputs: usize,
        inputs: usize,
    ) -> LinearWeights<'_> {
        LinearWeights {
            quant_type: quantization.quant_type,
            outputs,
            inputs,
            block_size: quantization.block_size,
            codes: self.codes,
            scales: self.scales(),
        }
    }

    fn scales(&self) -> Scales<'_> {
        match &self.scales {
            HostScales::Absmax(absmax) => Scales::Absmax(absmax),
            HostScales::Double {
                codes,
                nested,
                mean,
            } => Scales::Double {
                codes,
                nested_absmax: nested,
                absmax_mean: *mean,
                map: &DYNAMIC_MAP,
            },
        }
    }
}

/// A matrix in a device's memory, with the kernels for it.
#[derive(Clone, Copy)]
pub(super) struct OnDevice<'m> {
    pub(super) multiplier: &'m dyn Multiplier,
    pub(super) weights: ProductWeights,
}

/// A matrix of a tensor, or a stack of them as one matrix: what is to be found.
pub(super) struct Matrix<'m> {
    tensor: Tensor<'m>,
    quantization: Quantization,
    /// In a stack.
    index: u64,
    /// In the stack that it is of.
    matrices: u64,
    outputs: usize,
    inputs: usize,
    first: Elements,
}

/// Where a matrix begins, in its tensor.
#[derive(Clone, Copy)]
struct Elements {
    element: u64,
    block: u64,
}

impl<'m> Linear<'m> {
    pub(super) fn find(
        model: &'m Model,
        name: &str,
        index: Option<u64>,
    ) -> Result<Linear<'m>, LinearError> {
        Matrix::new(loaded(model, name)?, index)?.linear()
    }
}

pub(super) fn loaded<'m>(model: &'m Model, name: &str) -> Result<Tensor<'m>, LinearError> {
    model.tensor(name).ok_or_else(|| LinearError::NotLoaded {
        tensor: name.to_owned(),
    })
}

fn quantization_of(tensor: Tensor<'_>) -> Result<Quantization, LinearError> {
    tensor
        .quantization()
        .ok_or_else(|| LinearError::NotFourBit {
            tensor: tensor.name().to_owned(),
            dtype: tensor.dtype().to_string(),
            format: tensor.format().to_string(),
        })
}

impl<'m> Matrix<'m> {
    fn new(tensor: Tensor<'m>, index: Option<u64>) -> Result<Matrix<'m>, LinearError> {
        let name = || tensor.name().to_owned();
        let quantization = quantization_of(tensor)?;
        let shape = tensor.shape();
        let not = |what, need| LinearError::NotMatrix {
            tensor: name(),
            shape: shape.to_vec(),
            what,
            need,
        };
        let (outputs, inputs) = match (index, shape) {
            (None, &[outputs, inputs]) => (outputs, inputs),
            (Some(index), &[have, ..]) if shape.len() == 3 && index >= have => {
                return Err(LinearError::NoSuchMatrix {
                    tensor: name(),
                    index,
                    have,
                });
            }
            (Some(_), &[_, outputs, inputs]) => (outputs, inputs),
            (None, _) => return Err(not("a matrix", 2)),
            (Some(_), _) => return Err(not("a stack of matrices", 3)),
        };
        let matrices = index.map_or(1, |_| shape[0]);
        let index = index.unwrap_or(0);
        // What is loaded has a number of elements.
        let element = index.saturating_mul(outputs).saturating_mul(inputs);
        let matrix = Matrix {
            tensor,
            quantization,
            index,
            matrices,
            outputs: outputs as usize,
            inputs: inputs as usize,
            first: Elements {
                element,
                block: element / u64::from(quantization.block_size),
            },
        };
        matrix.begins_with("a block", u64::from(quantization.block_size))?;
        Ok(matrix)
    }

    /// A whole stack [matrices, outputs, inputs], as one matrix whose outputs are those of all of its
    /// matrices, and the stack's lengths.
    pub(super) fn stack(tensor: Tensor<'m>) -> Result<([usize; 3], Matrix<'m>), LinearError> {
        let quantization = quantization_of(tensor)?;
        let &[matrices, outputs, inputs] = tensor.shape() else {
            return Err(LinearError::NotMatrix {
                tensor: tensor.name().to_owned(),
                shape: tensor.shape().to_vec(),
                what: "a stack of matrices",
                need: 3,
            });
        };
        let lengths = [matrices, outputs, inputs].map(|length| length as usize);
        let matrix = Matrix {
            tensor,
            quantization,
            index: 0,
            matrices: 1,
            outputs: matrices.saturating_mul(outputs) as usize,
            inputs: inputs as usize,
            first: Elements {
                element: 0,
                block: 0,
            },
        };
        Ok((lengths, matrix))
    }

    pub(super) fn linear(&self) -> Result<Linear<'m>, LinearError> {
        Ok(Linear {
            tensor: self.tensor,
            quantization: self.quantization,
            outputs: self.outputs,
            inputs: self.inputs,
            place: self.place()?,
        })
    }

    fn place(&self) -> Result<Place<'m>, LinearError> {
        Ok(match self.tensor.part(PartKind::Codes).is_some() {
            true => Place::Host(self.in_host_memory()?),
            false => Place::Device(self.on_device()?),
        })
    }

    fn begins_with(&self, what: &'static str, need: u64) -> Result<(), LinearError> {
        let first = self.first.element;
        if first.is_multiple_of(need) {
            return Ok(());
        }
        Err(LinearError::Inside {
            tensor: self.tensor.name().to_owned(),
            index: self.index,
            first,
            what,
            need,
        })
    }

    fn elements(&self) -> usize {
        self.outputs.saturating_mul(self.inputs)
    }

    fn blocks(&self) -> usize {
        blocks(self.elements(), self.quantization.block_size)
    }

    fn elements_of_a_nested_scale(&self) -> u64 {
        u64::from(self.quantization.block_size) * NESTED_BLOCK_SIZE as u64
    }

    fn in_host_memory(&self) -> Result<HostWeights<'m>, LinearError> {
        let (blocks, first) = (self.blocks(), self.first.block as usize);
        let bytes = |kind, start: usize, len: usize| -> &'m [u8] {
            // As a format's parts are long enough for all of its elements, it is there.
            let part: &'m [u8] = self.tensor.part(kind).unwrap_or_default();
            part.get(start..start + len).unwrap_or_default()
        };
        let codes = bytes(
            PartKind::Codes,
            (self.first.element / 2) as usize,
            packed_bytes(self.elements()),
        );
        let begins = self.begins_with("nested", self.elements_of_a_nested_scale());
        let scales = match self.quantization.absmax_mean {
            None => HostScales::Absmax(floats(bytes(PartKind::Absmax, 4 * first, 4 * blocks))),
            Some(mean) if begins.is_ok() => {
                let nested = blocks.div_ceil(NESTED_BLOCK_SIZE);
                let first_nested = first / NESTED_BLOCK_SIZE;
                HostScales::Double {
                    codes: bytes(PartKind::Absmax, first, blocks),
                    nested: floats(bytes(PartKind::NestedAbsmax, 4 * first_nested, 4 * nested)),
                    mean,
                }
            }
            // Kernels count nested blocks from where the matrix begins.
            Some(_) => {
                let tensor = &self.tensor;
                let absmax =
                    tensor.absmax_piece(&self.quantization, self.first.block, blocks as u64)?;
                HostScales::Absmax(Cow::Owned(absmax))
            }
        };
        Ok(HostWeights { codes, scales })
    }

    fn on_device(&self) -> Result<OnDevice<'m>, LinearError> {
        let elsewhere = || LinearError::Elsewhere {
            tensor: self.tensor.name().to_owned(),
            device: self.tensor.model().plan().devices[self.tensor.device()]
                .name()
                .to_owned(),
            instead: "it has no kernels for products, and the processor cannot read it",
        };
        // The kernels for one matrix count nested scales from where it begins; those for a stack from where
        // that does.
        let is_between = self.quantization.absmax_mean.is_some()
            && !(self.first.element).is_multiple_of(self.elements_of_a_nested_scale());
        let ready = self.tensor.model().multiplier(self.tensor.device())?;
        let ready = ready.ok_or_else(elsewhere)?;
        let offset = |kind| {
            let mut parts = self.tensor.parts().iter();
            parts
                .find(|part| part.kind == kind)
                .map_or(0, |part| part.offset)
        };
        let Elements { element, block } = match is_between {
            true => Elements {
                element: 0,
                block: 0,
            },
            false => self.first,
        };
        if is_between {
            ready.multiplier.prepare_experts()?;
        }
        let nested = match ready.means.get(&self.tensor.index()) {
            Some(&mean) if self.quantization.absmax_mean.is_some() => Some(NestedScales {
                absmax: offset(PartKind::NestedAbsmax) + 4 * (block / NESTED_BLOCK_SIZE as u64),
                map: 0,
                mean,
                tensors: 1,
            }),
            _ => None,
        };
        let scale_bytes = if nested.is_some() { 1 } else { 4 };
        Ok(OnDevice {
            multiplier: &*ready.multiplier,
            weights: ProductWeights {
                quant_type: self.quantization.quant_type,
                block_size: self.quantization.block_size,
                outputs: self.outputs,
                inputs: self.inputs,
                codes: offset(PartKind::Codes) + element / 2,
                absmax: offset(PartKind::Absmax) + scale_bytes * block,
                nested,
                of_stack: is_between.then_some(MatrixOfStack {
                    matrices: self.matrices as usize,
                    index: self.index as usize,
                }),
            },
        })
    }
}

/// Numbers in place; copied only where an application's own device has them at odd addresses.
fn floats(bytes: &[u8]) -> Cow<'_, [f32]> {
    match bytemuck::try_cast_slice(bytes) {
        Ok(floats) => Cow::Borrowed(floats),
        Err(_) => {
            let (floats, _) = bytes.as_chunks::<4>();
            Cow::Owned(floats.iter().copied().map(f32::from_le_bytes).collect())
        }
    }
}
