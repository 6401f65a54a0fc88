//! Layers of experts of a loaded model, and products where each row has an expert of its own.

use std::ffi::{c_char, c_void};

use tightfit::device::{DeviceExpertsOperands, HostExpertsOperands};
use tightfit::products::{Experts, ExpertsLinear, ExpertsNames, ExpertsTensors, GateTensors};
use tightfit_kernels::{Activation, Choices, FloatType, GateLayout};

use crate::TightfitStatus;
use crate::boundary::{
    Error, Growing, array, array_mut, call, give, object, read_sized, take, text, write_sized,
};
use crate::linear::{TightfitLinearOptions, float_type, options};
use crate::model::TightfitModel;

/// gate * sigmoid(gate) * up.
pub const TIGHTFIT_ACTIVATION_SILU: u32 = 0;
/// gate * (1 + erf(gate / sqrt(2))) / 2 * up.
pub const TIGHTFIT_ACTIVATION_GELU: u32 = 1;
/// The same with tanh: gate * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 * gate^3))) / 2 * up.
pub const TIGHTFIT_ACTIVATION_GELU_TANH: u32 = 2;
/// That of gpt-oss: gate * sigmoid(1.702 * gate) * (up + 1), with the gate at most `limit` and the other
/// within -limit and limit.
pub const TIGHTFIT_ACTIVATION_CLAMPED: u32 = 3;

fn activation(activation: u32, limit: f32) -> Result<Activation, Error> {
    match activation {
        TIGHTFIT_ACTIVATION_SILU => Ok(Activation::Silu),
        TIGHTFIT_ACTIVATION_GELU => Ok(Activation::Gelu),
        TIGHTFIT_ACTIVATION_GELU_TANH => Ok(Activation::GeluTanh),
        TIGHTFIT_ACTIVATION_CLAMPED if limit >= 0.0 => Ok(Activation::Clamped { limit }),
        TIGHTFIT_ACTIVATION_CLAMPED => Err(Error::usage(format_args!(
            "limit is {limit}, need one that is not negative"
        ))),
        other => Err(Error::usage(format_args!(
            "activation is {other}, not one of TIGHTFIT_ACTIVATION_..."
        ))),
    }
}

/// A layer of experts in 4 bits: of each token, the sum over its experts of
/// weight * (down * activation(gate, up) + bias of down), where gate and up are
/// gate_up * x + their bias. x and y are [tokens, hidden], row-major and of one type, as are the biases. Can
/// be used from several threads at once. Nothing of the weights is copied: it is freed before the model is
/// unloaded.
pub struct TightfitExperts {
    /// It borrows from the model, which the caller keeps.
    inner: Experts<'static>,
}

/// Products with a stack in 4 bits where each row has one of its matrices, an expert:
/// row r of y is that of x times transpose(W) and the bias of expert `ids[r]`, where x is [rows, inputs],
/// y [rows, outputs] and the bias [experts, outputs]. As TightfitExperts.
pub struct TightfitExpertsLinear {
    /// It borrows from the model, which the caller keeps.
    inner: ExpertsLinear<'static>,
}

/// The tensors of a layer of experts. Growing as TightfitTensor.
#[repr(C)]
pub struct TightfitExpertsTensors {
    /// Set by the caller: sizeof(TightfitExpertsTensors).
    pub struct_size: usize,
    /// How many names each of the arrays has: one for each expert; 0 where they are stacks, of which each
    /// array has one name.
    pub experts: usize,
    /// Gates, each [intermediate, hidden]; or gates and the other projections, [2 * intermediate, hidden].
    pub gate: *const *const c_char,
    /// The other projections ("up"), each [intermediate, hidden]; NULL where `gate` has both.
    pub up: *const *const c_char,
    /// Down projections, each [hidden, intermediate].
    pub down: *const *const c_char,
    /// Where `gate` has both: 0 for all gates before all others, nonzero for each before its own other one.
    pub interleaved: u32,
}

// SAFETY: `repr(C)`, begins with a `usize`, and holds numbers and pointers.
unsafe impl Growing for TightfitExpertsTensors {
    const FIRST: usize = size_of::<TightfitExpertsTensors>();
}

