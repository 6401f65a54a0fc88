//! Where the files go that the command writes: `--svg FILE`, `--junit FILE`.
//!
//! FILE is whatever its user names. A regular file, or one that does not exist yet, is written beside
//! its place and gets its name when it is complete. Anything else - a device, a FIFO, `/dev/stdout` -
//! is opened and written, never replaced, and `-` is standard output.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Links that are followed, as many as Linux does.
const MOST_LINKS: usize = 40;

/// What a path leads to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Destination {
    /// What this process was given as its output.
    Stdout,
    /// What this process was given for its errors.
    Stderr,
    /// A regular file, or nothing yet, with all links followed.
    File(PathBuf),
    /// Something that is written in its place.
    Other(PathBuf),
}

impl Destination {
    /// Finds out where a path leads.
    ///
    /// # Errors
    /// What the system says: of a directory above that is not there, or of too many links.
    pub(crate) fn of(path: &Path) -> io::Result<Destination> {
        if let Some(stream) = stream_of(path) {
            return Ok(stream);
        }
        let mut path = path.to_owned();
        for _ in 0..MOST_LINKS {
            let metadata = match fs::symlink_metadata(&path) {
                Ok(metadata) => metadata,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Ok(Destination::File(path));
                }
                Err(error) => return Err(error),
            };
            if metadata.is_symlink() {
                let parent = fs::canonicalize(parent(&path))?;
                if parent.starts_with("/proc") {
                    // What looks like a link is an open file, which may have no name at all.
                    let stream = path.file_name().map(|name| parent.join(name));
                    let stream = stream.and_then(|path| stream_of(&path));
                    return Ok(stream.unwrap_or(Destination::Other(path)));
                }
                path = parent.join(fs::read_link(&path)?);
                if let Some(stream) = stream_of(&path) {
                    return Ok(stream);
                }
                continue;
            }
            return Ok(match metadata.is_file() {
                true if is_open_as_stdout(&metadata) => Destination::Stdout,
                true => Destination::File(path),
                false => Destination::Other(path),
            });
        }
        Err(io::Error::other("too many symbolic links"))
    }

    /// Writes all of `bytes` there. A file is as it was before, or complete.
    ///
    /// # Errors
    /// What the system says; a full disk ends here.
    pub(crate) fn write(&self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Destination::Stdout => {
                let mut stdout = io::stdout().lock();
                unless_unread(stdout.write_all(bytes).and_then(|()| stdout.flush()))
            }
            Destination::Stderr => io::stderr().lock().write_all(bytes),
            Destination::File(path) => replace(path, bytes),
            Destination::Other(path) => write_in_place(path, bytes),
        }
    }
}

/// What came of writing to standard output: a reader that has gone away (`... | head`) is no error.
pub(crate) fn unless_unread(written: io::Result<()>) -> io::Result<()> {
    written.or_else(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Ok(()),
        _ => Err(error),
    })
}

/// A stream of this process by one of the names that it has.
fn stream_of(path: &Path) -> Option<Destination> {
    let own = format!("/proc/{}/", std::process::id());
    let path = path.to_str()?;
    let number = match path {
        "-" | "/dev/stdout" => "1",
        "/dev/stderr" => "2",
        _ => {
            // Of this process or of one of its threads.
            let in_proc = ["/proc/self/", "/proc/thread-self/", &own]
                .into_iter()
                .find_map(|start| path.strip_prefix(start));
            let file = in_proc.and_then(|path| match path.strip_prefix("task/") {
                Some(thread) => thread.split_once('/').map(|(_, path)| path),
                None => Some(path),
            });
            let number = file.and_then(|file| file.strip_prefix("fd/"));
            number.or_else(|| path.strip_prefix("/dev/fd/"))?
        }
    };
    match number {
        "1" => Some(Destination::Stdout),
        "2" => Some(Destination::Stderr),
        _ => None,
    }
}

