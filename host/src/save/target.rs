//! The directory that a checkpoint is written to: beside its place until it is complete.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::SaveError;
use crate::load::CancelToken;

/// Files beside the weights that belong to a model: tokenizer, generation settings, chat template.
const COMPANIONS: [&str; 6] = ["json", "txt", "model", "jinja", "tiktoken", "bpe"];

/// A directory that gets its name when it is complete, and is removed when it is not.
pub(super) struct Target {
    path: PathBuf,
    partial: TempDir,
    force: bool,
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SaveError {
    move |source| SaveError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

impl Target {
    /// Begins a directory beside `path`.
    ///
    /// # Errors
    /// [`SaveError::Exists`] when there is something at `path` (other than an empty directory)
    /// that may not be replaced.
    pub(super) fn create(path: &Path, force: bool) -> Result<Target, SaveError> {
        let not_a_name = || SaveError::NotADirectoryName {
            path: path.to_owned(),
        };
        let name = path.file_name().ok_or_else(not_a_name)?.to_string_lossy();
        if !force && fs::symlink_metadata(path).is_ok() && !is_empty_directory(path) {
            return Err(SaveError::Exists {
                path: path.to_owned(),
            });
        }
        let parent = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        fs::create_dir_all(parent).map_err(io_error("create", parent))?;
        let partial = tempfile::Builder::new()
            .prefix(&format!(".{name}.partial-"))
            .tempdir_in(parent)
            .map_err(io_error("create a directory in", parent))?;
        Ok(Target {
            path: path.to_owned(),
            partial,
            force,
        })
    }

    pub(super) fn create_file(&self, name: &str) -> Result<File, SaveError> {
        let path = self.partial.path().join(name);
        File::create_new(&path).map_err(io_error("create", &path))
    }

    pub(super) fn write_at(
        &self,
        file: &mut File,
        name: &str,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), SaveError> {
        write_all_at(file, bytes, offset).map_err(io_error("write", &self.path.join(name)))
    }

    /// Ends a file at `length` and waits until it is on the disk.
    pub(super) fn finish_file(&self, file: File, name: &str, length: u64) -> Result<(), SaveError> {
        file.set_len(length)
            .and_then(|()| file.sync_all())
            .map_err(io_error("write", &self.path.join(name)))
    }

    pub(super) fn write_text(&self, name: &str, text: &str) -> Result<(), SaveError> {
        let mut file = self.create_file(name)?;
        self.write_at(&mut file, name, 0, text.as_bytes())?;
        self.finish_file(file, name, text.len() as u64)
    }

    /// Copies what else belongs to the model from where its weights are.
    pub(super) fn copy_companions(&self, source: &Path) -> Result<(), SaveError> {
        let directory = match source.is_dir() {
            true => source,
            false => source.parent().unwrap_or(Path::new(".")),
        };
        let listed = fs::read_dir(directory).map_err(io_error("list", directory))?;
        for entry in listed {
            let path = entry.map_err(io_error("list", directory))?.path();
            let (Some(name), Some(extension)) = (path.file_name(), path.extension()) else {
                continue;
            };
            let name = name.to_string_lossy();
            let belongs = COMPANIONS.iter().any(|&known| extension == known)
                && name != "config.json"
                && !name.ends_with(".index.json")
                && !name.starts_with('.')
                // Follows the links of the Hugging Face cache; pipes and devices would block.
                && path.is_file();
            if belongs {
                let to = self.partial.path().join(&*name);
                fs::copy(&path, to).map_err(io_error("copy", &path))?;
            }
        }
        Ok(())
    }

    /// Gives the directory its name.
    pub(super) fn finish(self, cancel: &CancelToken) -> Result<(), SaveError> {
        if cancel.is_cancelled() {
            return Err(SaveError::Cancelled);
        }
        let Target {
            path,
            partial,
            force,
        } = self;
        make_like_any_directory(partial.path())?;
        sync_directory(partial.path())?;
        let mut replaced = None;
        if fs::symlink_metadata(&path).is_ok() {
            // It may have appeared since we began.
            if !force && !is_empty_directory(&path) {
                return Err(SaveError::Exists { path });
            }
            let parent = partial.path().parent().unwrap_or(Path::new("."));
            let aside = tempfile::Builder::new()
                .prefix(".replaced-")
                .tempdir_in(parent)
                .map_err(io_error("create a directory in", parent))?;
            fs::rename(&path, aside.path().join("old")).map_err(io_error("rename", &path))?;
            replaced = Some(aside);
        }
        if let Err(error) = fs::rename(partial.path(), &path) {
            // Back to how it was; the error that counts is the first.
            if let Some(aside) = replaced
                && fs::rename(aside.path().join("old"), &path).is_err()
            {
                // Better a strange name than nothing.
                let _ = aside.keep();
            }
            return Err(io_error("rename", &path)(error));
        }
        // It is not there any more: nothing to be removed.
        let _ = partial.keep();
        if let Some(parent) = path.parent().filter(|parent| *parent != Path::new("")) {
            sync_directory(parent)?;
        }
        Ok(())
    }
}

fn is_empty_directory(path: &Path) -> bool {
    fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}

/// Temporary directories are private; a checkpoint is not.
#[cfg(unix)]
fn make_like_any_directory(path: &Path) -> Result<(), SaveError> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
        .map_err(io_error("set the permissions of", path))
}

#[cfg(not(unix))]
fn make_like_any_directory(_: &Path) -> Result<(), SaveError> {
    Ok(())
}

#[cfg(unix)]
fn sync_directory(path: &Path) -> Result<(), SaveError> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(io_error("write", path))
}

#[cfg(not(unix))]
fn sync_directory(_: &Path) -> Result<(), SaveError> {
    Ok(())
}

#[cfg(unix)]
fn write_all_at(file: &mut File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(not(unix))]
fn write_all_at(file: &mut File, bytes: &[u8], offset: u64) -> io::Result<()> {
    use std::io::{Seek, SeekFrom, Write};
    file.seek(SeekFrom::Start(offset))?;
    file.write_all(bytes)
}
