//! How far long work has come.

/// How far a load, a save, a download or the writing of a checkpoint has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Number of bytes that are done. While loading and saving these are bytes of the source.
    pub bytes_done: u64,
    /// Number of bytes to be done in all.
    pub bytes_total: u64,
}

impl Progress {
    pub(crate) fn new(bytes_done: u64, bytes_total: u64) -> Progress {
        Progress {
            bytes_done,
            bytes_total,
        }
    }
}

/// Called as work goes on, possibly from several threads at once.
pub type ReportProgress<'a> = &'a (dyn Fn(Progress) + Sync);
