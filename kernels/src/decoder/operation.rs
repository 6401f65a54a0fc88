//! Operations as data, for whoever gives them to a device: what their operands are, and what they are on the
//! processor.

use std::num::NonZeroUsize;

use super::{
    Attention, Faults, RmsNorm, Rotation, RotationOperands, check_columns,
    choose::{check_route, check_top},
    shape,
};
use crate::{Activation, FloatType, KernelError, Kernels, error::check_length};

/// Something that a decoder computes between its products.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Operation {
    /// [`Kernels::rms_norm`], or with `add` [`Kernels::add_rms_norm`]. Operands: x, add, weight, y.
    RmsNorm {
        /// What norm it is.
        norm: RmsNorm,
        /// Whether something is added to x before.
        add: bool,
    },
    /// [`Kernels::gate`]. Operands: gate, up, y.
    Gate {
        /// The type of everything.
        float: FloatType,
        /// What is made of gate and up; not [`Activation::Clamped`].
        activation: Activation,
        /// How many there are of each.
        elements: usize,
    },
    /// [`Kernels::add`]. Operands: x, add.
    Add {
        /// The type of both.
        float: FloatType,
        /// How many there are of each.
        elements: usize,
    },
    /// [`Kernels::gather`]. Operands: the table, ids, y.
    Gather {
        /// The type of the table.
        float: FloatType,
        /// How many ids there are.
        rows: usize,
        /// Rows of the table.
        table_rows: usize,
        /// Elements of a row.
        columns: usize,
    },
    /// [`Kernels::dense`]. Operands: weights, x, the bias, y.
    Dense {
        /// The type of everything.
        float: FloatType,
        /// Rows of x and y, rows of the weights, columns of both.
        lengths: [usize; 3],
        /// Whether there is a bias.
        bias: bool,
    },
    /// [`Kernels::rotate`]. Operands: queries, keys, values, the norm's weight of queries and that of keys,
    /// positions, frequencies, the cache's keys and its values.
    Rotate {
        /// What is rotated and how.
        rotation: Rotation,
        /// Whether there are norms of heads of queries, and of keys.
        norms: [bool; 2],
    },
    /// [`Kernels::attend`]. Operands: queries, the cache's keys and its values, positions, y.
    Attend {
        /// What attention it is.
        attention: Attention,
        /// About how many keys a row sees at most. It decides how work is dealt out, never what comes out.
        most: usize,
    },
    /// [`Kernels::top`]. Operands: x, ids, values.
    Top {
        /// The type of x.
        float: FloatType,
        /// Rows, columns, and how many are asked for.
        lengths: [usize; 3],
    },
    /// [`Kernels::route`]. Operands: scores, ids, weights.
    Route {
        /// The type of the scores.
        float: FloatType,
        /// Rows, experts, and how many are chosen.
        lengths: [usize; 3],
        /// Whether weights are a softmax over the chosen ones.
        normalize: bool,
    },
    /// [`Kernels::combine`]. Operands: x, weights, y.
    Combine {
        /// The type of x and y.
        float: FloatType,
        /// Rows, how many are summed up, columns.
        lengths: [usize; 3],
    },
}

/// What an operation needs an operand to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OperandShape {
    /// What it is, for messages.
    pub name: &'static str,
    /// Elements of it.
    pub elements: usize,
    /// Bytes of an element.
    pub size: usize,
    /// What its address has to be a multiple of on a GPU.
    pub align: usize,
    /// Whether it is written.
    pub is_written: bool,
    /// Elements of it that belong to each row of the operation; none where all belong to all rows.
    pub of_row: Option<usize>,
}

impl OperandShape {
    /// Returns its bytes; what is too much for the processor is as much as there can be.
    pub const fn bytes(&self) -> usize {
        self.elements.saturating_mul(self.size)
    }
}

