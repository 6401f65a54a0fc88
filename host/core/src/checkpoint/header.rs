//! The header of a safetensors file: parsed by our own visitor, then checked.
//!
//! The safetensors crate parses headers into a map, which keeps only the last of two tensors of
//! one name. Here they go into a list, so that the second one is seen.
//!
//! Format: <https://github.com/huggingface/safetensors#format>. Eight bytes give the header's
//! length (little-endian), then the header as JSON, then the data without gaps.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use super::CheckpointError;
use super::error::shortened;
use super::text::{MAX_VALUE_BYTES, long_value};
use super::visit::{Skip, Visited, counted};
use crate::cancel::{self, CancelToken, Watch};
use crate::types::DType;

/// Largest header that is read, in bytes; the same limit as in the safetensors crate.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Most tensors of a checkpoint.
pub const MAX_TENSORS: usize = 1_000_000;
/// Longest name of a tensor, in bytes.
pub const MAX_NAME_BYTES: usize = 4096;
/// Most dimensions of a tensor.
pub const MAX_DIMENSIONS: usize = 16;

/// Most entries of `__metadata__`. Real ones have a handful; training tools write some hundreds.
pub const MAX_METADATA: usize = 65_536;

/// A tensor as the header of its file describes it, with offsets into the data after the header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HeaderTensor {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<u64>,
    /// First byte, counted from the end of the header.
    pub(crate) begin: u64,
    /// Byte after the last one.
    pub(crate) end: u64,
}

/// A header whose tensors tile the data: sorted by offset, no gaps, no overlaps, no name twice.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) tensors: Vec<HeaderTensor>,
    pub(crate) metadata: BTreeMap<String, String>,
}

/// Length of the header in bytes from the first 8 bytes of a file, checked against the length of
/// the file before anybody allocates that much.
pub(crate) fn header_length(
    path: &Path,
    first: [u8; 8],
    file_length: u64,
) -> Result<usize, CheckpointError> {
    let length = u64::from_le_bytes(first);
    if length > MAX_HEADER_BYTES {
        return Err(CheckpointError::TooLarge {
            path: path.into(),
            what: "a header (bytes)",
            have: length,
            limit: MAX_HEADER_BYTES,
        });
    }
    if length + 8 > file_length {
        return Err(CheckpointError::HeaderPastEnd {
            path: path.into(),
            need: length + 8,
            have: file_length,
        });
    }
    usize::try_from(length).map_err(|_| CheckpointError::TooLarge {
        path: path.into(),
        what: "a header (bytes)",
        have: length,
        limit: usize::MAX as u64,
    })
}

/// Parses and checks the header of the file at `path` (named in errors only), which is
/// `file_length` bytes long.
pub(crate) fn parse(
    path: &Path,
    text: &str,
    file_length: u64,
    cancel: &CancelToken,
) -> Result<Header, CheckpointError> {
    if !text.starts_with('{') {
        return Err(CheckpointError::NotAnObject {
            path: path.into(),
            what: WHAT,
        });
    }
    if let Some(have) = long_value(text, cancel)? {
        return Err(CheckpointError::TooLarge {
            path: path.into(),
            what: "a single value in the header (bytes)",
            have: have as u64,
            limit: MAX_VALUE_BYTES as u64,
        });
    }
    let mut collected = Collected {
        header: Header::default(),
        visited: Visited::new(path, cancel),
    };
    let mut json = serde_json::Deserializer::from_str(text);
    let outcome = HeaderSeed(&mut collected)
        .deserialize(&mut json)
        .and_then(|()| json.end());
    collected.visited.end(outcome, WHAT)?;
    let Header { tensors, metadata } = collected.header;
    let tensors = cancel::sort_by(tensors, cancel, |a, b| {
        (a.begin, a.end).cmp(&(b.begin, b.end))
    })?;
    check_names(path, &tensors, cancel)?;
    check_tiling(path, &tensors, text.len() as u64 + 8, file_length, cancel)?;
    Ok(Header { tensors, metadata })
}

pub(super) const WHAT: &str = "the safetensors header";

/// No name occurs twice.
fn check_names(
    path: &Path,
    tensors: &[HeaderTensor],
    cancel: &CancelToken,
) -> Result<(), CheckpointError> {
    let names: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    let names = cancel::sort_by(names, cancel, |a, b| a.cmp(b))?;
    let mut watch = Watch::new(cancel);
    for pair in names.windows(2) {
        watch.item(pair[0].len())?;
        if pair[0] == pair[1] {
            return Err(CheckpointError::DuplicateTensor {
                tensor: pair[0].into(),
                first: path.into(),
                second: path.into(),
            });
        }
    }
    Ok(())
}

