//! Attention over a cache of keys and values [capacity, kv_heads, head_size], and what fills it.

use std::num::NonZeroUsize;

use super::{Attention, Faults, Rotation, Visible, rows::on_threads};
use crate::{KernelError, Kernels, error::check_length, linear::add_products_with};

/// Keys that are looked at together.
const KEYS: usize = 64;

/// Multiplications for which another thread is worth it.
const WORK_OF_THREAD: usize = 1 << 18;

/// Where the rows of a rotation lie, as bytes.
#[derive(Debug)]
pub struct RotationOperands<'a> {
    /// Queries [rows, query_heads, head_size], rotated in place.
    pub queries: &'a mut [u8],
    /// Keys [rows, kv_heads, head_size], which go to the cache.
    pub keys: &'a [u8],
    /// Values, likewise.
    pub values: &'a [u8],
    /// The weight of a norm of each head of queries \[head_size\], if there is one.
    pub query_norm: Option<&'a [u8]>,
    /// That of a norm of each head of keys.
    pub key_norm: Option<&'a [u8]>,
    /// The position of each row: its angle, and its place in the cache.
    pub positions: &'a [u32],
    /// Angles of one position [rotary / 2]: the "inverse frequencies".
    pub frequencies: &'a [f32],
    /// The cache's keys [capacity, kv_heads, head_size].
    pub key_cache: &'a mut [u8],
    /// Its values, likewise.
    pub value_cache: &'a mut [u8],
}

impl Kernels {
    /// Prepares attention: norms of heads, rotary embedding of queries and keys, and keys and values into the
    /// cache.
    ///
    /// An angle is the position as f32 times the frequency, rounded to f32, as PyTorch has it. Frequencies and
    /// `scaling` are what llama3, yarn and linear scaling differ in.
    ///
    /// Of a row whose position is behind the cache the keys and values go nowhere, and
    /// [`Faults::POSITION`] says so. Where two rows have one position it is not specified whose are kept.
    ///
    /// # Errors
    /// [`KernelError::Shape`] and [`KernelError::Length`].
    pub fn rotate(
        self,
        rotation: &Rotation,
        operands: RotationOperands<'_>,
    ) -> Result<Faults, KernelError> {
        rotation.check()?;
        let RotationOperands {
            queries,
            keys,
            values,
            query_norm,
            key_norm,
            positions,
            frequencies,
            key_cache,
            value_cache,
        } = operands;
        let heads = &rotation.heads;
        let bytes = |elements: usize| elements.saturating_mul(heads.float.bytes());
        let head = bytes(heads.head_size);
        check_length("queries", bytes(heads.query_elements()), queries.len())?;
        check_length("keys", bytes(heads.kv_elements(heads.rows)), keys.len())?;
        check_length("values", keys.len(), values.len())?;
        let cache = bytes(heads.kv_elements(rotation.capacity));
        check_length("key_cache", cache, key_cache.len())?;
        check_length("value_cache", cache, value_cache.len())?;
        check_length("positions", heads.rows, positions.len())?;
        check_length("frequencies", rotation.rotary / 2, frequencies.len())?;
        let mut norms = [vec![], vec![]];
        for (what, norm, widened) in [("query_norm", query_norm, 0), ("key_norm", key_norm, 1)] {
            if let Some(norm) = norm {
                check_length(what, head, norm.len())?;
                self.widen(heads.float, norm, &mut norms[widened]);
            }
        }
        let mut faults = Faults::NONE;
        let mut buffer = vec![];
        for (row, position) in positions.iter().enumerate() {
            let turns: Vec<(f32, f32)> = frequencies
                .iter()
                .map(|frequency| {
                    let (sine, cosine) = (*position as f32 * frequency).sin_cos();
                    (sine * rotation.scaling, cosine * rotation.scaling)
                })
                .collect();
            let of_row = head * heads.query_heads;
            for query in queries[row * of_row..][..of_row].chunks_exact_mut(head) {
                self.widen(heads.float, query, &mut buffer);
                turn(rotation, &mut buffer, &norms[0], &turns);
                self.narrow(heads.float, &buffer, query);
            }
            if *position as usize >= rotation.capacity {
                faults = faults.with(Faults::POSITION);
                continue;
            }
            let of_row = head * heads.kv_heads;
            let (from, to) = (row * of_row, *position as usize * of_row);
            value_cache[to..][..of_row].copy_from_slice(&values[from..][..of_row]);
            let places = key_cache[to..][..of_row].chunks_exact_mut(head);
            for (key, place) in keys[from..].chunks_exact(head).zip(places) {
                self.widen(heads.float, key, &mut buffer);
                turn(rotation, &mut buffer, &norms[1], &turns);
                self.narrow(heads.float, &buffer, place);
            }
        }
        Ok(faults)
    }

