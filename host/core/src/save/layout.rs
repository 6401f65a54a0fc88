//! Which tensor of the file lies where, before anything is written.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::target::Target;
use super::{SaveError, is_4bit, quant_state};
use crate::checkpoint::{MAX_NAME_BYTES, TensorInfo};
use crate::model::Quantization;
use crate::plan::{PartKind, tensor_part_sizes};
use crate::types::{DType, Format, QuantType, elements};

/// What safetensors readers accept.
const MAX_HEADER_BYTES: usize = 100_000_000;

/// Most bytes of all tensors: what a file can have, with room for headers.
const MAX_BYTES: u64 = 1 << 62;

/// What a tensor of the file holds of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Content {
    /// The weight itself, or its codes.
    Data,
    Absmax,
    NestedAbsmax,
    QuantMap,
    NestedQuantMap,
}

impl Content {
    fn suffix(self) -> &'static str {
        match self {
            Content::Data => "",
            Content::Absmax => ".absmax",
            Content::NestedAbsmax => ".nested_absmax",
            Content::QuantMap => ".quant_map",
            Content::NestedQuantMap => ".nested_quant_map",
        }
    }
}

/// One tensor of a file.
#[derive(Debug)]
struct Entry {
    key: String,
    dtype: DType,
    shape: Vec<u64>,
    bytes: u64,
    weight: usize,
    content: Content,
}

/// The key, and the longest length, of a weight's quant state.
#[derive(Debug)]
struct StateEntry {
    key: String,
    longest: usize,
}

/// One file.
#[derive(Debug)]
pub(super) struct ShardFile {
    pub(super) file_name: String,
    /// Its weights, as indices of the sorted list.
    pub(super) weights: Range<usize>,
    /// Where the quant states begin, counted from the start of the file.
    pub(super) states_offset: u64,
    entries: Vec<Entry>,
    offsets: HashMap<(usize, Content), u64>,
    /// Bytes of the header with its padding, without the length before it.
    header_bytes: usize,
}

/// All files.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) shards: Vec<ShardFile>,
    /// Bytes of all tensors but the quant states.
    pub(super) total_bytes: u64,
    states: HashMap<usize, StateEntry>,
}

impl Layout {
    /// Lays out weights, which are sorted by name, in files of at most `max_shard_bytes`.
    pub(super) fn new(
        weights: &[(TensorInfo, Format)],
        max_shard_bytes: u64,
    ) -> Result<Layout, SaveError> {
        // Of the parts too: an expert of a stack may meet a tensor that is called like a part of it.
        let mut keys = HashSet::new();
        let mut states = HashMap::new();
        let mut cuts: Vec<(Range<usize>, Vec<Entry>)> = Vec::new();
        let mut bytes_in_shard = 0;
        let mut all_bytes = 0u64;
        for (index, (tensor, format)) in weights.iter().enumerate() {
            let (entries, state) = entries(index, tensor, *format)?;
            let added = entries.iter().map(|entry| &entry.key);
            for key in added.chain(state.as_ref().map(|state| &state.key)) {
                if key.len() > MAX_NAME_BYTES {
                    return Err(too_large(
                        tensor,
                        "the bytes of a name",
                        key.len() as u64,
                        MAX_NAME_BYTES as u64,
                    ));
                }
                if !keys.insert(key.clone()) {
                    return Err(SaveError::SameName { name: key.clone() });
                }
            }
            let state_bytes = state.as_ref().map_or(0, |state| state.longest as u64);
            // Of one weight, below 2^62.
            let bytes = entries.iter().map(|entry| entry.bytes).sum::<u64>() + state_bytes;
            // Sparse files can claim anything, and a cast doubles it.
            all_bytes = match all_bytes.checked_add(bytes) {
                Some(total) if total <= MAX_BYTES => total,
                total => {
                    let need = total.unwrap_or(u64::MAX);
                    return Err(too_large(
                        tensor,
                        "the bytes of all tensors",
                        need,
                        MAX_BYTES,
                    ));
                }
            };
            match cuts.last_mut() {
                Some((range, shard)) if bytes_in_shard + bytes <= max_shard_bytes => {
                    range.end = index + 1;
                    shard.extend(entries);
                    bytes_in_shard += bytes;
                }
                _ => {
                    cuts.push((index..index + 1, entries));
                    bytes_in_shard = bytes;
                }
            }
            states.extend(state.map(|state| (index, state)));
        }
        if cuts.is_empty() {
            cuts.push((0..0, Vec::new()));
        }
        let count = cuts.len();
        // Without the quant states, whose length is only known when they are written.
        let total_bytes = cuts
            .iter()
            .flat_map(|(_, entries)| entries.iter().map(|entry| entry.bytes))
            .sum();
        let shards = cuts
            .into_iter()
            .enumerate()
            .map(|(number, (range, entries))| {
                let file_name = match count {
                    1 => "model.safetensors".to_owned(),
                    _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
                };
                ShardFile::new(file_name, range, entries, &states)
            })
            .collect::<Result<_, _>>()?;
        Ok(Layout {
            shards,
            total_bytes,
            states,
        })
    }