/// The tensors, sorted by offset, cover the file from `data_start` to its end exactly.
fn check_tiling(
    path: &Path,
    tensors: &[HeaderTensor],
    data_start: u64,
    file_length: u64,
    cancel: &CancelToken,
) -> Result<(), CheckpointError> {
    let mut covered = 0;
    let mut watch = Watch::new(cancel);
    for (i, tensor) in tensors.iter().enumerate() {
        watch.item(0)?;
        if tensor.begin < covered {
            // The one that reaches furthest is the one before: all earlier ones tile.
            return Err(CheckpointError::Overlap {
                path: path.into(),
                first: tensors[i - 1].name.clone(),
                second: tensor.name.clone(),
            });
        }
        if tensor.begin > covered {
            return Err(CheckpointError::Gap {
                path: path.into(),
                tensor: tensor.name.clone(),
                bytes: tensor.begin - covered,
            });
        }
        covered = tensor.end;
    }
    let data = file_length.saturating_sub(data_start);
    let need = covered.saturating_add(data_start);
    if covered > data {
        let first = tensors.iter().find(|tensor| tensor.end > data);
        return Err(CheckpointError::Truncated {
            path: path.into(),
            tensor: first.map_or_else(String::new, |tensor| tensor.name.clone()),
            need,
            have: file_length,
        });
    }
    if covered < data {
        return Err(CheckpointError::TrailingBytes {
            path: path.into(),
            need,
            have: file_length,
        });
    }
    Ok(())
}

/// What the visitors fill.
struct Collected<'p> {
    header: Header,
    visited: Visited<'p>,
}

impl Collected<'_> {
    /// Checks the name of a tensor before it is kept.
    fn name<E: de::Error>(&mut self, name: String) -> Result<String, E> {
        let problem = if name.is_empty() {
            "is empty"
        } else if name.len() > MAX_NAME_BYTES {
            "is too long"
        } else if name.chars().any(char::is_control) {
            "holds control characters"
        } else {
            return Ok(name);
        };
        Err(self.visited.stop(CheckpointError::BadTensorName {
            path: self.visited.path.into(),
            tensor: shortened(&name),
            problem,
        }))
    }

    /// Checks one entry for itself and keeps it.
    fn push<E: de::Error>(&mut self, name: String, entry: Entry) -> Result<(), E> {
        let path = || self.visited.path.into();
        let (begin, end) = entry.offsets;
        let failure = if entry.dimensions > MAX_DIMENSIONS {
            CheckpointError::TooManyDimensions {
                path: path(),
                tensor: name,
                limit: MAX_DIMENSIONS,
            }
        } else if begin > end {
            CheckpointError::ReversedOffsets {
                path: path(),
                tensor: name,
                begin,
                end,
            }
        } else {
            match entry.dtype {
                Err(dtype) => CheckpointError::UnknownDType {
                    path: path(),
                    tensor: name,
                    dtype,
                },
                Ok(dtype) => match dtype.tensor_bytes(&entry.shape) {
                    None => CheckpointError::ShapeOverflow {
                        path: path(),
                        tensor: name,
                        dtype,
                        shape: entry.shape,
                    },
                    Some(need) if need != end - begin => CheckpointError::SizeMismatch {
                        path: path(),
                        tensor: name,
                        need,
                        have: end - begin,
                    },
                    Some(_) => {
                        self.header.tensors.push(HeaderTensor {
                            name,
                            dtype,
                            shape: entry.shape,
                            begin,
                            end,
                        });
                        return Ok(());
                    }
                },
            }
        };
        Err(self.visited.stop(failure))
    }
}

/// The whole header: a map of names to entries, and `__metadata__`.
struct HeaderSeed<'a, 'p>(&'a mut Collected<'p>);

impl<'de> DeserializeSeed<'de> for HeaderSeed<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for HeaderSeed<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut metadata = false;
        while let Some(key) = map.next_key::<String>()? {
            counted(&mut self.0.visited.watch, key.len())?;
            if key == "__metadata__" {
                if std::mem::replace(&mut metadata, true) {
                    return Err(de::Error::duplicate_field("__metadata__"));
                }
                map.next_value_seed(MetadataSeed(self.0))?;
                continue;
            }
            if self.0.header.tensors.len() == MAX_TENSORS {
                return Err(self.0.visited.too_large("a number of tensors", MAX_TENSORS));
            }
            let name = self.0.name(key)?;
            let entry = map.next_value_seed(EntrySeed(&mut self.0.visited.watch))?;
            self.0.push(name, entry)?;
        }
        Ok(())
    }
}

