//! Plans, loads, and their reports.

use std::ffi::{CString, c_char, c_void};
use std::sync::Arc;

use tightfit::Progress;
use tightfit::cancel::CancelToken;
use tightfit::checkpoint::Checkpoint;
use tightfit::load::{LoadError, LoadOptions, QuantizeOn, load_reserved, reserve_with};
use tightfit::memory::{DEFAULT_STAGING, Usage};
use tightfit::plan::{PlanOptions, Proposed, propose};
use tightfit::report::Report;

use crate::boundary::{
    Error, Growing, c_string, call, give, give_pointer, object, read_sized, take, write_sized,
};
use crate::open::settings;
use crate::{
    TightfitCheckpoint, TightfitDevices, TightfitModel, TightfitPolicy, TightfitSetting,
    TightfitStatus,
};

/// Where everything would go. Can be used from several threads at once.
pub struct TightfitPlan {
    checkpoint: Arc<Checkpoint>,
    proposed: Proposed,
    names: Vec<CString>,
}

/// What one device holds or will hold, in bytes. The library fills as much as `struct_size` says;
/// later versions add fields at the end.
#[repr(C)]
pub struct TightfitDeviceUse {
    /// Set by the caller: sizeof(TightfitDeviceUse).
    pub struct_size: usize,
    /// For example "sim:0". Owned by the plan or model.
    pub name: *const c_char,
    /// What may be used in all.
    pub capacity: u64,
    /// What is stored there.
    pub allocated: u64,
    /// The same after alignment.
    pub padded: u64,
    /// What is taken from the device for it.
    pub reserved: u64,
    /// The most that was stored there at any time; in a plan, what will be.
    pub peak_allocated: u64,
    /// The most after alignment.
    pub peak_padded: u64,
    /// The most that was taken from the device.
    pub peak_reserved: u64,
    /// What the policy leaves free.
    pub headroom: u64,
    /// Tensors stored there.
    pub tensors: u64,
    /// Bytes reserved behind the weights, for tightfit_model_allocate.
    pub tail: u64,
}

// SAFETY: `repr(C)`, begins with a `usize`, and holds numbers and a pointer.
unsafe impl Growing for TightfitDeviceUse {
    const FIRST: usize = std::mem::offset_of!(TightfitDeviceUse, tail);
}

/// How to load. Zero everywhere but in `struct_size` means the defaults.
#[repr(C)]
pub struct TightfitLoadOptions {
    /// Set by the caller: sizeof(TightfitLoadOptions).
    pub struct_size: usize,
    /// Worker threads; 0: as many as the machine has cores.
    pub threads: usize,
    /// Upper bound of host staging in bytes; 0: 64 MiB.
    pub staging_bytes: u64,
    /// Nonzero: blocks with infinities or NaN are an error.
    pub strict: u32,
    /// Where weights for GPUs are quantized. 0: on processor and GPU, shared out by what is measured
    /// while loading; 1: on the processor; 2: on the GPU, which may take more memory of it than
    /// planned for the time of the load. The bytes are the same.
    pub quantize_on: u32,
    /// NULL, or called after every chunk (at most 4 MiB) with the bytes that are in their place and
    /// the bytes of all. Calls come from several threads at once and not in the order of the bytes;
    /// they end before tightfit_load returns. May call this library. Must not throw, longjmp or end
    /// its thread.
    pub progress:
        Option<unsafe extern "C" fn(bytes_done: u64, bytes_total: u64, user_data: *mut c_void)>,
    /// NULL, or asked before reading starts and after every chunk, under the same rules: nonzero
    /// ends the load with TIGHTFIT_STATUS_INTERRUPTED and gives everything back.
    pub cancelled: Option<unsafe extern "C" fn(user_data: *mut c_void) -> i32>,
    /// Given to both. What it points to must bear use from several threads.
    pub user_data: *mut c_void,
    /// Nonzero: what the policy leaves free beside the weights (its settings `context`, `batch` and
    /// `reserve`) is reserved in one piece with them, for tightfit_model_allocate.
    pub reserve_headroom: u32,
}

// SAFETY: `repr(C)`, begins with a `usize`, and holds numbers, pointers and optional functions.
unsafe impl Growing for TightfitLoadOptions {
    const FIRST: usize = std::mem::offset_of!(TightfitLoadOptions, reserve_headroom);
}

/// The callbacks, as the workers share them.
struct Callbacks(TightfitLoadOptions);

// SAFETY: the header demands that callbacks and their data bear calls from several threads at once.
unsafe impl Sync for Callbacks {}

impl Callbacks {
    fn report(&self, progress: Progress) {
        if let Some(callback) = self.0.progress {
            // SAFETY: the caller gave the function with the data it is for.
            unsafe {
                callback(progress.bytes_done, progress.bytes_total, self.0.user_data);
            }
        }
    }

