//! How tensors become files: the cut into shards, headers, and the index.

use std::ops::Range;

use serde_json::{Map, Value, json};

use super::error::SynthError;
use super::model::Tensor;
use crate::checkpoint::header_text;

/// A file to be written.
#[derive(Debug)]
pub(super) struct Shard {
    pub(super) file: String,
    /// Which of the model's tensors, in their order.
    pub(super) tensors: Range<usize>,
    /// The header with its length in front.
    pub(super) header: Vec<u8>,
    /// Bytes of the whole file.
    pub(super) length: u64,
}

/// Cuts as huggingface_hub does it: in order, and a new shard where the next tensor would make the
/// shard larger than `shard_bytes`. A tensor is never cut.
pub(super) fn cut(tensors: &[Tensor], shard_bytes: u64) -> Result<Vec<Shard>, SynthError> {
    let mut cuts: Vec<(Range<usize>, u64)> = Vec::new();
    for (i, tensor) in tensors.iter().enumerate() {
        let bytes = bytes(tensor)?;
        match cuts.last_mut() {
            Some((range, total)) if bytes <= shard_bytes.saturating_sub(*total) => {
                range.end = i + 1;
                *total += bytes;
            }
            _ => cuts.push((i..i + 1, bytes)),
        }
    }
    if cuts.is_empty() {
        cuts.push((0..0, 0));
    }
    let count = cuts.len();
    cuts.into_iter()
        .enumerate()
        .map(|(i, (range, data))| {
            let header = header(&tensors[range.clone()])?;
            let length = data.checked_add(header.len() as u64);
            Ok(Shard {
                file: match count {
                    1 => "model.safetensors".into(),
                    _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
                },
                tensors: range,
                length: length.ok_or_else(too_large)?,
                header,
            })
        })
        .collect()
}

/// The index over several shards; `None` for one.
pub(super) fn index(shards: &[Shard], tensors: &[Tensor]) -> Result<Option<String>, SynthError> {
    if shards.len() == 1 {
        return Ok(None);
    }
    let mut weight_map = Map::new();
    let (mut size, mut parameters) = (0u64, 0u64);
    for shard in shards {
        for tensor in &tensors[shard.tensors.clone()] {
            weight_map.insert(tensor.name.clone(), Value::from(shard.file.as_str()));
            let own = tensor.parameters().ok_or_else(too_large)?;
            parameters = parameters.checked_add(own).ok_or_else(too_large)?;
            size = size.checked_add(bytes(tensor)?).ok_or_else(too_large)?;
        }
    }
    let index = json!({
        "metadata": {"total_parameters": parameters, "total_size": size},
        "weight_map": weight_map,
    });
    Ok(Some(format!("{index:#}\n")))
}

fn bytes(tensor: &Tensor) -> Result<u64, SynthError> {
    let bytes = tensor.dtype.tensor_bytes(&tensor.shape);
    bytes.ok_or_else(too_large)
}

fn too_large() -> SynthError {
    SynthError::Unsupported {
        problem: "its size in bytes does not fit in 64 bits".into(),
    }
}

/// The header of a file with these tensors, padded so that the data is aligned to 8 bytes as the
/// safetensors crate does it.
fn header(tensors: &[Tensor]) -> Result<Vec<u8>, SynthError> {
    let described: Vec<_> = tensors
        .iter()
        .map(|tensor| {
            let name = tensor.name.as_str();
            Ok((name, tensor.dtype, tensor.shape.as_slice(), bytes(tensor)?))
        })
        .collect::<Result<_, SynthError>>()?;
    let mut text = header_text(described).map_err(|error| SynthError::Unsupported {
        problem: error.to_string(),
    })?;
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend_from_slice(text.as_bytes());
    Ok(header)
}
