//! Which files of a directory make up a checkpoint.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::directory::Directory;
use super::file::{Shard, Source, io_error, read_text};
use super::file_kind::{FIRST_BYTES, FileKind};
use super::index::{self, Index, MAX_INDEX_BYTES, MAX_SHARDS};
use super::{CheckpointError, Remark, adapter};
use crate::cancel::CancelToken;

const INDEX: &str = "model.safetensors.index.json";
const INDEX_WHAT: &str = "an index (bytes)";
const SINGLE: &str = "model.safetensors";

/// The files of a checkpoint.
#[derive(Debug)]
pub(crate) struct Located {
    /// Where config.json would be.
    pub(crate) directory: Arc<Directory>,
    /// The files with the weights, in checkpoint order.
    pub(crate) shards: Vec<Source>,
    /// The index, where there is one; its shards are those above.
    pub(crate) index: Option<Index>,
    /// What whoever loads it should hear.
    pub(crate) remarks: Vec<Remark>,
}

/// Finds the files: of a `.safetensors` file, an index, or a directory. A file that `path` names
/// may be a link to anywhere, for the user named it; what lies beside it may not.
pub(crate) fn locate(path: &Path, cancel: &CancelToken) -> Result<Located, CheckpointError> {
    let metadata = fs::metadata(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => CheckpointError::NotFound { path: path.into() },
        _ => io_error("open", path)(source),
    })?;
    if metadata.is_dir() {
        return in_directory(Directory::open(path)?.into(), cancel);
    }
    if !metadata.is_file() {
        return Err(CheckpointError::NotAFile { path: path.into() });
    }
    let directory = Arc::new(Directory::open(match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    })?);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if name.ends_with(".safetensors.index.json") {
        return match read_text(path, INDEX_WHAT, MAX_INDEX_BYTES, cancel)? {
            Some(text) => with_index(&directory, path, &text, cancel),
            None => Err(CheckpointError::NotFound { path: path.into() }),
        };
    }
    if is_safetensors(&name) {
        return Ok(Located {
            directory,
            shards: vec![Source::Named(path.into())],
            index: None,
            remarks: Vec::new(),
        });
    }
    let shard = Shard::open(Source::Named(path.into()))?;
    if let Some(kind) = kind(&shard).or_else(|| FileKind::of_name(&name)) {
        return Err(CheckpointError::WrongKind {
            path: path.into(),
            kind,
        });
    }
    Err(CheckpointError::NotACheckpoint {
        path: path.into(),
        problem: "weights are read from files that end in .safetensors".into(),
    })
}

/// The files of a list, which may be links to anywhere as the user named each. All beside the first, and
/// all that an index there lists, they are what that index says.
pub(crate) fn locate_files(
    files: &[PathBuf],
    cancel: &CancelToken,
) -> Result<Located, CheckpointError> {
    let Some(first) = files.first() else {
        return Err(CheckpointError::NoFiles);
    };
    if files.len() > MAX_SHARDS {
        return Err(CheckpointError::TooLarge {
            path: first.clone(),
            what: "a number of files, the first of which is this,",
            have: files.len() as u64,
            limit: MAX_SHARDS as u64,
        });
    }
    let parent = |path: &Path| match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_path_buf(),
        _ => PathBuf::from("."),
    };
    let directory = Arc::new(Directory::open(&parent(first))?);
    let mut names = BTreeSet::new();
    let mut are_beside = true;
    for path in files {
        cancel.check()?;
        let metadata = fs::metadata(path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => CheckpointError::NotFound { path: path.into() },
            _ => io_error("open", path)(source),
        })?;
        if !metadata.is_file() {
            return Err(CheckpointError::NotAFile { path: path.into() });
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if !is_safetensors(&name) {
            return Err(CheckpointError::NotACheckpoint {
                path: path.into(),
                problem: "weights are read from files that end in .safetensors".into(),
            });
        }
        are_beside &= parent(path) == directory.path();
        names.insert(name.into_owned());
    }
    if are_beside && names.len() == files.len() {
        let index_path = directory.path().join(INDEX);
        if let Some(text) = directory.read_text(INDEX, INDEX_WHAT, MAX_INDEX_BYTES, cancel)? {
            match index::parse(&index_path, &text, cancel) {
                Err(CheckpointError::Cancelled) => return Err(CheckpointError::Cancelled),
                Ok(index)
                    if names
                        .iter()
                        .eq(index.shards.iter().collect::<BTreeSet<_>>()) =>
                {
                    return indexed(&directory, &index_path, index, cancel);
                }
                // It is of other files.
                _ => {}
            }
        }
    }
    Ok(Located {
        directory,
        shards: files.iter().cloned().map(Source::Named).collect(),
        index: None,
        remarks: Vec::new(),
    })
}

/// What a file is by its first bytes, if it is something else than it should be.
pub(crate) fn kind(shard: &Shard) -> Option<FileKind> {
    let mut first = vec![0; shard.length().min(FIRST_BYTES as u64) as usize];
    shard.read_at(0, &mut first).ok()?;
    FileKind::of(&first)
}

