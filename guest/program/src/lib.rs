//! SDK for programs of [Tightfit](https://github.com/tightfit/tightfit).
//!
//! A program is a WebAssembly module that loads models and works with them: it has memory of the
//! devices within a quota, the NF4 kernels, products with 4-bit weights, and the checkpoints that it was granted by name. It has no
//! clock, no randomness, no files and no network. (What only decides where tensors go is a policy, for
//! which `tightfit-guest` is the SDK. The two cannot be in one module.)
//!
//! ```
//! use tightfit_program::{Checkpoint, Program, GaveUp, program};
//!
//! struct Count;
//!
//! impl Program for Count {
//!     fn run(arguments: Vec<String>) -> Result<String, GaveUp> {
//!         let name = arguments.first().ok_or("which checkpoint?")?;
//!         let checkpoint = Checkpoint::open(name)?;
//!         Ok(format!("{name} has {} tensors", checkpoint.tensor_count()))
//!     }
//! }
//!
//! program!(Count);
//! # fn main() {}
//! ```

#![deny(unsafe_code)]

// The generated code names this crate from the outside, wherever it is expanded.
extern crate self as tightfit_program;

#[doc(hidden)]
pub mod bindings;
#[doc(hidden)]
pub mod export;

use std::fmt;

pub use bindings::tightfit::host::buffers::{Buffer, Place};
pub use bindings::tightfit::host::checkpoints::{Checkpoint, Tie, get_names};
pub use bindings::tightfit::host::devices::{
    Gauge, Quota, Usage, get_devices, get_quota, get_usage,
};
pub use bindings::tightfit::host::errors::{Error, Shortage};
pub use bindings::tightfit::host::linear::{Product, Rounding, Weight, finish, multiply};
pub use bindings::tightfit::host::log::{Level, write as log};
pub use bindings::tightfit::host::models::{
    Model, Part, PartKind, Share, Statistics, StoredQuantization, StoredTensor,
};
pub use bindings::tightfit::host::nf4;
pub use bindings::tightfit::host::output::write as output;
pub use bindings::tightfit::host::sizing::{StoredSize, stored_bytes};
pub use bindings::tightfit::host::sliced_models::Piece;
pub use bindings::tightfit::host::slices::{Range as SliceRange, Slice};
pub use bindings::tightfit::host::transformer;
pub use bindings::tightfit::host::types::{
    Device, DeviceKind, Dtype, Format, Nf4Format, Placement, QuantType, Tensor,
};

/// A program. Export it with [`program!`].
pub trait Program {
    /// Does the program's work. Gives what is to be printed.
    ///
    /// # Errors
    /// A [`GaveUp`] that says what went wrong, for example what the host has told.
    fn run(arguments: Vec<String>) -> Result<String, GaveUp>;
}

/// Why a program gives up, in a sentence for its user. The host's errors convert to it, and text does.
#[derive(Debug)]
pub struct GaveUp(String);

impl fmt::Display for GaveUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for GaveUp {}

impl From<String> for GaveUp {
    fn from(message: String) -> GaveUp {
        GaveUp(message)
    }
}

impl From<&str> for GaveUp {
    fn from(message: &str) -> GaveUp {
        GaveUp(message.to_owned())
    }
}

impl From<Error> for GaveUp {
    fn from(error: Error) -> GaveUp {
        GaveUp(match error {
            Error::NoSpace(shortage) | Error::QuotaExceeded(shortage) => format!(
                "{} ({} bytes are needed, there are {})",
                shortage.message, shortage.need, shortage.have
            ),
            Error::InvalidArgument(message)
            | Error::NotFound(message)
            | Error::Unsupported(message)
            | Error::DeviceFailed(message)
            | Error::BadCheckpoint(message) => message,
        })
    }
}

impl Format {
    /// NF4 as bitsandbytes does it by default: blocks of 64 elements, scales in f32.
    pub const NF4: Format = Format::Nf4(Nf4Format {
        block_size: 64,
        double_quantized: false,
    });
}

impl From<std::ops::Range<u64>> for SliceRange {
    fn from(range: std::ops::Range<u64>) -> SliceRange {
        SliceRange {
            start: range.start,
            end: range.end,
        }
    }
}

impl Slice {
    /// Returns the slice of the tensor with this number that has one range of a dimension.
    pub fn new(
        tensor: u32,
        dimension: u32,
        range: std::ops::Range<u64>,
        placement: Placement,
    ) -> Slice {
        Slice {
            tensor,
            dimension,
            ranges: vec![range.into()],
            placement,
        }
    }
}

