//! Products where both weight and operands are in a GPU's memory.

use std::fmt;

use tightfit_kernels::{Activation, FloatType, NESTED_BLOCK_SIZE};

use super::find::{OnDevice, Place};
use super::{Experts, ExpertsLinear, ExpertsNames, ExpertsTensors, Linear, LinearError};
use crate::device::{
    DeviceAddress, DeviceBytes, DeviceError, DeviceOperands, HostOperands, MatrixOfStack, Product,
    Workspace,
};
use crate::model::{Model, TailAllocation, Tensor};
use crate::plan::{PartKind, is_multiplied, is_of_gates};

/// What workspaces are multiples of.
const WORKSPACE_ALIGNMENT: u64 = 256;

/// Memory of one device for products to work in, as they need it: its first 16 KiB are zero before the first
/// product, and again after each. Products of one stream can share one. Given back when dropped; whoever
/// has given products to a stream has waited for them by then.
pub struct LinearWorkspace {
    bytes: u64,
    /// Dropped before its place.
    memory: Option<DeviceBytes>,
    _place: Option<TailAllocation>,
}

impl LinearWorkspace {
    /// Returns its length in bytes; 0 on a device that needs none.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns its first byte, a multiple of 256; `None` where it has no bytes.
    pub fn address(&self) -> Option<DeviceAddress> {
        Some(self.memory.as_ref()?.address())
    }
}

impl fmt::Debug for LinearWorkspace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinearWorkspace")
            .field("bytes", &self.bytes)
            .field("address", &self.address())
            .finish_non_exhaustive()
    }
}

/// What a workspace shall be enough for.
///
/// ```
/// use tightfit::products::WorkspaceOptions;
///
/// let options = WorkspaceOptions::rows(64).with_experts_per_token(4);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkspaceOptions {
    /// Rows of products, and tokens of layers of experts.
    pub rows: usize,
    /// Experts of each token, where layers of experts are computed. 0, the default: they are not.
    pub experts_per_token: usize,
    /// Whether it shall be enough for gradients of inputs, too. Not by default.
    pub gradients: bool,
}

impl WorkspaceOptions {
    /// Returns options for this many rows.
    pub fn rows(rows: usize) -> WorkspaceOptions {
        WorkspaceOptions {
            rows,
            experts_per_token: 0,
            gradients: false,
        }
    }
}

tightfit_common::setters!([] WorkspaceOptions:
    with_experts_per_token: experts_per_token, usize;
    with_gradients: gradients, bool;
);

impl Model {
    /// Takes a workspace that is enough for products of up to `rows` rows with each 4-bit weight of a device,
    /// by its index in the plan, but not for layers of experts or gradients: [`Model::product_workspace`] of
    /// these rows.
    ///
    /// # Errors
    /// [`LinearError::Device`].
    pub fn linear_workspace(
        &self,
        device: usize,
        rows: usize,
    ) -> Result<LinearWorkspace, LinearError> {
        self.product_workspace(device, &WorkspaceOptions::rows(rows))
    }

    /// Takes a workspace that is enough for products with each 4-bit weight of a device, by its index in the
    /// plan: of matrices, of single matrices of stacks, of stacks with an expert for each row
    /// ([`Model::experts_linear`]), and of layers of experts whose stacks have the names that
    /// [`Model::experts`] looks for. It lies behind the weights if
    /// [`PlanOptions::rows`](crate::plan::PlanOptions::rows) has reserved that there and it is free, else it
    /// is taken beside the plan and entered in the device's ledger. It keeps the device's memory as long as
    /// it lives, but not the model, which the products need.
    ///
    /// # Errors
    /// [`LinearError::Device`].
    pub fn product_workspace(
        &self,
        device: usize,
        options: &WorkspaceOptions,
    ) -> Result<LinearWorkspace, LinearError> {
        let none = LinearWorkspace {
            bytes: 0,
            memory: None,
            _place: None,
        };
        let mut bytes = 0;
        for tensor in self.tensors().filter(|tensor| tensor.device() == device) {
            bytes = bytes.max(self.workspace_of(tensor, options)?);
        }
        if bytes == 0 {
            return Ok(none);
        }
        Ok(match self.memory_for_products(device, bytes)? {
            None => none,
            Some((memory, place)) => LinearWorkspace {
                bytes,
                memory: Some(memory),
                _place: place,
            },
        })
    }

