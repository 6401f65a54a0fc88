//! Experts where both weights and operands are in a GPU's memory.

use tightfit_kernels::FloatType;

use super::super::LinearError;
use super::super::find::Place;
use super::super::on_device::{check_addresses, device_name, memory_beside};
use super::{Experts, ExpertsLinear, Gates, Matrices, Stack};
use crate::device::{
    DeviceExpertsOperands, ExpertsProduct, ExpertsWeights, HostExpertsOperands, Multiplier,
    ProductWeights,
};
use crate::model::Tensor;

/// What is in a GPU's memory, and its kernels.
struct OnGpu<'a> {
    multiplier: &'a dyn Multiplier,
    weights: ExpertsWeights,
}

impl OnGpu<'_> {
    fn compute_by_copying(
        &self,
        tensor: Tensor<'_>,
        product: &ExpertsProduct,
        operands: HostExpertsOperands<'_>,
    ) -> Result<(), LinearError> {
        if operands.y.is_empty() {
            return Ok(());
        }
        let len = self.multiplier.copied_experts_bytes(&self.weights, product);
        let memory = memory_beside(tensor, len)?;
        self.multiplier
            .multiply_experts_in(&memory, &self.weights, product, operands)?;
        Ok(())
    }
}

impl Stack<'_> {
    fn on_device(&self) -> Option<ProductWeights> {
        match &self.matrices {
            Matrices::Stack(linear) => match &linear.place {
                Place::Device(on_device) => Some(on_device.weights),
                Place::Host(_) => None,
            },
            Matrices::Each(_) => self.as_one.map(|as_one| as_one.weights),
        }
    }

    fn elsewhere(&self) -> LinearError {
        LinearError::Elsewhere {
            tensor: self.tensor().name().to_owned(),
            device: device_name(self.tensor()).to_owned(),
            instead: "multiply it there, with operands in host memory",
        }
    }
}

impl Experts<'_> {
    /// Returns how many bytes of workspace [`Experts::forward_on_device`] needs for this many tokens of as
    /// many choices each; it is enough for any fewer tokens, too. 0 for weights in host memory.
    ///
    /// What is computed between the launches lies in it. Above 64 MiB of that, tokens are computed one part
    /// after the other, so that more of them need no more.
    pub fn workspace_bytes(&self, tokens: usize, choices: usize, float: FloatType) -> u64 {
        let Some(on_gpu) = self.on_gpu() else {
            return 0;
        };
        let product = self.product(float, tokens, choices);
        on_gpu
            .multiplier
            .experts_workspace_bytes(&on_gpu.weights, &product)
    }

    /// Gives the layer to a stream of the weights' GPU, and returns before it is computed. Nothing is
    /// allocated and nothing waited for: there are only launches of kernels, four for most numbers of tokens,
    /// so that the stream may be one that is being captured into a graph. They depend on lengths only: the
    /// graph can be replayed with another routing in the same memory.
    ///
    /// Fast where x, the biases and y begin at multiples of 16, x has 16 bits, hidden and intermediate are
    /// multiples of 64, and blocks have 64 elements or more; without that by a simpler kernel.
    ///
    /// # Errors
    /// As [`Linear::forward_on_device`](super::super::Linear::forward_on_device), with
    /// [`Experts::workspace_bytes`].
    ///
    /// # Safety
    /// As with [`Linear::forward_on_device`](super::super::Linear::forward_on_device): pointers are into
    /// memory of the weights' GPU, of as many elements as [`DeviceExpertsOperands`] says, the first 16 KiB of
    /// the workspace are zero, nothing overlaps y or the workspace, and all of it is kept.
    pub unsafe fn forward_on_device(
        &self,
        float: FloatType,
        tokens: usize,
        choices: usize,
        operands: &DeviceExpertsOperands,
    ) -> Result<(), LinearError> {
        let Some(on_gpu) = self.on_gpu() else {
            return Err(self.down.elsewhere());
        };
        let product = self.product(float, tokens, choices);
        let is_empty = tokens == 0 || self.hidden() == 0;
        let has_choices = !is_empty && choices > 0;
        let element = float.bytes() as u64;
        let need = on_gpu
            .multiplier
            .experts_workspace_bytes(&on_gpu.weights, &product);
        check_addresses(
            &self.name,
            &[
                ("x", operands.x, element, has_choices),
                ("the ids", operands.ids, 4, has_choices),
                ("the weights of the ids", operands.weights, 4, has_choices),
                ("the bias of gate and up", operands.bias, element, false),
                ("the bias of down", operands.down_bias, element, false),
                ("y", operands.y, element, !is_empty),
            ],
            (need, operands.workspace, operands.workspace_bytes),
        )?;
        let OnGpu {
            multiplier,
            weights,
        } = on_gpu;
        // SAFETY: as the caller promises.
        unsafe { multiplier.multiply_experts(&weights, &product, operands) }?;
        Ok(())
    }

    fn product(&self, float: FloatType, tokens: usize, choices: usize) -> ExpertsProduct {
        ExpertsProduct {
            float,
            experts: self.experts(),
            tokens,
            choices,
        }
    }

    fn on_gpu(&self) -> Option<OnGpu<'_>> {
        let Gates::Together(gate_up, layout) = &self.gates else {
            return None;
        };
        Some(OnGpu {
            multiplier: self.multiplier?,
            weights: ExpertsWeights::Layer {
                gate_up: gate_up.on_device()?,
                down: self.down.on_device()?,
                layout: *layout,
                activation: self.activation,
            },
        })
    }

    pub(super) fn compute_by_copying(
        &self,
        float: FloatType,
        operands: HostExpertsOperands<'_>,
    ) -> Result<(), LinearError> {
        let Some(on_gpu) = self.on_gpu() else {
            return Err(self.down.not_stacked());
        };
        let row = self.hidden() * float.bytes();
        let tokens = operands.x.len() / row.max(1);
        let product = self.product(float, tokens, operands.choices.of_token);
        on_gpu.compute_by_copying(self.down.tensor(), &product, operands)
    }
}

