//! Weights of other methods: found by their names and shapes, and decoded whatever part is asked for.

use proptest::prelude::*;
use tightfit_kernels::half::{bf16, f16};
use tightfit_kernels::{Isa, Kernels, SourceCodes, SourceScale};

use super::*;
use crate::types::{Format, Placement, Slice};

/// Tensors of a file: name, type, shape, bytes.
#[derive(Debug, Default, Clone)]
struct Tensors(Vec<(String, &'static str, Vec<u64>, Vec<u8>)>);

impl Tensors {
    fn with(mut self, name: &str, dtype: &'static str, shape: &[u64], bytes: Vec<u8>) -> Tensors {
        self.0.push((name.to_owned(), dtype, shape.to_vec(), bytes));
        self
    }

    /// The same, with bytes that do not matter.
    fn and(self, name: &str, dtype: &'static str, shape: &[u64]) -> Tensors {
        let of_type = DType::from_safetensors_name(dtype).unwrap();
        let length = of_type.tensor_bytes(shape).unwrap();
        let bytes = (0..length).map(|i| (i * 37 % 120) as u8).collect();
        self.with(name, dtype, shape, bytes)
    }

    fn names(&self) -> String {
        let names: Vec<String> = self
            .0
            .iter()
            .map(|(name, dtype, shape, _)| format!("{name} {dtype} {shape:?}"))
            .collect();
        names.join(", ")
    }

    fn file(&self) -> Vec<u8> {
        let mut entries = serde_json::Map::new();
        let mut data: Vec<u8> = Vec::new();
        for (name, dtype, shape, bytes) in &self.0 {
            let offsets = [data.len(), data.len() + bytes.len()];
            data.extend(bytes);
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
            entries.insert(name.clone(), entry);
        }
        let mut bytes = file(&serde_json::Value::from(entries).to_string(), 0);
        bytes.extend(data);
        bytes
    }

    fn open_as(&self, dequantize: Dequantize, config: &str) -> Checkpoint {
        let dir = dir();
        write(&dir, "config.json", config.as_bytes());
        write(&dir, "model.safetensors", &self.file());
        let options = OpenOptions::default().with_dequantize(dequantize);
        Checkpoint::open_with(dir.path(), &options).unwrap()
    }

    fn open(&self) -> Checkpoint {
        self.open_as(Dequantize::All, "{}")
    }
}

fn fp8(scale: &str, dtype: &'static str, shape: &[u64]) -> Tensors {
    Tensors::default()
        .and("a.weight", "F8_E4M3", &[256, 384])
        .and(scale, dtype, shape)
        .and("a.bias", "BF16", &[256])
}

fn encoded(checkpoint: &Checkpoint) -> &Encoded {
    let tensor = &checkpoint.tensors()[0];
    tensor
        .encoded
        .as_deref()
        .unwrap_or_else(|| panic!("{tensor:?}"))
}

#[test]
fn fp8_with_its_scales_is_one_weight_under_every_name() {
    for (scale, dtype, shape, tile) in [
        ("a.weight_scale_inv", "F32", &[2, 3][..], [128, 128]),
        ("a.weight_scale_inv", "F8_E8M0", &[2, 3], [128, 128]),
        ("a.weight_scale_inv", "U8", &[2, 3], [128, 128]),
        ("a.weight_scale_inv", "F32", &[], [u64::MAX; 2]),
        ("a.weight_scale", "F32", &[1], [u64::MAX; 2]),
        ("a.weight_scale", "BF16", &[256, 1], [1, u64::MAX]),
        ("a.weight_scale", "U8", &[256, 12], [1, 32]),
        ("a.scale", "F8_E8M0", &[2, 3], [128, 128]),
        ("a.qscale_weight", "BF16", &[], [u64::MAX; 2]),
    ] {
        let checkpoint = fp8(scale, dtype, shape).open();
        assert_eq!(names(&checkpoint), ["a.weight", "a.bias"], "{scale}");
        let weight = &checkpoint.tensors()[0];
        assert_eq!(
            (weight.dtype, &weight.shape[..]),
            (DType::Bf16, &[256, 384][..])
        );
        assert_eq!(encoded(&checkpoint).tile, tile, "{scale} {shape:?}");
        let counts = checkpoint.encoded();
        assert_eq!((counts.decoded, counts.left, counts.unknown), (1, 0, 0));
        assert_eq!(weight.source_bytes() + 512, checkpoint.source_bytes());
    }
}

#[test]
fn the_block_of_the_configuration_counts_where_it_fits() {
    let tensors = fp8("a.weight_scale_inv", "F32", &[4, 3]);
    for (config, tile) in [
        (
            r#"{"quantization_config":{"weight_block_size":[64,128]}}"#,
            [64, 128],
        ),
        (
            r#"{"text_config":{"quantization_config":{"config_groups":{"g":{"weights":{"block_structure":[70,150]}}}}}}"#,
            [70, 150],
        ),
        (
            r#"{"quantization_config":{"weight_block_size":[128,128]}}"#,
            [64, 128],
        ),
        (
            r#"{"quantization_config":{"weight_block_size":[0,"x"]}}"#,
            [64, 128],
        ),
    ] {
        let checkpoint = tensors.open_as(Dequantize::Auto, config);
        assert_eq!(encoded(&checkpoint).tile, tile, "{config}");
    }
}

#[test]
fn four_bits_are_found_in_every_layout() {
    let stack = Tensors::default()
        .and("e.gate_up_proj_blocks", "U8", &[3, 10, 2, 16])
        .and("e.gate_up_proj_scales", "U8", &[3, 10, 2]);
    let packed = |scale: &'static str, shape: &[u64]| {
        Tensors::default()
            .and("a.weight_packed", "U8", &[10, 32])
            .and("a.weight_scale", scale, shape)
    };
    let deepseek =
        Tensors::default()
            .and("a.weight", "I8", &[10, 32])
            .and("a.scale", "F8_E8M0", &[10, 2]);
    let modelopt = Tensors::default()
        .and("a.weight", "U8", &[10, 32])
        .and("a.weight_scale", "F8_E4M3", &[10, 4])
        .and("a.weight_scale_2", "F32", &[]);
    let int4 = Tensors::default()
        .and("a.weight_packed", "I32", &[10, 8])
        .and("a.weight_scale", "F16", &[10, 2]);
    let nvfp4 = packed("F8_E4M3", &[10, 4]).and("a.weight_global_scale", "F32", &[1]);
    for (tensors, name, dtype, shape, codes, tile) in [
        (
            &stack,
            "e.gate_up_proj",
            DType::Bf16,
            &[3, 10, 64][..],
            SourceCodes::F4E2M1,
            32,
        ),
        (
            &packed("U8", &[10, 2]),
            "a.weight",
            DType::Bf16,
            &[10, 64],
            SourceCodes::F4E2M1,
            32,
        ),
        (
            &packed("F8_E8M0", &[10, 2]),
            "a.weight",
            DType::Bf16,
            &[10, 64],
            SourceCodes::F4E2M1,
            32,
        ),
        (
            &deepseek,
            "a.weight",
            DType::Bf16,
            &[10, 64],
            SourceCodes::F4E2M1,
            32,
        ),
        (
            &modelopt,
            "a.weight",
            DType::Bf16,
            &[10, 64],
            SourceCodes::F4E2M1,
            16,
        ),
        (
            &nvfp4,
            "a.weight",
            DType::Bf16,
            &[10, 64],
            SourceCodes::F4E2M1,
            16,
        ),
        (
            &int4,
            "a.weight",
            DType::F16,
            &[10, 64],
            SourceCodes::Int4,
            32,
        ),
    ] {
        let checkpoint = tensors.open();
        assert_eq!(names(&checkpoint), [name]);
        let weight = &checkpoint.tensors()[0];
        assert_eq!(
            (weight.dtype, &weight.shape[..]),
            (dtype, shape),
            "{}",
            tensors.names()
        );
        assert_eq!(
            (encoded(&checkpoint).codes, encoded(&checkpoint).tile),
            (codes, [1, tile])
        );
        // NF4 would be no smaller: they are what they are, unless the user asks.
        let count = tensors.0.len();
        for dequantize in [Dequantize::Auto, Dequantize::None] {
            let checkpoint = tensors.open_as(dequantize, "{}");
            assert_eq!(checkpoint.tensors().len(), count);
            let counts = checkpoint.encoded();
            assert_eq!((counts.decoded, counts.left, counts.unknown), (0, 1, 0));
            assert!((4250..=4600).contains(&counts.left_millibits), "{counts:?}");
        }
    }
}

#[test]
fn what_only_the_method_needs_is_no_tensor_of_the_model() {
    let checkpoint = fp8("a.weight_scale", "F32", &[])
        .and("a.input_scale", "F32", &[])
        .and("b.input_scale", "F32", &[])
        .and("layers.0.k_scale", "F32", &[])
        .open();
    let kept = ["a.weight", "a.bias", "b.input_scale", "layers.0.k_scale"];
    assert_eq!(names(&checkpoint), kept);
    assert_eq!(checkpoint.encoded().unused, 1);
}

#[test]
fn rows_of_packed_codes_are_as_long_as_is_stated() {
    let tensors = |shape: [i64; 2]| {
        let shape = shape.into_iter().flat_map(i64::to_le_bytes).collect();
        Tensors::default()
            .and("a.weight_packed", "I32", &[4, 3])
            .and("a.weight_scale", "BF16", &[4, 1])
            .with("a.weight_shape", "I64", &[2], shape)
    };
    let checkpoint = tensors([4, 18]).open();
    assert_eq!(checkpoint.tensors()[0].shape, [4, 18]);
    assert_eq!(encoded(&checkpoint).row_bytes, 12);
    assert_eq!(tensors([4, 17]).open().tensors()[0].shape, [4, 17]);
    // Others are no shape of these codes.
    for shape in [
        [4, 16],
        [4, 25],
        [3, 18],
        [4, -18],
        [-1, -1],
        [i64::MAX, i64::MIN],
    ] {
        let checkpoint = tensors(shape).open();
        assert_eq!(checkpoint.encoded().unknown, 1, "{shape:?}");
        assert_eq!(checkpoint.tensors().len(), 3);
    }
}

#[test]
fn what_does_not_belong_together_is_left_as_it_is() {
    let packed = || Tensors::default().and("a.weight_packed", "I32", &[10, 8]);
    let scaled = || packed().and("a.weight_scale", "F16", &[10, 2]);
    for tensors in [
        fp8("a.other", "F32", &[2, 3]),
        fp8("a.weight_scale_inv", "F32", &[3, 3]),
        fp8("a.weight_scale_inv", "F64", &[2, 3]),
        fp8("a.weight_scale_inv", "F8_E4M3", &[2, 3]),
        packed(),
        scaled().and("a.weight_g_idx", "I32", &[64]),
        scaled().and("a.weight", "BF16", &[2]),
        packed().and("a.weight_scale", "F16", &[5, 2]),
        scaled().and("a.weight_zero_point", "I32", &[2, 3]),
        scaled().and("a.weight_zero_point", "I8", &[10, 2]),
        Tensors::default()
            .and("e.x_blocks", "U8", &[3, 10, 2, 8])
            .and("e.x_scales", "U8", &[3, 10, 2]),
        Tensors::default()
            .and("e.x_blocks", "U8", &[2, 16])
            .and("e.x_scales", "U8", &[2]),
        Tensors::default()
            .and("e.x_blocks", "U8", &[0, 10, 2, 16])
            .and("e.x_scales", "U8", &[0, 10, 2]),
        Tensors::default()
            .and("a.weight_packed", "U8", &[10, 32])
            .and("a.weight_scale", "F8_E4M3", &[10, 4])
            .and("a.weight_global_scale", "F32", &[2]),
    ] {
        let checkpoint = tensors.open();
        assert_eq!(
            checkpoint.tensors().len(),
            tensors.0.len(),
            "{}",
            tensors.names()
        );
        let counts = checkpoint.encoded();
        assert_eq!(
            (counts.decoded, counts.left, counts.unknown),
            (0, 0, 1),
            "{}",
            tensors.names()
        );
    }
}

#[test]
fn a_file_that_was_cut_short_is_an_error() {
    let dir = dir();
    let bytes = fp8("a.weight_scale_inv", "F32", &[2, 3]).file();
    let path = write(&dir, "model.safetensors", &bytes);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let opened = fs::File::options().write(true).open(&path).unwrap();
    opened.set_len(bytes.len() as u64 - 600).unwrap();
    let error = checkpoint
        .read_tensor(0, 0, &mut [0; 512 * 384])
        .unwrap_err();
    assert_error!(
        error,
        CheckpointError::CutShort { .. } | CheckpointError::Changed { .. }
    );
}

#[test]
fn opening_stops_wherever_it_looks() {
    let dir = dir();
    let mut tensors = Tensors::default();
    for i in 0..50 {
        let weight = format!("model.layers.{i}.mlp.experts.{i}.up_proj.weight");
        let scale = format!("{weight}_scale_inv");
        tensors = tensors
            .and(&weight, "F8_E4M3", &[8, 8])
            .and(&scale, "F32", &[1, 1]);
    }
    let path = write(&dir, "model.safetensors", &tensors.file());
    stops::stops_everywhere(&path);
}

/// A weight of any geometry in any format, and where its parts are.
#[derive(Debug, Clone)]
struct Case {
    tensors: Tensors,
    /// The value of each element in f64, and the scale by which it is multiplied in f32.
    elements: Vec<(f64, f32)>,
    to: DType,
}

fn e4m3(code: u8) -> f64 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(code >> 3 & 0xf), f64::from(code & 7));
    sign * match exponent {
        0 => mantissa / 8.0 * 2f64.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    }
}

