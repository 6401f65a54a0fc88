//! Files beside the weights that say how text becomes tokens and how to generate.

use std::sync::Arc;

use super::{Checkpoint, CheckpointError, ReadFailure, Shard, Source};

/// The names of the files that [`Checkpoint::companion`] opens.
pub const COMPANIONS: [&str; 8] = [
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
];

/// Largest file beside the weights that is read or copied, in bytes. The largest tokenizers have half of this.
pub const MAX_COMPANION_BYTES: u64 = 64 << 20;

/// A file beside the weights, open.
#[derive(Debug)]
pub struct Companion(Shard);

impl Checkpoint {
    /// Opens the file of this name beside the weights; `None` where there is none, or where it is not one of
    /// [`COMPANIONS`]. What is in it is as it is on disk, and nothing of it is checked.
    ///
    /// # Errors
    /// [`CheckpointError::TooLarge`] when it has more than [`MAX_COMPANION_BYTES`],
    /// [`CheckpointError::LeadsOut`] and [`CheckpointError::NotAFile`] when it is something else, and
    /// [`CheckpointError::Io`].
    pub fn companion(&self, name: &str) -> Result<Option<Companion>, CheckpointError> {
        if !COMPANIONS.contains(&name) || !self.directory().has(name)? {
            return Ok(None);
        }
        let file = Shard::open(Source::In(Arc::clone(self.directory()), name.to_owned()))?;
        if file.length() > MAX_COMPANION_BYTES {
            return Err(CheckpointError::TooLarge {
                path: file.path().into(),
                what: "a file beside the weights (bytes)",
                have: file.length(),
                limit: MAX_COMPANION_BYTES,
            });
        }
        Ok(Some(Companion(file)))
    }
}

impl Companion {
    /// Returns its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.0.length()
    }

    /// Fills the buffer from the bytes at `start`.
    ///
    /// # Errors
    /// [`CheckpointError::Changed`] when it ends before, [`CheckpointError::Io`] when reading fails.
    pub fn read(&self, start: u64, buffer: &mut [u8]) -> Result<(), CheckpointError> {
        self.0
            .read_at(start, buffer)
            .map_err(|failure| match failure {
                ReadFailure::Other(error) => error,
                ReadFailure::CutShort(_) => CheckpointError::Changed {
                    path: self.0.path().into(),
                },
            })
    }
}
