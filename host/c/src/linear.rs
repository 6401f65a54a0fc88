//! Computing with a loaded model: products with its 4-bit weights.

use std::ffi::{CStr, c_char, c_void};

use tightfit::device::{DeviceOperands, HostOperands};
use tightfit::products::{Linear, LinearOptions, LinearWorkspace, WorkspaceOptions};
use tightfit::types::QuantType;
use tightfit_kernels::FloatType;

use crate::TightfitStatus;
use crate::boundary::{
    Error, Growing, array, array_mut, call, give, object, read_sized, take, text, write_sized,
};
use crate::model::TightfitModel;
use crate::share::TightfitMemory;

/// float.
pub const TIGHTFIT_FLOAT_F32: u32 = 0;
/// IEEE binary16.
pub const TIGHTFIT_FLOAT_F16: u32 = 1;
/// bfloat16.
pub const TIGHTFIT_FLOAT_BF16: u32 = 2;

pub(crate) fn float_type(float_type: u32) -> Result<FloatType, Error> {
    match float_type {
        TIGHTFIT_FLOAT_F32 => Ok(FloatType::F32),
        TIGHTFIT_FLOAT_F16 => Ok(FloatType::F16),
        TIGHTFIT_FLOAT_BF16 => Ok(FloatType::Bf16),
        other => Err(Error::usage(format_args!(
            "float_type is {other}, not one of TIGHTFIT_FLOAT_..."
        ))),
    }
}

/// The product with one 4-bit weight W of a model: y = x * transpose(W) + bias, where x is
/// [rows, inputs], y [rows, outputs] and the bias `[outputs]`, all row-major and of one type. Can be
/// used from several threads at once. Nothing of the weight is copied: it is freed before the model is
/// unloaded.
pub struct TightfitLinear {
    /// It borrows from the model, which the caller keeps.
    inner: Linear<'static>,
}

/// What a product is of. Growing as TightfitTensor.
#[repr(C)]
pub struct TightfitLinearInfo {
    /// Set by the caller: sizeof(TightfitLinearInfo).
    pub struct_size: usize,
    /// Elements of a row of y: rows of W.
    pub outputs: usize,
    /// Elements of a row of x: columns of W.
    pub inputs: usize,
    /// Index of its device.
    pub device: usize,
    /// Nonzero if W is in a GPU's memory: tightfit_linear_forward_on_device is for that.
    pub on_gpu: u32,
    /// Elements that share a scale.
    pub block_size: u32,
    /// "nf4" or "fp4". Static.
    pub quant_type: *const c_char,
    /// Nonzero if its scales are stored in 8 bits.
    pub double_quantized: u32,
}

// SAFETY: `repr(C)`, begins with a `usize`, and holds numbers and a pointer.
unsafe impl Growing for TightfitLinearInfo {
    const FIRST: usize = size_of::<TightfitLinearInfo>();
}

/// Operands in host memory, at any address. Lengths are in bytes, and checked. Growing as
/// TightfitTensor.
#[repr(C)]
pub struct TightfitHostOperands {
    /// Set by the caller: sizeof(TightfitHostOperands).
    pub struct_size: usize,
    /// [rows, inputs].
    pub x: *const c_void,
    /// rows * inputs * sizeof an element.
    pub x_length: usize,
    /// `[outputs]`, or NULL for none.
    pub bias: *const c_void,
    /// outputs * sizeof an element; 0 for none.
    pub bias_length: usize,
    /// [rows, outputs]: written.
    pub y: *mut c_void,
    /// rows * outputs * sizeof an element.
    pub y_length: usize,
}

// SAFETY: `repr(C)`, begins with a `usize`, and holds numbers and pointers.
unsafe impl Growing for TightfitHostOperands {
    const FIRST: usize = size_of::<TightfitHostOperands>();
}

