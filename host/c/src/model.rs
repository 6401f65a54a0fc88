//! What is loaded: tensors, their parts, statistics.

use std::ffi::{CStr, CString, c_char};
use std::sync::Arc;

use tightfit::checkpoint::Checkpoint;
use tightfit::device::Device;
use tightfit::model::{Model, TailAllocator, Tensor};
use tightfit::plan::{PartKind, PlannedPart, Proposed};
use tightfit::report::Report;
use tightfit::types::{QuantType, elements};

use crate::TightfitStatus;
use crate::boundary::{Error, Growing, array_mut, c_string, call, object, take, text, write_sized};
use crate::load::{TightfitDeviceUse, device_use, give_report};

/// The elements themselves, row-major.
pub const TIGHTFIT_PART_DATA: u32 = 0;
/// Two 4-bit codes in a byte, the earlier element in the high half.
pub const TIGHTFIT_PART_CODES: u32 = 1;
/// One scale per block: a float, or a uint8_t under double quantization.
pub const TIGHTFIT_PART_ABSMAX: u32 = 2;
/// One float per 256 scales; double quantization only.
pub const TIGHTFIT_PART_NESTED_ABSMAX: u32 = 3;

const KINDS: [PartKind; 4] = [
    PartKind::Data,
    PartKind::Codes,
    PartKind::Absmax,
    PartKind::NestedAbsmax,
];

/// A loaded model. Can be used from several threads at once, but not while or after it is unloaded.
/// It needs neither checkpoint nor devices nor policy to stay open.
pub struct TightfitModel {
    checkpoint: Arc<Checkpoint>,
    devices: Arc<[Box<dyn Device>]>,
    proposed: Proposed,
    report: Report,
    /// What was loaded, by its index in the checkpoint, ascending.
    loaded: Vec<usize>,
    texts: Vec<Texts>,
    device_names: Vec<CString>,
    model: Model,
}

/// What C reads of one loaded tensor.
struct Texts {
    name: CString,
    format: CString,
    dtype: CString,
}

impl TightfitModel {
    pub(crate) fn new(
        checkpoint: Arc<Checkpoint>,
        devices: Arc<[Box<dyn Device>]>,
        proposed: Proposed,
        model: Model,
        report: Report,
    ) -> TightfitModel {
        let texts = |tensor: Tensor<'_>| Texts {
            name: c_string(tensor.name()),
            format: c_string(&tensor.format().to_string()),
            dtype: c_string(tensor.dtype().safetensors_name()),
        };
        let plan = model.plan();
        let names = plan.devices.iter().map(|plan| c_string(&plan.device.name));
        TightfitModel {
            device_names: names.collect(),
            loaded: model.tensors().map(|tensor| tensor.index()).collect(),
            texts: model.tensors().map(texts).collect(),
            checkpoint,
            devices,
            proposed,
            report,
            model,
        }
    }

    pub(crate) fn model(&self) -> &Model {
        &self.model
    }

    pub(crate) fn tail(&self, device: usize) -> Result<&TailAllocator, Error> {
        self.model.tail(device).ok_or_else(|| {
            Error::usage(format_args!(
                "nothing is reserved behind weights on a device {device}"
            ))
        })
    }

    pub(crate) fn tensor(&self, index: usize) -> Result<Tensor<'_>, Error> {
        let in_checkpoint = self.loaded.get(index);
        in_checkpoint
            .and_then(|&index| self.model.tensor_at(index))
            .ok_or_else(|| {
                Error::usage(format_args!(
                    "there is no tensor {index}: {} are loaded",
                    self.loaded.len()
                ))
            })
    }
}

/// One loaded tensor. The library fills as much as `struct_size` says; later versions add fields at
/// the end. Pointers are owned by the model and valid until it is unloaded.
#[repr(C)]
pub struct TightfitTensor {
    /// Set by the caller: sizeof(TightfitTensor).
    pub struct_size: usize,
    /// Its index among the loaded tensors.
    pub index: usize,
    /// Its key in the checkpoint, NUL-terminated UTF-8.
    pub name: *const c_char,
    /// Type of its elements in the checkpoint as safetensors names it, for example "BF16".
    pub dtype: *const c_char,
    /// How it is stored: "stored", "cast:bf16", "nf4", "nf4+double", "nf4/128".
    pub format: *const c_char,
    /// Name of its device, for example "sim:0".
    pub device_name: *const c_char,
    /// Index of its device.
    pub device: usize,
    /// Row-major shape in elements: `rank` numbers.
    pub shape: *const u64,
    /// Number of dimensions; 0 for a scalar.
    pub rank: usize,
    /// Number of elements.
    pub elements: u64,
    /// Number of its parts.
    pub parts: usize,
    /// "nf4" or "fp4" for a 4-bit weight, quantized while loading or before; otherwise NULL.
    pub quant_type: *const c_char,
    /// Elements that share a scale; 0 if it is not a 4-bit weight.
    pub block_size: u32,
    /// Nonzero if its scales are stored in 8 bits.
    pub double_quantized: u32,
    /// The mean of the scales of a double-quantized weight, to be added to each.
    pub absmax_mean: f32,
}