/// An operand in the processor's memory.
#[derive(Debug)]
pub enum Operand<'a> {
    /// Only read.
    Read(&'a [u8]),
    /// Written, and perhaps read.
    Written(&'a mut [u8]),
}

impl Operation {
    /// Looks whether there can be such an operation.
    ///
    /// # Errors
    /// [`KernelError::Shape`].
    pub fn check(&self) -> Result<(), KernelError> {
        match self {
            Operation::RmsNorm { norm, .. } => check_columns(norm.columns),
            Operation::Gather { columns, .. } => check_columns(*columns),
            Operation::Rotate { rotation, .. } => rotation.check(),
            Operation::Attend { attention, .. } => attention.check(),
            Operation::Combine { lengths, .. } => {
                check_columns(lengths[1].saturating_mul(lengths[2]))
            }
            Operation::Top { lengths, .. } => check_top(lengths[1], lengths[2]),
            Operation::Route { lengths, .. } => check_route(lengths[1], lengths[2]),
            Operation::Gate {
                activation: Activation::Clamped { .. },
                ..
            } => Err(shape("gates are of silu or gelu", 0)),
            _ => Ok(()),
        }
    }

    /// Returns whether it can find faults in what its operands hold.
    pub const fn may_find_faults(&self) -> bool {
        matches!(
            self,
            Operation::Gather { .. } | Operation::Rotate { .. } | Operation::Attend { .. }
        )
    }

    /// Returns what its operands have to be, in their order; those that it does without are left out.
    pub fn operands(&self) -> Vec<OperandShape> {
        let shape = |name, elements: usize, size| OperandShape {
            name,
            elements,
            size,
            align: size,
            is_written: false,
            of_row: None,
        };
        let by_row = |shape, of_row| OperandShape {
            of_row: Some(of_row),
            ..shape
        };
        let written = |name, elements, size| OperandShape {
            is_written: true,
            ..shape(name, elements, size)
        };
        let vector = |shape| OperandShape { align: 16, ..shape };
        let times = |a: usize, b: usize| a.saturating_mul(b);
        match *self {
            Operation::RmsNorm { norm, add } => {
                let (size, all) = (norm.float.bytes(), times(norm.rows, norm.columns));
                let x = OperandShape {
                    is_written: add,
                    ..by_row(shape("x", all, size), norm.columns)
                };
                let more = add.then(|| by_row(shape("what is added", all, size), norm.columns));
                let weight = shape("the weight", norm.columns, size);
                let y = by_row(written("y", all, size), norm.columns);
                [x].into_iter().chain(more).chain([weight, y]).collect()
            }
            Operation::Gate {
                float, elements, ..
            } => vec![
                by_row(shape("the gate", elements, float.bytes()), 1),
                by_row(shape("up", elements, float.bytes()), 1),
                by_row(written("y", elements, float.bytes()), 1),
            ],
            Operation::Add { float, elements } => vec![
                by_row(written("x", elements, float.bytes()), 1),
                by_row(shape("what is added", elements, float.bytes()), 1),
            ],
            Operation::Gather {
                float,
                rows,
                table_rows,
                columns,
            } => vec![
                shape("the table", times(table_rows, columns), float.bytes()),
                by_row(shape("ids", rows, 4), 1),
                by_row(written("y", times(rows, columns), float.bytes()), columns),
            ],
            Operation::Dense {
                float,
                lengths: [rows, outputs, inputs],
                bias,
            } => {
                let size = float.bytes();
                let operands = [
                    shape("weights", times(outputs, inputs), size),
                    by_row(shape("x", times(rows, inputs), size), inputs),
                ];
                let bias = bias.then(|| shape("the bias", outputs, size));
                let y = by_row(written("y", times(rows, outputs), size), outputs);
                operands.into_iter().chain(bias).chain([y]).collect()
            }
            Operation::Rotate { rotation, norms } => {
                let (heads, size) = (&rotation.heads, rotation.heads.float.bytes());
                let new = heads.kv_elements(heads.rows);
                let [query_row, kv_row] =
                    [heads.query_heads, heads.kv_heads].map(|count| times(count, heads.head_size));
                let cache = heads.kv_elements(rotation.capacity);
                let names = ["the norm of queries", "the norm of keys"];
                let norms = names
                    .into_iter()
                    .zip(norms)
                    .filter(|(_, is_there)| *is_there);
                let norms = norms.map(|(name, _)| vector(shape(name, heads.head_size, size)));
                [
                    by_row(
                        vector(written("queries", heads.query_elements(), size)),
                        query_row,
                    ),
                    by_row(vector(shape("keys", new, size)), kv_row),
                    by_row(vector(shape("values", new, size)), kv_row),
                ]
                .into_iter()
                .chain(norms)
                .chain([
                    by_row(shape("positions", heads.rows, 4), 1),
                    shape("frequencies", rotation.rotary / 2, 4),
                    vector(written("the cache's keys", cache, size)),
                    vector(written("the cache's values", cache, size)),
                ])
                .collect()
            }
            Operation::Attend { attention, .. } => {
                let (heads, size) = (&attention.heads, attention.heads.float.bytes());
                let cache = heads.kv_elements(attention.capacity);
                let row = times(heads.query_heads, heads.head_size);
                let queries = vector(shape("queries", heads.query_elements(), size));
                let y = vector(written("y", heads.query_elements(), size));
                vec![
                    by_row(queries, row),
                    vector(shape("the cache's keys", cache, size)),
                    vector(shape("the cache's values", cache, size)),
                    by_row(shape("positions", heads.rows, 4), 1),
                    by_row(y, row),
                ]
            }
            Operation::Top {
                float,
                lengths: [rows, columns, k],
            } => vec![
                by_row(shape("x", times(rows, columns), float.bytes()), columns),
                by_row(written("ids", times(rows, k), 4), k),
                by_row(written("values", times(rows, k), 4), k),
            ],
            Operation::Combine {
                float,
                lengths: [rows, k, columns],
            } => {
                let row = times(k, columns);
                vec![
                    by_row(shape("x", times(rows, row), float.bytes()), row),
                    by_row(shape("weights", times(rows, k), 4), k),
                    by_row(written("y", times(rows, columns), float.bytes()), columns),
                ]
            }
            Operation::Route {
                float,
                lengths: [rows, experts, k],
                ..
            } => vec![
                by_row(
                    shape("scores", times(rows, experts), float.bytes()),
                    experts,
                ),
                by_row(written("ids", times(rows, k), 4), k),
                by_row(written("weights", times(rows, k), 4), k),
            ],
        }
    }

    /// Returns its rows: what it does for one does not depend on others. Of what is done element by element each
    /// is a row.
    pub const fn rows(&self) -> usize {
        match self {
            Operation::RmsNorm { norm, .. } => norm.rows,
            Operation::Gate { elements, .. } | Operation::Add { elements, .. } => *elements,
            Operation::Gather { rows, .. } => *rows,
            Operation::Dense { lengths, .. }
            | Operation::Top { lengths, .. }
            | Operation::Combine { lengths, .. }
            | Operation::Route { lengths, .. } => lengths[0],
            Operation::Rotate { rotation, .. } => rotation.heads.rows,
            Operation::Attend { attention, .. } => attention.heads.rows,
        }
    }

    /// Returns the same operation of so many rows.
    #[must_use]
    pub const fn with_rows(mut self, count: usize) -> Operation {
        match &mut self {
            Operation::RmsNorm { norm, .. } => norm.rows = count,
            Operation::Gate { elements, .. } | Operation::Add { elements, .. } => *elements = count,
            Operation::Gather { rows, .. } => *rows = count,
            Operation::Dense { lengths, .. }
            | Operation::Top { lengths, .. }
            | Operation::Combine { lengths, .. }
            | Operation::Route { lengths, .. } => lengths[0] = count,
            Operation::Rotate { rotation, .. } => rotation.heads.rows = count,
            Operation::Attend { attention, .. } => attention.heads.rows = count,
        }
        self
    }

    /// Returns about how many bytes it moves: what takes longer for its arithmetic counts as more.
    pub fn work(&self) -> u64 {
        let times = |lengths: &[usize]| {
            let lengths = lengths.iter().map(|length| *length as u64);
            lengths.fold(1, u64::saturating_mul)
        };
        // A table and a cache are not gone through.
        let operands = self.operands().into_iter();
        let moved = operands
            .filter(|operand| match self {
                Operation::Gather { .. } | Operation::Rotate { .. } | Operation::Attend { .. } => {
                    operand.of_row.is_some()
                }
                _ => true,
            })
            .map(|operand| operand.bytes() as u64)
            .fold(1, u64::saturating_add);
        let more = match self {
            // Each row looks at so many keys and values, and each query of it multiplies them.
            Operation::Attend { attention, .. } => {
                let (heads, seen) = (&attention.heads, attention.seen(u32::MAX).len());
                let of_cache = times(&[heads.rows, heads.kv_heads, seen, heads.head_size]);
                let of_queries = times(&[heads.rows, heads.query_heads, seen, heads.head_size]);
                of_cache
                    .saturating_mul(2 * heads.float.bytes() as u64)
                    .saturating_add(of_queries / 4)
            }
            // Eight rows at a time take the weights once.
            Operation::Dense {
                lengths: [rows, outputs, inputs],
                ..
            } => times(&[rows / 8, *outputs, *inputs]) / 2,
            // Sorted some at a time.
            Operation::Top {
                lengths: [rows, columns, k],
                ..
            } if *k > 1 => times(&[*rows, *columns, 32]),
            Operation::Route {
                lengths: [rows, experts, k],
                ..
            } => times(&[*rows, *experts, *k]),
            _ => 0,
        };
        moved.saturating_add(more)
    }
}

impl Kernels {
    /// Does an operation on operands in memory, in the order of [`Operation::operands`].
    ///
    /// Products and attention ask `keep_on` every few milliseconds, from all threads: once it says no they end, and
    /// what is in written operands then is not specified.
    ///
    /// # Errors
    /// [`KernelError::Shape`], and [`KernelError::Length`] if operands are missing, of another length, or only read
    /// where they have to be written.
    pub fn decode_step(
        self,
        operation: &Operation,
        operands: Vec<Operand<'_>>,
        threads: NonZeroUsize,
        keep_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<Faults, KernelError> {
        operation.check()?;
        let shapes = operation.operands();
        check_length("operands", shapes.len(), operands.len())?;
        for (shape, operand) in shapes.iter().zip(&operands) {
            let have = match operand {
                Operand::Written(bytes) => bytes.len(),
                Operand::Read(_) if shape.is_written => 0,
                Operand::Read(bytes) => bytes.len(),
            };
            check_length(shape.name, shape.bytes(), have)?;
        }
        let mut operands = Operands(operands.into_iter());
        let done = |()| Faults::NONE;
        match *operation {
            Operation::RmsNorm { norm, add: false } => {
                let [x, weight] = [operands.read(), operands.read()];
                self.rms_norm(&norm, x, weight, operands.written())
                    .map(done)
            }
            Operation::RmsNorm { norm, add: true } => {
                let x = operands.written();
                let [add, weight] = [operands.read(), operands.read()];
                self.add_rms_norm(&norm, x, add, weight, operands.written())
                    .map(done)
            }
            Operation::Gate {
                float, activation, ..
            } => {
                let [gate, up] = [operands.read(), operands.read()];
                self.gate(float, activation, gate, up, operands.written())
                    .map(done)
            }
            Operation::Add { float, .. } => {
                let x = operands.written();
                self.add(float, x, operands.read()).map(done)
            }
            Operation::Gather { float, columns, .. } => {
                let table = operands.read();
                let ids = words(operands.read());
                self.gather(float, columns, table, &ids, operands.written())
            }
            Operation::Dense {
                float,
                lengths,
                bias,
            } => {
                let [weights, x] = [operands.read(), operands.read()];
                let bias = bias.then(|| operands.read());
                self.dense(
                    float,
                    lengths,
                    weights,
                    x,
                    bias,
                    operands.written(),
                    threads,
                )
                .map(done)
            }
            Operation::Rotate { rotation, norms } => {
                let queries = operands.written();
                let [keys, values] = [operands.read(), operands.read()];
                let query_norm = norms[0].then(|| operands.read());
                let key_norm = norms[1].then(|| operands.read());
                let positions = words(operands.read());
                let frequencies = words(operands.read()).into_iter().map(f32::from_bits);
                let frequencies: Vec<f32> = frequencies.collect();
                let operands = RotationOperands {
                    queries,
                    keys,
                    values,
                    query_norm,
                    key_norm,
                    positions: &positions,
                    frequencies: &frequencies,
                    key_cache: operands.written(),
                    value_cache: operands.written(),
                };
                self.rotate(&rotation, operands)
            }
            Operation::Attend { attention, .. } => {
                let [queries, keys, values] = [operands.read(), operands.read(), operands.read()];
                let positions = words(operands.read());
                let y = operands.written();
                let cache = [keys, values];
                self.attend_while(&attention, queries, cache, &positions, y, threads, keep_on)
            }
            Operation::Top {
                float,
                lengths: [rows, columns, k],
            } => {
                let x = operands.read();
                let (mut ids, mut values) = (vec![0; rows * k], vec![0.0; rows * k]);
                self.top(float, [rows, columns, k], x, &mut ids, &mut values)?;
                write(operands.written(), ids);
                write(operands.written(), values.into_iter().map(f32::to_bits));
                Ok(Faults::NONE)
            }
            Operation::Combine { float, lengths } => {
                let x = operands.read();
                let weights = words(operands.read()).into_iter().map(f32::from_bits);
                let weights: Vec<f32> = weights.collect();
                self.combine(float, lengths, x, &weights, operands.written())
                    .map(done)
            }
            Operation::Route {
                float,
                lengths: [rows, experts, k],
                normalize,
            } => {
                let x = operands.read();
                let lengths = [rows, experts, k];
                let (mut ids, mut weights) = (vec![0; rows * k], vec![0.0; rows * k]);
                self.route(float, lengths, normalize, x, &mut ids, &mut weights)?;
                write(operands.written(), ids.into_iter().map(|id| id as u32));
                write(operands.written(), weights.into_iter().map(f32::to_bits));
                Ok(Faults::NONE)
            }
        }
    }
}

/// Operands that have been checked, one after the other.
struct Operands<'a>(std::vec::IntoIter<Operand<'a>>);

impl<'a> Operands<'a> {
    fn read(&mut self) -> &'a [u8] {
        match self.0.next() {
            Some(Operand::Read(bytes)) => bytes,
            Some(Operand::Written(bytes)) => bytes,
            None => &[],
        }
    }

    fn written(&mut self) -> &'a mut [u8] {
        match self.0.next() {
            Some(Operand::Written(bytes)) => bytes,
            _ => &mut [],
        }
    }
}

fn words(bytes: &[u8]) -> Vec<u32> {
    let (words, _) = bytes.as_chunks::<4>();
    words.iter().map(|word| u32::from_le_bytes(*word)).collect()
}

fn write(to: &mut [u8], words: impl IntoIterator<Item = u32>) {
    let (places, _) = to.as_chunks_mut::<4>();
    for (place, word) in places.iter_mut().zip(words) {
        *place = word.to_le_bytes();
    }
}