/// Operands in a GPU's memory: addresses that are valid in the device's primary context. Growing as
/// TightfitTensor.
#[repr(C)]
pub struct TightfitDeviceOperands {
    /// Set by the caller: sizeof(TightfitDeviceOperands).
    pub struct_size: usize,
    /// [rows, inputs].
    pub x: u64,
    /// `[outputs]`; 0 for none.
    pub bias: u64,
    /// [rows, outputs]: written.
    pub y: u64,
    /// Memory to work in, at a multiple of 256; 0 where none is needed. Its first 16 KiB are zero before
    /// the first product that uses it, and again after each.
    pub workspace: u64,
    /// Length of the workspace in bytes.
    pub workspace_length: u64,
    /// The CUstream or cudaStream_t that the kernels are given to; NULL for the default stream.
    pub stream: *mut c_void,
}

// SAFETY: `repr(C)`, begins with a `usize`, and holds numbers and a pointer.
unsafe impl Growing for TightfitDeviceOperands {
    const FIRST: usize = size_of::<TightfitDeviceOperands>();
}

/// How a product is computed. Zero everywhere but in `struct_size` means the defaults. Growing as
/// TightfitTensor.
#[repr(C)]
pub struct TightfitLinearOptions {
    /// Set by the caller: sizeof(TightfitLinearOptions).
    pub struct_size: usize,
    /// Threads at most, for a weight in host memory; 0: as many as the machine has cores.
    pub threads: usize,
    /// Nonzero: on a GPU too a row's bits do not depend on the rows beside it.
    pub by_row: u32,
}

// SAFETY: `repr(C)`, begins with a `usize`, and holds numbers.
unsafe impl Growing for TightfitLinearOptions {
    const FIRST: usize = size_of::<TightfitLinearOptions>();
}

/// Memory of a device for products to work in.
pub struct TightfitLinearWorkspace {
    inner: LinearWorkspace,
}

/// Looks up the product with a matrix in 4 bits, by its name or the name that it is tied to. On success
/// `*out` is for tightfit_linear_free, before the model is unloaded; otherwise it is NULL.
/// TIGHTFIT_STATUS_USAGE for what is not loaded, not in 4 bits, or no matrix.
///
/// Where the weight is on a GPU, that is made ready for products once: its kernels are loaded, and a few
/// KiB taken for double-quantized weights. It is to be called before a graph is captured.
///
/// # Safety
/// `model` is loaded; `name` is NUL-terminated; `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_model_linear(
    model: *const TightfitModel,
    name: *const c_char,
    out: *mut *mut TightfitLinear,
) -> TightfitStatus {
    // SAFETY: as the caller promises.
    call(|| unsafe { give(out, "out", || find(model, name, None)) })
}

/// # Safety
/// `model` is NULL or loaded, and stays so as long as the product is used; `name` is NULL or
/// NUL-terminated.
unsafe fn find(
    model: *const TightfitModel,
    name: *const c_char,
    index: Option<u64>,
) -> Result<TightfitLinear, Error> {
    // SAFETY: as the caller promises, who frees the product before the model is unloaded.
    let model: &'static TightfitModel = unsafe { object(model, "model") }?;
    // SAFETY: as the caller promises.
    let name = unsafe { text(name, "name") }?;
    let inner = match index {
        None => model.model().linear(name),
        Some(index) => model.model().linear_of(name, index),
    };
    Ok(TightfitLinear { inner: inner? })
}

/// Looks up the product with matrix `index` of a stack [matrices, outputs, inputs] in 4 bits: an
/// expert's weight, for example. As tightfit_model_linear.
///
/// # Safety
/// As tightfit_model_linear.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_model_linear_of(
    model: *const TightfitModel,
    name: *const c_char,
    index: u64,
    out: *mut *mut TightfitLinear,
) -> TightfitStatus {
    // SAFETY: as the caller promises.
    call(|| unsafe { give(out, "out", || find(model, name, Some(index))) })
}

/// Frees a product and sets `*linear` to NULL. NULL, or a pointer to NULL, does nothing.
///
/// # Safety
/// `*linear` came from this library, and no other call uses it now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_linear_free(linear: *mut *mut TightfitLinear) {
    // SAFETY: as the caller promises.
    unsafe { take(linear) }
}

