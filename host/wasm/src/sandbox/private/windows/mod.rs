//! By lists of access, on Windows.
//!
//! There are no directory handles to open files from. So each file is asked, once it is open, whom it
//! belongs to and who may do something with it. Nothing here follows a link in the directory.

mod access;
mod security;

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::windows::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use windows_sys::Win32::Storage::FileSystem::{
    FILE_FLAG_BACKUP_SEMANTICS, FILE_FLAG_OPEN_REPARSE_POINT, FILE_WRITE_ATTRIBUTES,
};

use super::{Entry, PrivateError, is_left, is_unfinished, name_of_unfinished};

/// A directory that was checked.
#[derive(Debug)]
pub(in super::super) struct PrivateDirectory {
    /// Without links.
    path: PathBuf,
    user: String,
}

impl PrivateDirectory {
    /// Makes it, with those above it, where it is not there.
    ///
    /// # Errors
    /// When it is no directory or a link, belongs to another user, or others may do something with it.
    pub(in super::super) fn open(path: &Path) -> Result<PrivateDirectory, PrivateError> {
        let user = security::user()?;
        if let Err(error) = fs::symlink_metadata(path) {
            if error.kind() != ErrorKind::NotFound {
                return Err(error.into());
            }
            make(path, &user)?;
        }
        let directory = options(FILE_FLAG_BACKUP_SEMANTICS).read(true).open(path)?;
        if !directory.metadata()?.is_dir() {
            let problem = "it is a symbolic link or no directory";
            return Err(PrivateError::NotPrivate(problem.to_owned()));
        }
        check(&directory, &user)?;
        let path = fs::canonicalize(path)?;
        Ok(PrivateDirectory { path, user })
    }

    /// Returns a file that is this user's alone, and its length.
    pub(super) fn open_file(&self, name: &str) -> Result<Option<(File, u64)>, PrivateError> {
        let file = match options(FILE_FLAG_BACKUP_SEMANTICS)
            .read(true)
            .open(self.path.join(name))
        {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            let problem = "it is no regular file".to_owned();
            return Err(PrivateError::NotPrivate(problem));
        }
        check(&file, &self.user)?;
        Ok(Some((file, metadata.len())))
    }

    /// Writes a file that appears when it is complete. Where there is one of this name already, it
    /// is replaced or, when `keep`, stays.
    pub(in super::super) fn write(
        &self,
        name: &str,
        parts: &[&[u8]],
        keep: bool,
    ) -> io::Result<()> {
        let unfinished = self.path.join(name_of_unfinished());
        // Left by a process of the same number that did not end well.
        let _ = fs::remove_file(&unfinished);
        let mut file = security::make_file(&unfinished, &access::private(&self.user))?;
        let written = parts.iter().try_for_each(|part| file.write_all(part));
        // Closed, so that whoever replaces it in turn is not held up.
        drop(file);
        let path = self.path.join(name);
        let named = written.and_then(|()| match keep {
            true => match fs::hard_link(&unfinished, &path) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
                linked => linked,
            },
            false => fs::rename(&unfinished, &path),
        });
        if keep || named.is_err() {
            let _ = fs::remove_file(&unfinished);
        }
        named
    }

    /// Removes a file, if it is there.
    pub(in super::super) fn remove(&self, name: &str) -> io::Result<()> {
        match fs::remove_file(self.path.join(name)) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Notes that a file has been of use.
    pub(in super::super) fn touch(&self, name: &str) -> io::Result<()> {
        let mut options = options(0);
        let file = options.access_mode(FILE_WRITE_ATTRIBUTES);
        file.open(self.path.join(name))?
            .set_modified(SystemTime::now())
    }

    /// Returns the files, without those that are being written. Removes what has been left
    /// unfinished.
    pub(in super::super) fn entries(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            // Another process may have removed it.
            let Ok(metadata) = fs::symlink_metadata(entry.path()) else {
                continue;
            };
            if !metadata.is_file() {
                continue;
            }
            let used = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            if is_unfinished(&name) {
                if is_left(used) {
                    self.remove(&name)?;
                }
                continue;
            }
            entries.push(Entry {
                name,
                bytes: metadata.len(),
                used,
            });
        }
        Ok(entries)
    }
}

/// Makes a directory that is this user's alone; those above it are as their own directories have it.
fn make(path: &Path, user: &str) -> io::Result<()> {
    let Some(name) = path.file_name() else {
        return Err(ErrorKind::InvalidFilename.into());
    };
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent)?;
    // In the form that may be long.
    let path = fs::canonicalize(parent)?.join(name);
    match security::make_directory(&path, &access::private(user)) {
        // Another process was faster: it is looked at like any that was there.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// How to open something that may be a link, and then is opened itself.
fn options(flags: u32) -> OpenOptions {
    let mut options = File::options();
    options.custom_flags(FILE_FLAG_OPEN_REPARSE_POINT | flags);
    options
}

fn check(file: &File, user: &str) -> Result<(), PrivateError> {
    access::check(&security::of_file(file)?, user).map_err(PrivateError::NotPrivate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_may_touch_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let user = security::user().unwrap();
        let path = directory.path().join("open");
        let open_to_all = format!("O:{user}D:P(A;OICI;FA;;;{user})(A;OICI;FA;;;WD)");
        security::make_directory(&path, &open_to_all).unwrap();
        let error = PrivateDirectory::open(&path).unwrap_err();
        assert!(
            matches!(&error, PrivateError::NotPrivate(problem) if problem.contains("others")),
            "{error}"
        );
        // A file that was made elsewhere keeps who may touch it.
        security::make_file(&path.join("file"), &open_to_all).unwrap();
        let private = PrivateDirectory::open(&directory.path().join("private")).unwrap();
        fs::rename(path.join("file"), private.path.join("file")).unwrap();
        let error = private.read("file", 1).unwrap_err();
        assert!(matches!(error, PrivateError::NotPrivate(_)), "{error}");
        // Nor is what is no file, or no directory.
        fs::create_dir(private.path.join("folder")).unwrap();
        let error = private.read("folder", 1).unwrap_err();
        assert!(matches!(error, PrivateError::NotPrivate(_)), "{error}");
        let error = PrivateDirectory::open(&private.path.join("file")).unwrap_err();
        assert!(matches!(error, PrivateError::NotPrivate(_)), "{error}");
    }
}