/// What a layer of experts is. Growing as TightfitTensor.
#[repr(C)]
pub struct TightfitExpertsInfo {
    /// Set by the caller: sizeof(TightfitExpertsInfo).
    pub struct_size: usize,
    /// How many there are.
    pub experts: usize,
    /// Elements of a row of x and of y; of TightfitExpertsLinear its inputs.
    pub hidden: usize,
    /// Results of an expert's gates; of TightfitExpertsLinear its outputs.
    pub intermediate: usize,
    /// Index of the device of the down projections.
    pub device: usize,
    /// Nonzero if the weights are in a GPU's memory: the functions that end with on_device are for that.
    pub on_gpu: u32,
}

// SAFETY: `repr(C)`, begins with a `usize`, and holds numbers.
unsafe impl Growing for TightfitExpertsInfo {
    const FIRST: usize = size_of::<TightfitExpertsInfo>();
}

/// Operands of experts in host memory. Lengths of x, biases and y are in bytes, and checked. Growing as
/// TightfitTensor.
#[repr(C)]
pub struct TightfitHostExpertsOperands {
    /// Set by the caller: sizeof(TightfitHostExpertsOperands).
    pub struct_size: usize,
    /// [tokens, hidden], at any address.
    pub x: *const c_void,
    /// tokens * hidden * sizeof an element.
    pub x_length: usize,
    /// Numbers of experts [tokens, choices]. What is no number of an expert, such as -1, is skipped.
    pub ids: *const i32,
    /// What their results are multiplied with [tokens, choices]; NULL for TightfitExpertsLinear.
    pub weights: *const f32,
    /// Experts of each token; 1 for TightfitExpertsLinear.
    pub choices: usize,
    /// [experts, 2 * intermediate], in the layout of the gates, all gates before all others where they are
    /// tensors of their own; of TightfitExpertsLinear [experts, outputs]. NULL for none.
    pub bias: *const c_void,
    /// Its elements * sizeof an element; 0 for none.
    pub bias_length: usize,
    /// [experts, hidden]; NULL for none, and for TightfitExpertsLinear.
    pub down_bias: *const c_void,
    /// Its elements * sizeof an element; 0 for none.
    pub down_bias_length: usize,
    /// [tokens, hidden], or of TightfitExpertsLinear [tokens, outputs]: written. Rows that are skipped
    /// become zeros.
    pub y: *mut c_void,
    /// Its elements * sizeof an element.
    pub y_length: usize,
}

// SAFETY: `repr(C)`, begins with a `usize`, and holds numbers and pointers.
unsafe impl Growing for TightfitHostExpertsOperands {
    const FIRST: usize = size_of::<TightfitHostExpertsOperands>();
}

/// Operands of experts in a GPU's memory: addresses that are valid in the device's primary context. Growing
/// as TightfitTensor.
#[repr(C)]
pub struct TightfitDeviceExpertsOperands {
    /// Set by the caller: sizeof(TightfitDeviceExpertsOperands).
    pub struct_size: usize,
    /// [tokens, hidden].
    pub x: u64,
    /// Numbers of experts [tokens, choices], int32_t. What is no number of an expert, such as -1, is skipped.
    pub ids: u64,
    /// What their results are multiplied with [tokens, choices], float; 0 for TightfitExpertsLinear.
    pub weights: u64,
    /// [experts, 2 * intermediate], in the layout of the gates; of TightfitExpertsLinear [experts, outputs].
    /// 0 for none.
    pub bias: u64,
    /// [experts, hidden]; 0 for none, and for TightfitExpertsLinear.
    pub down_bias: u64,
    /// [tokens, hidden], or of TightfitExpertsLinear [tokens, outputs]: written. Of TightfitExpertsLinear,
    /// rows that are skipped stay as they are.
    pub y: u64,
    /// Memory to work in, at a multiple of 256, as of TightfitDeviceOperands; 0 where none is needed.
    pub workspace: u64,
    /// Length of the workspace in bytes.
    pub workspace_length: u64,
    /// The CUstream or cudaStream_t that the kernels are given to; NULL for the default stream.
    pub stream: *mut c_void,
}

// SAFETY: `repr(C)`, begins with a `usize`, and holds numbers and a pointer.
unsafe impl Growing for TightfitDeviceExpertsOperands {
    const FIRST: usize = size_of::<TightfitDeviceExpertsOperands>();
}

