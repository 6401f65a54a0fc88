//! By handles of directories and modes.
//!
//! The directory is opened once and checked then; files are opened in what was opened, whatever becomes of its
//! path. Nothing here follows a symbolic link.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, fstat, linkat, openat, renameat, unlinkat,
};
use rustix::io::Errno;
use rustix::process::geteuid;

use super::{Entry, PrivateError, is_left, is_unfinished, name_of_unfinished};

/// Not `Mode`, whose width differs from system to system.
const OTHERS_MAY_NOT: u32 = 0o700;

/// An open directory.
#[derive(Debug)]
pub(in super::super) struct PrivateDirectory {
    directory: File,
}

impl From<Errno> for PrivateError {
    fn from(error: Errno) -> PrivateError {
        PrivateError::Io(error.into())
    }
}

impl PrivateDirectory {
    /// Makes it, with those above it, where it is not there.
    ///
    /// # Errors
    /// When it is no directory or a symbolic link, belongs to another user, or others may do
    /// something with it.
    pub(in super::super) fn open(path: &Path) -> Result<PrivateDirectory, PrivateError> {
        use std::os::unix::fs::DirBuilderExt;
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(OTHERS_MAY_NOT)
            .create(path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = match openat(CWD, path, flags, Mode::empty()) {
            Err(Errno::LOOP | Errno::NOTDIR) => {
                let problem = "it is a symbolic link or no directory";
                return Err(PrivateError::NotPrivate(problem.to_owned()));
            }
            directory => directory?,
        };
        check(&fstat(&directory)?, FileType::Directory)?;
        Ok(PrivateDirectory {
            directory: directory.into(),
        })
    }

    /// Returns a file that is this user's alone, and its length.
    pub(super) fn open_file(&self, name: &str) -> Result<Option<(File, u64)>, PrivateError> {
        // Not blocking, should it be a pipe.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match openat(&self.directory, name, flags, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(None),
            file => File::from(file?),
        };
        let stat = fstat(&file)?;
        check(&stat, FileType::RegularFile)?;
        let length = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
        Ok(Some((file, length)))
    }

    /// Writes a file that appears when it is complete. Where there is one of this name already, it
    /// is replaced or, when `keep`, stays.
    pub(in super::super) fn write(
        &self,
        name: &str,
        parts: &[&[u8]],
        keep: bool,
    ) -> io::Result<()> {
        let unfinished = name_of_unfinished();
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        // Left by a process of the same number that did not end well.
        let _ = unlinkat(&self.directory, &unfinished, AtFlags::empty());
        let file = openat(&self.directory, &unfinished, flags, Mode::RUSR | Mode::WUSR)?;
        let mut file = File::from(file);
        let written = parts.iter().try_for_each(|part| file.write_all(part));
        let named = written.and_then(|()| {
            let (from, to) = (&self.directory, &self.directory);
            if keep {
                match linkat(from, &unfinished, to, name, AtFlags::empty()) {
                    Err(Errno::EXIST) => Ok(()),
                    other => Ok(other?),
                }
            } else {
                Ok(renameat(from, &unfinished, to, name)?)
            }
        });
        if keep || named.is_err() {
            let _ = unlinkat(&self.directory, &unfinished, AtFlags::empty());
        }
        named
    }

    /// Removes a file, if it is there.
    pub(in super::super) fn remove(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.directory, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Notes that a file has been of use.
    pub(in super::super) fn touch(&self, name: &str) -> io::Result<()> {
        let now = rustix::fs::Timespec {
            tv_sec: 0,
            tv_nsec: rustix::fs::UTIME_NOW,
        };
        let times = rustix::fs::Timestamps {
            last_access: now,
            last_modification: now,
        };
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        Ok(rustix::fs::utimensat(&self.directory, name, &times, flags)?)
    }

    /// Returns the files, without those that are being written. Removes what has been left
    /// unfinished.
    pub(in super::super) fn entries(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for entry in Dir::read_from(&self.directory)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().to_str() else {
                continue;
            };
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            let Ok(stat) = rustix::fs::statat(&self.directory, name, flags) else {
                // Another process has removed it.
                continue;
            };
            if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                continue;
            }
            let seconds = u64::try_from(stat.st_mtime).unwrap_or(0);
            let nanoseconds = u32::try_from(stat.st_mtime_nsec).unwrap_or(0);
            let used = SystemTime::UNIX_EPOCH + Duration::new(seconds, nanoseconds);
            if is_unfinished(name) {
                if is_left(used) {
                    self.remove(name)?;
                }
                continue;
            }
            entries.push(Entry {
                name: name.to_owned(),
                bytes: u64::try_from(stat.st_size).unwrap_or(0),
                used,
            });
        }
        Ok(entries)
    }
}

/// Checks that this user made it, and nobody else may do anything with it.
fn check(stat: &Stat, kind: FileType) -> Result<(), PrivateError> {
    let problem = if FileType::from_raw_mode(stat.st_mode) != kind {
        match kind {
            FileType::Directory => "it is no directory".to_owned(),
            _ => "it is no regular file".to_owned(),
        }
    } else if stat.st_uid != geteuid().as_raw() {
        format!("it belongs to another user ({})", stat.st_uid)
    } else if stat.st_mode & 0o077 != 0 {
        let mode = stat.st_mode & 0o777;
        format!("others have access to it (its mode is {mode:03o})")
    } else {
        return Ok(());
    };
    Err(PrivateError::NotPrivate(problem))
}
