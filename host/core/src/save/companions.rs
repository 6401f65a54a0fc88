//! What else belongs to a model: tokenizer, generation settings, chat template. Small files beside
//! the weights, known by how their names end; and the folders that have such files only, such as
//! processors, or that `modules.json` names, as sentence-transformers' `1_Pooling`.
//!
//! They are looked at before anything is written, so that a file that does not belong here is
//! refused at once, and copied at the end as the files that they were then.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use super::target::Target;
use super::{COPY_BYTES, SaveError};
use crate::cancel::CancelToken;
use crate::checkpoint::{
    CheckpointError, Directory, MAX_COMPANION_BYTES, MAX_CONFIG_BYTES, ReadFailure, Shard, Source,
    is_plain_file_name, without_mark,
};
use crate::types::Bytes;

/// How the names of such files end.
const EXTENSIONS: [&str; 6] = ["json", "txt", "model", "jinja", "tiktoken", "bpe"];
/// How the names of weights end, and of what is made for them.
const WEIGHTS: [&str; 14] = [
    "safetensors",
    "bin",
    "pt",
    "pth",
    "ckpt",
    "pkl",
    "h5",
    "msgpack",
    "onnx",
    "onnx_data",
    "gguf",
    "xml",
    "tflite",
    "mlmodel",
];
/// Folders in folders that are looked into.
const MAX_DEPTH: usize = 2;
/// Most folders that are looked into.
const MAX_FOLDERS: usize = 1000;
/// In which modelopt says how it has quantized.
const METHOD: &str = "hf_quant_config.json";
/// What sentence-transformers' modules are.
const MODULES: &str = "modules.json";

/// Most bytes of all files beside the weights that [`save`](super::save) copies.
pub const MAX_COMPANIONS_BYTES: u64 = 256 << 20;
/// Most files beside the weights that [`save`](super::save) copies.
pub const MAX_COMPANIONS: usize = 1000;

/// A file beside the weights that was not copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftOut {
    /// Its name.
    pub file: String,
    /// Why it was left out.
    pub reason: LeftOutReason,
}

/// Why a file beside the weights was not copied.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum LeftOutReason {
    /// It is a directory, a pipe or a device.
    NotAFile,
    /// It is a link to a file of the checkpoint that is not there.
    Missing,
    /// It is a folder with weights of its own that `modules.json` does not name.
    OtherWeights,
    /// It is a folder, and with its files there would be more than [`MAX_COMPANIONS`].
    TooMany,
    /// It is a file of a module, and of a kind that is not copied, for it can hold code.
    Kind,
    /// It is a folder, and reached through a link.
    Link,
    /// Its name holds control characters, or what separates directories on some system.
    Name,
    /// It is larger than [`MAX_COMPANION_BYTES`].
    TooLarge {
        /// Its size in bytes.
        have: u64,
    },
    /// With those before it in the order of names it is more than [`MAX_COMPANIONS_BYTES`].
    TooLargeTogether {
        /// Its size in bytes.
        have: u64,
    },
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} was not copied: ", self.file)?;
        match self.reason {
            LeftOutReason::NotAFile => f.write_str("it is not a regular file"),
            LeftOutReason::OtherWeights => f.write_str("it is a folder with weights of its own"),
            LeftOutReason::TooMany => write!(
                f,
                "with what is in it there would be more than {MAX_COMPANIONS} files beside the weights"
            ),
            LeftOutReason::Kind => f.write_str("files of its kind can hold code"),
            LeftOutReason::Link => f.write_str("it is a folder that is reached through a link"),
            LeftOutReason::Missing => f.write_str("it is a link to a file that is not there"),
            LeftOutReason::Name => f.write_str("that is no name for a file of a model"),
            LeftOutReason::TooLarge { have } => write!(
                f,
                "it has {have} bytes, and a file beside the weights at most {MAX_COMPANION_BYTES}"
            ),
            LeftOutReason::TooLargeTogether { have } => write!(
                f,
                "with its {have} bytes the files beside the weights would have more than {} in all",
                Bytes(MAX_COMPANIONS_BYTES)
            ),
        }
    }
}

/// The files to copy.
#[derive(Debug, Default)]
pub(super) struct Companions {
    /// By their names in the directory, folders separated by slashes.
    files: Vec<(String, Shard)>,
    /// Folders that these lie in, each behind the one that it is in.
    folders: Vec<String>,
    pub(super) left_out: Vec<LeftOut>,
    bytes: u64,
}

