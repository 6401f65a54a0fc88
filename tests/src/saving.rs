//! Checkpoints written as an application does it, and what every one of them has to be.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use serde_json::Value;
use tightfit::save::{SaveError, SaveOptions, Saved, save};
use tightfit::types::Placement;

use crate::loading::Planned;
use crate::tensors::{FileTensor, FileTensors};

/// Has the default policy choose formats and writes the checkpoint.
pub fn save_with_auto(source: &Path, target: &Path, settings: &[(&str, &str)]) -> Saved {
    save_with(source, target, settings, &SaveOptions::default())
        .unwrap_or_else(|error| panic!("{error}"))
}

/// The same with options, where it may fail.
///
/// # Errors
/// Those of [`save`].
pub fn save_with(
    source: &Path,
    target: &Path,
    settings: &[(&str, &str)],
    options: &SaveOptions<'_>,
) -> Result<Saved, SaveError> {
    save_planned(
        &Planned::new(source, &["sim:1GiB"], settings),
        target,
        options,
    )
}

/// Writes what was planned.
///
/// # Errors
/// Those of [`save`].
pub fn save_planned(
    planned: &Planned,
    target: &Path,
    options: &SaveOptions<'_>,
) -> Result<Saved, SaveError> {
    let tensors = planned.plan.tensors.iter();
    let placements: Vec<Placement> = tensors.map(|tensor| tensor.placement).collect();
    save(&planned.checkpoint, &placements, target, options)
}

/// Options that make many small files.
pub fn small_shards() -> SaveOptions<'static> {
    SaveOptions::default().with_max_shard_bytes(100_000)
}

/// Every file of a directory by its name. There are no directories in it.
pub fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries =
        fs::read_dir(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    entries
        .map(|entry| {
            let entry = entry.expect("the directory can be read");
            let bytes = fs::read(entry.path()).expect("the file can be read");
            (entry.file_name().into_string().unwrap(), bytes)
        })
        .collect()
}

/// Names in a directory, hidden ones too.
pub fn names(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).expect("the directory can be read");
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// The tensors of a checkpoint that was written, after checks that hold for all of them: every
/// tensor begins at a multiple of its element size, and the index, if there is one, lists every
/// tensor in its file and knows the size of them all.
pub fn written(directory: &Path) -> FileTensors {
    let mut sizes = 0;
    let mut map = BTreeMap::new();
    for (name, bytes) in files(directory) {
        if !name.ends_with(".safetensors") {
            continue;
        }
        let file = SafeTensors::deserialize(&bytes).unwrap_or_else(|error| panic!("{error}"));
        for (key, view) in file.iter() {
            let offset = view.data().as_ptr().addr() - bytes.as_ptr().addr();
            let element = view.dtype().bitsize().div_ceil(8);
            assert!(
                view.data().is_empty() || offset.is_multiple_of(element),
                "{key} in {name}"
            );
            sizes += view.data().len();
            map.insert(key.to_owned(), Value::from(name.clone()));
        }
    }
    if let Some(index) = index(directory) {
        assert_eq!(index["metadata"]["total_size"], sizes);
        let listed: BTreeMap<String, Value> =
            serde_json::from_value(index["weight_map"].clone()).expect("names of files");
        assert_eq!(listed, map);
    } else {
        let files: BTreeSet<_> = map.into_values().map(|name| name.to_string()).collect();
        assert_eq!(files.len(), 1, "{files:?} without an index");
    }
    FileTensors::read(directory)
}

/// The index of a checkpoint that has one.
pub fn index(directory: &Path) -> Option<Value> {
    let text = fs::read(directory.join("model.safetensors.index.json")).ok()?;
    Some(serde_json::from_slice(&text).expect("an index is JSON"))
}

/// Asserts that both have the same tensors, types and shapes included.
#[track_caller]
pub fn assert_same_tensors(found: &FileTensors, expected: &FileTensors, context: &str) {
    let keys = |tensors: &FileTensors| tensors.0.keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(found), keys(expected), "{context}");
    for (name, tensor) in &found.0 {
        let theirs = expected.get(name);
        let text = |tensor: &FileTensor| match name.contains(".quant_state.") {
            true => String::from_utf8_lossy(&tensor.data).into_owned(),
            false => String::new(),
        };
        assert_eq!(text(tensor), text(theirs), "{name}, {context}");
        assert!(tensor == theirs, "{name}, {context}");
    }
}
