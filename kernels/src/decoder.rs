//! What a decoder computes between its products, on the processor: norms, rotary embedding, attention
//! over a cache, gates, sums, rows of a table, products with matrices that are not quantized, and choices.
//!
//! Matrices are row-major. Elements are little-endian bytes at any alignment; arithmetic is f32, and each
//! result is rounded once to the type. [`crate::cuda::decoder`] holds the same for GPUs.
//!
//! Numbers that lie on a device - ids of tokens, positions - may be anything. What they cannot be is told
//! by [`Faults`], and what becomes of it is said where they are taken: never is anything read or written
//! beside what the arguments hold.

mod attention;
pub(crate) mod choose;
mod operation;
mod rows;

pub use attention::RotationOperands;
pub use operation::{Operand, OperandShape, Operation};

use std::num::NonZeroUsize;

use crate::{FloatType, KernelError, Kernels};

/// What was wrong with numbers that were only seen while computing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Faults(u32);

impl Faults {
    /// Nothing.
    pub const NONE: Faults = Faults(0);
    /// An id that is no row of its table.
    pub const ID: Faults = Faults(1);
    /// A position that the cache has no place for.
    pub const POSITION: Faults = Faults(2);

    /// Reads what kernels for GPUs leave in their error word.
    pub const fn from_bits(bits: u32) -> Faults {
        Faults(bits & 3)
    }

    /// Returns the error word.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Returns whether something was wrong.
    pub const fn any(self) -> bool {
        self.0 != 0
    }

    /// Returns whether all of these are among them.
    pub const fn contains(self, other: Faults) -> bool {
        self.0 & other.0 == other.0
    }

    /// Returns both.
    #[must_use]
    pub const fn with(self, other: Faults) -> Faults {
        Faults(self.0 | other.0)
    }
}

/// The largest size of a head.
pub const MOST_HEAD_SIZE: usize = 256;

/// The most heads of queries, and of keys.
pub const MOST_HEADS: usize = 4096;

/// The most elements of a row that is normed or gathered.
pub const MOST_COLUMNS: usize = 1 << 20;

/// The most elements of a row of which the largest are asked for.
pub const MOST_TOP_COLUMNS: usize = 1 << 24;

/// The most that can be asked for of a row's largest, [`Kernels::top`].
pub const MOST_TOP: usize = 256;

/// The most experts that a row can choose, and that it can choose from: [`Kernels::route`].
pub const MOST_CHOICES: usize = 64;
/// See [`MOST_CHOICES`].
pub const MOST_ROUTED: usize = 4096;

/// A norm of rows: `x / sqrt(mean(x^2) + eps) * (weight_offset + weight)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RmsNorm {
    /// The type of everything.
    pub float: FloatType,
    /// How many rows there are.
    pub rows: usize,
    /// Elements of a row, and of the weight.
    pub columns: usize,
    /// What is added to the mean.
    pub eps: f32,
    /// What is added to each weight: 0 for Llama and Qwen, 1 for Gemma.
    pub weight_offset: f32,
}

/// The heads of an attention: queries [rows, query_heads, head_size], keys and values
/// [rows, kv_heads, head_size].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// The type of everything.
    pub float: FloatType,
    /// Rows: tokens.
    pub rows: usize,
    /// Heads of queries, a multiple of those of keys: query head `h` looks at the keys of head
    /// `h / (query_heads / kv_heads)`.
    pub query_heads: usize,
    /// Heads of keys and of values.
    pub kv_heads: usize,
    /// Elements of a head: a multiple of 8, at most [`MOST_HEAD_SIZE`].
    pub head_size: usize,
}

impl Heads {
    /// Returns the elements of all queries.
    pub const fn query_elements(&self) -> usize {
        let row = self.query_heads.saturating_mul(self.head_size);
        self.rows.saturating_mul(row)
    }

    /// Returns the elements of the keys, or of the values, of so many rows.
    pub const fn kv_elements(&self, rows: usize) -> usize {
        rows.saturating_mul(self.kv_heads.saturating_mul(self.head_size))
    }