impl Companions {
    /// Looks at what lies in the checkpoint's directory. Where a single file of it was named, folders
    /// that `modules.json` does not name are somebody else's. What describes how weights were quantized
    /// by another method is left where they are decoded.
    pub(super) fn find(
        directory: &Arc<Directory>,
        is_single_file: bool,
        is_decoded: bool,
        cancel: &CancelToken,
    ) -> Result<Companions, SaveError> {
        let names = directory.list(cancel)?;
        let mut found = Companions::default();
        let files: Vec<String> = names
            .iter()
            .filter(|name| is_companion(name) && !(is_decoded && *name == METHOD))
            .cloned()
            .collect();
        found.add(directory, files, cancel)?;
        let modules = modules(directory, cancel)?;
        let mut folders: Vec<String> = names;
        // One that a path of modules.json leads through is looked into for it.
        let leads_to = |name: &str, module: &String| module.split('/').next() == Some(name);
        folders.retain(|name| {
            let is_wanted = !is_single_file || modules.iter().any(|module| leads_to(name, module));
            is_wanted && !is_companion(name) && is_folder_name(name)
        });
        found.add_folders(directory, &folders, &modules, MAX_DEPTH, &mut 0, cancel)?;
        found.files.sort_by(|(a, _), (b, _)| a.cmp(b));
        found.left_out.sort_by(|a, b| a.file.cmp(&b.file));
        Ok(found)
    }

    /// Adds files by their names in the directory, as far as they may be copied.
    fn add(
        &mut self,
        directory: &Arc<Directory>,
        names: Vec<String>,
        cancel: &CancelToken,
    ) -> Result<(), SaveError> {
        let have = self.files.len() + self.left_out.len() + names.len();
        if have > MAX_COMPANIONS {
            return Err(SaveError::Checkpoint(CheckpointError::TooLarge {
                path: directory.path().into(),
                what: "a number of files beside the weights",
                have: have as u64,
                limit: MAX_COMPANIONS as u64,
            }));
        }
        for name in names {
            if cancel.is_cancelled() {
                return Err(SaveError::Cancelled);
            }
            let reason = match open(directory, &name)? {
                Ok(file) => {
                    let have = file.length();
                    if have > MAX_COMPANION_BYTES {
                        LeftOutReason::TooLarge { have }
                    } else if self.bytes + have > MAX_COMPANIONS_BYTES {
                        LeftOutReason::TooLargeTogether { have }
                    } else {
                        self.bytes += have;
                        self.files.push((name, file));
                        continue;
                    }
                }
                Err(reason) => reason,
            };
            self.left_out.push(LeftOut { file: name, reason });
        }
        Ok(())
    }

    /// Looks into folders, by their names in the directory, and those in them, `depth` deep.
    fn add_folders(
        &mut self,
        directory: &Arc<Directory>,
        folders: &[String],
        modules: &[String],
        depth: usize,
        looked_into: &mut usize,
        cancel: &CancelToken,
    ) -> Result<(), SaveError> {
        for folder in folders {
            let is_module = modules.contains(folder);
            let Some(names) = directory.list_in(folder, cancel)? else {
                if is_module && directory.is_link(folder) {
                    let (file, reason) = (folder.clone(), LeftOutReason::Link);
                    self.left_out.push(LeftOut { file, reason });
                }
                continue;
            };
            *looked_into += 1;
            if *looked_into > MAX_FOLDERS {
                let (file, reason) = (folder.clone(), LeftOutReason::TooMany);
                self.left_out.push(LeftOut { file, reason });
                return Ok(());
            }
            let inside = |name: &String| format!("{folder}/{name}");
            let has_weights = names.iter().any(|name| is_weights(name));
            let mut files: Vec<String> = names
                .iter()
                .filter(|name| is_small(name) || (is_module && name.ends_with(".safetensors")))
                .map(inside)
                .collect();
            if has_weights && !is_module {
                // With a configuration too it is a model of its own.
                if !files.is_empty() && !names.iter().any(|name| name == "config.json") {
                    let (file, reason) = (folder.clone(), LeftOutReason::OtherWeights);
                    self.left_out.push(LeftOut { file, reason });
                }
                files.clear();
            } else if is_module {
                let others = names
                    .iter()
                    .filter(|name| is_weights(name) && !name.ends_with(".safetensors"));
                let others = others.filter(|name| !is_small(name)).map(inside);
                let reason = LeftOutReason::Kind;
                self.left_out.extend(others.map(|file| LeftOut {
                    file,
                    reason: reason.clone(),
                }));
            }
            let before = self.folders.len();
            if self.files.len() + self.left_out.len() + files.len() > MAX_COMPANIONS {
                let (file, reason) = (folder.clone(), LeftOutReason::TooMany);
                self.left_out.push(LeftOut { file, reason });
                return Ok(());
            }
            if !files.is_empty() {
                self.folders.push(folder.clone());
                self.add(directory, files, cancel)?;
            }
            // What a folder with weights holds is not looked into, unless modules.json names it.
            let is_named = |name: &String| modules.iter().any(|module| module == name);
            let mut deeper: Vec<String> = names
                .iter()
                .filter(|name| !is_small(name) && is_folder_name(name))
                .map(inside)
                .collect();
            deeper.retain(|name| !has_weights || is_module || is_named(name));
            if depth > 1 && !deeper.is_empty() {
                let at = self.folders.len();
                self.add_folders(directory, &deeper, modules, depth - 1, looked_into, cancel)?;
                // Made before those in it.
                if self.folders.len() > at && before == at {
                    self.folders.insert(at, folder.clone());
                }
            }
        }
        Ok(())
    }

