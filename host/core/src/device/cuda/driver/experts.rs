//! Experts whose weights lie in a device's memory, by its own kernels.

use cudarc::driver::sys::{CUdeviceptr, CUstream};
use tightfit_kernels::KernelError;
use tightfit_kernels::cuda::experts::{
    ExpertsLaunch, ExpertsProduct as StackProduct, Routing, RowsOfX, combine,
};
use tightfit_kernels::cuda::quant_type_argument;

use super::KernelMultiplier;
use super::kernels::Shape;
use crate::device::experts::{
    bytes, layout, layout_of_matrix, matrix, places, products, tokens_at_once,
};
use crate::device::{
    DeviceError, DeviceExpertsOperands, DeviceOperands, ExpertsProduct, ExpertsWeights,
    MatrixOfStack, Product, ProductWeights,
};

/// The addresses of a product with a stack.
#[derive(Clone, Copy)]
struct Operands {
    x: CUdeviceptr,
    bias: CUdeviceptr,
    y: CUdeviceptr,
    /// Or the ids, where they are not sorted.
    routing: CUdeviceptr,
    workspace: CUdeviceptr,
    stream: CUstream,
}

impl KernelMultiplier {
    pub(super) fn workspace_of_experts(
        &self,
        weights: &ExpertsWeights,
        product: &ExpertsProduct,
    ) -> u64 {
        if product.tokens == 0 {
            return 0;
        }
        let [.., end] = layout(weights, product, Some(self.gpu));
        end
    }

    /// Where operands are put that are copied to the device: x, ids, their weights, biases, y and the
    /// workspace, and the end.
    pub(super) fn places_of_experts(
        &self,
        weights: &ExpertsWeights,
        product: &ExpertsProduct,
    ) -> [u64; 8] {
        let pairs = product.tokens.saturating_mul(product.choices);
        let (inputs, results, biases) = match weights {
            ExpertsWeights::Linear(stack) => {
                let outputs = stack.outputs / product.experts.max(1);
                let results = pairs.saturating_mul(outputs);
                (stack.inputs, results, [stack.outputs, 0])
            }
            ExpertsWeights::Layer { gate_up, down, .. } => {
                let results = product.tokens.saturating_mul(gate_up.inputs);
                (gate_up.inputs, results, [gate_up.outputs, down.outputs])
            }
        };
        let floats = |elements: usize| bytes(elements, product.float.bytes());
        places([
            floats(product.tokens.saturating_mul(inputs)),
            bytes(pairs, 4),
            bytes(pairs, 4),
            floats(biases[0]),
            floats(biases[1]),
            floats(results),
            self.workspace_of_experts(weights, product),
        ])
    }

