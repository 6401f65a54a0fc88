//! Sequences of calls that make sense, for a fuzzer to start from.

/// A name, the bytes, and how many calls they make that go well.
type Seed = (&'static str, Vec<u8>, usize);

/// Much quota, with what is said and written looked at.
const HEADER: [u8; 2] = [255, 3];

/// Opens the checkpoint and loads it on the first device: its table, head, router and norm as they are, a matrix in 4
/// bits, and the experts in 4 bits with quantized scales.
fn load() -> Vec<u8> {
    let (stored, quantized, double) = ([60, 1], [60, 5, 1], [60, 4, 1]);
    let mut bytes = vec![14, 0, 19, 0, 0];
    bytes.extend(stored);
    bytes.extend(quantized);
    bytes.extend(stored.repeat(2));
    bytes.extend(double);
    bytes.extend(stored.repeat(2));
    // Headroom.
    bytes.extend([0, 0]);
    bytes
}

/// Four buffers: 2048 bytes of f32 numbers, 256 of ids from 0 to 3, and two of 8192 bytes that are empty.
const BUFFERS: [u8; 14] = [47, 3, 133, 2, 7, 128, 0, 8, 130, 1, 3, 64, 7, 7];
const BUFFERS_WELL: usize = 6;

/// Of floats, rows, and the place of each.
const F32: u8 = 0;
const BF16: u8 = 5;
const THREE: u8 = 2;
const FOUR: u8 = 3;
const EIGHT: u8 = 4;
const THIRTY_TWO: u8 = 7;
const X: [u8; 2] = [0, 0];
const IDS: [u8; 2] = [1, 0];
const Y: [u8; 2] = [2, 0];
const Z: [u8; 2] = [3, 0];

/// So many times 16 bytes behind a place.
fn behind([buffer, _]: [u8; 2], sixteens: u8) -> [u8; 2] {
    [buffer, 128 + sixteens]
}

fn sequence(parts: &[&[u8]]) -> Vec<u8> {
    [&HEADER[..]]
        .iter()
        .chain(parts)
        .copied()
        .flatten()
        .copied()
        .collect()
}

/// The committed seeds of the target `program`.
pub fn program_seeds() -> Vec<Seed> {
    vec![
        ("model", model(), 13),
        ("buffers", buffers(), 8),
        ("products", products(), BUFFERS_WELL + 17),
        ("codes", codes(), BUFFERS_WELL + 7),
        ("decoder", decoder(), BUFFERS_WELL + 16),
        ("output", output(), 3),
        // A handle of which there is none.
        ("forged", sequence(&[&[7]]), 0),
    ]
}

/// Opened, looked at, loaded, looked up, read, dequantized, unloaded and closed.
fn model() -> Vec<u8> {
    let looks = [
        22, 0, 1, 0, 23, 0, 1, 1, 0, 100, 25, 0, 1, 0, 100, 2, 45, 0, 34, 21, 0,
    ];
    // Files beside the weights: one that is there, one that is not, and one that is not read.
    let files = [48, 0, 0, 2, 5, 48, 1, 0, 0, 0, 48, 2, 0, 0, 0, 16, 0];
    sequence(&[&load(), &looks, &files])
}

/// Two that are taken, one written, read, copied, quantized and freed.
fn buffers() -> Vec<u8> {
    sequence(&[
        &[0, 0, 128, 0, 4, 0, 0, 128, 0, 4],
        &[5, 0, 10, 0, 7, 100, 7, 0, 0, 100, 8, 1, 0, 9, 0, 100],
        &[9, 0, 0, F32, 64, 1, 1, 0, 1, 224 + 16, 4, 0],
        &[4, 0],
    ])
}

/// With a model's own matrix and its experts: alone, in a list of which one takes what another gives, and after the
/// model is gone.
fn products() -> Vec<u8> {
    let one = |weight: u8, more: &[u8], output: [u8; 2]| {
        let mut bytes = vec![weight];
        bytes.extend(X);
        bytes.extend([THREE, F32]);
        bytes.extend(output);
        bytes.extend(more);
        bytes
    };
    let with_bias = [&[1][..], &Y].concat();
    let chosen = [&[4][..], &IDS].concat();
    sequence(&[
        &load(),
        &BUFFERS,
        &[27, 0, 1, 27, 0, 4],
        &[32, 0, THREE, 32, 1, EIGHT],
        &[29, 1],
        &one(0, &[0], Y),
        &[30, 3],
        &one(0, &[4], Y),
        &one(0, &with_bias, Z),
        &one(1, &chosen, behind(Z, 64)),
        &[21, 0],
        &[31, 1],
        &one(1, &chosen, Y),
        &[34, 33, 0, 33, 1],
    ])
}

/// With codes and scales in buffers that are freed before they are used.
fn codes() -> Vec<u8> {
    sequence(&[
        &BUFFERS,
        // [64, 96] would need more than there is; of [16, 64] the codes have 512 bytes and the scales 64.
        &[9],
        &X,
        &[F32, 128, 0, 2, 1],
        &Z,
        &behind(Z, 32),
        &[28, 0, 1, 0],
        &Z,
        &behind(Z, 32),
        &[4, 3],
        &[29, 1, 0],
        &X,
        &[THREE, F32],
        &Y,
        &[0],
        &[34, 7, 2, 0, 127, 33, 0],
    ])
}

/// All that a layer computes between products, with an id that is no row.
fn decoder() -> Vec<u8> {
    let heads = [1, 9, F32, THREE];
    let cache = [&[EIGHT][..], &behind(Z, 0), &behind(Z, 64)].concat();
    sequence(&[
        &load(),
        &BUFFERS,
        &[35, 0, 3],
        &IDS,
        &[THREE],
        &Y,
        &[36, 0, 5],
        &X,
        &[THREE, 0],
        &Y,
        &[37, F32, THREE, THIRTY_TWO, 1, 0],
        &X,
        &behind(X, 32),
        &[1],
        &behind(X, 64),
        &Y,
        &[38, F32, 100],
        &Y,
        &X,
        &[39, 0, BF16, 100],
        &X,
        &behind(X, 32),
        &Y,
        &[40],
        &heads,
        &[1, 0, 1],
        &behind(X, 64),
        &[0, 0],
        &X,
        &[16],
        &IDS,
        &Y,
        &X,
        &behind(X, 24),
        &cache,
        &[41],
        &heads,
        &cache,
        &IDS,
        &[0, EIGHT, 4],
        &X,
        &Y,
        &[42, F32, THREE, EIGHT, 1, 1],
        &X,
        &Y,
        &behind(Y, 16),
        &[43, F32, THREE, THIRTY_TWO, FOUR, 0],
        &X,
        &Y,
        &behind(Y, 16),
        &[44, F32, THREE, 1, EIGHT],
        &X,
        &behind(X, 32),
        &Y,
        &[45, 0],
        // Ids that are numbers of another kind: no rows of the table.
        &[35, 0, 3],
        &X,
        &[EIGHT],
        &Y,
        &[45, 0, 34],
    ])
}

/// Something, nothing, what is too long, and something again.
fn output() -> Vec<u8> {
    let too_long = 69_000u64.to_le_bytes();
    sequence(&[&[46, 100, 46, 0, 46, 200, 240], &too_long, &[46, 1]])
}
