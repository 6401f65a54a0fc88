//! Products with the weights of a loaded model, of operands that torch has: addresses, and a GPU's stream.
//!
//! `tightfit.ops` calls this, and nobody else: it has checked types, lengths, devices and layout, and keeps
//! the operands until the call returns, or as long as torch's stream needs them.
#![allow(unsafe_code)] // Operands come as addresses.

use std::sync::Arc;

use pyo3::prelude::*;
use tightfit::device::{DeviceExpertsOperands, DeviceOperands, HostExpertsOperands, HostOperands};
use tightfit::kernels::{Activation, Choices, FloatType, GateLayout};
use tightfit::products::{
    self, ExpertsNames, ExpertsTensors, GateTensors, LinearError, LinearOptions, LinearWorkspace,
    WorkspaceOptions,
};

use crate::failure::Failure;

/// The product with one 4-bit weight, or with one matrix of a stack: `y = x * transpose(W) + bias`.
///
/// It keeps the model's weights, also when the model is unloaded.
#[pyclass(frozen, weakref, module = "tightfit")]
pub(crate) struct Linear {
    model: Arc<tightfit::Model>,
    name: String,
    index: Option<u64>,
    /// Rows of W.
    #[pyo3(get)]
    outputs: usize,
    /// Columns of W.
    #[pyo3(get)]
    inputs: usize,
    /// Its device, for example `cuda:0`.
    #[pyo3(get)]
    device: String,
    /// Whether it is in a GPU's memory.
    #[pyo3(get)]
    is_on_gpu: bool,
}

/// A layer of experts: see the library's `Experts`. It keeps the model's weights.
#[pyclass(frozen, weakref, module = "tightfit")]
pub(crate) struct Experts {
    model: Arc<tightfit::Model>,
    names: ExpertsNames,
    activation: Activation,
    /// How many there are.
    #[pyo3(get)]
    experts: usize,
    /// Elements of a row of x and of y.
    #[pyo3(get)]
    hidden: usize,
    /// Inputs of an expert's down projection.
    #[pyo3(get)]
    intermediate: usize,
    /// Their device, for example `cuda:0`.
    #[pyo3(get)]
    device: String,
    /// Whether they are in a GPU's memory.
    #[pyo3(get)]
    is_on_gpu: bool,
}

/// Memory of a GPU for products to work in. Those that use one have to follow one another.
#[pyclass(frozen, weakref, module = "tightfit")]
pub(crate) struct Workspace {
    inner: LinearWorkspace,
}

#[pymethods]
impl Workspace {
    /// Its length.
    #[getter]
    fn bytes(&self) -> u64 {
        self.inner.bytes()
    }

    /// The address of its first byte, or 0.
    #[getter]
    fn address(&self) -> u64 {
        self.inner.address().map_or(0, |address| address.pointer)
    }
}

fn failure(error: &LinearError) -> Failure {
    match error {
        LinearError::Device(error) => Failure::from_report(error),
        error => Failure::usage(error),
    }
}

fn float(dtype: &str) -> Result<FloatType, Failure> {
    match dtype {
        "bfloat16" => Ok(FloatType::Bf16),
        "float16" => Ok(FloatType::F16),
        "float32" => Ok(FloatType::F32),
        other => Err(Failure::usage(format_args!(
            "products are of bfloat16, float16 or float32, not {other}"
        ))),
    }
}

fn options(threads: usize) -> LinearOptions {
    LinearOptions::default().with_threads(threads.max(1))
}

fn bytes(what: &str, factors: &[usize]) -> Result<usize, Failure> {
    let product = factors
        .iter()
        .try_fold(1usize, |product, &factor| product.checked_mul(factor));
    product
        .filter(|&bytes| isize::try_from(bytes).is_ok())
        .ok_or_else(|| Failure::usage(format_args!("{what} is too long")))
}

