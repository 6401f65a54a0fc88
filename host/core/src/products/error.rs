//! Why a product cannot be computed.

use tightfit_kernels::KernelError;

use crate::device::DeviceError;
use crate::model::ModelError;
use crate::status::Status;
use crate::types::Bytes;

/// Why a product cannot be computed. Nothing has been written when one is returned, but where a device
/// failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinearError {
    /// There is no such tensor, or it was left out.
    #[error("no tensor '{tensor}' is loaded")]
    NotLoaded {
        /// The name asked for.
        tensor: String,
    },
    /// It is stored in more bits.
    #[error("tensor '{tensor}' ({dtype}) is {format}: products are of weights in 4 bits")]
    NotFourBit {
        /// The tensor.
        tensor: String,
        /// The type of its elements in the checkpoint.
        dtype: String,
        /// How it is stored, as plans name it.
        format: String,
    },
    /// It has another shape.
    #[error("tensor '{tensor}' has shape {shape:?}: {what} has {need} dimensions")]
    NotMatrix {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
        /// What was asked for: a matrix, or a stack of matrices.
        what: &'static str,
        /// Dimensions of that.
        need: usize,
    },
    /// A stack has fewer matrices.
    #[error("matrix {index} of tensor '{tensor}' was asked for, which has {have}, from 0")]
    NoSuchMatrix {
        /// The tensor.
        tensor: String,
        /// The matrix.
        index: u64,
        /// How many there are.
        have: u64,
    },
    /// A matrix of a stack begins where no scale does, so that it cannot be read by itself.
    #[error(
        "matrix {index} of tensor '{tensor}' begins at element {first}, inside of {what}: it has to begin at \
         a multiple of {need}"
    )]
    Inside {
        /// The tensor.
        tensor: String,
        /// The matrix.
        index: u64,
        /// Its first element in the stack.
        first: u64,
        /// What it begins in: a block, or on a device the blocks of one nested scale.
        what: &'static str,
        /// Elements of that.
        need: u64,
    },
    /// No experts have the names under which they are looked for.
    #[error(
        "no experts are loaded as '{module}': need '{module}.gate_up_proj' and '{module}.down_proj', or \
         '{module}.0.gate_proj.weight' with up_proj and down_proj, or '{module}.0.w1.weight' with w3 and w2"
    )]
    NoExperts {
        /// The module asked for.
        module: String,
    },
    /// The matrices of experts do not belong together.
    #[error(
        "tensor '{tensor}' has shape {have:?} for its experts, need {need:?} beside the others'"
    )]
    ExpertsShape {
        /// The tensor.
        tensor: String,
        /// Its shape, of tensors for one expert each with how many there are.
        have: Vec<u64>,
        /// The shape that belongs to the others.
        need: Vec<u64>,
    },
    /// Experts on a GPU that are tensors of their own, and do not lie as a stack: plans lay them out so unless
    /// they are on several devices, in several formats, or in matrices of other than a multiple of 4096
    /// elements, or of 16384 if they are double-quantized.
    #[error(
        "the experts of '{tensor}' are tensors of their own in the memory of {device}: its kernels need them as \
         stacks, [experts, outputs, inputs], and only large ones on one device and in one format lie so"
    )]
    NotStacked {
        /// The tensor of the first expert.
        tensor: String,
        /// Its device.
        device: String,
    },
    /// An operand does not have the length that the weight and the number of rows give.
    #[error("{what} for tensor '{tensor}' has {have} {unit}, need {need}")]
    Length {
        /// The tensor.
        tensor: String,
        /// The operand.
        what: &'static str,
        /// What is counted: elements or bytes.
        unit: &'static str,
        /// How many are needed.
        need: usize,
        /// How many there are.
        have: usize,
    },
    /// The weight is not where it is asked to be multiplied.
    #[error("tensor '{tensor}' is in the memory of {device}: {instead}")]
    Elsewhere {
        /// The tensor.
        tensor: String,
        /// Its device.
        device: String,
        /// What to do instead.
        instead: &'static str,
    },
    /// An address that cannot be an operand's.
    #[error(
        "{what} for tensor '{tensor}' is at {address:#x}: need a multiple of {need} that is not 0"
    )]
    Address {
        /// The tensor.
        tensor: String,
        /// The operand.
        what: &'static str,
        /// Where it is said to be.
        address: u64,
        /// What it has to be a multiple of.
        need: u64,
    },
    /// Too little memory to work in.
    #[error("the workspace for tensor '{tensor}' has {}, need {}", Bytes(*have), Bytes(*need))]
    Workspace {
        /// The tensor.
        tensor: String,
        /// Bytes that are needed.
        need: u64,
        /// Bytes that there are.
        have: u64,
    },
    /// The device failed, or has no kernels for products.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The scales of a matrix could not be read.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A kernel was called with lengths that do not belong together: a fault of ours.
    #[error("internal error: {0}")]
    Kernel(#[from] KernelError),
}

impl From<&LinearError> for Status {
    fn from(error: &LinearError) -> Status {
        match error {
            LinearError::Device(error) => error.into(),
            LinearError::Model(error) => error.into(),
            LinearError::Kernel(_) => Status::Other,
            LinearError::NotLoaded { .. }
            | LinearError::NotFourBit { .. }
            | LinearError::NotMatrix { .. }
            | LinearError::NoSuchMatrix { .. }
            | LinearError::Inside { .. }
            | LinearError::NoExperts { .. }
            | LinearError::ExpertsShape { .. }
            | LinearError::NotStacked { .. }
            | LinearError::Length { .. }
            | LinearError::Elsewhere { .. }
            | LinearError::Address { .. }
            | LinearError::Workspace { .. } => Status::Usage,
        }
    }
}