/// The directory that a path is in.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Opens what is there, and writes. A FIFO waits for its reader.
fn write_in_place(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).truncate(true).open(path)?;
    file.write_all(bytes)?;
    file.flush()
}

/// Writes a file beside its place, with the mode and the owner of what it replaces, and renames it.
/// Where that would lose something - another name of the file, an owner that we may not give - or
/// is not possible, the file is written in its place.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let old = match OpenOptions::new().write(true).open(path) {
        // Only what its user may write is replaced.
        Ok(file) => Some(file.metadata()?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    if old.as_ref().is_some_and(has_other_names) {
        return write_in_place(path, bytes);
    }
    let mut builder = tempfile::Builder::new();
    builder.prefix(".tightfit-");
    // As other programs make files; by default only their owner may read temporary ones.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = match builder.tempfile_in(parent(path)) {
        Ok(file) => file,
        // A file that may be written, in a directory that may not.
        Err(_) if old.is_some() => return write_in_place(path, bytes),
        Err(error) => return Err(of_system(error)),
    };
    if let Some(old) = &old
        && become_like(file.as_file(), old).is_err()
    {
        return write_in_place(path, bytes);
    }
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    match file.persist(path) {
        Ok(_) => Ok(()),
        // Something else is mounted there, for example.
        Err(_) if old.is_some() => write_in_place(path, bytes),
        Err(error) => Err(error.error),
    }
}

/// What the system said, without the name that a temporary file would have had.
fn of_system(error: io::Error) -> io::Error {
    let text = error.to_string();
    match text.split_once(" at path ") {
        Some((said, _)) => io::Error::new(error.kind(), said.to_owned()),
        None => error,
    }
}

#[cfg(unix)]
fn has_other_names(file: &Metadata) -> bool {
    std::os::unix::fs::MetadataExt::nlink(file) > 1
}

#[cfg(not(unix))]
fn has_other_names(_: &Metadata) -> bool {
    false
}

/// Gives a new file the owner and the mode of an old one, but not the right to run as its owner.
#[cfg(unix)]
fn become_like(file: &File, old: &Metadata) -> io::Result<()> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
    let new = file.metadata()?;
    if (new.uid(), new.gid()) != (old.uid(), old.gid()) {
        fchown(file, Some(old.uid()), Some(old.gid()))?;
    }
    file.set_permissions(fs::Permissions::from_mode(old.mode() & 0o777))
}

#[cfg(not(unix))]
fn become_like(_: &File, _: &Metadata) -> io::Result<()> {
    Ok(())
}

/// Whether it is the file that standard output was redirected to. Replaced, what is printed later
/// would go to a file without a name.
#[cfg(unix)]
fn is_open_as_stdout(file: &Metadata) -> bool {
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;
    let stdout = io::stdout().as_fd().try_clone_to_owned();
    let stdout = stdout.and_then(|stdout| File::from(stdout).metadata());
    stdout.is_ok_and(|stdout| (stdout.dev(), stdout.ino()) == (file.dev(), file.ino()))
}

#[cfg(not(unix))]
fn is_open_as_stdout(_: &Metadata) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_have_many_names() {
        let own = format!("/proc/{}/fd/1", std::process::id());
        for name in [
            "-",
            "/dev/stdout",
            "/dev/fd/1",
            "/proc/self/fd/1",
            own.as_str(),
        ] {
            assert_eq!(
                stream_of(Path::new(name)),
                Some(Destination::Stdout),
                "{name}"
            );
        }
        for name in ["/dev/stderr", "/dev/fd/2", "/proc/self/task/7/fd/2"] {
            assert_eq!(
                stream_of(Path::new(name)),
                Some(Destination::Stderr),
                "{name}"
            );
        }
        for name in [
            "./-",
            "1",
            "fd/1",
            "/dev/fd/10",
            "/proc/1/fd/11",
            "/dev/null",
            "dir/-",
        ] {
            assert_eq!(stream_of(Path::new(name)), None, "{name}");
        }
    }
}