/// `__metadata__`: texts by name, or null.
struct MetadataSeed<'a, 'p>(&'a mut Collected<'p>);

impl<'de> DeserializeSeed<'de> for MetadataSeed<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for MetadataSeed<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of texts")
    }

    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some((key, value)) = map.next_entry::<String, String>()? {
            counted(&mut self.0.visited.watch, key.len() + value.len())?;
            // Tiny entries take ten times as much memory as they take in the file.
            if self.0.header.metadata.len() == MAX_METADATA {
                return Err(self
                    .0
                    .visited
                    .too_large("a number of metadata entries", MAX_METADATA));
            }
            self.0.header.metadata.insert(key, value);
        }
        Ok(())
    }
}

/// One tensor as it is written, not yet checked.
struct Entry {
    /// The type, or the text that is none.
    dtype: Result<DType, String>,
    /// Not more than [`MAX_DIMENSIONS`] of them are kept.
    shape: Vec<u64>,
    dimensions: usize,
    offsets: (u64, u64),
}

struct EntrySeed<'a, 'p>(&'a mut Watch<'p>);

impl<'de> DeserializeSeed<'de> for EntrySeed<'_, '_> {
    type Value = Entry;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Entry, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for EntrySeed<'_, '_> {
    type Value = Entry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entry, A::Error> {
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(key) = map.next_key_seed(KeySeed)? {
            counted(self.0, 0)?;
            match key {
                Key::DType => {
                    if dtype.replace(map.next_value_seed(DTypeSeed)?).is_some() {
                        return Err(de::Error::duplicate_field("dtype"));
                    }
                }
                Key::Shape => {
                    if shape
                        .replace(map.next_value_seed(ShapeSeed(self.0))?)
                        .is_some()
                    {
                        return Err(de::Error::duplicate_field("shape"));
                    }
                }
                Key::Offsets => {
                    if offsets.replace(map.next_value::<(u64, u64)>()?).is_some() {
                        return Err(de::Error::duplicate_field("data_offsets"));
                    }
                }
                Key::Other => {
                    map.next_value_seed(Skip(self.0))?;
                }
            }
        }
        let (shape, dimensions) = shape.ok_or_else(|| de::Error::missing_field("shape"))?;
        Ok(Entry {
            dtype: dtype.ok_or_else(|| de::Error::missing_field("dtype"))?,
            shape,
            dimensions,
            offsets: offsets.ok_or_else(|| de::Error::missing_field("data_offsets"))?,
        })
    }
}

/// The keys of an entry. Others are skipped, as in the safetensors crate.
enum Key {
    DType,
    Shape,
    Offsets,
    Other,
}

struct KeySeed;

impl<'de> DeserializeSeed<'de> for KeySeed {
    type Value = Key;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Key, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeySeed {
    type Value = Key;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: de::Error>(self, key: &str) -> Result<Key, E> {
        Ok(match key {
            "dtype" => Key::DType,
            "shape" => Key::Shape,
            "data_offsets" => Key::Offsets,
            _ => Key::Other,
        })
    }
}

struct DTypeSeed;

impl<'de> DeserializeSeed<'de> for DTypeSeed {
    type Value = Result<DType, String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for DTypeSeed {
    type Value = Result<DType, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of an element type")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<Self::Value, E> {
        Ok(DType::from_safetensors_name(name).ok_or_else(|| shortened(name)))
    }
}

/// Reads the dimensions, keeping no more than are legal but counting all.
struct ShapeSeed<'a, 'p>(&'a mut Watch<'p>);

impl<'de> DeserializeSeed<'de> for ShapeSeed<'_, '_> {
    type Value = (Vec<u64>, usize);

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for ShapeSeed<'_, '_> {
    type Value = (Vec<u64>, usize);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of dimensions")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let (mut shape, mut count) = (Vec::new(), 0);
        while let Some(dimension) = seq.next_element::<u64>()? {
            counted(self.0, 0)?;
            count += 1;
            if count <= MAX_DIMENSIONS {
                shape.push(dimension);
            }
        }
        Ok((shape, count))
    }
}