    fn is_cancelled(&self) -> bool {
        // SAFETY: the caller gave the function with the data it is for.
        self.0
            .cancelled
            .is_some_and(|callback| unsafe { callback(self.0.user_data) } != 0)
    }
}

/// Asks a policy where everything goes, without taking memory or reading weights. On success `*out`
/// is a plan for tightfit_plan_free; otherwise it is NULL.
///
/// # Safety
/// The handles are open; `settings` has `setting_count` entries and may be NULL with a count of 0;
/// `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_plan_make(
    checkpoint: *const TightfitCheckpoint,
    policy: *const TightfitPolicy,
    devices: *const TightfitDevices,
    settings: *const TightfitSetting,
    setting_count: usize,
    out: *mut *mut TightfitPlan,
) -> TightfitStatus {
    call(|| {
        let plan = || {
            // SAFETY: as the caller promises.
            let checkpoint = unsafe { object(checkpoint, "checkpoint") }?;
            // SAFETY: as the caller promises.
            let policy = unsafe { object(policy, "policy") }?;
            // SAFETY: as the caller promises.
            let devices = unsafe { object(devices, "devices") }?;
            // SAFETY: as the caller promises.
            let settings = unsafe { self::settings(settings, setting_count) }?;
            let infos: Vec<_> = devices.inner.iter().map(|device| device.info()).collect();
            let proposed = propose(&checkpoint.inner, &policy.inner, &infos, &settings)?;
            Ok(TightfitPlan {
                names: infos.iter().map(|info| c_string(&info.name)).collect(),
                checkpoint: Arc::clone(&checkpoint.inner),
                proposed,
            })
        };
        // SAFETY: as the caller promises.
        unsafe { give(out, "out", plan) }
    })
}

/// Frees a plan and sets `*plan` to NULL. NULL, or a pointer to NULL, does nothing.
///
/// # Safety
/// `*plan` came from tightfit_plan_make, and no other call uses it now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_plan_free(plan: *mut *mut TightfitPlan) {
    // SAFETY: as the caller promises.
    unsafe { take(plan) }
}

/// What device `index` of a plan will hold.
///
/// # Safety
/// `plan` is alive; `out` points to a structure whose `struct_size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_plan_device(
    plan: *const TightfitPlan,
    index: usize,
    out: *mut TightfitDeviceUse,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let plan = unsafe { object(plan, "plan") }?;
        let make = |size| device_use(&plan.proposed, &plan.names, None, index, size);
        // SAFETY: as the caller promises.
        unsafe { write_sized(out, "out", make) }
    })
}

/// What device `index` holds by a plan, or by what was measured of it.
pub(crate) fn device_use(
    proposed: &Proposed,
    names: &[CString],
    usage: Option<Usage>,
    index: usize,
    struct_size: usize,
) -> Result<TightfitDeviceUse, Error> {
    let (Some(device), Some(name)) = (proposed.plan.devices.get(index), names.get(index)) else {
        return Err(Error::usage(format_args!(
            "there is no device {index}: there are {}",
            names.len()
        )));
    };
    let planned = device.size;
    let value = |measured: fn(Usage) -> u64, planned| usage.map_or(planned, measured);
    Ok(TightfitDeviceUse {
        struct_size,
        name: name.as_ptr(),
        capacity: device.device.capacity,
        allocated: value(|usage| usage.requested.now, planned.requested),
        padded: value(|usage| usage.padded.now, planned.padded),
        reserved: value(|usage| usage.reserved.now, planned.reserved),
        peak_allocated: value(|usage| usage.requested.peak, planned.requested),
        peak_padded: value(|usage| usage.padded.peak, planned.padded),
        peak_reserved: value(|usage| usage.reserved.peak, planned.reserved),
        headroom: device.headroom,
        tensors: device.tensors,
        tail: device.tail,
    })
}

/// The report of a plan as JSON, as `tightfit plan --json` writes it; with `placements` nonzero,
/// with every tensor. On success `*out` is for tightfit_string_free; otherwise it is NULL.
///
/// # Safety
/// `plan` is alive; `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_plan_report(
    plan: *const TightfitPlan,
    placements: u32,
    out: *mut *mut c_char,
) -> TightfitStatus {
    call(|| {
        let make = || {
            // SAFETY: as the caller promises.
            let plan = unsafe { object(plan, "plan") }?;
            let mut report = Report::of_plan(&plan.checkpoint, &plan.proposed, DEFAULT_STAGING);
            if placements != 0 {
                report = report.with_placements(&plan.checkpoint, &plan.proposed.plan);
            }
            Ok(report)
        };
        // SAFETY: as the caller promises.
        unsafe { give_report(out, make) }
    })
}

