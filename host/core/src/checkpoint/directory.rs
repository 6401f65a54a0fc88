//! The one way to the files of a checkpoint: from its directory, and no further.
//!
//! A checkpoint comes from anywhere, so that a file of it may be a link to anything that this user
//! can read. A file belongs to a checkpoint if it lies, all links followed, in the checkpoint's
//! directory, or in `blobs` of the same entry of the Hugging Face cache. It is opened from the
//! directory on without following a link any more, so that what was checked is what is opened.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::{Component, Path, PathBuf};

use super::CheckpointError;
use super::file::{io_error, read_limited};
use super::unfinished::{Unfinished, unfinished};
use crate::cancel::{self, CancelToken, Watch};

/// Files that a directory may hold before it is no model directory.
const MAX_DIRECTORY_ENTRIES: usize = 100_000;
/// Links that are followed one after the other, as in Linux.
const MAX_LINKS: usize = 40;

/// A checkpoint's directory. It may itself be reached through links: whoever names it means where
/// these lead.
#[derive(Debug)]
pub(crate) struct Directory {
    /// As it was given, to name files in errors.
    given: PathBuf,
    /// Where its files may lie; the first is the directory itself.
    allowed: Vec<AllowedDirectory>,
}

/// A directory that files may lie in.
#[derive(Debug)]
struct AllowedDirectory {
    /// Without links.
    path: PathBuf,
    #[cfg_attr(windows, expect(dead_code, reason = "files are opened by path"))]
    handle: handle::Handle,
}

impl AllowedDirectory {
    fn open(path: PathBuf) -> Result<AllowedDirectory, CheckpointError> {
        let handle = handle::open(&path).map_err(io_error("open", &path))?;
        Ok(AllowedDirectory { path, handle })
    }
}

