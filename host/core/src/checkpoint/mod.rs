//! What is on disk: checkpoints in the safetensors format, found, opened and checked.
//!
//! Everything read here is treated as written by an attacker: sizes are checked before they are
//! allocated, names before they become paths, and the tensors of an opened [`Checkpoint`] are
//! known to lie inside of their files without touching each other. Files are read at positions
//! ([`Checkpoint::read_at`]), or mapped where the system promises not to let anybody change them
//! meanwhile (`mapped`), so that a file cut short while loading is an error and not a signal.

mod adapter;
mod cache;
mod companion;
mod config;
mod directory;
mod encoded;
mod error;
mod file;
mod file_kind;
mod gather;
mod header;
mod index;
mod locate;
mod mapped;
mod method;
mod python_json;
mod quantized;
mod reading;
mod remark;
mod scales;
mod shown;
mod slices;
#[cfg(test)]
mod tests;
mod text;
mod ties;
mod unfinished;
mod visit;
mod write;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use cache::{CacheEnvironment, resolve, resolve_revision, resolve_with};
#[cfg(feature = "hub")]
pub(crate) use cache::{entry_name, is_revision};
pub use companion::{COMPANIONS, Companion, MAX_COMPANION_BYTES};
pub use config::{Config, LayerType, MAX_CONFIG_BYTES};
pub(crate) use directory::Directory;
pub(crate) use encoded::ReadCodes;
pub use encoded::{Dequantize, Encoded, EncodedCounts, ScaleForm};
pub use error::CheckpointError;
pub(crate) use error::shown;
#[cfg(feature = "hub")]
pub(crate) use file::Beginning;
pub use file::Shard;
pub(crate) use file::{ReadFailure, Source, is_plain_file_name};
pub use file_kind::FileKind;
#[cfg(feature = "hub")]
pub(crate) use header::header_length;
pub use header::{MAX_DIMENSIONS, MAX_HEADER_BYTES, MAX_METADATA, MAX_NAME_BYTES, MAX_TENSORS};
#[cfg(feature = "hub")]
pub(crate) use index::{Index, parse as parse_index};
pub use index::{MAX_INDEX_BYTES, MAX_SHARDS};
pub(crate) use mapped::{Mappings, Window};
pub use method::{MethodSource, QuantizationMethod};
pub(crate) use python_json::{in_place, without_mark};
pub use quantized::{Extent, Nested, Quantized};
pub use remark::Remark;
pub use scales::AbsmaxForm;
pub(crate) use slices::{Came, order};
pub use slices::{MAX_SLICE_RANGES, Piece, SliceError};
pub use ties::Tie;
pub(crate) use write::{HeaderError, header_text};

pub(crate) use gather::Gather;
use header::Header;
use locate::Located;
use reading::read_at;
use text::{PIECE, Text};

use crate::cancel::{self, CancelToken, Watch};
use crate::types::DType;

/// Most headers of a checkpoint in all, in bytes; the largest real ones have a tenth of this.
pub(crate) const MAX_ALL_HEADERS_BYTES: u64 = 4 * MAX_HEADER_BYTES;
/// Shards that stay open. Those beyond are opened for each read, so that a checkpoint of thousands
/// of shards does not use up the process's descriptors.
const MAX_OPEN_SHARDS: usize = 128;

/// A tensor of a checkpoint and where it lies. A weight that bitsandbytes has quantized is one
/// tensor, with the type and the shape that it had before; so is one that another method has, if it is
/// decoded ([`OpenOptions::dequantize`]).
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// Its key, for example `model.layers.0.mlp.up_proj.weight`. Without control characters.
    pub name: String,
    /// Type of its elements.
    pub dtype: DType,
    /// Row-major; empty for a scalar.
    pub shape: Vec<u64>,
    /// Bytes it occupies at `offset`: what `dtype` and `shape` give, or its codes if it is
    /// quantized or encoded.
    pub bytes: u64,
    /// Index of its file in [`Checkpoint::shards`].
    pub shard: usize,
    /// Its first byte, counted from the start of the file.
    pub offset: u64,
    /// How it is quantized in the checkpoint, if bitsandbytes has.
    pub quantized: Option<Box<Quantized>>,
    /// How it is encoded in the checkpoint, if another method has quantized it and it is decoded as it
    /// is read.
    pub encoded: Option<Box<Encoded>>,
    /// What part of which tensor of the files it is, in a checkpoint that has been cut
    /// ([`Checkpoint::cut`]). If its bytes do not follow each other, `offset` is the whole tensor's, and so
    /// are the beginnings of its scales.
    pub piece: Option<Box<Piece>>,
}