    fn workspace_of(
        &self,
        tensor: Tensor<'_>,
        options: &WorkspaceOptions,
    ) -> Result<u64, LinearError> {
        let is_here = tensor.part(PartKind::Codes).is_some();
        if tensor.quantization().is_none() || !is_multiplied(tensor.shape()) || is_here {
            return Ok(0);
        }
        let rows = options.rows;
        let mut bytes = 0;
        let matrices = match *tensor.shape() {
            [matrices, _, _] => Some(matrices),
            _ => None,
        };
        let indices = match matrices {
            None => vec![None],
            // The last one lies between nested scales if any does but for the first.
            Some(matrices) => [0, 1, matrices.saturating_sub(1)]
                .into_iter()
                .filter(|index| *index < matrices)
                .map(Some)
                .collect(),
        };
        for index in indices {
            let linear = match Linear::find(self, tensor.name(), index) {
                // Such a matrix is multiplied as a part of its stack only.
                Err(LinearError::Inside { .. }) => continue,
                linear => linear?,
            };
            for by_row in [false, true] {
                for float in [FloatType::Bf16, FloatType::F32] {
                    bytes = bytes.max(linear.workspace_bytes(rows, float, by_row));
                    if options.gradients {
                        let of_gradient =
                            linear.input_gradient_workspace_bytes(rows, float, by_row);
                        bytes = bytes.max(of_gradient);
                    }
                }
            }
        }
        let layer = (options.experts_per_token > 0).then(|| self.layer_beginning_with(tensor));
        if let Some(layer) = layer.flatten() {
            for float in [FloatType::Bf16, FloatType::F32] {
                let choices = options.experts_per_token;
                bytes = bytes.max(layer.workspace_bytes(rows, choices, float));
            }
        }
        if matrices.is_some() {
            let name = tensor.name().to_owned();
            let stack = ExpertsLinear::find(self, &ExpertsTensors::Stack(name))?;
            for float in [FloatType::Bf16, FloatType::F32] {
                bytes = bytes.max(stack.workspace_bytes(rows, float));
            }
            let module = of_gates(tensor.name()).filter(|_| options.experts_per_token > 0);
            if let Some(layer) = module.and_then(|module| self.layer_of(module)) {
                for float in [FloatType::Bf16, FloatType::F32] {
                    let choices = options.experts_per_token;
                    bytes = bytes.max(layer.workspace_bytes(rows, choices, float));
                }
            }
        }
        Ok(bytes)
    }

    /// The layer of experts that are tensors of their own, of which this is the first down projection, if it
    /// lies as stacks.
    fn layer_beginning_with(&self, tensor: Tensor<'_>) -> Option<Experts<'_>> {
        let name = tensor.name();
        let name = name.strip_suffix(".weight").unwrap_or(name);
        let mut ends = [".0.down_proj", ".0.w2"].iter();
        self.layer_of(ends.find_map(|end| name.strip_suffix(end))?)
    }

    /// A layer of experts, if it is one. What is made of its gates does not matter for its workspace.
    fn layer_of(&self, module: &str) -> Option<Experts<'_>> {
        let names = ExpertsNames::find(self, module, Activation::Silu).ok()?;
        Experts::find(self, module, &names, Activation::Silu).ok()
    }
}

/// The module whose gates a tensor is, by its name.
fn of_gates(name: &str) -> Option<&str> {
    is_of_gates(name).then_some(())?;
    let name = name.strip_suffix(".weight").unwrap_or(name);
    name.strip_suffix(".gate_up_proj")
}