impl From<TightfitDeviceExpertsOperands> for DeviceExpertsOperands {
    fn from(given: TightfitDeviceExpertsOperands) -> DeviceExpertsOperands {
        let TightfitDeviceExpertsOperands {
            x,
            ids,
            weights,
            y,
            stream,
            ..
        } = given;
        DeviceExpertsOperands::new(x, ids, weights, y, stream)
            .with_biases(given.bias, given.down_bias)
            .with_workspace(given.workspace, given.workspace_length)
    }
}

/// Looks up a layer of experts in 4 bits by the name of its module, such as "model.layers.3.mlp.experts":
/// stacks gate_up_proj and down_proj, or for each expert N.gate_proj, N.up_proj and N.down_proj, or N.w1,
/// N.w3 and N.w2, with or without ".weight". `activation` is one of TIGHTFIT_ACTIVATION_..., and `limit` that
/// of TIGHTFIT_ACTIVATION_CLAMPED, with which each gate lies before its own other projection. On success
/// `*out` is for tightfit_experts_free, before the model is unloaded; otherwise it is NULL.
/// TIGHTFIT_STATUS_USAGE for what is not loaded or not in 4 bits, for lengths that do not belong together, and
/// for experts on a GPU that do not lie as stacks: plans lay experts with a tensor each out so where they are on
/// one device and in one format, and of a multiple of 4096 elements, or 16384 if they are double-quantized.
///
/// Where the weights are on a GPU, that is made ready once, as by tightfit_model_linear.
///
/// # Safety
/// `model` is loaded; `module` is NUL-terminated; `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_model_experts(
    model: *const TightfitModel,
    module: *const c_char,
    activation: u32,
    limit: f32,
    out: *mut *mut TightfitExperts,
) -> TightfitStatus {
    call(|| {
        let find = || {
            // SAFETY: as the caller promises, who frees the layer before the model is unloaded.
            let model: &'static TightfitModel = unsafe { object(model, "model") }?;
            // SAFETY: as the caller promises.
            let module = unsafe { text(module, "module") }?;
            let activation = self::activation(activation, limit)?;
            let inner = model.model().experts(module, activation)?;
            Ok(TightfitExperts { inner })
        };
        // SAFETY: as the caller promises.
        unsafe { give(out, "out", find) }
    })
}

/// Looks up a layer of experts by the names of its tensors. As tightfit_model_experts.
///
/// # Safety
/// `model` is loaded; `tensors` has its `struct_size` set, and arrays of as many NUL-terminated names as it
/// says; `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_model_experts_of(
    model: *const TightfitModel,
    tensors: *const TightfitExpertsTensors,
    activation: u32,
    limit: f32,
    out: *mut *mut TightfitExperts,
) -> TightfitStatus {
    call(|| {
        let find = || {
            // SAFETY: as the caller promises, who frees the layer before the model is unloaded.
            let model: &'static TightfitModel = unsafe { object(model, "model") }?;
            // SAFETY: as the caller promises.
            let given = unsafe { read_sized(tensors, "tensors") }?;
            // SAFETY: as the caller promises.
            let gate = unsafe { names(given.gate, given.experts, "tensors->gate") }?;
            // SAFETY: as the caller promises.
            let down = unsafe { names(given.down, given.experts, "tensors->down") }?;
            let gates = match given.up.is_null() {
                true => GateTensors::Together(
                    gate,
                    match given.interleaved {
                        0 => GateLayout::Halves,
                        _ => GateLayout::Interleaved,
                    },
                ),
                false => GateTensors::Apart {
                    gate,
                    // SAFETY: as the caller promises.
                    up: unsafe { names(given.up, given.experts, "tensors->up") }?,
                },
            };
            let activation = self::activation(activation, limit)?;
            let names = ExpertsNames { gates, down };
            let inner = model.model().experts_of(&names, activation)?;
            Ok(TightfitExperts { inner })
        };
        // SAFETY: as the caller promises.
        unsafe { give(out, "out", find) }
    })
}

