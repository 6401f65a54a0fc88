//! How far long work has come.

/// How far a load, a save, a download or the writing of a checkpoint has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Number of bytes that are done. While loading and saving these are bytes of the source.
    pub bytes_done: u64,
    /// Number of bytes to be done in all.
    pub bytes_total: u64,
    /// While loading, what the last step was for: the number of a device in the plan.
    pub device: Option<u32>,
    /// How many bytes that step has written there, or has sent on their way: in sum those that the plan
    /// has. Scales of scales count with the blocks that they are of.
    pub bytes_written: u64,
}

impl Progress {
    pub(crate) fn new(bytes_done: u64, bytes_total: u64) -> Progress {
        Progress {
            bytes_done,
            bytes_total,
            device: None,
            bytes_written: 0,
        }
    }

    pub(crate) fn with_written(self, device: Option<u32>, bytes_written: u64) -> Progress {
        Progress {
            device,
            bytes_written,
            ..self
        }
    }
}

/// Called as work goes on, possibly from several threads at once.
pub type ReportProgress<'a> = &'a (dyn Fn(Progress) + Sync);
