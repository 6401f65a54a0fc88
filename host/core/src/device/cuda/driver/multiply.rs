//! Products with weights that lie in a device's memory, by its own kernels.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys::CUdeviceptr;
use tightfit_kernels::cuda::linear::{COUNTERS, Gpu, Linear};
use tightfit_kernels::{KernelError, NESTED_BLOCK_SIZE, blocks, packed_bytes};

use super::launch::{gpu_of, launch_product};
use super::{CudaPageLocked, DeviceMemory, KernelModule, Staging, WorkspaceMemory, unavailable};
use crate::device::experts::places;
use crate::device::{
    DeviceBytes, DeviceError, DeviceExpertsOperands, DeviceOperands, ExpertsProduct,
    ExpertsWeights, HostExpertsOperands, HostOperands, Multiplier, Piece, Product, ProductWeights,
    WRITER_BUFFERS, Writer,
};

/// Bytes that are copied at once.
const COPIED: usize = 1 << 20;
/// Values of the codes of scales, and their bytes.
const MAP_BYTES: usize = 256 * 4;
/// Of tensors that are a matrix together: what their means are apart, and what their nested scales begin at
/// multiples of.
const MEAN_BYTES: usize = 16;
const PART_BYTES: usize = 256;

/// The kernels for the weights in one piece of memory.
#[derive(Debug)]
pub(in crate::device::cuda) struct KernelMultiplier {
    pub(super) kernels: Arc<KernelModule>,
    /// Those for experts. Loaded where there are some.
    pub(super) experts: Arc<KernelModule>,
    weights: Arc<DeviceMemory>,
    constants: Option<WorkspaceMemory>,
    pub(super) gpu: Gpu,
}

/// The addresses of a matrix and of its scales.
pub(super) struct Found {
    pub(super) codes: CUdeviceptr,
    pub(super) absmax: CUdeviceptr,
    /// Of nested scales, mean and map; zero without double quantization.
    pub(super) nested: [CUdeviceptr; 3],
}

impl Found {
    pub(super) fn all(&self) -> [CUdeviceptr; 5] {
        let [nested, mean, map] = self.nested;
        [self.codes, self.absmax, nested, mean, map]
    }
}

impl KernelMultiplier {
    /// For weights in `weights`, with the constants of their double quantization. Loads the kernels.
    pub(in crate::device::cuda) fn new(
        kernels: &Arc<KernelModule>,
        experts: &Arc<KernelModule>,
        weights: &Arc<DeviceMemory>,
        constants: Option<WorkspaceMemory>,
    ) -> Result<KernelMultiplier, DeviceError> {
        let context = kernels.context();
        let gpu = gpu_of(context)?;
        kernels.compile()?;
        Ok(KernelMultiplier {
            kernels: Arc::clone(kernels),
            experts: Arc::clone(experts),
            weights: Arc::clone(weights),
            constants,
            gpu,
        })
    }

    fn linear(&self, weights: &ProductWeights, product: &Product) -> Linear {
        Linear {
            float: product.float,
            rows: product.rows,
            outputs: weights.outputs,
            inputs: weights.inputs,
            block_size: weights.block_size,
            aligned: true,
            by_row: product.by_row,
        }
    }

    /// A matrix or the stack that it is of, all of which lies where it is said to be.
    pub(super) fn find(&self, weights: &ProductWeights) -> Result<Found, DeviceError> {
        let matrices = weights.of_stack.map_or(1, |stack| stack.matrices);
        let elements = weights.outputs.saturating_mul(weights.inputs);
        let elements = elements.saturating_mul(matrices);
        let scales = blocks(elements, weights.block_size);
        let codes = self.weights.at(weights.codes, packed_bytes(elements))?;
        let Some(double) = weights.nested else {
            return Ok(Found {
                codes,
                absmax: self.weights.at(weights.absmax, scales.saturating_mul(4))?,
                nested: [0; 3],
            });
        };
        let tensors = double.tensors.max(1);
        let of_tensor = 4 * (scales / tensors).div_ceil(NESTED_BLOCK_SIZE);
        let nested_bytes = match tensors {
            1 => of_tensor,
            _ => of_tensor
                .next_multiple_of(PART_BYTES)
                .saturating_mul(tensors - 1)
                .saturating_add(of_tensor),
        };
        let mean_bytes = MEAN_BYTES.saturating_mul(tensors - 1).saturating_add(4);
        let constants = self.constants.as_ref().ok_or_else(|| {
            unavailable(
                self.weights.context().name(),
                "internal error: there are no constants for double-quantized weights".to_owned(),
            )
        })?;
        Ok(Found {
            codes,
            absmax: self.weights.at(weights.absmax, scales)?,
            nested: [
                self.weights.at(double.absmax, nested_bytes)?,
                constants.at(double.mean, mean_bytes)?,
                constants.at(double.map, MAP_BYTES)?,
            ],
        })
    }