impl Linear<'_> {
    /// Returns how many bytes of workspace [`Linear::forward_on_device`] needs for this many rows; it is
    /// enough for any fewer, too. 0 for a weight in host memory.
    pub fn workspace_bytes(&self, rows: usize, float: FloatType, by_row: bool) -> u64 {
        self.workspace_bytes_of(&Product {
            float,
            rows,
            by_row,
            transposed: false,
        })
    }

    /// Returns how many bytes of workspace [`Linear::input_gradient_on_device`] needs for this many rows, at
    /// most 16 MiB; it is enough for any fewer, too. 0 for a weight in host memory, and by row.
    pub fn input_gradient_workspace_bytes(
        &self,
        rows: usize,
        float: FloatType,
        by_row: bool,
    ) -> u64 {
        self.workspace_bytes_of(&Product {
            float,
            rows,
            by_row,
            transposed: true,
        })
    }

    fn workspace_bytes_of(&self, product: &Product) -> u64 {
        match &self.place {
            Place::Host(_) => 0,
            Place::Device(OnDevice {
                multiplier,
                weights,
            }) => multiplier.workspace_bytes(weights, product),
        }
    }

    /// Gives the product to a stream of the weight's GPU, and returns before it is computed. Nothing is
    /// allocated and nothing waited for: there are only launches of kernels, one for most products, so that
    /// the stream may be one that is being captured into a graph.
    ///
    /// Fast where x, bias and y begin at multiples of 16, x has 16 bits, inputs are a multiple of 64 and
    /// blocks have 64 elements or more; without that by a simpler kernel.
    ///
    /// # Errors
    /// [`LinearError::Elsewhere`] for a weight in host memory, [`LinearError::Address`] for pointers that are
    /// null or between elements, [`LinearError::Workspace`] for one that has less than
    /// [`Linear::workspace_bytes`] says, and [`LinearError::Device`] when the driver refuses a launch. Nothing
    /// has been launched but in the last case.
    ///
    /// # Safety
    /// - x, bias and y are pointers into memory of the weight's GPU, valid in its primary context, of
    ///   `rows * inputs`, `outputs` and `rows * outputs` elements of type `float`; so is the workspace, of as
    ///   many bytes as its length says. Nothing overlaps y or the workspace.
    /// - The first 16 KiB of the workspace were zero when its first product was given to the stream, and no
    ///   other stream uses it meanwhile. [`Model::linear_workspace`] gives one.
    /// - The stream is one of the GPU's primary context, or null for the default stream of that.
    /// - The operands and the model are kept until the stream is done, and until graphs that have captured
    ///   it are gone.
    pub unsafe fn forward_on_device(
        &self,
        float: FloatType,
        rows: usize,
        operands: &DeviceOperands,
        by_row: bool,
    ) -> Result<(), LinearError> {
        let on_device = self.on_device()?;
        let product = Product {
            float,
            rows,
            by_row,
            transposed: false,
        };
        self.check_operands(on_device, &product, operands)?;
        let weights = &on_device.weights;
        // SAFETY: as the caller promises.
        unsafe { on_device.multiplier.multiply(weights, &product, operands) }?;
        Ok(())
    }

    /// Gives the gradient of x by that of y, `dx = dy * W`, to a stream of the weight's GPU, as
    /// [`Linear::forward_on_device`] does: of the operands, x is dy [rows, outputs] and y is dx
    /// [rows, inputs]. There is no bias.
    ///
    /// Fast where dy and dx begin at multiples of 16 and have 16 bits, inputs are a multiple of 32 and
    /// outputs one of 8.
    ///
    /// # Errors
    /// As [`Linear::forward_on_device`], with [`Linear::input_gradient_workspace_bytes`];
    /// [`LinearError::Length`] for a bias, and [`LinearError::Inside`] for a matrix of a stack that begins
    /// between two nested scales.
    ///
    /// # Safety
    /// As with [`Linear::forward_on_device`].
    pub unsafe fn input_gradient_on_device(
        &self,
        float: FloatType,
        rows: usize,
        operands: &DeviceOperands,
        by_row: bool,
    ) -> Result<(), LinearError> {
        let on_device = self.on_device()?;
        let product = self.gradient_product(on_device, float, rows, by_row)?;
        self.check_operands(on_device, &product, operands)?;
        let weights = &on_device.weights;
        // SAFETY: as the caller promises.
        unsafe { on_device.multiplier.multiply(weights, &product, operands) }?;
        Ok(())
    }

    fn on_device(&self) -> Result<&OnDevice<'_>, LinearError> {
        match &self.place {
            Place::Device(on_device) => Ok(on_device),
            Place::Host(_) => Err(LinearError::Elsewhere {
                tensor: self.tensor.name().to_owned(),
                device: self.device_name().to_owned(),
                instead: "multiply it there, with operands in host memory",
            }),
        }
    }

    /// The product that a gradient is on a GPU.
    pub(super) fn gradient_product(
        &self,
        on_device: &OnDevice<'_>,
        float: FloatType,
        rows: usize,
        by_row: bool,
    ) -> Result<Product, LinearError> {
        if let Some(MatrixOfStack { index, .. }) = on_device.weights.of_stack {
            let matrix = self.outputs.saturating_mul(self.inputs);
            let block = u64::from(self.quantization.block_size);
            return Err(LinearError::Inside {
                tensor: self.tensor.name().to_owned(),
                index: index as u64,
                first: index.saturating_mul(matrix) as u64,
                what: "the blocks of a nested scale",
                need: block * NESTED_BLOCK_SIZE as u64,
            });
        }
        Ok(Product {
            float,
            rows,
            by_row,
            transposed: true,
        })
    }

    fn check_operands(
        &self,
        on_device: &OnDevice<'_>,
        product: &Product,
        operands: &DeviceOperands,
    ) -> Result<(), LinearError> {
        let (of_x, of_y) = product.columns(&on_device.weights);
        let is_empty = product.rows == 0 || of_y == 0;
        let element = product.float.bytes() as u64;
        let need = on_device
            .multiplier
            .workspace_bytes(&on_device.weights, product);
        let [x, y] = match product.transposed {
            false => ["x", "y"],
            true => ["dy", "dx"],
        };
        if product.transposed && operands.bias != 0 {
            self.check_length("the bias of a gradient", "elements", Some(0), of_x)?;
        }
        check_addresses(
            self.tensor.name(),
            &[
                (x, operands.x, element, !is_empty && of_x > 0),
                ("the bias", operands.bias, element, false),
                (y, operands.y, element, !is_empty),
            ],
            (need, operands.workspace, operands.workspace_bytes),
        )
    }

    /// Computes a product of operands in host memory on the weight's device.
    pub(super) fn compute_by_copying(
        &self,
        on_device: &OnDevice<'_>,
        product: &Product,
        operands: HostOperands<'_>,
    ) -> Result<(), LinearError> {
        if operands.y.is_empty() {
            return Ok(());
        }
        let OnDevice {
            multiplier,
            weights,
        } = on_device;
        let memory = memory_beside(self.tensor, multiplier.copied_bytes(weights, product))?;
        multiplier.multiply_in(&memory, weights, product, operands)?;
        Ok(())
    }

    fn device_name(&self) -> &str {
        device_name(self.tensor)
    }
}

