//! What a decoder computes between its products, in f64, and cases of it for whatever computes it.

use std::num::NonZeroUsize;

use tightfit_kernels::decoder::{
    Attention, Faults, Heads, Operation, RmsNorm, Rotation, RotationOperands, Visible,
};
use tightfit_kernels::{Activation, FloatType, Kernels};

use crate::layers::{Dice, activate};

/// What computes: the processor with one of its instruction sets, or a GPU.
pub(crate) trait Decoder {
    /// Does an operation. Operands are in its order, and written ones are changed.
    fn run(&mut self, operation: &Operation, operands: &mut [Vec<u8>]) -> Faults;
}

/// What is in memory that has to be written.
const UNWRITTEN: u8 = 0xee;

fn unwritten(bytes: usize) -> Vec<u8> {
    vec![UNWRITTEN; bytes]
}

fn to_words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn words(bytes: &[u8]) -> Vec<u32> {
    let (words, _) = bytes.as_chunks::<4>();
    words.iter().map(|word| u32::from_le_bytes(*word)).collect()
}

impl dyn Decoder + '_ {
    fn rms_norm(
        &mut self,
        norm: &RmsNorm,
        x: &mut Vec<u8>,
        add: Option<&[u8]>,
        weight: &[u8],
    ) -> Vec<u8> {
        let operation = Operation::RmsNorm {
            norm: *norm,
            add: add.is_some(),
        };
        let mut operands = vec![x.clone()];
        operands.extend(add.map(<[u8]>::to_vec));
        operands.extend([weight.to_vec(), unwritten(x.len())]);
        assert_eq!(self.run(&operation, &mut operands), Faults::NONE);
        x.clone_from(&operands[0]);
        operands.pop().expect("y")
    }

    fn gate(
        &mut self,
        float: FloatType,
        activation: Activation,
        gate: &[u8],
        up: &[u8],
    ) -> Vec<u8> {
        let operation = Operation::Gate {
            float,
            activation,
            elements: gate.len() / float.bytes(),
        };
        let mut operands = [gate.to_vec(), up.to_vec(), unwritten(gate.len())];
        assert_eq!(self.run(&operation, &mut operands), Faults::NONE);
        let [_, _, y] = operands;
        y
    }

    fn add(&mut self, float: FloatType, x: &mut Vec<u8>, add: &[u8]) {
        let elements = x.len() / float.bytes();
        let mut operands = [x.clone(), add.to_vec()];
        let faults = self.run(&Operation::Add { float, elements }, &mut operands);
        assert_eq!(faults, Faults::NONE);
        [*x, _] = operands;
    }

    fn gather(
        &mut self,
        float: FloatType,
        table_rows: usize,
        columns: usize,
        table: &[u8],
        ids: &[u32],
    ) -> (Vec<u8>, Faults) {
        let y = unwritten(ids.len() * columns * float.bytes());
        let mut operands = [table.to_vec(), to_words(ids), y];
        let operation = Operation::Gather {
            float,
            rows: ids.len(),
            table_rows,
            columns,
        };
        let faults = self.run(&operation, &mut operands);
        let [_, _, y] = operands;
        (y, faults)
    }

    fn dense(
        &mut self,
        float: FloatType,
        lengths: [usize; 3],
        weights: &[u8],
        x: &[u8],
        bias: Option<&[u8]>,
    ) -> Vec<u8> {
        let operation = Operation::Dense {
            float,
            lengths,
            bias: bias.is_some(),
        };
        let mut operands = vec![weights.to_vec(), x.to_vec()];
        operands.extend(bias.map(<[u8]>::to_vec));
        operands.push(unwritten(lengths[0] * lengths[1] * float.bytes()));
        assert_eq!(self.run(&operation, &mut operands), Faults::NONE);
        operands.pop().expect("y")
    }

    fn rotate(&mut self, rotation: &Rotation, operands: RotationOperands<'_>) -> Faults {
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
        let operation = Operation::Rotate {
            rotation: *rotation,
            norms: [query_norm.is_some(), key_norm.is_some()],
        };
        let mut all = vec![queries.to_vec(), keys.to_vec(), values.to_vec()];
        all.extend(query_norm.map(<[u8]>::to_vec));
        all.extend(key_norm.map(<[u8]>::to_vec));
        let frequencies: Vec<u32> = frequencies.iter().map(|x| x.to_bits()).collect();
        all.extend([to_words(positions), to_words(&frequencies)]);
        all.extend([key_cache.to_vec(), value_cache.to_vec()]);
        let faults = self.run(&operation, &mut all);
        queries.copy_from_slice(&all[0]);
        value_cache.copy_from_slice(&all.pop().expect("values"));
        key_cache.copy_from_slice(&all.pop().expect("keys"));
        faults
    }

    fn attend(
        &mut self,
        attention: &Attention,
        queries: &[u8],
        [keys, values]: [&[u8]; 2],
        positions: &[u32],
    ) -> (Vec<u8>, Faults) {
        let operation = Operation::Attend {
            attention: *attention,
            most: attention.capacity,
        };
        let mut operands = [
            queries.to_vec(),
            keys.to_vec(),
            values.to_vec(),
            to_words(positions),
            unwritten(queries.len()),
        ];
        let faults = self.run(&operation, &mut operands);
        let [.., y] = operands;
        (y, faults)
    }

    fn top(&mut self, float: FloatType, lengths: [usize; 3], x: &[u8]) -> (Vec<u32>, Vec<f32>) {
        let results = unwritten(lengths[0] * lengths[2] * 4);
        let mut operands = [x.to_vec(), results.clone(), results];
        let faults = self.run(&Operation::Top { float, lengths }, &mut operands);
        assert_eq!(faults, Faults::NONE);
        let values = words(&operands[2]).into_iter().map(f32::from_bits);
        (words(&operands[1]), values.collect())
    }

    fn route(
        &mut self,
        float: FloatType,
        lengths: [usize; 3],
        normalize: bool,
        scores: &[u8],
    ) -> (Vec<i32>, Vec<f32>) {
        let results = unwritten(lengths[0] * lengths[2] * 4);
        let mut operands = [scores.to_vec(), results.clone(), results];
        let operation = Operation::Route {
            float,
            lengths,
            normalize,
        };
        assert_eq!(self.run(&operation, &mut operands), Faults::NONE);
        let ids = words(&operands[1]).into_iter().map(|id| id as i32);
        let weights = words(&operands[2]).into_iter().map(f32::from_bits);
        (ids.collect(), weights.collect())
    }
}

