//! Compiled code, kept for the next process.
//!
//! Compiled code is native code, and whoever can change it can do whatever this program can. So it
//! is kept where only this user can write, and each entry is sealed with a key that is kept there
//! too: one that was damaged, exchanged, or put there by somebody without the key is not used.

use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};

use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};
use wasmtime::Engine;

use super::code::Code;
use super::private::{Entry, PrivateDirectory, PrivateError};

/// An entry is large that takes more than one part in this many of what a cache holds.
const LARGE_PART: u64 = 4;

/// Bytes of a key, and of a seal.
const KEY: usize = 32;
const KEY_NAME: &str = "key";

/// Names what an entry is made of. Another release keeps other entries.
const KIND: &str = concat!(
    "tightfit compiled component 2, release ",
    env!("CARGO_PKG_VERSION")
);

/// A directory with compiled code. Several processes can use the same one.
#[derive(Debug)]
pub struct Cache {
    directory: PrivateDirectory,
    key: [u8; KEY],
    most_bytes: u64,
}

/// A cache that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// Others than this user could put code there.
    #[error("compiled code is not kept in {}: {problem}", path.display())]
    NotPrivate {
        /// The cache's directory.
        path: PathBuf,
        /// What is wrong with it, or with its key.
        problem: String,
    },
    /// It cannot be made, read or written.
    #[error("cannot keep compiled code in {}: {source}", path.display())]
    Unusable {
        /// The cache's directory.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

/// What an entry is called and sealed for.
#[derive(Debug)]
pub(super) struct EntryId([u8; 32]);

impl Cache {
    /// Bytes that a cache holds unless told otherwise: a policy in Rust takes 0.3 MB, one in Python
    /// or JavaScript about 32 MB.
    pub const MOST_BYTES: u64 = 512 << 20;

    /// Opens or makes a cache. When it holds more than `most_bytes`, what has not been used for
    /// longest is removed.
    ///
    /// # Errors
    /// When others than this user could put code there, or it cannot be used.
    pub fn open(path: &Path, most_bytes: u64) -> Result<Cache, CacheError> {
        let opened = PrivateDirectory::open(path).and_then(|directory| {
            Ok(Cache {
                key: key(&directory)?,
                directory,
                most_bytes,
            })
        });
        let path = path.to_owned();
        opened.map_err(|error| match error {
            PrivateError::NotPrivate(problem) => CacheError::NotPrivate { path, problem },
            PrivateError::Io(source) => CacheError::Unusable { path, source },
        })
    }

    /// Returns where this user's programs keep it: `$XDG_CACHE_HOME/tightfit/compiled`, or
    /// `~/.cache/tightfit/compiled`, on Windows `%LOCALAPPDATA%\tightfit\compiled`. `None` where there
    /// is no home.
    pub fn default_path() -> Option<PathBuf> {
        let absolute = |path: PathBuf| path.is_absolute().then_some(path);
        let named = |name| absolute(std::env::var_os(name)?.into());
        let home = || absolute(std::env::home_dir()?);
        let cache = named("XDG_CACHE_HOME").or_else(|| match cfg!(windows) {
            true => named("LOCALAPPDATA").or_else(|| Some(home()?.join("AppData").join("Local"))),
            false => Some(home()?.join(".cache")),
        });
        Some(cache?.join("tightfit").join("compiled"))
    }

    /// Returns the id of what this engine makes of these bytes.
    pub(super) fn id(engine: &Engine, bytes: &[u8]) -> EntryId {
        let mut hash = ByDigest(Sha256::new_with_prefix(KIND));
        engine.precompile_compatibility_hash().hash(&mut hash);
        hash.write(&Sha256::digest(bytes));
        EntryId(hash.0.finalize().into())
    }

    /// Returns the code of this id, if it is there, whole, and of at most this many bytes.
    pub(super) fn find(&self, id: &EntryId, most: u64) -> Option<Code> {
        let name = id.name();
        let most = most.saturating_add(KEY as u64).min(self.most_bytes);
        let mut bytes = match self.directory.read(&name, most) {
            Ok(found) => found?,
            Err(error) => {
                tracing::warn!("compiled code is not used: {name}: {error}");
                return None;
            }
        };
        let whole = bytes
            .split_first_chunk::<KEY>()
            .is_some_and(|(seal, code)| self.seal(id, code).verify_slice(seal).is_ok());
        if !whole {
            tracing::warn!("compiled code is not used: {name} is damaged, or not from here");
            return None;
        }
        if let Err(error) = self.directory.touch(&name) {
            tracing::debug!("{name}: {error}");
        }
        bytes.drain(..KEY);
        // SAFETY: these bytes were sealed with a key that only this user has, by `keep`, to which
        // they came from the compiler; they are the ones that were checked, not read again.
        #[allow(unsafe_code)]
        let code = unsafe { Code::new(bytes) };
        Some(code)
    }

    /// Keeps code. That it cannot be kept harms nobody.
    pub(super) fn keep(&self, id: &EntryId, code: &Code) {
        let code = code.bytes();
        let bytes = (code.len() as u64).saturating_add(KEY as u64);
        if bytes > self.most_bytes {
            tracing::debug!("compiled code is not kept: it takes {bytes} bytes");
            return;
        }
        let seal = self.seal(id, code).finalize().into_bytes();
        let kept = self
            .directory
            .write(&id.name(), &[&seal, code], false)
            .and_then(|()| self.evict());
        if let Err(error) = kept {
            tracing::debug!("compiled code is not kept: {error}");
        }
    }

    fn seal(&self, id: &EntryId, code: &[u8]) -> Hmac<Sha256> {
        let mac = <Hmac<Sha256> as Mac>::new_from_slice(&self.key);
        mac.expect("every length of key will do")
            .chain_update(id.0)
            .chain_update(code)
    }

    /// Makes room: what was not used for longest goes. What is large only has the room that others
    /// leave, so that one guest does not drive out those of everybody else.
    fn evict(&self) -> std::io::Result<()> {
        let mut entries = self.directory.entries()?;
        entries.retain(|entry| entry.name != KEY_NAME);
        let is_large = |entry: &Entry| entry.bytes > self.most_bytes / LARGE_PART;
        entries.sort_by_key(|entry| (is_large(entry), std::cmp::Reverse(entry.used)));
        let mut held = 0u64;
        for entry in entries {
            let with_it = held.saturating_add(entry.bytes);
            if with_it > self.most_bytes {
                self.directory.remove(&entry.name)?;
            } else {
                held = with_it;
            }
        }
        Ok(())
    }
}

impl EntryId {
    fn name(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Returns the cache's key, made by whoever comes first.
fn key(directory: &PrivateDirectory) -> Result<[u8; KEY], PrivateError> {
    // Others may have read it, or it is no file: for its owner to look at.
    let told = |error| match error {
        PrivateError::NotPrivate(problem) => PrivateError::NotPrivate(format!(
            "{problem}: its file '{KEY_NAME}'; when that is removed, another is made"
        )),
        error => error,
    };
    let read = || directory.read_start(KEY_NAME, KEY as u64 + 1).map_err(told);
    let whole = |key: Vec<u8>| <[u8; KEY]>::try_from(key).ok();
    if let Some(found) = read()? {
        if let Some(key) = whole(found) {
            return Ok(key);
        }
        // Cut short, as after a power failure, or added to. Nothing that it has sealed can be used.
        tracing::warn!("the key of the compiled code that is kept is damaged: it is replaced");
        directory.remove(KEY_NAME)?;
    }
    let mut new = [0; KEY];
    getrandom::fill(&mut new).map_err(std::io::Error::other)?;
    // Another process may have been faster; then its key is the one.
    directory.write(KEY_NAME, &[&new], true)?;
    let key = read()?.and_then(whole);
    key.ok_or_else(|| std::io::Error::other("its key cannot be read back").into())
}

/// Feeds what is hashed into a digest.
struct ByDigest(Sha256);

impl Hasher for ByDigest {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> u64 {
        let digest: [u8; 32] = self.0.clone().finalize().into();
        let first = digest.first_chunk().copied().unwrap_or_default();
        u64::from_le_bytes(first)
    }
}
