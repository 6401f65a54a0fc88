//! How much address space this process may use, and what is said where that is too little.

use std::io;

use super::GuestFailure;
use tightfit::types::Bytes;

/// Returns the bytes of address space that this process may use, where that is limited (`ulimit
/// -v`).
#[cfg(unix)]
pub(super) fn limit() -> Option<u64> {
    use rustix::process::{Resource, getrlimit};
    getrlimit(Resource::As).current
}

/// Nothing limits it.
#[cfg(not(unix))]
pub(super) fn limit() -> Option<u64> {
    None
}

/// Returns whether it is this process that lacks memory, whatever the guest wanted.
pub(super) fn is_short(error: &wasmtime::Error) -> bool {
    error.chain().any(|cause| {
        let kind = cause.downcast_ref::<io::Error>().map(io::Error::kind);
        #[cfg(unix)]
        let kind = kind.or_else(|| {
            let errno = cause.downcast_ref::<rustix::io::Errno>();
            errno.map(|&errno| io::Error::from(errno).kind())
        });
        kind == Some(io::ErrorKind::OutOfMemory) || cause.is::<wasmtime::OutOfMemory>()
    })
}

/// Returns how a guest fails for want of this process's memory.
pub(super) fn failure(what: impl std::fmt::Display) -> GuestFailure {
    match limit() {
        Some(limit) => GuestFailure::host(format_args!(
            "{what}: this process may use {} of address space (`ulimit -v`)",
            Bytes(limit)
        )),
        None => GuestFailure::host(format_args!("{what}: this machine lacks memory")),
    }
}