pub(crate) fn elements(values: &[f32], float: FloatType) -> Vec<u8> {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut out = vec![0; values.len() * float.bytes()];
    let cast = Kernels::detect().cast(&bytes, FloatType::F32, float, &mut out);
    cast.expect("lengths");
    out
}

pub(crate) fn floats(bytes: &[u8], float: FloatType) -> Vec<f32> {
    let mut out = vec![0; bytes.len() / float.bytes() * 4];
    let cast = Kernels::detect().cast(bytes, float, FloatType::F32, &mut out);
    cast.expect("lengths");
    let (floats, _) = out.as_chunks::<4>();
    floats.iter().map(|x| f32::from_le_bytes(*x)).collect()
}

/// Random elements, and their values.
fn random(dice: &mut Dice, count: usize, scale: f32, float: FloatType) -> (Vec<u8>, Vec<f64>) {
    let bytes = elements(&dice.weights(count, scale), float);
    let values = wide(&bytes, float);
    (bytes, values)
}

fn wide(bytes: &[u8], float: FloatType) -> Vec<f64> {
    floats(bytes, float).into_iter().map(f64::from).collect()
}

/// Looks whether results are near what they should be: within half a unit in the last place of the type, and
/// 2^-18 of `of`, the sum of the magnitudes that they are made of.
fn assert_near(have: &[u8], float: FloatType, need: &[f64], of: &[f64], what: &str) {
    let (ulp, smallest) = match float {
        FloatType::F32 => (2f64.powi(-24), 2f64.powi(-149)),
        FloatType::F16 => (2f64.powi(-11), 2f64.powi(-24)),
        FloatType::Bf16 => (2f64.powi(-8), 2f64.powi(-133)),
    };
    let have = wide(have, float);
    assert_eq!(have.len(), need.len(), "{what}");
    assert_eq!(have.len(), of.len(), "{what}");
    for (i, ((have, need), of)) in have.iter().zip(need).zip(of).enumerate() {
        let by = need.abs() * ulp * 1.01 + smallest + of * 2f64.powi(-18);
        assert!(
            (have - need).abs() <= by,
            "{what}: element {i} is {have:e}, not {need:e}"
        );
    }
}

