//! A directory that belongs to this user alone, and files in it by plain names.

#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;

use std::io::{self, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

#[cfg(unix)]
pub(super) use unix::PrivateDirectory;
#[cfg(windows)]
pub(super) use windows::PrivateDirectory;

/// How unfinished files are called. Those of processes that are gone are removed after a while.
const UNFINISHED: &str = "unfinished-";
const LONG_AGO: Duration = Duration::from_secs(3600);

/// Why a directory or a file in it is not used.
#[derive(Debug, thiserror::Error)]
pub(super) enum PrivateError {
    /// It is not what it should be, or not this user's alone.
    #[error("{0}")]
    NotPrivate(String),
    /// The file system says no.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What is in the directory.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) bytes: u64,
    pub(super) used: SystemTime,
}

impl PrivateDirectory {
    /// Returns what a file holds, up to `limit` bytes. `None` where there is none.
    ///
    /// # Errors
    /// When it is another user's, others may do something with it, or it is longer.
    pub(super) fn read(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>, PrivateError> {
        let Some((file, length)) = self.open_file(name)? else {
            return Ok(None);
        };
        if length > limit {
            let problem = format!("it takes {length} bytes, at most {limit} are read");
            return Err(PrivateError::NotPrivate(problem));
        }
        let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or(0));
        file.take(limit).read_to_end(&mut bytes)?;
        Ok(Some(bytes))
    }

    /// Returns the first bytes of a file, at most `limit` of them. `None` where there is none.
    ///
    /// # Errors
    /// When it is another user's, or others may do something with it.
    pub(super) fn read_start(
        &self,
        name: &str,
        limit: u64,
    ) -> Result<Option<Vec<u8>>, PrivateError> {
        let Some((file, _)) = self.open_file(name)? else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        file.take(limit).read_to_end(&mut bytes)?;
        Ok(Some(bytes))
    }
}

fn name_of_unfinished() -> String {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    format!("{UNFINISHED}{}-{number}", std::process::id())
}

fn is_unfinished(name: &str) -> bool {
    name.starts_with(UNFINISHED)
}

/// Whether nobody is writing any more what was written then.
fn is_left(written: SystemTime) -> bool {
    written.elapsed().is_ok_and(|age| age > LONG_AGO)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn what_is_made_is_private_and_found_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a").join("b");
        let private = PrivateDirectory::open(&path).unwrap();
        private.write("file", &[b"some", b"thing"], false).unwrap();
        for private in [private, PrivateDirectory::open(&path).unwrap()] {
            assert_eq!(private.read("file", 9).unwrap().unwrap(), b"something");
            assert_eq!(private.read_start("file", 4).unwrap().unwrap(), b"some");
            assert!(private.read("other", 9).unwrap().is_none());
            let error = private.read("file", 8).unwrap_err();
            assert!(error.to_string().contains("9 bytes"), "{error}");
        }
    }

    #[test]
    fn a_file_is_replaced_or_kept() {
        let directory = tempfile::tempdir().unwrap();
        let private = PrivateDirectory::open(&directory.path().join("a")).unwrap();
        private.write("file", &[b"1"], true).unwrap();
        private.write("file", &[b"2"], true).unwrap();
        assert_eq!(private.read("file", 9).unwrap().unwrap(), b"1");
        private.write("file", &[b"3"], false).unwrap();
        assert_eq!(private.read("file", 9).unwrap().unwrap(), b"3");
        let names: Vec<String> = private
            .entries()
            .unwrap()
            .into_iter()
            .map(|entry| entry.name)
            .collect();
        assert_eq!(names, ["file"]);
        private.remove("file").unwrap();
        private.remove("file").unwrap();
        assert!(private.entries().unwrap().is_empty());
    }

    #[test]
    fn what_was_of_use_is_younger() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        let private = PrivateDirectory::open(&path).unwrap();
        private.write("file", &[b"1"], false).unwrap();
        let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 30);
        let file = File::options().write(true).open(path.join("file")).unwrap();
        file.set_modified(long_ago).unwrap();
        drop(file);
        assert_eq!(private.entries().unwrap()[0].used, long_ago);
        private.touch("file").unwrap();
        let age = private.entries().unwrap()[0].used.elapsed();
        assert!(age.is_ok_and(|age| age < Duration::from_secs(600)));
    }
}