impl TensorInfo {
    /// Returns the number of bytes of all its parts in the checkpoint: its own, and the scales of a
    /// quantized or encoded weight.
    pub fn source_bytes(&self) -> u64 {
        let scales = self.quantized.as_ref().map_or(0, |quantized| {
            let nested = quantized.nested.map_or(0, |nested| nested.absmax.bytes);
            quantized.absmax.bytes + quantized.absmax_form.extra_bytes() + nested
        });
        let extra = self
            .encoded
            .as_ref()
            .map_or(0, |encoded| encoded.extra_bytes());
        self.bytes + scales + extra
    }

    /// Returns its bytes in the file: from the first to the last, where they do not follow each other.
    pub fn range(&self) -> Range<u64> {
        match self.gather() {
            Some(gather) if self.encoded.is_none() => {
                let span = gather.span(0, gather.len());
                self.offset + span.start..self.offset + span.end
            }
            _ => self.offset..self.offset + self.bytes,
        }
    }

    /// Whether it is decoded or gathered as it is read, so that places in it are none in the file.
    pub(crate) fn is_indirect(&self) -> bool {
        self.encoded.is_some() || self.gather().is_some()
    }

    /// Where its bytes lie among those of the tensor that it is a part of, unless they follow each other.
    pub(crate) fn gather(&self) -> Option<&Gather> {
        self.piece.as_ref()?.data.as_ref()
    }
}

/// How to open a checkpoint.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct OpenOptions {
    /// Which weights that another method has quantized are decoded as they are read.
    pub dequantize: Dequantize,
    /// Looked at after every few milliseconds of work: a checkpoint can have hundreds of megabytes of
    /// headers.
    pub cancel: CancelToken,
}

tightfit_common::setters!([] OpenOptions:
    with_dequantize: dequantize, Dequantize;
    with_cancel: cancel, CancelToken;
);

/// A checkpoint whose files are open and whose headers have been checked.
///
/// Shareable between threads: reads take no lock and no position.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    directory: Arc<Directory>,
    shards: Arc<[Shard]>,
    tensors: Vec<TensorInfo>,
    /// Indices of `tensors`, sorted by name.
    by_name: Vec<u32>,
    source_bytes: u64,
    config: Option<Config>,
    ties: Vec<Tie>,
    untied: Vec<Tie>,
    metadata: BTreeMap<String, String>,
    remarks: Vec<Remark>,
    quantization: Option<QuantizationMethod>,
    encoded: EncodedCounts,
}

impl Checkpoint {
    /// Opens a `.safetensors` file, an index, or a directory and reads what is in it, without
    /// reading weights; but for an output head that is stored although it is tied to the embedding, which
    /// is compared with it.
    ///
    /// In a directory `model.safetensors` is the file, as for transformers, unless an index names it
    /// as one of several; else `model.safetensors.index.json` names the files, and of a tensor that
    /// several of them hold the one that counts; else a complete set of `*-0000i-of-0000N.safetensors`; else the only
    /// `.safetensors` file. `config.json` is read from beside the files.
    ///
    /// `path` may be a link to anywhere. Every other file must lie, all links followed, in the
    /// directory, or in `blobs` of the same entry of the Hugging Face cache, and must be a regular
    /// file.
    ///
    /// # Errors
    /// A [`CheckpointError`] that names the file and the part of it that is wrong.
    pub fn open(path: impl AsRef<Path>) -> Result<Checkpoint, CheckpointError> {
        Checkpoint::open_with(path, &OpenOptions::default())
    }

    /// [`Checkpoint::open`] with options, until it is asked to stop: what was read by then is given back.
    ///
    /// # Errors
    /// [`CheckpointError::Cancelled`], and as [`Checkpoint::open`].
    pub fn open_with(
        path: impl AsRef<Path>,
        options: &OpenOptions,
    ) -> Result<Checkpoint, CheckpointError> {
        Checkpoint::open_path(path.as_ref(), options)
    }

    fn open_path(path: &Path, options: &OpenOptions) -> Result<Checkpoint, CheckpointError> {
        let cancel = &options.cancel;
        let located = locate::locate(path, cancel)?;
        // First, because it is small and most likely to be what is broken in an edited model.
        let config = Config::read(&located.directory, cancel)?;
        Checkpoint::of_files(path, located, config, options)
    }