pub(super) fn device_name(tensor: Tensor<'_>) -> &str {
    tensor.model().plan().devices[tensor.device()].name()
}

/// Memory of a tensor's device for one call, all of it zero.
pub(super) fn memory_beside(tensor: Tensor<'_>, len: u64) -> Result<DeviceBytes, LinearError> {
    let memory = match tensor.reservation() {
        Some(reservation) => reservation.cleared(Workspace::Beside { len })?,
        None => None,
    };
    memory.ok_or_else(|| {
        let error = DeviceError::Unavailable {
            device: device_name(tensor).to_owned(),
            reason: "internal error: it has no memory to copy operands to".to_owned(),
        };
        error.into()
    })
}

/// Addresses of operands: each with what it is a multiple of and whether it is needed. Of the workspace what is needed, its address and its length.
pub(super) fn check_addresses(
    tensor: &str,
    operands: &[(&'static str, u64, u64, bool)],
    (need, workspace, workspace_bytes): (u64, u64, u64),
) -> Result<(), LinearError> {
    let workspace = ("the workspace", workspace, WORKSPACE_ALIGNMENT, need > 0);
    for &(what, address, need, is_needed) in operands.iter().chain([&workspace]) {
        if !address.is_multiple_of(need) || (is_needed && address == 0) {
            return Err(LinearError::Address {
                tensor: tensor.to_owned(),
                what,
                address,
                need,
            });
        }
    }
    if need > workspace_bytes {
        return Err(LinearError::Workspace {
            tensor: tensor.to_owned(),
            need,
            have: workspace_bytes,
        });
    }
    Ok(())
}