// SAFETY: `repr(C)`, begins with a `usize`, and holds numbers and pointers.
unsafe impl Growing for TightfitTensor {
    const FIRST: usize = size_of::<TightfitTensor>();
}

/// One stored part of a tensor. Growing as TightfitTensor.
#[repr(C)]
pub struct TightfitPart {
    /// Set by the caller: sizeof(TightfitPart).
    pub struct_size: usize,
    /// What it holds: TIGHTFIT_PART_...
    pub kind: u32,
    /// First byte in the device's reservation, a multiple of 256.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// The bytes in place, where the processor can read the device's memory; otherwise NULL. Read
    /// only, valid until the model is unloaded. Any address where the length is 0.
    pub host: *const u8,
    /// Its address in a GPU's memory, valid in the device's primary context until the model is
    /// unloaded; 0 for host memory.
    pub device_address: u64,
}

// SAFETY: `repr(C)`, begins with a `usize`, and holds numbers and a pointer.
unsafe impl Growing for TightfitPart {
    const FIRST: usize = std::mem::offset_of!(TightfitPart, device_address);
}

/// What a load took. Growing as TightfitTensor.
#[repr(C)]
pub struct TightfitLoadStatistics {
    /// Set by the caller: sizeof(TightfitLoadStatistics).
    pub struct_size: usize,
    /// Time of the reservations, and from there to the last byte.
    pub seconds: f64,
    /// Bytes read from the checkpoint.
    pub bytes_read: u64,
    /// Tensors that were quantized.
    pub quantized: u64,
    /// Tensors that were stored as they are or cast.
    pub stored: u64,
    /// Blocks with infinities or NaN among what was quantized.
    pub nonfinite_blocks: u64,
    /// Bytes of host staging.
    pub staging_bytes: u64,
    /// Bytes allowed for the scales of double-quantized tensors in flight.
    pub scratch_bytes: u64,
}

// SAFETY: `repr(C)`, begins with a `usize`, and holds numbers.
unsafe impl Growing for TightfitLoadStatistics {
    const FIRST: usize = size_of::<TightfitLoadStatistics>();
}

/// Unloads a model, which gives its memory back, and sets `*model` to NULL: unloading twice through
/// one variable is harmless. NULL, or a pointer to NULL, does nothing.
///
/// # Safety
/// `*model` came from tightfit_load; no other call uses it or what it owns now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_model_unload(model: *mut *mut TightfitModel) {
    // SAFETY: as the caller promises.
    unsafe { take(model) }
}

/// The number of loaded tensors; 0 for NULL.
///
/// # Safety
/// `model` is NULL or loaded.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_model_tensor_count(model: *const TightfitModel) -> usize {
    // SAFETY: as the caller promises.
    unsafe { model.as_ref() }.map_or(0, |model| model.loaded.len())
}

/// Looks up a tensor by its index, from 0 to the count, in checkpoint order.
///
/// # Safety
/// `model` is loaded; `out` points to a structure whose `struct_size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_model_tensor(
    model: *const TightfitModel,
    index: usize,
    out: *mut TightfitTensor,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let model = unsafe { object(model, "model") }?;
        // SAFETY: as the caller promises.
        unsafe { write_sized(out, "out", |size| describe(model, index, size)) }
    })
}

/// Looks up a tensor by its name, also by the name that it is tied to.
///
/// # Safety
/// `model` is loaded; `name` is NUL-terminated; `out` points to a structure whose `struct_size` is
/// set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_model_find(
    model: *const TightfitModel,
    name: *const c_char,
    out: *mut TightfitTensor,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let model = unsafe { object(model, "model") }?;
        // SAFETY: as the caller promises.
        let name = unsafe { text(name, "name") }?;
        let index = model
            .model
            .tensor(name)
            .and_then(|tensor| model.loaded.binary_search(&tensor.index()).ok())
            .ok_or_else(|| Error::usage(format_args!("no tensor '{name}' is loaded")))?;
        // SAFETY: as the caller promises.
        unsafe { write_sized(out, "out", |size| describe(model, index, size)) }
    })
}