    /// Opens a given list of `.safetensors` files as one checkpoint, whatever else lies beside them:
    /// the files that a program has chosen, of a variant or a revision. Each may be a link to anywhere.
    /// `config.json` is read from beside the first. Where an index there lists just these files, it says
    /// which copy of a tensor counts; otherwise no tensor may be in two.
    ///
    /// # Errors
    /// [`CheckpointError::NoFiles`], and as [`Checkpoint::open_with`].
    pub fn open_files(
        files: &[PathBuf],
        options: &OpenOptions,
    ) -> Result<Checkpoint, CheckpointError> {
        let located = locate::locate_files(files, &options.cancel)?;
        let config = Config::read(&located.directory, &options.cancel)?;
        let path = match files {
            [file] => file.clone(),
            _ => located.directory.path().to_owned(),
        };
        Checkpoint::of_files(&path, located, config, options)
    }

    /// Returns the same checkpoint with only those tensors for whose indices `keep` holds: policies and
    /// plans know nothing of the others. A tie to a tensor that is left out goes with it.
    pub fn filtered(&self, keep: impl Fn(usize) -> bool) -> Checkpoint {
        let mut places = vec![None; self.tensors.len()];
        let mut tensors = Vec::new();
        for (index, tensor) in self.tensors.iter().enumerate() {
            if keep(index) {
                places[index] = Some(tensors.len());
                tensors.push(tensor.clone());
            }
        }
        let moved = |ties: &[Tie]| {
            let tie = |tie: &Tie| {
                Some(Tie {
                    tensor: places[tie.tensor]?,
                    alias: tie.alias.clone(),
                    alias_tensor: tie.alias_tensor.and_then(|alias| places[alias]),
                })
            };
            ties.iter().filter_map(tie).collect()
        };
        let (ties, untied) = (moved(&self.ties), moved(&self.untied));
        self.derived(tensors, ties, untied)
    }

    /// The same checkpoint with other tensors of its files, and ties of these.
    fn derived(&self, tensors: Vec<TensorInfo>, ties: Vec<Tie>, untied: Vec<Tie>) -> Checkpoint {
        Checkpoint {
            config: self.config.clone(),
            ties,
            untied,
            metadata: self.metadata.clone(),
            remarks: self.remarks.clone(),
            quantization: self.quantization.clone(),
            encoded: self.encoded,
            ..self.view(tensors)
        }
    }

    /// A checkpoint of which only this is here: what its files begin with, and their lengths. It can be
    /// planned for; its weights cannot be read.
    ///
    /// # Errors
    /// [`CheckpointError::HeadersOnly`] where opening it takes more, and as [`Checkpoint::open`].
    #[cfg(feature = "hub")]
    pub(crate) fn of_beginnings(
        name: &str,
        config: Option<Config>,
        index: Option<Index>,
        files: Vec<Beginning>,
        options: &OpenOptions,
    ) -> Result<Checkpoint, CheckpointError> {
        let located = Located {
            // It has none, and nothing is read there: `save` asks first.
            directory: Arc::new(Directory::open(&std::env::temp_dir())?),
            shards: files.into_iter().map(Source::Beginning).collect(),
            index,
            remarks: Vec::new(),
        };
        Checkpoint::of_files(Path::new(name), located, config, options)
    }

    /// Whether its weights are elsewhere.
    pub(crate) fn has_headers_only(&self) -> bool {
        #[cfg(feature = "hub")]
        return self.shards.iter().any(Shard::is_beginning);
        #[cfg(not(feature = "hub"))]
        false
    }