fn in_directory(
    directory: Arc<Directory>,
    cancel: &CancelToken,
) -> Result<Located, CheckpointError> {
    let outcome = files_in(&directory, cancel);
    // What a download has not brought yet is not what is wrong.
    let is_missing = matches!(
        outcome,
        Err(CheckpointError::MissingShard { .. }
            | CheckpointError::IncompleteSet { .. }
            | CheckpointError::NotACheckpoint { .. }
            | CheckpointError::EmptyDirectory { .. })
    );
    match directory.unfinished().filter(|_| is_missing) {
        Some(unfinished) => Err(CheckpointError::DownloadNotEnded {
            path: directory.path().into(),
            files: unfinished.files,
            bytes: unfinished.bytes,
        }),
        None => outcome,
    }
}

fn files_in(directory: &Arc<Directory>, cancel: &CancelToken) -> Result<Located, CheckpointError> {
    let located = |shards: Vec<String>| Located {
        shards: sources(directory, shards),
        directory: Arc::clone(directory),
        index: None,
        remarks: Vec::new(),
    };
    let index = directory.read_text(INDEX, INDEX_WHAT, MAX_INDEX_BYTES, cancel)?;
    let index_path = directory.path().join(INDEX);
    // As for transformers, which does not look at an index then. Where it leads is checked when it is
    // opened.
    if !matches!(directory.has(SINGLE), Ok(false)) {
        let Some(text) = index else {
            return Ok(located(vec![SINGLE.into()]));
        };
        let parsed = match index::parse(&index_path, &text, cancel) {
            Err(CheckpointError::Cancelled) => return Err(CheckpointError::Cancelled),
            parsed => parsed.ok(),
        };
        let shards = parsed.as_ref().map_or(&[][..], |index| &index.shards);
        let is_one_of_them = shards.iter().any(|shard| shard == SINGLE);
        return Ok(match parsed {
            Some(index) if is_one_of_them => indexed(directory, &index_path, index, cancel)?,
            _ => {
                let mut missing = None;
                for shard in shards {
                    cancel.check()?;
                    if !directory.has(shard).unwrap_or(false) {
                        missing = Some(shard.clone());
                        break;
                    }
                }
                Located {
                    remarks: vec![Remark::IndexIgnored {
                        index: index_path,
                        missing,
                    }],
                    ..located(vec![SINGLE.into()])
                }
            }
        });
    }
    if let Some(text) = index {
        return with_index(directory, &index_path, &text, cancel);
    }
    let names = directory.list(cancel)?;
    let path = directory.path();
    if let Some(shards) = numbered_set(path, &names)? {
        return Ok(located(shards));
    }
    let is_adapter = names.iter().any(|name| name == adapter::CONFIG);
    let mut single = names
        .iter()
        .filter(|name| is_safetensors(name) && !(is_adapter && name.starts_with("adapter")));
    match (single.next(), single.next()) {
        (Some(name), None) => Ok(located(vec![name.clone()])),
        (Some(first), Some(second)) => Err(CheckpointError::Ambiguous {
            path: path.into(),
            first: first.clone(),
            second: second.clone(),
        }),
        (None, _) if is_adapter => Err(adapter::error(directory, cancel)),
        (None, _) if names.is_empty() => Err(CheckpointError::EmptyDirectory { path: path.into() }),
        (None, _) => {
            let known = |name: &String| Some((name.clone(), FileKind::of_name(name)?));
            Err(match names.iter().find_map(known) {
                Some((file, FileKind::Pickle)) => CheckpointError::OnlyPickles {
                    path: path.into(),
                    file,
                },
                Some((file, kind)) => CheckpointError::WrongKind {
                    path: path.join(file),
                    kind,
                },
                None => CheckpointError::NotACheckpoint {
                    path: path.into(),
                    problem: "there is no .safetensors file in it".into(),
                },
            })
        }
    }
}

/// The shards that an index with this text lists.
fn with_index(
    directory: &Arc<Directory>,
    path: &Path,
    text: &str,
    cancel: &CancelToken,
) -> Result<Located, CheckpointError> {
    let index = index::parse(path, text, cancel)
        .map_err(|error| error.or_kind(FileKind::of(text.as_bytes())))?;
    indexed(directory, path, index, cancel)
}

/// The shards of an index, all of which are there.
fn indexed(
    directory: &Arc<Directory>,
    path: &Path,
    index: Index,
    cancel: &CancelToken,
) -> Result<Located, CheckpointError> {
    for (position, shard) in index.shards.iter().enumerate() {
        cancel.check()?;
        if !directory.has(shard)? {
            let entry = index.entries.iter().find(|(_, at)| *at == position);
            return Err(CheckpointError::MissingShard {
                path: path.with_file_name(shard),
                tensor: entry.map_or_else(String::new, |(tensor, _)| tensor.clone()),
            });
        }
    }
    Ok(Located {
        shards: sources(directory, index.shards.clone()),
        directory: Arc::clone(directory),
        index: Some(index),
        remarks: Vec::new(),
    })
}

fn sources(directory: &Arc<Directory>, names: Vec<String>) -> Vec<Source> {
    let source = |name| Source::In(Arc::clone(directory), name);
    names.into_iter().map(source).collect()
}

fn is_safetensors(name: &str) -> bool {
    name.ends_with(".safetensors")
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
