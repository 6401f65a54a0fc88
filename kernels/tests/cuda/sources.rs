//! Quantizing from the codes of other methods: the bytes of decoding first.

use tightfit_kernels::cuda::SourceRun;
use tightfit_kernels::{BlockSize, FloatType, SourceCodes, SourceMatrix, SourceRows, SourceScale};

use crate::calls::{Coded, Misaligned, Quantized, quantize_source};
use crate::device::Device;
use crate::values::{Random, SPECIAL, floats, portable, to_bytes};
use crate::weights::{assert_quantized, definition};

const CODES: [SourceCodes; 4] = [
    SourceCodes::F8E4M3,
    SourceCodes::F8E5M2,
    SourceCodes::F4E2M1,
    SourceCodes::Int4,
];

/// A weight in rows that may be padded.
struct Weight {
    codes: SourceCodes,
    columns: usize,
    rows: usize,
    row_bytes: usize,
    tile: [usize; 2],
    bytes: Vec<u8>,
    scales: Vec<f32>,
}

impl Weight {
    /// Of random codes; scales are what `scale` gives.
    fn new(
        random: &mut Random,
        codes: SourceCodes,
        [rows, columns]: [usize; 2],
        tile: [usize; 2],
        padding: usize,
        mut scale: impl FnMut(&mut Random) -> f32,
    ) -> Weight {
        let row_bytes = codes.bytes(columns) + padding;
        let tile = [tile[0].min(rows), tile[1].min(columns)];
        let tiles = rows.div_ceil(tile[0]) * columns.div_ceil(tile[1]);
        Weight {
            codes,
            columns,
            rows,
            row_bytes,
            tile,
            bytes: (0..rows * row_bytes).map(|_| random.next() as u8).collect(),
            scales: (0..tiles).map(|_| scale(random)).collect(),
        }
    }

    /// What the processor makes of all of it.
    fn decoded(&self, float: FloatType) -> Vec<u8> {
        let matrix = SourceMatrix {
            codes: self.codes,
            columns: self.columns,
            tile: self.tile,
            scale: SourceScale::Float(FloatType::F32),
        };
        let without_padding: Vec<u8> = self
            .bytes
            .chunks(self.row_bytes)
            .flat_map(|row| &row[..self.codes.bytes(self.columns)])
            .copied()
            .collect();
        let rows = SourceRows {
            first: 0,
            codes: &without_padding,
            scales: &to_bytes(&self.scales),
            zeros: &[],
        };
        let mut out = vec![0; self.rows * self.columns * float.bytes()];
        portable()
            .decode(&matrix, &rows, float, &mut out)
            .expect("lengths");
        out
    }

    /// Some elements, with nothing around that is not needed.
    fn run(&self, first: usize, elements: usize, float: FloatType) -> Coded {
        let (row, column) = (first / self.columns, first % self.columns);
        let short = |n: usize| u32::try_from(n).expect("not too long");
        let run = SourceRun {
            codes: self.codes,
            row_bytes: self.row_bytes as u64,
            columns: short(self.columns),
            tile: self.tile.map(short),
            first_row: short(row % self.tile[0]),
            first_column: short(column),
        };
        let begin = row * self.row_bytes + column * self.codes.bits() / 8;
        let first_scale = row / self.tile[0] * self.columns.div_ceil(self.tile[1]);
        Coded {
            run,
            codes: self.bytes[begin..][..run.code_bytes(elements)].to_vec(),
            scales: to_bytes(&self.scales[first_scale..][..run.scales(elements)]),
            float,
            elements,
        }
    }
}

/// A run of the weight against the same of the decoded one.
fn check(
    device: &mut dyn Device,
    weight: &Weight,
    decoded: &[u8],
    float: FloatType,
    (first, elements): (usize, usize),
    block_size: BlockSize,
    misaligned: Misaligned,
) -> Quantized {
    let source = weight.run(first, elements, float);
    let decoded = &decoded[first * float.bytes()..][..elements * float.bytes()];
    let need = definition(decoded, float, block_size);
    let have = quantize_source(device, &source, block_size, misaligned);
    let what = format!(
        "{:?}, {elements} elements from {first} on to {float}, block size {block_size}, {misaligned:?}",
        source.run
    );
    assert_quantized(&have, &need, &what);
    have
}

/// Scales as they are, and those at which something changes.
fn any_scale(random: &mut Random) -> f32 {
    match random.below(6) {
        0 => random.pick(&SPECIAL),
        1 => f32::from_bits(random.next() as u32),
        2 => 2f32.powi(random.below(254) as i32 - 127),
        3 => random.weight(1.0) * random.pick(&[1e-44, 1e-38, 1e-6, 300.0, 3e38]),
        _ => random.weight(0.02),
    }
}