/// # Safety
/// As `std::slice::from_raw_parts`, but for a length of 0.
unsafe fn slice<'a, T>(address: u64, len: usize) -> &'a [T] {
    match len {
        0 => &[],
        // SAFETY: as the caller promises.
        _ => unsafe { std::slice::from_raw_parts(address as *const T, len) },
    }
}

/// # Safety
/// As `std::slice::from_raw_parts_mut`, but for a length of 0.
unsafe fn slice_mut<'a>(address: u64, len: usize) -> &'a mut [u8] {
    match len {
        0 => &mut [],
        // SAFETY: as the caller promises.
        _ => unsafe { std::slice::from_raw_parts_mut(address as *mut u8, len) },
    }
}

impl Linear {
    pub(crate) fn find(
        model: Arc<tightfit::Model>,
        name: String,
        index: Option<u64>,
        device_name: impl Fn(usize) -> String,
    ) -> Result<Linear, Failure> {
        let made = {
            let linear = find(&model, &name, index).map_err(|error| failure(&error))?;
            (
                linear.outputs(),
                linear.inputs(),
                device_name(linear.device()),
                linear.is_on_gpu(),
            )
        };
        let (outputs, inputs, device, is_on_gpu) = made;
        Ok(Linear {
            model,
            name,
            index,
            outputs,
            inputs,
            device,
            is_on_gpu,
        })
    }

    fn get(&self) -> Result<products::Linear<'_>, LinearError> {
        find(&self.model, &self.name, self.index)
    }
}

fn find<'m>(
    model: &'m tightfit::Model,
    name: &str,
    index: Option<u64>,
) -> Result<products::Linear<'m>, LinearError> {
    match index {
        None => model.linear(name),
        Some(index) => model.linear_of(name, index),
    }
}

#[pymethods]
impl Linear {
    /// Bytes of workspace that `rows` rows of x, or of the gradient of y, need on a GPU.
    fn workspace_bytes(
        &self,
        py: Python<'_>,
        rows: usize,
        dtype: &str,
        gradient: bool,
    ) -> PyResult<u64> {
        let need = float(dtype).and_then(|float| {
            let linear = self.get().map_err(|error| failure(&error))?;
            Ok(match gradient {
                false => linear.workspace_bytes(rows, float, false),
                true => linear.input_gradient_workspace_bytes(rows, float, false),
            })
        });
        need.map_err(|failure| failure.raise(py))
    }

    /// y of x, or with `gradient` dx of dy, which are x and y then.
    ///
    /// Addresses of contiguous elements of `dtype` on its device, all of them kept until the product is
    /// computed; `bias` may be 0. The workspace is one of its model and device.
    #[pyo3(signature = (gradient, dtype, rows, x, bias, y, threads, stream, workspace))]
    #[expect(clippy::too_many_arguments, reason = "called by tightfit.ops alone")]
    fn _multiply(
        &self,
        py: Python<'_>,
        gradient: bool,
        dtype: &str,
        rows: usize,
        x: u64,
        bias: u64,
        y: u64,
        threads: usize,
        stream: u64,
        workspace: Option<&Workspace>,
    ) -> PyResult<()> {
        let (workspace, workspace_bytes) =
            workspace.map_or((0, 0), |space| (space.address(), space.bytes()));
        let done = float(dtype).and_then(|float| {
            let (of_x, of_y) = match gradient {
                false => (self.inputs, self.outputs),
                true => (self.outputs, self.inputs),
            };
            let x_bytes = bytes("x", &[rows, of_x, float.bytes()])?;
            let y_bytes = bytes("y", &[rows, of_y, float.bytes()])?;
            if self.is_on_gpu {
                let linear = self.get().map_err(|error| failure(&error))?;
                let mut operands = DeviceOperands::new(x, y, stream as *mut _);
                operands.bias = bias;
                operands.workspace = workspace;
                operands.workspace_bytes = workspace_bytes;
                // SAFETY: the caller's addresses are of tensors on this device, which torch's allocator
                // keeps for the stream; the workspace is the model's.
                let given = unsafe {
                    match gradient {
                        false => linear.forward_on_device(float, rows, &operands, false),
                        true => linear.input_gradient_on_device(float, rows, &operands, false),
                    }
                };
                return given.map_err(|error| failure(&error));
            }
            py.detach(|| {
                let linear = self.get().map_err(|error| failure(&error))?;
                // SAFETY: the caller's addresses are of tensors of these lengths, which it holds meanwhile,
                // and y is new: nobody else has it.
                let (x, y) = unsafe { (slice::<u8>(x, x_bytes), slice_mut(y, y_bytes)) };
                let options = options(threads);
                let done = if gradient {
                    linear.input_gradient_bytes(float, rows, x, y, &options)
                } else {
                    let len = bytes("the bias", &[self.outputs, float.bytes()])?;
                    // SAFETY: as above.
                    let bias = (bias != 0).then(|| unsafe { slice::<u8>(bias, len) });
                    let operands = HostOperands { x, bias, y };
                    linear.forward_bytes(float, rows, operands, &options)
                };
                done.map_err(|error| failure(&error))
            })
        });
        done.map_err(|failure| failure.raise(py))
    }