    pub(super) fn too_many(&self, error: KernelError) -> DeviceError {
        unavailable(self.weights.context().name(), error.to_string())
    }

    /// Where operands are put that are copied to the device: x, bias, y and the workspace, and the end.
    fn places(&self, weights: &ProductWeights, product: &Product) -> [u64; 5] {
        let bytes =
            |elements: usize| (elements as u64).saturating_mul(product.float.bytes() as u64);
        let (of_x, of_y) = product.columns(weights);
        places([
            bytes(product.rows.saturating_mul(of_x)),
            bytes(of_y),
            bytes(product.rows.saturating_mul(of_y)),
            self.workspace_bytes(weights, product),
        ])
    }

    pub(super) fn too_small(&self, need: u64, have: u64) -> DeviceError {
        DeviceError::OutOfBounds {
            device: self.weights.context().name().to_owned(),
            offset: 0,
            end: need,
            len: have,
        }
    }

    /// Computes with operands that are copied to memory of the device, and copies a result back.
    ///
    /// `inputs` and `output` are bytes with their places in that memory, of which `workspace` and `end` are
    /// the last two. `work` is given the address of the memory and a stream of its own, whose work is
    /// waited for before this returns: what it gives to the stream may use memory, weights and constants.
    pub(super) fn within(
        &self,
        memory: &DeviceBytes,
        inputs: &[(u64, &[u8])],
        (workspace, end): (u64, u64),
        work: impl FnOnce(u64, *mut c_void) -> Result<(), DeviceError>,
        (y, output): (u64, &mut [u8]),
    ) -> Result<(), DeviceError> {
        let context = self.kernels.context();
        let Some(own) = memory.memory().downcast_ref::<WorkspaceMemory>() else {
            let reason = "the memory is not of its driver".to_owned();
            return Err(unavailable(context.name(), reason));
        };
        if !Arc::ptr_eq(own.memory.context(), context) {
            let reason = format!("the memory is of {}", own.memory.context().name());
            return Err(unavailable(context.name(), reason));
        }
        own.at(0, usize::try_from(end).unwrap_or(usize::MAX))?;
        let counters = (end - workspace).min(COUNTERS as u64);
        own.memory.clear(own.start + workspace, counters as usize)?;

        let longest = inputs.iter().map(|(_, bytes)| bytes.len()).max();
        let buffer = longest.unwrap_or(0).clamp(1, COPIED);
        let locked = CudaPageLocked::new(context, WRITER_BUFFERS * buffer)?;
        let mut staging = Staging::new(&own.memory, Box::new(locked))?;
        for (place, bytes) in inputs {
            for (index, piece) in bytes.chunks(buffer).enumerate() {
                staging.stage()?[..piece.len()].copy_from_slice(piece);
                staging.write(&[Piece {
                    start: 0,
                    len: piece.len(),
                    offset: own.start + place + (index * buffer) as u64,
                }])?;
            }
        }
        staging.keep(&self.weights);
        if let Some(constants) = &self.constants {
            staging.keep(&constants.memory);
        }
        staging.is_busy = true;
        work(
            own.memory.address() + own.start,
            staging.stream.raw.cast::<c_void>(),
        )?;
        staging.finish()?;
        own.memory.read(own.start + y, output)
    }
}

impl Multiplier for KernelMultiplier {
    fn workspace_bytes(&self, weights: &ProductWeights, product: &Product) -> u64 {
        let linear = self.linear(weights, product);
        let gpu = Some(self.gpu);
        match (weights.of_stack, product.transposed) {
            (Some(stack), false) => self.matrix_workspace_bytes(weights, stack, product),
            (_, true) => linear.most_transposed_workspace_bytes(gpu) as u64,
            (None, false) => linear.most_workspace_bytes(gpu) as u64,
        }
    }