/// Gives the caller a report as text.
///
/// # Safety
/// `out` is NULL or can be written.
pub(crate) unsafe fn give_report(
    out: *mut *mut c_char,
    make: impl FnOnce() -> Result<Report, Error>,
) -> Result<(), Error> {
    let text = || {
        let other = |error| Error::new(tightfit::status::Status::Other, error);
        let text = serde_json::to_string(&make()?).map_err(other)?;
        Ok(c_string(&text).into_raw())
    };
    // SAFETY: as the caller promises.
    unsafe { give_pointer(out, "out", text) }
}

/// Frees a text that the library gave away and sets `*string` to NULL. NULL, or a pointer to NULL,
/// does nothing.
///
/// # Safety
/// `*string` came from this library, unchanged, and no other call uses it now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_string_free(string: *mut *mut c_char) {
    if string.is_null() {
        return;
    }
    // SAFETY: not NULL, so it can be read and written, as the caller promises.
    let given = unsafe { string.replace(std::ptr::null_mut()) };
    if !given.is_null() {
        // SAFETY: made by `CString::into_raw`, and not taken before because it is NULL from then on.
        drop(unsafe { CString::from_raw(given) });
    }
}

/// Asks a policy for a plan, takes its memory, and loads. Where a device has less memory than it
/// said, the policy is asked again. On success `*out` is a model for tightfit_model_unload;
/// otherwise it is NULL and everything has been given back. Blocks; several loads may run at once.
///
/// # Safety
/// The handles are open; `settings` has `setting_count` entries and may be NULL with a count of 0;
/// `options` is NULL (defaults) or has its `struct_size` set and callbacks that keep the rules
/// stated there; `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_load(
    checkpoint: *const TightfitCheckpoint,
    policy: *const TightfitPolicy,
    devices: *const TightfitDevices,
    settings: *const TightfitSetting,
    setting_count: usize,
    options: *const TightfitLoadOptions,
    out: *mut *mut TightfitModel,
) -> TightfitStatus {
    call(|| {
        let load = || {
            // SAFETY: as the caller promises.
            let checkpoint = unsafe { object(checkpoint, "checkpoint") }?;
            // SAFETY: as the caller promises.
            let policy = unsafe { object(policy, "policy") }?;
            // SAFETY: as the caller promises.
            let devices = unsafe { object(devices, "devices") }?;
            // SAFETY: as the caller promises.
            let settings = unsafe { self::settings(settings, setting_count) }?;
            let callbacks = match options.is_null() {
                true => None,
                // SAFETY: as the caller promises.
                false => Some(Callbacks(unsafe { read_sized(options, "options") }?)),
            };
            carry_out(checkpoint, policy, devices, &settings, callbacks.as_ref())
        };
        // SAFETY: as the caller promises.
        unsafe { give(out, "out", load) }
    })
}

fn carry_out(
    checkpoint: &TightfitCheckpoint,
    policy: &TightfitPolicy,
    devices: &TightfitDevices,
    settings: &[(String, String)],
    callbacks: Option<&Callbacks>,
) -> Result<TightfitModel, Error> {
    let cancel = CancelToken::new();
    let ask = || {
        if callbacks.is_some_and(Callbacks::is_cancelled) {
            cancel.cancel();
        }
    };
    let progress = |progress: Progress| {
        if let Some(callbacks) = callbacks {
            callbacks.report(progress);
        }
        ask();
    };
    let mut options = LoadOptions::default()
        .with_progress(&progress)
        .with_cancel(cancel.clone());
    if let Some(Callbacks(given)) = callbacks {
        if given.threads != 0 {
            options.threads = given.threads;
        }
        if given.staging_bytes != 0 {
            options.staging_bytes = given.staging_bytes;
        }
        options.strict = given.strict != 0;
        options.quantize_on = match given.quantize_on {
            0 => QuantizeOn::Auto,
            1 => QuantizeOn::Cpu,
            2 => QuantizeOn::Gpu,
            other => {
                return Err(Error::usage(format!(
                    "quantize_on is {other}, not 0, 1 or 2"
                )));
            }
        };
    }
    ask();
    if cancel.is_cancelled() {
        return Err(LoadError::Cancelled.into());
    }
    let reserve_headroom = callbacks.is_some_and(|Callbacks(given)| given.reserve_headroom != 0);
    let plan_options = PlanOptions::default()
        .with_reserved_headroom(reserve_headroom)
        .with_cancel(cancel.clone());
    let placed = reserve_with(
        &checkpoint.inner,
        &policy.inner,
        &devices.inner,
        settings,
        &plan_options,
    )?;
    let base = Report::of_plan(&checkpoint.inner, &placed.proposed, options.staging_bytes)
        .with_revisions(&placed.revisions);
    let model = load_reserved(&checkpoint.inner, placed.reserved, &options)?;
    let usage: Vec<Usage> = devices.inner.iter().map(|device| device.usage()).collect();
    let report = base.with_load(&model, &usage);
    Ok(TightfitModel::new(
        Arc::clone(&checkpoint.inner),
        Arc::clone(&devices.inner),
        placed.proposed,
        model,
        report,
    ))
}