pub(crate) fn norms(decoder: &mut dyn Decoder) {
    let mut dice = Dice(11);
    for float in FloatType::ALL {
        for (rows, columns) in [
            (1, 2048),
            (3, 896),
            (2, 8),
            (4, 1),
            (1, 2056),
            (2, 333),
            (5, 0),
            (0, 8),
        ] {
            for (added, weight_offset) in [(false, 0.0), (true, 0.0), (true, 1.0)] {
                let norm = RmsNorm {
                    float,
                    rows,
                    columns,
                    eps: 1e-3,
                    weight_offset,
                };
                let what = format!("{norm:?}, {added}");
                let (mut x, values) = random(&mut dice, rows * columns, 2.0, float);
                let (add, more) = random(&mut dice, rows * columns, 1.0, float);
                let (weight, weights) = random(&mut dice, columns, 1.0, float);
                let before = x.clone();
                let y = decoder.rms_norm(&norm, &mut x, added.then_some(&add[..]), &weight);
                let mut sums = values;
                if added {
                    let exact = sums.iter().zip(&more).map(|(x, y)| (x + y) as f32);
                    let rounded = elements(&exact.collect::<Vec<f32>>(), float);
                    assert_eq!(x, rounded, "{what}: the sums");
                    sums = wide(&rounded, float);
                } else {
                    assert_eq!(x, before, "{what}: only read");
                }
                let mut need = vec![];
                for row in sums.chunks(columns.max(1)) {
                    let mean = row.iter().map(|x| x * x).sum::<f64>() / columns as f64;
                    let factor = 1.0 / (mean + f64::from(norm.eps)).sqrt();
                    let weights = weights
                        .iter()
                        .map(|weight| weight + f64::from(weight_offset));
                    need.extend(
                        row.iter()
                            .zip(weights)
                            .map(|(x, weight)| x * factor * weight),
                    );
                }
                let of: Vec<f64> = need.iter().map(|y| y.abs()).collect();
                assert_near(&y, float, &need, &of, &what);
            }
        }
    }
}

pub(crate) fn elementwise(decoder: &mut dyn Decoder) {
    let mut dice = Dice(12);
    for float in FloatType::ALL {
        for count in [0, 1, 7, 8, 2048, 2049, 5000] {
            let (a, gates) = random(&mut dice, count, 6.0, float);
            let (b, ups) = random(&mut dice, count, 2.0, float);
            for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
                let pairs = gates.iter().zip(&ups);
                let need: Vec<f64> = pairs.map(|(a, b)| activate(activation, *a, *b)).collect();
                let of: Vec<f64> = gates.iter().zip(&ups).map(|(a, b)| (a * b).abs()).collect();
                let y = decoder.gate(float, activation, &a, &b);
                assert_near(
                    &y,
                    float,
                    &need,
                    &of,
                    &format!("{float}, {activation:?}, {count}"),
                );
            }
            let mut sum = a.clone();
            decoder.add(float, &mut sum, &b);
            let need = gates.iter().zip(&ups).map(|(a, b)| (a + b) as f32);
            assert_eq!(
                sum,
                elements(&need.collect::<Vec<f32>>(), float),
                "{float}, {count}"
            );
        }
    }
}