    unsafe fn multiply(
        &self,
        weights: &ProductWeights,
        product: &Product,
        operands: &DeviceOperands,
    ) -> Result<(), DeviceError> {
        let (_, of_y) = product.columns(weights);
        if let Some(stack) = weights.of_stack {
            // SAFETY: as the caller promises.
            return unsafe { self.multiply_matrix(weights, stack, product, operands) };
        }
        let found = self.find(weights)?;
        if product.rows == 0 || of_y == 0 {
            return Ok(());
        }
        let (kernels, linear) = (&self.kernels, self.linear(weights, product));
        let _current = kernels.context().enter()?;
        let how = (weights.quant_type, product.transposed);
        // SAFETY: weights and constants lie in memory that `self` keeps, and are as long as the kernel needs:
        // `find` has looked. The rest, and that `self` is kept, is the caller's promise.
        // Nobody writes a loaded model's weights.
        unsafe { launch_product(kernels, self.gpu, linear, how, &found, operands, true) }
    }

    fn copied_bytes(&self, weights: &ProductWeights, product: &Product) -> u64 {
        self.places(weights, product)[4]
    }

    fn multiply_in(
        &self,
        memory: &DeviceBytes,
        weights: &ProductWeights,
        product: &Product,
        operands: HostOperands<'_>,
    ) -> Result<(), DeviceError> {
        let [x, bias, y, workspace, end] = self.places(weights, product);
        let inputs = [(x, operands.x), (bias, operands.bias.unwrap_or_default())];
        let work = |memory: u64, stream| {
            let mut on_device = DeviceOperands::new(memory + x, memory + y, stream)
                .with_workspace(memory + workspace, end - workspace);
            if operands.bias.is_some() {
                on_device = on_device.with_bias(memory + bias);
            }
            // SAFETY: places of their own in memory that is long enough, at multiples of 256, in a stream
            // that nobody else has and that is waited for; the counters are zero.
            unsafe { self.multiply(weights, product, &on_device) }
        };
        self.within(memory, &inputs, (workspace, end), work, (y, operands.y))
    }

    fn prepare_experts(&self) -> Result<(), DeviceError> {
        self.experts.compile()
    }

    fn experts_workspace_bytes(&self, weights: &ExpertsWeights, product: &ExpertsProduct) -> u64 {
        self.workspace_of_experts(weights, product)
    }

    unsafe fn multiply_experts(
        &self,
        weights: &ExpertsWeights,
        product: &ExpertsProduct,
        operands: &DeviceExpertsOperands,
    ) -> Result<(), DeviceError> {
        // SAFETY: as the caller promises.
        unsafe { self.launch_experts(weights, product, operands) }
    }

    fn copied_experts_bytes(&self, weights: &ExpertsWeights, product: &ExpertsProduct) -> u64 {
        let [.., end] = self.places_of_experts(weights, product);
        end
    }

    fn multiply_experts_in(
        &self,
        memory: &DeviceBytes,
        weights: &ExpertsWeights,
        product: &ExpertsProduct,
        operands: HostExpertsOperands<'_>,
    ) -> Result<(), DeviceError> {
        let [x, ids, choice_weights, bias, down_bias, y, workspace, end] =
            self.places_of_experts(weights, product);
        let before = match weights {
            ExpertsWeights::Layer { .. } => vec![],
            // What is skipped stays.
            ExpertsWeights::Linear(_) => operands.y.to_vec(),
        };
        let inputs = [
            (x, operands.x),
            (ids, bytemuck::cast_slice(operands.choices.ids)),
            (
                choice_weights,
                bytemuck::cast_slice(operands.choices.weights),
            ),
            (bias, operands.bias.unwrap_or_default()),
            (down_bias, operands.down_bias.unwrap_or_default()),
            (y, &before),
        ];
        let work = |memory: u64, stream| {
            let at = |there: bool, place: u64| if there { memory + place } else { 0 };
            let on_device = DeviceExpertsOperands::new(
                memory + x,
                memory + ids,
                memory + choice_weights,
                memory + y,
                stream,
            )
            .with_biases(
                at(operands.bias.is_some(), bias),
                at(operands.down_bias.is_some(), down_bias),
            )
            .with_workspace(memory + workspace, end - workspace);
            // SAFETY: as for one product.
            unsafe { self.launch_experts(weights, product, &on_device) }
        };
        self.within(memory, &inputs, (workspace, end), work, (y, operands.y))
    }
}
