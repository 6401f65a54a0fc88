//! There are no private directories where files have no owner and mode as Unix has them.

use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::time::SystemTime;

#[derive(Debug, thiserror::Error)]
pub(super) enum PrivateError {
    #[expect(dead_code, reason = "nothing is looked at that could be found so")]
    #[error("{0}")]
    NotPrivate(String),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Never made.
#[derive(Debug)]
pub(super) struct PrivateDirectory(Infallible);

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) bytes: u64,
    pub(super) used: SystemTime,
}

impl PrivateDirectory {
    pub(super) fn open(_: &Path) -> Result<PrivateDirectory, PrivateError> {
        Err(PrivateError::Io(io::ErrorKind::Unsupported.into()))
    }

    pub(super) fn read(&self, _: &str, _: u64) -> Result<Option<Vec<u8>>, PrivateError> {
        match self.0 {}
    }

    pub(super) fn read_start(&self, _: &str, _: u64) -> Result<Option<Vec<u8>>, PrivateError> {
        match self.0 {}
    }

    pub(super) fn write(&self, _: &str, _: &[&[u8]], _: bool) -> io::Result<()> {
        match self.0 {}
    }

    pub(super) fn remove(&self, _: &str) -> io::Result<()> {
        match self.0 {}
    }

    pub(super) fn touch(&self, _: &str) -> io::Result<()> {
        match self.0 {}
    }

    pub(super) fn entries(&self) -> io::Result<Vec<Entry>> {
        match self.0 {}
    }
}