/// What a product is of.
///
/// # Safety
/// `linear` is alive and its model loaded; `out` points to a structure whose `struct_size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_linear_info(
    linear: *const TightfitLinear,
    out: *mut TightfitLinearInfo,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let linear = &unsafe { object(linear, "linear") }?.inner;
        let quantization = linear.quantization();
        let quant_type: &'static CStr = match quantization.quant_type {
            QuantType::Nf4 => c"nf4",
            QuantType::Fp4 => c"fp4",
        };
        let make = |struct_size| {
            Ok(TightfitLinearInfo {
                struct_size,
                outputs: linear.outputs(),
                inputs: linear.inputs(),
                device: linear.device(),
                on_gpu: linear.is_on_gpu().into(),
                block_size: quantization.block_size.into(),
                quant_type: quant_type.as_ptr(),
                double_quantized: quantization.absmax_mean.is_some().into(),
            })
        };
        // SAFETY: as the caller promises.
        unsafe { write_sized(out, "out", make) }
    })
}

/// Computes a product of operands of a type (TIGHTFIT_FLOAT_...) in host memory. For a weight on a GPU they
/// are copied there and back, through memory that is taken for the call. `options` may be NULL.
/// TIGHTFIT_STATUS_USAGE if the lengths do not belong together: then nothing is written.
///
/// # Safety
/// `linear` is alive and its model loaded; `operands` has its `struct_size` set, and pointers to as many
/// bytes as its lengths say, of which nobody uses y meanwhile; `options` is NULL or has its `struct_size`
/// set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_linear_forward(
    linear: *const TightfitLinear,
    float_type: u32,
    rows: usize,
    operands: *const TightfitHostOperands,
    options: *const TightfitLinearOptions,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let linear = &unsafe { object(linear, "linear") }?.inner;
        let float = self::float_type(float_type)?;
        // SAFETY: as the caller promises.
        let operands = unsafe { read_sized(operands, "operands") }?;
        // SAFETY: as the caller promises.
        let options = unsafe { self::options(options) }?;
        let has_bias = !operands.bias.is_null();
        // Before anything is written to y, also zeros.
        linear.check_lengths(
            float,
            rows,
            operands.x_length,
            has_bias.then_some(operands.bias_length),
            operands.y_length,
        )?;
        // SAFETY: as the caller promises.
        let x = unsafe { array(operands.x.cast(), operands.x_length, "operands->x") }?;
        // SAFETY: as the caller promises.
        let bias = unsafe { array(operands.bias.cast(), operands.bias_length, "operands->bias") }?;
        // SAFETY: as the caller promises.
        let y = unsafe { array_mut(operands.y.cast::<u8>(), operands.y_length, "operands->y") }?;
        let operands = HostOperands {
            x,
            bias: has_bias.then_some(bias),
            y,
        };
        Ok(linear.forward_bytes(float, rows, operands, &options)?)
    })
}

/// # Safety
/// `options` is NULL or has its `struct_size` set.
pub(crate) unsafe fn options(
    options: *const TightfitLinearOptions,
) -> Result<LinearOptions, Error> {
    let mut read = LinearOptions::default();
    if options.is_null() {
        return Ok(read);
    }
    // SAFETY: as the caller promises.
    let given = unsafe { read_sized(options, "options") }?;
    if given.threads != 0 {
        read.threads = given.threads;
    }
    read.by_row = given.by_row != 0;
    Ok(read)
}

/// Gives how many bytes of workspace tightfit_linear_forward_on_device needs for this many rows and for any
/// fewer; 0 for a weight in host memory.
///
/// # Safety
/// `linear` is alive and its model loaded; `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_linear_workspace_bytes(
    linear: *const TightfitLinear,
    float_type: u32,
    rows: usize,
    by_row: u32,
    out: *mut u64,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let linear = &unsafe { object(linear, "linear") }?.inner;
        let float = self::float_type(float_type)?;
        // SAFETY: as the caller promises.
        let out = unsafe { array_mut(out, 1, "out") }?;
        out[0] = linear.workspace_bytes(rows, float, by_row != 0);
        Ok(())
    })
}

