//! Which files of a directory make up a checkpoint.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::CheckpointError;
use super::file::{io_error, read_text_with};
use super::index::{self, Index, MAX_INDEX_BYTES, MAX_SHARDS};
use crate::cancel::{self, CancelToken, Watch};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// Files that a directory may hold before it is no model directory.
const MAX_DIRECTORY_ENTRIES: usize = 100_000;

/// The files of a checkpoint.
#[derive(Debug)]
pub(crate) struct Located {
    /// Where config.json would be.
    pub(crate) directory: PathBuf,
    /// The files with the weights, in checkpoint order.
    pub(crate) shards: Vec<PathBuf>,
    /// The index, where there is one; its shards are those above.
    pub(crate) index: Option<Index>,
}

/// Finds the files: of a `.safetensors` file, an index, or a directory.
pub(crate) fn locate(path: &Path, cancel: &CancelToken) -> Result<Located, CheckpointError> {
    let metadata = fs::metadata(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => CheckpointError::NotFound { path: path.into() },
        _ => io_error("open", path)(source),
    })?;
    if metadata.is_dir() {
        return in_directory(path, cancel);
    }
    if !metadata.is_file() {
        return Err(CheckpointError::NotAFile { path: path.into() });
    }
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_path_buf(),
        _ => PathBuf::from("."),
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if name.ends_with(".safetensors.index.json") {
        return match with_index(&directory, path, cancel)? {
            Some(located) => Ok(located),
            None => Err(CheckpointError::NotFound { path: path.into() }),
        };
    }
    if is_safetensors(&name) {
        return Ok(Located {
            directory,
            shards: vec![path.into()],
            index: None,
        });
    }
    Err(CheckpointError::NotACheckpoint {
        path: path.into(),
        problem: "weights are read from files that end in .safetensors".into(),
    })
}

fn in_directory(directory: &Path, cancel: &CancelToken) -> Result<Located, CheckpointError> {
    if let Some(located) = with_index(directory, &directory.join(INDEX), cancel)? {
        return Ok(located);
    }
    let names = list(directory, cancel)?;
    let located = |shards: Vec<String>| Located {
        directory: directory.into(),
        shards: shards.iter().map(|name| directory.join(name)).collect(),
        index: None,
    };
    if names.iter().any(|name| name == SINGLE) {
        return Ok(located(vec![SINGLE.into()]));
    }
    if let Some(shards) = numbered_set(directory, &names)? {
        return Ok(located(shards));
    }
    let mut single = names.iter().filter(|name| is_safetensors(name));
    match (single.next(), single.next()) {
        (Some(name), None) => Ok(located(vec![name.clone()])),
        (Some(first), Some(second)) => Err(CheckpointError::Ambiguous {
            path: directory.into(),
            first: first.clone(),
            second: second.clone(),
        }),
        (None, _) if names.is_empty() => Err(CheckpointError::EmptyDirectory {
            path: directory.into(),
        }),
        (None, _) => match names.iter().find(|name| is_pickle(name)) {
            Some(file) => Err(CheckpointError::OnlyPickles {
                path: directory.into(),
                file: file.clone(),
            }),
            None => Err(CheckpointError::NotACheckpoint {
                path: directory.into(),
                problem: "there is no .safetensors file in it".into(),
            }),
        },
    }
}

/// The shards that an index lists; `None` where there is no index.
fn with_index(
    directory: &Path,
    path: &Path,
    cancel: &CancelToken,
) -> Result<Option<Located>, CheckpointError> {
    let Some(text) = read_text_with(path, "an index (bytes)", MAX_INDEX_BYTES, cancel)? else {
        return Ok(None);
    };
    let index = index::parse(path, &text, cancel)?;
    let shards: Vec<PathBuf> = index
        .shards
        .iter()
        .map(|name| directory.join(name))
        .collect();
    for (position, shard) in shards.iter().enumerate() {
        cancel.check()?;
        if !shard.exists() {
            let entry = index.entries.iter().find(|(_, at)| *at == position);
            return Err(CheckpointError::MissingShard {
                path: shard.clone(),
                tensor: entry.map_or_else(String::new, |(tensor, _)| tensor.clone()),
            });
        }
    }
    Ok(Some(Located {
        directory: directory.into(),
        shards,
        index: Some(index),
    }))
}

