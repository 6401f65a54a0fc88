//! Weights that are said to be quantized, in every way that this can be wrong.

use proptest::prelude::*;
use tightfit_kernels::half::{bf16, f16};
use tightfit_kernels::{DYNAMIC_MAP, FP4, NF4};

use super::*;
use crate::types::QuantType;

const NF4_STATE: &str = ".quant_state.bitsandbytes__nf4";
const FP4_STATE: &str = ".quant_state.bitsandbytes__fp4";

/// The tensors of the weight `w` of 8 x 64 elements in blocks of 64: suffix, type, data. All are
/// vectors.
#[derive(Clone)]
struct Set(Vec<(String, &'static str, Vec<u8>)>);

/// bf16 of 1, 2 and so on.
fn rounded(count: u8) -> Vec<u8> {
    let bits = (1..=count).map(|n| (f32::from(n).to_bits() >> 16) as u16);
    bits.flat_map(u16::to_le_bytes).collect()
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().copied().flat_map(f32::to_le_bytes).collect()
}

fn plain() -> Set {
    let state = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 64]}"#;
    Set(vec![
        (".absmax".into(), "F32", bytes(&[1.0; 8])),
        (".quant_map".into(), "F32", bytes(&NF4)),
        (String::new(), "U8", vec![0x17; 256]),
        (NF4_STATE.into(), "U8", state.into()),
    ])
}

fn double() -> Set {
    let nested = r#", "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}"#;
    plain()
        .state("}", nested)
        .with(".absmax", "U8", &[7; 8])
        .with(".nested_absmax", "F32", &bytes(&[2.0]))
        .with(".nested_quant_map", "F32", &bytes(&DYNAMIC_MAP))
}

impl Set {
    /// With this tensor, in place of the one of this suffix if there is one.
    fn with(self, suffix: &str, dtype: &'static str, data: &[u8]) -> Set {
        let mut set = self.without(suffix);
        set.0.push((suffix.to_owned(), dtype, data.to_vec()));
        set
    }

    fn without(mut self, suffix: &str) -> Set {
        self.0.retain(|(found, _, _)| found != suffix);
        self
    }

    fn text(&self) -> String {
        let state = self.0.iter().find(|(suffix, _, _)| suffix == NF4_STATE);
        String::from_utf8(state.unwrap().2.clone()).unwrap()
    }

    /// With `old` replaced by `new` in its quant state.
    fn state(self, old: &str, new: &str) -> Set {
        let text = self.text();
        assert!(text.contains(old), "{text} lacks {old}");
        self.with(NF4_STATE, "U8", text.replace(old, new).as_bytes())
    }

    fn file(&self) -> Vec<u8> {
        self.file_with(&[])
    }

    /// With these shapes of tensors that are no vectors.
    fn file_with(&self, shapes: &[(&str, &[usize])]) -> Vec<u8> {
        let mut entries = Vec::new();
        let mut data: Vec<u8> = Vec::new();
        for (suffix, dtype, bytes) in &self.0 {
            let size = DType::from_safetensors_name(dtype).unwrap().bits() as usize / 8;
            let offsets = [data.len(), data.len() + bytes.len()];
            data.extend(bytes);
            let shaped = shapes.iter().find(|(shaped, _)| shaped == suffix);
            let shape = shaped.map_or(vec![bytes.len() / size], |(_, shape)| shape.to_vec());
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
            entries.push(format!("\"w{suffix}\":{entry}"));
        }
        let mut bytes = file(&format!("{{{}}}", entries.join(",")), 0);
        bytes.extend(data);
        bytes
    }

    fn open(&self) -> Result<Checkpoint, CheckpointError> {
        let dir = dir();
        Checkpoint::open(write(&dir, "model.safetensors", &self.file()))
    }

    /// Asserts that it is refused, with the weight's name and a problem that has these words.
    #[track_caller]
    fn is_refused(&self, words: &str) {
        let error = self.open().expect_err(words);
        let message = error.to_string();
        assert_error!(
            error,
            CheckpointError::BadQuantized { path, weight, problem }
                if path.ends_with("model.safetensors") && weight == "w" && problem.contains(words)
        );
        assert!(message.contains("quantized weight 'w'"), "{message}");
        // Whatever a file says, a message stays one that can be read.
        assert!(message.len() < 1000, "{message}");
    }
}