fn e2m1(code: u8) -> f64 {
    let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(code & 7)];
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// What a case is made of, before its bytes are drawn.
#[derive(Debug, Clone)]
struct Geometry {
    kind: usize,
    stack: u64,
    rows: u64,
    columns: u64,
    tile: [u64; 2],
    seed: u64,
}

fn case(of: &Geometry) -> Case {
    let mut state = of.seed;
    let mut byte = move || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 56) as u8
    };
    let (e, n, mut k) = (of.stack, of.rows, of.columns);
    let [tr, tc] = of.tile;
    match of.kind {
        // FP8 in blocks, in a stack or not.
        0 => {
            let (sn, sk) = (n.div_ceil(tr), k.div_ceil(tc));
            let codes: Vec<u8> = (0..e * n * k)
                .map(|_| match byte() {
                    nan if nan & 0x7f == 0x7f => 0,
                    code => code,
                })
                .collect();
            let scales: Vec<f32> = (0..e * sn * sk)
                .map(|_| f32::from(byte()) / 100.0 + 0.001)
                .collect();
            let mut elements = Vec::new();
            for (i, &code) in codes.iter().enumerate() {
                let i = i as u64;
                let (m, r, c) = (i / (n * k), i / k % n, i % k);
                let scale = scales[((m * sn + r / tr) * sk + c / tc) as usize];
                elements.push((e4m3(code), scale));
            }
            let stack: &[u64] = if e > 1 { &[e] } else { &[] };
            let tensors = Tensors::default()
                .with("a.weight", "F8_E4M3", &[stack, &[n, k]].concat(), codes)
                .with(
                    "a.weight_scale_inv",
                    "F32",
                    &[stack, &[sn, sk]].concat(),
                    scales
                        .iter()
                        .flat_map(|scale| scale.to_le_bytes())
                        .collect(),
                );
            Case {
                tensors,
                elements,
                to: DType::Bf16,
            }
        }
        // MXFP4 in a stack.
        1 => {
            k = k.div_ceil(32) * 32;
            let codes: Vec<u8> = (0..e * n * k / 2).map(|_| byte()).collect();
            let scales: Vec<u8> = (0..e * n * k / 32).map(|_| byte() % 40 + 100).collect();
            let mut elements = Vec::new();
            for i in 0..(e * n * k) as usize {
                let code = codes[i / 2] >> (4 * (i % 2)) & 0xf;
                elements.push((e2m1(code), 2f32.powi(i32::from(scales[i / 32]) - 127)));
            }
            let tensors = Tensors::default()
                .with("e.down_proj_blocks", "U8", &[e, n, k / 32, 16], codes)
                .with("e.down_proj_scales", "U8", &[e, n, k / 32], scales);
            Case {
                tensors,
                elements,
                to: DType::Bf16,
            }
        }
        // int4, scales for each group or each row, rows of any length; with zero points or without.
        2 => {
            let group = if of.seed.is_multiple_of(2) { k } else { 8 };
            let has_zeros = (of.seed / 2).is_multiple_of(2);
            if group == 8 {
                k = k.div_ceil(8) * 8;
            }
            let (words, groups) = (k.div_ceil(8), k.div_ceil(group));
            let codes: Vec<u8> = (0..n * words * 4).map(|_| byte()).collect();
            let scales: Vec<f16> = (0..n * groups)
                .map(|_| f16::from_f32(f32::from(byte()) / 300.0))
                .collect();
            let zeros: Vec<u8> = (0..n.div_ceil(8) * groups * 4).map(|_| byte()).collect();
            let mut elements = Vec::new();
            for r in 0..n {
                for c in 0..k {
                    let code = codes[(r * words * 4 + c / 2) as usize] >> (4 * (c % 2)) & 0xf;
                    let word = (r / 8 * groups + c / group) as usize;
                    let zero = match has_zeros {
                        true => zeros[4 * word + (r % 8 / 2) as usize] >> (4 * (r % 2)) & 0xf,
                        false => 8,
                    };
                    let scale = scales[(r * groups + c / group) as usize];
                    elements.push((f64::from(code) - f64::from(zero), scale.to_f32()));
                }
            }
            let shape = [n, k].into_iter().flat_map(u64::to_le_bytes).collect();
            let scales = scales
                .iter()
                .flat_map(|scale| scale.to_le_bytes())
                .collect();
            let mut tensors = Tensors::default()
                .with("a.weight_packed", "I32", &[n, words], codes)
                .with("a.weight_scale", "F16", &[n, groups], scales)
                .with("a.weight_shape", "I64", &[2], shape);
            if has_zeros {
                let shape = [n.div_ceil(8), groups];
                tensors = tensors.with("a.weight_zero_point", "I32", &shape, zeros);
            }
            Case {
                tensors,
                elements,
                to: DType::F16,
            }
        }
        // NVFP4, whose scales are divided.
        _ => {
            k = k.div_ceil(16) * 16;
            let codes: Vec<u8> = (0..n * k / 2).map(|_| byte()).collect();
            let scales: Vec<u8> = (0..n * k / 16).map(|_| byte() % 0x7f).collect();
            let global = f32::from(byte()) * 11.7 + 1.0;
            let mut elements = Vec::new();
            for i in 0..(n * k) as usize {
                let code = codes[i / 2] >> (4 * (i % 2)) & 0xf;
                elements.push((e2m1(code), e4m3(scales[i / 16]) as f32 / global));
            }
            let tensors = Tensors::default()
                .with("a.weight_packed", "U8", &[n, k / 2], codes)
                .with("a.weight_scale", "F8_E4M3", &[n, k / 16], scales)
                .with(
                    "a.weight_global_scale",
                    "F32",
                    &[1],
                    global.to_le_bytes().into(),
                );
            Case {
                tensors,
                elements,
                to: DType::Bf16,
            }
        }
    }
}

