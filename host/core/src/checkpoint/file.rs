//! Opening and reading single files whose sizes and kinds nobody vouches for.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, SystemTime};

use super::CheckpointError;
use super::directory::Directory;
use super::text::{PIECE, Text};
use crate::cancel::CancelToken;

/// A file of weights. It is either kept open, or opened anew for every read; in both cases the
/// bytes come from the file that was checked when the checkpoint was opened, or there is an error.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    source: Source,
    state: State,
    file: Option<Arc<Kept>>,
}

/// A file that stays open.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) file: File,
    /// Whether somebody has a lease on it: a second would be the same one.
    #[allow(dead_code, reason = "there are systems without leases")]
    pub(super) leased: AtomicBool,
}

/// How a file is found.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    /// By its name in the checkpoint's directory.
    In(Arc<Directory>, String),
    /// By a path that the user gave: whoever names a link means what it leads to.
    Named(PathBuf),
    /// Not at all: only its beginning and its length are known.
    #[cfg(feature = "hub")]
    Beginning(Beginning),
}

/// What is known of a file elsewhere.
#[cfg(feature = "hub")]
#[derive(Debug, Clone)]
pub(crate) struct Beginning {
    pub(crate) name: String,
    /// Its first bytes, with the whole header.
    pub(crate) bytes: Arc<[u8]>,
    pub(crate) length: u64,
}

impl Source {
    pub(crate) fn path(&self) -> PathBuf {
        match self {
            Source::In(directory, name) => directory.path().join(name),
            Source::Named(path) => path.clone(),
            #[cfg(feature = "hub")]
            Source::Beginning(beginning) => beginning.name.clone().into(),
        }
    }

    fn open(&self) -> Result<File, CheckpointError> {
        match self {
            Source::In(directory, name) => directory.open_file(name),
            Source::Named(path) => open_named(path),
            #[cfg(feature = "hub")]
            Source::Beginning(_) => Err(CheckpointError::HeadersOnly { path: self.path() }),
        }
    }
}

/// What tells whether a file is still the one that was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct State {
    length: u64,
    modified: Option<SystemTime>,
    identity: Option<(u64, u64)>,
}

impl State {
    pub(super) fn of(metadata: &fs::Metadata) -> State {
        State {
            length: metadata.len(),
            modified: metadata.modified().ok(),
            identity: identity(metadata),
        }
    }
}

/// Device and inode, where the system has them.
#[cfg(unix)]
fn identity(metadata: &fs::Metadata) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    Some((metadata.dev(), metadata.ino()))
}

#[cfg(not(unix))]
fn identity(_: &fs::Metadata) -> Option<(u64, u64)> {
    None
}

/// Why a positioned read gave less than was asked for.
#[derive(Debug)]
pub(crate) enum ReadFailure {
    /// The file ended here.
    CutShort(u64),
    /// Everything else.
    Other(CheckpointError),
}

impl Shard {
    /// Opens a regular file for positioned reads.
    pub(crate) fn open(source: Source) -> Result<Shard, CheckpointError> {
        let path = source.path();
        #[cfg(feature = "hub")]
        if let Source::Beginning(beginning) = &source {
            let state = State {
                length: beginning.length,
                modified: None,
                identity: None,
            };
            return Ok(Shard {
                path,
                state,
                source,
                file: None,
            });
        }
        let file = source.open()?;
        let metadata = file
            .metadata()
            .map_err(io_error("read the size of", &path))?;
        Ok(Shard {
            path,
            source,
            state: State::of(&metadata),
            file: Some(Arc::new(Kept {
                file,
                leased: AtomicBool::new(false),
            })),
        })
    }

    /// Whether only its beginning is here.
    #[cfg(feature = "hub")]
    pub(super) fn is_beginning(&self) -> bool {
        matches!(self.source, Source::Beginning(_))
    }

    /// Gives the descriptor back; later reads open the file again and check that it is the same.
    pub(crate) fn close(&mut self) {
        self.file = None;
    }

    /// Returns where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns its length in bytes when it was opened.
    pub fn length(&self) -> u64 {
        self.state.length
    }

    /// Fills the buffer from the bytes at `offset`.
    pub(crate) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ReadFailure> {
        #[cfg(feature = "hub")]
        if let Source::Beginning(beginning) = &self.source
            && let Some(end) = offset.checked_add(buffer.len() as u64)
            && end <= beginning.bytes.len() as u64
        {
            buffer.copy_from_slice(&beginning.bytes[offset as usize..end as usize]);
            return Ok(());
        }
        self.read_pieces(std::iter::once((offset, buffer)))
    }

