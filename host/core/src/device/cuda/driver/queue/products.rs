//! Products in a queue, with matrices and with stacks of them.

use cudarc::driver::sys::CUdeviceptr;
use tightfit_kernels::cuda::experts::{
    ExpertsLaunch, ExpertsProduct, Form, Quantized, Routing, RowsOfX,
};
use tightfit_kernels::cuda::linear::{COUNTERS, Gpu, Linear};
use tightfit_kernels::cuda::quant_type_argument;
use tightfit_kernels::{KernelError, QuantType};

use super::super::kernels::Shape;
use super::super::launch::launch_product;
use super::super::multiply::Found;
use super::super::stream::Stream;
use super::super::unavailable;
use super::CudaQueue;
use crate::device::{
    DeviceBytes, DeviceError, DeviceOperands, MatrixShape, Product, QueuedProduct, QueuedScales,
    QueuedWeights,
};

/// What parts of a workspace begin at multiples of.
const ALIGNMENT: u64 = 256;

fn at(bytes: &DeviceBytes) -> CUdeviceptr {
    bytes.address().pointer
}

/// A product with one matrix, of pointers that are aligned.
fn linear(product: &Product, shape: &MatrixShape) -> Linear {
    Linear {
        float: product.float,
        rows: product.rows,
        outputs: shape.outputs,
        inputs: shape.inputs,
        block_size: shape.block_size,
        aligned: true,
        by_row: product.by_row,
    }
}

/// A product with a stack: each row has chosen one expert.
fn of_stack(product: &Product, shape: &MatrixShape, experts: usize) -> ExpertsProduct {
    ExpertsProduct {
        routing: Routing {
            tokens: product.rows,
            choices: 1,
            experts,
        },
        float: product.float,
        x: RowsOfX::Tokens,
        results: shape.outputs,
        inputs: shape.inputs,
        block_size: shape.block_size,
        form: Form::Plain,
        quantized: Quantized::Whole,
        aligned: true,
        follows: false,
    }
}

