//! What else belongs to a model: tokenizer, generation settings, chat template. Small files beside
//! the weights, known by how their names end.
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
    CheckpointError, Directory, ReadFailure, Shard, Source, is_plain_file_name,
};
use crate::types::Bytes;

/// How the names of such files end.
const EXTENSIONS: [&str; 6] = ["json", "txt", "model", "jinja", "tiktoken", "bpe"];

/// Largest file beside the weights that [`save`](super::save) copies, in bytes. The largest
/// tokenizers have half of this.
pub const MAX_COMPANION_BYTES: u64 = 64 << 20;
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
    files: Vec<(String, Shard)>,
    pub(super) left_out: Vec<LeftOut>,
}

impl Companions {
    /// Looks at what lies in the checkpoint's directory.
    pub(super) fn find(
        directory: &Arc<Directory>,
        cancel: &CancelToken,
    ) -> Result<Companions, SaveError> {
        let mut names = directory.list(cancel)?;
        names.retain(|name| is_companion(name));
        if names.len() > MAX_COMPANIONS {
            return Err(SaveError::Checkpoint(CheckpointError::TooLarge {
                path: directory.path().into(),
                what: "a number of files beside the weights",
                have: names.len() as u64,
                limit: MAX_COMPANIONS as u64,
            }));
        }
        let mut found = Companions::default();
        let mut total = 0;
        for name in names {
            if cancel.is_cancelled() {
                return Err(SaveError::Cancelled);
            }
            match open(directory, &name)? {
                Ok(file) => {
                    let have = file.length();
                    let reason = if have > MAX_COMPANION_BYTES {
                        LeftOutReason::TooLarge { have }
                    } else if total + have > MAX_COMPANIONS_BYTES {
                        LeftOutReason::TooLargeTogether { have }
                    } else {
                        total += have;
                        found.files.push((name, file));
                        continue;
                    };
                    found.left_out.push(LeftOut { file: name, reason });
                }
                Err(reason) => found.left_out.push(LeftOut { file: name, reason }),
            }
        }
        Ok(found)
    }

    /// Copies the files, as new files of ours.
    pub(super) fn copy(&self, target: &Target, cancel: &CancelToken) -> Result<(), SaveError> {
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

fn is_companion(name: &str) -> bool {
    let extension = Path::new(name).extension();
    extension.is_some_and(|extension| EXTENSIONS.iter().any(|&known| extension == known))
        // These are written anew.
        && name != "config.json"
        && !name.ends_with(".index.json")
        && !name.starts_with('.')
}

/// The file, or why it is left out. It is not kept open: there may be many.
fn open(directory: &Arc<Directory>, name: &str) -> Result<Result<Shard, LeftOutReason>, SaveError> {
    // What is not Unicode has been replaced in the name, and is not there.
    if !is_plain_file_name(name) || name.contains(char::REPLACEMENT_CHARACTER) {
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
