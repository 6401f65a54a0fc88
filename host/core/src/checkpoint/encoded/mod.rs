//! Weights that other methods have quantized: several tensors of the file that are one, and that are
//! decoded as they are read.
//!
//! The rule is one sentence: a code's value times its tile's scale in f32, rounded once to bf16 (to f16
//! where scales are f16). So whatever is made of such a weight is what would be made of a checkpoint that
//! had been dequantized before. Layouts and names are in [`find`].

mod find;
mod layout;
mod read;
mod stage;

use tightfit_kernels::{SourceCodes, SourceScale};

use super::{Extent, TensorInfo};

pub(super) use find::find;
pub(super) use read::Reading;
pub(crate) use stage::ReadCodes;

/// Which weights that another method has quantized are decoded as they are read. Others are seen as the
/// tensors that the file has: codes, and scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Dequantize {
    /// Those for which NF4 takes less than what is stored: codes of 8 bits.
    #[default]
    Auto,
    /// All that are understood.
    All,
    /// None.
    None,
}

impl Dequantize {
    /// Every choice with the name by which users know it.
    pub const NAMES: [(&'static str, Dequantize); 3] = [
        ("auto", Dequantize::Auto),
        ("all", Dequantize::All),
        ("none", Dequantize::None),
    ];

    fn includes(self, codes: SourceCodes) -> bool {
        match self {
            Dequantize::Auto => codes.bits() > 4,
            Dequantize::All => true,
            Dequantize::None => false,
        }
    }
}

/// How many weights of a checkpoint other methods have quantized, and what is made of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct EncodedCounts {
    /// They are decoded as they are read.
    pub decoded: u64,
    /// They could be and are left as the file has them, for NF4 would gain nothing or by the user's wish.
    pub left: u64,
    /// Elements of these.
    pub left_elements: u64,
    /// Elements of the tensors that these are in the file: of codes, which may be several in one, of
    /// scales and zero points.
    pub left_stored_elements: u64,
    /// Bits that one element of these takes in the file with its scales, the average in thousandths.
    pub left_millibits: u64,
    /// They look like weights in codes, and it is not known how to decode them.
    pub unknown: u64,
    /// Tensors beside decoded weights that only their method has a use for, such as scales of activations:
    /// they are not tensors of the model any more.
    pub unused: u64,
}

/// How a weight is encoded in the checkpoint, and where the parts beside its codes lie. It is a
/// [`TensorInfo`] with the type and the shape that it has when it is decoded.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Encoded {
    /// What codes mean.
    pub codes: SourceCodes,
    /// Number of elements of a row.
    pub columns: u64,
    /// Bytes from the codes of a row to those of the next one.
    pub row_bytes: u64,
    /// Rows of one matrix. The tiles of each matrix of a stack begin anew.
    pub rows: u64,
    /// The row of the stack that the weight begins with: not 0 for a part of one.
    pub first_row: u64,
    /// Rows and columns of a tile; `u64::MAX` where it has all of the matrix.
    pub tile: [u64; 2],
    /// How scales are stored.
    pub scale: ScaleForm,
    /// The scales of the whole stack, row-major.
    pub scales: Extent,
    /// The zero points of the whole stack, where it has any: signed 4 bits, eight rows in each i32.
    pub zeros: Option<Extent>,
}

/// How the scale of a tile is stored.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum ScaleForm {
    /// In one tensor.
    Plain(SourceScale),
    /// As E4M3, to be multiplied with one f32 for all, or divided by it.
    Nested {
        /// The f32.
        global: Extent,
        /// Whether it divides.
        divides: bool,
    },
}

impl ScaleForm {
    /// Bytes of one scale in the file.
    const fn bytes(self) -> u64 {
        match self {
            ScaleForm::Plain(scale) => scale.bytes() as u64,
            ScaleForm::Nested { .. } => 1,
        }
    }
}

impl Encoded {
    /// Returns the name of its codes, for example `f8_e4m3`.
    pub fn name(&self) -> &'static str {
        match self.codes {
            SourceCodes::F8E4M3 => "f8_e4m3",
            SourceCodes::F8E5M2 => "f8_e5m2",
            SourceCodes::F4E2M1 => "f4_e2m1",
            SourceCodes::Int4 => "int4",
            _ => "codes",
        }
    }

    /// Number of scales for a row of tiles.
    fn scale_columns(&self) -> u64 {
        self.columns.div_ceil(self.tile[1])
    }

    /// Rows of tiles of one matrix.
    fn scale_rows(&self) -> u64 {
        self.rows.div_ceil(self.tile[0])
    }

    /// Rows and columns of a tile, no more than there are in a matrix.
    fn whole_tile(&self) -> [u64; 2] {
        let [rows, columns] = self.tile;
        [rows.min(self.rows), columns.min(self.columns)]
    }

    /// The number of the scale for this row of the stack and this column of tiles.
    fn scale_number(&self, row: u64, tile_column: u64) -> u64 {
        let (matrix, row) = (row / self.rows, row % self.rows);
        let tile_row = matrix * self.scale_rows() + row / self.whole_tile()[0];
        tile_row * self.scale_columns() + tile_column
    }

    /// Bytes of the parts beside the codes.
    pub(super) fn extra_bytes(&self) -> u64 {
        let global = match self.scale {
            ScaleForm::Plain(_) => 0,
            ScaleForm::Nested { global, .. } => global.bytes,
        };
        self.scales.bytes + self.zeros.map_or(0, |zeros| zeros.bytes) + global
    }
}

impl TensorInfo {
    /// Returns the number of bytes of its elements, as they are when they have been read. Not for what
    /// is quantized by bitsandbytes, which is not decoded.
    pub(crate) fn decoded_bytes(&self) -> u64 {
        match &self.encoded {
            // Checked when it was found.
            Some(_) => self.dtype.tensor_bytes(&self.shape).unwrap_or(0),
            None => self.bytes,
        }
    }

    /// Returns some of its rows, all but the last dimension taken together, as a tensor of its own. It
    /// must have them, and not be quantized by bitsandbytes.
    pub(crate) fn rows(&self, name: String, first: u64, shape: [u64; 2]) -> TensorInfo {
        let [rows, columns] = shape;
        let row_bytes = match &self.encoded {
            Some(encoded) => encoded.row_bytes,
            None => columns * (self.dtype.bits() / 8),
        };
        let encoded = self.encoded.as_ref().map(|encoded| {
            Box::new(Encoded {
                first_row: encoded.first_row + first,
                ..**encoded
            })
        });
        TensorInfo {
            name,
            dtype: self.dtype,
            shape: shape.to_vec(),
            bytes: rows * row_bytes,
            shard: self.shard,
            offset: self.offset + first * row_bytes,
            quantized: None,
            encoded,
            piece: None,
        }
    }
}