    fn of_files(
        path: &Path,
        located: Located,
        config: Option<Config>,
        options: &OpenOptions,
    ) -> Result<Checkpoint, CheckpointError> {
        let cancel = &options.cancel;
        let mut watch = Watch::new(cancel);
        let mut shards = Vec::with_capacity(located.shards.len());
        let mut tensors = Vec::new();
        let mut metadata = BTreeMap::new();
        let mut header_bytes = 0;
        let mut source_bytes: u64 = 0;
        for source in located.shards {
            cancel.check()?;
            let mut shard = Shard::open(source)?;
            let path = shard.path().to_owned();
            let (header, data) = read_header(&shard, &mut header_bytes, cancel)
                .map_err(|error| error.or_kind(locate::kind(&shard)))?;
            if tensors.len() + header.tensors.len() > MAX_TENSORS {
                return Err(CheckpointError::TooLarge {
                    path: path.clone(),
                    what: "a number of tensors in this and earlier files",
                    have: (tensors.len() + header.tensors.len()) as u64,
                    limit: MAX_TENSORS as u64,
                });
            }
            // Sparse files can be of any length, so that even this sum needs care.
            source_bytes = source_bytes.checked_add(shard.length()).ok_or_else(|| {
                CheckpointError::TooLarge {
                    path: path.clone(),
                    what: "the length of this and earlier files (bytes)",
                    have: u64::MAX,
                    limit: u64::MAX,
                }
            })?;
            source_bytes -= data;
            for (key, value) in header.metadata {
                watch.item(key.len())?;
                metadata.entry(key).or_insert(value);
            }
            if metadata.len() > MAX_METADATA {
                return Err(CheckpointError::TooLarge {
                    path: path.clone(),
                    what: "a number of metadata entries in this and earlier files",
                    have: metadata.len() as u64,
                    limit: MAX_METADATA as u64,
                });
            }
            tensors.reserve(header.tensors.len());
            for tensor in header.tensors {
                watch.item(0)?;
                tensors.push(TensorInfo {
                    bytes: tensor.end - tensor.begin,
                    offset: data + tensor.begin,
                    shard: shards.len(),
                    name: tensor.name,
                    dtype: tensor.dtype,
                    shape: tensor.shape,
                    quantized: None,
                    encoded: None,
                    piece: None,
                });
            }
            if shards.len() >= MAX_OPEN_SHARDS {
                shard.close();
            }
            shards.push(shard);
        }
        if let Some(index) = &located.index {
            let dropped = drop_superseded(index, &mut tensors, cancel)?;
            source_bytes -= dropped;
        }
        let by_name = sorted_by_name(&tensors, &shards, cancel)?;
        if adapter::is_adapter(&tensors, cancel)? {
            return Err(adapter::error(&located.directory, cancel));
        }
        if let Some(index) = located.index {
            check_index(&index, &tensors, &by_name, &shards, cancel)?;
        }
        let count = tensors.len();
        let tensors = quantized::assemble(tensors, &shards, cancel)?;
        let by_name = match tensors.len() == count {
            true => by_name,
            false => sorted_by_name(&tensors, &shards, cancel)?,
        };
        let mut remarks = located.remarks;
        remarks.extend(quantized::remark(&tensors, cancel)?);
        let quantization = quantization(config.as_ref(), &tensors, &by_name, cancel)?;
        let read_whole = |tensor: &TensorInfo| {
            let mut bytes = vec![0; tensor.bytes as usize];
            match read_at(&shards, &[], tensor.shard, tensor.offset, &mut bytes) {
                Ok(()) => Ok(Some(bytes)),
                Err(CheckpointError::HeadersOnly { .. }) => Ok(None),
                Err(error) => Err(error),
            }
        };
        let count = tensors.len();
        let found = encoded::find(
            tensors,
            &by_name,
            config.as_ref(),
            options.dequantize,
            &read_whole,
            cancel,
        )?;
        let tensors = found.tensors;
        let by_name = match found.counts.decoded {
            0 if tensors.len() == count => by_name,
            _ => sorted_by_name(&tensors, &shards, cancel)?,
        };
        let named: Vec<ties::Named<'_>> = tensors
            .iter()
            .map(|tensor| ties::Named {
                name: &tensor.name,
                shape: &tensor.shape,
            })
            .collect();
        let read = |tensor: &TensorInfo, start: u64, buffer: &mut [u8]| {
            read_at(
                &shards,
                &tensors,
                tensor.shard,
                tensor.offset + start,
                buffer,
            )
        };
        let (mut tied, mut untied) = (Vec::new(), Vec::new());
        for tie in ties::find(&named, config.as_ref(), cancel)? {
            let differs = match tie.alias_tensor {
                Some(alias) => ties::differ(&tensors[tie.tensor], &tensors[alias], read, cancel)?,
                None => false,
            };
            match differs {
                true => untied.push(tie),
                false => tied.push(tie),
            }
        }
        Ok(Checkpoint {
            path: path.into(),
            directory: located.directory,
            ties: tied,
            untied,
            source_bytes,
            shards: shards.into(),
            tensors,
            by_name,
            config,
            metadata,
            remarks,
            quantization,
            encoded: found.counts,
        })
    }