/// The names of one tensor for each expert, or for none that of a stack.
///
/// # Safety
/// `pointer` is NULL or points to as many texts that end with a zero byte.
unsafe fn names(
    pointer: *const *const c_char,
    experts: usize,
    what: &str,
) -> Result<ExpertsTensors, Error> {
    // SAFETY: as the caller promises.
    let given = unsafe { array(pointer, experts.max(1), what) }?;
    let names = given.iter().map(|name| {
        // SAFETY: as the caller promises.
        unsafe { text(*name, what) }.map(str::to_owned)
    });
    let mut names = names.collect::<Result<Vec<String>, Error>>()?;
    Ok(match experts {
        0 => ExpertsTensors::Stack(names.remove(0)),
        _ => ExpertsTensors::Each(names),
    })
}

/// Frees a layer of experts and sets `*experts` to NULL. NULL, or a pointer to NULL, does nothing.
///
/// # Safety
/// `*experts` came from this library, and no other call uses it now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_experts_free(experts: *mut *mut TightfitExperts) {
    // SAFETY: as the caller promises.
    unsafe { take(experts) }
}

/// What a layer of experts is.
///
/// # Safety
/// `experts` is alive and its model loaded; `out` points to a structure whose `struct_size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_experts_info(
    experts: *const TightfitExperts,
    out: *mut TightfitExpertsInfo,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let experts = &unsafe { object(experts, "experts") }?.inner;
        let make = |struct_size| {
            Ok(TightfitExpertsInfo {
                struct_size,
                experts: experts.experts(),
                hidden: experts.hidden(),
                intermediate: experts.intermediate(),
                device: experts.device(),
                on_gpu: experts.is_on_gpu().into(),
            })
        };
        // SAFETY: as the caller promises.
        unsafe { write_sized(out, "out", make) }
    })
}

/// Computes a layer of operands of a type (TIGHTFIT_FLOAT_...) in host memory. For weights on a GPU they are
/// copied there and back, through memory that is taken for the call. `options` may be NULL; by row it is in
/// any case. TIGHTFIT_STATUS_USAGE if the lengths do not belong together: then nothing is written.
///
/// # Safety
/// `experts` is alive and its model loaded; `operands` has its `struct_size` set, and pointers to as many
/// elements and bytes as it says, of which nobody uses y meanwhile; `options` is NULL or has its
/// `struct_size` set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_experts_forward(
    experts: *const TightfitExperts,
    float_type: u32,
    tokens: usize,
    operands: *const TightfitHostExpertsOperands,
    options: *const TightfitLinearOptions,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let experts = &unsafe { object(experts, "experts") }?.inner;
        let float = self::float_type(float_type)?;
        // SAFETY: as the caller promises.
        let given = unsafe { read_sized(operands, "operands") }?;
        // SAFETY: as the caller promises.
        let options = unsafe { self::options(options) }?;
        // SAFETY: as the caller promises.
        let choices = unsafe { self::choices(&given, tokens, true) }?;
        check_tokens(tokens, experts.hidden(), float, given.x_length)?;
        let bias = (!given.bias.is_null()).then_some(given.bias_length);
        let down_bias = (!given.down_bias.is_null()).then_some(given.down_bias_length);
        let (x_length, y_length) = (given.x_length, given.y_length);
        // Before anything is written to y, also zeros.
        experts.check_lengths(float, &choices, x_length, [bias, down_bias], y_length)?;
        // SAFETY: as the caller promises.
        let operands = unsafe { host_operands(&given, choices) }?;
        Ok(experts.forward_bytes(float, operands, &options)?)
    })
}

/// The number of tokens that a caller says is that of x.
fn check_tokens(tokens: usize, columns: usize, float: FloatType, x: usize) -> Result<(), Error> {
    let need = tokens.checked_mul(columns);
    let need = need.and_then(|need| need.checked_mul(float.bytes()));
    match need == Some(x) {
        true => Ok(()),
        false => Err(Error::usage(format_args!(
            "operands->x_length is {x}, need {} for {tokens} tokens of {columns} elements",
            need.unwrap_or(usize::MAX)
        ))),
    }
}

/// # Safety
/// Ids and weights are NULL or as many as `tokens` and the operands say, and not written to during `'a`.
unsafe fn choices<'a>(
    given: &TightfitHostExpertsOperands,
    tokens: usize,
    weighted: bool,
) -> Result<Choices<'a>, Error> {
    let pairs = tokens.checked_mul(given.choices);
    let pairs = pairs.ok_or_else(|| Error::usage("there are more choices than memory"))?;
    let weights = if weighted { pairs } else { 0 };
    Ok(Choices {
        of_token: given.choices,
        // SAFETY: as the caller promises.
        ids: unsafe { array(given.ids, pairs, "operands->ids") }?,
        // SAFETY: as the caller promises.
        weights: unsafe { array(given.weights, weights, "operands->weights") }?,
    })
}