    fn __repr__(&self) -> String {
        format!(
            "Linear({:?}, {} x {} on {})",
            self.name, self.outputs, self.inputs, self.device
        )
    }
}

/// Names of the tensors of a stack: one of it, or one for each expert.
fn tensors(names: Vec<String>) -> ExpertsTensors {
    match <[String; 1]>::try_from(names) {
        Ok([stack]) => ExpertsTensors::Stack(stack),
        Err(names) => ExpertsTensors::Each(names),
    }
}

impl Experts {
    pub(crate) fn find(
        model: Arc<tightfit::Model>,
        gates: Vec<Vec<String>>,
        down: Vec<String>,
        interleaved: bool,
        activation: &str,
        limit: Option<f32>,
        device_name: impl Fn(usize) -> String,
    ) -> Result<Experts, Failure> {
        let activation = match (activation, limit) {
            ("silu", _) => Activation::Silu,
            ("gelu", _) => Activation::Gelu,
            ("gelu_tanh", _) => Activation::GeluTanh,
            ("clamped", Some(limit)) if limit >= 0.0 => Activation::Clamped { limit },
            _ => {
                return Err(Failure::usage(
                    "activation is 'silu', 'gelu', 'gelu_tanh', or 'clamped' with a limit that is not negative",
                ));
            }
        };
        let layout = match interleaved {
            true => GateLayout::Interleaved,
            false => GateLayout::Halves,
        };
        let mut gates = gates.into_iter().map(tensors);
        let gates = match (gates.next(), gates.next(), gates.next()) {
            (Some(both), None, _) => GateTensors::Together(both, layout),
            (Some(gate), Some(up), None) => GateTensors::Apart { gate, up },
            _ => return Err(Failure::usage("gates are one list of tensors, or two")),
        };
        let names = ExpertsNames {
            gates,
            down: tensors(down),
        };
        let made = {
            let layer = model.experts_of(&names, activation);
            let layer = layer.map_err(|error| failure(&error))?;
            (
                [layer.experts(), layer.hidden(), layer.intermediate()],
                device_name(layer.device()),
                layer.is_on_gpu(),
            )
        };
        let ([experts, hidden, intermediate], device, is_on_gpu) = made;
        Ok(Experts {
            model,
            names,
            activation,
            experts,
            hidden,
            intermediate,
            device,
            is_on_gpu,
        })
    }

    fn get(&self) -> Result<products::Experts<'_>, LinearError> {
        self.model.experts_of(&self.names, self.activation)
    }
}