pub(crate) fn gathering(decoder: &mut dyn Decoder) {
    let mut dice = Dice(13);
    for float in FloatType::ALL {
        for (rows, columns) in [(5, 4), (3, 2049), (1, 1), (7, 0), (0, 3)] {
            let (table, _) = random(&mut dice, rows * columns, 1.0, float);
            let row = columns * float.bytes();
            let mut ids: Vec<u32> = (0..9).map(|_| dice.below(rows.max(1)) as u32).collect();
            for hostile in [false, true] {
                if hostile {
                    ids.extend([rows as u32, u32::MAX, 0, i32::MAX as u32]);
                }
                let (y, faults) = decoder.gather(float, rows, columns, &table, &ids);
                let known = |id: u32| (id as usize) < rows;
                let need = ids.iter().flat_map(|id| match known(*id) {
                    true => table[*id as usize * row..][..row].to_vec(),
                    false => vec![0; row],
                });
                let what = format!("{float}, {rows} x {columns}");
                assert_eq!(y, need.collect::<Vec<u8>>(), "{what}");
                let wrong = columns > 0 && ids.iter().any(|id| !known(*id));
                let need = if wrong { Faults::ID } else { Faults::NONE };
                assert_eq!(faults, need, "{what}");
            }
        }
    }
}

pub(crate) fn dense_products(decoder: &mut dyn Decoder) {
    let mut dice = Dice(14);
    for float in FloatType::ALL {
        for (lengths, biased) in [
            ([1, 37, 2304], false),
            ([1, 8, 264], true),
            ([3, 9, 512], true),
            ([17, 5, 40], false),
            ([2, 3, 7], true),
            ([1, 130, 1], false),
            ([2, 4, 0], true),
            ([0, 4, 8], false),
            ([2, 0, 8], false),
        ] {
            let [rows, outputs, inputs] = lengths;
            let (weights, w) = random(&mut dice, outputs * inputs, 1.0, float);
            let (x, of_x) = random(&mut dice, rows * inputs, 1.0, float);
            let (bias, b) = random(&mut dice, outputs, 1.0, float);
            let y = decoder.dense(float, lengths, &weights, &x, biased.then_some(&bias[..]));
            let (mut need, mut of) = (vec![], vec![]);
            for row in 0..rows {
                for output in 0..outputs {
                    let add = if biased { b[output] } else { 0.0 };
                    let terms =
                        (0..inputs).map(|i| of_x[row * inputs + i] * w[output * inputs + i]);
                    let terms: Vec<f64> = terms.chain([add]).collect();
                    need.push(terms.iter().sum());
                    of.push(terms.iter().map(|term| term.abs()).sum());
                }
            }
            assert_near(&y, float, &need, &of, &format!("{float}, {lengths:?}"));
        }
    }
}

fn heads(float: FloatType, [rows, query_heads, kv_heads, head_size]: [usize; 4]) -> Heads {
    Heads {
        float,
        rows,
        query_heads,
        kv_heads,
        head_size,
    }
}

