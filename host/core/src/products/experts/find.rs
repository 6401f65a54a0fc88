//! Finding the matrices of experts, in host memory or on a device.

use tightfit_kernels::{NESTED_BLOCK_SIZE, blocks, packed_bytes};

use super::super::find::{Matrix, OnDevice, Place, loaded};
use super::super::on_device::device_name;
use super::super::{Linear, LinearError};
use super::ExpertsTensors;
use crate::device::{Multiplier, NestedScales, ProductWeights};
use crate::model::{Model, Tensor};
use crate::plan::{MEAN_BYTES, PART_ALIGNMENT};

/// The matrices of all experts, of one shape.
#[derive(Clone)]
pub(super) struct Stack<'m> {
    pub(super) experts: usize,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    pub(super) matrices: Matrices<'m>,
    /// Tensors of their own that lie as one stack in a device's memory.
    pub(super) as_one: Option<OnDevice<'m>>,
}

#[derive(Clone)]
pub(super) enum Matrices<'m> {
    /// Never empty.
    Each(Vec<Linear<'m>>),
    /// As one matrix whose outputs are those of all experts.
    Stack(Box<Linear<'m>>),
}

impl<'m> Stack<'m> {
    pub(super) fn find(
        model: &'m Model,
        tensors: &ExpertsTensors,
    ) -> Result<Stack<'m>, LinearError> {
        match tensors {
            ExpertsTensors::Stack(name) => {
                let ([experts, outputs, inputs], matrix) = Matrix::stack(loaded(model, name)?)?;
                Ok(Stack {
                    experts,
                    outputs,
                    inputs,
                    matrices: Matrices::Stack(Box::new(matrix.linear()?)),
                    as_one: None,
                })
            }
            ExpertsTensors::Each(names) => {
                let linears = names.iter().map(|name| model.linear(name));
                let linears = linears.collect::<Result<Vec<_>, _>>()?;
                let Some(first) = linears.first() else {
                    return Err(LinearError::NoExperts {
                        module: "a list of no tensors".to_owned(),
                    });
                };
                let stack = Stack {
                    experts: linears.len(),
                    outputs: first.outputs,
                    inputs: first.inputs,
                    matrices: Matrices::Each(vec![]),
                    as_one: as_one(&linears),
                };
                for linear in &linears {
                    if (linear.outputs, linear.inputs) != (stack.outputs, stack.inputs) {
                        return Err(LinearError::ExpertsShape {
                            tensor: linear.tensor.name().to_owned(),
                            have: linear.tensor.shape().to_vec(),
                            need: [stack.outputs, stack.inputs].map(|n| n as u64).to_vec(),
                        });
                    }
                }
                Ok(Stack {
                    matrices: Matrices::Each(linears),
                    ..stack
                })
            }
        }
    }

    fn linears(&self) -> &[Linear<'m>] {
        match &self.matrices {
            Matrices::Each(linears) => linears,
            Matrices::Stack(linear) => std::slice::from_ref(linear),
        }
    }

    /// The first of its tensors.
    pub(super) fn tensor(&self) -> Tensor<'m> {
        // There is always one.
        match &self.matrices {
            Matrices::Each(linears) => linears[0].tensor,
            Matrices::Stack(linear) => linear.tensor,
        }
    }

    pub(super) fn tensors(&self) -> Vec<Tensor<'m>> {
        self.linears().iter().map(|linear| linear.tensor).collect()
    }

    /// Gates and up projections as one stack, if they lie so in a device's memory: those of each expert
    /// one behind the other.
    pub(super) fn together(gate: &Stack<'m>, up: &Stack<'m>) -> Option<Stack<'m>> {
        let (Matrices::Each(gates), Matrices::Each(ups)) = (&gate.matrices, &up.matrices) else {
            return None;
        };
        let each = gates.iter().zip(ups);
        let linears: Vec<_> = each
            .flat_map(|(gate, up)| [gate.clone(), up.clone()])
            .collect();
        Some(Stack {
            experts: gate.experts,
            outputs: gate.outputs.checked_mul(2)?,
            inputs: gate.inputs,
            as_one: Some(as_one(&linears)?),
            matrices: Matrices::Each(linears),
        })
    }

    /// Whether there are as many experts with matrices of this shape.
    pub(super) fn has_shape(
        &self,
        [experts, outputs, inputs]: [usize; 3],
    ) -> Result<(), LinearError> {
        if (self.experts, self.outputs, self.inputs) == (experts, outputs, inputs) {
            return Ok(());
        }
        let shape = |lengths: [usize; 3]| lengths.map(|length| length as u64).to_vec();
        Err(LinearError::ExpertsShape {
            tensor: self.tensor().name().to_owned(),
            have: shape([self.experts, self.outputs, self.inputs]),
            need: shape([experts, outputs, inputs]),
        })
    }

    pub(super) fn not_stacked(&self) -> LinearError {
        LinearError::NotStacked {
            tensor: self.tensor().name().to_owned(),
            device: device_name(self.tensor()).to_owned(),
        }
    }
}

