//! A model's directory in the cache: `blobs/<etag>`, `snapshots/<commit>/<name>`, `refs/<revision>`.
//!
//! The cache may have come from anywhere, as an archive does: nothing is written through a link that
//! lies in it. The model's directory itself may be one, for users move theirs.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::HubError;
use super::error::io_error;
#[cfg(windows)]
use crate::windows;

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

    /// Opens the partial file of what will have this name, for one process at a time.
    pub(super) fn open_part(&self, etag: &str, name: &str) -> Result<Part, HubError> {
        self.make_directory(Path::new("blobs"))?;
        let path = self.part(etag);
        let file = open_or_create(&path)?;
        #[cfg(windows)]
        is_in(&file, &self.path)?;
        match file.try_lock() {
            // Some network file systems have no locks; a digest or a length will tell.
            Ok(()) | Err(TryLockError::Error(_)) => {}
            Err(TryLockError::WouldBlock) => return Ok(Part::Busy),
        }
        // Looked at under the lock: whoever held it before may have finished meanwhile.
        if self.blob(etag).is_file() || self.snapshot().join(name).is_file() {
            let _ = fs::remove_file(&path);
            return Ok(Part::Complete);
        }
        Ok(Part::Ours(file))
    }

    /// Gives a complete blob its name in the snapshot. A new one has no other.
    pub(super) fn link(&self, etag: &str, name: &str, is_new: bool) -> Result<(), HubError> {
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
        match point(&pointer, &self.blob(etag), etag, is_new) {
            // Another process was faster.
            Err(_) if pointer.is_file() => Ok(()),
            result => result.map_err(io_error("write", &pointer)),
        }
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
            let mut file = temporary_in(directory)?;
            file.write_all(commit.as_bytes())?;
            // Not by `persist`, which knows no long paths on Windows.
            fs::rename(file.into_temp_path(), &path)
        };
        write().map_err(io_error("write", &path))
    }
}