    /// Copies the files, as new files of ours.
    pub(super) fn copy(&self, target: &Target, cancel: &CancelToken) -> Result<(), SaveError> {
        for folder in &self.folders {
            target.make_folder(folder)?;
        }
        let mut buffer = Vec::new();
        for (name, source) in &self.files {
            let mut file = target.create_file(name)?;
            let mut start = 0;
            loop {
                if cancel.is_cancelled() {
                    return Err(SaveError::Cancelled);
                }
                let length = (source.length() - start).min(COPY_BYTES);
                if length == 0 {
                    break;
                }
                buffer.resize(length as usize, 0);
                source
                    .read_at(start, &mut buffer)
                    .map_err(|failure| read_error(source.path(), failure))?;
                target.write_at(&mut file, name, start, &buffer)?;
                start += length;
            }
            target.finish_file(file, name, start)?;
        }
        Ok(())
    }
}

fn has_end(name: &str, ends: &[&str]) -> bool {
    let extension = Path::new(name)
        .extension()
        .and_then(|extension| extension.to_str());
    extension.is_some_and(|extension| ends.contains(&extension))
}

/// A file of a kind that is copied.
fn is_small(name: &str) -> bool {
    has_end(name, &EXTENSIONS) && !name.ends_with(".index.json") && !name.starts_with('.')
}

/// The same beside the weights.
fn is_companion(name: &str) -> bool {
    // This is written anew.
    is_small(name) && name != "config.json"
}

fn is_weights(name: &str) -> bool {
    has_end(name, &WEIGHTS) || name.ends_with(".index.json")
}

fn is_folder_name(name: &str) -> bool {
    is_plain_file_name(name)
        && !name.starts_with('.')
        && !name.contains(char::REPLACEMENT_CHARACTER)
}

/// The folders that `modules.json` names.
fn modules(directory: &Arc<Directory>, cancel: &CancelToken) -> Result<Vec<String>, SaveError> {
    #[derive(serde::Deserialize)]
    struct Module {
        path: String,
    }
    let text = match directory.read_text(
        MODULES,
        "a list of modules (bytes)",
        MAX_CONFIG_BYTES,
        cancel,
    ) {
        Err(CheckpointError::Cancelled) => return Err(SaveError::Cancelled),
        // It is copied, or left out with a word, like any other file.
        other => other.ok().flatten().unwrap_or_default(),
    };
    let modules: Vec<Module> = serde_json::from_str(without_mark(&text)).unwrap_or_default();
    let paths = modules
        .into_iter()
        .map(|module| module.path.trim_end_matches('/').to_owned());
    Ok(paths
        .filter(|path| path.split('/').all(is_folder_name))
        .take(MAX_FOLDERS)
        .collect())
}

/// The file, or why it is left out. It is not kept open: there may be many.
fn open(directory: &Arc<Directory>, name: &str) -> Result<Result<Shard, LeftOutReason>, SaveError> {
    // What is not Unicode has been replaced in the name, and is not there.
    let is_plain = name.split('/').all(is_plain_file_name);
    if !is_plain || name.contains(char::REPLACEMENT_CHARACTER) {
        return Ok(Err(LeftOutReason::Name));
    }
    match Shard::open(Source::In(Arc::clone(directory), name.to_owned())) {
        Ok(mut file) => {
            file.close();
            Ok(Ok(file))
        }
        Err(CheckpointError::NotAFile { .. }) => Ok(Err(LeftOutReason::NotAFile)),
        Err(CheckpointError::Io { source, .. })
            if source.kind() == std::io::ErrorKind::NotFound =>
        {
            Ok(Err(LeftOutReason::Missing))
        }
        Err(error) => Err(error.into()),
    }
}

/// What was long enough when it was looked at has changed since.
fn read_error(path: &Path, failure: ReadFailure) -> SaveError {
    SaveError::Checkpoint(match failure {
        ReadFailure::Other(error) => error,
        ReadFailure::CutShort(_) => CheckpointError::Changed { path: path.into() },
    })
}