impl Model {
    /// Loads a checkpoint as [`Model::load`] does, some tensors in slices, which are on no device in
    /// `placements`. The model's tensors are numbered in checkpoint order, with the slices of a tensor, in the
    /// order of the list, in its place.
    ///
    /// ```no_run
    /// use tightfit_program::{Checkpoint, Error, Format, Model, Placement, Slice};
    ///
    /// /// The first half of the rows of every matrix.
    /// fn half(name: &str) -> Result<Model, Error> {
    ///     let checkpoint = Checkpoint::open(name)?;
    ///     let here = Placement { device: Some(0), format: Format::NF4 };
    ///     let nowhere = Placement { device: None, format: Format::Stored };
    ///     let tensors = checkpoint.all_tensors();
    ///     let mut slices = Vec::new();
    ///     for (number, tensor) in (0..).zip(&tensors) {
    ///         if let [rows, _] = tensor.shape[..] {
    ///             slices.push(Slice::new(number, 0, 0..rows / 2, here));
    ///         }
    ///     }
    ///     Model::load_slices(&checkpoint, &vec![nowhere; tensors.len()], &slices, &[0])
    /// }
    /// ```
    ///
    /// # Errors
    /// As [`Model::load`], and [`Error::InvalidArgument`] for slices that there cannot be.
    pub fn load_slices(
        checkpoint: &Checkpoint,
        placements: &[Placement],
        slices: &[Slice],
        headroom: &[u64],
    ) -> Result<Model, Error> {
        bindings::tightfit::host::sliced_models::load(checkpoint, placements, slices, headroom)
    }

    /// Returns which part of which tensor of the checkpoint the tensor with this number is; `None` if it was not
    /// cut.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for what is not there or was not loaded.
    pub fn piece(&self, tensor: u32) -> Result<Option<Piece>, Error> {
        bindings::tightfit::host::sliced_models::get_piece(self, tensor)
    }
}

impl Buffer {
    /// Returns the place that begins with byte `offset`, for a function that takes one.
    pub fn at(&self, offset: u64) -> Place<'_> {
        Place {
            buffer: self,
            offset,
        }
    }

    /// Takes memory of a device and writes these bytes there, however many.
    ///
    /// # Errors
    /// As [`Buffer::allocate`] and [`Buffer::write`].
    pub fn of(device: u32, bytes: &[u8]) -> Result<Buffer, Error> {
        let buffer = Buffer::allocate(device, bytes.len() as u64)?;
        let mut offset = 0;
        for piece in bytes.chunks(MOST_BYTES) {
            buffer.write(offset, piece)?;
            offset += piece.len() as u64;
        }
        Ok(buffer)
    }
}

/// Bytes of a list that the host takes or gives in one call.
const MOST_BYTES: usize = 4 << 20;

impl<'a> Product<'a> {
    /// Returns the product of `rows` rows of `input` with a weight, the fastest way, without a bias. Both
    /// places hold numbers of type `float`.
    ///
    /// ```no_run
    /// use tightfit_program::{Buffer, Dtype, Error, Product, Weight, finish, multiply};
    ///
    /// fn project(weight: &Weight, x: &Buffer, rows: u32, y: &Buffer) -> Result<(), Error> {
    ///     multiply(&[Product::new(weight, x.at(0), rows, Dtype::Bf16, y.at(0))])?;
    ///     finish()
    /// }
    /// ```
    pub fn new(
        weight: &'a Weight,
        input: Place<'a>,
        rows: u32,
        float: Dtype,
        output: Place<'a>,
    ) -> Product<'a> {
        Product {
            weight,
            input,
            rows,
            float,
            bias: None,
            output,
            experts: None,
            rounding: Rounding::Fastest,
        }
    }

    /// Returns the same with a bias.
    #[must_use]
    pub fn with_bias(self, bias: Place<'a>) -> Product<'a> {
        Product {
            bias: Some(bias),
            ..self
        }
    }

    /// Returns the same with the number of an expert for each row, as u32.
    #[must_use]
    pub fn with_experts(self, experts: Place<'a>) -> Product<'a> {
        Product {
            experts: Some(experts),
            ..self
        }
    }

    /// Returns the same with rows whose bits do not depend on each other.
    #[must_use]
    pub fn by_row(self) -> Product<'a> {
        Product {
            rounding: Rounding::ByRow,
            ..self
        }
    }
}

impl Checkpoint {
    /// Returns every tensor, in checkpoint order.
    pub fn all_tensors(&self) -> Vec<Tensor> {
        let mut tensors = Vec::new();
        loop {
            let batch = self.tensors(tensors.len() as u32, u32::MAX);
            if batch.is_empty() {
                return tensors;
            }
            tensors.extend(batch);
        }
    }

    /// Returns every tie.
    pub fn all_ties(&self) -> Vec<Tie> {
        let mut ties = Vec::new();
        loop {
            let batch = self.ties(ties.len() as u32, u32::MAX);
            if batch.is_empty() {
                return ties;
            }
            ties.extend(batch);
        }
    }
}

/// Exports a type that implements [`Program`] as the program of this crate, which must be a `cdylib`.
/// Natively nothing is exported.
#[macro_export]
#[rustfmt::skip]
macro_rules! program {
    ($program:ident) => {
        #[cfg(target_family = "wasm")]
        const _: () = {
            type Exported = $crate::export::Exported<$program>;
            $crate::bindings::export!(Exported with_types_in $crate::bindings);
        };
        // Natively this is what uses the program.
        #[cfg(not(target_family = "wasm"))]
        const _: fn(Vec<String>) -> Result<String, $crate::GaveUp> =
            <$program as $crate::Program>::run;
    };
}