pub(crate) fn rotations(decoder: &mut dyn Decoder) {
    let mut dice = Dice(15);
    for float in FloatType::ALL {
        for (lengths, rotary, normed, hostile) in [
            ([1, 4, 2, 64], 64, [false, false], false),
            ([3, 6, 2, 128], 128, [true, true], false),
            ([5, 1, 1, 96], 48, [false, true], true),
            ([2, 8, 1, 256], 64, [true, false], true),
            ([4, 3, 3, 8], 8, [false, false], false),
            ([2, 2, 2, 40], 0, [false, false], true),
            ([0, 2, 2, 64], 64, [false, false], false),
        ] {
            let heads = heads(float, lengths);
            let rotation = Rotation {
                heads,
                rotary,
                scaling: 1.25,
                capacity: 9,
                norm_eps: 1e-2,
                norm_weight_offset: 0.5,
            };
            let what = format!("{rotation:?}");
            let (rows, size) = (heads.rows, heads.head_size);
            let (mut queries, q) = random(&mut dice, heads.query_elements(), 2.0, float);
            let (keys, k) = random(&mut dice, heads.kv_elements(rows), 2.0, float);
            let (values, _) = random(&mut dice, heads.kv_elements(rows), 2.0, float);
            let (query_norm, of_queries) = random(&mut dice, size, 1.0, float);
            let (key_norm, of_keys) = random(&mut dice, size, 1.0, float);
            let (mut key_cache, mut need_keys) =
                random(&mut dice, heads.kv_elements(9), 1.0, float);
            let (mut value_cache, _) = random(&mut dice, heads.kv_elements(9), 1.0, float);
            let mut need_values = value_cache.clone();
            let mut positions: Vec<u32> = [7, 2, 8, 0, 3][..rows].to_vec();
            if hostile {
                // Behind the cache, and what would wrap around; of the first one angles are exact.
                positions[0] = 9;
                if rows > 2 {
                    positions[2] = u32::MAX;
                }
            }
            let frequencies: Vec<f32> = (0..rotary / 2)
                .map(|i| 10000f32.powf(-2.0 * i as f32 / rotary as f32))
                .collect();
            let before = key_cache.clone();
            let faults = decoder.rotate(
                &rotation,
                RotationOperands {
                    queries: &mut queries,
                    keys: &keys,
                    values: &values,
                    query_norm: normed[0].then_some(&query_norm[..]),
                    key_norm: normed[1].then_some(&key_norm[..]),
                    positions: &positions,
                    frequencies: &frequencies,
                    key_cache: &mut key_cache,
                    value_cache: &mut value_cache,
                },
            );
            let wrong = positions.iter().any(|at| *at >= 9);
            let need = if wrong {
                Faults::POSITION
            } else {
                Faults::NONE
            };
            assert_eq!(faults, need, "{what}");

            let turn = |head: &[f64], norm: Option<&Vec<f64>>, position: u32| {
                let mut head = head.to_vec();
                if let Some(norm) = norm {
                    let mean = head.iter().map(|x| x * x).sum::<f64>() / size as f64;
                    let factor = 1.0 / (mean + f64::from(rotation.norm_eps)).sqrt();
                    for (x, weight) in head.iter_mut().zip(norm) {
                        *x *= factor * (0.5 + weight);
                    }
                }
                for (i, frequency) in frequencies.iter().enumerate() {
                    let (sine, cosine) = f64::from(position as f32 * frequency).sin_cos();
                    let (a, b) = (head[i], head[i + rotary / 2]);
                    head[i] = (a * cosine - b * sine) * 1.25;
                    head[i + rotary / 2] = (b * cosine + a * sine) * 1.25;
                }
                head
            };
            let of_row = heads.query_heads * size;
            let mut need = vec![];
            for (i, head) in q.chunks(size).enumerate() {
                let norm = normed[0].then_some(&of_queries);
                need.extend(turn(head, norm, positions[i * size / of_row]));
            }
            // What a head is made of is not larger than this.
            assert_near(&queries, float, &need, &vec![16.0; need.len()], &what);
            let mut touched = [false; 9];
            for (row, position) in positions.iter().enumerate() {
                let at = *position as usize;
                if at >= 9 {
                    continue;
                }
                touched[at] = true;
                let of_row = heads.kv_heads * size;
                for (head, to) in k[row * of_row..][..of_row]
                    .chunks(size)
                    .zip(need_keys[at * of_row..].chunks_mut(size))
                {
                    let norm = normed[1].then_some(&of_keys);
                    to.copy_from_slice(&turn(head, norm, *position));
                }
                let bytes = of_row * float.bytes();
                need_values[at * bytes..][..bytes].copy_from_slice(&values[row * bytes..][..bytes]);
            }
            assert_near(
                &key_cache,
                float,
                &need_keys,
                &vec![16.0; need_keys.len()],
                &what,
            );
            assert_eq!(value_cache, need_values, "{what}");
            let bytes = heads.kv_elements(1) * float.bytes();
            for (at, _) in touched.iter().enumerate().filter(|(_, touched)| !**touched) {
                let row = at * bytes..(at + 1) * bytes;
                assert_eq!(key_cache[row.clone()], before[row], "{what}: row {at}");
            }
        }
    }
}