    /// Some tensors of the same files as a checkpoint of their own, for example parts of a stack.
    pub(crate) fn view(&self, tensors: Vec<TensorInfo>) -> Checkpoint {
        let mut by_name: Vec<u32> = (0..tensors.len() as u32).collect();
        by_name.sort_unstable_by_key(|&i| &tensors[i as usize].name);
        Checkpoint {
            path: self.path.clone(),
            directory: Arc::clone(&self.directory),
            shards: Arc::clone(&self.shards),
            by_name,
            source_bytes: tensors.iter().map(TensorInfo::source_bytes).sum(),
            tensors,
            config: None,
            ties: Vec::new(),
            untied: Vec::new(),
            metadata: BTreeMap::new(),
            remarks: Vec::new(),
            quantization: None,
            encoded: EncodedCounts::default(),
        }
    }

    /// Returns what was opened: the path as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory that its files lie in.
    pub(crate) fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    /// Returns the files, in order of their names.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// Returns every tensor, file by file and in a file by offset. A tensor's index here is its
    /// identity.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Index of the tensor with this name.
    pub fn find(&self, name: &str) -> Option<usize> {
        find(name, &self.tensors, &self.by_name)
    }

    /// Returns the number of bytes of all tensors, without headers.
    pub fn source_bytes(&self) -> u64 {
        self.source_bytes
    }

    /// Returns the model's configuration, where there is one beside the files.
    pub fn config(&self) -> Option<&Config> {
        self.config.as_ref()
    }

    /// Returns the text of the model's configuration as a policy is told it: JSON to the letter
    /// ([`Config::strict_text`]), `{}` where there is none.
    pub fn config_json(&self) -> &str {
        self.config.as_ref().map_or("{}", Config::strict_text)
    }

    /// Tensors that the model uses under a second name.
    pub fn ties(&self) -> &[Tie] {
        &self.ties
    }

    /// Pairs that the configuration ties although other values are stored under the second name: both are
    /// tensors of their own, as transformers 5 has it, and users should be told.
    pub fn untied(&self) -> &[Tie] {
        &self.untied
    }

    /// `__metadata__` of the files; of equal keys that of the first file.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Returns the method by which it has been quantized already, by bitsandbytes or another: as
    /// config.json says, or as its tensors show. What such a checkpoint has in floating point was left
    /// so on purpose; [`plan::propose`](crate::plan::propose) leaves it so, but beside bitsandbytes' 4 bits:
    /// what these skipped, policies know. What is decoded as it is read ([`TensorInfo::encoded`]) may be
    /// quantized anew.
    pub fn quantization(&self) -> Option<&QuantizationMethod> {
        self.quantization.as_ref()
    }

    /// Returns how many weights other methods than bitsandbytes' 4 bits have quantized, and whether they
    /// are decoded as they are read.
    pub fn encoded(&self) -> EncodedCounts {
        self.encoded
    }

    /// Returns what whoever loads it should hear: which of its files were not looked at, and why.
    pub fn remarks(&self) -> &[Remark] {
        &self.remarks
    }
}

/// The method by which a checkpoint has been quantized.
fn quantization(
    config: Option<&Config>,
    tensors: &[TensorInfo],
    by_name: &[u32],
    cancel: &CancelToken,
) -> Result<Option<QuantizationMethod>, CheckpointError> {
    let stated = config.and_then(|config| method::of_config(&config.json));
    match stated {
        // Of bitsandbytes' 4 bits the weights are seen; a configuration without them is left over
        // from weights that have been replaced.
        Some(method) if method.is_bitsandbytes_4bit() => {
            let is_there = tensors.iter().any(|tensor| tensor.quantized.is_some());
            Ok(Some(method).filter(|_| is_there))
        }
        None => Ok(method::of_tensors(tensors, by_name, cancel)?),
        stated => Ok(stated),
    }
}

/// Takes out the tensors that the index places in another shard, as transformers does: an overlay
/// replaces a few tensors of a checkpoint, whose shards still hold the old ones. Returns their bytes.
fn drop_superseded(
    index: &index::Index,
    tensors: &mut Vec<TensorInfo>,
    cancel: &CancelToken,
) -> Result<u64, CheckpointError> {
    let mut watch = Watch::new(cancel);
    let mut dropped = 0;
    let mut outcome = Ok(());
    tensors.retain(|tensor| {
        outcome = outcome.and_then(|()| watch.item(8 * tensor.name.len()));
        match index.shard_of(&tensor.name) {
            Some(shard) if shard != tensor.shard && outcome.is_ok() => {
                dropped += tensor.bytes;
                false
            }
            _ => true,
        }
    });
    outcome?;
    Ok(dropped)
}