impl ExpertsLinear<'_> {
    /// Returns how many bytes of workspace [`ExpertsLinear::forward_on_device`] needs for this many rows; it
    /// is enough for any fewer, too. 0 for weights in host memory.
    pub fn workspace_bytes(&self, rows: usize, float: FloatType) -> u64 {
        let Some(on_gpu) = self.on_gpu() else {
            return 0;
        };
        let product = self.product(float, rows);
        on_gpu
            .multiplier
            .experts_workspace_bytes(&on_gpu.weights, &product)
    }

    /// Gives the products to a stream of the weights' GPU, as [`Experts::forward_on_device`] does. Of the
    /// operands ids are \[rows\], and there are neither weights of them nor a bias of down projections.
    ///
    /// # Errors
    /// As [`Experts::forward_on_device`], with [`ExpertsLinear::workspace_bytes`].
    ///
    /// # Safety
    /// As with [`Experts::forward_on_device`].
    pub unsafe fn forward_on_device(
        &self,
        float: FloatType,
        rows: usize,
        operands: &DeviceExpertsOperands,
    ) -> Result<(), LinearError> {
        let Some(on_gpu) = self.on_gpu() else {
            return Err(self.stack.elsewhere());
        };
        let product = self.product(float, rows);
        let is_empty = rows == 0 || self.outputs() == 0;
        let element = float.bytes() as u64;
        let need = on_gpu
            .multiplier
            .experts_workspace_bytes(&on_gpu.weights, &product);
        check_addresses(
            &self.name,
            &[
                ("x", operands.x, element, !is_empty && self.inputs() > 0),
                ("the ids", operands.ids, 4, !is_empty),
                ("the bias", operands.bias, element, false),
                ("y", operands.y, element, !is_empty),
            ],
            (need, operands.workspace, operands.workspace_bytes),
        )?;
        let OnGpu {
            multiplier,
            weights,
        } = on_gpu;
        // SAFETY: as the caller promises.
        unsafe { multiplier.multiply_experts(&weights, &product, operands) }?;
        Ok(())
    }

    fn product(&self, float: FloatType, rows: usize) -> ExpertsProduct {
        ExpertsProduct {
            float,
            experts: self.experts(),
            tokens: rows,
            choices: 1,
        }
    }

    fn on_gpu(&self) -> Option<OnGpu<'_>> {
        Some(OnGpu {
            multiplier: self.multiplier?,
            weights: ExpertsWeights::Linear(self.stack.on_device()?),
        })
    }

    pub(super) fn compute_by_copying(
        &self,
        float: FloatType,
        operands: HostExpertsOperands<'_>,
    ) -> Result<(), LinearError> {
        let Some(on_gpu) = self.on_gpu() else {
            return Err(self.stack.not_stacked());
        };
        let product = self.product(float, operands.choices.ids.len());
        on_gpu.compute_by_copying(self.stack.tensor(), &product, operands)
    }
}
