//! Weights read where the system's page cache has them, without a copy.
//!
//! A mapping shows a file as it is at that moment: whoever overwrites it changes bytes that are being
//! looked at, and whoever cuts it short makes looking a signal. So a file is mapped only under a
//! *lease*: the system then lets nobody open it for writing, or cut it, before this process has
//! given the lease back, for which it has `/proc/sys/fs/lease-break-time`. Whoever tries is noticed
//! before and after each [`Window`], and every 10 ms; then nothing more is given out, what is out is
//! waited for (milliseconds), the mapping goes, and the lease after it. From then on files are read,
//! and reading finds out what has become of them.
//!
//! What is mapped is locked in memory as it is populated. So a page that was read stays, and reading it
//! a second time, which may fail, is never needed.
//!
//! Wherever any of this cannot be had there is no window, and the caller reads.

#[cfg(not(all(
    target_os = "linux",
    any(target_arch = "x86_64", target_arch = "aarch64")
)))]
mod elsewhere;
#[cfg(all(
    target_os = "linux",
    any(target_arch = "x86_64", target_arch = "aarch64")
))]
mod linux;

#[cfg(not(all(
    target_os = "linux",
    any(target_arch = "x86_64", target_arch = "aarch64")
)))]
pub(crate) use elsewhere::{Mappings, Window};
#[cfg(all(
    target_os = "linux",
    any(target_arch = "x86_64", target_arch = "aarch64")
))]
pub(crate) use linux::{Mappings, Window};

use super::Checkpoint;

impl Checkpoint {
    /// Mappings of its files, for as long as it is read from: each is made when it is first asked for.
    pub(crate) fn map(&self) -> Mappings {
        Mappings::new(self.shards.clone(), true)
    }
}