#[test]
fn a_set_that_is_right_is_one_tensor() {
    for (set, source_bytes) in [(plain(), 256 + 32), (double(), 256 + 8 + 4)] {
        let checkpoint = set.open().unwrap();
        assert_eq!(names(&checkpoint), ["w"]);
        let weight = &checkpoint.tensors()[0];
        assert_eq!(
            (weight.dtype, &weight.shape[..]),
            (DType::Bf16, &[8, 64][..])
        );
        assert_eq!((weight.bytes, weight.source_bytes()), (256, source_bytes));
        let quantized = weight.quantized.as_ref().unwrap();
        assert_eq!(quantized.quant_type, QuantType::Nf4);
        assert_eq!(quantized.block_size.elements(), 64);
        let offset = quantized.nested.map(|nested| nested.absmax_mean);
        assert_eq!(offset, (source_bytes == 268).then_some(0.25));
    }
}

#[test]
fn scales_in_bf16_are_read_in_the_order_of_blocks() {
    // 8 rows of two blocks.
    let set = plain()
        .state("[8, 64]", "[8, 128]")
        .with("", "U8", &[0x17; 512])
        .with(".absmax", "BF16", &rounded(16));
    for (shape, form, third) in [
        (&[16][..], AbsmaxForm::Bf16, 3.0),
        // The first block of the second row.
        (&[2, 8], AbsmaxForm::Bf16Transposed { rows: 8 }, 2.0),
    ] {
        let dir = dir();
        let file = set.file_with(&[(".absmax", shape)]);
        let checkpoint = Checkpoint::open(write(&dir, "model.safetensors", &file)).unwrap();
        let weight = &checkpoint.tensors()[0];
        let quantized = weight.quantized.as_ref().unwrap();
        assert_eq!(quantized.absmax_form, form);
        assert_eq!(weight.source_bytes(), 512 + 32);
        let mut scales = [0; 64];
        checkpoint
            .read_absmax(weight, quantized, 0, &mut scales, &mut [0; 64])
            .unwrap();
        assert_eq!(&scales[8..12], f32::to_le_bytes(third));
        let transposed = u64::from(shape.len() == 2);
        assert_eq!(
            checkpoint.remarks(),
            [Remark::RoundedScales {
                weights: 1,
                transposed,
                double: 0,
            }]
        );
        let said = checkpoint.remarks()[0].to_string();
        assert!(said.contains("scales of 16 bits"), "{said}");
    }
}

#[test]
fn double_quantized_scales_that_are_rounded_are_those_of_bitsandbytes() {
    for (dtype, round) in [
        (
            "bfloat16",
            (|value| bf16::from_f32(value).to_f32()) as fn(f32) -> f32,
        ),
        ("float16", |value| f16::from_f32(value).to_f32()),
    ] {
        // 300 blocks, of which 256 share a scale.
        let codes: Vec<u8> = (0..300_u32).map(|block| (block * 7) as u8).collect();
        let nested = [0.7_f32, 3.1];
        let set = double()
            .state("float32", dtype)
            .state("[8, 64]", "[300, 64]")
            .state("0.25", "0.103515625")
            .with("", "U8", &[0x17; 300 * 32])
            .with(".absmax", "U8", &codes)
            .with(".nested_absmax", "F32", &bytes(&nested));
        let dir = dir();
        let checkpoint = Checkpoint::open(write(&dir, "model.safetensors", &set.file())).unwrap();
        let weight = &checkpoint.tensors()[0];
        let quantized = weight.quantized.as_ref().unwrap();
        assert_eq!(quantized.nested, None);
        assert_eq!(weight.source_bytes(), 300 * 32 + 300 + 8);
        let expected: Vec<f32> = (codes.iter().enumerate())
            .map(|(block, code)| {
                round(round(DYNAMIC_MAP[usize::from(*code)] * nested[block / 256]) + 0.103515625)
            })
            .collect();
        for (first, count, room) in [
            (0, 300, 4096),
            (0, 300, 81),
            (255, 2, 80),
            (299, 1, 80),
            (100, 200, 300),
        ] {
            let mut found = vec![0; 4 * count];
            checkpoint
                .read_absmax(weight, quantized, first, &mut found, &mut vec![0; room])
                .unwrap();
            let first = first as usize;
            assert_eq!(
                found,
                bytes(&expected[first..first + count]),
                "{first}, {dtype}"
            );
        }
        assert!(matches!(
            checkpoint.remarks(),
            [Remark::RoundedScales {
                weights: 1,
                transposed: 0,
                double: 1
            }]
        ));
    }
}