#[pymethods]
impl Experts {
    /// Bytes of workspace that `tokens` tokens of as many choices each need on a GPU.
    fn workspace_bytes(
        &self,
        py: Python<'_>,
        tokens: usize,
        choices: usize,
        dtype: &str,
    ) -> PyResult<u64> {
        let need = float(dtype).and_then(|float| {
            let layer = self.get().map_err(|error| failure(&error))?;
            Ok(layer.workspace_bytes(tokens, choices, float))
        });
        need.map_err(|failure| failure.raise(py))
    }

    /// y [tokens, hidden] of x [tokens, hidden], ids [tokens, choices] int32 and weights [tokens, choices]
    /// float32. As `Linear._multiply`; biases may be 0.
    #[pyo3(signature = (dtype, tokens, choices, x, ids, weights, bias, down_bias, y, threads, stream, workspace))]
    #[expect(clippy::too_many_arguments, reason = "called by tightfit.ops alone")]
    fn _multiply(
        &self,
        py: Python<'_>,
        dtype: &str,
        tokens: usize,
        choices: usize,
        x: u64,
        ids: u64,
        weights: u64,
        bias: u64,
        down_bias: u64,
        y: u64,
        threads: usize,
        stream: u64,
        workspace: Option<&Workspace>,
    ) -> PyResult<()> {
        let (workspace, workspace_bytes) =
            workspace.map_or((0, 0), |space| (space.address(), space.bytes()));
        let done = float(dtype).and_then(|float| {
            let row = bytes("x", &[tokens, self.hidden, float.bytes()])?;
            let chosen = bytes("the ids", &[tokens, choices])?;
            let of_gates = [self.experts, 2, self.intermediate, float.bytes()];
            let of_gates = bytes("the bias", &of_gates)?;
            let of_down = bytes("the bias", &[self.experts, self.hidden, float.bytes()])?;
            if self.is_on_gpu {
                let layer = self.get().map_err(|error| failure(&error))?;
                let mut operands = DeviceExpertsOperands::new(x, ids, weights, y, stream as *mut _);
                operands.bias = bias;
                operands.down_bias = down_bias;
                operands.workspace = workspace;
                operands.workspace_bytes = workspace_bytes;
                // SAFETY: the caller's addresses are of tensors on this device, which torch's allocator
                // keeps for the stream; the workspace is the model's.
                let given = unsafe { layer.forward_on_device(float, tokens, choices, &operands) };
                return given.map_err(|error| failure(&error));
            }
            py.detach(|| {
                let layer = self.get().map_err(|error| failure(&error))?;
                // SAFETY: the caller's addresses are of tensors of these lengths and types, which it holds
                // meanwhile, and y is new: nobody else has it.
                let operands = unsafe {
                    HostExpertsOperands {
                        x: slice(x, row),
                        choices: Choices {
                            of_token: choices,
                            ids: slice(ids, chosen),
                            weights: slice(weights, chosen),
                        },
                        bias: (bias != 0).then(|| slice(bias, of_gates)),
                        down_bias: (down_bias != 0).then(|| slice(down_bias, of_down)),
                        y: slice_mut(y, row),
                    }
                };
                layer
                    .forward_bytes(float, operands, &options(threads))
                    .map_err(|error| failure(&error))
            })
        });
        done.map_err(|failure| failure.raise(py))
    }

    fn __repr__(&self) -> String {
        format!(
            "Experts({} of {} and {} on {})",
            self.experts, self.hidden, self.intermediate, self.device
        )
    }
}

/// Takes a workspace of a model's device, by its index in the plan.
pub(crate) fn workspace(
    model: &tightfit::Model,
    device: usize,
    rows: usize,
    experts_per_token: usize,
    gradients: bool,
) -> Result<Workspace, Failure> {
    let options = WorkspaceOptions::rows(rows)
        .with_experts_per_token(experts_per_token)
        .with_gradients(gradients);
    let inner = model.product_workspace(device, &options);
    let inner = inner.map_err(|error| failure(&error))?;
    Ok(Workspace { inner })
}
