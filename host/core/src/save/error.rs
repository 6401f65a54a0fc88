//! Why a checkpoint was not written.

use std::path::PathBuf;

use tightfit_kernels::KernelError;

use crate::checkpoint::{CheckpointError, shown};
use crate::load::LoadError;
use crate::plan::{PlanError, SizeError};
use crate::status::Status;
use crate::types::Format;

/// Why a checkpoint was not written. Nothing is left at the target, or what was there before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// The target exists, and may not be replaced.
    #[error("{} exists; choose another directory, or replace it with --force", path.display())]
    Exists {
        /// The target.
        path: PathBuf,
    },
    /// The target cannot be a directory's name.
    #[error("{} is not the name of a directory that could be written", path.display())]
    NotADirectoryName {
        /// The target.
        path: PathBuf,
    },
    /// The operating system refused; a full disk ends here.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(CheckpointError),
    /// A weight could not be quantized.
    #[error(transparent)]
    Load(LoadError),
    /// A batch could not be laid out: a fault of ours.
    #[error("internal error: {0}")]
    Plan(PlanError),
    /// A format cannot hold a tensor.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// A kernel was called with lengths that do not belong together: a fault of ours.
    #[error("internal error: {0}")]
    Kernel(#[from] KernelError),
    /// The plan cuts tensors, which a checkpoint has as a whole.
    #[error("a plan that cuts tensors into slices cannot be saved: a checkpoint has whole tensors")]
    Slices,
    /// Two tensors would be written under one name.
    #[error("two tensors would be written as '{name}'")]
    SameName {
        /// The name.
        name: String,
    },
    /// A weight is to be in 4 bits in a checkpoint that another method has quantized.
    #[error(
        "the checkpoint is quantized by {} already, and with '{}' in {format} no single method would \
         describe it: leave what it holds as it is stored, or start from weights that are not quantized",
        shown(.method), shown(.tensor)
    )]
    OtherMethod {
        /// The method.
        method: String,
        /// The weight.
        tensor: String,
        /// The format that it was to have.
        format: Format,
    },
    /// Some weights of another method are to be written decoded, and some are not decoded.
    #[error(
        "of the weights that {} has quantized {weights} are not decoded, and written beside those that \
         are no single method would describe them: decode all of them, or none",
        shown(.method)
    )]
    MixedMethods {
        /// The method.
        method: String,
        /// How many are not decoded.
        weights: u64,
    },
    /// A decoded stack of experts, as no program reads it.
    #[error(
        "the stack '{}' can be loaded decoded and is not written so: programs that read it in MXFP4 have \
         it dense the other way round, and not in 4 bits", shown(.tensor)
    )]
    NoReader {
        /// The stack.
        tensor: String,
    },
    /// What would be written is larger than any checkpoint that can be opened.
    #[error("writing the tensor '{}' would make {what} {need}, at most {limit} can be opened", shown(.tensor))]
    TooLarge {
        /// The tensor, a stack of experts for example, with which it becomes too large.
        tensor: String,
        /// What would be too large.
        what: &'static str,
        /// How large it would be with this tensor; `u64::MAX` where it needs more than 64 bits.
        need: u64,
        /// The most that can be opened.
        limit: u64,
    },
    /// A header would be larger than readers accept.
    #[error("the header of {file} would be larger than 100 MB; choose a smaller --max-shard-size")]
    HeaderTooLarge {
        /// The shard.
        file: String,
    },
    /// The placements were made for another checkpoint.
    #[error("the placements were made for another checkpoint")]
    OtherPlan,
    /// Something that cannot be: a fault of ours, please report it.
    #[error("internal error: {0}; please report it")]
    Internal(&'static str),
    /// The user asked to stop.
    #[error("cancelled")]
    Cancelled,
}

impl From<LoadError> for SaveError {
    fn from(error: LoadError) -> SaveError {
        match error {
            LoadError::Cancelled => SaveError::Cancelled,
            LoadError::Checkpoint(error) => error.into(),
            error => SaveError::Load(error),
        }
    }
}

impl From<CheckpointError> for SaveError {
    fn from(error: CheckpointError) -> SaveError {
        match error {
            CheckpointError::Cancelled => SaveError::Cancelled,
            error => SaveError::Checkpoint(error),
        }
    }
}

impl From<&SaveError> for Status {
    fn from(error: &SaveError) -> Status {
        match error {
            SaveError::Exists { .. }
            | SaveError::NotADirectoryName { .. }
            | SaveError::HeaderTooLarge { .. } => Status::Usage,
            // What is listed is read; all else that fails is what is written.
            SaveError::Checkpoint(_)
            | SaveError::SameName { .. }
            | SaveError::OtherMethod { .. }
            | SaveError::MixedMethods { .. }
            | SaveError::NoReader { .. }
            | SaveError::TooLarge { .. }
            | SaveError::Io { action: "list", .. } => Status::Checkpoint,
            SaveError::Load(error) => error.into(),
            SaveError::Io { .. }
            | SaveError::Plan(_)
            | SaveError::Size(_)
            | SaveError::Kernel(_)
            | SaveError::OtherPlan
            | SaveError::Slices
            | SaveError::Internal(_) => Status::Other,
            SaveError::Cancelled => Status::Interrupted,
        }
    }
}
