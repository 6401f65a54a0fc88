//! What can be wrong with a checkpoint: what, where, need and have.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::file_kind::FileKind;
pub(crate) use super::shown::{shortened, shown};
use crate::cancel::Cancelled;
use crate::status::Status;

/// Why a checkpoint cannot be found, opened or read.
///
/// Names that come out of a file are kept as they are in the fields, and shortened and escaped in
/// the message: a file cannot write to the terminal of whoever prints the error.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A list of files has none.
    #[error("a checkpoint of no files: the list of them is empty")]
    NoFiles,

    /// There is nothing at the path.
    #[error("{path:?} does not exist")]
    #[allow(missing_docs, reason = "the path that was asked for")]
    NotFound { path: PathBuf },

    /// The name is neither a path nor a model in the local Hugging Face cache.
    #[error(
        "there is no file or directory '{}', and the local Hugging Face cache has no such model: \
         looked for {looked_for:?}; download it first, for example with 'hf download'",
        shown(.model)
    )]
    NotInCache {
        /// The name as it was given.
        model: String,
        /// The directory that the cache would hold it in.
        looked_for: PathBuf,
    },

    /// The name is not a path, and the environment does not say where the cache is.
    #[error(
        "there is no file or directory '{}', and no local Hugging Face cache to look in: none of \
         HF_HUB_CACHE, HF_HOME and the home directory is set",
        shown(.model)
    )]
    NoCache {
        /// The name as it was given.
        model: String,
    },

    /// The name is not a path and cannot be the id of a Hugging Face model.
    #[error(
        "'{}' is neither an existing file or directory nor a Hugging Face id such as org/name",
        shown(.model)
    )]
    NotAModelName {
        /// The name as it was given.
        model: String,
    },

    /// The cache knows the model, but not this revision of it.
    #[error(
        "the local Hugging Face cache has no revision '{}' of '{}': looked for {looked_for:?}",
        shown(.revision), shown(.model)
    )]
    RevisionNotInCache {
        /// The name as it was given.
        model: String,
        /// The revision as it was given.
        revision: String,
        /// The reference that would name its snapshot.
        looked_for: PathBuf,
    },

    /// The text cannot be a branch, a tag or a commit.
    #[error("'{}' is not a revision: a branch, a tag or a commit", shown(.revision))]
    NotARevision {
        /// The revision as it was given.
        revision: String,
    },

    /// A revision was asked of files that have none.
    #[error(
        "{path:?} is a path and has no revision '{}'; revisions are those of Hugging Face ids",
        shown(.revision)
    )]
    RevisionOfPath {
        /// The path.
        path: PathBuf,
        /// The revision as it was given.
        revision: String,
    },

    /// The cache knows the model, but not which of its snapshots to take, or has lost it.
    #[error("the Hugging Face cache entry {path:?} cannot be used: {problem}")]
    BadCacheEntry {
        /// The model's directory in the cache.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },

    /// The directory holds no file at all.
    #[error("{path:?} is an empty directory")]
    #[allow(missing_docs, reason = "the directory")]
    EmptyDirectory { path: PathBuf },

    /// The directory holds weights, but only as PyTorch pickles.
    #[error(
        "{path:?} holds its weights as PyTorch pickles ({}): these can run code when loaded and \
         are not read; convert them to safetensors first",
        shown(.file)
    )]
    OnlyPickles {
        /// The directory.
        path: PathBuf,
        /// The first pickle in it.
        file: String,
    },

    /// A file is something else than it should be.
    #[error("{path:?} is {kind}")]
    WrongKind {
        /// The file.
        path: PathBuf,
        /// What it is.
        kind: FileKind,
    },

    /// What changes a model, and is none.
    #[error(
        "{path:?} is {} adapter for {}, and not a checkpoint: merge it into that model first, for \
         example with merge_and_unload of PEFT",
        match .kind {
            Some(kind) => format!("a {}", shown(kind)),
            None => "an".to_owned(),
        },
        match .base {
            Some(base) => format!("'{}'", shown(base)),
            None => "a model that it does not name".to_owned(),
        }
    )]
    Adapter {
        /// The directory, or the file.
        path: PathBuf,
        /// As its configuration names it, for example `LORA`.
        kind: Option<String>,
        /// The model that it is for, where its configuration names one.
        base: Option<String>,
    },

    /// Weights are missing, and a download has left partial files.
    #[error(
        "the download into {path:?} was begun and not ended: it has left {files} partial file{} of \
         {bytes} bytes; run it again, not offline, and it goes on",
        if *.files == 1 { "" } else { "s" }
    )]
    DownloadNotEnded {
        /// The directory.
        path: PathBuf,
        /// Partial files.
        files: u64,
        /// Bytes of them.
        bytes: u64,
    },

    /// Neither a safetensors file nor a directory with one.
    #[error("{path:?} is not a checkpoint: {problem}")]
    NotACheckpoint {
        /// What was asked for.
        path: PathBuf,
        /// What is missing there.
        problem: String,
    },

    /// The directory could be read as more than one checkpoint.
    #[error(
        "{path:?} holds more than one checkpoint ('{}' and '{}') and no \
         model.safetensors.index.json: name the file to load",
        shown(.first), shown(.second)
    )]
    Ambiguous {
        /// The directory.
        path: PathBuf,
        /// A file of the one.
        first: String,
        /// A file of the other.
        second: String,
    },

    /// A set of numbered shards without an index lacks one.
    #[error("{path:?} holds {have} of {need} shards: '{}' is missing", shown(.missing))]
    IncompleteSet {
        /// The directory.
        path: PathBuf,
        /// Name of the first shard that is missing.
        missing: String,
        /// Shards that the names promise.
        need: u64,
        /// Shards that are there.
        have: u64,
    },

    /// It was asked to stop while it was being opened.
    #[error("cancelled")]
    Cancelled,

    /// The operating system refused.
    #[error("cannot {action} {path:?}: {source}")]
    Io {
        /// What was tried, for example `open`.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },

    /// Something that must be a file is a directory, a pipe or a device.
    #[error("{path:?} is not a regular file")]
    #[allow(missing_docs, reason = "the path")]
    NotAFile { path: PathBuf },

    /// A file of the checkpoint is a link to what does not belong to the checkpoint.
    #[error(
        "{path:?} leads to {target:?}, which does not belong to the checkpoint: links are followed \
         to files (hidden ones excepted) in {} only",
        Places(.allowed)
    )]
    LeadsOut {
        /// The file, as the checkpoint names it.
        path: PathBuf,
        /// Where it leads.
        target: PathBuf,
        /// Directories whose files belong to the checkpoint.
        allowed: Vec<PathBuf>,
    },

    /// A file or a list is larger than any real one.
    #[error("{path:?}: {what} of {have} exceeds the limit of {limit}")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// What is too large, with its unit, for example `a header (bytes)`.
        what: &'static str,
        /// Its size.
        have: u64,
        /// The largest that is read.
        limit: u64,
    },

    /// Text that must be JSON of a certain form is not.
    #[error("{path:?}: {what} is not valid: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Which part of it.
        what: &'static str,
        /// What is wrong, with line and column.
        source: serde_json::Error,
    },

    /// Text that must be UTF-8 is not.
    #[error("{path:?}: {what} is not UTF-8 text")]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Which part of it.
        what: &'static str,
    },

    /// Text that must be a JSON object is something else.
    #[error("{path:?}: {what} is not a JSON object")]
    NotAnObject {
        /// The file.
        path: PathBuf,
        /// Which part of it.
        what: &'static str,
    },

    /// The index names a shard by something else than a plain file name.
    #[error(
        "{path:?}: the entry '{}' names the shard '{}', which is not the plain name of a file \
         beside the index",
        shown(.tensor), shown(.shard)
    )]
    UnsafeShardName {
        /// The index.
        path: PathBuf,
        /// The entry.
        tensor: String,
        /// The name it gives.
        shard: String,
    },

    /// The index lists a tensor twice.
    #[error("{path:?} lists the tensor '{}' twice", shown(.tensor))]
    DuplicateEntry {
        /// The index.
        path: PathBuf,
        /// The entry.
        tensor: String,
    },

    /// The index lists no tensors.
    #[error("{path:?} lists no tensors")]
    #[allow(missing_docs, reason = "the index")]
    EmptyIndex { path: PathBuf },

    /// A shard that the index names is not there.
    #[error("the shard {path:?} is missing; the index needs it for '{}'", shown(.tensor))]
    MissingShard {
        /// Where the shard should be.
        path: PathBuf,
        /// A tensor that the index places there.
        tensor: String,
    },

    /// A tensor is not in the shard that the index gives for it.
    #[error("the index places the tensor '{}' in {path:?}, which does not hold it", shown(.tensor))]
    NotInShard {
        /// The shard.
        path: PathBuf,
        /// The entry.
        tensor: String,
    },

    /// A file is too short to be a safetensors file at all.
    #[error("{path:?} is {have} bytes long; a safetensors file has at least 8")]
    NoHeader {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        have: u64,
    },

    /// The header would end after the end of the file.
    #[error(
        "{path:?} is cut short or is not a safetensors file: its header needs {need} bytes and \
         the file has {have}"
    )]
    HeaderPastEnd {
        /// The file.
        path: PathBuf,
        /// Bytes up to the end of the header.
        need: u64,
        /// Length of the file in bytes.
        have: u64,
    },

    /// A tensor's name is empty, too long or holds control characters.
    #[error("{path:?}: the name of tensor '{}' {problem}", shown(.tensor))]
    BadTensorName {
        /// The file.
        path: PathBuf,
        /// The name, shortened.
        tensor: String,
        /// What is wrong with it.
        problem: &'static str,
    },

    /// A name occurs twice.
    #[error("the tensor '{}' is in {first:?} and again in {second:?}", shown(.tensor))]
    DuplicateTensor {
        /// The name.
        tensor: String,
        /// The file that holds it first.
        first: PathBuf,
        /// The file that holds it again; may be the same.
        second: PathBuf,
    },

    /// An element type that safetensors does not have, or that is too new.
    #[error("{path:?}: the tensor '{}' has the unknown type '{}'", shown(.tensor), shown(.dtype))]
    UnknownDType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The type, shortened.
        dtype: String,
    },

    /// More dimensions than any real tensor has.
    #[error("{path:?}: the tensor '{}' has more than {limit} dimensions", shown(.tensor))]
    TooManyDimensions {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The most that are read.
        limit: usize,
    },

    /// The size in bits that follows from type and shape needs more than 64 bits, or the tensor
    /// ends inside a byte.
    #[error(
        "{path:?}: the tensor '{}' of type {dtype} and shape {shape:?} is too large to address or \
         ends inside a byte",
        shown(.tensor)
    )]
    ShapeOverflow {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: crate::types::DType,
        /// Its shape.
        shape: Vec<u64>,
    },

    /// A tensor begins after its end.
    #[error("{path:?}: the tensor '{}' begins at byte {begin} and ends at {end}", shown(.tensor))]
    ReversedOffsets {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Offset of its first byte in the data.
        begin: u64,
        /// Offset after its last byte.
        end: u64,
    },

    /// Type and shape need another number of bytes than the offsets give.
    #[error(
        "{path:?}: the tensor '{}' needs {need} bytes by its type and shape, and its offsets \
         give it {have}",
        shown(.tensor)
    )]
    SizeMismatch {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Bytes by type and shape.
        need: u64,
        /// Bytes by the offsets.
        have: u64,
    },

    /// Two tensors share bytes.
    #[error("{path:?}: the tensors '{}' and '{}' overlap", shown(.first), shown(.second))]
    Overlap {
        /// The file.
        path: PathBuf,
        /// The one that begins first.
        first: String,
        /// The other.
        second: String,
    },

    /// Bytes that belong to no tensor lie before one.
    #[error(
        "{path:?}: {bytes} bytes before the tensor '{}' belong to no tensor",
        shown(.tensor)
    )]
    Gap {
        /// The file.
        path: PathBuf,
        /// The tensor after the gap.
        tensor: String,
        /// Size of the gap in bytes.
        bytes: u64,
    },

    /// The file ends before its last tensor does.
    #[error(
        "{path:?} is cut short: its tensors need {need} bytes and the file has {have}; the first \
         one that is not complete is '{}'",
        shown(.tensor)
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The first tensor that is not complete.
        tensor: String,
        /// Length in bytes that the header describes.
        need: u64,
        /// Length in bytes that the file has.
        have: u64,
    },

    /// The file goes on after its last tensor.
    #[error("{path:?} is {have} bytes long, and its tensors end at {need}")]
    TrailingBytes {
        /// The file.
        path: PathBuf,
        /// Length in bytes that the header describes.
        need: u64,
        /// Length in bytes that the file has.
        have: u64,
    },

    /// A read asks for bytes outside of the tensor.
    #[error(
        "bytes {start}..{end} of the tensor '{}' were asked for, which has {have}",
        shown(.tensor)
    )]
    OutsideTensor {
        /// The tensor.
        tensor: String,
        /// First byte asked for.
        start: u64,
        /// Byte after the last one asked for.
        end: u64,
        /// Bytes of the tensor.
        have: u64,
    },

    /// The tensors of a quantized weight do not belong together.
    #[error("{path:?}: quantized weight '{}' is damaged: {problem}", shown(.weight))]
    BadQuantized {
        /// The file.
        path: PathBuf,
        /// The weight.
        weight: String,
        /// What is wrong.
        problem: String,
    },

    /// Something that cannot be: a fault of ours, please report it.
    #[error("internal error with '{}': {problem}; please report it", shown(.tensor))]
    Internal {
        /// The tensor.
        tensor: String,
        /// What is wrong.
        problem: &'static str,
    },

    /// Bytes of a file were asked for of which only the header is here.
    #[error("of {path:?} only the header has been downloaded, and no weights")]
    #[allow(missing_docs, reason = "the file")]
    HeadersOnly { path: PathBuf },

    /// The file became shorter after it was opened.
    #[error(
        "{path:?} was cut short while loading: bytes {start}..{end} ({}) were to be read, and the \
         file ends at {have}",
        shown(.tensor)
    )]
    CutShort {
        /// The file.
        path: PathBuf,
        /// The tensor that lies there.
        tensor: String,
        /// First byte of the read, in the file.
        start: u64,
        /// Byte after the last one of the read.
        end: u64,
        /// Where the file ended.
        have: u64,
    },

    /// The file was replaced or written to after it was opened.
    #[error("{path:?} was changed while loading; load the checkpoint again")]
    #[allow(missing_docs, reason = "the file")]
    Changed { path: PathBuf },
}