#[test]
fn scales_in_bf16_that_do_not_belong_to_the_weight_are_refused() {
    for (shape, count) in [
        (&[7][..], 7),
        (&[8, 1], 8),
        (&[4, 2], 8),
        (&[2, 8], 16),
        (&[1, 8, 1], 8),
    ] {
        let set = plain().with(".absmax", "BF16", &rounded(count));
        let dir = dir();
        let file = set.file_with(&[(".absmax", shape)]);
        assert_error!(
            Checkpoint::open(write(&dir, "model.safetensors", &file)).unwrap_err(),
            CheckpointError::BadQuantized { weight, problem, .. }
                if weight == "w" && problem.contains("'w.absmax' is of type")
        );
    }
    // As bitsandbytes has them under double quantization, whatever it has computed.
    double()
        .with(".absmax", "BF16", &rounded(8))
        .is_refused("is of type bf16, need u8");
    double()
        .with(".nested_absmax", "BF16", &rounded(1))
        .is_refused("need f32");
    plain()
        .with(".absmax", "F16", &rounded(8))
        .is_refused("need f32");
}

#[test]
fn a_part_that_is_missing_is_named() {
    for set in [plain(), double()] {
        for part in [".absmax", ".quant_map"] {
            let words = format!("its {} is missing", &part[1..]);
            set.clone().without(part).is_refused(&words);
        }
        set.without("").is_refused("there is no tensor");
    }
    for part in [".nested_absmax", ".nested_quant_map"] {
        let words = format!("its {} is missing", &part[1..]);
        double().without(part).is_refused(&words);
    }
}

#[test]
fn parts_without_a_quant_state_are_refused_beside_their_weight_only() {
    for part in [
        ".absmax",
        ".quant_map",
        ".nested_absmax",
        ".nested_quant_map",
    ] {
        let words = format!("there is 'w{part}', but no quant state");
        let alone = Set(vec![(part.to_owned(), "F32", vec![0; 4])]);
        alone.clone().with("", "U8", &[0; 8]).is_refused(&words);
        assert_eq!(names(&alone.open().unwrap()), [format!("w{part}")]);
    }
    plain().without(NF4_STATE).is_refused("but no quant state");
}

#[test]
fn parts_of_another_length_or_type_are_refused() {
    let (few, many) = (bytes(&[1.0; 7]), bytes(&[1.0; 9]));
    for (set, words) in [
        (
            plain().with("", "U8", &[0; 255]),
            "'w' has 255 bytes, need 256",
        ),
        (
            plain().with("", "F32", &[0; 260]),
            "'w' has 260 bytes, need 256",
        ),
        (
            plain().with(".absmax", "F32", &few),
            "'w.absmax' has 28 bytes, need 32",
        ),
        (
            plain().with(".absmax", "F32", &many),
            "'w.absmax' has 36 bytes, need 32",
        ),
        (
            plain().with(".absmax", "F16", &[0; 16]),
            "'w.absmax' is of type f16, need f32",
        ),
        (
            plain().with(".absmax", "U8", &[0; 8]),
            "'w.absmax' is of type u8, need f32",
        ),
        (
            plain().with(".quant_map", "F32", &bytes(&NF4[1..])),
            "has 60 bytes, need 64",
        ),
        (
            plain().with(".quant_map", "I32", &bytes(&NF4)),
            "'w.quant_map' is of type i32",
        ),
        (
            double().with(".absmax", "U8", &[0; 9]),
            "'w.absmax' has 9 bytes, need 8",
        ),
        (
            double().with(".absmax", "F32", &bytes(&[1.0; 8])),
            "'w.absmax' is of type f32, need u8",
        ),
        (
            double().with(".nested_absmax", "F32", &[]),
            "'w.nested_absmax' has 0 bytes, need 4",
        ),
        (
            double().with(".nested_absmax", "F32", &[0; 8]),
            "'w.nested_absmax' has 8 bytes, need 4",
        ),
        (
            double().with(".nested_absmax", "F16", &[0; 4]),
            "'w.nested_absmax' is of type f16",
        ),
        (
            double().with(".nested_quant_map", "F32", &[0; 64]),
            "has 64 bytes, need 1024",
        ),
    ] {
        set.is_refused(words);
    }
}