    /// Writes the index, where there is more than one file. `state_bytes` are those of all quant
    /// states.
    pub(super) fn write_index(
        &self,
        weights: &[(TensorInfo, Format)],
        state_bytes: u64,
        target: &Target,
    ) -> Result<(), SaveError> {
        if self.shards.len() < 2 {
            return Ok(());
        }
        let mut weight_map = Map::new();
        for shard in &self.shards {
            let states = shard
                .weights
                .clone()
                .filter_map(|weight| self.states.get(&weight));
            let keys = shard.entries.iter().map(|entry| &entry.key);
            for key in keys.chain(states.map(|state| &state.key)) {
                weight_map.insert(key.clone(), Value::from(shard.file_name.clone()));
            }
        }
        let mut parameters = 0u64;
        for (tensor, _) in weights {
            let sum = elements(&tensor.shape).and_then(|count| parameters.checked_add(count));
            parameters = sum
                .ok_or_else(|| too_large(tensor, "the number of parameters", u64::MAX, u64::MAX))?;
        }
        let index = json!({
            "metadata": {
                "total_parameters": parameters,
                "total_size": self.total_bytes + state_bytes,
            },
            "weight_map": weight_map,
        });
        target.write_text("model.safetensors.index.json", &(pretty(&index) + "\n"))
    }
}

/// JSON with two spaces of indentation, as transformers writes it.
pub(super) fn pretty(value: &impl Serialize) -> String {
    // Maps with string keys always have a JSON form.
    serde_json::to_string_pretty(value).unwrap_or_default()
}

fn too_large(tensor: &TensorInfo, what: &'static str, need: u64, limit: u64) -> SaveError {
    SaveError::TooLarge {
        tensor: tensor.name.clone(),
        what,
        need,
        limit,
    }
}

/// Number of tensors of the file that hold one weight.
pub(super) fn tensors_of(tensor: &TensorInfo, format: Format) -> usize {
    let double = match (&tensor.quantized, format) {
        (Some(quantized), _) => quantized.nested.is_some(),
        (
            None,
            Format::Nf4 {
                double_quantized, ..
            },
        ) => double_quantized,
        (None, Format::Stored | Format::Cast(_)) => return 1,
    };
    if double { 6 } else { 4 }
}

/// The tensors of the file that hold one weight.
fn entries(
    weight: usize,
    tensor: &TensorInfo,
    format: Format,
) -> Result<(Vec<Entry>, Option<StateEntry>), SaveError> {
    let entry = |content: Content, dtype: DType, shape: Vec<u64>, bytes: u64| Entry {
        key: format!("{}{}", tensor.name, content.suffix()),
        dtype,
        shape,
        bytes,
        weight,
        content,
    };
    let sizes = tensor_part_sizes(tensor, format)?;
    if !is_4bit(tensor, format) {
        let dtype = match format {
            Format::Cast(target) => target,
            Format::Stored | Format::Nf4 { .. } => tensor.dtype,
        };
        let data = entry(
            Content::Data,
            dtype,
            tensor.shape.clone(),
            sizes.requested(),
        );
        return Ok((vec![data], None));
    }
    let (quant_type, block_size) = match (&tensor.quantized, format) {
        (Some(quantized), _) => (quantized.quant_type, quantized.block_size),
        (None, Format::Nf4 { block_size, .. }) => (QuantType::Nf4, block_size),
        (None, Format::Stored | Format::Cast(_)) => {
            return Err(SaveError::Internal(
                "a plain tensor has parts of a 4-bit one",
            ));
        }
    };
    let double = sizes.iter().any(|(kind, _)| kind == PartKind::NestedAbsmax);
    let mut entries = Vec::with_capacity(5);
    for (kind, bytes) in sizes.iter() {
        entries.push(match kind {
            PartKind::Data | PartKind::Codes => {
                entry(Content::Data, DType::U8, vec![bytes, 1], bytes)
            }
            PartKind::Absmax if double => entry(Content::Absmax, DType::U8, vec![bytes], bytes),
            PartKind::Absmax => entry(Content::Absmax, DType::F32, vec![bytes / 4], bytes),
            PartKind::NestedAbsmax => {
                entry(Content::NestedAbsmax, DType::F32, vec![bytes / 4], bytes)
            }
        });
    }
    entries.push(entry(Content::QuantMap, DType::F32, vec![16], 64));
    if double {
        entries.push(entry(Content::NestedQuantMap, DType::F32, vec![256], 1024));
    }
    let quantization = Quantization {
        quant_type,
        block_size,
        absmax_mean: double.then_some(0.0),
    };
    let state = StateEntry {
        key: format!(
            "{}.quant_state.bitsandbytes__{}",
            tensor.name,
            quant_type.name()
        ),
        longest: quant_state::longest(tensor.dtype, &tensor.shape, &quantization),
    };
    Ok((entries, Some(state)))
}