impl Case {
    fn decoded(&self) -> Vec<u8> {
        let elements = self.elements.iter();
        elements
            .flat_map(|&(value, scale)| round(value, scale, self.to))
            .collect()
    }
}

fn round(value: f64, scale: f32, to: DType) -> [u8; 2] {
    let product = value as f32 * scale;
    match to {
        DType::F16 => f16::from_f32(product).to_le_bytes(),
        _ => bf16::from_f32(product).to_le_bytes(),
    }
}

/// What was read for a device, decoded element by element.
fn decode_each(
    staged: &[u8],
    ReadCodes { run, scales }: &ReadCodes,
    count: usize,
    to: DType,
) -> Vec<u8> {
    let short = |n: u32| n as usize;
    let [tile_rows, tile_columns] = run.tile.map(short);
    let columns = short(run.columns);
    let byte_of = |column: usize| column * run.codes.bits() / 8;
    let element = |index: usize| {
        let behind = short(run.first_column) + index;
        let (row, column) = (behind / columns, behind % columns);
        let byte = row * run.row_bytes as usize + byte_of(column);
        let code = staged[byte - byte_of(short(run.first_column))];
        let half = code >> (4 * (column % 2)) & 0xf;
        let value = match run.codes {
            SourceCodes::F8E4M3 => e4m3(code),
            SourceCodes::F4E2M1 => e2m1(half),
            _ => f64::from(half) - 8.0,
        };
        let tile_row = (short(run.first_row) + row) / tile_rows;
        let tile = tile_row * columns.div_ceil(tile_columns) + column / tile_columns;
        let (scales, _) = staged[*scales..].as_chunks::<4>();
        round(value, f32::from_le_bytes(scales[tile]), to)
    };
    (0..count).flat_map(element).collect()
}

