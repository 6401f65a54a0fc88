//! Products with weights that lie in a device's memory, by its own kernels.

use std::sync::Arc;

use cudarc::driver::sys::{CUdeviceptr, CUstream};
use tightfit_kernels::cuda::linear::{COUNTERS, Gpu, Linear, MOST_MULTIPROCESSORS};
use tightfit_kernels::cuda::quant_type_argument;
use tightfit_kernels::{NESTED_BLOCK_SIZE, QuantType, blocks, packed_bytes};

use super::kernels::Shape;
use super::{
    Context, CudaPageLocked, DeviceMemory, KernelModule, Staging, WorkspaceMemory, unavailable,
};
use crate::device::{
    DeviceBytes, DeviceError, DeviceOperands, HostOperands, Multiplier, Piece, Product,
    ProductWeights, WRITER_BUFFERS, Writer,
};

/// What operands are rounded up to where they are copied to the device.
const ALIGNMENT: u64 = 256;
/// Bytes that are copied at once.
const COPIED: usize = 1 << 20;
/// Values of the codes of scales, and their bytes.
const MAP_BYTES: usize = 256 * 4;

/// The kernels for the weights in one piece of memory.
#[derive(Debug)]
pub(in crate::device::cuda) struct KernelMultiplier {
    kernels: Arc<KernelModule>,
    weights: Arc<DeviceMemory>,
    constants: Option<WorkspaceMemory>,
    gpu: Gpu,
}

/// The addresses of a matrix and of its scales.
pub(super) struct Found {
    pub(super) codes: CUdeviceptr,
    pub(super) absmax: CUdeviceptr,
    /// Of nested scales, mean and map; zero without double quantization.
    pub(super) nested: [CUdeviceptr; 3],
}

/// What a launch depends on of a device.
pub(super) fn gpu_of(context: &Context) -> Result<Gpu, DeviceError> {
    Ok(Gpu {
        compute_capability: context.compute_capability()?,
        // A workspace that a plan has room for is for no more; with more the rest would be idle.
        multiprocessors: context.multiprocessors()?.min(MOST_MULTIPROCESSORS),
    })
}

/// Gives a product to a stream of the kernels' device, whose context is current.
///
/// # Safety
/// As [`Multiplier::multiply`]; `found` is a matrix of as many elements in the device's memory, which is kept
/// until the stream is done.
pub(super) unsafe fn launch(
    kernels: &KernelModule,
    gpu: Gpu,
    linear: Linear,
    quant_type: QuantType,
    found: &Found,
    operands: &DeviceOperands,
) -> Result<(), DeviceError> {
    let context = kernels.context();
    let used = [operands.x, operands.bias, operands.y];
    let linear = Linear {
        aligned: used.iter().chain(&found.all()).all(|at| at % 16 == 0),
        ..linear
    };
    let launch = linear.launch(gpu);
    let launch = launch.map_err(|error| unavailable(context.name(), error.to_string()))?;
    let need = launch.workspace_bytes as u64;
    if need > operands.workspace_bytes {
        return Err(DeviceError::OutOfBounds {
            device: context.name().to_owned(),
            offset: 0,
            end: need,
            len: operands.workspace_bytes,
        });
    }
    let shape = Shape {
        kernel: launch.kernel,
        grid: launch.grid,
        threads: launch.threads,
        shared_bytes: launch.shared_bytes,
    };
    let row_bytes = |elements: usize| (elements * linear.float.bytes()) as u64;
    for first in (0..linear.rows).step_by(launch.rows.max(1)) {
        let [codes, absmax, nested, mean, map] = found.all();
        let rows = launch.rows.min(linear.rows - first);
        let mut arguments = [
            codes,
            absmax,
            nested,
            mean,
            map,
            operands.x + first as u64 * row_bytes(linear.inputs),
            operands.bias,
            operands.y + first as u64 * row_bytes(linear.outputs),
            if need == 0 { 0 } else { operands.workspace },
            rows as u64,
            linear.outputs as u64,
            linear.inputs as u64,
            u64::from(linear.block_size),
            u64::from(quant_type_argument(quant_type)),
            u64::from(launch.shares),
        ];
        // SAFETY: the arguments that the kernels of products have, and the rest is the caller's promise.
        unsafe { kernels.launch_in(operands.stream as CUstream, shape, &mut arguments) }?;
    }
    Ok(())
}

impl Found {
    fn all(&self) -> [CUdeviceptr; 5] {
        let [nested, mean, map] = self.nested;
        [self.codes, self.absmax, nested, mean, map]
    }
}