/// Makes a file beside the one that it will be.
fn temporary_in(directory: &Path) -> io::Result<tempfile::NamedTempFile> {
    let builder = tempfile::Builder::new();
    match cfg!(windows) {
        // The crate's own are marked there, so that the system may keep them in memory, and stay so.
        true => builder.make_in(directory, |path| File::create_new(path)),
        false => builder.tempfile_in(directory),
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
    #[cfg(windows)]
    {
        use std::os::windows::fs::OpenOptionsExt;
        use windows_sys::Win32::Storage::FileSystem::FILE_FLAG_OPEN_REPARSE_POINT;
        options.custom_flags(FILE_FLAG_OPEN_REPARSE_POINT);
    }
    let file = options.open(path).map_err(io_error("open", path))?;
    let metadata = file.metadata().map_err(io_error("open", path))?;
    match metadata.is_file() && has_one_name(&file, &metadata) {
        true => Ok(file),
        false => Err(leads_out()),
    }
}

#[cfg(unix)]
fn has_one_name(_: &File, metadata: &fs::Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    metadata.nlink() == 1
}

#[cfg(windows)]
fn has_one_name(file: &File, _: &fs::Metadata) -> bool {
    // Where the file system does not tell, it has none of several names.
    windows::identity_of(file).map_or(true, |identity| identity.names <= 1)
}

/// Refuses a file that does not lie in the entry: what is above it has become a link while it was opened.
#[cfg(windows)]
fn is_in(file: &File, entry: &Path) -> Result<(), HubError> {
    let at = windows::path_of(file).map_err(io_error("open", entry))?;
    let entry = fs::canonicalize(entry).map_err(io_error("open", entry))?;
    match at.starts_with(entry) {
        true => Ok(()),
        false => Err(HubError::LeadsOut { path: at }),
    }
}

#[cfg(unix)]
fn point(pointer: &Path, _: &Path, etag: &str, _: bool) -> io::Result<()> {
    // Relative, as other tools have it, so that the cache can be moved.
    let target = Path::new("..").join("..").join("blobs").join(etag);
    std::os::unix::fs::symlink(target, pointer)
}

/// Links need a privilege, or the developer mode. Where they cannot be had, other tools too move what is
/// new, and copy what other snapshots may have links to.
#[cfg(windows)]
fn point(pointer: &Path, blob: &Path, etag: &str, is_new: bool) -> io::Result<()> {
    let target = Path::new("..").join("..").join("blobs").join(etag);
    if std::os::windows::fs::symlink_file(target, pointer).is_ok() && pointer.is_file() {
        return Ok(());
    }
    if is_new && fs::rename(blob, pointer).is_ok() {
        return Ok(());
    }
    // At once, so that nobody reads half of it.
    let directory = pointer.parent().unwrap_or(pointer);
    let copy = temporary_in(directory)?.into_temp_path();
    fs::copy(blob, &copy)?;
    fs::rename(&copy, pointer)
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    const COMMIT: &str = "0123456789012345678901234567890123456789";
    const NAME: &str = "model.safetensors";

    /// Links a path in a cache entry to something of the user's.
    type MakeLink = fn(&Path, &Path) -> io::Result<()>;

    /// A cache entry in which a path is a link to something of the user's, and whether writing what
    /// a download writes is refused. What it leads to stays as it was.
    #[track_caller]
    fn is_refused(link: &str, make: MakeLink) {
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
        make(&target, &at).unwrap();
        let entry = Entry::new(path, COMMIT);
        let written = || -> Result<(), HubError> {
            entry.open_part("etag", NAME)?;
            entry.link("etag", "onnx/model.safetensors", true)?;
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

    #[cfg(unix)]
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
            is_refused(link, |target, at| std::os::unix::fs::symlink(target, at));
        }
    }

    #[test]
    fn nothing_is_written_into_a_file_of_two_names() {
        is_refused("blobs/etag.part", |target, at| fs::hard_link(target, at));
    }

    #[test]
    fn a_partial_file_of_before_is_taken_up() {
        let directory = TempDir::new().unwrap();
        let entry = Entry::new(directory.path().join("models--org--name"), COMMIT);
        for _ in 0..2 {
            let Part::Ours(mut file) = entry.open_part("etag", NAME).unwrap() else {
                panic!("it is nobody else's");
            };
            file.write_all(b"part").unwrap();
            assert!(matches!(entry.open_part("etag", NAME).unwrap(), Part::Busy));
        }
        assert_eq!(fs::read(entry.part("etag")).unwrap(), b"part");
    }

    /// Writes a blob as a download does: into the partial file, renamed while that is open and locked.
    fn write_blob(entry: &Entry, etag: &str, name: &str) {
        let Part::Ours(mut file) = entry.open_part(etag, name).unwrap() else {
            panic!("it is nobody else's");
        };
        file.write_all(b"bytes").unwrap();
        fs::rename(entry.part(etag), entry.blob(etag)).unwrap();
    }

    #[test]
    fn a_blob_is_read_under_its_name_whether_the_system_has_links_or_not() {
        let directory = TempDir::new().unwrap();
        let entry = Entry::new(directory.path().join("models--org--name"), COMMIT);
        for (is_new, name) in [(true, NAME), (false, "config.json")] {
            write_blob(&entry, name, name);
            entry.link(name, name, is_new).unwrap();
            let path = entry.snapshot().join(name);
            assert_eq!(fs::read(&path).unwrap(), b"bytes", "{name}");
            // Other snapshots may lead to what is not new.
            assert!(is_new || entry.blob(name).is_file(), "{name}");
            // Whoever waited for it has nothing left to do.
            let again = entry.open_part(name, name).unwrap();
            assert!(matches!(again, Part::Complete), "{name}");
            entry.link(name, name, false).unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"bytes", "{name}");
            assert!(!entry.part(name).exists(), "{name}");
        }
    }

    #[test]
    fn an_entry_may_lie_deep() {
        let directory = TempDir::new().unwrap();
        let mut deep = directory.path().to_owned();
        for _ in 0..4 {
            deep.push("d".repeat(100));
        }
        let entry = Entry::new(deep.join("models--org--name"), COMMIT);
        // Wine 8 tells of no path that is longer than 260 characters, which is asked for here.
        fs::create_dir_all(&deep).unwrap();
        if !cfg!(windows) || fs::canonicalize(&deep).is_ok() {
            write_blob(&entry, "etag", NAME);
            entry.link("etag", NAME, true).unwrap();
            assert_eq!(fs::read(entry.snapshot().join(NAME)).unwrap(), b"bytes");
        }
        // Written, and replaced.
        let reference = entry.path.join("refs").join("pr").join("1");
        for commit in ["9876543210987654321098765432109876543210", COMMIT] {
            entry.refer("pr/1", commit).unwrap();
            assert_eq!(fs::read_to_string(&reference).unwrap(), commit);
        }
    }
}