/// Names of everything in the directory, sorted. What is not Unicode cannot be a shard of ours.
fn list(directory: &Path, cancel: &CancelToken) -> Result<Vec<String>, CheckpointError> {
    let mut names = Vec::new();
    let mut watch = Watch::new(cancel);
    for entry in fs::read_dir(directory).map_err(io_error("list", directory))? {
        let entry = entry.map_err(io_error("list", directory))?;
        watch.item(0)?;
        if names.len() == MAX_DIRECTORY_ENTRIES {
            return Err(CheckpointError::TooLarge {
                path: directory.into(),
                what: "a number of files",
                have: MAX_DIRECTORY_ENTRIES as u64 + 1,
                limit: MAX_DIRECTORY_ENTRIES as u64,
            });
        }
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    Ok(cancel::sort_by(names, cancel, Ord::cmp)?)
}

fn is_safetensors(name: &str) -> bool {
    name.ends_with(".safetensors")
}

/// The names that PyTorch weights have on the Hugging Face hub.
fn is_pickle(name: &str) -> bool {
    (name.starts_with("pytorch_model") && name.ends_with(".bin"))
        || [".pt", ".pth", ".ckpt"]
            .iter()
            .any(|end| name.ends_with(end))
}

/// The one set of files named `*-0000i-of-0000N.safetensors`, in order, checked to be complete.
fn numbered_set(
    directory: &Path,
    names: &[String],
) -> Result<Option<Vec<String>>, CheckpointError> {
    // Shards by what all of a set share: the text before the number, and the total as written.
    let mut sets: BTreeMap<(&str, &str), BTreeMap<u64, &String>> = BTreeMap::new();
    for name in names {
        let Some(numbered) = Numbered::parse(name) else {
            continue;
        };
        let set = sets.entry((numbered.stem, numbered.total)).or_default();
        if let Some(first) = set.insert(numbered.number, name) {
            return Err(CheckpointError::Ambiguous {
                path: directory.into(),
                first: first.clone(),
                second: name.clone(),
            });
        }
    }
    let mut sets = sets.into_iter();
    let Some(((stem, total), set)) = sets.next() else {
        return Ok(None);
    };
    if let Some((_, other)) = sets.next() {
        let first = |set: &BTreeMap<u64, &String>| {
            set.values()
                .next()
                .map_or_else(String::new, |name| name.to_string())
        };
        return Err(CheckpointError::Ambiguous {
            path: directory.into(),
            first: first(&set),
            second: first(&other),
        });
    }
    // Numbered::parse admits only totals in range.
    let need: u64 = total.parse().unwrap_or(0);
    for number in 1..=need {
        if !set.contains_key(&number) {
            let width = total.len();
            return Err(CheckpointError::IncompleteSet {
                path: directory.into(),
                missing: format!("{stem}-{number:0width$}-of-{total}.safetensors"),
                need,
                have: set.len() as u64,
            });
        }
    }
    Ok(Some(set.into_values().cloned().collect()))
}

/// A name such as `model-00001-of-00004.safetensors`, taken apart.
struct Numbered<'a> {
    stem: &'a str,
    number: u64,
    total: &'a str,
}

impl<'a> Numbered<'a> {
    fn parse(name: &'a str) -> Option<Numbered<'a>> {
        let (rest, total) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let digits = |text: &str| {
            (!text.is_empty() && text.len() <= 9 && text.bytes().all(|b| b.is_ascii_digit()))
                .then(|| text.parse::<u64>().ok())
                .flatten()
        };
        let (count, number) = (digits(total)?, digits(number)?);
        (1..=count)
            .contains(&number)
            .then_some(())
            .filter(|()| count <= MAX_SHARDS as u64)?;
        Some(Numbered {
            stem,
            number,
            total,
        })
    }
}
