//! Checkpoints, devices and policies.

use std::ffi::c_char;
use std::path::Path;
use std::sync::Arc;

use tightfit::checkpoint::Checkpoint;
use tightfit::device::{Device, DeviceSpec, open_devices};
use tightfit_wasm::policy::WasmPolicy;
use tightfit_wasm::sandbox::Limits;

use crate::TightfitStatus;
use crate::boundary::{Error, array, call, give, object, take, text};

/// A checkpoint whose files are open and whose headers have been checked. Can be used from several
/// threads at once.
pub struct TightfitCheckpoint {
    pub(crate) inner: Arc<Checkpoint>,
}

/// Devices in a fixed order. Can be used from several threads at once; every model that is loaded
/// on them counts in their statistics.
pub struct TightfitDevices {
    pub(crate) inner: Arc<[Box<dyn Device>]>,
}

/// A compiled policy. Can be used from several threads at once.
pub struct TightfitPolicy {
    pub(crate) inner: WasmPolicy,
}

/// A name and a value: a policy's setting or limit, as in `--set name=value`.
#[repr(C)]
pub struct TightfitSetting {
    /// NUL-terminated UTF-8.
    pub name: *const c_char,
    /// NUL-terminated UTF-8.
    pub value: *const c_char,
}

/// Settings as the library takes them.
///
/// # Safety
/// `settings` is NULL or points to `count` settings whose texts are NULL or end with a zero byte.
pub(crate) unsafe fn settings(
    settings: *const TightfitSetting,
    count: usize,
) -> Result<Vec<(String, String)>, Error> {
    // SAFETY: as the caller promises.
    let given = unsafe { array(settings, count, "settings") }?;
    given
        .iter()
        .map(|setting| {
            // SAFETY: as the caller promises.
            let name = unsafe { text(setting.name, "a setting's name") }?;
            // SAFETY: as the caller promises.
            let value = unsafe { text(setting.value, "a setting's value") }?;
            Ok((name.to_owned(), value.to_owned()))
        })
        .collect()
}

/// Opens the checkpoint at `path`, a directory, an index or a `.safetensors` file, and reads what
/// is in it; no weights. On success `*out` is a checkpoint for tightfit_checkpoint_close; otherwise
/// it is NULL.
///
/// # Safety
/// `path` is NUL-terminated; `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_checkpoint_open(
    path: *const c_char,
    out: *mut *mut TightfitCheckpoint,
) -> TightfitStatus {
    call(|| {
        let open = || {
            // SAFETY: as the caller promises.
            let path = unsafe { text(path, "path") }?;
            Ok(TightfitCheckpoint {
                inner: Arc::new(Checkpoint::open(Path::new(path))?),
            })
        };
        // SAFETY: as the caller promises.
        unsafe { give(out, "out", open) }
    })
}

/// Closes a checkpoint and sets `*checkpoint` to NULL. Plans and models made from it keep what they
/// need. NULL, or a pointer to NULL, does nothing.
///
/// # Safety
/// `*checkpoint` came from tightfit_checkpoint_open, and no other call uses it now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_checkpoint_close(checkpoint: *mut *mut TightfitCheckpoint) {
    // SAFETY: as the caller promises.
    unsafe { take(checkpoint) }
}

/// The number of tensors in a checkpoint, and their bytes. Either pointer may be NULL.
///
/// # Safety
/// `checkpoint` is open; the others are NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_checkpoint_size(
    checkpoint: *const TightfitCheckpoint,
    tensors: *mut usize,
    bytes: *mut u64,
) -> TightfitStatus {
    call(|| {
        // SAFETY: as the caller promises.
        let checkpoint = unsafe { object(checkpoint, "checkpoint") }?;
        if !tensors.is_null() {
            // SAFETY: not NULL, so it can be written, as the caller promises.
            unsafe { tensors.write(checkpoint.inner.tensors().len()) };
        }
        if !bytes.is_null() {
            // SAFETY: not NULL, so it can be written, as the caller promises.
            unsafe { bytes.write(checkpoint.inner.source_bytes()) };
        }
        Ok(())
    })
}

/// Opens devices in the given order, for example "sim:8GiB", "cpu" or "cpu:16GiB"; with a count of
/// 0, what the library takes by itself. No memory is taken. On success `*out` is for
/// tightfit_devices_close; otherwise it is NULL.
///
/// # Safety
/// `specs` has `count` NUL-terminated texts; `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_devices_open(
    specs: *const *const c_char,
    count: usize,
    out: *mut *mut TightfitDevices,
) -> TightfitStatus {
    call(|| {
        let open = || {
            // SAFETY: as the caller promises.
            let specs = unsafe { array(specs, count, "specs") }?;
            let specs = specs
                .iter()
                .map(|&spec| {
                    // SAFETY: as the caller promises.
                    let spec = unsafe { text(spec, "a device") }?;
                    spec.parse::<DeviceSpec>().map_err(Error::usage)
                })
                .collect::<Result<Vec<_>, Error>>()?;
            Ok(TightfitDevices {
                inner: open_devices(&specs)?.into(),
            })
        };
        // SAFETY: as the caller promises.
        unsafe { give(out, "out", open) }
    })
}

/// Closes devices and sets `*devices` to NULL. Models that are loaded on them keep them. NULL, or a
/// pointer to NULL, does nothing.
///
/// # Safety
/// `*devices` came from tightfit_devices_open, and no other call uses it now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_devices_close(devices: *mut *mut TightfitDevices) {
    // SAFETY: as the caller promises.
    unsafe { take(devices) }
}

/// Compiles a policy: a built-in one by its name ("auto" is the default of the command), or a file.
/// It runs sandboxed; `limits` (may be NULL with a count of 0) change what it may use, by the names
/// of `--policy-limit`. On success `*out` is for tightfit_policy_close; otherwise it is NULL.
///
/// # Safety
/// `name` is NUL-terminated; `limits` has `limit_count` entries; `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_policy_open(
    name: *const c_char,
    limits: *const TightfitSetting,
    limit_count: usize,
    out: *mut *mut TightfitPolicy,
) -> TightfitStatus {
    call(|| {
        let open = || {
            // SAFETY: as the caller promises.
            let name = unsafe { text(name, "name") }?;
            let mut allowed = Limits::default();
            // SAFETY: as the caller promises.
            for (name, value) in unsafe { settings(limits, limit_count) }? {
                allowed.set(&name, &value).map_err(Error::usage)?;
            }
            Ok(TightfitPolicy {
                inner: WasmPolicy::open(name, allowed)?,
            })
        };
        // SAFETY: as the caller promises.
        unsafe { give(out, "out", open) }
    })
}

/// Drops a compiled policy and sets `*policy` to NULL. Plans and models do not need it any more.
/// NULL, or a pointer to NULL, does nothing.
///
/// # Safety
/// `*policy` came from tightfit_policy_open, and no other call uses it now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tightfit_policy_close(policy: *mut *mut TightfitPolicy) {
    // SAFETY: as the caller promises.
    unsafe { take(policy) }
}