/// The kernels of the GPU that all stacks are on; `None` where the processor can read them. They are not
/// loaded yet.
pub(super) fn multiplier<'m>(
    stacks: &[&Stack<'m>],
) -> Result<Option<&'m dyn Multiplier>, LinearError> {
    let linears = || stacks.iter().flat_map(|stack| stack.linears());
    let on_gpu = linears().find_map(|linear| match &linear.place {
        Place::Device(on_device) => Some((linear.tensor, on_device.multiplier)),
        Place::Host(_) => None,
    });
    let Some((on_gpu, multiplier)) = on_gpu else {
        return Ok(None);
    };
    let device = on_gpu.device();
    if let Some(other) = linears().find(|linear| linear.tensor.device() != device) {
        return Err(LinearError::Elsewhere {
            tensor: other.tensor.name().to_owned(),
            device: device_name(other.tensor).to_owned(),
            instead: "all experts of a layer have to be on one GPU, or in host memory",
        });
    }
    let apart =
        |stack: &&&Stack<'_>| matches!(stack.matrices, Matrices::Each(_)) && stack.as_one.is_none();
    if let Some(stack) = stacks.iter().find(apart) {
        return Err(stack.not_stacked());
    }
    Ok(Some(multiplier))
}

/// Matrices of one shape as one whose outputs are those of all of them, if they lie one behind the other in
/// a device's memory: their codes and, apart from these, their scales, their nested scales and their means.
fn as_one<'m>(linears: &[Linear<'m>]) -> Option<OnDevice<'m>> {
    let on_device = |linear: &Linear<'m>| match linear.place {
        Place::Device(on_device) => Some(on_device),
        Place::Host(_) => None,
    };
    let first = linears.first()?;
    let device = first.tensor.device();
    let OnDevice {
        multiplier,
        weights,
    } = on_device(first)?;
    let elements = weights.outputs.checked_mul(weights.inputs)?;
    // Each begins with a byte and a block, and with a nested scale.
    let (of_scale, scale_bytes) = match weights.nested {
        Some(_) => (NESTED_BLOCK_SIZE, 1),
        None => (1, 4),
    };
    if !elements.is_multiple_of(of_scale * weights.block_size.elements()) {
        return None;
    }
    let codes = packed_bytes(elements) as u64;
    let scales = blocks(elements, weights.block_size) as u64;
    let absmax = scale_bytes * scales;
    let nested_bytes = (4 * scales / NESTED_BLOCK_SIZE as u64).next_multiple_of(PART_ALIGNMENT);
    for (number, linear) in linears.iter().enumerate() {
        let number = number as u64;
        let nested = match weights.nested {
            Some(nested) => Some(NestedScales {
                absmax: nested
                    .absmax
                    .checked_add(number.checked_mul(nested_bytes)?)?,
                mean: nested.mean.checked_add(number.checked_mul(MEAN_BYTES)?)?,
                ..nested
            }),
            None => None,
        };
        let expected = ProductWeights {
            nested,
            codes: weights.codes.checked_add(number.checked_mul(codes)?)?,
            absmax: weights.absmax.checked_add(number.checked_mul(absmax)?)?,
            ..weights
        };
        if linear.tensor.device() != device || on_device(linear)?.weights != expected {
            return None;
        }
    }
    Some(OnDevice {
        multiplier,
        weights: ProductWeights {
            outputs: weights.outputs.checked_mul(linears.len())?,
            nested: weights.nested.map(|nested| NestedScales {
                tensors: linears.len(),
                ..nested
            }),
            ..weights
        },
    })
}