    /// Fills buffers, each from the bytes at the offset before it. That the file is the one that was opened is asked
    /// once.
    pub(crate) fn read_pieces<'b>(
        &self,
        pieces: impl Iterator<Item = (u64, &'b mut [u8])>,
    ) -> Result<(), ReadFailure> {
        let reopened;
        let file = match &self.file {
            Some(kept) => &kept.file,
            None => {
                reopened = self.source.open().map_err(ReadFailure::Other)?;
                &reopened
            }
        };
        for (offset, buffer) in pieces {
            let read = read_full(file, offset, buffer)
                .map_err(io_error("read", &self.path))
                .map_err(ReadFailure::Other)?;
            if read < buffer.len() {
                return Err(ReadFailure::CutShort(offset.saturating_add(read as u64)));
            }
        }
        // After the reads, so that no write can come between the check and the bytes.
        self.check_unchanged(file).map_err(ReadFailure::Other)
    }

    /// Refuses a file that is not as it was when the checkpoint was opened.
    pub(super) fn check_unchanged(&self, file: &File) -> Result<(), CheckpointError> {
        let metadata = file
            .metadata()
            .map_err(io_error("read the size of", &self.path))?;
        if State::of(&metadata) != self.state {
            return Err(self.changed());
        }
        Ok(())
    }

    pub(super) fn changed(&self) -> CheckpointError {
        CheckpointError::Changed {
            path: self.path.clone(),
        }
    }

    /// The file, where it is kept open.
    #[allow(dead_code, reason = "there are systems without leases")]
    pub(super) fn kept(&self) -> Option<&Arc<Kept>> {
        self.file.as_ref()
    }
}

/// Reads until the buffer is full or the file ends; gives the number of bytes read.
fn read_full(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match read_once(file, offset + filled as u64, &mut buffer[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(unix)]
fn read_once(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, buffer, offset)
}

#[cfg(windows)]
fn read_once(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, buffer, offset)
}

/// Opens a file that the user named, and that is no pipe, device or directory: opening or reading
/// one of these may block for ever.
fn open_named(path: &Path) -> Result<File, CheckpointError> {
    let regular = |metadata: fs::Metadata| {
        if metadata.is_file() {
            Ok(())
        } else {
            Err(CheckpointError::NotAFile { path: path.into() })
        }
    };
    regular(fs::metadata(path).map_err(io_error("open", path))?)?;
    let mut options = File::options();
    options.read(true);
    // In case it has become a pipe meanwhile.
    #[cfg(unix)]
    {
        use rustix::fs::OFlags;
        use std::os::unix::fs::OpenOptionsExt;
        options.custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32);
    }
    let file = patiently(|| options.open(path)).map_err(io_error("open", path))?;
    regular(file.metadata().map_err(io_error("open", path))?)?;
    Ok(file)
}

/// Opens a file without waiting for what may never come, but for another process's lease on it, which is
/// given back in milliseconds as soon as somebody has asked for the file. A load has such leases (`mapped`).
pub(super) fn patiently<T>(open: impl Fn() -> io::Result<T>) -> io::Result<T> {
    for _ in 0..LEASE_TRIES {
        match open() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(LEASE_WAIT),
            result => return result,
        }
    }
    open()
}

/// How often, and how long each time, a file is waited for that somebody has leased: 2 s.
const LEASE_TRIES: u32 = 1000;
const LEASE_WAIT: Duration = Duration::from_millis(2);

/// The whole text of a regular file that the user named, of at most `limit` bytes; `None` where
/// there is none.
pub(crate) fn read_text(
    path: &Path,
    what: &'static str,
    limit: u64,
    cancel: &CancelToken,
) -> Result<Option<String>, CheckpointError> {
    match open_named(path) {
        Err(CheckpointError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Ok(None)
        }
        other => read_limited(other?, path, what, limit, cancel).map(Some),
    }
}

/// The whole text of a file of at most `limit` bytes; `path` is named in errors only.
pub(crate) fn read_limited(
    file: File,
    path: &Path,
    what: &'static str,
    limit: u64,
    cancel: &CancelToken,
) -> Result<String, CheckpointError> {
    let length = file.metadata().map_or(0, |metadata| metadata.len());
    let not_utf8 = |_| CheckpointError::NotUtf8 {
        path: path.into(),
        what,
    };
    let mut text = Text::with_capacity(length.min(limit) as usize);
    let mut piece = vec![0; PIECE.min(length.max(1) as usize + 1)];
    let (mut reader, mut bytes) = (file, 0);
    loop {
        cancel.check()?;
        let read = match reader.read(&mut piece) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(io_error("read", path)(error)),
        };
        bytes += read as u64;
        // A longer file is seen whatever its size said.
        if bytes > limit {
            return Err(CheckpointError::TooLarge {
                path: path.into(),
                what,
                have: length.max(bytes),
                limit,
            });
        }
        text.push(&piece[..read]).map_err(not_utf8)?;
    }
    text.finish().map_err(not_utf8)
}

/// Turns a system error into ours, for `map_err`.
pub(crate) fn io_error(
    action: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> CheckpointError {
    move |source| CheckpointError::Io {
        action,
        path: path.into(),
        source,
    }
}

/// Whether the text names a file in a directory and nothing outside of it, on any system.
pub(crate) fn is_plain_file_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 255
        && name != "."
        && name != ".."
        && !name.contains(['/', '\\', ':'])
        && !name.chars().any(char::is_control)
}