/// Gives a product of operands of a type (TIGHTFIT_FLOAT_...) in a GPU's memory to a stream, and returns
/// before it is computed. Nothing is allocated and nothing waited for: the stream may be one that is being
/// captured into a graph. `options` may be NULL. TIGHTFIT_STATUS_USAGE for a weight in host memory, an
/// address that is 0 or between elements, and a workspace that is too small: then nothing is launched.
///
/// # Safety
/// `linear` is alive. `operands` has its `struct_size` set, and addresses in the memory of the weight's GPU
/// of as many elements as TightfitLinear says and as many bytes as the workspace's length; nothing overlaps
/// y or the workspace, whose first 16 KiB are zero, and no other stream uses that meanwhile. The stream
/// is of the device's primary context. The model and the operands are kept until it is done, and until
/// graphs that have captured it are gone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_linear_forward_on_device(
    linear: *const TightfitLinear,
    float_type: u32,
    rows: usize,
    operands: *const TightfitDeviceOperands,
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
        let operands = DeviceOperands::new(given.x, given.y, given.stream)
            .with_bias(given.bias)
            .with_workspace(given.workspace, given.workspace_length);
        // SAFETY: as the caller promises.
        unsafe { linear.forward_on_device(float, rows, &operands, options.by_row) }?;
        Ok(())
    })
}

/// Computes the gradient of x by that of y, dx = dy * W, of operands in host memory: `x` is dy
/// [rows, outputs], `y` is dx [rows, inputs], and `bias` is NULL. Otherwise as tightfit_linear_forward.
///
/// # Safety
/// As tightfit_linear_forward.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_linear_input_gradient(
    linear: *const TightfitLinear,
    float_type: u32,
    rows: usize,
    operands: *const TightfitHostOperands,
    options: *const TightfitLinearOptions,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let linear = &unsafe { object(linear, "linear") }?.inner;
        let float = self::float_type(float_type)?;
        // SAFETY: as the caller promises.
        let operands = unsafe { read_sized(operands, "operands") }?;
        // SAFETY: as the caller promises.
        let options = unsafe { self::options(options) }?;
        if !operands.bias.is_null() {
            return Err(Error::usage(
                "operands->bias is not NULL: a gradient has none",
            ));
        }
        // Before anything is written to dx, also zeros.
        linear.check_gradient_lengths(float, rows, operands.x_length, operands.y_length)?;
        // SAFETY: as the caller promises.
        let dy = unsafe { array(operands.x.cast(), operands.x_length, "operands->x") }?;
        // SAFETY: as the caller promises.
        let dx = unsafe { array_mut(operands.y.cast::<u8>(), operands.y_length, "operands->y") }?;
        Ok(linear.input_gradient_bytes(float, rows, dy, dx, &options)?)
    })
}

/// Gives how many bytes of workspace tightfit_linear_input_gradient_on_device needs for this many rows and for
/// any fewer, at most 16 MiB; 0 for a weight in host memory.
///
/// # Safety
/// `linear` is alive and its model loaded; `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_linear_input_gradient_workspace_bytes(
    linear: *const TightfitLinear,
    float_type: u32,
    rows: usize,
    by_row: u32,
    out: *mut u64,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let linear = &unsafe { object(linear, "linear") }?.inner;
        let float = self::float_type(float_type)?;
        // SAFETY: as the caller promises.
        let out = unsafe { array_mut(out, 1, "out") }?;
        out[0] = linear.input_gradient_workspace_bytes(rows, float, by_row != 0);
        Ok(())
    })
}

/// Gives the gradient of x by that of y to a stream: `x` is dy [rows, outputs], `y` is dx [rows, inputs], and
/// `bias` is 0. Otherwise as tightfit_linear_forward_on_device.
///
/// # Safety
/// As tightfit_linear_forward_on_device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_linear_input_gradient_on_device(
    linear: *const TightfitLinear,
    float_type: u32,
    rows: usize,
    operands: *const TightfitDeviceOperands,
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
        let operands = DeviceOperands::new(given.x, given.y, given.stream)
            .with_bias(given.bias)
            .with_workspace(given.workspace, given.workspace_length);
        // SAFETY: as the caller promises.
        unsafe { linear.input_gradient_on_device(float, rows, &operands, options.by_row) }?;
        Ok(())
    })
}