/// Attention in f64, and the sums of the magnitudes of its terms.
fn exact_attention(
    attention: &Attention,
    q: &[f64],
    k: &[f64],
    v: &[f64],
    positions: &[u32],
) -> [Vec<f64>; 2] {
    let heads = &attention.heads;
    let size = heads.head_size;
    let group = heads.query_heads / heads.kv_heads;
    let (mut need, mut of) = (vec![], vec![]);
    for (i, query) in q.chunks(size).enumerate() {
        let (row, kv_head) = (i / heads.query_heads, i % heads.query_heads / group);
        let (begin, end) = match attention.visible {
            Visible::First(count) => (0, count.get()),
            Visible::Causal { window } => {
                let end = (positions[row] as usize).min(attention.capacity - 1) + 1;
                (
                    window.map_or(0, |window| end.saturating_sub(window.get())),
                    end,
                )
            }
        };
        let at = |key: usize| (key * heads.kv_heads + kv_head) * size;
        let scores: Vec<f64> = (begin..end)
            .map(|key| {
                let products = query.iter().zip(&k[at(key)..]).map(|(q, k)| q * k);
                f64::from(attention.scale) * products.sum::<f64>()
            })
            .collect();
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let parts: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
        let all: f64 = parts.iter().sum();
        for e in 0..size {
            let terms = parts.iter().enumerate();
            let terms: Vec<f64> = terms
                .map(|(i, part)| part / all * v[at(begin + i) + e])
                .collect();
            need.push(terms.iter().sum());
            of.push(terms.iter().map(|term| term.abs()).sum());
        }
    }
    [need, of]
}

pub(crate) fn attentions(decoder: &mut dyn Decoder) {
    let mut dice = Dice(16);
    let window = |count| Visible::Causal {
        window: NonZeroUsize::new(count),
    };
    let first = |count| Visible::First(NonZeroUsize::new(count).expect("not 0"));
    for float in FloatType::ALL {
        for (lengths, capacity, visible, positions) in [
            // One row and a long cache, of which it sees all, nothing but itself, and some.
            ([1, 14, 2, 64], 700, window(0), vec![699]),
            ([1, 7, 1, 128], 700, window(0), vec![0]),
            ([1, 8, 2, 128], 500, window(0), vec![64]),
            ([1, 4, 2, 96], 900, window(200), vec![777]),
            ([1, 3, 3, 256], 300, window(0), vec![299]),
            ([1, 10, 1, 40], 200, window(0), vec![150]),
            // Several rows, in any order.
            ([5, 4, 2, 64], 80, window(0), vec![75, 76, 77, 78, 79]),
            ([4, 2, 1, 8], 130, window(0), vec![3, 129, 64, 63]),
            ([3, 2, 2, 192], 40, window(7), vec![2, 20, 39]),
            ([6, 16, 2, 16], 20, first(20), vec![0; 6]),
            ([2, 9, 1, 24], 200, first(129), vec![1, 1]),
            // Positions that are behind the cache.
            ([2, 4, 2, 64], 70, window(0), vec![70, 5]),
            ([1, 4, 4, 64], 300, window(9), vec![u32::MAX]),
            ([0, 4, 4, 64], 30, window(0), vec![]),
        ] {
            let heads = heads(float, lengths);
            let scale = 1.0 / (heads.head_size as f32).sqrt();
            let attention = Attention {
                heads,
                capacity,
                visible,
                scale,
            };
            let what = format!("{attention:?}, {positions:?}");
            let (queries, q) = random(&mut dice, heads.query_elements(), 4.0, float);
            let (keys, k) = random(&mut dice, heads.kv_elements(capacity), 4.0, float);
            let (values, v) = random(&mut dice, heads.kv_elements(capacity), 1.0, float);
            let (y, faults) = decoder.attend(&attention, &queries, [&keys, &values], &positions);
            let [need, of] = exact_attention(&attention, &q, &k, &v, &positions);
            // Scores are f32: what they lose, of the largest, shares gain or lose.
            let of: Vec<f64> = of.iter().map(|of| of * 16.0).collect();
            assert_near(&y, float, &need, &of, &what);
            let causal = matches!(visible, Visible::Causal { .. });
            let wrong = causal && positions.iter().any(|at| *at as usize >= capacity);
            let need = if wrong {
                Faults::POSITION
            } else {
                Faults::NONE
            };
            assert_eq!(faults, need, "{what}");
        }
    }
}