/// Where a routing begins in a workspace: behind what kernels work in, and behind the counters also where these
/// kernels have none, since others that use the same workspace do.
fn routing_begins(product: &ExpertsProduct, gpu: Gpu) -> u64 {
    let work = product.most_workspace_bytes(Some(gpu)).max(COUNTERS) as u64;
    work.saturating_add(ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT
}

fn found(weights: &QueuedWeights) -> Found {
    match &weights.scales {
        QueuedScales::Absmax(absmax) => Found {
            codes: at(&weights.codes),
            absmax: at(absmax),
            nested: [0; 3],
        },
        QueuedScales::Double {
            codes,
            nested,
            mean,
            map,
        } => Found {
            codes: at(&weights.codes),
            absmax: at(codes),
            nested: [at(nested), at(mean), at(map)],
        },
    }
}

/// Operands have been checked and are kept, and the context is current: what [`super::Queue::give`] does
/// before it comes here.
impl CudaQueue {
    pub(super) fn workspace(&self, product: &Product, shape: &MatrixShape) -> u64 {
        let gpu = self.gpu().ok();
        let Some(experts) = shape.experts else {
            return linear(product, shape).most_workspace_bytes(gpu) as u64;
        };
        let product = of_stack(product, shape, experts);
        match gpu {
            Some(gpu) => {
                routing_begins(&product, gpu).saturating_add(product.routing.most_bytes() as u64)
            }
            // It has no kernels either.
            None => 0,
        }
    }

    pub(super) fn multiply(
        &self,
        stream: &Stream,
        given: &QueuedProduct,
        overlaps: bool,
    ) -> Result<(), DeviceError> {
        let (shape, product) = (&given.weights.shape, &given.product);
        if product.rows == 0 || shape.all_outputs() == 0 {
            return Ok(());
        }
        let (gpu, found) = (self.gpu()?, found(&given.weights));
        if let (Some(experts), Some(ids)) = (shape.experts, &given.experts) {
            let product = of_stack(product, shape, experts);
            let at_ids = (at(ids), overlaps);
            return self.multiply_stack(stream, given, product, &found, at_ids);
        }
        let mut operands = DeviceOperands::new(at(&given.x), at(&given.y), stream.raw.cast());
        if let Some(bias) = &given.bias {
            operands = operands.with_bias(at(bias));
        }
        if let Some(workspace) = &given.workspace {
            operands = operands.with_workspace(at(workspace), workspace.bytes());
        }
        let (linear, how) = (linear(product, shape), (given.weights.quant_type, false));
        // SAFETY: all of it has been checked, lies in this device's memory and is kept until the stream is
        // done. That the counters are zero cannot be looked at: with others sums are not complete, but
        // whatever they are, kernels write within y and the workspace.
        unsafe {
            launch_product(
                &self.products,
                gpu,
                linear,
                how,
                &found,
                &operands,
                overlaps,
            )
        }
    }

    pub(super) fn checked<T>(&self, result: Result<T, KernelError>) -> Result<T, DeviceError> {
        result.map_err(|error| unavailable(self.context().name(), error.to_string()))
    }

    fn multiply_stack(
        &self,
        stream: &Stream,
        given: &QueuedProduct,
        product: ExpertsProduct,
        found: &Found,
        (ids, overlaps): (CUdeviceptr, bool),
    ) -> Result<(), DeviceError> {
        let gpu = self.gpu()?;
        let bias = given.bias.as_ref().map_or(0, at);
        let used = [at(&given.x), bias, at(&given.y)];
        let product = ExpertsProduct {
            aligned: used.iter().chain(&found.all()).all(|at| at % 16 == 0),
            ..product
        };
        let launch = self.checked(product.launch(gpu))?;
        let route = self.checked(product.routing.launch())?;
        let begin = routing_begins(&product, gpu);
        let have = given.workspace.as_ref().map_or(0, DeviceBytes::bytes);
        let need = match &route {
            Some(_) => begin.saturating_add(product.routing.bytes() as u64),
            None => launch.workspace_bytes as u64,
        };
        if need > have {
            return Err(DeviceError::OutOfBounds {
                device: self.context().name().to_owned(),
                offset: 0,
                end: need,
                len: have,
            });
        }
        let workspace = given.workspace.as_ref().map_or(0, at);
        let pairs = product.routing.tokens as u64;
        let experts = product.routing.experts as u64;
        let mut routing = ids;
        if let Some(route) = route {
            routing = workspace + begin;
            let rows = product.routing.tile_rows() as u64;
            let mut arguments = [ids, routing, pairs, experts, rows];
            // SAFETY: the kernel's arguments; the routing lies in the workspace, behind what kernels work in.
            unsafe { self.launch_experts(stream, &route, &mut arguments, overlaps) }?;
        }
        let [codes, scales, nested, mean, map] = found.all();
        let quant_type: QuantType = given.weights.quant_type;
        let mut arguments = [
            codes,
            scales,
            nested,
            mean,
            map,
            at(&given.x),
            bias,
            at(&given.y),
            routing,
            match launch.workspace_bytes {
                0 => 0,
                _ => workspace,
            },
            pairs,
            1,
            experts,
            product.outputs() as u64,
            product.inputs as u64,
            u64::from(product.block_size),
            u64::from(quant_type_argument(quant_type)),
            u64::from(launch.form),
            u64::from(launch.limit.to_bits()),
        ];
        // SAFETY: the arguments that the kernels for experts have, as above; whatever ids are, kernels use
        // those of experts only.
        unsafe { self.launch_experts(stream, &launch, &mut arguments, overlaps) }
    }

    /// # Safety
    /// As [`KernelModule::launch_in`](super::super::KernelModule::launch_in).
    unsafe fn launch_experts(
        &self,
        stream: &Stream,
        launch: &ExpertsLaunch,
        arguments: &mut [u64],
        overlaps: bool,
    ) -> Result<(), DeviceError> {
        let shape = Shape::of_experts(launch, overlaps);
        // SAFETY: as the caller promises.
        unsafe { self.experts.launch_in(stream.raw, shape, arguments, &[]) }
    }
}
