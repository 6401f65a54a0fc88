//! Weights of other methods against rules that are written differently, on every instruction set.

use proptest::prelude::*;
use tightfit_kernels::half::{bf16, f16};
use tightfit_kernels::{
    FloatType, Isa, KernelError, Kernels, SourceCodes, SourceMatrix, SourceRows, SourceScale,
};

fn all() -> Vec<Kernels> {
    Isa::available()
        .map(|isa| Kernels::new(isa).unwrap())
        .collect()
}

/// The value of a code, from its fields by the formula of its format.
fn value(kind: SourceCodes, code: u8) -> f64 {
    let minifloat = |exponent_bits: u32, mantissa_bits: u32| {
        let sign = if code >> (exponent_bits + mantissa_bits) & 1 == 1 {
            -1.0
        } else {
            1.0
        };
        let bias = (1 << (exponent_bits - 1)) - 1;
        let exponent = i32::from(code >> mantissa_bits & ((1u32 << exponent_bits) - 1) as u8);
        let mantissa = f64::from(code & ((1u32 << mantissa_bits) - 1) as u8)
            / f64::from(1u32 << mantissa_bits);
        sign * match exponent {
            0 => mantissa * 2f64.powi(1 - bias),
            _ => (1.0 + mantissa) * 2f64.powi(exponent - bias),
        }
    };
    match kind {
        SourceCodes::F8E4M3 if code & 0x7f == 0x7f => f64::NAN,
        SourceCodes::F8E4M3 => minifloat(4, 3),
        SourceCodes::F8E5M2 => match code & 0x7f {
            0x7c => f64::INFINITY.copysign(if code > 0x7f { -1.0 } else { 1.0 }),
            0x7d.. => f64::NAN,
            _ => minifloat(5, 2),
        },
        SourceCodes::F4E2M1 => minifloat(2, 1),
        SourceCodes::Int4 => f64::from(code) - 8.0,
        _ => unreachable!(),
    }
}

fn scale(kind: SourceScale, bytes: &[u8]) -> f32 {
    match kind {
        SourceScale::Float(FloatType::F32) => f32::from_le_bytes(bytes.try_into().unwrap()),
        SourceScale::Float(FloatType::F16) => {
            f16::from_le_bytes(bytes.try_into().unwrap()).to_f32()
        }
        SourceScale::Float(FloatType::Bf16) => {
            bf16::from_le_bytes(bytes.try_into().unwrap()).to_f32()
        }
        SourceScale::E8M0 if bytes[0] == 255 => f32::NAN,
        _ => 2f64.powi(i32::from(bytes[0]) - 127) as f32,
    }
}

/// Element by element.
fn expected(matrix: &SourceMatrix, rows: &SourceRows<'_>, to: FloatType) -> Vec<u8> {
    let (first_row, codes, scales) = (rows.first, rows.codes, rows.scales);
    let mut out = Vec::new();
    let row_bytes = matrix.codes.bytes(matrix.columns);
    let elements = codes.len() / row_bytes * matrix.columns;
    for element in 0..elements {
        let (row, column) = (element / matrix.columns, element % matrix.columns);
        let code = match matrix.codes.bits() {
            8 => codes[element],
            _ => codes[row * row_bytes + column / 2] >> (4 * (column % 2)) & 0xf,
        };
        let tile_row = (first_row + row) / matrix.tile[0] - first_row / matrix.tile[0];
        let tile = tile_row * matrix.scale_columns() + column / matrix.tile[1];
        let each = matrix.scale.bytes();
        let scale = scale(matrix.scale, &scales[tile * each..][..each]);
        let zero = rows.zeros.get(tile).map_or(0.0, |&zero| f64::from(zero));
        let value = value(matrix.codes, code) - zero;
        let product = match matrix.scale {
            // All in the exponent, which f64 has room for.
            SourceScale::Ldexp => {
                let exponent = i32::from(scales[tile * each]) - 127;
                (value * 2f64.powi(exponent)) as f32
            }
            _ => value as f32 * scale,
        };
        match to {
            FloatType::F32 => out.extend(product.to_le_bytes()),
            FloatType::F16 => out.extend(f16::from_f32(product).to_le_bytes()),
            FloatType::Bf16 => out.extend(bf16::from_f32(product).to_le_bytes()),
        }
    }
    out
}

/// The bits, but one for all NaN.
fn bits(bytes: &[u8], to: FloatType) -> Vec<u32> {
    bytes
        .chunks_exact(to.bytes())
        .map(|bytes| {
            let (value, bits) = match to {
                FloatType::F32 => {
                    let value = f32::from_le_bytes(bytes.try_into().unwrap());
                    (value, value.to_bits())
                }
                FloatType::F16 => {
                    let value = f16::from_le_bytes(bytes.try_into().unwrap());
                    (value.to_f32(), value.to_bits().into())
                }
                FloatType::Bf16 => {
                    let value = bf16::from_le_bytes(bytes.try_into().unwrap());
                    (value.to_f32(), value.to_bits().into())
                }
            };
            if value.is_nan() { u32::MAX } else { bits }
        })
        .collect()
}

const CODES: [SourceCodes; 4] = [
    SourceCodes::F8E4M3,
    SourceCodes::F8E5M2,
    SourceCodes::F4E2M1,
    SourceCodes::Int4,
];