/// Scores that a softmax without care overflows at, one key that has it all, and what is not a number.
pub(crate) fn extreme_attentions(decoder: &mut dyn Decoder) {
    let float = FloatType::F32;
    let heads = heads(float, [1, 2, 1, 64]);
    let attention = Attention {
        heads,
        capacity: 400,
        visible: Visible::Causal { window: None },
        scale: 1.0,
    };
    let queries = elements(&[100.0; 128], float);
    let values: Vec<f32> = (0..400).flat_map(|key| [key as f32; 64]).collect();
    let values = elements(&values, float);
    // The score of key 333 is 640000 above others'.
    let mut k = vec![-50.0f32; 400 * 64];
    k[333 * 64..334 * 64].fill(50.0);
    let keys = elements(&k, float);
    let (y, _) = decoder.attend(&attention, &queries, [&keys, &values], &[399]);
    assert_eq!(floats(&y, float), [333.0; 128]);
    // Without it all have the same share.
    let (y, _) = decoder.attend(&attention, &queries, [&keys, &values], &[300]);
    for y in floats(&y, float) {
        assert!((y - 150.0).abs() < 1e-3, "{y}");
    }
    // Behind what is seen there may be anything.
    k[301 * 64..].fill(f32::NAN);
    let keys = elements(&k, float);
    let (y, _) = decoder.attend(&attention, &queries, [&keys, &values], &[300]);
    for y in floats(&y, float) {
        assert!((y - 150.0).abs() < 1e-3, "{y}");
    }
    let (y, _) = decoder.attend(&attention, &queries, [&keys, &values], &[301]);
    assert!(floats(&y, float).iter().all(|y| y.is_nan()));
}

pub(crate) fn choices(decoder: &mut dyn Decoder) {
    let mut dice = Dice(17);
    for float in FloatType::ALL {
        for (rows, columns, k) in [
            (1, 1, 1),
            (2, 5, 5),
            (1, 9000, 1),
            (1, 9000, 50),
            (3, 2500, 7),
            (1, 300, 256),
            (40, 17, 2),
            (0, 17, 2),
        ] {
            let (mut x, _) = random(&mut dice, rows * columns, 1.0, float);
            for special in [false, true] {
                let mut values = floats(&x, float);
                if special {
                    let specials = [
                        f32::NAN,
                        f32::INFINITY,
                        f32::NEG_INFINITY,
                        0.0,
                        -0.0,
                        -f32::NAN,
                    ];
                    for value in &mut values {
                        // Many that are equal, too.
                        *value = match dice.below(6) {
                            0 => specials[dice.below(6)],
                            1 => 0.5,
                            _ => *value,
                        };
                    }
                    x = elements(&values, float);
                    values = floats(&x, float);
                }
                let (ids, found) = decoder.top(float, [rows, columns, k], &x);
                let what = format!("{float}, {k} of {rows} x {columns}, {special}");
                for (row, (ids, found)) in ids.chunks(k).zip(found.chunks(k)).enumerate() {
                    let values = &values[row * columns..][..columns];
                    let mut need: Vec<usize> = (0..columns).collect();
                    need.sort_by(|a, b| {
                        let (a, b) = (values[*a], values[*b]);
                        let nan = a.is_nan().cmp(&b.is_nan());
                        nan.then(b.partial_cmp(&a).unwrap_or(std::cmp::Ordering::Equal))
                    });
                    for (i, (id, found)) in ids.iter().zip(found).enumerate() {
                        assert_eq!(*id as usize, need[i], "{what}: number {i} of row {row}");
                        assert_eq!(found.to_bits(), values[need[i]].to_bits(), "{what}");
                    }
                }
                assert_eq!((ids.len(), found.len()), (rows * k, rows * k), "{what}");
            }
        }
    }
}