impl KernelMultiplier {
    /// For weights in `weights`, with the constants of their double quantization. Loads the kernels.
    pub(in crate::device::cuda) fn new(
        kernels: &Arc<KernelModule>,
        weights: &Arc<DeviceMemory>,
        constants: Option<WorkspaceMemory>,
    ) -> Result<KernelMultiplier, DeviceError> {
        let gpu = gpu_of(kernels.context())?;
        kernels.compile()?;
        Ok(KernelMultiplier {
            kernels: Arc::clone(kernels),
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

    /// A matrix, all of which lies where it is said to be.
    fn find(&self, weights: &ProductWeights) -> Result<Found, DeviceError> {
        let elements = weights.outputs.saturating_mul(weights.inputs);
        let scales = blocks(elements, weights.block_size);
        let codes = self.weights.at(weights.codes, packed_bytes(elements))?;
        let Some(double) = weights.nested else {
            return Ok(Found {
                codes,
                absmax: self.weights.at(weights.absmax, scales.saturating_mul(4))?,
                nested: [0; 3],
            });
        };
        let nested_bytes = 4 * scales.div_ceil(NESTED_BLOCK_SIZE);
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
                constants.at(double.mean, 4)?,
                constants.at(double.map, MAP_BYTES)?,
            ],
        })
    }

    /// Where operands are put that are copied to the device: x, bias, y and the workspace, and the end.
    fn places(&self, weights: &ProductWeights, product: &Product) -> [u64; 5] {
        let bytes =
            |elements: usize| (elements as u64).saturating_mul(product.float.bytes() as u64);
        let lengths = [
            bytes(product.rows.saturating_mul(weights.inputs)),
            bytes(weights.outputs),
            bytes(product.rows.saturating_mul(weights.outputs)),
            self.workspace_bytes(weights, product),
        ];
        let mut places = [0; 5];
        for (index, length) in lengths.into_iter().enumerate() {
            let rounded = length.checked_next_multiple_of(ALIGNMENT);
            places[index + 1] = rounded.map_or(u64::MAX, |rounded| {
                u64::saturating_add(places[index], rounded)
            });
        }
        places
    }
}

impl Multiplier for KernelMultiplier {
    fn workspace_bytes(&self, weights: &ProductWeights, product: &Product) -> u64 {
        let linear = self.linear(weights, product);
        linear.most_workspace_bytes(Some(self.gpu)) as u64
    }

    unsafe fn multiply(
        &self,
        weights: &ProductWeights,
        product: &Product,
        operands: &DeviceOperands,
    ) -> Result<(), DeviceError> {
        let found = self.find(weights)?;
        if product.rows == 0 || weights.outputs == 0 {
            return Ok(());
        }
        let kernels = &self.kernels;
        let _current = kernels.context().enter()?;
        let linear = self.linear(weights, product);
        let quant_type = weights.quant_type;
        // SAFETY: weights and constants lie in memory that `self` keeps, and are as long as the kernel needs:
        // `find` has looked. The rest, and that `self` is kept, is the caller's promise.
        unsafe { launch(kernels, self.gpu, linear, quant_type, &found, operands) }
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
        let context = self.kernels.context();
        let Some(own) = memory.memory().downcast_ref::<WorkspaceMemory>() else {
            let reason = "the memory is not of its driver".to_owned();
            return Err(unavailable(context.name(), reason));
        };
        if !Arc::ptr_eq(own.memory.context(), context) {
            let reason = format!("the memory is of {}", own.memory.context().name());
            return Err(unavailable(context.name(), reason));
        }
        let places = self.places(weights, product);
        let end = usize::try_from(places[4]).unwrap_or(usize::MAX);
        own.at(0, end)?;
        let [x, bias, y, workspace, _] = places.map(|place| own.start + place);
        let counters = (places[4] - places[3]).min(COUNTERS as u64);
        own.memory.clear(workspace, counters as usize)?;

        let longest = operands.x.len().max(operands.bias.map_or(0, <[u8]>::len));
        let buffer = longest.clamp(1, COPIED);
        let locked = CudaPageLocked::new(context, WRITER_BUFFERS * buffer)?;
        let mut staging = Staging::new(&own.memory, Box::new(locked))?;
        for (place, bytes) in [(x, operands.x), (bias, operands.bias.unwrap_or_default())] {
            for (index, piece) in bytes.chunks(buffer).enumerate() {
                staging.stage()?[..piece.len()].copy_from_slice(piece);
                staging.write(&[Piece {
                    start: 0,
                    len: piece.len(),
                    offset: place + (index * buffer) as u64,
                }])?;
            }
        }
        staging.keep(&self.weights);
        if let Some(constants) = &self.constants {
            staging.keep(&constants.memory);
        }
        staging.is_busy = true;
        let at = |place: u64| own.memory.address() + place;
        let mut on_device = DeviceOperands::new(at(x), at(y), staging.stream.raw.cast())
            .with_workspace(at(workspace), places[4] - places[3]);
        if operands.bias.is_some() {
            on_device = on_device.with_bias(at(bias));
        }
        // SAFETY: places of their own in memory that is long enough, at multiples of 256, in a stream that
        // nobody else has; the counters are zero. `staging` keeps what the kernels use until its stream is
        // done, and `self` is borrowed as long.
        unsafe { self.multiply(weights, product, &on_device) }?;
        staging.finish()?;
        own.memory.read(y, operands.y)
    }
}