pub(crate) fn every_code_with_every_kind_of_scale(device: &mut dyn Device) {
    let mut random = Random(11);
    for codes in CODES {
        // All codes of 8 bits, or pairs of 4, in each row.
        let columns = 256 * 8 / codes.bits();
        let mut scales = SPECIAL.iter();
        let mut weight = Weight::new(
            &mut random,
            codes,
            [SPECIAL.len() + 40, columns],
            [1, usize::MAX],
            0,
            |random| scales.next().copied().unwrap_or_else(|| any_scale(random)),
        );
        for (index, byte) in weight.bytes.iter_mut().enumerate() {
            *byte = (index * 37) as u8;
        }
        for float in [FloatType::Bf16, FloatType::F16] {
            let decoded = weight.decoded(float);
            for block_size in [32, 64, 4096].map(|n| BlockSize::new(n).expect("valid")) {
                let all = (0, weight.rows * columns);
                let aligned = Misaligned::default();
                check(device, &weight, &decoded, float, all, block_size, aligned);
                // The same one by one.
                let odd = Misaligned {
                    elements: 1,
                    ..aligned
                };
                check(device, &weight, &decoded, float, all, block_size, odd);
            }
        }
    }
}

pub(crate) fn any_run_of_any_weight(device: &mut dyn Device) {
    let mut random = Random(12);
    for round in 0..240 {
        let codes = CODES[round % CODES.len()];
        let columns = match random.below(4) {
            0 => 1 + random.below(12),
            1 => 1 + random.below(700),
            2 => 8 * (1 + random.below(100)),
            // One row is more than a thread block does.
            _ => 128 * (1 + random.below(100)),
        };
        let rows = 1 + random.below(12_000 / columns + 5);
        let even = if codes.bits() == 4 { 2 } else { 1 };
        let tile = match random.below(7) {
            0 => [1, 32],
            1 => [1, 16],
            2 => [128, 128],
            3 => [1, usize::MAX],
            4 => [usize::MAX, usize::MAX],
            _ => [1 + random.below(9), even * (1 + random.below(40))],
        };
        let padding = random.pick(&[0, 0, 1, 3, 8]);
        let has_any = random.below(2) == 0;
        let weight = Weight::new(
            &mut random,
            codes,
            [rows, columns],
            tile,
            padding,
            |random| match has_any {
                true => any_scale(random),
                false => random.weight(0.02),
            },
        );
        let float = random.pick(&[FloatType::Bf16, FloatType::Bf16, FloatType::F16]);
        let decoded = weight.decoded(float);
        let all = rows * columns;
        for _ in 0..2 {
            let first = random.below(all);
            let first = random.pick(&[0, first, first / 32 * 32]);
            let elements = 1 + random.below(all - first);
            let block_size = random.pick(&BlockSize::ALL);
            let misaligned = match random.below(3) {
                0 => Misaligned {
                    elements: random.below(16),
                    packed: random.below(16),
                    absmax: 4 * random.below(4),
                },
                _ => Misaligned::default(),
            };
            let run = (first, elements);
            check(
                device, &weight, &decoded, float, run, block_size, misaligned,
            );
        }
    }
}

/// Pieces that begin at blocks, wherever that is in rows and tiles, equal the whole.
pub(crate) fn pieces_of_a_weight_as_it_is_loaded(device: &mut dyn Device) {
    let mut random = Random(13);
    for (codes, shape, tile) in [
        (SourceCodes::F8E4M3, [70, 384], [64, 128]),
        (SourceCodes::F8E4M3, [131, 201], [1, usize::MAX]),
        (SourceCodes::F4E2M1, [50, 544], [1, 32]),
        (SourceCodes::F4E2M1, [64, 320], [1, 16]),
        (SourceCodes::Int4, [40, 513], [1, usize::MAX]),
    ] {
        let scale = |random: &mut Random| random.weight(0.1);
        let weight = Weight::new(&mut random, codes, shape, tile, 0, scale);
        for float in [FloatType::Bf16, FloatType::F16] {
            let decoded = weight.decoded(float);
            for block_size in [32, 64, 4096].map(|n| BlockSize::new(n).expect("valid")) {
                let all = shape[0] * shape[1];
                let whole = definition(&decoded, float, block_size);
                let (mut packed, mut absmax) = (vec![], vec![]);
                let step = block_size.elements() * (1 + 5000 / block_size.elements());
                for first in (0..all).step_by(step) {
                    let run = (first, step.min(all - first));
                    let aligned = Misaligned::default();
                    let piece = check(device, &weight, &decoded, float, run, block_size, aligned);
                    packed.extend(piece.packed);
                    absmax.extend(floats(&piece.absmax));
                }
                assert!(packed == whole.packed && to_bytes(&absmax) == whole.absmax);
            }
        }
    }
}
