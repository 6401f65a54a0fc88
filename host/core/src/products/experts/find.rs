//! Finding the matrices of experts, in host memory or on a device.

use super::super::find::{Matrix, Place, loaded};
use super::super::on_device::device_name;
use super::super::{Linear, LinearError};
use super::ExpertsTensors;
use crate::device::Multiplier;
use crate::model::{Model, Tensor};

/// The matrices of all experts, of one shape.
#[derive(Clone)]
pub(super) struct Stack<'m> {
    pub(super) experts: usize,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    pub(super) matrices: Matrices<'m>,
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
    let apart = |stack: &&&Stack<'_>| matches!(stack.matrices, Matrices::Each(_));
    if let Some(stack) = stacks.iter().find(apart) {
        return Err(stack.not_stacked());
    }
    Ok(Some(multiplier))
}
