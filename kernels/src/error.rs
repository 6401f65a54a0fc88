//! What can be wrong with a call.

use crate::{FloatType, Isa};

/// A call that cannot be carried out. Nothing has been written when one is returned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The instruction set is not available on this machine.
    #[error("instruction set {isa} is not available on this machine")]
    IsaUnavailable {
        /// The instruction set asked for.
        isa: Isa,
    },
    /// A source does not hold a whole number of elements.
    #[error("{have} bytes are not a whole number of {float} elements of {need} bytes")]
    PartialElement {
        /// The type of the elements.
        float: FloatType,
        /// Bytes per element.
        need: usize,
        /// Bytes in the source.
        have: usize,
    },
    /// A source whose rows or tiles do not end where bytes do, or that has none.
    #[error(
        "rows of {columns} codes in tiles of {} x {} are not decoded: lengths are not zero, and those of \
         tiles of 4-bit codes even",
        tile[0], tile[1]
    )]
    SourceTile {
        /// Number of elements of a row.
        columns: usize,
        /// Rows and columns of a tile.
        tile: [usize; 2],
    },
    /// Elements of a source that a GPU's kernels do not quantize from their codes.
    #[error("codes are not quantized where they lie: {problem}")]
    SourceRun {
        /// What should be.
        problem: &'static str,
    },
    /// The GPU is too old for the kernels.
    #[error(
        "the kernels need compute capability {}.{}, the GPU has {}.{}",
        need.0, need.1, have.0, have.1
    )]
    ComputeCapability {
        /// The oldest that they are compiled for, major and minor.
        need: (u32, u32),
        /// What the GPU has.
        have: (u32, u32),
    },
    /// A GPU cannot do so much in one launch of a kernel.
    #[error("kernel {kernel} takes at most {most} elements, not {have}")]
    Launch {
        /// The kernel.
        kernel: &'static str,
        /// Elements that the largest grid covers.
        most: usize,
        /// The elements asked for.
        have: usize,
    },
    /// Lengths that an operation of [`crate::decoder`] cannot have.
    #[error("{problem}, not {have}")]
    Shape {
        /// What should be.
        problem: &'static str,
        /// What is.
        have: usize,
    },
    /// A slice does not have the length that the other arguments imply.
    #[error("`{what}` holds {have} elements, {need} are needed")]
    Length {
        /// The argument.
        what: &'static str,
        /// The length it must have, in elements of the slice.
        need: usize,
        /// The length it has, in elements of the slice.
        have: usize,
    },
}

/// Checks the length of one slice.
pub(crate) fn check_length(
    what: &'static str,
    need: usize,
    have: usize,
) -> Result<(), KernelError> {
    if need == have {
        Ok(())
    } else {
        Err(KernelError::Length { what, need, have })
    }
}