fn describe(
    model: &TightfitModel,
    index: usize,
    struct_size: usize,
) -> Result<TightfitTensor, Error> {
    let tensor = model.tensor(index)?;
    let texts = &model.texts[index];
    let quantization = tensor.quantization();
    let absmax_mean = tensor.absmax_mean();
    let quant_type: Option<&'static CStr> = quantization.map(|given| match given.quant_type {
        QuantType::Nf4 => c"nf4",
        QuantType::Fp4 => c"fp4",
    });
    Ok(TightfitTensor {
        struct_size,
        index,
        name: texts.name.as_ptr(),
        dtype: texts.dtype.as_ptr(),
        format: texts.format.as_ptr(),
        device_name: model.device_names[tensor.device()].as_ptr(),
        device: tensor.device(),
        shape: tensor.shape().as_ptr(),
        rank: tensor.shape().len(),
        elements: elements(tensor.shape()).unwrap_or(0),
        parts: tensor.parts().len(),
        quant_type: quant_type.map_or(std::ptr::null(), CStr::as_ptr),
        block_size: quantization.map_or(0, |given| given.block_size.into()),
        double_quantized: absmax_mean.is_some().into(),
        absmax_mean: absmax_mean.unwrap_or(0.0),
    })
}

/// One part of a tensor: where it is, and a pointer to it where the processor can read it.
///
/// # Safety
/// `model` is loaded; `out` points to a structure whose `struct_size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_model_part(
    model: *const TightfitModel,
    tensor: usize,
    part: usize,
    out: *mut TightfitPart,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let tensor = unsafe { object(model, "model") }?.tensor(tensor)?;
        let make = |struct_size| {
            let planned = tensor.parts().get(part).ok_or_else(|| {
                let (name, parts) = (tensor.name(), tensor.parts().len());
                Error::usage(format_args!(
                    "tensor '{name}' has no part {part}: it has {parts}"
                ))
            })?;
            let host = tensor.part(planned.kind);
            let device = tensor.device_part(planned.kind);
            Ok(TightfitPart {
                struct_size,
                kind: match planned.kind {
                    PartKind::Data => TIGHTFIT_PART_DATA,
                    PartKind::Codes => TIGHTFIT_PART_CODES,
                    PartKind::Absmax => TIGHTFIT_PART_ABSMAX,
                    PartKind::NestedAbsmax => TIGHTFIT_PART_NESTED_ABSMAX,
                },
                offset: planned.offset,
                length: planned.bytes,
                host: host.map_or(std::ptr::null(), <[u8]>::as_ptr),
                device_address: device.map_or(0, |device| device.address().pointer),
            })
        };
        // SAFETY: as the caller promises.
        unsafe { write_sized(out, "out", make) }
    })
}

/// Copies the part of this kind (TIGHTFIT_PART_...) of a tensor, wherever it is, into `buffer`,
/// whose `length` must be that of the part.
///
/// # Safety
/// `model` is loaded; `buffer` has `length` bytes that nobody else uses meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_model_read_part(
    model: *const TightfitModel,
    tensor: usize,
    kind: u32,
    buffer: *mut u8,
    length: usize,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let tensor = unsafe { object(model, "model") }?.tensor(tensor)?;
        let part = part_kind(tensor, kind)?;
        check_length(tensor.name(), "bytes", part.bytes, length)?;
        // SAFETY: as the caller promises.
        let buffer = unsafe { array_mut(buffer, length, "buffer") }?;
        match tensor.part(part.kind) {
            Some(bytes) => buffer.copy_from_slice(bytes),
            None => {
                let bytes = tensor.read_part(part.kind)?;
                buffer.copy_from_slice(&bytes.unwrap_or_default());
            }
        }
        Ok(())
    })
}

/// Dequantizes or converts a tensor into `buffer`, row-major, whose `count` must be its number of
/// elements. An error for elements that are not floating-point numbers.
///
/// # Safety
/// `model` is loaded; `buffer` has `count` elements that nobody else uses meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_model_to_f32(
    model: *const TightfitModel,
    tensor: usize,
    buffer: *mut f32,
    count: usize,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let tensor = unsafe { object(model, "model") }?.tensor(tensor)?;
        let need = elements(tensor.shape()).unwrap_or(0);
        check_length(tensor.name(), "elements", need, count)?;
        // SAFETY: as the caller promises.
        let buffer = unsafe { array_mut(buffer, count, "buffer") }?;
        Ok(tensor.read_floats(0, buffer)?)
    })
}