#[test]
fn every_code_with_every_power_of_two() {
    for codes in CODES {
        for scale in [SourceScale::E8M0, SourceScale::Exponent, SourceScale::Ldexp] {
            let all_codes: Vec<u8> = (0..=255).collect();
            let columns = all_codes.len() * 8 / codes.bits();
            let matrix = SourceMatrix {
                codes,
                columns,
                tile: [1, columns],
                scale,
            };
            let rows = all_codes.repeat(256);
            let scales: Vec<u8> = (0..=255).collect();
            let rows = SourceRows {
                first: 0,
                codes: &rows,
                scales: &scales,
                zeros: &[],
            };
            for to in FloatType::ALL {
                let want = bits(&expected(&matrix, &rows, to), to);
                for kernels in all() {
                    let mut out = vec![0; 256 * columns * to.bytes()];
                    kernels.decode(&matrix, &rows, to, &mut out).unwrap();
                    assert!(
                        bits(&out, to) == want,
                        "{codes:?} {scale:?} {to} {}",
                        kernels.isa()
                    );
                }
            }
        }
    }
}

fn matrices() -> impl Strategy<Value = (SourceMatrix, usize, usize)> {
    let scales = prop_oneof![
        prop::sample::select(FloatType::ALL.to_vec()).prop_map(SourceScale::Float),
        Just(SourceScale::E8M0),
        Just(SourceScale::Exponent),
        Just(SourceScale::Ldexp),
    ];
    let tile = prop_oneof![1usize..9, Just(16), Just(usize::MAX / 2)];
    (
        prop::sample::select(CODES.to_vec()),
        // The last two fill a register but for half a byte.
        prop_oneof![1usize..40, Just(31), Just(63)],
        (prop_oneof![1usize..5, Just(usize::MAX)], tile),
        scales,
        0usize..9,
        0usize..7,
    )
        .prop_map(|(codes, columns, (rows, tile), scale, first_row, count)| {
            let even = if codes.bits() == 4 { 2 } else { 1 };
            let matrix = SourceMatrix {
                codes,
                columns,
                tile: [rows, tile * even],
                scale,
            };
            (matrix, first_row, count)
        })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_tiles_from_any_row(
        (matrix, first_row, rows) in matrices(),
        bytes in prop::collection::vec(any::<u8>(), 1000),
        has_zeros: bool,
    ) {
        let mut bytes = bytes.into_iter().cycle();
        let mut take = |count: usize| -> Vec<u8> { bytes.by_ref().take(count).collect() };
        let codes = take(rows * matrix.codes.bytes(matrix.columns));
        let tiles = match rows {
            0 => 0,
            _ => (first_row + rows - 1) / matrix.tile[0] - first_row / matrix.tile[0] + 1,
        };
        let tiles = tiles * matrix.scale_columns();
        let scales = take(tiles * matrix.scale.bytes());
        let zeros: Vec<i8> = match has_zeros && matrix.codes == SourceCodes::Int4 {
            true => take(tiles).into_iter().map(|byte| byte as i8 >> 4).collect(),
            false => Vec::new(),
        };
        let given = SourceRows { first: first_row, codes: &codes, scales: &scales, zeros: &zeros };
        for to in FloatType::ALL {
            let want = bits(&expected(&matrix, &given, to), to);
            for kernels in all() {
                let mut out = vec![0xa5; rows * matrix.columns * to.bytes()];
                kernels.decode(&matrix, &given, to, &mut out).unwrap();
                prop_assert_eq!(&bits(&out, to), &want, "{}", kernels.isa());
            }
        }
    }
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let matrix = SourceMatrix {
        codes: SourceCodes::F4E2M1,
        columns: 64,
        tile: [1, 32],
        scale: SourceScale::E8M0,
    };
    let kernels = Kernels::detect();
    let decode = |matrix: &SourceMatrix, codes: usize, scales: usize, out: usize| {
        let (codes, scales, mut out) = (vec![0; codes], vec![0; scales], vec![0; out]);
        let rows = SourceRows {
            first: 0,
            codes: &codes,
            scales: &scales,
            zeros: &[],
        };
        kernels.decode(matrix, &rows, FloatType::Bf16, &mut out)
    };
    assert_eq!(decode(&matrix, 64, 4, 256), Ok(()));
    for (codes, scales, out) in [(63, 4, 256), (64, 3, 256), (64, 5, 256), (64, 4, 255)] {
        let error = decode(&matrix, codes, scales, out).unwrap_err();
        assert!(matches!(error, KernelError::Length { .. }), "{error}");
    }
    // Floating-point formats have no other zero, and there is one for each tile.
    for (codes, zeros) in [(SourceCodes::F4E2M1, 4), (SourceCodes::Int4, 3)] {
        let matrix = SourceMatrix { codes, ..matrix };
        let rows = SourceRows {
            first: 0,
            codes: &[0; 64],
            scales: &[0; 4],
            zeros: &vec![1; zeros],
        };
        let error = kernels.decode(&matrix, &rows, FloatType::Bf16, &mut [0; 256]);
        assert!(matches!(
            error,
            Err(KernelError::Length { what: "zeros", .. })
        ));
    }
    for (columns, tile) in [(0, [1, 2]), (4, [0, 2]), (4, [1, 0]), (4, [1, 3])] {
        let matrix = SourceMatrix {
            columns,
            tile,
            ..matrix
        };
        let error = decode(&matrix, 0, 0, 0).unwrap_err();
        assert!(matches!(error, KernelError::SourceTile { .. }), "{error}");
    }
}