    /// Computes [`Attention`]: `y` [rows, query_heads, head_size] of `queries` of the same shape, and of
    /// a cache's keys and values [capacity, kv_heads, head_size], as bytes.
    ///
    /// `positions` has one for each row, and is not looked at with [`Visible::First`]. A position behind the
    /// cache counts as its last one, and [`Faults::POSITION`] says so. The softmax is made step by step
    /// in f32, without overflow.
    ///
    /// # Errors
    /// [`KernelError::Shape`] and [`KernelError::Length`].
    #[expect(
        clippy::too_many_arguments,
        reason = "each is one thing that a caller has to decide"
    )]
    pub fn attend(
        self,
        attention: &Attention,
        queries: &[u8],
        key_cache: &[u8],
        value_cache: &[u8],
        positions: &[u32],
        y: &mut [u8],
        threads: NonZeroUsize,
    ) -> Result<Faults, KernelError> {
        let cache = [key_cache, value_cache];
        self.attend_while(attention, queries, cache, positions, y, threads, &|| true)
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "each is one thing that a caller has to decide"
    )]
    pub(super) fn attend_while(
        self,
        attention: &Attention,
        queries: &[u8],
        [key_cache, value_cache]: [&[u8]; 2],
        positions: &[u32],
        y: &mut [u8],
        threads: NonZeroUsize,
        keep_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<Faults, KernelError> {
        attention.check()?;
        let heads = &attention.heads;
        let bytes = |elements: usize| elements.saturating_mul(heads.float.bytes());
        check_length("queries", bytes(heads.query_elements()), queries.len())?;
        check_length("y", queries.len(), y.len())?;
        let cache = bytes(heads.kv_elements(attention.capacity));
        check_length("key_cache", cache, key_cache.len())?;
        check_length("value_cache", cache, value_cache.len())?;
        let mut faults = Faults::NONE;
        if matches!(attention.visible, Visible::Causal { .. }) {
            check_length("positions", heads.rows, positions.len())?;
            if positions
                .iter()
                .any(|at| *at as usize >= attention.capacity)
            {
                faults = Faults::POSITION;
            }
        }
        let seen = |row: usize| attention.seen(positions.get(row).copied().unwrap_or(0));
        let work = (0..heads.rows).map(|row| seen(row).len()).sum::<usize>();
        let work = work.saturating_mul(heads.query_heads * heads.head_size);
        let threads = threads.get().min(work / WORK_OF_THREAD + 1);

        // A unit is a row's queries that look at the same keys.
        let group = heads.query_heads / heads.kv_heads;
        let of_unit = bytes(group * heads.head_size);
        let units = heads.rows * heads.kv_heads;
        let share = units.div_ceil(threads).max(1);
        let cache = Cache {
            kernels: self,
            attention,
            keys: key_cache,
            values: value_cache,
            keep_on,
        };
        let pieces = y.chunks_mut(share * of_unit).enumerate();
        let pieces = pieces.map(|(i, y)| (i * share, y)).collect();
        on_threads(pieces, |(first, y): (usize, &mut [u8])| {
            let mut buffers = Buffers::default();
            for (i, y) in y.chunks_exact_mut(of_unit).enumerate() {
                let (row, kv_head) = ((first + i) / heads.kv_heads, (first + i) % heads.kv_heads);
                let queries = &queries[(first + i) * of_unit..][..of_unit];
                cache.attend(queries, kv_head, seen(row), &mut buffers);
                self.narrow(heads.float, &buffers.sums, y);
            }
        });
        Ok(faults)
    }
}