/// # Safety
/// Pointers are NULL or to as many bytes as their lengths say; nobody uses y during `'a`.
unsafe fn host_operands<'a>(
    given: &TightfitHostExpertsOperands,
    choices: Choices<'a>,
) -> Result<HostExpertsOperands<'a>, Error> {
    let bytes = |pointer: *const c_void, length, what| {
        // SAFETY: as the caller promises.
        unsafe { array(pointer.cast::<u8>(), length, what) }
    };
    let optional = |pointer: *const c_void, length, what| {
        let there = (!pointer.is_null()).then_some(pointer);
        there
            .map(|pointer| bytes(pointer, length, what))
            .transpose()
    };
    Ok(HostExpertsOperands {
        x: bytes(given.x, given.x_length, "operands->x")?,
        choices,
        bias: optional(given.bias, given.bias_length, "operands->bias")?,
        down_bias: optional(
            given.down_bias,
            given.down_bias_length,
            "operands->down_bias",
        )?,
        // SAFETY: as the caller promises.
        y: unsafe { array_mut(given.y.cast::<u8>(), given.y_length, "operands->y") }?,
    })
}

/// Gives how many bytes of workspace tightfit_experts_forward_on_device needs for this many tokens of as many
/// choices each, and for any fewer; 0 for weights in host memory.
///
/// # Safety
/// `experts` is alive and its model loaded; `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_experts_workspace_bytes(
    experts: *const TightfitExperts,
    float_type: u32,
    tokens: usize,
    choices: usize,
    out: *mut u64,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let experts = &unsafe { object(experts, "experts") }?.inner;
        let float = self::float_type(float_type)?;
        // SAFETY: as the caller promises.
        let out = unsafe { array_mut(out, 1, "out") }?;
        out[0] = experts.workspace_bytes(tokens, choices, float);
        Ok(())
    })
}

/// Gives a layer of operands of a type (TIGHTFIT_FLOAT_...) in a GPU's memory to a stream, and returns before
/// it is computed. Nothing is allocated and nothing waited for: the stream may be one that is being captured
/// into a graph, which can be replayed with other ids in the same memory. TIGHTFIT_STATUS_USAGE as for
/// tightfit_linear_forward_on_device: then nothing is launched.
///
/// # Safety
/// `experts` is alive. `operands` has its `struct_size` set, and addresses in the memory of the weights' GPU
/// of as many elements as TightfitExperts says and as many bytes as the workspace's length; nothing overlaps
/// y or the workspace, whose first 16 KiB are zero, and no other stream uses that meanwhile. The stream is
/// of the device's primary context. The model and the operands are kept until it is done, and until graphs
/// that have captured it are gone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_experts_forward_on_device(
    experts: *const TightfitExperts,
    float_type: u32,
    tokens: usize,
    choices: usize,
    operands: *const TightfitDeviceExpertsOperands,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let experts = &unsafe { object(experts, "experts") }?.inner;
        let float = self::float_type(float_type)?;
        // SAFETY: as the caller promises.
        let operands = unsafe { read_sized(operands, "operands") }?.into();
        // SAFETY: as the caller promises.
        unsafe { experts.forward_on_device(float, tokens, choices, &operands) }?;
        Ok(())
    })
}

/// Looks up the products with a stack [experts, outputs, inputs] in 4 bits by its name, where each row has
/// its own expert; or with `experts` matrices that are tensors of their own, by as many names. 0 experts: one
/// name, of a stack. On success `*out` is for tightfit_experts_linear_free; otherwise as
/// tightfit_model_experts.
///
/// # Safety
/// `model` is loaded; `names` are as many NUL-terminated texts, and at least one; `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_model_experts_linear(
    model: *const TightfitModel,
    names: *const *const c_char,
    experts: usize,
    out: *mut *mut TightfitExpertsLinear,
) -> TightfitStatus {
    call(|| {
        let find = || {
            // SAFETY: as the caller promises, who frees the product before the model is unloaded.
            let model: &'static TightfitModel = unsafe { object(model, "model") }?;
            // SAFETY: as the caller promises.
            let tensors = unsafe { self::names(names, experts, "names") }?;
            let inner = model.model().experts_linear(&tensors)?;
            Ok(TightfitExpertsLinear { inner })
        };
        // SAFETY: as the caller promises.
        unsafe { give(out, "out", find) }
    })
}

