//! `model.safetensors.index.json`: which shard holds which tensor.
//!
//! Written by transformers and huggingface_hub as `{"metadata": {..}, "weight_map": {tensor: file}}`.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, Visitor};

use super::error::shortened;
use super::file::is_plain_file_name;
use super::header::{MAX_NAME_BYTES, MAX_TENSORS};
use super::text::{MAX_VALUE_BYTES, long_value};
use super::visit::{Skip, Visited, counted};
use super::{CheckpointError, python_json};
use crate::cancel::{self, CancelToken, Watch};

/// Largest index that is read, in bytes.
pub const MAX_INDEX_BYTES: u64 = 256_000_000;
/// Most shards of a checkpoint.
pub const MAX_SHARDS: usize = 10_000;

const WHAT: &str = "the index";

/// Which shard holds which tensor. Every shard is named by at least one entry.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Index {
    /// Plain file names beside the index, sorted.
    pub(crate) shards: Vec<String>,
    /// Tensor and position of its shard in `shards`, sorted by tensor, no tensor twice.
    pub(crate) entries: Vec<(String, usize)>,
}

impl Index {
    /// Position of the shard that holds this tensor.
    pub(crate) fn shard_of(&self, tensor: &str) -> Option<usize> {
        let by_name = |(name, _): &(String, usize)| name.as_str().cmp(tensor);
        let position = self.entries.binary_search_by(by_name).ok()?;
        Some(self.entries[position].1)
    }
}

/// Parses the text of the index at `path` (named in errors only). It may be JSON as Python writes it.
pub(crate) fn parse(
    path: &Path,
    text: &str,
    cancel: &CancelToken,
) -> Result<Index, CheckpointError> {
    let text = python_json::without_mark(text);
    match parse_strict(path, text, cancel) {
        // Looked at only then: it may be a quarter of a gigabyte, and is nearly always JSON.
        Err(error @ CheckpointError::Json { .. }) => match python_json::strict(text, cancel)? {
            Cow::Owned(strict) => parse_strict(path, &strict, cancel),
            Cow::Borrowed(_) => Err(error),
        },
        other => other,
    }
}

fn parse_strict(path: &Path, text: &str, cancel: &CancelToken) -> Result<Index, CheckpointError> {
    if !text.trim_start().starts_with('{') {
        return Err(CheckpointError::NotAnObject {
            path: path.into(),
            what: WHAT,
        });
    }
    if let Some(have) = long_value(text, cancel)? {
        return Err(CheckpointError::TooLarge {
            path: path.into(),
            what: "a single value in the index (bytes)",
            have: have as u64,
            limit: MAX_VALUE_BYTES as u64,
        });
    }
    let mut collected = Collected {
        shards: HashMap::new(),
        entries: Vec::new(),
        seen: false,
        visited: Visited::new(path, cancel),
    };
    let mut json = serde_json::Deserializer::from_str(text);
    let outcome = IndexSeed(&mut collected)
        .deserialize(&mut json)
        .and_then(|()| json.end());
    collected.visited.end(outcome, WHAT)?;
    if collected.entries.is_empty() {
        return Err(CheckpointError::EmptyIndex { path: path.into() });
    }
    let mut entries = cancel::sort_by(collected.entries, cancel, Ord::cmp)?;
    let mut watch = Watch::new(cancel);
    for pair in entries.windows(2) {
        watch.item(pair[0].0.len())?;
        if pair[0].0 == pair[1].0 {
            return Err(CheckpointError::DuplicateEntry {
                path: path.into(),
                tensor: pair[0].0.clone(),
            });
        }
    }
    // Positions in order of appearance become positions in order of name.
    let mut shards: Vec<(String, usize)> = collected.shards.into_iter().collect();
    shards.sort_unstable();
    let mut position = vec![0; shards.len()];
    for (sorted, (_, appeared)) in shards.iter().enumerate() {
        position[*appeared] = sorted;
    }
    for (_, shard) in &mut entries {
        *shard = position[*shard];
    }
    Ok(Index {
        shards: shards.into_iter().map(|(name, _)| name).collect(),
        entries,
    })
}

struct Collected<'p> {
    /// Names of the shards, with the order in which they appeared.
    shards: HashMap<String, usize>,
    entries: Vec<(String, usize)>,
    seen: bool,
    visited: Visited<'p>,
}

