//! Headers and indices of checkpoints.

use safetensors::SafeTensors;
use tightfit::checkpoint::{
    AbsmaxForm, Checkpoint, Dequantize, Encoded, Extent, OpenOptions, ScaleForm, TensorInfo,
};

use crate::file;

/// Opens a checkpoint. Bytes that begin with a brace are an index beside two small files, `a` and
/// `b`, with one tensor of the same name in each; others are a file of weights.
pub fn checkpoint(data: &[u8]) -> bool {
    let is_index = data.first() == Some(&b'{');
    let path = if is_index {
        for name in ["a", "b"] {
            file(&format!("{name}.safetensors"), &one_tensor(name));
        }
        file("model.safetensors.index.json", data)
    } else {
        file("model.safetensors", data)
    };
    // Codes of other methods as what they are, and decoded.
    let open = |dequantize| {
        let options = OpenOptions::default().with_dequantize(dequantize);
        Checkpoint::open_with(&path, &options)
    };
    match open(Dequantize::All) {
        Ok(checkpoint) => {
            assert_sound(&checkpoint);
            if checkpoint.encoded().decoded > 0 {
                let raw = open(Dequantize::None).expect("it is the same file");
                assert_sound(&raw);
                assert_eq!(raw.source_bytes(), checkpoint.source_bytes());
            }
            assert!(
                is_index || SafeTensors::deserialize(data).is_ok(),
                "the format's own reader refuses it"
            );
            true
        }
        Err(error) => {
            assert_printable(&error.to_string());
            false
        }
    }
}

fn one_tensor(name: &str) -> Vec<u8> {
    let header = format!(r#"{{"{name}":{{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}}}"#);
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend([1, 2]);
    bytes
}

/// An error's text goes to terminals and logs as it is.
pub(crate) fn assert_printable(text: &str) {
    let bad = text.chars().find(|c| c.is_control());
    assert_eq!(bad, None, "in an error's text: {text:?}");
    assert!(text.len() < 4096, "an error of {} bytes", text.len());
}

/// What the rest of the library builds on: every byte of every tensor is inside its file, can be
/// read, and belongs to that tensor alone.
pub(crate) fn assert_sound(checkpoint: &Checkpoint) {
    let mut extents = Vec::new();
    let mut bytes = 0;
    for (index, tensor) in checkpoint.tensors().iter().enumerate() {
        assert_eq!(checkpoint.find(&tensor.name), Some(index));
        assert_printable(&tensor.name);
        let whole = tensor.dtype.tensor_bytes(&tensor.shape);
        match (&tensor.quantized, &tensor.encoded) {
            (None, None) => assert_eq!(whole, Some(tensor.bytes)),
            (None, Some(_)) => assert_decodes(checkpoint, index, whole.expect("it has a size")),
            _ => assert!(whole.is_some()),
        }
        bytes += tensor.source_bytes();
        extents.extend(parts(tensor));
    }
    assert!(bytes <= checkpoint.source_bytes());
    extents.sort_unstable_by_key(|part| (part.shard, part.offset, part.bytes));
    for pair in extents.windows(2) {
        let (first, next) = (pair[0], pair[1]);
        assert!(
            first.shard < next.shard || first.offset + first.bytes <= next.offset,
            "{first:?} and {next:?} overlap"
        );
    }
    for part in extents {
        assert!(part.offset + part.bytes <= checkpoint.shards()[part.shard].length());
        let mut bytes = vec![0; part.bytes as usize];
        checkpoint
            .read_at(part.shard, part.offset, &mut bytes)
            .expect("what lies in the file can be read");
    }
}

/// Every element of an encoded weight can be read, and is the same however much is read at once.
fn assert_decodes(checkpoint: &Checkpoint, tensor: usize, bytes: u64) {
    let end = usize::try_from(bytes).map_or(MOST_DECODED, |bytes| bytes.min(MOST_DECODED));
    let mut whole = vec![0; end];
    let read = |start: usize, out: &mut [u8]| {
        let read = checkpoint.read_tensor(tensor, start as u64, out);
        read.expect("what lies in the file can be decoded");
    };
    read(0, &mut whole);
    let (middle, third) = (end / 2, end / 3);
    let mut part = vec![0; end - middle];
    read(middle, &mut part);
    assert!(part == whole[middle..]);
    let mut part = vec![0; middle - third];
    read(third, &mut part);
    assert!(part == whole[third..middle]);
}

/// Bytes of a weight that are decoded: a code can be for very many of them.
const MOST_DECODED: usize = 1 << 20;

/// Where the tensor's bytes lie.
fn parts(tensor: &TensorInfo) -> impl Iterator<Item = Extent> + '_ {
    let own = Extent {
        shard: tensor.shard,
        offset: tensor.offset,
        bytes: tensor.bytes,
    };
    let quantized = tensor.quantized.as_deref();
    let scales = quantized.map(|quantized| quantized.absmax);
    let nested = quantized.and_then(|quantized| quantized.nested);
    let rounded = quantized.and_then(|quantized| match quantized.absmax_form {
        AbsmaxForm::RoundedDouble { nested, .. } => Some(nested),
        _ => None,
    });
    let encoded = tensor.encoded.as_deref();
    let global = encoded.and_then(|encoded| match encoded.scale {
        ScaleForm::Nested { global, .. } => Some(global),
        _ => None,
    });
    [
        Some(own),
        scales,
        nested.map(|nested| nested.absmax),
        rounded,
        encoded.map(|encoded| encoded.scales),
        encoded.and_then(|encoded: &Encoded| encoded.zeros),
        global,
    ]
    .into_iter()
    .flatten()
}