#[test]
fn tables_of_other_values_are_refused() {
    let mut table = NF4;
    table[3] += 1e-6;
    plain()
        .with(".quant_map", "F32", &bytes(&table))
        .is_refused("quant_map is not the usual");
    plain()
        .with(".quant_map", "F32", &bytes(&FP4))
        .is_refused("quant_map is not the usual");
    table[3] = f32::NAN;
    plain()
        .with(".quant_map", "F32", &bytes(&table))
        .is_refused("quant_map is not the usual");
    let mut map = DYNAMIC_MAP;
    map.reverse();
    double()
        .with(".nested_quant_map", "F32", &bytes(&map))
        .is_refused("nested_quant_map is not the usual");
}

#[test]
fn the_name_of_a_quant_state_and_what_it_says_agree() {
    let words = "named nf4 and says \"fp4\"";
    plain().state(r#""nf4""#, r#""fp4""#).is_refused(words);
    plain()
        .state(r#""nf4""#, r#""int8""#)
        .is_refused("named nf4 and says \"int8\"");
    let text = plain().text();
    let renamed = plain()
        .without(NF4_STATE)
        .with(FP4_STATE, "U8", text.as_bytes());
    renamed.is_refused("named fp4 and says \"nf4\"");
    let long = "x".repeat(10_000);
    plain()
        .state(r#"": "nf4"#, &format!(r#"": "{long}"#))
        .is_refused("says \"xxx");
    plain()
        .state("bfloat16", &long)
        .is_refused("unknown type \"xxx");
    double().state("float32", &long).is_refused("Some(\"xxx");
    for text in [text.clone(), text.replace("nf4", "fp4")] {
        let both = plain().with(FP4_STATE, "U8", text.as_bytes());
        both.is_refused("it has two quant states");
    }
}

#[test]
fn blocks_types_and_shapes_that_no_kernel_reads_are_refused() {
    for size in ["0", "3", "16", "48", "96", "8192", "4294967295"] {
        let words = format!("its block size is {size}, not a power of two from 32 to 4096");
        plain()
            .state(": 64,", &format!(": {size},"))
            .is_refused(&words);
    }
    for dtype in ["float64", "torch.bfloat16", "BF16", ""] {
        let words = format!("it is of the unknown type {dtype:?}");
        plain().state("bfloat16", dtype).is_refused(&words);
    }
    for shape in ["4294967296, 4294967296", "9223372036854775808"] {
        let words = "its shape has no size in 64 bits";
        plain().state("8, 64", shape).is_refused(words);
    }
    let shape = vec!["1"; MAX_DIMENSIONS + 1].join(",");
    plain()
        .state("8, 64", &shape)
        .is_refused("its shape has 17 dimensions, at most 16 are read");
    for (shape, words) in [
        ("8, 63", "need 252"),
        ("8, 65", "need 260"),
        ("", "need 1"),
        ("0", "need 0"),
        ("288230376151711744", "need 144115188075855872"),
    ] {
        plain().state("8, 64", shape).is_refused(words);
    }
    // Fewer elements in as many bytes: the spare half is nothing.
    let odd = plain().state("8, 64", "511");
    assert_eq!(odd.open().unwrap().tensors()[0].shape, [511]);
}

#[test]
fn a_quant_state_that_cannot_be_read_is_refused() {
    let deep = format!("{}{}", "[".repeat(4000), "]".repeat(4000));
    let long = format!("\"{}\",", "x".repeat(10_000));
    for (old, new) in [
        ("{", "["),
        ("}", ""),
        ("}", "} {}"),
        ("}", "\u{0}}"),
        ("}", r#", "blocksize": 64}"#),
        (r#", "shape": [8, 64]"#, ""),
        (r#""quant_type": "nf4", "#, ""),
        ("[8, 64]", deep.as_str()),
        ("[8, 64]", "[8, -64]"),
        ("[8, 64]", "[8, 64.5]"),
        ("[8, 64]", "[8, 36893488147419103232]"),
        ("[8, 64]", "512"),
        ("[8, 64]", "null"),
        (": 64,", ": -64,"),
        (": 64,", ": 4294967360,"),
        (": 64,", ": \"64\","),
        (r#""nf4""#, "null"),
        ("64,", long.as_str()),
    ] {
        plain()
            .state(old, new)
            .is_refused("its quant state cannot be read");
    }
    for text in [&b""[..], b"\xff\xfe", b"null", b"[]"] {
        plain()
            .with(NF4_STATE, "U8", text)
            .is_refused("its quant state cannot be read");
    }
    // What is skipped takes no stack.
    let more = format!(r#", "more": {deep}}}"#);
    plain().state("}", &more).open().unwrap();
    let padded = format!("{:1$}", plain().text(), 16 << 10);
    plain()
        .with(NF4_STATE, "U8", padded.as_bytes())
        .open()
        .unwrap();
    let longer = plain().with(NF4_STATE, "U8", format!("{padded} ").as_bytes());
    longer.is_refused("its quant state has 16385 bytes");
}

#[test]
fn double_quantization_of_an_unknown_kind_is_refused() {
    let unknown = "its double quantization is not of a known kind";
    for (old, new, words) in [
        (": 256", ": 128", unknown),
        (": 256", ": null", unknown),
        ("float32", "float64", unknown),
        (r#", "nested_offset": 0.25"#, "", unknown),
        (r#", "nested_dtype": "float32""#, "", unknown),
        (r#""nested_blocksize": 256, "#, "", unknown),
        ("0.25", "1e39", "its nested offset is 1e39"),
        ("0.25", "-1e300", "its nested offset is -1e300"),
        ("0.25", "NaN", "its quant state cannot be read"),
        ("0.25", "Infinity", "its quant state cannot be read"),
        ("0.25", "1e400", "its quant state cannot be read"),
        ("0.25", "\"0.25\"", "its quant state cannot be read"),
    ] {
        double().state(old, new).is_refused(words);
    }
    let text = plain().text();
    double()
        .with(NF4_STATE, "U8", text.as_bytes())
        .is_refused("nested scales that its quant state does not mention");
    plain()
        .with(NF4_STATE, "U8", double().text().as_bytes())
        .is_refused("is missing");
}

#[test]
fn the_parts_of_a_weight_may_lie_in_any_files() {
    let set = double();
    let dir = dir();
    let count = set.0.len();
    let name = |i: usize| format!("m-{:05}-of-{count:05}.safetensors", i + 1);
    let mut map = serde_json::Map::new();
    for (i, part) in set.0.iter().enumerate() {
        write(&dir, &name(i), &Set(vec![part.clone()]).file());
        map.insert(format!("w{}", part.0), name(i).into());
    }
    let open = |map: &serde_json::Map<_, _>| {
        let index = json!({ "weight_map": map }).to_string();
        write(&dir, "model.safetensors.index.json", index.as_bytes());
        Checkpoint::open(dir.path())
    };
    let checkpoint = open(&map).unwrap();
    assert_eq!(names(&checkpoint), ["w"]);
    let absmax = checkpoint.tensors()[0].quantized.as_ref().unwrap().absmax;
    assert_ne!(absmax.shard, checkpoint.tensors()[0].shard);
    let mut codes = [0; 8];
    checkpoint
        .read_at(absmax.shard, absmax.offset, &mut codes)
        .unwrap();
    assert_eq!(codes, [7; 8]);

    // Not where the index says.
    let elsewhere = map["w.quant_map"].clone();
    map.insert("w.absmax".to_owned(), elsewhere);
    assert_error!(
        open(&map).unwrap_err(),
        CheckpointError::NotInShard { tensor, .. } if tensor == "w.absmax"
    );
}

#[test]
fn assembling_stops() {
    let dir = dir();
    let path = write(&dir, "model.safetensors", &double().file());
    // Before the file, its header, and the only weight.
    assert!(super::stops::stops_everywhere(&path) >= 3);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_range_of_scales_in_bf16_is_that_of_all_of_them(
        rows in 1..40_u64,
        of_row in 1..9_u64,
        is_wide in any::<bool>(),
        is_transposed in any::<bool>(),
        room in 2..80_usize,
        start in any::<prop::sample::Index>(),
        length in any::<prop::sample::Index>(),
    ) {
        // More than what is read with all columns at once.
        let rows = if is_wide { 2040 + rows } else { rows };
        let count = (rows * of_row) as usize;
        let scale = |block: usize| (block as u16).wrapping_mul(0x9e37);
        let in_file = |place: usize| match is_transposed {
            true => scale(place % rows as usize * of_row as usize + place / rows as usize),
            false => scale(place),
        };
        let scales: Vec<u8> = (0..count).flat_map(|place| in_file(place).to_le_bytes()).collect();
        let shape = format!("[{rows}, {}]", 64 * of_row);
        let set = plain()
            .state("[8, 64]", &shape)
            .with("", "U8", &vec![0; 32 * count])
            .with(".absmax", "BF16", &scales);
        let shape = match is_transposed {
            true => vec![of_row as usize, rows as usize],
            false => vec![count],
        };
        let dir = dir();
        let file = set.file_with(&[(".absmax", &shape)]);
        let checkpoint = Checkpoint::open(write(&dir, "model.safetensors", &file)).unwrap();
        let weight = &checkpoint.tensors()[0];
        let quantized = weight.quantized.as_ref().unwrap();
        let first = start.index(count);
        let mut out = vec![0; 4 * (1 + length.index(count - first))];
        let mut scratch = vec![0; room];
        checkpoint
            .read_absmax(weight, quantized, first as u64, &mut out, &mut scratch)
            .unwrap();
        let found = out.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
        let expected = (first..first + out.len() / 4).map(|block| u32::from(scale(block)) << 16);
        prop_assert!(found.eq(expected));
    }


    #[test]
    fn damaged_quant_states_never_panic_and_what_is_accepted_is_sound(
        nested in any::<bool>(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..4), 1..5),
    ) {
        let set = if nested { double() } else { plain() };
        let mut text = set.text().into_bytes();
        for (index, byte, kind) in damage {
            if text.is_empty() {
                break;
            }
            let at = index.index(text.len());
            match kind {
                0 => text[at] = byte,
                1 => text.insert(at, byte),
                2 => { text.remove(at); }
                // What is a number stays one.
                _ => if text[at].is_ascii_digit() { text[at] = b'0' + byte % 10; }
            }
        }
        if let Ok(checkpoint) = set.with(NF4_STATE, "U8", &text).open() {
            let weight = &checkpoint.tensors()[0];
            let quantized = weight.quantized.as_ref().unwrap();
            let elements: u64 = weight.shape.iter().product();
            prop_assert_eq!(weight.bytes, elements.div_ceil(2));
            let blocks = elements.div_ceil(u64::from(quantized.block_size));
            let scale = if quantized.nested.is_some() { 1 } else { 4 };
            prop_assert_eq!(quantized.absmax.bytes, scale * blocks);
            if let Some(nested) = quantized.nested {
                prop_assert_eq!(nested.absmax.bytes, 4 * blocks.div_ceil(256));
                prop_assert!(nested.absmax_mean.is_finite());
            }
        }
    }
}