impl ShardFile {
    fn new(
        file_name: String,
        weights: Range<usize>,
        mut entries: Vec<Entry>,
        states: &HashMap<usize, StateEntry>,
    ) -> Result<ShardFile, SaveError> {
        // Larger elements first, so that all are aligned.
        entries.sort_by(|a, b| {
            let size = |entry: &Entry| std::cmp::Reverse(entry.dtype.bits());
            (size(a), &a.key).cmp(&(size(b), &b.key))
        });
        let mut shard = ShardFile {
            file_name,
            weights,
            states_offset: 0,
            entries,
            offsets: HashMap::new(),
            header_bytes: 0,
        };
        // Lengths and offsets only shrink from here, so that this is the longest header.
        let longest: Vec<(&str, u64)> = shard
            .weights
            .clone()
            .filter_map(|weight| states.get(&weight))
            .map(|state| (state.key.as_str(), state.longest as u64))
            .collect();
        shard.header_bytes = shard.header_text(&longest).len().next_multiple_of(8);
        if shard.header_bytes > MAX_HEADER_BYTES {
            return Err(SaveError::HeaderTooLarge {
                file: shard.file_name,
            });
        }
        let mut offset = 8 + shard.header_bytes as u64;
        for entry in &shard.entries {
            shard.offsets.insert((entry.weight, entry.content), offset);
            offset += entry.bytes;
        }
        shard.states_offset = offset;
        Ok(shard)
    }

    /// Where a part of a weight begins, counted from the start of the file.
    pub(super) fn offset(&self, weight: usize, content: Content) -> Option<u64> {
        self.offsets.get(&(weight, content)).copied()
    }

    /// The header with the length before it and the padding behind it. `states` are the quant
    /// states in the order of weights.
    pub(super) fn header(
        &self,
        layout: &Layout,
        states: &[(usize, String)],
    ) -> Result<Vec<u8>, SaveError> {
        let states: Option<Vec<(&str, u64)>> = states
            .iter()
            .map(|(weight, text)| {
                let entry = layout.states.get(weight)?;
                (text.len() <= entry.longest).then_some((entry.key.as_str(), text.len() as u64))
            })
            .collect();
        let text = self.header_text(&states.ok_or(SaveError::Internal(
            "a quant state is longer than was reckoned",
        ))?);
        let mut header = (self.header_bytes as u64).to_le_bytes().to_vec();
        header.extend_from_slice(text.as_bytes());
        header.resize(8 + self.header_bytes, b' ');
        Ok(header)
    }

    fn header_text(&self, states: &[(&str, u64)]) -> String {
        #[derive(Serialize)]
        struct Described<'a> {
            dtype: &'static str,
            shape: &'a [u64],
            data_offsets: [u64; 2],
        }
        let mut text = r#"{"__metadata__":{"format":"pt"}"#.to_owned();
        let mut position = 0;
        let mut add = |key: &str, dtype: DType, shape: &[u64], bytes: u64| {
            let described = Described {
                dtype: dtype.safetensors_name(),
                shape,
                data_offsets: [position, position + bytes],
            };
            position += bytes;
            // Strings and numbers always have a JSON form.
            let key = serde_json::to_string(key).unwrap_or_default();
            let described = serde_json::to_string(&described).unwrap_or_default();
            text += &format!(",{key}:{described}");
        };
        for entry in &self.entries {
            add(&entry.key, entry.dtype, &entry.shape, entry.bytes);
        }
        for &(key, bytes) in states {
            add(key, DType::U8, &[bytes], bytes);
        }
        text + "}"
    }
}