/// Norm, if there are weights, and rotation of a head.
fn turn(rotation: &Rotation, head: &mut [f32], norm: &[f32], turns: &[(f32, f32)]) {
    if !norm.is_empty() {
        let sum: f32 = head.iter().map(|value| value * value).sum();
        let factor = 1.0 / (sum / head.len() as f32 + rotation.norm_eps).sqrt();
        for (value, weight) in head.iter_mut().zip(norm) {
            *value *= factor * (rotation.norm_weight_offset + weight);
        }
    }
    let (first, second) = head.split_at_mut(turns.len());
    for ((a, b), (sine, cosine)) in first.iter_mut().zip(second).zip(turns) {
        (*a, *b) = (*a * cosine - *b * sine, *b * cosine + *a * sine);
    }
}

struct Cache<'a> {
    kernels: Kernels,
    attention: &'a Attention,
    keys: &'a [u8],
    values: &'a [u8],
    keep_on: &'a (dyn Fn() -> bool + Sync),
}

#[derive(Default)]
struct Buffers {
    queries: Vec<f32>,
    /// Rows of a tile, of keys or of values.
    tile: Vec<f32>,
    row: Vec<f32>,
    /// [queries, KEYS].
    scores: Vec<f32>,
    most: Vec<f32>,
    total: Vec<f32>,
    /// [queries, head_size]; the result.
    sums: Vec<f32>,
}

impl Cache<'_> {
    fn attend(
        &self,
        queries: &[u8],
        kv_head: usize,
        seen: std::ops::Range<usize>,
        buffers: &mut Buffers,
    ) {
        let heads = &self.attention.heads;
        let (size, stride) = (heads.head_size, heads.kv_heads * heads.head_size);
        let add = add_products_with(self.kernels.isa());
        let Buffers {
            queries: widened,
            tile,
            row,
            scores,
            most,
            total,
            sums,
        } = buffers;
        self.kernels.widen(heads.float, queries, widened);
        let count = widened.len() / size;
        for query in widened.iter_mut() {
            *query *= self.attention.scale;
        }
        scores.resize(count * KEYS, 0.0);
        most.clear();
        most.resize(count, f32::NEG_INFINITY);
        total.clear();
        total.resize(count, 0.0);
        sums.clear();
        sums.resize(count * size, 0.0);

        for begin in seen.clone().step_by(KEYS) {
            if !(self.keep_on)() {
                return;
            }
            let keys = seen.end.min(begin + KEYS) - begin;
            let mut load = |from: &[u8], tile: &mut Vec<f32>| {
                tile.clear();
                for key in begin..begin + keys {
                    let at = (key * stride + kv_head * size) * heads.float.bytes();
                    let from = &from[at..][..size * heads.float.bytes()];
                    self.kernels.widen(heads.float, from, row);
                    tile.extend_from_slice(row);
                }
            };
            load(self.keys, tile);
            for (query, scores) in widened
                .chunks_exact(size)
                .zip(scores.chunks_exact_mut(KEYS))
            {
                for (four, scores) in scores[..keys].chunks_mut(4).enumerate() {
                    let of_keys = std::array::from_fn(|i| {
                        // Where there are less than four, the last one comes more than once.
                        let key = 4 * four + i.min(scores.len() - 1);
                        bytemuck::cast_slice(&tile[key * size..][..size])
                    });
                    let mut products = [0.0; 4];
                    add(query, &of_keys, &mut products);
                    scores.copy_from_slice(&products[..scores.len()]);
                }
            }
            load(self.values, tile);
            for query in 0..count {
                let scores = &mut scores[query * KEYS..][..keys];
                // NaN is not larger than anything.
                let now = scores.iter().copied().fold(most[query], f32::max);
                // Where all are negative infinity, so are the differences.
                let base = if now == f32::NEG_INFINITY { 0.0 } else { now };
                let shrink = (most[query] - base).exp();
                most[query] = now;
                for score in scores.iter_mut() {
                    *score = (*score - base).exp();
                }
                total[query] = total[query] * shrink + scores.iter().sum::<f32>();
                let sums = &mut sums[query * size..][..size];
                for sum in sums.iter_mut() {
                    *sum *= shrink;
                }
                for (score, value) in scores.iter().zip(tile.chunks_exact(size)) {
                    for (sum, value) in sums.iter_mut().zip(value) {
                        *sum += score * value;
                    }
                }
            }
        }
        for (sums, total) in sums.chunks_exact_mut(size).zip(&*total) {
            for sum in sums {
                *sum /= total;
            }
        }
    }
}