fn geometries() -> impl Strategy<Value = Geometry> {
    (
        0usize..4,
        1u64..4,
        1u64..40,
        1u64..150,
        [1u64..70, 1u64..160],
        any::<u64>(),
    )
        .prop_map(|(kind, stack, rows, columns, tile, seed)| Geometry {
            kind,
            stack,
            rows,
            columns,
            tile,
            seed,
        })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_part_of_any_weight_is_what_its_elements_are(
        geometry in geometries(),
        ranges in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 5),
        scratch in 64usize..3000,
        isa in any::<prop::sample::Index>(),
    ) {
        let case = case(&geometry);
        let block = format!(r#"{{"quantization_config":{{"weight_block_size":[{},{}]}}}}"#, geometry.tile[0], geometry.tile[1]);
        let checkpoint = case.tensors.open_as(Dequantize::All, &block);
        prop_assert_eq!(checkpoint.encoded().decoded, 1, "{:?}", checkpoint.tensors());
        prop_assert_eq!(checkpoint.tensors().len(), 1);
        let tensor = &checkpoint.tensors()[0];
        prop_assert_eq!(tensor.dtype, case.to);
        let want = case.decoded();
        prop_assert_eq!(tensor.decoded_bytes() as usize, want.len());
        let kernels: Vec<Kernels> = Isa::available().map(|isa| Kernels::new(isa).unwrap()).collect();
        let kernels = *isa.get(&kernels);
        for (start, end) in ranges {
            // As users may.
            let (start, end) = (start.index(want.len()), end.index(want.len() + 1));
            let mut have = vec![0; end.saturating_sub(start)];
            checkpoint.read_tensor(0, start as u64, &mut have).unwrap();
            prop_assert!(have == want[start..start + have.len()], "{}..{}", start, end);
            // As the loader does, with little room.
            let (start, end) = (start / 2 * 2, end / 2 * 2);
            let mut have = vec![0; end.saturating_sub(start)];
            let mut scratch = vec![0; scratch];
            checkpoint.read_elements(tensor, start as u64, &mut have, &mut scratch, kernels).unwrap();
            prop_assert!(have == want[start..start + have.len()], "{}..{}", start, end);
            // As it is for devices that decode, in much room and in as little as decoded elements take.
            let (first, count) = (start as u64 / 2, have.len() / 2);
            for room in [4 * want.len() + 100, have.len()] {
                let mut staged = vec![0xa5; room];
                let read = checkpoint.read_codes(tensor, first, count, &mut staged).unwrap();
                match read {
                    Some(read) => {
                        let each = decode_each(&staged, &read, count, case.to);
                        prop_assert!(each == have, "{}..{} as {:?}", start, end, read);
                    }
                    None => {
                        let has_zeros = tensor.encoded.as_ref().unwrap().zeros.is_some();
                        let is_ragged = geometry.kind == 0
                            && geometry.stack > 1
                            && geometry.rows % geometry.tile[0].min(geometry.rows) != 0;
                        let reason = count == 0 || has_zeros || is_ragged || room == have.len();
                        prop_assert!(reason, "{}..{}", start, end);
                    }
                }
            }
        }
        // Slices, along any dimension.
        for (dimension, &length) in tensor.shape.iter().enumerate() {
            let range = length / 3..length.min(length / 3 + 5);
            let placement = Placement { device: None, format: Format::Stored };
            let slice = Slice { tensor: 0, dimension: dimension as u32, ranges: vec![range.clone()], placement };
            let cut = checkpoint.cut(&[slice]).unwrap();
            let piece = &cut.tensors()[0];
            let inner = 2 * tensor.shape[dimension + 1..].iter().product::<u64>();
            let (stride, edges) = (length * inner, range.start * inner..range.end * inner);
            let of_stride = |stride: &[u8]| stride[edges.start as usize..edges.end as usize].to_vec();
            let part: Vec<u8> = want.chunks(stride as usize).flat_map(of_stride).collect();
            let mut have = vec![0; piece.decoded_bytes() as usize];
            cut.read_elements(piece, 0, &mut have, &mut vec![0; scratch], kernels).unwrap();
            prop_assert!(have == part, "{} of {:?}", piece.name, tensor.shape);
        }
        // A part of its rows.
        let (columns, all) = (*tensor.shape.last().unwrap(), want.len() as u64 / 2);
        let first = all / columns / 2;
        let part = tensor.rows("part".to_owned(), first, [all / columns - first, columns]);
        let mut have = vec![0; part.decoded_bytes() as usize];
        checkpoint.read_elements(&part, 0, &mut have, &mut vec![0; scratch], kernels).unwrap();
        prop_assert!(have == want[(2 * first * columns) as usize..]);
        let mut staged = vec![0; 4 * want.len() + 100];
        let count = have.len() / 2;
        if let Some(read) = checkpoint.read_codes(&part, 0, count, &mut staged).unwrap() {
            prop_assert!(decode_each(&staged, &read, count, case.to) == have);
        }
    }
}

