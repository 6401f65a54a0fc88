//! The directory that a checkpoint is written to: beside its place until it is complete.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::SaveError;
use crate::cancel::CancelToken;

/// A directory that gets its name when it is complete, and is removed when it is not.
pub(super) struct Target {
    path: PathBuf,
    // Before the directories that it is in: fields are dropped in this order.
    partial: TempDir,
    made: MadeParents,
    force: bool,
}

/// Directories that were made for the target, outermost first; removed when it is not finished.
struct MadeParents(Vec<PathBuf>);

impl MadeParents {
    fn make(parent: &Path) -> Result<MadeParents, SaveError> {
        let mut made = MadeParents(Vec::new());
        let missing: Vec<&Path> = parent
            .ancestors()
            .take_while(|path| *path != Path::new("") && !path.exists())
            .collect();
        for path in missing.into_iter().rev() {
            match fs::create_dir(path) {
                Ok(()) => made.0.push(path.to_owned()),
                // Someone else was faster, or it is spelled with `..`.
                Err(_) if path.is_dir() => {}
                Err(error) => return Err(io_error("create", path)(error)),
            }
        }
        Ok(made)
    }

    fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for MadeParents {
    fn drop(&mut self) {
        for path in self.0.iter().rev() {
            // Not if someone else has put something into it meanwhile.
            let _ = fs::remove_dir(path);
        }
    }
}

/// Whether a checkpoint may be written to `path`: for whoever has much to do before.
///
/// # Errors
/// [`SaveError::Exists`] when there is something other than an empty directory that may not be
/// replaced, [`SaveError::NotADirectoryName`] for a path without a name, and for a device, a FIFO or
/// a socket, which are never replaced.
pub fn check_target(path: impl AsRef<Path>, force: bool) -> Result<(), SaveError> {
    resolved(path.as_ref(), force).map(drop)
}

/// The directory that a path means, links followed, if a checkpoint may be written there.
fn resolved(path: &Path, force: bool) -> Result<PathBuf, SaveError> {
    let not_a_name = || SaveError::NotADirectoryName { path: path.into() };
    if path.file_name().is_none() {
        return Err(not_a_name());
    }
    let Ok(metadata) = fs::symlink_metadata(path) else {
        return Ok(path.into());
    };
    if !force && !is_empty_directory(path) {
        return Err(SaveError::Exists { path: path.into() });
    }
    if metadata.is_symlink() {
        // The link stays, and what it leads to is replaced.
        let behind = fs::canonicalize(path).map_err(io_error("follow the link", path))?;
        return resolved(&behind, force);
    }
    match metadata.is_dir() || metadata.is_file() {
        true => Ok(path.into()),
        false => Err(not_a_name()),
    }
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
        let path = &resolved(path, force)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let parent = parent(path);
        let made = MadeParents::make(parent)?;
        let partial = tempfile::Builder::new()
            .prefix(&format!(".{name}.partial-"))
            .tempdir_in(parent)
            .map_err(io_error("create a directory in", parent))?;
        Ok(Target {
            path: path.to_owned(),
            partial,
            made,
            force,
        })
    }

    /// Where a file is until the checkpoint is complete.
    #[cfg(test)]
    pub(super) fn path_of(&self, name: &str) -> PathBuf {
        self.partial.path().join(name)
    }

    /// Makes a folder in the directory, as open as the directory will be.
    pub(super) fn make_folder(&self, name: &str) -> Result<(), SaveError> {
        let path = self.partial.path().join(name);
        fs::create_dir(&path).map_err(io_error("create", &path))?;
        make_like_any_directory(&path)
    }

    /// Creates a file with our own mode, whatever the checkpoint's files have.
    pub(super) fn create_file(&self, name: &str) -> Result<File, SaveError> {
        let path = self.partial.path().join(name);
        let mut options = File::options();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o644);
        options.open(&path).map_err(io_error("create", &path))
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

    /// Gives the directory its name.
    pub(super) fn finish(self, cancel: &CancelToken) -> Result<(), SaveError> {
        if cancel.is_cancelled() {
            return Err(SaveError::Cancelled);
        }
        let Target {
            path,
            partial,
            made,
            force,
        } = self;
        make_like_any_directory(partial.path())?;
        sync_directory(partial.path())?;
        let mut replaced = None;
        if let Ok(old) = fs::symlink_metadata(&path) {
            // It may have appeared, or changed, since we began.
            if resolved(&path, force)? != path {
                return Err(SaveError::Exists { path });
            }
            if old.is_dir() {
                become_like(partial.path(), &old)?;
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
            if let Some(aside) = replaced {
                // Back to how it was; the error that counts is the first.
                if fs::rename(aside.path().join("old"), &path).is_err() {
                    // It must not be lost: dropped, the directory would be removed with it.
                    let _ = aside.keep();
                }
            }
            return Err(io_error("rename", &path)(error));
        }
        // It is not there any more: nothing to be removed.
        let _ = partial.keep();
        made.keep();
        sync_directory(parent(&path))
    }
}

/// The directory that a path is in.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
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

/// A directory that takes another's place is as open as that was, and as far as we may give it
/// away, its owner's.
#[cfg(unix)]
fn become_like(path: &Path, old: &fs::Metadata) -> Result<(), SaveError> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    let new = fs::metadata(path).map_err(io_error("look at", path))?;
    if (new.uid(), new.gid()) != (old.uid(), old.gid()) {
        // Only root may; the checkpoint is then its writer's, as a new one would be.
        let _ = chown(path, Some(old.uid()), Some(old.gid()));
    }
    fs::set_permissions(path, fs::Permissions::from_mode(old.mode() & 0o1777))
        .map_err(io_error("set the permissions of", path))
}

#[cfg(not(unix))]
fn become_like(_: &Path, _: &fs::Metadata) -> Result<(), SaveError> {
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