    /// Looks whether there can be such heads.
    ///
    /// # Errors
    /// [`KernelError::Shape`].
    pub fn check(&self) -> Result<(), KernelError> {
        let size = self.head_size;
        if size == 0 || size > MOST_HEAD_SIZE || !size.is_multiple_of(8) {
            return Err(shape(
                "a head has a multiple of 8 elements, at most 256",
                size,
            ));
        }
        if self.kv_heads == 0 || self.query_heads == 0 {
            return Err(shape("there is a head of queries and one of keys", 0));
        }
        if self.query_heads > MOST_HEADS {
            return Err(shape("there are at most 4096 heads", self.query_heads));
        }
        if !self.query_heads.is_multiple_of(self.kv_heads) {
            let problem = "heads of queries are a multiple of those of keys";
            return Err(shape(problem, self.query_heads));
        }
        Ok(())
    }
}

/// What becomes of queries, keys and values before attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rotation {
    /// The heads of the new rows.
    pub heads: Heads,
    /// Elements of a head that are rotated, the first ones: even, at most all; 0 for none. Element `i` is
    /// rotated with element `i + rotary / 2`, as in Llama and Qwen.
    pub rotary: usize,
    /// What sines and cosines are multiplied with: 1, but for yarn.
    pub scaling: f32,
    /// Rows of the cache.
    pub capacity: usize,
    /// For norms of heads, as in [`RmsNorm`].
    pub norm_eps: f32,
    /// The same.
    pub norm_weight_offset: f32,
}

impl Rotation {
    /// Looks whether there can be such a rotation.
    ///
    /// # Errors
    /// [`KernelError::Shape`].
    pub fn check(&self) -> Result<(), KernelError> {
        self.heads.check()?;
        if !self.rotary.is_multiple_of(2) || self.rotary > self.heads.head_size {
            let problem = "an even number of elements is rotated, at most those of a head";
            return Err(shape(problem, self.rotary));
        }
        check_capacity(self.capacity)
    }
}

/// Which rows of a cache a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visible {
    /// Those up to its own position.
    Causal {
        /// If there is one, only so many, its own among them.
        window: Option<NonZeroUsize>,
    },
    /// The first ones, whatever its position.
    First(NonZeroUsize),
}

/// Attention over a cache: `softmax(scale * q * transpose(keys)) * values`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attention {
    /// The heads.
    pub heads: Heads,
    /// Rows of the cache.
    pub capacity: usize,
    /// Which of them a query sees.
    pub visible: Visible,
    /// What scores are multiplied with; in most models 1 / sqrt(head_size).
    pub scale: f32,
}

impl Attention {
    /// Looks whether there can be such an attention.
    ///
    /// # Errors
    /// [`KernelError::Shape`].
    pub fn check(&self) -> Result<(), KernelError> {
        self.heads.check()?;
        check_capacity(self.capacity)?;
        match self.visible {
            Visible::First(count) if count.get() > self.capacity => Err(shape(
                "no more is seen than the cache has rows",
                count.get(),
            )),
            _ => Ok(()),
        }
    }

    /// Returns the rows that a query at `position` sees. A position behind the cache counts as its last one.
    pub fn seen(&self, position: u32) -> std::ops::Range<usize> {
        match self.visible {
            Visible::First(count) => 0..count.get(),
            Visible::Causal { window } => {
                let end = (position as usize).min(self.capacity - 1) + 1;
                let begin = window.map_or(0, |window| end.saturating_sub(window.get()));
                begin..end
            }
        }
    }
}

fn check_columns(columns: usize) -> Result<(), KernelError> {
    match columns > MOST_COLUMNS {
        true => Err(shape("a row has at most 2^20 elements", columns)),
        false => Ok(()),
    }
}

fn check_capacity(capacity: usize) -> Result<(), KernelError> {
    match capacity {
        0 => Err(shape("a cache has a row", 0)),
        // Positions are of 32 bits.
        _ if u32::try_from(capacity).is_err() => {
            Err(shape("a cache has less than 2^32 rows", capacity))
        }
        _ => Ok(()),
    }
}

pub(crate) fn shape(problem: &'static str, have: usize) -> KernelError {
    KernelError::Shape { problem, have }
}

impl Kernels {
    /// Elements as f32.
    fn widen(self, float: FloatType, source: &[u8], out: &mut Vec<f32>) {
        out.clear();
        out.resize(source.len() / float.bytes(), 0.0);
        let widened = self.cast(source, float, FloatType::F32, bytemuck::cast_slice_mut(out));
        debug_assert_eq!(widened, Ok(()));
    }

    /// Rounds f32 to elements.
    fn narrow(self, float: FloatType, values: &[f32], out: &mut [u8]) {
        let narrowed = self.cast(bytemuck::cast_slice(values), FloatType::F32, float, out);
        debug_assert_eq!(narrowed, Ok(()));
    }
}