/// What a workspace shall be enough for. Growing as TightfitTensor.
#[repr(C)]
pub struct TightfitWorkspaceOptions {
    /// Set by the caller: sizeof(TightfitWorkspaceOptions).
    pub struct_size: usize,
    /// Rows of products, and tokens of layers of experts.
    pub rows: usize,
    /// Experts of each token; 0 where no layers of experts are computed.
    pub experts_per_token: usize,
    /// Nonzero: also for gradients of inputs.
    pub gradients: u32,
}

// SAFETY: `repr(C)`, begins with a `usize`, and holds numbers.
unsafe impl Growing for TightfitWorkspaceOptions {
    const FIRST: usize = size_of::<TightfitWorkspaceOptions>();
}

/// Takes a workspace that is enough for products and layers of experts of a device, by its index. As
/// tightfit_model_linear_workspace, which counts neither layers of experts nor gradients.
///
/// # Safety
/// `model` is loaded; `options` has its `struct_size` set; `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_model_product_workspace(
    model: *const TightfitModel,
    device: usize,
    options: *const TightfitWorkspaceOptions,
    out: *mut *mut TightfitLinearWorkspace,
) -> TightfitStatus {
    call(|| {
        let take = || {
            // SAFETY: as the caller promises.
            let model = unsafe { object(model, "model") }?;
            // SAFETY: as the caller promises.
            let given = unsafe { read_sized(options, "options") }?;
            let options = WorkspaceOptions::rows(given.rows)
                .with_experts_per_token(given.experts_per_token)
                .with_gradients(given.gradients != 0);
            Ok(TightfitLinearWorkspace {
                inner: model.model().product_workspace(device, &options)?,
            })
        };
        // SAFETY: as the caller promises.
        unsafe { give(out, "out", take) }
    })
}

/// Takes a workspace that is enough for products of up to `rows` rows with each 4-bit weight of a device,
/// by its index, all of it zero. It lies behind the weights if the model was loaded with the setting `rows`
/// and that is free, else it is taken beside the plan. On success `*out` is for
/// tightfit_linear_workspace_free; otherwise it is NULL.
///
/// # Safety
/// `model` is loaded; `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_model_linear_workspace(
    model: *const TightfitModel,
    device: usize,
    rows: usize,
    out: *mut *mut TightfitLinearWorkspace,
) -> TightfitStatus {
    call(|| {
        let take = || {
            // SAFETY: as the caller promises.
            let model = unsafe { object(model, "model") }?;
            Ok(TightfitLinearWorkspace {
                inner: model.model().linear_workspace(device, rows)?,
            })
        };
        // SAFETY: as the caller promises.
        unsafe { give(out, "out", take) }
    })
}

/// Where a workspace is: no bytes and no address on a device that needs none.
///
/// # Safety
/// `workspace` has not been freed; `out` points to a structure whose `struct_size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_linear_workspace_memory(
    workspace: *const TightfitLinearWorkspace,
    out: *mut TightfitMemory,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let workspace = &unsafe { object(workspace, "workspace") }?.inner;
        let make = |struct_size| {
            Ok(TightfitMemory {
                struct_size,
                length: workspace.bytes(),
                device_address: workspace.address().map_or(0, |address| address.pointer),
                host: std::ptr::null_mut(),
            })
        };
        // SAFETY: as the caller promises.
        unsafe { write_sized(out, "out", make) }
    })
}

/// Gives a workspace back and sets `*workspace` to NULL. Products that use it must have ended. NULL, or a
/// pointer to NULL, does nothing.
///
/// # Safety
/// `*workspace` came from this library, and no other call uses it now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_linear_workspace_free(
    workspace: *mut *mut TightfitLinearWorkspace,
) {
    // SAFETY: as the caller promises.
    unsafe { take(workspace) }
}