impl CheckpointError {
    /// The same, or [`CheckpointError::WrongKind`] where a file could not be read as what it should be
    /// because it is something else.
    pub(super) fn or_kind(self, kind: Option<FileKind>) -> CheckpointError {
        let path = match &self {
            CheckpointError::TooLarge { path, .. }
            | CheckpointError::Json { path, .. }
            | CheckpointError::NotUtf8 { path, .. }
            | CheckpointError::NotAnObject { path, .. }
            | CheckpointError::NoHeader { path, .. }
            | CheckpointError::HeaderPastEnd { path, .. } => path.clone(),
            _ => return self,
        };
        match kind {
            Some(kind) => CheckpointError::WrongKind { path, kind },
            None => self,
        }
    }
}

/// Directories, in a message.
struct Places<'a>(&'a [PathBuf]);

impl fmt::Display for Places<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, place) in self.0.iter().enumerate() {
            let separator = if i == 0 { "" } else { " and " };
            write!(f, "{separator}{place:?}")?;
        }
        Ok(())
    }
}

impl From<Cancelled> for CheckpointError {
    fn from(_: Cancelled) -> CheckpointError {
        CheckpointError::Cancelled
    }
}

impl From<&CheckpointError> for Status {
    fn from(error: &CheckpointError) -> Status {
        match error {
            CheckpointError::Cancelled => Status::Interrupted,
            _ => Status::Checkpoint,
        }
    }
}