/// Dequantizes or converts `count` elements of a tensor, from number `first` on, into `buffer`: a row
/// of a matrix, for example, without the rest of it. An error for elements that are not
/// floating-point numbers, and for a range outside of the tensor.
///
/// # Safety
/// `model` is loaded; `buffer` has `count` elements that nobody else uses meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_model_to_f32_at(
    model: *const TightfitModel,
    tensor: usize,
    first: u64,
    buffer: *mut f32,
    count: usize,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let tensor = unsafe { object(model, "model") }?.tensor(tensor)?;
        // SAFETY: as the caller promises.
        let buffer = unsafe { array_mut(buffer, count, "buffer") }?;
        Ok(tensor.read_floats(first, buffer)?)
    })
}

/// The part of this kind (TIGHTFIT_PART_...) of a tensor.
pub(crate) fn part_kind(tensor: Tensor<'_>, kind: u32) -> Result<PlannedPart, Error> {
    let part = KINDS.get(kind as usize).and_then(|&kind| {
        let parts = tensor.parts().iter();
        parts.copied().find(|part| part.kind == kind)
    });
    part.ok_or_else(|| {
        let name = tensor.name();
        Error::usage(format_args!("tensor '{name}' has no part of kind {kind}"))
    })
}

fn check_length(name: &str, unit: &str, need: u64, have: usize) -> Result<(), Error> {
    if have as u64 != need {
        return Err(Error::usage(format_args!(
            "tensor '{name}': the buffer has {have} {unit}, it must have {need}"
        )));
    }
    Ok(())
}

/// The number of devices, also of those that hold nothing; 0 for NULL.
///
/// # Safety
/// `model` is NULL or loaded.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_model_device_count(model: *const TightfitModel) -> usize {
    // SAFETY: as the caller promises.
    unsafe { model.as_ref() }.map_or(0, |model| model.device_names.len())
}

/// What device `index` holds now, measured. Other models on the same devices count too, but for
/// headroom and the number of tensors.
///
/// # Safety
/// `model` is loaded; `out` points to a structure whose `struct_size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_model_device(
    model: *const TightfitModel,
    index: usize,
    out: *mut TightfitDeviceUse,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let model = unsafe { object(model, "model") }?;
        let usage = model.devices.get(index).map(|device| device.usage());
        let make = |size| device_use(&model.proposed, &model.device_names, usage, index, size);
        // SAFETY: as the caller promises.
        unsafe { write_sized(out, "out", make) }
    })
}

/// What the load took.
///
/// # Safety
/// `model` is loaded; `out` points to a structure whose `struct_size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_model_statistics(
    model: *const TightfitModel,
    out: *mut TightfitLoadStatistics,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let stats = unsafe { object(model, "model") }?.model.stats();
        let make = |struct_size| {
            Ok(TightfitLoadStatistics {
                struct_size,
                seconds: stats.elapsed.as_secs_f64(),
                bytes_read: stats.bytes_read,
                quantized: stats.quantized,
                stored: stats.stored,
                nonfinite_blocks: stats.nonfinite_blocks(),
                staging_bytes: stats.staging_bytes,
                scratch_bytes: stats.scratch_bytes,
            })
        };
        // SAFETY: as the caller promises.
        unsafe { write_sized(out, "out", make) }
    })
}

/// The report of the load as JSON, as `tightfit load --json` writes it; with `placements` nonzero,
/// with every tensor. Its figures are those of the end of the load. On success `*out` is for
/// tightfit_string_free; otherwise it is NULL.
///
/// # Safety
/// `model` is loaded; `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_model_report(
    model: *const TightfitModel,
    placements: u32,
    out: *mut *mut c_char,
) -> TightfitStatus {
    call(|| {
        let make = || {
            // SAFETY: as the caller promises.
            let model = unsafe { object(model, "model") }?;
            let report = model.report.clone();
            Ok(match placements {
                0 => report,
                _ => report.with_placements(&model.checkpoint, model.model.plan()),
            })
        };
        // SAFETY: as the caller promises.
        unsafe { give_report(out, make) }
    })
}