#[test]
fn an_exponent_of_255_is_what_programs_make_of_it() {
    let stack = |codes: Vec<u8>| {
        Tensors::default()
            .with("e.x_blocks", "U8", &[1, 1, 1, 16], codes)
            .with("e.x_scales", "U8", &[1, 1, 1], vec![255])
            .open()
    };
    // Which no scale in f32 does.
    let checkpoint = stack(vec![0x22; 16]);
    let staged = checkpoint.read_codes(&checkpoint.tensors()[0], 0, 32, &mut [0; 64]);
    assert_eq!(staged.unwrap(), None);
    let mut two = [0; 4];
    // ldexp gives infinity.
    stack(vec![0x22; 16]).read_tensor(0, 0, &mut two).unwrap();
    assert!(bf16::from_le_bytes([two[0], two[1]]).is_infinite());
    // And it gives numbers as long as there are any.
    stack(vec![0x91; 16]).read_tensor(0, 0, &mut two).unwrap();
    let values = [[two[0], two[1]], [two[2], two[3]]].map(bf16::from_le_bytes);
    assert_eq!(values.map(bf16::to_f32), [2f32.powi(127), -2f32.powi(127)]);
    stack(vec![0x80; 16]).read_tensor(0, 0, &mut two).unwrap();
    assert_eq!(two, [0, 0, 0, 0x80]);
    let packed = Tensors::default()
        .with("a.weight_packed", "U8", &[1, 16], vec![0x22; 16])
        .with("a.weight_scale", "F8_E8M0", &[1, 1], vec![255])
        .open();
    packed.read_tensor(0, 0, &mut two).unwrap();
    assert!(bf16::from_le_bytes([two[0], two[1]]).is_nan());
    let scale = |checkpoint: &Checkpoint| match encoded(checkpoint).scale {
        ScaleForm::Plain(scale) => scale,
        other => panic!("{other:?}"),
    };
    assert_eq!(scale(&packed), SourceScale::E8M0);
    assert_eq!(scale(&stack(vec![0; 16])), SourceScale::Ldexp);
}