/// Every entry of the index is in the shard that it names. Tensors that the index does not list
/// are tensors like all others: transformers loads them too.
fn check_index(
    index: &index::Index,
    tensors: &[TensorInfo],
    by_name: &[u32],
    shards: &[Shard],
    cancel: &CancelToken,
) -> Result<(), CheckpointError> {
    let mut watch = Watch::new(cancel);
    for (name, shard) in &index.entries {
        // Compared as often as a binary search does.
        watch.item(8 * name.len())?;
        let found = find(name, tensors, by_name).map(|i| tensors[i].shard);
        if found != Some(*shard) {
            return Err(CheckpointError::NotInShard {
                path: shards[*shard].path().into(),
                tensor: name.clone(),
            });
        }
    }
    Ok(())
}

/// Index of the tensor with this name.
fn find(name: &str, tensors: &[TensorInfo], by_name: &[u32]) -> Option<usize> {
    let position = by_name
        .binary_search_by(|&i| tensors[i as usize].name.as_str().cmp(name))
        .ok()?;
    Some(by_name[position] as usize)
}

/// Reads and checks the header of a file; gives also the offset of the data.
fn read_header(
    shard: &Shard,
    total: &mut u64,
    cancel: &CancelToken,
) -> Result<(Header, u64), CheckpointError> {
    let path = shard.path();
    // What was long enough a moment ago.
    let cut = |failure, need| match failure {
        ReadFailure::Other(error) => error,
        ReadFailure::CutShort(have) => CheckpointError::HeaderPastEnd {
            path: path.into(),
            need,
            have,
        },
    };
    if shard.length() < 8 {
        return Err(CheckpointError::NoHeader {
            path: path.into(),
            have: shard.length(),
        });
    }
    let mut first = [0; 8];
    shard
        .read_at(0, &mut first)
        .map_err(|failure| cut(failure, 8))?;
    let length = header::header_length(path, first, shard.length())?;
    *total += length as u64;
    if *total > MAX_ALL_HEADERS_BYTES {
        return Err(CheckpointError::TooLarge {
            path: path.into(),
            what: "the headers of this and earlier files (bytes)",
            have: *total,
            limit: MAX_ALL_HEADERS_BYTES,
        });
    }
    let data = length as u64 + 8;
    let not_utf8 = |_| CheckpointError::NotUtf8 {
        path: path.into(),
        what: header::WHAT,
    };
    let mut text = Text::with_capacity(length);
    let mut piece = vec![0; PIECE.min(length)];
    for start in (0..length).step_by(PIECE) {
        cancel.check()?;
        let piece = &mut piece[..PIECE.min(length - start)];
        shard
            .read_at(8 + start as u64, piece)
            .map_err(|failure| cut(failure, data))?;
        text.push(piece).map_err(not_utf8)?;
    }
    let text = text.finish().map_err(not_utf8)?;
    let header = header::parse(path, &text, shard.length(), cancel)?;
    Ok((header, data))
}

/// Indices of the tensors, sorted by name, no name twice.
fn sorted_by_name(
    tensors: &[TensorInfo],
    shards: &[Shard],
    cancel: &CancelToken,
) -> Result<Vec<u32>, CheckpointError> {
    // MAX_TENSORS fits. Equal names stay in the order of the files.
    let by_name: Vec<u32> = (0..tensors.len() as u32).collect();
    let name = |i: u32| &tensors[i as usize].name;
    let by_name = cancel::sort_by(by_name, cancel, |&a, &b| name(a).cmp(name(b)))?;
    let mut watch = Watch::new(cancel);
    for pair in by_name.windows(2) {
        watch.item(name(pair[0]).len())?;
        let (first, second) = (&tensors[pair[0] as usize], &tensors[pair[1] as usize]);
        if first.name == second.name {
            return Err(CheckpointError::DuplicateTensor {
                tensor: first.name.clone(),
                first: shards[first.shard].path().into(),
                second: shards[second.shard].path().into(),
            });
        }
    }
    Ok(by_name)
}
