//! Files and directories that are removed again unless all of them come to be.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::error::{SynthError, io_error};

/// What has been created so far, removed when dropped before it was complete.
pub(super) struct Created {
    directory: PathBuf,
    files: Vec<PathBuf>,
    /// Outer ones first.
    directories: Vec<PathBuf>,
}

impl Created {
    /// Makes sure that the directory is there and empty.
    pub(super) fn directory(directory: &Path) -> Result<Created, SynthError> {
        let mut created = Created {
            directory: directory.into(),
            files: Vec::new(),
            directories: Vec::new(),
        };
        match fs::read_dir(directory) {
            Ok(mut entries) => match entries.next() {
                None => return Ok(created),
                Some(Ok(_)) => {
                    return Err(SynthError::NotEmpty {
                        path: directory.into(),
                    });
                }
                Some(Err(error)) => return Err(io_error("list", directory)(error)),
            },
            // Windows has other errors for that.
            Err(error)
                if error.kind() == ErrorKind::NotADirectory
                    || (cfg!(windows) && directory.ancestors().any(Path::is_file)) =>
            {
                return Err(SynthError::NotADirectory {
                    path: directory.into(),
                });
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(io_error("list", directory)(error)),
        }
        let missing: Vec<&Path> = directory
            .ancestors()
            .take_while(|path| !path.as_os_str().is_empty() && !path.exists())
            .collect();
        for path in missing.into_iter().rev() {
            match fs::create_dir(path) {
                Ok(()) => created.directories.push(path.into()),
                // Somebody else was faster, and theirs is not ours to remove. `a/../b` also comes
                // here, where `a/..` exists as soon as `a` does.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(io_error("create", path)(error)),
            }
        }
        Ok(created)
    }

    /// The directory that everything goes into.
    pub(super) fn path(&self) -> &Path {
        &self.directory
    }

    /// Creates a file that was not there before.
    pub(super) fn file(&mut self, name: &str) -> Result<(PathBuf, File), SynthError> {
        let path = self.directory.join(name);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(io_error("create", &path))?;
        self.files.push(path.clone());
        Ok((path, file))
    }

    /// Creates a file with this text.
    pub(super) fn text(&mut self, name: &str, text: &str) -> Result<(), SynthError> {
        let (path, mut file) = self.file(name)?;
        file.write_all(text.as_bytes())
            .map_err(io_error("write", &path))
    }

    /// Complete: nothing is removed any more.
    pub(super) fn keep(mut self) {
        self.files.clear();
        self.directories.clear();
    }
}

impl Drop for Created {
    fn drop(&mut self) {
        // Nothing can be done where removing fails, and the error that led here is on its way.
        for file in self.files.iter().rev() {
            let _ = fs::remove_file(file);
        }
        for directory in self.directories.iter().rev() {
            // Does nothing to a directory in which somebody else has put something.
            let _ = fs::remove_dir(directory);
        }
    }
}