/// Frees products and sets `*linear` to NULL. NULL, or a pointer to NULL, does nothing.
///
/// # Safety
/// `*linear` came from this library, and no other call uses it now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_experts_linear_free(linear: *mut *mut TightfitExpertsLinear) {
    // SAFETY: as the caller promises.
    unsafe { take(linear) }
}

/// What products are of: `hidden` are their inputs, `intermediate` their outputs.
///
/// # Safety
/// `linear` is alive and its model loaded; `out` points to a structure whose `struct_size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_experts_linear_info(
    linear: *const TightfitExpertsLinear,
    out: *mut TightfitExpertsInfo,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let linear = &unsafe { object(linear, "linear") }?.inner;
        let make = |struct_size| {
            Ok(TightfitExpertsInfo {
                struct_size,
                experts: linear.experts(),
                hidden: linear.inputs(),
                intermediate: linear.outputs(),
                device: linear.device(),
                on_gpu: linear.is_on_gpu().into(),
            })
        };
        // SAFETY: as the caller promises.
        unsafe { write_sized(out, "out", make) }
    })
}

/// Computes products of operands of a type (TIGHTFIT_FLOAT_...) in host memory, as tightfit_experts_forward.
///
/// # Safety
/// As tightfit_experts_forward.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_experts_linear_forward(
    linear: *const TightfitExpertsLinear,
    float_type: u32,
    rows: usize,
    operands: *const TightfitHostExpertsOperands,
    options: *const TightfitLinearOptions,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let linear = &unsafe { object(linear, "linear") }?.inner;
        let float = self::float_type(float_type)?;
        // SAFETY: as the caller promises.
        let given = unsafe { read_sized(operands, "operands") }?;
        // SAFETY: as the caller promises.
        let options = unsafe { self::options(options) }?;
        if given.choices != 1 {
            return Err(Error::usage(format_args!(
                "operands->choices is {}, need 1",
                given.choices
            )));
        }
        // SAFETY: as the caller promises.
        let choices = unsafe { self::choices(&given, rows, false) }?;
        let bias = (!given.bias.is_null()).then_some(given.bias_length);
        // Before anything is written to y, also zeros.
        linear.check_lengths(float, rows, given.x_length, bias, given.y_length)?;
        // SAFETY: as the caller promises.
        let operands = unsafe { host_operands(&given, choices) }?;
        let HostExpertsOperands { x, bias, y, .. } = operands;
        Ok(linear.forward_bytes(float, x, choices.ids, bias, y, &options)?)
    })
}

/// Gives how many bytes of workspace tightfit_experts_linear_forward_on_device needs for this many rows, and
/// for any fewer; 0 for weights in host memory.
///
/// # Safety
/// `linear` is alive and its model loaded; `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_experts_linear_workspace_bytes(
    linear: *const TightfitExpertsLinear,
    float_type: u32,
    rows: usize,
    out: *mut u64,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let linear = &unsafe { object(linear, "linear") }?.inner;
        let float = self::float_type(float_type)?;
        // SAFETY: as the caller promises.
        let out = unsafe { array_mut(out, 1, "out") }?;
        out[0] = linear.workspace_bytes(rows, float);
        Ok(())
    })
}

/// Gives products to a stream, as tightfit_experts_forward_on_device. There is an id for each row.
///
/// # Safety
/// As tightfit_experts_forward_on_device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_experts_linear_forward_on_device(
    linear: *const TightfitExpertsLinear,
    float_type: u32,
    rows: usize,
    operands: *const TightfitDeviceExpertsOperands,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let linear = &unsafe { object(linear, "linear") }?.inner;
        let float = self::float_type(float_type)?;
        // SAFETY: as the caller promises.
        let operands = unsafe { read_sized(operands, "operands") }?.into();
        // SAFETY: as the caller promises.
        unsafe { linear.forward_on_device(float, rows, &operands) }?;
        Ok(())
    })
}