pub(crate) fn routes(decoder: &mut dyn Decoder) {
    let mut dice = Dice(18);
    for float in FloatType::ALL {
        for (rows, experts, k) in [
            (1, 128, 8),
            (11, 60, 4),
            (3, 1, 1),
            (2, 64, 64),
            (1, 512, 10),
            (0, 8, 2),
        ] {
            for normalize in [false, true] {
                let (scores, values) = random(&mut dice, rows * experts, 8.0, float);
                let (ids, weights) = decoder.route(float, [rows, experts, k], normalize, &scores);
                let what = format!("{float}, {k} of {rows} x {experts}, {normalize}");
                assert_eq!((ids.len(), weights.len()), (rows * k, rows * k), "{what}");
                for (row, (ids, weights)) in ids.chunks(k).zip(weights.chunks(k)).enumerate() {
                    let values = &values[row * experts..][..experts];
                    let mut order: Vec<usize> = (0..experts).collect();
                    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
                    let all: f64 = values.iter().map(|x| x.exp()).sum();
                    let of_chosen: f64 = order[..k].iter().map(|i| values[*i].exp()).sum();
                    let all = if normalize { of_chosen } else { all };
                    for (i, (id, weight)) in ids.iter().zip(weights).enumerate() {
                        assert_eq!(*id as usize, order[i], "{what}");
                        let need = values[order[i]].exp() / all;
                        let by = (f64::from(*weight) - need).abs();
                        assert!(by <= need * 2e-6, "{what}: {weight} for {need}");
                    }
                }
            }
        }
    }
}

pub(crate) fn combinations(decoder: &mut dyn Decoder) {
    let mut dice = Dice(19);
    for float in FloatType::ALL {
        for lengths in [
            [1, 8, 300],
            [3, 2, 256],
            [2, 1, 1],
            [2, 0, 5],
            [0, 2, 5],
            [2, 2, 0],
        ] {
            let [rows, k, columns] = lengths;
            let (x, values) = random(&mut dice, rows * k * columns, 2.0, float);
            let (weights, shares) = random(&mut dice, rows * k, 1.0, FloatType::F32);
            let mut operands = [x, weights, unwritten(rows * columns * float.bytes())];
            let operation = Operation::Combine { float, lengths };
            assert_eq!(decoder.run(&operation, &mut operands), Faults::NONE);
            let (mut need, mut of) = (vec![], vec![]);
            for row in 0..rows {
                for column in 0..columns {
                    let parts = row * k..(row + 1) * k;
                    let terms = parts.map(|part| shares[part] * values[part * columns + column]);
                    let terms: Vec<f64> = terms.collect();
                    need.push(terms.iter().sum());
                    of.push(terms.iter().map(|term| term.abs()).sum());
                }
            }
            assert_near(
                &operands[2],
                float,
                &need,
                &of,
                &format!("{float}, {lengths:?}"),
            );
        }
    }
}
