//! A model's directory in the cache: `blobs/<etag>`, `snapshots/<commit>/<name>`, `refs/<revision>`.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::HubError;
use super::error::io_error;

/// A model at a commit.
pub(super) struct Entry {
    path: PathBuf,
    commit: String,
}

/// What became of asking for the partial file of a blob.
pub(super) enum Part {
    /// The blob is complete.
    Complete,
    /// Another process writes it.
    Busy,
    /// It is ours until it is closed.
    Ours(File),
}

impl Entry {
    /// The names are checked by the caller.
    pub(super) fn new(path: PathBuf, commit: &str) -> Entry {
        Entry {
            path,
            commit: commit.to_owned(),
        }
    }

    /// The directory with the model's files.
    pub(super) fn snapshot(&self) -> PathBuf {
        self.path.join("snapshots").join(&self.commit)
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.path.join("blobs").join(etag)
    }

    pub(super) fn part(&self, etag: &str) -> PathBuf {
        self.path.join("blobs").join(format!("{etag}.part"))
    }

    /// Opens the partial file, for one process at a time.
    pub(super) fn open_part(&self, etag: &str) -> Result<Part, HubError> {
        let path = self.part(etag);
        make_parent(&path)?;
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(io_error("open", &path))?;
        match file.try_lock() {
            // Some network file systems have no locks; a digest or a length will tell.
            Ok(()) | Err(TryLockError::Error(_)) => {}
            Err(TryLockError::WouldBlock) => return Ok(Part::Busy),
        }
        // Looked at under the lock: whoever held it before may have finished meanwhile.
        if self.blob(etag).is_file() {
            let _ = fs::remove_file(&path);
            return Ok(Part::Complete);
        }
        Ok(Part::Ours(file))
    }

    /// Gives a complete blob its name in the snapshot.
    pub(super) fn link(&self, etag: &str, name: &str) -> Result<(), HubError> {
        let pointer = self.snapshot().join(name);
        make_parent(&pointer)?;
        // What is there leads nowhere, or the file would not have been asked for.
        match fs::symlink_metadata(&pointer) {
            Ok(_) if !pointer.exists() => {
                fs::remove_file(&pointer).map_err(io_error("replace", &pointer))?;
            }
            Ok(_) => return Ok(()),
            Err(_) => {}
        }
        point(&pointer, &self.blob(etag), etag).map_err(io_error("write", &pointer))
    }

    /// Remembers which commit the revision is.
    pub(super) fn refer(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if revision == commit {
            return Ok(());
        }
        let path = self.path.join("refs").join(revision);
        let directory = make_parent(&path)?;
        // At once, so that nobody reads half of it.
        let write = || {
            let mut file = tempfile::NamedTempFile::new_in(directory)?;
            file.write_all(commit.as_bytes())?;
            file.persist(&path)?;
            Ok(())
        };
        write().map_err(io_error("write", &path))
    }
}

fn make_parent(path: &Path) -> Result<&Path, HubError> {
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory).map_err(io_error("create", directory))?;
    Ok(directory)
}

#[cfg(unix)]
fn point(pointer: &Path, _: &Path, etag: &str) -> std::io::Result<()> {
    // Relative, as other tools have it, so that the cache can be moved.
    let target = Path::new("..").join("..").join("blobs").join(etag);
    std::os::unix::fs::symlink(target, pointer)
}

#[cfg(not(unix))]
fn point(pointer: &Path, blob: &Path, _: &str) -> std::io::Result<()> {
    // Links need a privilege; other tools move the file then, too.
    fs::rename(blob, pointer)
}