impl Directory {
    pub(crate) fn open(given: &Path) -> Result<Directory, CheckpointError> {
        let path = fs::canonicalize(given).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => CheckpointError::NotFound { path: given.into() },
            _ => io_error("open", given)(source),
        })?;
        let blobs = blobs(&path);
        let mut allowed = vec![AllowedDirectory::open(path)?];
        if let Some(blobs) = blobs {
            allowed.push(AllowedDirectory::open(blobs)?);
        }
        Ok(Directory {
            given: given.into(),
            allowed,
        })
    }

    /// The directory's path, as it was given.
    pub(crate) fn path(&self) -> &Path {
        &self.given
    }

    /// Opens the regular file of this name.
    ///
    /// # Errors
    /// [`CheckpointError::LeadsOut`] for a link to what does not belong to the checkpoint,
    /// [`CheckpointError::NotAFile`], or [`CheckpointError::Io`].
    pub(crate) fn open_file(&self, name: &str) -> Result<File, CheckpointError> {
        let path = self.given.join(name);
        let (directory, relative) = self.resolve(name)?;
        match handle::open_file(directory, &relative).map_err(io_error("open", &path))? {
            Some(file) => Ok(file),
            None => Err(CheckpointError::NotAFile { path }),
        }
    }

    /// Whether there is something of this name.
    ///
    /// # Errors
    /// As for [`Directory::open_file`].
    pub(crate) fn has(&self, name: &str) -> Result<bool, CheckpointError> {
        match self.resolve(name) {
            Ok(_) => Ok(true),
            Err(error) if is_not_found(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The whole text of the file of this name and of at most `limit` bytes; `None` where there is
    /// none.
    pub(crate) fn read_text(
        &self,
        name: &str,
        what: &'static str,
        limit: u64,
        cancel: &CancelToken,
    ) -> Result<Option<String>, CheckpointError> {
        match self.open_file(name) {
            Ok(file) => read_limited(file, &self.given.join(name), what, limit, cancel).map(Some),
            Err(error) if is_not_found(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What a download that was not ended has left: beside the blobs, or in the directory itself.
    pub(super) fn unfinished(&self) -> Option<Unfinished> {
        let local = self.allowed[0].path.join(".cache/huggingface/download");
        let blobs = self.allowed.iter().skip(1);
        unfinished(blobs.map(|blobs| blobs.path.as_path()).chain([&*local]))
    }

    /// Names of everything in the directory, sorted; characters that are not Unicode replaced.
    pub(crate) fn list(&self, cancel: &CancelToken) -> Result<Vec<String>, CheckpointError> {
        self.names(&self.allowed[0].path, cancel)
    }

    /// The same for a folder in the directory; `None` where there is none, or only behind a link.
    pub(crate) fn list_in(
        &self,
        folder: &str,
        cancel: &CancelToken,
    ) -> Result<Option<Vec<String>>, CheckpointError> {
        let mut path = self.allowed[0].path.clone();
        for name in folder.split('/') {
            path.push(name);
            if !fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_dir()) {
                return Ok(None);
            }
        }
        self.names(&path, cancel).map(Some)
    }

    /// Whether what has this name in the directory is a link.
    pub(crate) fn is_link(&self, name: &str) -> bool {
        let path = self.allowed[0].path.join(name);
        fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_symlink())
    }

    fn names(&self, path: &Path, cancel: &CancelToken) -> Result<Vec<String>, CheckpointError> {
        let mut names = Vec::new();
        let mut watch = Watch::new(cancel);
        for entry in fs::read_dir(path).map_err(io_error("list", &self.given))? {
            let entry = entry.map_err(io_error("list", &self.given))?;
            watch.item(0)?;
            if names.len() == MAX_DIRECTORY_ENTRIES {
                return Err(CheckpointError::TooLarge {
                    path: self.given.clone(),
                    what: "a number of files",
                    have: MAX_DIRECTORY_ENTRIES as u64 + 1,
                    limit: MAX_DIRECTORY_ENTRIES as u64,
                });
            }
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
        Ok(cancel::sort_by(names, cancel, Ord::cmp)?)
    }

    /// Follows the links of a file: the directory that it lies in, and its path from there.
    fn resolve(&self, name: &str) -> Result<(&AllowedDirectory, PathBuf), CheckpointError> {
        let path = self.allowed[0].path.join(name);
        let end = match fs::canonicalize(&path) {
            Ok(end) => end,
            Err(source) => {
                // A link that leads out says so whether there is something at its end or not: what
                // else this machine holds is not for a checkpoint to find out.
                return Err(match dangling_end(&path) {
                    Some(end) if self.directory_of(&path, &end).is_none() => {
                        self.leads_out(name, end)
                    }
                    _ => io_error("open", &self.given.join(name))(source),
                });
            }
        };
        match self.directory_of(&path, &end) {
            Some(found) => Ok(found),
            None => Err(self.leads_out(name, end)),
        }
    }

    /// The directory that the end of a path lies in, and the path from there. What is hidden, such as
    /// `.git` with its passwords, can be opened under its own name but not through a link.
    fn directory_of(&self, path: &Path, end: &Path) -> Option<(&AllowedDirectory, PathBuf)> {
        self.allowed.iter().find_map(|directory| {
            let relative = end.strip_prefix(&directory.path).ok()?;
            (path == end || !relative.components().any(is_hidden))
                .then(|| (directory, relative.to_path_buf()))
        })
    }

    fn leads_out(&self, name: &str, target: PathBuf) -> CheckpointError {
        CheckpointError::LeadsOut {
            path: self.given.join(name),
            target,
            allowed: self
                .allowed
                .iter()
                .map(|directory| directory.path.clone())
                .collect(),
        }
    }
}

/// `blobs` of the cache entry that a directory without links is a snapshot of, or lies in one.
/// As a link it would lead to another entry's, or anywhere.
fn blobs(directory: &Path) -> Option<PathBuf> {
    let entry = directory.ancestors().find_map(|snapshot| {
        let snapshots = snapshot.parent()?;
        let entry = snapshots.parent()?;
        let is_entry = snapshots.file_name()? == "snapshots"
            && entry.file_name()?.to_str()?.starts_with("models--");
        is_entry.then_some(entry)
    })?;
    let blobs = entry.join("blobs");
    fs::canonicalize(&blobs)
        .is_ok_and(|end| end == blobs && end.is_dir())
        .then_some(blobs)
}

/// Where a path ends that cannot be opened, if it is a link.
fn dangling_end(path: &Path) -> Option<PathBuf> {
    let mut end = path.to_path_buf();
    for _ in 0..MAX_LINKS {
        match fs::read_link(&end) {
            Ok(target) => end = end.parent()?.join(target),
            Err(_) if end == path => return None,
            // Only what is above it can be a link now.
            Err(_) => {
                let above = end.parent().map(fs::canonicalize);
                return match (above, end.file_name()) {
                    (Some(Ok(above)), Some(name)) => Some(above.join(name)),
                    _ => Some(end),
                };
            }
        }
    }
    Some(end)
}

fn is_hidden(component: Component<'_>) -> bool {
    let name: &OsStr = component.as_os_str();
    name.as_encoded_bytes().first() == Some(&b'.')
}

fn is_not_found(error: &CheckpointError) -> bool {
    matches!(error, CheckpointError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
}

#[cfg(unix)]
mod handle {
    use std::fs::File;
    use std::io;
    use std::os::fd::{AsFd, OwnedFd};
    use std::path::Path;

    use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};

    use super::AllowedDirectory;
    use crate::checkpoint::file::patiently;

    pub(super) type Handle = OwnedFd;

    #[cfg(any(target_os = "linux", target_os = "android"))]
    const DIRECTORY: OFlags = OFlags::PATH
        .union(OFlags::DIRECTORY)
        .union(OFlags::NOFOLLOW)
        .union(OFlags::CLOEXEC);
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    const DIRECTORY: OFlags = OFlags::DIRECTORY
        .union(OFlags::NOFOLLOW)
        .union(OFlags::CLOEXEC);

    /// Opening a pipe must not wait for a writer.
    const FILE: OFlags = OFlags::NOFOLLOW
        .union(OFlags::NONBLOCK)
        .union(OFlags::NOCTTY)
        .union(OFlags::CLOEXEC);

    pub(super) fn open(path: &Path) -> io::Result<Handle> {
        Ok(rustix::fs::openat(CWD, path, DIRECTORY, Mode::empty())?)
    }

    /// Opens a file by a path without links; `None` for what is no regular file.
    pub(super) fn open_file(
        allowed: &AllowedDirectory,
        relative: &Path,
    ) -> io::Result<Option<File>> {
        let Some(name) = relative.file_name() else {
            return Ok(None);
        };
        let mut above = None;
        for directory in relative.parent().into_iter().flatten() {
            let at = above.as_ref().unwrap_or(&allowed.handle).as_fd();
            above = Some(rustix::fs::openat(at, directory, DIRECTORY, Mode::empty())?);
        }
        let at = above.as_ref().unwrap_or(&allowed.handle).as_fd();
        // Asked before it is opened too: opening a device can set it going.
        let stat = rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Ok(None);
        }
        let file = patiently(|| Ok(rustix::fs::openat(at, name, FILE, Mode::empty())?))?;
        let file = File::from(file);
        Ok(file.metadata()?.is_file().then_some(file))
    }
}

#[cfg(windows)]
mod handle {
    use std::fs::{self, File};
    use std::io;
    use std::path::Path;

    use super::AllowedDirectory;
    use crate::windows;

    /// There is nothing that files are opened from: they are opened by their paths.
    #[derive(Debug)]
    pub(super) struct Handle;

    pub(super) fn open(path: &Path) -> io::Result<Handle> {
        match fs::metadata(path)?.is_dir() {
            true => Ok(Handle),
            false => Err(io::ErrorKind::NotADirectory.into()),
        }
    }

    /// Opens a file by a path without links; `None` for what is no regular file.
    pub(super) fn open_file(
        directory: &AllowedDirectory,
        relative: &Path,
    ) -> io::Result<Option<File>> {
        let path = directory.path.join(relative);
        if !fs::symlink_metadata(&path)?.is_file() {
            return Ok(None);
        }
        let file = File::open(&path)?;
        if !file.metadata()?.is_file() {
            return Ok(None);
        }
        is_at(&file, &path)?;
        Ok(Some(file))
    }

    /// Refuses a file that has not been opened where it was looked for: something on the way has become
    /// a link meanwhile.
    pub(super) fn is_at(file: &File, path: &Path) -> io::Result<()> {
        match windows::path_of(file)? == *path {
            true => Ok(()),
            false => Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "it was exchanged while it was opened",
            )),
        }
    }
}