impl Collected<'_> {
    fn push<E: de::Error>(&mut self, tensor: String, shard: String) -> Result<(), E> {
        if tensor.len() > MAX_NAME_BYTES {
            return Err(self.visited.stop(CheckpointError::BadTensorName {
                path: self.visited.path.into(),
                tensor: shortened(&tensor),
                problem: "is too long",
            }));
        }
        if !is_plain_file_name(&shard) {
            return Err(self.visited.stop(CheckpointError::UnsafeShardName {
                path: self.visited.path.into(),
                tensor,
                shard: shortened(&shard),
            }));
        }
        if self.entries.len() == MAX_TENSORS {
            return Err(self.visited.too_large("a number of tensors", MAX_TENSORS));
        }
        let position = match self.shards.get(&shard) {
            Some(&position) => position,
            None if self.shards.len() == MAX_SHARDS => {
                return Err(self.visited.too_large("a number of shards", MAX_SHARDS));
            }
            None => {
                let position = self.shards.len();
                self.shards.insert(shard, position);
                position
            }
        };
        self.entries.push((tensor, position));
        Ok(())
    }
}

struct IndexSeed<'a, 'p>(&'a mut Collected<'p>);

impl<'de> DeserializeSeed<'de> for IndexSeed<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for IndexSeed<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map with weight_map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            counted(&mut self.0.visited.watch, key.len())?;
            if key != "weight_map" {
                map.next_value_seed(Skip(&mut self.0.visited.watch))?;
                continue;
            }
            if std::mem::replace(&mut self.0.seen, true) {
                return Err(de::Error::duplicate_field("weight_map"));
            }
            map.next_value_seed(WeightMapSeed(self.0))?;
        }
        if !self.0.seen {
            return Err(de::Error::missing_field("weight_map"));
        }
        Ok(())
    }
}

struct WeightMapSeed<'a, 'p>(&'a mut Collected<'p>);

impl<'de> DeserializeSeed<'de> for WeightMapSeed<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for WeightMapSeed<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of tensors to shards")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some((tensor, shard)) = map.next_entry::<String, String>()? {
            counted(&mut self.0.visited.watch, tensor.len() + shard.len())?;
            self.0.push(tensor, shard)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(text: &str) -> Result<Index, CheckpointError> {
        parse(
            Path::new("model.safetensors.index.json"),
            text,
            &CancelToken::new(),
        )
    }

    #[test]
    fn shards_are_sorted_by_name_and_entries_follow() {
        let index = index(
            r#"{"metadata":{"total_size":6},"weight_map":{"a":"s2","c":"s1","b":"s2","d":"s3"}}"#,
        )
        .unwrap();
        assert_eq!(index.shards, ["s1", "s2", "s3"]);
        let expected = [("a", 1), ("b", 1), ("c", 0), ("d", 2)];
        assert_eq!(index.entries, expected.map(|(t, s)| (t.to_owned(), s)));
    }

    #[test]
    fn shards_outside_of_the_directory_are_refused_by_entry() {
        for bad in [
            "../../etc/passwd",
            "/etc/passwd",
            "..",
            ".",
            "",
            "a/b.safetensors",
            "..\\\\x",
            "C:x",
            "x\\u0000y",
        ] {
            let text = format!(r#"{{"weight_map":{{"fine":"x","bad":"{bad}"}}}}"#);
            match index(&text) {
                Err(CheckpointError::UnsafeShardName { tensor, .. }) => assert_eq!(tensor, "bad"),
                other => panic!("{bad}: {other:?}"),
            }
        }
    }

    #[test]
    fn what_is_no_index_is_an_error() {
        type Check = fn(&CheckpointError) -> bool;
        let json: Check = |e| matches!(e, CheckpointError::Json { .. });
        let cases: [(&str, Check); 9] = [
            ("", |e| matches!(e, CheckpointError::NotAnObject { .. })),
            ("[]", |e| matches!(e, CheckpointError::NotAnObject { .. })),
            ("{", json),
            ("{}", json),
            (r#"{"weight_map":[]}"#, json),
            (r#"{"weight_map":{"a":1}}"#, json),
            (r#"{"weight_map":{"a":"x"},"weight_map":{}}"#, json),
            (r#"{"weight_map":{}}"#, |e| {
                matches!(e, CheckpointError::EmptyIndex { .. })
            }),
            (
                r#"{"weight_map":{"a":"x","b":"x","a":"y"}}"#,
                |e| matches!(e, CheckpointError::DuplicateEntry { tensor, .. } if tensor == "a"),
            ),
        ];
        for (text, check) in cases {
            let error = index(text).unwrap_err();
            assert!(check(&error), "{text}: {error:?}");
        }
    }

    #[test]
    fn what_only_python_calls_json_is_read() {
        let index = index(
            "\u{feff}{\"metadata\":{\"total_size\":Infinity,\"loss\":NaN},\"weight_map\":{\"NaN\":\"x\"}}",
        );
        assert_eq!(index.unwrap().entries, [("NaN".to_owned(), 0)]);
    }

    #[test]
    fn deep_nesting_does_not_overflow_the_stack() {
        let deep = format!(
            r#"{{"metadata":{}1{},"weight_map":{{"a":"x"}}}}"#,
            "[".repeat(1_000_000),
            "]".repeat(1_000_000)
        );
        // Skipped or refused: either way without recursion.
        let _ = index(&deep);
    }
}