    /// Gives the launches of experts to a stream.
    ///
    /// # Safety
    /// As with [`crate::device::Multiplier::multiply_experts`].
    pub(super) unsafe fn launch_experts(
        &self,
        weights: &ExpertsWeights,
        product: &ExpertsProduct,
        operands: &DeviceExpertsOperands,
    ) -> Result<(), DeviceError> {
        if product.tokens == 0 {
            return Ok(());
        }
        let [work, routing, between, parts, end] = layout(weights, product, Some(self.gpu));
        if end > operands.workspace_bytes {
            return Err(self.too_small(end, operands.workspace_bytes));
        }
        let float = product.float.bytes();
        let (first, second) = products(weights, product, product.tokens);
        let of_y = match &second {
            Some(second) => bytes(second.results, float),
            None => bytes(first.results.saturating_mul(product.choices), float),
        };
        if of_y == 0 {
            return Ok(());
        }
        let at_once = tokens_at_once(weights, product);
        let _current = self.experts.context().enter()?;
        for begin in (0..product.tokens).step_by(at_once.max(1)) {
            let tokens = at_once.min(product.tokens - begin);
            let of_tokens = |width: u64| begin as u64 * width;
            let pairs = of_tokens(bytes(product.choices, 4));
            let y = operands.y + of_tokens(of_y);
            let (first, second) = products(weights, product, tokens);
            let has_pairs = product.choices > 0;
            let ids = operands.ids + if has_pairs { pairs } else { 0 };
            let addresses = Operands {
                x: operands.x + of_tokens(bytes(first.inputs, float)),
                bias: operands.bias,
                y,
                routing: operands.workspace + routing,
                workspace: operands.workspace + work,
                stream: operands.stream as CUstream,
            };
            // SAFETY: as the caller promises; what is between the launches lies in the workspace, which is
            // long enough: it has been compared with the layout.
            unsafe {
                let addresses = match has_pairs {
                    true => self.route(first.routing, ids, addresses)?,
                    false => addresses,
                };
                match (weights, second) {
                    (ExpertsWeights::Linear(stack), _) if has_pairs => {
                        self.launch_stack(stack, first, addresses)?;
                    }
                    (ExpertsWeights::Layer { gate_up, down, .. }, Some(second)) => {
                        let between = operands.workspace + between;
                        let parts = operands.workspace + parts;
                        if has_pairs {
                            let to_between = Operands {
                                y: between,
                                ..addresses
                            };
                            self.launch_stack(gate_up, first, to_between)?;
                            let to_parts = Operands {
                                x: between,
                                bias: operands.down_bias,
                                y: parts,
                                ..addresses
                            };
                            self.launch_stack(down, second, to_parts)?;
                        }
                        let choices = [parts, ids, operands.weights + pairs];
                        self.combine(&second, choices, y, operands.stream as CUstream)?;
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Sorts pairs by expert. Returns the addresses with that routing, or the ids where there is none.
    ///
    /// # Safety
    /// As with [`KernelMultiplier::launch_experts`]. The context is current.
    unsafe fn route(
        &self,
        routing: Routing,
        ids: CUdeviceptr,
        addresses: Operands,
    ) -> Result<Operands, DeviceError> {
        let Some(launch) = self.checked(routing.launch())? else {
            return Ok(Operands {
                routing: ids,
                ..addresses
            });
        };
        let mut arguments = [
            ids,
            addresses.routing,
            (routing.tokens * routing.choices) as u64,
            routing.experts as u64,
            routing.tile_rows() as u64,
        ];
        // SAFETY: the kernel's arguments; there is room for the routing. The rest is the caller's promise.
        unsafe { self.give(&launch, &mut arguments, addresses.stream) }?;
        Ok(addresses)
    }

    /// # Safety
    /// As with [`KernelMultiplier::route`].
    unsafe fn launch_stack(
        &self,
        weights: &ProductWeights,
        product: StackProduct,
        addresses: Operands,
    ) -> Result<(), DeviceError> {
        let found = self.find(weights)?;
        let used = [addresses.x, addresses.bias, addresses.y];
        let product = StackProduct {
            aligned: used.iter().chain(&found.all()).all(|at| at % 16 == 0),
            ..product
        };
        let launch = self.checked(product.launch(self.gpu))?;
        let [codes, scales, nested, mean, map] = found.all();
        let Routing {
            tokens,
            choices,
            experts,
        } = product.routing;
        let mut arguments = [
            codes,
            scales,
            nested,
            mean,
            map,
            addresses.x,
            addresses.bias,
            addresses.y,
            addresses.routing,
            match launch.workspace_bytes {
                0 => 0,
                _ => addresses.workspace,
            },
            (tokens * choices) as u64,
            match product.x {
                RowsOfX::Tokens => choices as u64,
                RowsOfX::Pairs => 1,
            },
            experts as u64,
            product.outputs() as u64,
            product.inputs as u64,
            u64::from(weights.block_size),
            u64::from(quant_type_argument(weights.quant_type)),
            u64::from(launch.form),
            u64::from(launch.limit.to_bits()),
        ];
        // SAFETY: the arguments that the kernels for experts have. Weights and constants lie in memory that
        // `self` keeps, and are as long as the kernel needs: `find` has looked. The rest is the caller's
        // promise.
        unsafe { self.give(&launch, &mut arguments, addresses.stream) }
    }

    /// Adds up the parts of each token: `choices` are parts, ids and their weights.
    ///
    /// # Safety
    /// As with [`KernelMultiplier::route`].
    unsafe fn combine(
        &self,
        product: &StackProduct,
        [parts, ids, weights]: [CUdeviceptr; 3],
        y: CUdeviceptr,
        stream: CUstream,
    ) -> Result<(), DeviceError> {
        let Routing {
            tokens,
            choices,
            experts,
        } = product.routing;
        let launch = self.checked(combine(product.routing, product.float, product.results))?;
        let mut arguments = [
            parts,
            ids,
            weights,
            y,
            tokens as u64,
            choices as u64,
            experts as u64,
            product.results as u64,
        ];
        // SAFETY: the kernel's arguments, as the caller promises.
        unsafe { self.give(&launch, &mut arguments, stream) }
    }

    /// # Safety
    /// As with `KernelModule::launch_in`.
    unsafe fn give(
        &self,
        launch: &ExpertsLaunch,
        arguments: &mut [u64],
        stream: CUstream,
    ) -> Result<(), DeviceError> {
        // Nobody writes a loaded model's weights.
        let shape = Shape::of_experts(launch, true);
        // SAFETY: as the caller promises.
        unsafe { self.experts.launch_in(stream, shape, arguments, &[]) }
    }

    fn checked<T>(&self, launch: Result<T, KernelError>) -> Result<T, DeviceError> {
        launch.map_err(|error| self.too_many(error))
    }

    /// The workspace of a product with a matrix that begins between nested scales.
    pub(super) fn matrix_workspace_bytes(
        &self,
        weights: &ProductWeights,
        stack: MatrixOfStack,
        product: &Product,
    ) -> u64 {
        if product.rows == 0 {
            return 0;
        }
        let [.., end] = layout_of_matrix(&matrix(weights, stack, product), Some(self.gpu));
        end
    }

    /// Gives a product with such a matrix to a stream.
    ///
    /// # Safety
    /// As with [`crate::device::Multiplier::multiply`].
    pub(super) unsafe fn multiply_matrix(
        &self,
        weights: &ProductWeights,
        stack: MatrixOfStack,
        product: &Product,
        operands: &DeviceOperands,
    ) -> Result<(), DeviceError> {
        if product.rows == 0 || weights.outputs == 0 {
            return Ok(());
        }
        let stack_product = matrix(weights, stack, product);
        let [work, routing, ids, biases, end] = layout_of_matrix(&stack_product, Some(self.gpu));
        if end > operands.workspace_bytes {
            return Err(self.too_small(end, operands.workspace_bytes));
        }
        let context = self.experts.context();
        let index = u32::try_from(stack.index).unwrap_or(u32::MAX);
        let ids = operands.workspace + ids;
        let stream = operands.stream as CUstream;
        let row = bytes(weights.outputs, product.float.bytes());
        let addresses = Operands {
            x: operands.x,
            bias: match operands.bias {
                0 => 0,
                _ => operands.workspace + biases,
            },
            y: operands.y,
            routing: operands.workspace + routing,
            workspace: operands.workspace + work,
            stream,
        };
        let _current = context.enter()?;
        // SAFETY: the ids lie in the workspace, which is long enough.
        let code = unsafe { (context.api.cuMemsetD32Async)(ids, index, product.rows, stream) };
        context.check("cuMemsetD32Async", bytes(product.rows, 4), code)?;
        if operands.bias != 0 {
            // The kernels have a bias for each expert, of which only this one's is read.
            let place = addresses.bias + stack.index as u64 * row;
            // SAFETY: it lies in the workspace, which is long enough; the bias is as the caller promises.
            let code = unsafe {
                (context.api.cuMemcpyDtoDAsync_v2)(place, operands.bias, row as usize, stream)
            };
            context.check("cuMemcpyDtoDAsync", row, code)?;
        }
        // SAFETY: as the caller promises; what is between the launches lies in the workspace.
        unsafe {
            let addresses = self.route(stack_product.routing, ids, addresses)?;
            self.launch_stack(weights, stack_product, addresses)
        }
    }
}
