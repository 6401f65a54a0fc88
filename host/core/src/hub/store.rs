//! A model's directory in the cache: `blobs/<etag>`, `snapshots/<commit>/<name>`, `refs/<revision>`.
//!
//! The cache may have come from anywhere, as an archive does: nothing is written through a link that
//! lies in it. The model's directory itself may be one, for users move theirs.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
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
        self.make_directory(Path::new("blobs"))?;
        let path = self.part(etag);
        let file = open_or_create(&path)?;
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
        self.make_parent(&pointer)?;
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

    /// Makes the directory of a path in the entry.
    fn make_parent<'p>(&self, path: &'p Path) -> Result<&'p Path, HubError> {
        let directory = path.parent().unwrap_or(path);
        self.make_directory(directory.strip_prefix(&self.path).unwrap_or(directory))?;
        Ok(directory)
    }

    /// Makes a directory of the entry. Those above it in the entry are no links either.
    fn make_directory(&self, relative: &Path) -> Result<(), HubError> {
        let mut path = self.path.clone();
        fs::create_dir_all(&path).map_err(io_error("create", &path))?;
        for component in relative.components() {
            path.push(component);
            match fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(io_error("create", &path)(error));
                }
                _ => {}
            }
            let metadata = fs::symlink_metadata(&path).map_err(io_error("open", &path))?;
            if !metadata.is_dir() {
                return Err(HubError::LeadsOut { path });
            }
        }
        Ok(())
    }

    /// Remembers which commit the revision is.
    pub(super) fn refer(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if revision == commit {
            return Ok(());
        }
        let path = self.path.join("refs").join(revision);
        let directory = self.make_parent(&path)?;
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

/// Opens a file for writing that is no link: neither a symbolic one, nor one of several names.
fn open_or_create(path: &Path) -> Result<File, HubError> {
    let leads_out = || HubError::LeadsOut { path: path.into() };
    if fs::symlink_metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
        return Err(leads_out());
    }
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).read(true).write(true);
    // In case it has become something else meanwhile.
    #[cfg(unix)]
    {
        use rustix::fs::OFlags;
        use std::os::unix::fs::OpenOptionsExt;
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        options.custom_flags(flags.bits() as i32);
    }
    let file = options.open(path).map_err(io_error("open", path))?;
    let metadata = file.metadata().map_err(io_error("open", path))?;
    match metadata.is_file() && has_one_name(&metadata) {
        true => Ok(file),
        false => Err(leads_out()),
    }
}

#[cfg(unix)]
fn has_one_name(metadata: &fs::Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    metadata.nlink() == 1
}

#[cfg(not(unix))]
fn has_one_name(_: &fs::Metadata) -> bool {
    true
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

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    const COMMIT: &str = "0123456789012345678901234567890123456789";

    /// A cache entry in which a path is a link to something of the user's, and whether writing what
    /// a download writes is refused. What it leads to stays as it was.
    #[track_caller]
    fn is_refused(link: &str, is_hard: bool) {
        let directory = TempDir::new().unwrap();
        let mine = directory.path().join("mine");
        fs::create_dir(&mine).unwrap();
        fs::write(mine.join("file"), "of mine").unwrap();
        let path = directory.path().join("models--org--name");
        let at = path.join(link);
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        let is_file = link.ends_with(".part");
        let target = if is_file {
            mine.join("file")
        } else {
            mine.clone()
        };
        match is_hard {
            true => fs::hard_link(&target, &at).unwrap(),
            false => symlink(&target, &at).unwrap(),
        }
        let entry = Entry::new(path, COMMIT);
        let written = || -> Result<(), HubError> {
            entry.open_part("etag")?;
            entry.link("etag", "onnx/model.safetensors")?;
            entry.refer("pr/1", COMMIT)
        };
        let result = written();
        assert!(
            matches!(result, Err(HubError::LeadsOut { .. })),
            "{link}: {result:?}"
        );
        let names: Vec<_> = fs::read_dir(&mine)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(names, ["file"], "{link}");
        assert_eq!(
            fs::read_to_string(mine.join("file")).unwrap(),
            "of mine",
            "{link}"
        );
    }

    #[test]
    fn nothing_is_written_through_a_link_in_the_cache() {
        for link in [
            "blobs",
            "blobs/etag.part",
            "snapshots",
            &format!("snapshots/{COMMIT}"),
            &format!("snapshots/{COMMIT}/onnx"),
            "refs",
            "refs/pr",
        ] {
            is_refused(link, false);
        }
        is_refused("blobs/etag.part", true);
    }

    #[test]
    fn a_partial_file_of_before_is_taken_up() {
        let directory = TempDir::new().unwrap();
        let entry = Entry::new(directory.path().join("models--org--name"), COMMIT);
        for _ in 0..2 {
            let Part::Ours(mut file) = entry.open_part("etag").unwrap() else {
                panic!("it is nobody else's");
            };
            file.write_all(b"part").unwrap();
        }
        assert_eq!(fs::read(entry.part("etag")).unwrap(), b"part");
        entry.link("etag", "onnx/model.safetensors").unwrap();
        entry.refer("pr/1", COMMIT).unwrap();
    }
}
